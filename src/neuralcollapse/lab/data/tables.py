"""Tables of images and labels: detection of their columns, and tables of image paths in a data folder."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from neuralcollapse.lab.data.folders import Listing, image_extensions, is_split_name, listed, split_kind

TABLES = (".csv", ".tsv", ".jsonl")
# Usual names of a column of labels that is not declared as such.
_LABEL_COLUMNS = ("label", "labels", "class", "target")
_SPLIT_COLUMNS = ("split", "subset", "set", "data set", "dataset", "data_set", "partition", "phase", "usage")
_NUMBER_COLUMN = re.compile(r"(^|[^a-z])(id|idx|ids|index|label|labels|class|target|number|num|code)s?($|[^a-z])", re.I)
_NAME_COLUMN = re.compile(r"name|label|class|species|category|breed", re.I)
_FLAG_COLUMN = re.compile(r"is[_ ]?(train|training|test|testing|val|valid|validation)(?:[_ ]im(?:a)?ge?)?", re.I)
_INTEGER = re.compile(r"[+-]?[0-9]+")
_FRACTION = re.compile(r"[+-]?[0-9]*\.?[0-9]*(e[+-]?[0-9]+)?", re.I)


# Columns of a Hugging Face data set.


def find_image_column(data: str, rows: Any) -> str:
    """Return the column of images: declared as such, or else with bytes, {bytes, path}, or paths of image files.

    Raises:
        ValueError: unless there is exactly one such column.
    """
    import datasets

    declared = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    candidates = declared[:1] or [name for name, feature in rows.features.items() if _holds_images(rows, name, feature)]
    if len(candidates) > 1:
        raise ValueError(f"data {data!r} must have one column of images, but has {', '.join(candidates)}")
    if not candidates:
        raise ValueError(
            f"data must have images, but {data!r} has only the columns {', '.join(rows.features)}: none is of images, "
            "of their bytes or of paths of image files"
        )
    return candidates[0]


def _holds_images(rows: Any, name: str, feature: Any) -> bool:
    from PIL import Image

    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    kind = getattr(feature, "dtype", "")
    if kind in ("string", "large_string"):
        first = next((value for value in rows[:10][name] if value), "")
        return first[first.rfind(".") :].lower() in Image.registered_extensions()
    return kind in ("binary", "large_binary")


def find_label_column(data: str, wanted: str | None, features: Mapping[str, Any]) -> str:
    """Return the column of labels: the requested column, or else a column of class labels or with a usual name.

    Raises:
        ValueError: unless there is exactly one such column.
    """
    import datasets

    if wanted is not None:
        candidates = [name for name in features if name == wanted]
    else:
        candidates = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        candidates = candidates or [name for name in features if name.strip().casefold() in _LABEL_COLUMNS]
        candidates = ["label"] if "label" in candidates else candidates
    if len(candidates) > 1:
        raise ValueError(
            f"data_options.label_column must say which labels of {data!r} to take: {', '.join(candidates)}"
        )
    kind = str(getattr(features[candidates[0]], "dtype", "")) if candidates else ""
    if not any(word in kind for word in ("int", "string", "bool")):
        called = f"of class labels called {wanted!r}" if wanted else "of class labels"
        reason = f"{candidates[0]!r} is of {kind or 'something else'}" if candidates else "none is called label"
        raise ValueError(
            f"data {data!r} must have a column {called}, integers or texts, or be a folder with a sub-folder of images "
            f"for each class; its columns are {', '.join(features)}, and {reason}"
        )
    return candidates[0]


# Tables of image paths.


class PathTable(NamedTuple):
    """Table of texts; the index of each row is the line of the file on which the row ends."""

    path: Path
    rows: pd.DataFrame


def read_table(path: Path) -> PathTable:
    """Read a table whose first line names the columns. Every value is a text, including ``None``, ``NA`` and ``01``.

    Raises:
        ValueError: if it cannot be read, or a row has more or fewer values than there are columns.
    """
    if path.suffix.lower() not in TABLES:
        raise ValueError(f"table must be a file that ends in {', '.join(TABLES)}, got {str(path)!r}")
    if not path.is_file():
        raise ValueError(f"table must be a regular file, and {str(path)!r} is not")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"table {str(path)!r} cannot be read: {error}") from error
    rows = _json_lines(text, path) if path.suffix.lower() == ".jsonl" else _separated(text, path)
    if len(rows) < 2:
        raise ValueError(f"table {str(path)!r} must have a line of column names and at least one row, but has no data")
    (_, header), *body = rows
    if any(_is_image_path(name) for name in header):
        raise ValueError(f"table {str(path)!r} must begin with a line of column names, and begins with {header}")
    if len(set(header)) < len(header):
        raise ValueError(f"table {str(path)!r} must have columns of different names, got {', '.join(header)}")
    for line, values in body:
        if len(values) != len(header):
            raise ValueError(
                f"table {str(path)!r} must have {len(header)} values in each row, as it has columns; line {line} has "
                f"{len(values)}"
            )
    lines, values_of_rows = zip(*body, strict=True)
    return PathTable(path, pd.DataFrame(list(values_of_rows), index=list(lines), columns=header, dtype=object))


def _separated(text: str, path: Path) -> list[tuple[int, list[str]]]:
    header = text.split("\n", 1)[0]
    separator = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    try:
        return [(reader.line_num, [value.strip() for value in row]) for row in reader if row]
    except csv.Error as error:
        raise ValueError(f"table {str(path)!r} cannot be read: line {reader.line_num}: {error}") from error


def _json_lines(text: str, path: Path) -> list[tuple[int, list[str]]]:
    rows: dict[int, dict[str, Any]] = {}
    for line, content in enumerate(text.splitlines(), 1):
        if content.strip():
            try:
                row = json.loads(content)
            except ValueError as error:
                raise ValueError(f"table {str(path)!r} cannot be read: line {line}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"table {str(path)!r} must have an object on each line, line {line} has none")
            rows[line] = {name: value for name, value in row.items() if not isinstance(value, dict | list)}
    header = list(dict.fromkeys(name for row in rows.values() for name in row))
    body = {line: ["" if row.get(name) is None else str(row[name]) for name in header] for line, row in rows.items()}
    return [(0, header), *body.items()]


def find_tables(root: Path, listing: Listing) -> tuple[dict[str, PathTable], list[str]]:
    """Find the tables of image paths in a folder without class folders.

    Returns:
        The tables by split, and a line on those that are not used.

    Raises:
        ValueError: if no table can be read, or it is not clear which one to use.
    """
    files = [path for path in listing.others if Path(path).suffix.lower() in TABLES and not path.startswith(".")]
    tables: dict[str, PathTable] = {}
    failures = []
    for path in files:
        try:
            table = read_table(root / path)
        except ValueError as error:
            failures.append(error)
            continue
        if any(_is_image_path(next(filter(None, values), "")) for _, values in table.rows.items()):
            tables[path] = table
    if failures and not tables:
        raise failures[0]
    by_split = {Path(path).stem: table for path, table in tables.items() if is_split_name(Path(path).stem)}
    if not by_split and len(tables) > 1:
        raise ValueError(f"table must say which file to take, of {listed(list(tables))}: each has paths of images")
    if tables and not by_split:
        by_split = {"train": next(iter(tables.values()))}
    if not by_split:  # a file called metadata in the folder of each split
        for name, folder in listing.with_images.items():
            metadata = [path for path in folder.others if Path(path).stem == "metadata"] if is_split_name(name) else []
            for path in [path for path in metadata if Path(path).suffix.lower() in TABLES][:1]:
                by_split[name] = read_table(root / path)
    used = [table.path for table in by_split.values()]
    unused = [path for path in files if root / path not in used]
    by_split = dict(sorted(by_split.items(), key=lambda item: split_kind(item[0]) != "train"))
    return by_split, [f"not used: {listed(unused)}"] if unused else []


def read_path_tables(
    root: Path, tables: Mapping[str, PathTable], data: str, label_column: str | None
) -> tuple[dict[str, Any], tuple[str, str], list[str]]:
    """Read the images and labels of tables of image paths.

    Args:
        root: The data folder.
        tables: The tables by split; one table may hold several splits.
        data: The folder's name, for messages.
        label_column: The column of labels, if it is named.

    Returns:
        The rows of each split as a Hugging Face data set, its columns of images and labels, and lines on what was
        decided.

    Raises:
        ValueError: if it is not clear what the columns mean, or a row does not have a file, a label and a split.
    """
    import datasets

    text, notes = datasets.Value("string"), list[str]()
    first = next(iter(tables.values())).rows
    columns = datasets.Dataset.from_dict(first.to_dict("list"), features=datasets.Features(dict.fromkeys(first, text)))
    image_column = find_image_column(data, columns)
    label_column = find_label_column(data, label_column, columns.features)
    for _, rows in tables.values():
        if label_column not in rows:
            rows[label_column] = ""
    values = [value for _, rows in tables.values() for value in rows[label_column] if value]
    if all(_FRACTION.fullmatch(value) for value in values) and any("." in value for value in values):
        raise ValueError(f"labels must be integers or names, and {label_column!r} has numbers such as {values[0]}")
    splits = _splits_of(tables, image_column, label_column)
    paths = {name: _paths(root, table, image_column, label_column) for name, table in splits.items()}
    labels: dict[str, list[Any]] = {name: list(rows[label_column]) for name, (_, rows) in splits.items()}
    features = datasets.Features({image_column: text, label_column: text})
    if (numbered := _numbered_names(splits, label_column)) is not None:
        other, names, labels = numbered
        features[label_column] = datasets.ClassLabel(names=names)
        notes.append(f"classes are numbered and named by the columns {label_column!r} and {other!r}")
    parts = {
        name: datasets.Dataset.from_dict({image_column: paths[name], label_column: labels[name]}, features)
        for name in splits
    }
    return parts, (image_column, label_column), notes


def _splits_of(tables: Mapping[str, PathTable], image_column: str, label_column: str) -> dict[str, PathTable]:
    """Divide each table by `_split_names`; tables that cannot be divided are named by their files."""
    splits: dict[str, PathTable] = {}
    for file, (path, rows) in tables.items():
        if image_column not in rows:
            raise ValueError(
                f"table {path.name} must have a column {image_column!r}, and has {', '.join(map(str, rows))}"
            )
        names = _split_names(path, rows, image_column, label_column)
        parts = {file: rows} if names is None else dict(list(rows.groupby(pd.Series(names, rows.index), sort=False)))
        for name, part in parts.items():
            fits = split_kind(name) == split_kind(file) or (len(parts) > 1 and split_kind(file) == "train")
            if len(tables) > 1 and not fits:
                raise ValueError(f"table {path.name} must hold the split {file!r}, and has rows of {name!r}")
            if any(split_kind(name) == split_kind(other) and name not in parts for other in splits):
                raise ValueError(f"split {name!r} must be in one table, and is in {path.name} and another one")
            splits[name] = PathTable(path, part)
    return splits


def _split_names(path: Path, rows: pd.DataFrame, image_column: str, label_column: str) -> list[str] | None:
    """Return the split of each row, by a column of splits or by the folders of splits that all paths begin with."""
    sources: dict[str, list[str]] = {}
    for column, values in rows.drop(columns=[image_column, label_column], errors="ignore").items():
        known = [is_split_name(value) for value in values]
        if all(known) or (any(known) and str(column).strip().casefold() in _SPLIT_COLUMNS):
            sources[f"column {column!r}"] = list(values)
        elif flag := _FLAG_COLUMN.fullmatch(str(column).strip()):  # such as is_train, with true and false
            split, flags = flag[1].casefold(), [value.casefold() for value in values]
            if not set(flags) <= {"0", "1", "true", "false"}:
                raise ValueError(f"column {column!r} of table {path.name} must hold 0 and 1, or true and false")
            opposite = "test" if split_kind(split) == "train" else "train"
            sources[f"column {column!r}"] = [split if value in ("1", "true") else opposite for value in flags]
    folders = [Path(given.replace("\\", "/")).parts[0] if given else "" for given in rows[image_column]]
    if all(is_split_name(name) for name in folders):
        sources["the folder of the path"] = folders
    if not sources:
        return None
    (first, names), *others = sources.items()
    for source, other_names in others:
        for line, name, other in zip(rows.index, names, other_names, strict=True):
            if split_kind(name) != split_kind(other):
                raise ValueError(
                    f"table {path.name} must have one split for each image, and line {line} has {name!r} by {first} "
                    f"and {other!r} by {source}"
                )
    if "" in names:
        line = rows.index[names.index("")]
        raise ValueError(f"table {path.name} must have a split in each row, and line {line} has none")
    return names


def _paths(folder: Path, table: PathTable, image_column: str, label_column: str) -> list[str]:
    """Return the paths of a table relative to the folder, each of a file in it, with one label."""
    given_paths = table.rows[image_column]
    beside_table = table.path.stem == "metadata" or not (folder / given_paths.iloc[0]).exists()
    base = table.path.parent if beside_table else folder
    roots = {Path(os.path.abspath(folder)), folder.resolve()}
    paths, labels = [], dict[str, str]()
    for index, given, label in zip(table.rows.index, given_paths, table.rows[label_column], strict=True):
        path = Path(os.path.abspath(base / given))
        if "\\" in given and not path.exists():  # as Windows writes them
            path = Path(os.path.abspath(base / given.replace("\\", "/")))
        line = f"line {index} of {table.path.name}"
        if not given:
            raise ValueError(f"data must have a path for each image, and {line} has none")
        root = next((root for root in roots if path.is_relative_to(root)), None)
        if root is None:
            raise ValueError(f"data must have paths within the data folder, and {line} has {given!r}")
        if not path.is_file():
            reason = "it is not a regular file" if path.exists() else "No such file"
            raise ValueError(f"data must have images that can be read; {given} of {line} cannot: {reason}")
        paths.append(path.relative_to(root).as_posix())
        if labels.setdefault(paths[-1], label) != label:
            raise ValueError(
                f"data must have one label for each image, and {given} has {labels[paths[-1]]!r} and {label!r} ({line})"
            )
    return paths


def _numbered_names(
    tables: Mapping[str, PathTable], label_column: str
) -> tuple[str, list[str], dict[str, list[Any]]] | None:
    """Return labels as numbers with the names of their classes, if the tables have one column of each.

    Of names and numbers that belong together one to one, the numbers give the order and the names the classes.

    Returns:
        The name of the other column, the names in order, and the labels of each split; None without such a column.

    Raises:
        ValueError: if several columns of numbers put the classes in different orders.
    """
    rows = pd.concat([rows for _, rows in tables.values()], join="inner", ignore_index=True)
    integers = all(_INTEGER.fullmatch(label) for label in rows[label_column] if label)
    orders: dict[tuple[str, ...], str] = {}
    for name in rows.columns.drop(label_column):
        pairs = rows[[label_column, name]].drop_duplicates()
        pairs = pairs[(pairs[label_column] != "") & ~pairs.isin(["-1"]).any(axis=1)]
        numbers, names = (pairs[column] for column in ([label_column, name] if integers else [name, label_column]))
        one_to_one = numbers.is_unique and names.is_unique and len(pairs) < len(rows)
        fits = (_NAME_COLUMN if integers else _NUMBER_COLUMN).search(name)
        if not one_to_one or not fits or not numbers.str.fullmatch("[0-9]+").all():
            continue
        if all(_INTEGER.fullmatch(text) for text in names) or "" in set(names):
            continue
        orders.setdefault(tuple(names[numbers.map(int).sort_values().index]), name)
    if not orders:
        return None
    if len(orders) > 1:
        raise ValueError(
            f"data_options.label_column must say which labels to take: {', '.join([label_column, *orders.values()])}"
        )
    ((ordered, other),) = orders.items()
    number_of = {text: number for number, text in enumerate(ordered)}
    by_split = {}
    for split, (_, part) in tables.items():
        pairs_of_rows = zip(part[label_column], part[other if integers else label_column], strict=True)
        by_split[split] = [number_of.get(text, -1) if label else None for label, text in pairs_of_rows]
    return other, list(ordered), by_split


def _is_image_path(value: str) -> bool:
    return os.path.splitext(value)[1].lower() in image_extensions()
