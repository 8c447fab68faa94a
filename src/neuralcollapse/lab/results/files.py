"""Text files of run folders: written whole, read within limits, tables without formulas."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from neuralcollapse import _files
from neuralcollapse.lab.results.locking import check_held
from neuralcollapse.lab.untrusted import load_yaml

if TYPE_CHECKING:
    import pandas as pd

# Beginning of a cell that a spreadsheet takes for a formula; that of a number is not one.
_FORMULA = re.compile(r"[=+@\t\r]|-(?![\d.]|inf)")
# Content of YAML files that this process has read or written, with their signature.
_PARSED: dict[Path, tuple[tuple[int, int, int], dict[str, Any] | None]] = {}


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file completely or not at all, in a folder that is locked by this process or by none.

    Args:
        path: The file.
        write: Function that writes the content to the path that it is given.

    Raises:
        OSError: if the file cannot be written, or its folder was deleted after this process locked it.
    """
    check_held(path)
    _files.write_whole(path, write)


def read_file(path: Path) -> bytes:
    """Return the content of a regular file.

    Raises:
        ValueError: if it is not a regular file.
        OSError: if it cannot be read.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{str(path)!r} must be a regular file, and is not")
    return path.read_bytes()


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    """Write a mapping of plain values, in its order."""
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    _PARSED[path] = signature(path), copy.deepcopy(content)


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write a table without its index, and without cells that a spreadsheet would take for formulas."""
    text = without_formulas(table)
    write_whole(path, lambda partial: text.to_csv(partial, index=False, na_rep="nan"))


def without_formulas(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table whose texts and headings that a spreadsheet would take for formulas begin with an apostrophe.

    Examples:
        >>> import pandas as pd
        >>> without_formulas(pd.DataFrame({"group": ["=A1", "fixed"], "value": [-1.0, 2.0]}))["group"].tolist()
        ["'=A1", 'fixed']
    """
    table = table.rename(columns=_without_formula)
    texts = [place for place, kind in enumerate(table.dtypes) if not hasattr(kind, "kind") or kind.kind not in "biufc"]
    for place in texts:
        table.isetitem(place, [_without_formula(cell) for cell in table.iloc[:, place]])
    return table


def _without_formula(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell


def read_yaml(path: Path) -> dict[str, Any] | None:
    """Return the mapping from texts in a file, or None if the file holds something else.

    A file that this process has read or written is parsed again only if it has changed.

    Raises:
        ValueError: if it is not a regular file.
        OSError: if it cannot be read.
    """
    current = signature(path)
    if path not in _PARSED or _PARSED[path][0] != current:
        _PARSED[path] = current, _parsed(read_file(path))
    return copy.deepcopy(_PARSED[path][1])


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        content = load_yaml(text.decode())
    except ValueError:
        return None
    return content if isinstance(content, dict) and all(isinstance(name, str) for name in content) else None


def signature(path: Path) -> tuple[int, int, int]:
    """Return inode, time of modification and size of a file, which tell whether it has changed."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size
