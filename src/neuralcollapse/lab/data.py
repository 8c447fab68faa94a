"""Image data sets, decoded once: scikit-learn's digits, a folder, or a data set of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuralcollapse.lab.config import Data
from neuralcollapse.lab.decoding import decode, scale, stack
from neuralcollapse.lab.splits import ImageData, Split, hold_out, subset

_TEST_SPLITS = ("test", "validation", "valid", "val", "dev")


def load_data(config: Data, *, progress: bool = True) -> ImageData:
    """Load and decode a data set.

    Where it has no test split, one image in five is held out, the same ones always.

    Args:
        config: Which, and how much of it.
        progress: Show a progress bar while decoding.

    Raises:
        ValueError: There is no such data set, or it has no images, no labels, images that cannot be read, or images
            of different size while ``image_size`` is not given.
    """
    data = _digits(config) if config.data == "digits" else _from_hugging_face(config, progress)
    present = len(data.train.labels.unique())
    if present < 2:
        raise ValueError(f"data must have train images of at least 2 classes, {data.name!r} has {present}")
    return data


def _digits(config: Data) -> ImageData:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = [(image * (255 / 16)).round().astype(np.uint8)[..., None] for image in digits.images]
    if config.image_size is not None:
        pixels = [scale(image, config.image_size) for image in pixels]
    whole = Split(stack(pixels, "digits"), torch.from_numpy(digits.target).long())
    train, test = hold_out(whole.labels)
    train = subset(whole.labels, train, config.train_samples)
    test = subset(whole.labels, test, config.test_samples)
    return ImageData("digits", whole.take(train), whole.take(test), len(digits.target_names))


def _from_hugging_face(config: Data, progress: bool) -> ImageData:
    splits = _load_splits(config.data)
    train_rows = splits["train"] if "train" in splits else next(iter(splits.values()))
    test_rows = next((splits[name] for name in _TEST_SPLITS if name in splits), train_rows)
    image_column = _image_column(config.data, train_rows.features)
    label_column = _label_column(config, train_rows.features)

    train_labels, test_labels = (torch.tensor(rows[label_column][:]) for rows in (train_rows, test_rows))
    if test_rows is train_rows:
        train, test = hold_out(train_labels)
    else:
        train, test = torch.arange(len(train_labels)), torch.arange(len(test_labels))
    names = getattr(train_rows.features[label_column], "names", None)
    num_classes = len(names) if names else int(train_labels.max()) + 1

    def part(name: str, rows: Any, labels: Tensor, indices: Tensor, limit: int | None) -> Split:
        indices = subset(labels, indices, limit)
        _check_labels(config.data, name, labels[indices], num_classes)
        description = f"{Path(config.data).name} ({name})"
        images = decode(rows.select(indices.tolist()), image_column, config.image_size, description, progress=progress)
        return Split(images, labels[indices])

    train_split = part("train", train_rows, train_labels, train, config.train_samples)
    test_split = part("test", test_rows, test_labels, test, config.test_samples)
    return ImageData(config.data, *_alike(config.data, train_split, test_split), num_classes)


def _load_splits(source: str) -> Any:
    """The splits of a folder or of a data set of the hub, or a ValueError that says what was wrong."""
    import datasets

    folder = Path(source).expanduser()
    is_folder = folder.is_dir()
    if not is_folder and (folder.exists() or folder.is_absolute() or source.startswith((".", "~"))):
        raise ValueError(f"data must be 'digits', a folder, or a data set's id on the hub; {source!r} is no folder")
    try:
        return datasets.load_dataset(str(folder) if is_folder else source)
    except FileNotFoundError as error:  # an empty folder is one of these, and a data set that the hub does not have
        where = "folder" if is_folder else "data set of the hub"
        raise ValueError(f"data must have images, but the {where} {source!r} has none: {_reason(error)}") from error
    except ConnectionError as error:
        raise ValueError(
            f"data set {source!r} could not be fetched from the hub ({_reason(error)}); "
            "without a network, give data a folder that holds it"
        ) from error
    except (datasets.exceptions.DatasetGenerationError, RuntimeError, ValueError) as error:
        raise ValueError(f"data {source!r} cannot be read: {_reason(error.__cause__ or error)}") from error


def _reason(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def _image_column(source: str, features: Any) -> str:
    import datasets

    for name, feature in features.items():
        if isinstance(feature, datasets.Image):
            return name
    raise ValueError(f"data must have images, but {source!r} has only the columns {', '.join(features)}")


def _label_column(config: Data, features: Any) -> str:
    """The column asked for; else the one of class labels, or of integers if it is called so."""
    import datasets

    if config.label_column is not None:
        candidates = [name for name in features if name == config.label_column]
    else:
        candidates = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        candidates = candidates or [name for name in features if name in ("label", "labels")]
        candidates = ["label"] if "label" in candidates else candidates
    if len(candidates) > 1:
        raise ValueError(f"label_column must say which labels of {config.data!r} to take: {', '.join(candidates)}")
    if not candidates or "int" not in str(getattr(features[candidates[0]], "dtype", "")):
        wanted = f"of class labels called {config.label_column!r}" if config.label_column else "of class labels"
        raise ValueError(
            f"data {config.data!r} must have a column {wanted}, or be a folder with a sub-folder of images for each "
            f"class; its columns are {', '.join(features)}"
        )
    return candidates[0]


def _check_labels(source: str, split: str, labels: Tensor, num_classes: int) -> None:
    if not len(labels):
        raise ValueError(f"data {source!r} must have at least one image in its {split} split")
    low, high = (int(bound) for bound in torch.aminmax(labels))
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"data {source!r} must have labels in [0, {num_classes}), its {split} split has {low} to {high}"
        )


def _alike(source: str, train: Split, test: Split) -> tuple[Split, Split]:
    """The two splits, both in colour if one is."""
    sizes = [f"{split.images.shape[2]}x{split.images.shape[3]}" for split in (train, test)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"image_size must be given, because {source!r} has train images {sizes[0]} and test {sizes[1]}"
        )
    channels = max(train.images.shape[1], test.images.shape[1])
    if channels > 1:
        train, test = (Split(split.images.expand(-1, 3, -1, -1).contiguous(), split.labels) for split in (train, test))
    return train, test
