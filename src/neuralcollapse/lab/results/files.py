"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    import pandas as pd

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Have a file written under another name, then put it in place: a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    os.replace(partial, path)


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    """Write a mapping of plain values, in its order."""
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write a table without its index."""
    write_whole(path, lambda partial: table.to_csv(partial, index=False, na_rep="nan"))


def read_yaml(path: Path) -> dict[str, Any] | None:
    """The mapping in a file, or None if it holds something else."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _LOADER)
    except (yaml.YAMLError, UnicodeDecodeError):
        return None
    return content if isinstance(content, dict) else None
