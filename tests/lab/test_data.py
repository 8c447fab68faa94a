from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from neuralcollapse.lab.config import Data
from neuralcollapse.lab.data import load_data


def load(source: Path | str, **settings):
    return load_data(Data(data=str(source), **settings), progress=False)


def save_images(folder: Path, classes: dict[str, int], size: tuple[int, int] = (6, 4), mode: str = "RGB") -> None:
    """For each class a sub-folder of images in one colour, the class's number of them."""
    for value, (name, number) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for index in range(number):
            color = 40 * value + index if mode == "L" else (40 * value + index, 0, 255)
            Image.new(mode, size, color).save(folder / name / f"{index}.png")


def save_table(folder: Path, labels: dict[str, list[int]], features: dict[str, object], split: str = "train") -> None:
    rows = len(next(iter(labels.values())))
    images = list(np.random.default_rng(0).integers(256, size=(rows, 5, 5, 3), dtype=np.uint8))
    folder.mkdir(exist_ok=True)
    kinds = datasets.Features({"picture": datasets.Image()} | features)
    datasets.Dataset.from_dict({"picture": images} | labels, features=kinds).to_parquet(folder / f"{split}.parquet")


def test_digits_are_split_in_proportion_and_always_alike():
    data = load("digits")
    assert data.image_shape == (1, 8, 8)
    assert (len(data.train), len(data.test), data.num_classes) == (1438, 359, 10)
    assert data.train.images.dtype == torch.uint8
    assert int(data.train.images.max()) == 255
    shares = data.test.labels.bincount() / (data.train.labels.bincount() + data.test.labels.bincount())
    assert (shares - 0.2).abs().max() < 0.01
    assert torch.equal(load("digits").test.images, data.test.images)


def test_no_digit_is_in_both_splits():
    data = load("digits")
    both = torch.cat([data.train.images, data.test.images]).flatten(1)
    assert len(both.unique(dim=0)) == 1797


def test_a_folder_of_class_folders_with_train_and_test(tmp_path):
    save_images(tmp_path / "train", {"cat": 3, "dog": 4})
    save_images(tmp_path / "test", {"cat": 2, "dog": 1})
    data = load(tmp_path)
    assert data.image_shape == (3, 4, 6)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert data.test.labels.tolist() == [0, 0, 1]
    assert data.train.images[:, :, 0, 0].tolist() == [[value, 0, 255] for value in (0, 1, 2, 40, 41, 42, 43)]


def test_without_a_test_split_one_image_in_five_is_held_out(tmp_path):
    save_images(tmp_path, {"a": 10, "b": 20}, mode="L")
    data = load(tmp_path)
    assert data.test.labels.bincount().tolist() == [2, 4]
    values = torch.cat([data.train.images, data.test.images])[:, 0, 0, 0]
    assert sorted(values.tolist()) == [*range(10), *range(40, 60)]


def test_images_of_different_size_need_image_size(tmp_path):
    save_images(tmp_path / "train", {"a": 2})
    save_images(tmp_path / "train" / "more", {"b": 2}, size=(9, 9))
    for image in (tmp_path / "train" / "more" / "b").iterdir():
        (tmp_path / "train" / "b").mkdir(exist_ok=True)
        image.rename(tmp_path / "train" / "b" / image.name)
    with pytest.raises(ValueError, match="image_size must be given, because the images of .* 4x6 and 9x9"):
        load(tmp_path)
    assert load(tmp_path, image_size=8).image_shape == (3, 8, 8)


def test_a_grey_image_among_coloured_ones_becomes_coloured(tmp_path):
    save_images(tmp_path / "train", {"a": 2})
    save_images(tmp_path / "train" / "x", {"b": 2}, mode="L")
    (tmp_path / "train" / "x" / "b").rename(tmp_path / "train" / "b")
    (tmp_path / "train" / "x").rmdir()
    save_images(tmp_path / "test", {"a": 1, "b": 1}, mode="L")
    data = load(tmp_path)
    assert data.image_shape == (3, 4, 6)
    assert data.test.images.shape == (2, 3, 4, 6)
    grey = data.train.images[data.train.labels == 1]
    assert torch.equal(grey[:, 0], grey[:, 2])


def test_parquet_columns_are_found_by_what_they_hold(tmp_path):
    save_table(tmp_path, {"kind": [0, 1, 2, 1]}, {"kind": datasets.ClassLabel(names=["x", "y", "z"])})
    save_table(tmp_path, {"kind": [2, 0]}, {"kind": datasets.ClassLabel(names=["x", "y", "z"])}, split="validation")
    data = load(tmp_path)
    assert data.num_classes == 3
    assert data.train.labels.tolist() == [0, 1, 2, 1]
    assert data.test.labels.tolist() == [2, 0]
    assert data.train.images[0].permute(1, 2, 0).flatten()[:4].tolist() == (
        np.random.default_rng(0).integers(256, size=(4, 5, 5, 3), dtype=np.uint8)[0].flatten()[:4].tolist()
    )


def test_a_column_of_integers_called_label_will_do(tmp_path):
    save_table(tmp_path, {"label": [0, 3, 1, 2] * 5}, {"label": datasets.Value("int32")})
    assert load(tmp_path).num_classes == 4


def test_where_there_are_several_columns_of_labels_one_must_be_named(tmp_path):
    kinds = {"coarse": datasets.ClassLabel(num_classes=2), "fine": datasets.ClassLabel(num_classes=4)}
    save_table(tmp_path, {"coarse": [0, 0, 1, 1] * 5, "fine": [0, 1, 2, 3] * 5}, kinds)
    with pytest.raises(ValueError, match="label_column must say which labels of .* to take: coarse, fine"):
        load(tmp_path)
    assert load(tmp_path, label_column="fine").num_classes == 4
    with pytest.raises(ValueError, match="must have a column of class labels called 'finer'"):
        load(tmp_path, label_column="finer")


def test_images_without_labels_are_refused(tmp_path):
    save_images(tmp_path, {"only": 3})
    with pytest.raises(ValueError, match=r"must have a column of class labels, or be a folder with a sub-folder"):
        load(tmp_path)


def test_one_class_is_not_enough(tmp_path):
    save_table(tmp_path, {"label": [0] * 10}, {"label": datasets.ClassLabel(names=["x", "y"])})
    with pytest.raises(ValueError, match="at least 2 classes, .* has 1"):
        load(tmp_path)


def test_labels_that_mean_unknown_are_refused(tmp_path):
    save_table(tmp_path, {"label": [0, 1, 2]}, {"label": datasets.ClassLabel(num_classes=3)})
    save_table(tmp_path, {"label": [-1, -1]}, {"label": datasets.ClassLabel(num_classes=3)}, split="test")
    with pytest.raises(ValueError, match=r"must have labels in \[0, 3\), its test split has -1 to -1"):
        load(tmp_path)


def test_an_unreadable_image_is_named(tmp_path):
    save_images(tmp_path, {"a": 10, "b": 10})
    (tmp_path / "b" / "7.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"images that can be read; .*b/7\.png"):
        load(tmp_path)


def test_a_truncated_image_is_named(tmp_path):
    save_images(tmp_path, {"a": 10, "b": 10}, size=(60, 60))
    whole = (tmp_path / "a" / "3.png").read_bytes()
    (tmp_path / "a" / "3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"images that can be read; .*a/3\.png"):
        load(tmp_path)


def test_train_and_test_samples_keep_the_classes_in_proportion():
    data = load("digits", train_samples=100, test_samples=50)
    assert set(data.train.labels.bincount().tolist()) <= {9, 10, 11}
    assert set(data.test.labels.bincount().tolist()) <= {4, 5, 6}


def test_mnist(real_data):
    data = load(real_data / "mnist", train_samples=500, test_samples=200)
    assert data.image_shape == (1, 28, 28)
    assert (len(data.train), len(data.test), data.num_classes) == (500, 200, 10)
    assert 25 < data.train.images.float().mean() < 45  # of all of MNIST: 33.3


def test_cifar10(real_data):
    data = load(real_data / "cifar10", train_samples=300, test_samples=100)
    assert data.image_shape == (3, 32, 32)
    assert data.num_classes == 10
