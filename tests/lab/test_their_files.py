"""Data as their owners have them: each works, or one line says what is missing of that file."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from neuralcollapse.lab import RunConfig, load_data, train_runs
from neuralcollapse.lab.config import DataSettings
from neuralcollapse.lab.data.sources import _revision
from neuralcollapse.lab.figures.curves import draw_figures
from neuralcollapse.lab.figures.summary import summarise

NUMBER = 30
CLASSES = [number % 3 for number in range(NUMBER)]


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(256, size=(6, 6), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


PNGS = [png(number) for number in range(NUMBER)]
STRUCTS = [{"bytes": one, "path": f"{number}.png"} for number, one in enumerate(PNGS)]
FLAT = io.BytesIO()
Image.new("L", (6, 6), 7).save(FLAT, "png")


def parquet(folder: Path, **columns: object) -> None:
    pd.DataFrame(columns).to_parquet(folder / "train.parquet")


def with_files(write: Callable[[Path, pd.DataFrame], None], labels: list[object]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "pictures").mkdir()
        for number, one in enumerate(PNGS):
            (folder / "pictures" / f"{number}.png").write_bytes(one)
        write(folder, pd.DataFrame({"path": [f"pictures/{n}.png" for n in range(NUMBER)], "label": labels}))

    return make


def two_csv_files(folder: Path, table: pd.DataFrame) -> None:
    table[:21].to_csv(folder / "train.csv", index=False)
    table[21:].to_csv(folder / "test.csv", index=False)


NAMES = [f"class {one}" for one in CLASSES]
WORK: dict[str, Callable[[Path], None]] = {
    "bytes and path": lambda folder: parquet(folder, image=STRUCTS, label=CLASSES),
    "raw bytes": lambda folder: parquet(folder, picture=PNGS, label=CLASSES),
    "labels that are texts": lambda folder: parquet(folder, image=STRUCTS, label=NAMES),
    "labels with gaps": lambda folder: parquet(folder, image=STRUCTS, label=[3 + 4 * one for one in CLASSES]),
    "labels called target": lambda folder: parquet(folder, image=STRUCTS, target=CLASSES),
    "constant images": lambda folder: parquet(folder, image=[FLAT.getvalue()] * NUMBER, label=CLASSES),
    "paths in Parquet": with_files(lambda folder, table: table.to_parquet(folder / "train.parquet"), CLASSES),
    "paths in CSV": with_files(lambda folder, table: table.to_csv(folder / "mine.csv", index=False), NAMES),
    "paths in two CSV files": with_files(two_csv_files, CLASSES),
}


@pytest.mark.parametrize("kind", WORK)
def test_files_that_can_be_read(kind, tmp_path):
    WORK[kind](tmp_path)
    data = load_data(DataSettings(data=str(tmp_path)), progress=False)
    assert data.num_classes == 3
    assert len(data.train) + len(data.test) == NUMBER
    assert data.image_shape == (1, 6, 6)
    for split in data.splits.values():
        by_pixels = {bytes(np.asarray(Image.open(io.BytesIO(one))).tobytes()): n for n, one in enumerate(PNGS)}
        for image, label in zip(split.images, split.labels.tolist(), strict=True):
            place = by_pixels.get(image.numpy().tobytes())
            assert kind == "constant images" or CLASSES[place] == label


MISSING = {
    "one class": (
        lambda folder: parquet(folder, image=STRUCTS, label=[0] * NUMBER),
        "data must have train images of at least 2 classes, .* has 1",
    ),
    "no labels": (
        lambda folder: parquet(folder, image=STRUCTS, size=[1.5] * NUMBER),
        "must have a column of class labels, .* its columns are image, size, and none is called label",
    ),
    "labels that are numbers": (
        lambda folder: parquet(folder, image=STRUCTS, label=[0.5] * NUMBER),
        "and 'label' is of float64",
    ),
    "no images": (
        lambda folder: parquet(folder, size=[1] * NUMBER, label=CLASSES),
        "has only the columns size, label: none is of images",
    ),
    "two columns of images": (
        lambda folder: parquet(folder, left=STRUCTS, right=STRUCTS, label=CLASSES),
        "must have one column of images, but has left, right",
    ),
    "bytes of no image": (
        lambda folder: parquet(folder, image=[b"none"] * NUMBER, label=CLASSES),
        "must have images that can be read; number .* cannot",
    ),
    "a label that is missing": (
        lambda folder: parquet(folder, image=STRUCTS, label=[None, *NAMES[1:]]),
        "must have a label for each image, its train split has images without",
    ),
    "paths of no file": (
        lambda folder: pd.DataFrame({"path": ["a.png"] * NUMBER, "label": CLASSES}).to_csv(
            folder / "train.csv", index=False
        ),
        "a.png of .* cannot: .*No such file",
    ),
    "a single image in the hold-out": (
        lambda folder: parquet(folder, image=STRUCTS, label=[*range(25), *range(5)]),
        "must have training images of each of its 25 classes, but has none of",
    ),
    "an empty table": (
        lambda folder: (folder / "train.csv").write_text("path,label\n"),
        "must have a line of column names and at least one row, but has no data",
    ),
}


@pytest.mark.parametrize("kind", MISSING)
def test_refusals_name_what_is_missing(kind, tmp_path):
    make, expected = MISSING[kind]
    make(tmp_path)
    with pytest.raises(ValueError, match=expected):
        load_data(DataSettings(data=str(tmp_path)), progress=False)


def test_absent_classes_are_named_and_reported_in_the_summary(tmp_path):
    labels = ["rare" if number == 0 else f"class {number % 3}" for number in range(NUMBER)]
    parquet(tmp_path, image=STRUCTS, label=labels)
    pd.DataFrame({"image": STRUCTS[:10], "label": ["rare", *NAMES[1:10]]}).to_parquet(tmp_path / "test.parquet")
    pd.DataFrame({"image": STRUCTS[10:], "label": labels[10:]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(
        ValueError,
        match="training images of each of its 4 classes, but has none of rare; with --leave_out absent-classes",
    ):
        load_data(DataSettings(data=str(tmp_path)), progress=False)
    settings = {"backbone": "mlp", "width": 8, "depth": 1, "batch_size": 10, "epochs": 1}
    run = RunConfig(data=str(tmp_path), leave_out=["absent-classes"], **settings)
    folder = train_runs(run, tmp_path / "out", progress=False)
    assert folder.read_environment()["absent_classes"] == ["rare"]
    assert "4 classes, 1 of them without training images" in summarise(folder, "train").written[0].read_text()


def test_a_panel_without_data_has_a_message_and_other_errors_are_raised(tmp_path, monkeypatch):
    row = {"method": "fixed", "seed": 0, "epoch": 1, "metric": "accuracy", "value": 0.5}
    measured = pd.DataFrame([row | {"split": "train"}, row | {"split": "test", "value": math.nan}])
    messages: list[str] = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.text", lambda *arguments, **_: messages.append(" ".join(arguments[3].split()))
    )
    assert all(path.exists() for path in draw_figures(measured, tmp_path, "digits"))
    unmeasured = ["nc1_quotient", "nc2_etf_means", "nc3_duality", "nc4_ncc_mismatch"]
    assert messages == [f"no finite value of {name} was measured" for name in ("accuracy", *sorted(2 * unmeasured))]
    monkeypatch.setattr("neuralcollapse.metrics.figures.curves.draw_band", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        draw_figures(measured, tmp_path, "digits")


def test_the_summary_reports_a_run_that_ends_at_chance(tmp_path):
    settings = {"backbone": "mlp", "width": 12, "depth": 1, "train_samples": 100, "batch_size": 20, "epochs": 1}
    folder = train_runs(RunConfig(**settings, method="standard", lr=1e-9), tmp_path / "out", progress=False)
    metrics = folder.metrics.read_text().replace("train,accuracy,", "train,accuracy,0.1#")
    folder.metrics.write_text("\n".join(line.split("#")[0] for line in metrics.split("\n")))
    text = summarise(folder, "train").table
    assert "standard, seed 0, ends at chance: 10.0% of the training images are correct" in text


def test_batches_larger_than_the_data_are_reported(tmp_path, capsys):
    settings = {"backbone": "mlp", "width": 12, "depth": 1, "train_samples": 60, "epochs": 1}
    train_runs(RunConfig(**settings), tmp_path / "out")
    assert "batch_size 128 exceeds the 60 training images: one batch per epoch" in capsys.readouterr().err


def test_memory_is_checked_before_it_is_allocated():
    with pytest.raises(ValueError, match="128 images of 100000x100000 take 4768 GiB, but only"):
        load_data(RunConfig(image_size=100_000), batch_size=128)


def test_the_commit_of_a_data_set_of_the_hub_is_known():
    class Rows:
        class info:
            download_checksums = {f"hf://datasets/ylecun/mnist@{'0a' * 20}/mnist/train.parquet": {}}  # noqa: RUF012

    assert _revision(Rows) == "0a" * 20


def test_a_fingerprint_is_of_labels_and_images():
    first, again = (load_data(DataSettings(train_samples=50), progress=False).fingerprint() for _ in range(2))
    other = load_data(DataSettings(train_samples=50, label_noise="permuted", data_seed=3), progress=False).fingerprint()
    streamed = load_data(DataSettings(train_samples=50, workers=0), progress=False).fingerprint()
    assert first == again
    assert first["train"]["images"] == other["train"]["images"] == streamed["train"]["50_images"]
    assert first["train"]["labels"] == streamed["train"]["labels"]
    assert first["train"]["labels"] != other["train"]["labels"]
