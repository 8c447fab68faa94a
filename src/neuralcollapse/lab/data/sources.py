"""Where images and labels come from: scikit-learn's digits, a folder, or a data set of the Hugging Face hub."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from neuralcollapse.lab.config import DataSettings
from neuralcollapse.lab.data.columns import (
    Given,
    find_image_column,
    find_label_column,
    given_labels,
    has_labels,
    number_classes,
)
from neuralcollapse.lab.data.copies import copy_groups
from neuralcollapse.lab.data.decoding import ArrayImages, EncodedImages, Images
from neuralcollapse.lab.data.folders import TEST_NAMES, TRAIN_NAMES, split_kind
from neuralcollapse.lab.data.local import Stored, read_folder
from neuralcollapse.lab.data.selection import Samples, hold_out

_HUB_SECONDS = 5.0
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


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
    copies: Literal["refuse", "report", "drop", "ignore"] = "ignore"
    """The treatment of test images that are training images too."""
    notes: tuple[str, ...] = ()
    """Lines on what was left out or decided in reading it."""


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


def stored(config: DataSettings) -> Source:
    """A folder or a data set of the hub; where it has no test split, one image in five is held out.

    Raises:
        ValueError: There is no such data set, or it has no images, no labels, or labels that do not fit.
    """
    wanted = _resolve(config)
    found = _stored(config, wanted)
    train, tests = _split_names(config.data, wanted, list(found.splits))
    notes, drop = list(found.notes), bool(config.drop_unlabelled)
    given = {
        name: _labels(config.data, wanted, found, train, name) for name in (train, *(tests if drop else tests[:1]))
    }
    test = next((name for name in tests if not drop or any(has_labels(each) for each in given[name])), None)
    if test is None and wanted.test_split is not None:
        raise ValueError(f"test_split must be a split with labels, and no image of {wanted.test_split!r} has one")
    used = [name for name in (train, test) if name is not None]
    earlier = tests[: tests.index(test)] if test in tests else tests  # there are some with drop_unlabelled alone
    notes += [f"the {name} split left out: none of its images has a label" for name in earlier]
    labelled, names = number_classes(config.data, {name: given[name] for name in used}, train, drop_unlabelled=drop)
    notes += [labelled[name].note or "" for name in used]
    if unused := [
        f"{name} ({sum(map(len, parts))} images)" for name, parts in found.splits.items() if name not in used
    ]:
        notes.append(f"splits that are not used: {', '.join(unused)}")
    if len(found.splits) == 1 and split_kind(train) != "train":
        notes.append(f"its only split is {train}: one image in five of it is held out")
    tables = {name: Table(_images(config, found, train, name), labelled[name].samples) for name in used}
    copies: Literal["drop", "report", "refuse"] = "report" if found.published else "refuse"
    if test is None:
        groups = copy_groups(tables[train].images, labelled[train].samples.rows.flatten())
        if number := int((groups != torch.arange(len(groups))).sum()):
            notes.append(
                f"{number} images are copies of others; copies of one image are all trained on or all held out"
            )
        parts = hold_out(labelled[train].samples.labels, groups=groups)
        first, second = (Table(tables[train].images, labelled[train].samples.take(part)) for part in parts)
        copies = "drop"
    else:
        first, second = tables[train], tables[test]
    revision = _revision(found.splits[train][0])
    return Source(
        first, second, len(names), names, revision, "drop" if config.drop_copies else copies, tuple(filter(None, notes))
    )


def _labels(data: str, wanted: HubDataSet, found: Stored, train: str, split: str) -> list[Given]:
    if found.labels is not None:
        return [found.labels[split]]
    column = find_label_column(data, wanted.label_column, found.splits[train][0].features)
    return [given_labels(data, split, rows, column) for rows in found.splits[split]]


def _images(config: DataSettings, found: Stored, train: str, split: str) -> EncodedImages:
    column = find_image_column(config.data, found.splits[train][0])
    description = f"{Path(config.data).name} ({split})"
    if any(column not in rows.features for rows in found.splits[split]):
        raise ValueError(f"data must have a column {column!r} of images in each split, and {description} has none")
    images = EncodedImages(found.splits[split], column, description, found.folder, _caches() if found.published else ())
    if not found.published and found.labels is None:
        images.check_files()
    return images


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


def _stored(config: DataSettings, wanted: HubDataSet) -> Stored:
    """The splits of a folder or of a data set of the hub, or a ValueError that says what was wrong."""
    import datasets

    data = config.data
    if not data:
        raise ValueError("data must name a data set or a folder, got ''")
    folder = Path(wanted.path).expanduser()
    is_folder = folder.is_dir()
    elsewhere = folder.exists() or folder.is_absolute() or data.startswith((".", "~"))
    if not is_folder and (elsewhere or not _HUB_ID.fullmatch(wanted.path)):
        raise ValueError(f"data must be 'digits', a folder, or a data set's id on the hub; {data!r} is no folder")
    if not is_folder and config.table is not None:
        raise ValueError(f"table belongs to data from a folder; {data!r} is a data set of the hub")
    try:
        with _quiet_hub():
            if is_folder:
                return read_folder(folder, config, wanted.config)
            with _reached(wanted.path):
                splits = datasets.load_dataset(wanted.path, wanted.config)
    except (datasets.exceptions.DatasetGenerationError, RuntimeError, TypeError, ValueError) as error:
        if is_folder and isinstance(error, ValueError):
            raise
        raise ValueError(f"data {data!r} cannot be read: {_reason(error.__cause__ or error)}") from error
    except OSError as error:  # no connection, or a name that the hub does not have; or no room for what is prepared
        if is_folder:
            raise ValueError(f"data {data!r} cannot be read: {error}") from error
        name = "" if data == wanted.path else f"{data!r}, "
        reason = "it does not answer" if "OfflineMode" in str(error) else _reason(error)
        raise ValueError(
            f"data set {name}{wanted.path!r} could not be fetched from the hub ({reason}); "
            "without a network, give data a folder that holds it: --data FOLDER"
        ) from error
    beside = Path(data)
    notes = (f"the data set of the hub, and not the folder {data}/ here: --data ./{data}",) if beside.is_dir() else ()
    return Stored({name: [rows] for name, rows in splits.items()}, "", notes, published=True)


def _caches() -> tuple[str, ...]:
    """The addresses of the files of data sets of the hub."""
    import datasets
    from huggingface_hub import constants

    return tuple(map(str, (datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE)))


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


def _split_names(data: str, wanted: HubDataSet, names: list[str]) -> tuple[str, list[str]]:
    """The name of the split to train on, and those to test on, the preferred one first."""
    asked = {"train_split": wanted.train_split, "test_split": wanted.test_split}
    chosen: dict[str, str | None] = {}
    for setting, name in asked.items():
        alike = [each for each in names if each == name] or [
            each for each in names if name and split_kind(each) == split_kind(name)
        ]
        if name is not None and len(alike) != 1:
            raise ValueError(f"{setting} must be a split of {data!r}, which has {', '.join(names)}; got {name!r}")
        chosen[setting] = alike[0] if name is not None else None
    trains = [each for each in names if each.strip().casefold() in TRAIN_NAMES]
    train = chosen["train_split"] or (trains[0] if len(trains) == 1 else names[0])
    if chosen["train_split"] is None and len(names) > 1 and len(trains) != 1:
        raise ValueError(f"train_split must say which split of {data!r} to train on: {', '.join(names)}")
    test = chosen["test_split"]
    if train == test:
        raise ValueError(f"test_split must be another split than train_split, got {test!r} for both")
    by_rank = sorted(
        (TEST_NAMES.index(each.strip().casefold()), each)
        for each in names
        if each != train and each.strip().casefold() in TEST_NAMES
    )
    return train, [test] if test is not None else [each for _, each in by_rank]
