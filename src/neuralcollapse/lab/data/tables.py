"""Tables of image paths and labels: CSV, TSV and the ``metadata`` files of Hugging Face's image folders."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neuralcollapse.lab.data.columns import Given
from neuralcollapse.lab.data.folders import Listing, image_extensions, is_split_name, listed, split_kind

READ = (".csv", ".tsv", ".jsonl")
_SPLIT_COLUMNS = ("split", "subset", "set", "data set", "dataset", "data_set", "partition", "phase", "usage")
_NUMBER_COLUMN = re.compile(r"(^|[^a-z])(id|idx|ids|index|label|labels|class|target|number|num|code)s?($|[^a-z])", re.I)
_NAME_COLUMN = re.compile(r"name|label|class|species|category|breed", re.I)
_FLAG_COLUMN = re.compile(r"is[_ ]?(train|training|test|testing|val|valid|validation)(?:[_ ]im(?:a)?ge?)?", re.I)
_NUMBER = re.compile(r"[0-9]+")
_INTEGER = re.compile(r"[+-]?[0-9]+")


@dataclass(frozen=True)
class PathTable:
    """The columns of a table of texts, each with one value per row."""

    path: Path
    columns: dict[str, list[str]]
    lines: list[int] = field(default_factory=list)
    """The line of the file on which each row ends."""

    def __len__(self) -> int:
        return len(self.lines)

    def rows(self, places: Sequence[int]) -> PathTable:
        """The table with these rows alone."""
        columns = {name: [values[place] for place in places] for name, values in self.columns.items()}
        return PathTable(self.path, columns, [self.lines[place] for place in places])

    def image_columns(self) -> list[str]:
        """The columns of paths of image files."""
        return [name for name, values in self.columns.items() if _is_image_path(next(filter(None, values), ""))]


def read_table(path: Path) -> PathTable:
    """Read a table; its first line names the columns. Every value is a text: ``None``, ``NA`` and ``01`` as well.

    Raises:
        ValueError: if it cannot be read, or a row has more or fewer values than there are columns.
    """
    if path.suffix.lower() not in READ:
        raise ValueError(f"table must be a file that ends in {', '.join(READ)}, got {str(path)!r}")
    if not path.is_file():
        raise ValueError(f"table must be a regular file, and {str(path)!r} is not")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"table {str(path)!r} cannot be read: {error}") from error
    rows = _json_lines(text, path) if path.suffix.lower() == ".jsonl" else _separated(text, path)
    if len(rows) < 2:
        raise ValueError(f"table {str(path)!r} must have a line of column names and at least one row, and has no data")
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
    columns = {name: [values[place] for _, values in body] for place, name in enumerate(header)}
    return PathTable(path, columns, [line for line, _ in body])


def find_tables(root: Path, listing: Listing) -> tuple[dict[str, PathTable], list[str]]:
    """Find the tables of image paths in a folder without class folders.

    Returns:
        The tables by split, and the files that are not used.

    Raises:
        ValueError: if no table can be read, or it is not clear which one to use.
    """
    files = [path for path in listing.others if Path(path).suffix.lower() in READ and not path.startswith(".")]
    tables: dict[str, PathTable] = {}
    failures = []
    for path in files:
        try:
            table = read_table(root / path)
        except ValueError as error:
            failures.append(error)
        else:
            tables |= {path: table} if table.image_columns() else {}
    if failures and not tables:
        raise failures[0]
    by_split = {Path(path).stem: table for path, table in tables.items() if is_split_name(Path(path).stem)}
    if not by_split and len(tables) > 1:
        raise ValueError(f"table must say which file to take, of {listed(list(tables))}: each has paths of images")
    if tables and not by_split:
        by_split = {"train": next(iter(tables.values()))}
    if not by_split:
        inner = {name: folder.others for name, folder in listing.with_images.items() if is_split_name(name)}
        metadata = {name: next((path for path in paths if _is_metadata(path)), None) for name, paths in inner.items()}
        by_split = {name: read_table(root / path) for name, path in metadata.items() if path is not None}
    used = [table.path for table in by_split.values()]
    by_split = dict(sorted(by_split.items(), key=lambda item: split_kind(item[0]) != "train"))
    return by_split, [path for path in files if root / path not in used]


def split_rows(table: PathTable, image_column: str, label_column: str | None) -> dict[str, PathTable]:
    """Divide a table by its column of splits, or by the folders of splits that all its paths begin with.

    Returns:
        The tables by split; none if neither is there.

    Raises:
        ValueError: if two of them disagree, or a row has no split.
    """
    found: dict[str, list[str]] = {}
    for name, values in table.columns.items():
        if name in (image_column, label_column):
            continue
        known = [is_split_name(value) for value in values]
        if all(known) or (any(known) and name.strip().casefold() in _SPLIT_COLUMNS):
            found[f"column {name!r}"] = values
        elif flag := _FLAG_COLUMN.fullmatch(name.strip()):
            found[f"column {name!r}"] = _flags(table, name, flag[1].casefold())
    folders = [Path(path.replace("\\", "/")).parts[0] if path else "" for path in table.columns[image_column]]
    if all(is_split_name(name) for name in folders):
        found["the folder of the path"] = folders
    if not found:
        return {}
    (first, names), *others = found.items()
    for where, values in others:
        for place, (name, other) in enumerate(zip(names, values, strict=True)):
            if split_kind(name) != split_kind(other):
                raise ValueError(
                    f"table {table.path.name} must have one split for each image, and line {table.lines[place]} has "
                    f"{name!r} by {first} and {other!r} by {where}"
                )
    by_name: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        if not name:
            raise ValueError(
                f"table {table.path.name} must have a split in each row, and line {table.lines[place]} has none"
            )
        by_name.setdefault(name, []).append(place)
    return {name: table.rows(places) for name, places in by_name.items()}


def splits_of(tables: Mapping[str, PathTable], image_column: str, label_column: str | None) -> dict[str, PathTable]:
    """Divide each table by `split_rows`, and name those that are not divided by their files.

    Raises:
        ValueError: if a table has no such column of images, or rows of another split than its file says.
    """
    splits: dict[str, PathTable] = {}
    for file, table in tables.items():
        if image_column not in table.columns:
            columns = ", ".join(table.columns)
            raise ValueError(f"table {table.path.name} must have a column {image_column!r}, and has {columns}")
        parts = split_rows(table, image_column, label_column) or {file: table}
        for name, part in parts.items():
            own = split_kind(name) == split_kind(file) or (len(parts) > 1 and split_kind(file) == "train")
            if len(tables) > 1 and not own:
                raise ValueError(f"table {table.path.name} must hold the split {file!r}, and has rows of {name!r}")
            if any(split_kind(name) == split_kind(other) and name not in parts for other in splits):
                raise ValueError(f"split {name!r} must be in one table, and is in {table.path.name} and another one")
            splits[name] = part
    return splits


def check_rows(folder: Path, table: PathTable, image_column: str, label_column: str) -> None:
    """Check that every path of a table is one of a file in the folder, with one label; make it relative to the folder.

    Raises:
        ValueError: if one is not.
    """
    base = (
        folder
        if table.path.stem != "metadata" and (folder / table.columns[image_column][0]).exists()
        else table.path.parent
    )
    around = {Path(os.path.abspath(folder)), folder.resolve()}
    labels: dict[str, str] = {}
    for place, given in enumerate(table.columns[image_column]):
        path = Path(os.path.abspath(base / given))
        if "\\" in given and not path.exists():  # as Windows writes them
            path = Path(os.path.abspath(base / given.replace("\\", "/")))
        where = f"line {table.lines[place]} of {table.path.name}"
        if not given:
            raise ValueError(f"data must have a path for each image, and {where} has none")
        inside = next((root for root in around if path.is_relative_to(root)), None)
        if inside is None:
            raise ValueError(f"data must have paths within the data folder, and {where} has {given!r}")
        if not path.is_file():
            reason = "it is not a regular file" if path.exists() else "No such file"
            raise ValueError(f"data must have images that can be read; {given} of {where} cannot: {reason}")
        relative = path.relative_to(inside).as_posix()
        table.columns[image_column][place] = relative
        label = table.columns[label_column][place]
        if labels.setdefault(relative, label) != label:
            raise ValueError(
                f"data must have one label for each image, and {given} has {labels[relative]!r} and {label!r} ({where})"
            )


def numbered_names(tables: Mapping[str, PathTable], label_column: str) -> tuple[str, dict[str, Given]] | None:
    """Return labels as numbers with the names of their classes, where tables have one column of each.

    Of names and numbers that belong together one to one, the numbers give the order and the names the classes.

    Returns:
        The name of the other column, and the labels of each split; None if there is no such column.

    Raises:
        ValueError: if several columns of numbers put the classes in different orders.
    """
    labels = _column(tables, label_column)
    integers = all(_INTEGER.fullmatch(label) for label in labels if label)
    orders: dict[tuple[str, ...], str] = {}
    for name in next(iter(tables.values())).columns:
        if name == label_column or not all(name in table.columns for table in tables.values()):
            continue
        pairs = {pair for pair in zip(labels, _column(tables, name), strict=True) if pair[0] and "-1" not in pair}
        numbers, texts = (0, 1) if integers else (1, 0)
        one_to_one = len(pairs) == len(dict(pairs)) == len({value for _, value in pairs}) < len(labels)
        fits = (_NAME_COLUMN if integers else _NUMBER_COLUMN).search(name)
        if not one_to_one or not fits or not all(_NUMBER.fullmatch(pair[numbers]) for pair in pairs):
            continue
        if all(_INTEGER.fullmatch(pair[texts]) for pair in pairs) or not all(pair[texts] for pair in pairs):
            continue
        ordered = sorted(pairs, key=lambda pair: int(pair[numbers]))
        orders.setdefault(tuple(pair[texts] for pair in ordered), name)
    if not orders:
        return None
    if len(orders) > 1:
        raise ValueError(f"label_column must say which labels to take: {', '.join([label_column, *orders.values()])}")
    ((names, column),) = orders.items()
    place = {text: number for number, text in enumerate(names)}
    by_split = {}
    for split, table in tables.items():
        taken = table.columns[column if integers else label_column]
        given = zip(table.columns[label_column], taken, strict=True)
        by_split[split] = Given([place.get(text, -1) if label else None for label, text in given], names)
    return column, by_split


def _column(tables: Mapping[str, PathTable], name: str) -> list[str]:
    return [value for table in tables.values() for value in table.columns[name]]


def _flags(table: PathTable, column: str, split: str) -> list[str]:
    """The splits that a column such as ``is_train`` tells by true and false."""
    values = [value.casefold() for value in table.columns[column]]
    if not set(values) <= {"0", "1", "true", "false"}:
        raise ValueError(f"column {column!r} of table {table.path.name} must hold 0 and 1, or true and false")
    other = "test" if split_kind(split) == "train" else "train"
    return [split if value in ("1", "true") else other for value in values]


def _is_metadata(path: str) -> bool:
    return Path(path).stem == "metadata" and Path(path).suffix.lower() in READ


def _is_image_path(value: str) -> bool:
    return os.path.splitext(value)[1].lower() in image_extensions()


def _separated(text: str, path: Path) -> list[tuple[int, list[str]]]:
    header = text.split("\n", 1)[0]
    separator = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    try:
        return [(reader.line_num, [value.strip() for value in row]) for row in reader if row]
    except csv.Error as error:
        raise ValueError(f"table {str(path)!r} cannot be read: line {reader.line_num}: {error}") from error


def _json_lines(text: str, path: Path) -> list[tuple[int, list[str]]]:
    rows: list[dict[str, Any]] = []
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"table {str(path)!r} cannot be read: line {number}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"table {str(path)!r} must have an object on each line, line {number} has none")
            rows.append({name: value for name, value in row.items() if not isinstance(value, dict | list)})
            lines.append(number)
    header = list(dict.fromkeys(name for row in rows for name in row))
    body = [["" if row.get(name) is None else str(row[name]) for name in header] for row in rows]
    return [(0, header), *zip(lines, body, strict=True)]
