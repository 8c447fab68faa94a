"""Data in a folder: class folders, a table of paths and labels, Parquet files, or a data set saved by `datasets`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuralcollapse.lab.config import DataSettings
from neuralcollapse.lab.data.columns import Given, find_image_column, find_label_column
from neuralcollapse.lab.data.folders import (
    ClassFolders,
    Listing,
    class_folders,
    contents,
    list_folder,
    listed,
)
from neuralcollapse.lab.data.parquet import find_parquet, holds_images, load_parquet
from neuralcollapse.lab.data.tables import (
    PathTable,
    check_rows,
    find_tables,
    numbered_names,
    read_table,
    splits_of,
)

_FRACTION = re.compile(r"[+-]?[0-9]*\.?[0-9]*(e[+-]?[0-9]+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Stored:
    """Splits of a folder or of the hub before their labels are read.

    Attributes:
        splits: The rows of each split, as Hugging Face data sets: one, or several that declare different columns.
        folder: The folder that paths of images are relative to.
        notes: What was left out, one line each.
        labels: The labels of each split, if they are not a column.
        published: True for a data set of the hub, whose splits stay as they were published.
    """

    splits: Mapping[str, Sequence[Any]]
    folder: str
    notes: tuple[str, ...] = ()
    labels: Mapping[str, Given] | None = None
    published: bool = False


def read_folder(folder: Path, config: DataSettings, data_config: str | None) -> Stored:
    """Read which images and labels a folder holds.

    Args:
        folder: The folder.
        config: What is asked for.
        data_config: Which of several configurations of a copy of a data set of the hub.

    Raises:
        ValueError: if it holds no images, or they and their labels can be read in more than one way.
    """
    data = config.data
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved(folder)
    listing = list_folder(folder)
    if config.table is not None:
        return _tables(folder, {"train": read_table(folder / config.table)}, config, ())
    drop = bool(config.drop_unlabelled)
    classes = class_folders(listing, data, config.train_split, config.test_split, drop_unlabelled=drop)
    if classes is not None:
        _check_alone(folder, listing, config)
        return _class_folders(folder, classes)
    files, unused = find_parquet(folder, listing, data, data_config)
    if files:
        notes = (f"not used: {listed(unused)}",) if unused else ()
        return Stored({split: load_parquet(paths) for split, paths in files.items()}, str(folder), notes)
    tables, unused = find_tables(folder, listing)
    if tables:
        return _tables(folder, tables, config, unused)
    if listing.images or listing.with_images:
        there = f"images in {listed(list(listing.with_images))}" if listing.with_images else "images alone"
        raise ValueError(
            f"data must have a sub-folder of images for each of at least 2 classes, or a table of paths and labels; "
            f"{data!r} has {there}"
        )
    raise ValueError(
        f"data must have images, but the folder {data!r} has none; it holds {contents(listing)}. What can be read: "
        "a sub-folder of images for each class, Parquet files, or a CSV file of paths and labels; not archives"
    )


def _check_alone(folder: Path, listing: Listing, config: DataSettings) -> None:
    """Check that labels can be taken from the class folders alone."""
    for name in ("label_column", "data_config"):
        if getattr(config, name) is not None:
            raise ValueError(
                f"{name} belongs to data with a column of labels; the classes of {config.data!r} are its sub-folders, "
                "unless --table FILE is given"
            )
    for path in (path for each in listing.walk() for path in each.others if path.lower().endswith(".parquet")):
        if holds_images(folder / path):
            raise ValueError(
                f"data must be class folders or Parquet files with images, and {config.data!r} has both: move {path} "
                "or the folders away"
            )


def _class_folders(folder: Path, classes: ClassFolders) -> Stored:
    splits, labels = {}, {}
    for split, by_class in classes.splits.items():
        splits[split] = _paths("image", (path for images in by_class.values() for path in images))
        labels[split] = Given([name for name, images in by_class.items() for _ in images])
    return Stored(splits, str(folder), classes.notes, labels)


def _tables(folder: Path, tables: Mapping[str, PathTable], config: DataSettings, unused: Sequence[str]) -> Stored:
    import datasets

    rows = datasets.Dataset.from_dict(next(iter(tables.values())).columns)
    image_column = find_image_column(config.data, rows)
    label_column = find_label_column(config.data, config.label_column, rows.features)
    values = [value for table in tables.values() for value in table.columns.get(label_column, ()) if value]
    if all(_FRACTION.fullmatch(value) for value in values) and any("." in value for value in values):
        raise ValueError(f"labels must be integers or names, and {label_column!r} has numbers such as {values[0]}")
    parts = splits_of(tables, image_column, label_column)
    for table in parts.values():
        table.columns.setdefault(label_column, [""] * len(table))
        check_rows(folder, table, image_column, label_column)
    numbered = numbered_names(parts, label_column)
    labels = {split: Given(table.columns[label_column]) for split, table in parts.items()}
    notes = [f"not used: {listed(unused)}"] if unused else []
    if numbered is not None:
        column, labels = numbered
        notes.append(f"classes are numbered and named by the columns {label_column!r} and {column!r}")
    splits = {split: _paths(image_column, table.columns[image_column]) for split, table in parts.items()}
    return Stored(splits, str(folder), tuple(notes), labels)


def _paths(column: str, paths: Iterable[str]) -> list[Any]:
    import datasets

    return [
        datasets.Dataset.from_dict(
            {column: list(paths)}, features=datasets.Features({column: datasets.Value("string")})
        )
    ]


def _saved(folder: Path) -> Stored:
    """A data set that `datasets` saved to disk."""
    import datasets

    found = datasets.load_from_disk(str(folder))
    splits = found if isinstance(found, datasets.DatasetDict) else {"train": found}
    return Stored({str(name): [rows] for name, rows in splits.items()}, str(folder))
