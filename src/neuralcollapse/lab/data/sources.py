"""Sources of images and labels: scikit-learn's digits, a folder, or a data set of the Hugging Face hub."""

from __future__ import annotations

import logging
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from neuralcollapse.lab.config import DataSettings, StoredData
from neuralcollapse.lab.data.folders import (
    TEST_NAMES,
    TRAIN_NAMES,
    Listing,
    class_folders,
    find_parquet,
    holds_images,
    is_split_name,
    list_folder,
    listed,
    load_parquet,
    split_kind,
)
from neuralcollapse.lab.data.images import ArrayImages, EncodedImages
from neuralcollapse.lab.data.selection import Samples
from neuralcollapse.lab.data.tables import (
    find_image_column,
    find_label_column,
    find_tables,
    read_path_tables,
    read_table,
)

_HUB_SECONDS = 5.0
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_INTEGER = re.compile(r"[+-]?[0-9]+")
# Label of images without a known class.
_UNLABELLED = -1


# Known data sets, with the path on the hub and the options for their images and labels.
KNOWN: dict[str, tuple[str, dict[str, str]]] = {
    "mnist": ("ylecun/mnist", {}),
    "fashion-mnist": ("zalando-datasets/fashion_mnist", {}),
    "svhn": ("ufldl-stanford/svhn", {"config": "cropped_digits"}),
    # The best-known copies contain IDX files or a loading script, which `datasets` does not read. Characters may be
    # rotated, as in the files of NIST.
    "emnist-balanced": ("claudiogsc/emnist_balanced", {}),
    "cifar10": ("uoft-cs/cifar10", {}),
    "cifar100": ("uoft-cs/cifar100", {"label_column": "fine_label"}),
    "stl10": ("tanganke/stl10", {"train_split": "train", "test_split": "test"}),
    "tiny-imagenet": ("zh-plus/tiny-imagenet", {"test_split": "valid"}),
    # The labels of the split `test` are not public.
    "imagenet": ("ILSVRC/imagenet-1k", {"test_split": "validation"}),
}


@dataclass(frozen=True)
class Source:
    """All training and test samples, with one image each."""

    train: Samples
    test: Samples | None
    """None if a part of the train split must be held out."""
    num_classes: int
    class_names: tuple[str, ...] | None = None
    revision: str | None = None
    """The commit, of a data set of the hub."""
    copies: Literal["refuse", "report", "drop", "ignore"] = "ignore"
    """The treatment of test images that are training images too."""
    notes: tuple[str, ...] = ()
    """One line for each kind of thing that was left out or decided in reading it."""


def digits() -> Source:
    """Return scikit-learn's digits: 1,797 images of 8×8 grey pixels."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    arrays = [(image * (255 / 16)).round().astype(np.uint8)[..., None] for image in bunch.images]
    labels = torch.from_numpy(bunch.target).long()
    samples = Samples(ArrayImages(arrays, "digits"), torch.arange(len(labels))[:, None], labels)
    return Source(samples, None, len(bunch.target_names))


def stored(config: DataSettings) -> Source:
    """Read a folder or a data set of the hub.

    Raises:
        ValueError: if the data set does not exist, or has no images, no labels, or labels that do not fit.
    """
    data, drop = config.data, "unlabelled" in config.leave_out
    path, options = _resolve(config)
    rows = _rows(config, path, options.config)
    train, tests = _split_names(data, options, list(rows.splits))
    first, notes = rows.splits[train][0], list(rows.notes)
    label_column = rows.columns[1] if rows.columns else find_label_column(data, options.label_column, first.features)

    labels = {train: _read_labels(data, train, rows.splits[train], label_column)}
    test = None
    for name in tests if drop else tests[:1]:
        labels[name] = _read_labels(data, name, rows.splits[name], label_column)
        if not drop or any(isinstance(label, str) for label in labels[name].names):
            test = name
            break
        del labels[name]
        notes.append(f"the {name} split left out: none of its images has a label")
    if test is None and options.test_split is not None:
        raise ValueError(
            f"data_options.test_split must be a split with labels, and no image of {options.test_split!r} has one"
        )
    missing = [_check_labelled(data, name, each.names, drop, name == train) for name, each in labels.items()]
    classes = _class_names(data, labels, train)
    notes += [note for note in missing if note]
    if unused := [
        f"{name} ({sum(map(len, parts))} images)" for name, parts in rows.splits.items() if name not in labels
    ]:
        notes.append(f"splits that are not used: {', '.join(unused)}")
    if len(rows.splits) == 1 and split_kind(train) != "train":
        notes.append(f"its only split is {train}: one image in five of it is held out")

    image_column = rows.columns[0] if rows.columns else find_image_column(data, first)
    number_of = {name: number for number, name in enumerate(classes)}
    samples = {}
    for name, each in labels.items():
        numbers = torch.tensor([number_of[label] if isinstance(label, str) else _UNLABELLED for label in each.names])
        labelled = (numbers >= 0).nonzero()
        samples[name] = Samples(_images(data, name, rows, image_column), labelled, numbers[labelled.flatten()])
    copies: Literal["drop", "report", "refuse"] = "report" if rows.published else "refuse"
    return Source(
        samples[train],
        samples[test] if test is not None else None,
        len(classes),
        classes,
        _revision(first),
        "drop" if "copies" in config.leave_out or test is None else copies,
        tuple(notes),
    )


def unlabelled_images(folder: Path) -> EncodedImages:
    """Return the images of a folder, without their labels; those of its test split, if it has splits.

    Raises:
        ValueError: if the folder has no images, or they cannot be read.
    """
    listing = list_folder(folder)
    splits = {name: inner for name, inner in listing.with_images.items() if is_split_name(name)}
    tests = [name for kind in TEST_NAMES for name in splits if name.strip().casefold() == kind]
    paths = [path for each in (splits[tests[0]] if tests else listing).walk() for path in each.images]
    if paths:
        return EncodedImages([_rows_of_classes({"": paths})], "image", folder.name, str(folder))
    rows = _rows(DataSettings(data=str(folder)), str(folder), None)
    _, names = _split_names(str(folder), StoredData.model_construct(), list(rows.splits))
    split = names[0] if names else next(iter(rows.splits))
    return _images(str(folder), split, rows, find_image_column(str(folder), rows.splits[split][0]))


def _resolve(config: DataSettings) -> tuple[str, StoredData]:
    """Return the path and the options of a data set; a known name refers to the hub, even if a folder has this name."""
    known = KNOWN | {path: (path, options) for path, options in KNOWN.values()}
    path, options = known.get(config.data, (config.data, {}))
    return path, StoredData.model_construct(**options | config.stored.model_dump(exclude_none=True))


def _split_names(data: str, options: StoredData, names: list[str]) -> tuple[str, list[str]]:
    """Return the name of the split to train on, and those to test on, the preferred one first."""
    settings = {"train_split": options.train_split, "test_split": options.test_split}
    chosen: dict[str, str | None] = {}
    for setting, name in settings.items():
        alike = [each for each in names if each == name] or [
            each for each in names if name and split_kind(each) == split_kind(name)
        ]
        if name is not None and len(alike) != 1:
            raise ValueError(
                f"data_options.{setting} must be a split of {data!r}, which has {', '.join(names)}; got {name!r}"
            )
        chosen[setting] = alike[0] if name is not None else None
    trains = [each for each in names if each.strip().casefold() in TRAIN_NAMES]
    train = chosen["train_split"] or (trains[0] if len(trains) == 1 else names[0])
    if chosen["train_split"] is None and len(names) > 1 and len(trains) != 1:
        raise ValueError(f"data_options.train_split must say which split of {data!r} to train on: {', '.join(names)}")
    test = chosen["test_split"]
    if train == test:
        raise ValueError(f"data_options.test_split must be another split than train_split, got {test!r} for both")
    by_rank = sorted(
        (TEST_NAMES.index(each.strip().casefold()), each)
        for each in names
        if each != train and each.strip().casefold() in TEST_NAMES
    )
    return train, [test] if test is not None else [each for _, each in by_rank]


# Rows.


@dataclass(frozen=True)
class _Rows:
    """The rows of each split of a folder or of the hub, before their labels are read."""

    splits: Mapping[str, Sequence[Any]]
    """Hugging Face data sets: one per split, or several that declare different columns."""
    folder: str = ""
    """The folder that paths of images are relative to."""
    columns: tuple[str, str] | None = None
    """The columns of images, as paths that were checked, and of labels, if they are known."""
    notes: Sequence[str] = ()
    published: bool = False
    """True for a data set of the hub, whose splits stay as they were published."""


def _rows(config: DataSettings, path: str, data_config: str | None) -> _Rows:
    """Read the rows of a folder, or fetch those of the hub.

    Raises:
        ValueError: if there are none, or they cannot be read.
    """
    import datasets

    data = config.data
    if not data:
        raise ValueError("data must name a data set or a folder, got ''")
    folder = Path(path).expanduser()
    is_folder = folder.is_dir()
    is_path = folder.exists() or folder.is_absolute() or data.startswith((".", "~"))
    if not is_folder and (is_path or not _HUB_ID.fullmatch(path)):
        raise ValueError(f"data must be 'digits', a folder, or a data set's id on the hub; {data!r} is not a folder")
    if not is_folder and config.stored.table is not None:
        raise ValueError(f"data_options.table belongs to data from a folder; {data!r} is a data set of the hub")
    try:
        with _quiet_hub():
            if is_folder:
                return _folder_rows(folder, config, data_config)
            with _offline_without_answer(path):
                splits = datasets.load_dataset(path, data_config)
    except (datasets.exceptions.DatasetGenerationError, RuntimeError, TypeError, ValueError) as error:
        if is_folder and isinstance(error, ValueError):
            raise
        raise ValueError(f"data {data!r} cannot be read: {_reason(error.__cause__ or error)}") from error
    except OSError as error:  # no connection, or a name that the hub does not have; or no space for what is prepared
        if is_folder:
            raise ValueError(f"data {data!r} cannot be read: {error}") from error
        name = "" if data == path else f"{data!r}, "
        reason = "it does not answer" if "OfflineMode" in str(error) else _reason(error)
        raise ValueError(
            f"data set {name}{path!r} could not be fetched from the hub ({reason}); "
            "without a network, give data a folder that holds it: --data FOLDER"
        ) from error
    note = f"the data set of the hub, and not the folder {data}/ here: --data ./{data}"
    notes = (note,) if Path(data).is_dir() else ()
    return _Rows({name: [rows] for name, rows in splits.items()}, notes=notes, published=True)


def _folder_rows(folder: Path, config: DataSettings, data_config: str | None) -> _Rows:
    """Read class folders, a table of paths and labels, Parquet files, or a data set saved by `datasets`."""
    import datasets

    data, options, drop = config.data, config.stored, "unlabelled" in config.leave_out
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        saved = datasets.load_from_disk(str(folder))
        splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        return _Rows({str(name): [rows] for name, rows in splits.items()}, str(folder))
    listing = list_folder(folder)
    if options.table is not None:
        tables, notes = {"train": read_table(folder / options.table)}, list[str]()
    elif classes := class_folders(listing, data, options.train_split, options.test_split, drop_unlabelled=drop):
        _check_class_folders_alone(folder, listing, config)
        by_split, notes = classes
        splits = {name: [_rows_of_classes(by_class)] for name, by_class in by_split.items()}
        return _Rows(splits, str(folder), ("image", "label"), notes)
    else:
        files, notes = find_parquet(folder, listing, data, data_config)
        if files:
            return _Rows({name: load_parquet(paths) for name, paths in files.items()}, str(folder), notes=notes)
        tables, notes = find_tables(folder, listing)
    if tables:
        parts, columns, more_notes = read_path_tables(folder, tables, data, options.label_column)
        return _Rows({name: [rows] for name, rows in parts.items()}, str(folder), columns, [*notes, *more_notes])
    if listing.images or listing.with_images:
        kinds = f"images in {listed(list(listing.with_images))}" if listing.with_images else "images alone"
        raise ValueError(
            f"data must have a sub-folder of images for each of at least 2 classes, or a table of paths and labels; "
            f"{data!r} has {kinds}"
        )
    raise ValueError(
        f"data must have images, but the folder {data!r} has none; it holds {listing.contents()}. What can be read: "
        "a sub-folder of images for each class, Parquet files, or a CSV file of paths and labels; not archives"
    )


def _check_class_folders_alone(folder: Path, listing: Listing, config: DataSettings) -> None:
    """Check that labels can be taken from the class folders alone."""
    for name, value in (("label_column", config.stored.label_column), ("config", config.stored.config)):
        if value is not None:
            raise ValueError(
                f"data_options.{name} belongs to data with a column of labels; the classes of {config.data!r} are its "
                "sub-folders, unless data_options name a table"
            )
    for path in (path for each in listing.walk() for path in each.others if path.lower().endswith(".parquet")):
        if holds_images(folder / path):
            raise ValueError(
                f"data must be class folders or Parquet files with images, and {config.data!r} has both: move {path} "
                "or the folders away"
            )


def _rows_of_classes(by_class: Mapping[str, Sequence[str]]) -> Any:
    import datasets

    columns = {
        "image": [path for paths in by_class.values() for path in paths],
        "label": [name for name, paths in by_class.items() for _ in paths],
    }
    text = datasets.Value("string")
    return datasets.Dataset.from_dict(columns, features=datasets.Features({"image": text, "label": text}))


def _images(data: str, split: str, rows: _Rows, column: str) -> EncodedImages:
    import datasets
    from huggingface_hub import constants

    description = f"{Path(data).name} ({split})"
    if any(column not in part.features for part in rows.splits[split]):
        raise ValueError(f"data must have a column {column!r} of images in each split, and {description} has none")
    caches = (datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE)
    roots = tuple(map(str, caches)) if rows.published else ()
    images = EncodedImages(rows.splits[split], column, description, rows.folder, roots)
    if not rows.published and rows.columns is None:
        images.check_files()
    return images


def _revision(rows: Any) -> str | None:
    """Return the commit of a data set of the hub, which is part of the addresses of its files."""
    addresses = rows.info.download_checksums or ()
    return next((match[1] for address in addresses if (match := re.search(r"@([0-9a-f]{40})/", address))), None)


@contextmanager
def _offline_without_answer(path: str) -> Iterator[None]:
    """If the hub does not answer at once, work offline: with data sets that were fetched before."""
    import datasets
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    offline = [(constants, constants.HF_HUB_OFFLINE), (datasets.config, datasets.config.HF_HUB_OFFLINE)]
    try:
        HfApi().dataset_info(path, timeout=_HUB_SECONDS)
    except HfHubHTTPError:  # an answer
        pass
    except Exception:  # errors of the network, which differ between HTTP libraries
        for module, _ in offline:
            module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, before in offline:
            module.HF_HUB_OFFLINE = before


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Silence the warnings of the hub about failed attempts, because the last attempt raises an error.

    Progress bars of the hub are shown only in a terminal.
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
    """Return the first two lines; if a configuration is missing, the second line lists the available ones."""
    return " ".join(str(error).strip().split("\n")[:2])


# Labels.


@dataclass(frozen=True)
class _Labels:
    """The labels of a split as names of classes."""

    names: list[str | int | None]
    """One per image: the name of its class, -1 if it is unlabelled, None if its label is missing."""
    declared: Sequence[str]
    """The classes in the order that the data declare, if they do."""
    are_numbers: bool
    """True if some are integers without declared names."""


def _read_labels(data: str, split: str, parts: Sequence[Any], column: str) -> _Labels:
    """Read the labels of Hugging Face data sets, which may declare the classes in different orders.

    Raises:
        ValueError: if the column does not exist, or a label is not a valid class.
    """
    names: list[str | int | None] = []
    declared: list[Sequence[str] | None] = []
    are_numbers = False
    for rows in parts:
        if column not in rows.features:
            raise ValueError(
                f"data {data!r} must have labels in each split, its {split} split has no column {column!r}"
            )
        values, classes = rows[column][:], getattr(rows.features[column], "names", None)
        declared.append(classes)
        if classes is None:
            are_numbers |= isinstance(next((value for value in values if value is not None), None), int)
            names += _names_of_values(data, split, values)
            continue
        for value in values:
            if value is not None and not _UNLABELLED <= value < len(classes):
                raise ValueError(
                    f"data {data!r} must have labels in [0, {len(classes)}), its {split} split has {value}"
                )
        names += [classes[value] if value is not None and value >= 0 else value for value in values]
    return _Labels(names, next((classes for classes in declared if classes is not None), ()), are_numbers)


def _names_of_values(data: str, split: str, values: Iterable[Any]) -> list[str | int | None]:
    """Return integers, booleans and texts as texts; -1 means unlabelled, as integer and as text."""
    texts = (value if value is None else str(value) for value in values)
    names = [_UNLABELLED if text == str(_UNLABELLED) else text or None for text in texts]
    negative = next((name for name in names if isinstance(name, str) and re.fullmatch("-[0-9]+", name)), None)
    if negative is not None and all(_INTEGER.fullmatch(name) for name in names if isinstance(name, str)):
        raise ValueError(f"data {data!r} must have labels of at least 0, or -1; its {split} split has {negative}")
    return names


def _check_labelled(
    data: str, split: str, names: Sequence[str | int | None], may_drop: bool, is_train: bool
) -> str | None:
    """Return one line about the images that are left out because they have no label.

    Raises:
        ValueError: if there are some, and they must not be left out.
    """
    if not names:
        raise ValueError(f"data {data!r} must have at least one image in its {split} split")
    missing, unlabelled = names.count(None), names.count(_UNLABELLED)
    if missing and not may_drop:
        raise ValueError(
            f"data {data!r} must have a label for each image, its {split} split has images without ({missing} of "
            f"{len(names)}); with --leave_out unlabelled they are left out"
        )
    if unlabelled and not (may_drop or is_train):
        raise ValueError(
            f"data {data!r} must have a label for each image, and {unlabelled} of {len(names)} in its {split} split "
            "have -1, which means unlabelled: --leave_out unlabelled leaves them out, and test_split in data_options "
            "names another split"
        )
    number = missing + unlabelled
    return f"{number} of {len(names)} images of the {split} split left out: they have no label" if number else None


def _class_names(data: str, labels: Mapping[str, _Labels], train: str) -> tuple[str, ...]:
    """Return the classes of all splits in order: as the train split declares them, else by name, or by value.

    Raises:
        ValueError: if splits have labels of different kinds, or names of one class that differ.
    """
    present = {split: {name for name in each.names if isinstance(name, str)} for split, each in labels.items()}
    numbers = {split for split, each in labels.items() if each.are_numbers}
    texts = {split for split, names in present.items() if not all(_INTEGER.fullmatch(name) for name in names)}
    if numbers and texts:
        first, second = (sorted(present[min(kind)])[0] for kind in (numbers, texts))
        raise ValueError(
            f"data {data!r} must have labels of one kind: those of its {min(numbers)} split are numbers such as "
            f"{first}, those of its {min(texts)} split are names such as {second!r}"
        )
    similar = {name.strip().casefold(): name for name in present[train]}
    for split, names in present.items():
        for name in sorted(names - present[train]):
            other = similar.get(name.strip().casefold())
            if other is not None and other not in names:
                raise ValueError(
                    f"data {data!r} must have classes of the same names in all splits: {name!r} of its {split} split "
                    f"and {other!r} of its {train} split differ only in case or spaces"
                )
    others = sorted(set().union(*present.values()) - set(labels[train].declared))
    if all(_INTEGER.fullmatch(name) for name in others):
        values = Counter(map(int, others))
        if others and max(values.values()) > 1:
            same = [name for name in others if values[int(name)] > 1]
            raise ValueError(f"data {data!r} must have a different number for each class, got {listed(same)}")
        others.sort(key=int)
    return (*labels[train].declared, *others)
