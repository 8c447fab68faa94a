"""Folders as their owners have them: what is a class, a split, a label and an image is what the folder says."""

from __future__ import annotations

import io
import os
import shutil
import struct
import tempfile
import unicodedata
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from neuralcollapse.cli import main
from neuralcollapse.lab.commands import recipes
from neuralcollapse.lab.config import DataSettings
from neuralcollapse.lab.data.folders import class_folders, list_folder
from neuralcollapse.lab.data.images import ImageData
from neuralcollapse.lab.data.load import load_data


def pixels(seed: int, size: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=(size, size), dtype=np.uint8)


def encoded(seed: int) -> bytes:
    Image.fromarray(pixels(seed)).save(buffer := io.BytesIO(), "png")
    return buffer.getvalue()


def make(root: Path, folders: dict[str, int], start: int = 0) -> Path:
    """The given number of random images, all different, in each folder."""
    for folder, number in folders.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for index in range(number):
            (root / folder / f"{index}.png").write_bytes(encoded(start))
            start += 1
    return root


def load(root: Path, **options: object) -> ImageData:
    return load_data(DataSettings(data=str(root), **options), progress=False)


def named_labels(data: ImageData, split: str) -> list[str]:
    return [data.class_names[label] for label in data.splits[split].labels.tolist()]


# Classes and splits.

NAMES = [
    "train",
    "test",
    "None",
    "NA",
    "null",
    "_x",
    "__y",
    "a b",
    "[z]",
    "*",
    "?",
    "{1}",
    "it's",
    'say "a"',
    "ü",
    "-1e3",
]
SPLITS = {"train": 4, "test": 2}
THREE = {"train/a": 4, "train/b": 4, "val/a": 2, "val/b": 3, "test/a": 1, "test/b": 1}
NEW = {"new_train/a": 4, "new_train/b": 4, "new_test/a": 2, "new_test/b": 3}


@pytest.mark.parametrize("splits", [SPLITS, {"": 5}, {"Training": 4, "Testing": 2}, {"train": 4, "val": 2}], ids=str)
def test_a_class_may_have_any_name(splits, tmp_path):
    for place, (split, number) in enumerate(splits.items()):
        make(tmp_path, {f"{split}/{name}".strip("/"): number for name in NAMES}, 100 * place)
    data = load(tmp_path, **({} if "" not in splits else {"test_samples": None}))
    assert data.class_names == tuple(sorted(NAMES))
    labels = named_labels(data, "train") + named_labels(data, "test")
    assert {labels.count(name) for name in NAMES} == {sum(splits.values())}
    if "" not in splits:
        assert len(data.test) == 2 * len(NAMES)


folder_names = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=12
).filter(lambda name: not name.startswith(".") and len(name.encode()) < 200)


@settings(max_examples=40, deadline=None)
@given(st.sets(folder_names, min_size=2, max_size=5))
def test_the_classes_of_a_split_are_its_folders(names):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in names:
            for split in ("train", "test"):
                (root / split / name).mkdir(parents=True)
                (root / split / name / "0.png").touch()
        splits, _ = class_folders(list_folder(root), "data")
        expected = {unicodedata.normalize("NFC", name) for name in names}
        litter = {"thumbs.db", "desktop.ini", "__macosx", "__pycache__", "@eadir", "lost+found"}
        expected -= {name for name in expected if name.casefold() in litter}
        assert {split: set(classes) for split, classes in splits.items()} == {"train": expected, "test": expected}


@pytest.mark.parametrize(
    ("folders", "options", "train", "test", "note"),
    [
        ({"train": 5, "car": 5, "bus": 5}, {}, None, None, "taken as classes and not as splits: train"),
        ({"test tube": 5, "train set": 5, "bus": 5}, {}, None, None, "test tube, train set"),
        ({"a/1": 3, "a/2/x": 3, "b": 6}, {}, None, None, ""),
        ({"archive/in/a": 6, "archive/in/b": 6}, {}, None, None, "the images are taken from archive/in"),
        ({"test/a": 6, "test/b": 6}, {}, None, None, "its only split is test"),
        ({"train/a": 4, "train/b": 4, "test/a": 2, "test/b": 3}, {}, 8, 5, ""),
        (THREE, {}, 8, 2, "not used: val (5"),
        (THREE, {"data_options": {"test_split": "validation"}}, 8, 5, "test (2"),
        ({"train/a": 4, "train/b": 4, "test/a": 2, "test/b": 3, "new": 7}, {}, 8, 5, "new/ (7 images)"),
        ({"train/a": 4, "train/b": 4, "test/a": 2, "test/b": 3, "aug/a": 7}, {}, 8, 5, "aug/ (7 images)"),
        ({"train/a": 6, "train/b": 6, "test": 4}, {"leave_out": ["unlabelled"]}, None, None, "test/ (4 images)"),
        ({"train/train/a": 4, "train/train/b": 4, "test/test/a": 2, "test/test/b": 3}, {}, 8, 5, "train/train"),
        (NEW, {"data_options": {"train_split": "new_train", "test_split": "new_test"}}, 8, 5, ""),
        ({"train/a": 4, "train/b": 4, "train/c": 3, "test/a": 2, "test/b": 3}, {}, 11, 5, ""),
    ],
)  # fmt: skip
def test_splits_are_distinguished_from_classes(folders, options, train, test, note, tmp_path, capsys):
    data = load(make(tmp_path, folders), **options)
    if train is None:  # one image in five is held out
        number = sum(folders.values()) - (4 if "leave_out" in options else 0)
        train, test = number - round(number / 5), round(number / 5)
    assert (len(data.train), len(data.test)) == (train, test)
    assert any(note in line for line in data.notes) if note else data.notes == ()
    assert [f"data {tmp_path}: {line}" for line in data.notes] == capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ({"train/a": 4, "train/b": 4, "test": 3}, "a folder of images for each class in each split, and test of"),
        ({"train": 4, "test": 3}, "has images in test, train"),
        ({"train_images": 4, "test_images": 3}, "test_images, train_images of .* may be either"),
        ({"train/steam": 4, "train/fast": 4, "car": 3}, "train with folders in it may be either, next to car"),
        ({"a/train": 4, "a/test": 4, "b/train": 3, "b/test": 2}, "'a' of .* is a class with splits in it"),
        ({"val/a": 4, "val/b": 4, "test/a": 3, "test/b": 2}, "train_split must say which split"),
        ({"train/a": 4, "train/b": 4, "test/a": 3, "test/c": 2}, "of each of its 3 classes, but has none of c"),
        (
            {"train/a": 4, "train/b": 4, "test/A": 3, "test/b": 2},
            "'A' of its test split and 'a' of its train split differ",
        ),
        ({"": 5}, "has images alone"),
        ({"only": 5}, "has images in only"),
        ({"1": 4, "01": 4}, "a different number for each class, got 01, 1"),
        ({}, "has none; it holds no files"),
    ],
)
def test_ambiguous_folders_are_refused(folders, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(make(tmp_path, folders))


@pytest.mark.parametrize(
    "names", [[str(n) for n in range(12)], [f"{n:03}" for n in range(95, 106)], ["7", "70", "8"]], ids=str
)
def test_numbered_folders_are_in_the_order_of_their_numbers(names, tmp_path):
    data = load(make(tmp_path, {f"{split}/{name}": 2 for split in ("train", "test") for name in names}))
    assert data.class_names == tuple(sorted(names, key=int))


def test_class_attributes_follow_numbered_folders_that_begin_at_one(tmp_path):
    from neuralcollapse.lab.models.build import digits_of_classes

    data = load(make(tmp_path, {str(number): 5 for number in range(1, 13)}))
    digits = digits_of_classes(12, class_names=data.class_names)
    assert digits.tolist() == [[number // 10, number % 10] for number in range(1, 13)]


# Links, strays, and what is not to be entered.


def test_links_are_followed(tmp_path):
    make(tmp_path / "real", {"train/a": 4, "other": 4, "test/a": 1, "test/b": 1})
    os.symlink("../other", tmp_path / "real" / "train" / "b")
    single = tmp_path / "real" / "other" / "link.png"
    (tmp_path / "one.png").write_bytes(encoded(99))
    os.symlink("../../one.png", single)
    os.symlink("real", tmp_path / "root")
    data = load(tmp_path / "root")
    assert named_labels(data, "train") == ["a"] * 4 + ["b"] * 5


def test_links_that_go_in_circles_are_not_entered(tmp_path):
    make(tmp_path, {"a": 6, "b": 6})
    os.symlink("..", tmp_path / "a" / "up")
    os.symlink(".", tmp_path / "b" / "here")
    os.symlink("itself", tmp_path / "b" / "itself")
    data = load(tmp_path)
    assert len(data.train) + len(data.test) == 12
    assert data.notes == ("left out, not an image of a class: a/up/, b/here/, b/itself",)


def test_strays_are_listed_in_a_line_and_skipped(tmp_path, capsys):
    make(
        tmp_path,
        {"train/a": 4, "train/b": 4, "train": 1, "": 1, "test/a": 2, "test/b": 2, "train/.ipynb_checkpoints": 2},
    )
    make(tmp_path, {"__MACOSX/train/a": 3}, 50)
    (tmp_path / "train" / "c").mkdir()
    for name in ("train.zip", "train/a/notes.txt", ".DS_Store", "train/a/Thumbs.db", "train/a/._0.png"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "labels.csv").write_text("path,label\ntrain/a/0.png,b\n")
    os.mkfifo(tmp_path / "train" / "a" / "pipe.png")
    data = load(tmp_path)
    assert (len(data.train), len(data.test), data.class_names) == (8, 4, ("a", "b"))
    empty, table, others = data.notes
    assert empty == "left out, without an image in it: train/c/"
    assert table == "not used, as the sub-folders are the classes: labels.csv; data_options can name a table for labels"
    assert others == "left out, not an image of a class: 0.png, train.zip, train/0.png and 4 more"
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_a_broken_link_and_an_unreadable_folder_are_refused(tmp_path, monkeypatch):
    make(tmp_path, {"a": 6, "b": 6})
    os.symlink("missing.png", tmp_path / "a" / "x.png")
    with pytest.raises(ValueError, match="links that lead to a file, but 'a/x.png'"):
        load(tmp_path)
    (tmp_path / "a" / "x.png").unlink()
    scandir = os.scandir

    def denied(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(ValueError, match="folders that can be read; '.*/b' cannot: Permission denied"):
        load(tmp_path)


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    make(tmp_path, {"a": 6, "b": 6})
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/a/\xff.png")).write_bytes(encoded(0))
    with pytest.raises(ValueError, match=r"file names in UTF-8, but .* has '\\udcff.png'"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["pets [v2]", "a*b?", "x{1,2}", "a#b%20", "c; d"])
@pytest.mark.parametrize("kind", ["folders", "parquet", "table"])
def test_the_name_of_a_folder_is_not_a_pattern_and_its_siblings_are_not_read(name, kind, tmp_path, monkeypatch):
    root = tmp_path / name
    make(tmp_path / "sibling", {"a": 1})
    if kind == "parquet":
        root.mkdir()
        parquet(tmp_path / "train.parquet", [0, 1] * 5)
        (tmp_path / "train.parquet").rename(root / "train.parquet")
    else:
        make(root, {"images": 10} if kind == "table" else {"a": 5, "b": 5})
    if kind == "table":
        (root / "t.csv").write_text("path,label\n" + "".join(f"images/{n}.png,{n % 2}\n" for n in range(10)))
    scandir, read = os.scandir, []
    monkeypatch.setattr(os, "scandir", lambda path: (read.append(Path(path)), scandir(path))[1])
    assert len(load(root).train) == 8
    assert tmp_path not in read
    assert tmp_path / "sibling" not in read


# Images.


def put(root: Path, image: Image.Image, name: str = "x.png", **options: object) -> Path:
    make(root, {"a": 5, "b": 5}, 500)
    image.save(root / "a" / name, **options)
    return root


def of_x(root: Path, **options: object) -> np.ndarray:
    """The pixels (C, H, W) of that image, wherever it is."""
    data = load(root, **options)
    names = [data.splits[split].images for split in ("train", "test")]
    reference = {pixels(seed).tobytes() for seed in range(500, 510)}
    channel = [(image.numpy(), image[0].numpy().tobytes()) for part in names for image in part]
    (found,) = [image for image, key in channel if key not in reference]
    return found


def alpha(mode: str) -> Image.Image:
    image = Image.new(mode, (5, 5), (10, 10, 10, 0)[: len(mode)] if mode == "RGBA" else (10, 0))
    image.putpixel((1, 2), (10, 10, 10, 255) if mode == "RGBA" else (10, 255))
    return image


def palette() -> Image.Image:
    image = Image.new("P", (5, 5), 0)
    image.putpalette([10, 10, 10, 10, 10, 10])
    image.putpixel((1, 2), 1)
    return image


@pytest.mark.parametrize(
    ("image", "options", "channels"),
    [(alpha("RGBA"), {}, 3), (alpha("LA"), {}, 1), (palette(), {"transparency": 0}, 3)],
    ids=["RGBA", "LA", "P"],
)
def test_transparency_becomes_white(image, options, channels, tmp_path):
    expected = np.full((channels, 5, 5), 255, dtype=np.uint8)
    expected[:, 2, 1] = 10
    assert np.array_equal(of_x(put(tmp_path, image, **options)), expected)


def test_a_grey_level_that_means_transparent_is_white(tmp_path):
    image = Image.fromarray(np.array([[7, 9, 9, 9, 9]] * 5, np.uint8))
    found = of_x(put(tmp_path, image, transparency=7))
    assert found.tolist() == [[[255, 9, 9, 9, 9]] * 5]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_rotated_by_their_exif_orientation(orientation, tmp_path):
    upright = pixels(1)
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T}
    stored |= {6: np.rot90(upright), 7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored[orientation]))
    assert np.array_equal(of_x(put(tmp_path, image, exif=exif))[0], upright)


def test_the_first_frame_of_an_animation_and_one_bit_are_read(tmp_path):
    frames = [Image.fromarray(pixels(seed)) for seed in (1, 2)]
    found = of_x(put(tmp_path / "gif", frames[0], "x.gif", save_all=True, append_images=frames[1:]), channels=1)
    assert np.array_equal(found[0], pixels(1))
    found = of_x(put(tmp_path / "bit", Image.fromarray(pixels(3) > 128)))
    assert np.array_equal(found[0], (pixels(3) > 128) * 255)


def bomb(side: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def saved(image: Image.Image, kind: str) -> bytes:
    image.save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


UNREADABLE: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "empty": ("x.png", lambda: b"", "cannot identify image file$"),
    "a pointer": ("x.jpg", lambda: b"version https://git-lfs.github.com/spec/v1", "cannot identify image file$"),
    "cut off": ("x.png", lambda: saved(Image.fromarray(pixels(1, 50)), "png")[:900], ""),
    "16 bits": ("x.png", lambda: saved(Image.fromarray(np.ones((5, 5), np.uint16)), "png"), "must have 8 bits"),
    "floats": ("x.tiff", lambda: saved(Image.fromarray(np.ones((5, 5), np.float32)), "tiff"), "must have 8 bits"),
    "a bomb": ("x.png", lambda: bomb(20_000), "400000000 pixels"),
    "a small bomb": ("x.png", lambda: bomb(12_000), "144000000 pixels"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("workers", ["in-memory", 0])
def test_an_image_that_cannot_be_read_is_named_in_a_line(kind, workers, tmp_path):
    name, content, reason = UNREADABLE[kind]
    make(tmp_path, {"a": 5, "b": 5, "c": 5})
    (tmp_path / "a" / name).write_bytes(content())

    def read() -> list[object]:
        data = load(tmp_path, image_size=5, workers=workers)
        return [list(split.batches([torch.arange(len(split))])) for split in data.splits.values()]

    with pytest.raises(ValueError, match=f"a/{name} of .* cannot: .*{reason}") as caught:
        read()
    assert "\n" not in str(caught.value)


def test_a_bomb_ends_the_command_with_one_line(tmp_path, capsys):
    make(tmp_path / "data", {"a": 5, "b": 5})
    (tmp_path / "data" / "b" / "x.png").write_bytes(bomb(20_000))
    assert main(["train", "--data", str(tmp_path / "data"), "--image_size", "8", "--out", str(tmp_path / "out")]) == 2
    assert "b/x.png" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


# Copies.


def copied(root: Path, suffix: str = "png") -> Path:
    make(root, {"train/a": 6, "train/b": 6, "test/a": 3, "test/b": 3})
    Image.open(root / "train/b/4.png").save(root / f"test/a/again.{suffix}")
    return root


@pytest.mark.parametrize("options", [{}, {"image_size": 3}, {"workers": 0}], ids=str)
def test_a_test_image_that_is_trained_on_is_refused_with_both_files(options, tmp_path):
    message = r"train/b/4.png and test/a/again.png are the same; 1 of 7 test images"
    with pytest.raises(ValueError, match=message):
        load(copied(tmp_path), **options)
    data = load(tmp_path, leave_out=["copies"], **options)
    assert len(data.test) == 6
    assert "1 of 7 test images are training images too and left out" in data.notes[0]


def test_a_copy_in_another_format_or_behind_a_link_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"train/b/4.png and test/a/again.bmp are the same"):
        load(copied(tmp_path / "bmp", "bmp"))
    make(tmp_path / "link", {"train/a": 6, "train/b": 6, "test/b": 3})
    os.symlink("../train/a", tmp_path / "link" / "test" / "a")
    with pytest.raises(ValueError, match="6 of 9 test images"):
        load(tmp_path / "link")


def test_images_that_only_look_alike_when_they_are_small_are_not_copies(tmp_path):
    for number, split in enumerate(("train", "test")):
        make(tmp_path, {f"{split}/b": 4}, 10 * number)
        (tmp_path / split / "a").mkdir()
        checks = np.kron([[0, 200], [200, 0]], np.ones((8, 8))).astype(np.uint8)
        checks[0, 0] += number
        Image.fromarray(checks).save(tmp_path / split / "a" / "0.png")
    assert len(load(tmp_path, image_size=2).test) == 5


@pytest.mark.parametrize("share", [None, 0.25])
def test_copies_are_on_one_side_where_images_are_held_out(share, tmp_path):
    for name in ("a", "b"):
        make(tmp_path, {name: 10}, 100 * (name == "b"))
        for number in range(0, 10, 2):
            shutil.copy(tmp_path / name / f"{number}.png", tmp_path / name / f"{number}-again.png")
    data = load(tmp_path, **({} if share is None else {"validation_share": share}))
    sides = [{image.numpy().tobytes() for image in split.images} for split in data.splits.values()]
    assert sum(map(len, sides)) == len(set().union(*sides)) == 20
    assert sum(len(split) for split in data.splits.values()) == 30


def test_images_of_one_colour_are_not_taken_for_copies(tmp_path):
    for split in ("train", "test"):
        for name, shade in (("a", 10), ("b", 200)):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(3):
                Image.new("L", (4, 4), shade).save(tmp_path / split / name / f"{number}.png")
    assert len(load(tmp_path).test) == 6


# Tables of paths.

ROWS = [f"images/{number}.png,{'ab'[number % 2]}" for number in range(12)]


def table(root: Path, rows: list[str], header: str = "path,label", name: str = "t.csv") -> Path:
    make(root, {"images": 12})
    (root / name).write_text("\n".join([header, *rows]) + "\n")
    return root


def with_column(values: list[object]) -> list[str]:
    return [f"{row},{values[number % len(values)]}" for number, row in enumerate(ROWS)]


def test_texts_that_pandas_takes_for_missing_values_are_classes(tmp_path):
    names = ["None", "NA", "null", "nan"]
    rows = [f"images/{number}.png,{names[number % 4]}" for number in range(12)]
    assert set(load(table(tmp_path, rows)).class_names) == set(names)


@pytest.mark.parametrize(
    ("column", "values", "train", "test"),
    [
        ("split", ["train"] * 4 + ["test"] * 2, 8, 4),
        ("data set", ["training"] * 4 + ["valid"] * 2, 8, 4),
        ("anything", ["train"] * 8 + ["test"] * 2 + ["val"] * 2, 8, 2),
        ("Usage", ["Training"] * 10 + ["PublicTest"] * 2, 8, 2),
        ("is_train", [1] * 8 + [0] * 4, 8, 4),
        ("is_test", ["False"] * 8 + ["True"] * 4, 8, 4),
        ("weight", [1] * 12, 10, 2),
    ],
)
def test_the_column_of_splits_is_respected(column, values, train, test, tmp_path):
    data = load(table(tmp_path, with_column(values), f"path,label,{column}"))
    assert (len(data.train), len(data.test)) == (train, test)


@pytest.mark.parametrize("column", [True, False])
def test_a_table_beside_folders_is_used_only_when_asked_for(column, tmp_path):
    make(tmp_path, {"train/a": 4, "train/b": 4, "valid/a": 3, "valid/b": 3})
    rows = [
        f"{split}/{name}/{number}.png,{'ba'[name == 'b']}{f',{split}' * column}"
        for split, most in (("train", 4), ("valid", 3))
        for name in "ab"
        for number in range(most)
    ]
    (tmp_path / "t.csv").write_text("path,label" + ",set" * column + "\n" + "\n".join(rows))
    folders, asked = load(tmp_path), load(tmp_path, data_options={"table": "t.csv"})
    assert asked.train.images.equal(folders.train.images)
    assert asked.test.images.equal(folders.test.images)
    assert asked.train.labels.equal(1 - folders.train.labels)


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        ([*ROWS, "../images/1.png,a"], "path,label", r"paths within the data folder, and line 14 of t.csv has '../im"),
        ([*ROWS, "/etc/passwd.png,a"], "path,label", "paths within the data folder, and line 14"),
        ([*ROWS, "images/pipe.png,a"], "path,label", "images/pipe.png of line 14 of t.csv cannot: it is not a regular"),
        ([*ROWS, "images/none.png,a"], "path,label", "images/none.png of line 14 of t.csv cannot: No such file"),
        ([*ROWS, ",a"], "path,label", "a path for each image, and line 14 of t.csv has none"),
        ([*ROWS[1:], "images/0.png,"], "path,label", r"its train split has images without \(1 of 12\)"),
        ([*ROWS, "images/1.png,a"], "path,label", "one label for each image, and images/1.png has 'b' and 'a'"),
        ([*ROWS, "images/1.png"], "path,label", "2 values in each row, as it has columns; line 14 has 1"),
        (ROWS[1:], ROWS[0], "must begin with a line of column names, and begins with"),
        ([f"images/{n}.png,{n % 2}.5" for n in range(12)], "path,label", "names, and 'label' has numbers such as 0.5"),
        ([f"images/{n}.png,{-n % 3 - 4}" for n in range(12)], "path,label", "labels of at least 0, or -1"),
    ],
)  # fmt: skip
def test_an_invalid_table_is_refused_with_its_line(rows, header, message, tmp_path):
    table(tmp_path, rows, header)
    os.mkfifo(tmp_path / "images" / "pipe.png")
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_splits_of_a_column_and_of_folders_must_agree(tmp_path):
    make(tmp_path, {"train": 6, "test": 6})
    rows = [f"{split}/{number}.png,{'ab'[number % 2]},train" for split in ("train", "test") for number in range(6)]
    (tmp_path / "t.csv").write_text("\n".join(["path,label,split", *rows]))
    with pytest.raises(ValueError, match="line 8 has 'train' by column 'split' and 'test' by the folder of the path"):
        load(tmp_path)


@pytest.mark.parametrize("header", ["path,label,class_id", "path,species name,label"])
def test_a_column_of_numbers_gives_the_order_of_names(header, tmp_path):
    order = {"a": 2, "b": 0, "c": 1}
    rows = [f"images/{number}.png,{'abc'[number % 3]},{order['abc'[number % 3]]}" for number in range(12)]
    assert load(table(tmp_path, rows, header)).class_names == ("b", "c", "a")


def test_tables_of_another_dialect_are_read(tmp_path):
    expected = load(table(tmp_path / "plain", ROWS)).train.labels
    semicolons = [row.replace(",", ";") for row in ROWS]
    backslashes = [row.replace("/", "\\") for row in ROWS]
    assert load(table(tmp_path / "excel", semicolons, "\ufeffpath;label")).train.labels.equal(expected)
    assert load(table(tmp_path / "windows", backslashes)).train.labels.equal(expected)
    root = make(tmp_path / "hub", {"train": 6, "test": 4})
    for split, number in (("train", 6), ("test", 4)):
        lines = [f'{{"file_name": "{place}.png", "label": {place % 2}}}' for place in range(number)]
        (root / split / "metadata.jsonl").write_text("\n".join(lines))
    assert (len(load(root).train), len(load(root).test)) == (6, 4)


def test_a_test_table_without_labels_is_refused_or_left_out(tmp_path):
    make(tmp_path, {"images": 12})
    (tmp_path / "train.csv").write_text("\n".join(["path,label", *ROWS[:10]]))
    (tmp_path / "test.csv").write_text("\n".join(["path", "images/10.png", "images/11.png"]))
    with pytest.raises(ValueError, match=r"its test split has images without \(2 of 2\)"):
        load(tmp_path)
    data = load(tmp_path, leave_out=["unlabelled"])
    assert (len(data.train), len(data.test)) == (8, 2)
    assert "the test split left out: none of its images has a label" in data.notes


# Parquet files.


def parquet(path: Path, labels: list[object], names: list[str] | None = None, start: int = 0) -> None:
    kind = (
        datasets.ClassLabel(names=names)
        if names
        else datasets.Value("string" if isinstance(labels[0], str) else "int64")
    )
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    images = [{"bytes": encoded(start + number), "path": None} for number in range(len(labels))]
    datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(path)


@pytest.mark.parametrize(
    ("labels", "names"),
    [([0, 1, 2] * 2, ["c", "a", "b"]), (["c", "a", "b"] * 2, None), ([2, 3, 1] * 2, ["x", "b", "c", "a"])],
)
def test_labels_of_two_files_are_reconciled_by_name(labels, names, tmp_path):
    parquet(tmp_path / "train.parquet", [0, 1, 2] * 4, ["a", "b", "c"])
    parquet(tmp_path / "test.parquet", labels, names, 100)
    data = load(tmp_path)
    assert data.class_names == ("a", "b", "c")
    assert named_labels(data, "test") == ["c", "a", "b"] * 2


def test_shards_that_declare_another_order_are_reconciled_by_name(tmp_path):
    parquet(tmp_path / "train-00000-of-00002.parquet", [0, 1, 2], ["a", "b", "c"])
    parquet(tmp_path / "train-00001-of-00002.parquet", [0, 1, 2], ["c", "b", "a"], 10)
    parquet(tmp_path / "test-00000-of-00001.parquet", [0, 1, 2], ["b", "c", "a"], 20)
    data = load(tmp_path)
    assert named_labels(data, "train") == ["a", "b", "c", "c", "b", "a"]
    assert named_labels(data, "test") == ["b", "c", "a"]
    (tmp_path / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="all files of its split 'train'; .* has 1 of 2"):
        load(tmp_path)


def test_labels_of_different_kinds_and_unknown_ones_are_refused(tmp_path):
    parquet(tmp_path / "train.parquet", [0, 1], ["a", "b"])
    parquet(tmp_path / "test.parquet", [0, 1], None, 10)
    with pytest.raises(ValueError, match="labels of one kind: those of its test split are numbers such as 0"):
        load(tmp_path)
    parquet(tmp_path / "test.parquet", [0, 1], ["a", "eel"], 10)
    with pytest.raises(ValueError, match="has none of eel"):
        load(tmp_path)


@pytest.mark.parametrize("labels", [[-1, 0, 1, 0, -1, 1], ["-1", "0", "1", "0", "-1", "1"]])
def test_the_label_minus_one_is_not_a_class(labels, tmp_path):
    parquet(tmp_path / "train.parquet", labels * 3)
    parquet(tmp_path / "test.parquet", labels[1:4], None, 100)
    data = load(tmp_path)
    assert (data.class_names, len(data.train), len(data.test)) == (("0", "1"), 12, 3)
    assert data.notes == ("6 of 18 images of the train split left out: they have no label",)
    parquet(tmp_path / "test.parquet", labels, None, 100)
    with pytest.raises(
        ValueError, match="2 of 6 in its test split have -1, which means unlabelled: --leave_out unlabelled"
    ):
        load(tmp_path)
    assert len(load(tmp_path, leave_out=["unlabelled"]).test) == 4


def test_a_hidden_test_set_is_refused_or_another_split_is_taken(tmp_path):
    parquet(tmp_path / "train.parquet", [0, 1] * 5, ["a", "b"])
    parquet(tmp_path / "test.parquet", [-1] * 4, ["a", "b"], 20)
    parquet(tmp_path / "validation.parquet", [0, 1, 1], ["a", "b"], 30)
    with pytest.raises(ValueError, match="4 of 4 in its test split have -1"):
        load(tmp_path)
    assert len(load(tmp_path, data_options={"test_split": "validation"}).test) == 3
    assert len(load(tmp_path, leave_out=["unlabelled"]).test) == 3
    with pytest.raises(ValueError, match="test_split must be a split with labels, and no image of 'test' has one"):
        load(tmp_path, data_options={"test_split": "test"}, leave_out=["unlabelled"])


def test_rows_of_parquet_files_that_are_in_both_splits_are_refused(tmp_path):
    parquet(tmp_path / "train.parquet", [0, 1] * 5)
    parquet(tmp_path / "test.parquet", [0, 1] * 2, None, 9)
    with pytest.raises(ValueError, match=r"row 10 of .* \(train\) and row 1 of .* \(test\) are the same; 1 of 4"):
        load(tmp_path)
    assert len(load(tmp_path, leave_out=["copies"]).test) == 3


def test_paths_in_parquet_files_stay_within_the_folder(tmp_path):
    import pandas as pd

    for path, reason in (
        ("../x.png", "paths must stay within the data folder"),
        ("pipe.png", "it is not a regular file"),
    ):
        root = make(tmp_path / reason, {"images": 1})
        os.mkfifo(root / "pipe.png")
        pd.DataFrame({"path": ["images/0.png", path], "label": [0, 1]}).to_parquet(root / "train.parquet")
        with pytest.raises(ValueError, match=f"{path} of .* cannot: {reason}"):
            load(root)


def test_a_changed_file_of_the_same_size_and_time_is_read_again(tmp_path):
    file = tmp_path / "train.parquet"
    parquet(file, [0, 1] * 5)
    before, status = load(tmp_path), file.stat()
    parquet(tmp_path / "new", [1, 0] * 5, None, 50)
    os.utime(tmp_path / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
    (tmp_path / "new").replace(file)
    after = load(tmp_path)
    assert not after.train.images.equal(before.train.images)


CARD = """---
configs:
- config_name: small
  data_files:
  - split: train
    path: small/*.parquet
  - split: test
    path: [other/t*.parquet]
- config_name: large
  data_files: "**/large-*.parquet"
---
A data set.
"""


def test_the_readme_of_a_data_set_lists_the_files_of_its_configurations(tmp_path):
    for number, name in enumerate(["small/a", "small/b", "other/test", "deep/er/large-1"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        parquet(tmp_path / f"{name}.parquet", [0, 1] * 5, None, 10 * number)
    (tmp_path / "README.md").write_text(CARD)
    with pytest.raises(ValueError, match="config must be a configuration of .*, which has small, large; got None"):
        load(tmp_path)
    with pytest.raises(ValueError, match="config must be a configuration of .*, which has small, large; got 'medium'"):
        load(tmp_path, data_options={"config": "medium"})
    small = load(tmp_path, data_options={"config": "small"})
    assert (len(small.train), len(small.test)) == (20, 10)
    assert small.notes == ("not used: deep/er/large-1.parquet",)
    assert len(load(tmp_path, data_options={"config": "large"}).train) == 8
    (tmp_path / "README.md").write_text(CARD.replace("name: small", "name: small\n  default: true"))
    assert len(load(tmp_path).train) == 20
    (tmp_path / "README.md").write_text(CARD.replace("    path: [other", "    paths: [other"))
    with pytest.raises(
        ValueError, match="a README.md whose data_files `datasets` can read, and that of .* does not: In"
    ):
        load(tmp_path, data_options={"config": "small"})


def test_parquet_files_without_a_readme_are_those_of_one_folder(tmp_path):
    for number, name in enumerate(["small/train", "small/test", "large/train"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        parquet(tmp_path / f"{name}.parquet", [0, 1] * 5, None, 10 * number)
    with pytest.raises(
        ValueError, match="config must say which folder of .* to take: large, small have a split 'train'"
    ):
        load(tmp_path)
    with pytest.raises(ValueError, match="config must be a folder of Parquet files in .*, got 'medium'"):
        load(tmp_path, data_options={"config": "medium"})
    data = load(tmp_path, data_options={"config": "small"})
    assert (len(data.train), len(data.test)) == (10, 10)


def test_folders_and_parquet_files_with_images_are_refused_together(tmp_path):
    make(tmp_path, {"a": 5, "b": 5})
    parquet(tmp_path / "train.parquet", [0, 1] * 5)
    with pytest.raises(ValueError, match="has both: move train.parquet"):
        load(tmp_path)


# Memory.


def test_images_over_the_memory_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr("neuralcollapse._checks.available_memory", lambda: 500.0)
    make(tmp_path, {"a": 12, "b": 12})
    with pytest.raises(
        ValueError, match="workers must be a number where memory is short: .* GiB of memory are free; with a number"
    ):
        load(tmp_path)
    assert len(load(tmp_path, workers=0).train) == 19
    with pytest.raises(ValueError, match="a batch fits into memory: 1 images of 20x20 take"):
        load(tmp_path, image_size=20)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[x] DefaultCPUAllocator: can't allocate memory: 8 bytes")]
)
def test_too_little_memory_is_one_line(error, monkeypatch, capsys):
    def run(*_: object) -> int:
        raise error

    monkeypatch.setattr("neuralcollapse.lab.commands.recipes.RECIPES", replace(recipes.RECIPES, run=run))
    assert main(["recipes"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("neuralcollapse: error: there is too little memory: ")


def test_attributes_of_a_million_classes_are_refused_at_once():
    from neuralcollapse.lab import RunConfig
    from neuralcollapse.lab.models.build import attribute_code

    config = RunConfig(method="attribute-frame", class_attributes="digits")
    with pytest.raises(ValueError, match=r"class_attributes needs fewer classes: .* take 2.98e\+04 GiB"):
        attribute_code(config, 16, 10**6)
