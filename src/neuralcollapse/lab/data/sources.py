"""Where images and labels come from: scikit-learn's digits, a folder, or a data set of the Hugging Face hub."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuralcollapse.lab.config import DataSettings
from neuralcollapse.lab.data.columns import find_image_column, find_label_column, read_labels
from neuralcollapse.lab.data.decoding import ArrayImages, EncodedImages, Images
from neuralcollapse.lab.data.selection import Samples, hold_out

_HUB_SECONDS = 5.0
_TEST_SPLITS = ("test", "validation", "valid", "val", "dev")


@dataclass(frozen=True)
class HubDataSet:
    """A data set of the hub, or a folder, and what has to be said to get its images and labels."""

    path: str
    config: str | None = None
    label_column: str | None = None
    train_split: str | None = None
    test_split: str | None = None


KNOWN = {
    "mnist": HubDataSet("ylecun/mnist"),
    "fashion-mnist": HubDataSet("zalando-datasets/fashion_mnist"),
    "svhn": HubDataSet("ufldl-stanford/svhn", config="cropped_digits"),
    # The copies best known hold IDX files or a loading script, which `datasets` does not read. Characters may lie on
    # their side, as NIST's own files have them.
    "emnist-balanced": HubDataSet("claudiogsc/emnist_balanced"),
    "cifar10": HubDataSet("uoft-cs/cifar10"),
    "cifar100": HubDataSet("uoft-cs/cifar100", label_column="fine_label"),
    "stl10": HubDataSet("tanganke/stl10", train_split="train", test_split="test"),
    "tiny-imagenet": HubDataSet("zh-plus/tiny-imagenet", test_split="valid"),
    # The labels of its split `test` are not public.
    "imagenet": HubDataSet("ILSVRC/imagenet-1k", test_split="validation"),
}


@dataclass(frozen=True)
class Table:
    """Images, and which of them with which labels make a split."""

    images: Images
    samples: Samples


@dataclass(frozen=True)
class Source:
    """All there is to train and to test on, one image a sample."""

    train: Table
    test: Table
    num_classes: int
    class_names: tuple[str, ...] | None = None
    revision: str | None = None
    """Of a data set of the hub, the commit."""


def digits() -> Source:
    """Scikit-learn's digits: 1797 images of 8x8 grey pixels."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    arrays = [(image * (255 / 16)).round().astype(np.uint8)[..., None] for image in bunch.images]
    images, labels = ArrayImages(arrays, "digits"), torch.from_numpy(bunch.target).long()
    kept, held_out = hold_out(labels)
    return Source(
        Table(images, _samples(labels, kept)), Table(images, _samples(labels, held_out)), len(bunch.target_names)
    )


def hugging_face(config: DataSettings) -> Source:
    """A folder or a data set of the hub; where it has no test split, one image in five is held out.

    Raises:
        ValueError: There is no such data set, or it has no images, no labels, or labels that do not fit.
    """
    wanted = _resolve(config)
    splits = _load_splits(config.data, wanted)
    train, test = _split_names(config.data, wanted, list(splits))
    image_column = find_image_column(config.data, splits[train])
    label_column = find_label_column(config.data, wanted.label_column, splits[train].features)
    labels, names = read_labels(config.data, {name: splits[name] for name in (train, test or train)}, label_column)

    def table(split: str, rows: Tensor) -> Table:
        images = EncodedImages(splits[split], image_column, f"{Path(config.data).name} ({split})", wanted.path)
        return Table(images, _samples(labels[split], rows))

    if test is None:
        first, second = (table(train, rows) for rows in hold_out(labels[train]))
    else:
        first, second = (table(split, torch.arange(len(labels[split]))) for split in (train, test))
    return Source(first, second, len(names), names, _revision(splits[train]))


def _samples(labels: Tensor, rows: Tensor) -> Samples:
    return Samples(rows[:, None], labels[rows])


def _resolve(config: DataSettings) -> HubDataSet:
    """What is asked for. A known name is the hub's data set, even if a folder here is called so too."""
    known = KNOWN | {data_set.path: data_set for data_set in KNOWN.values()}
    asked = {
        "config": config.data_config,
        "label_column": config.label_column,
        "train_split": config.train_split,
        "test_split": config.test_split,
    }
    found = known.get(config.data) or HubDataSet(config.data)
    return replace(found, **{name: value for name, value in asked.items() if value is not None})


def _load_splits(data: str, wanted: HubDataSet) -> Any:
    """The splits of a folder or of a data set of the hub, or a ValueError that says what was wrong."""
    import datasets

    if not data:
        raise ValueError("data must name a data set or a folder, got ''")
    folder = Path(wanted.path).expanduser()
    is_folder = folder.is_dir()
    if not is_folder and (folder.exists() or folder.is_absolute() or data.startswith((".", "~"))):
        raise ValueError(f"data must be 'digits', a folder, or a data set's id on the hub; {data!r} is no folder")
    try:
        with _quiet_hub():
            tables = _csv_tables(folder) if is_folder else {}
            if tables:
                return datasets.load_dataset("csv", data_files=tables)
            if is_folder:
                return datasets.load_dataset(str(folder), wanted.config)
            with _reached(wanted.path):
                return datasets.load_dataset(wanted.path, wanted.config)
    except (datasets.exceptions.DatasetGenerationError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"data {data!r} cannot be read: {_reason(error.__cause__ or error)}") from error
    except OSError as error:  # no connection; or no files: in an empty folder, or a name that the hub does not have
        if is_folder:
            raise ValueError(f"data must have images, but the folder {data!r} has none: {_reason(error)}") from error
        name = "" if data == wanted.path else f"{data!r}, "
        reason = "it does not answer" if "OfflineMode" in str(error) else _reason(error)
        raise ValueError(
            f"data set {name}{wanted.path!r} could not be fetched from the hub ({reason}); "
            "without a network, give data a folder that holds it: --data FOLDER"
        ) from error


def _csv_tables(folder: Path) -> dict[str, str]:
    """The CSV files of a folder, by split; ``metadata.csv`` belongs to the images beside it."""
    tables = {path.stem: str(path) for path in sorted(folder.glob("*.csv")) if path.stem != "metadata"}
    return {"train": next(iter(tables.values()))} if len(tables) == 1 else tables


@contextmanager
def _reached(path: str) -> Iterator[None]:
    """Where the hub does not answer at once, without it: only what was fetched before is there."""
    import datasets
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    offline = [(constants, constants.HF_HUB_OFFLINE), (datasets.config, datasets.config.HF_HUB_OFFLINE)]
    try:
        HfApi().dataset_info(path, timeout=_HUB_SECONDS)
    except HfHubHTTPError:  # an answer
        pass
    except Exception:  # of the network, in as many ways as there are HTTP libraries
        for module, _ in offline:
            module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, before in offline:
            module.HF_HUB_OFFLINE = before


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Without the hub's warnings of every attempt that failed: the last one is an error, of which we say more.

    Its bars are shown in a terminal alone.
    """
    import datasets

    logger = logging.getLogger("huggingface_hub")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def _reason(error: BaseException) -> str:
    """The first two lines: of a configuration that is missing, the second says which there are."""
    return " ".join(str(error).strip().split("\n")[:2])


def _revision(rows: Any) -> str | None:
    """The commit of a data set of the hub, which is part of the addresses of its files."""
    addresses = rows.info.download_checksums or ()
    return next((found[1] for address in addresses if (found := re.search(r"@([0-9a-f]{40})/", address))), None)


def _split_names(data: str, wanted: HubDataSet, names: list[str]) -> tuple[str, str | None]:
    """The names of the train split and of the test split, if there is one."""
    for setting, name in (("train_split", wanted.train_split), ("test_split", wanted.test_split)):
        if name is not None and name not in names:
            raise ValueError(f"{setting} must be a split of {data!r}, which has {', '.join(names)}; got {name!r}")
    train = wanted.train_split or ("train" if "train" in names else names[0])
    if wanted.train_split is None and train != "train" and len(names) > 1:
        raise ValueError(f"train_split must say which split of {data!r} to train on: {', '.join(names)}")
    test = wanted.test_split or next((name for name in _TEST_SPLITS if name in names and name != train), None)
    if train == test:
        raise ValueError(f"test_split must be another split than train_split, got {test!r} for both")
    return train, test
