"""Files that are there whole or not at all, and that are known to be as they were written."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from neuralcollapse.lab.results.locking import check_held
from neuralcollapse.lab.untrusted import load_yaml

if TYPE_CHECKING:
    import pandas as pd

# In a folder that has it, the SHA-256 of every file written beside it: of the last one, and of the one before.
CHECKSUMS = "checksums.yaml"
# A process that writes may put another version in place between a reader's look at the checksums and at the file.
_TRIES = 5
# What a spreadsheet takes for a formula: all of it but numbers.
_FORMULA = re.compile(r"[=+@\t\r]|-(?![\d.]|inf)")


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Have a file written under another name, synced to disk and put in place; enter it in the folder's checksums.

    A kill, a full disk or a loss of power leaves the old file or the new one. A link in its place is replaced, and not
    followed.

    Raises:
        OSError: if it cannot be written, or its folder was deleted since this process locked it.
    """
    check_held(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)  # of a process that was killed; or a link, which would be written through
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        if path.name != CHECKSUMS:
            _enter_checksum(path, partial)
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__  # of what torch says of its own
        if isinstance(cause, KeyboardInterrupt | SystemExit):
            raise cause from None
        if isinstance(cause, OSError):
            reason = cause.strerror or str(cause)
            raise OSError(f"{str(path)!r} cannot be written: {reason}; what it held before is left") from error
        raise


def read_checked(path: Path) -> bytes:
    """Return the content of a file that is what was written last, where its folder keeps checksums.

    Raises:
        ValueError: if it was changed or damaged since, or is not a regular file.
        OSError: if it cannot be read.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{str(path)!r} must be a regular file, and is not")
    for _ in range(_TRIES):
        known = _checksums(path.parent).get(path.name)
        content = path.read_bytes()
        if known is None or hashlib.sha256(content).hexdigest() in known:
            return content
    raise ValueError(
        f"{str(path)!r} was changed or damaged after it was written: its SHA-256 is not that in {CHECKSUMS}; "
        "without its line there it is taken as it is"
    )


def _enter_checksum(path: Path, partial: Path) -> None:
    """Before the file is in its place: a kill between the two leaves the one before, whose checksum stays."""
    folder = path.parent
    if (folder / CHECKSUMS).exists():
        sums = _checksums(folder)
        before = sha256(path) if path.is_file() else None
        kept = [before] if before in sums.get(path.name, []) else []
        write_yaml(folder / CHECKSUMS, sums | {path.name: [*kept, sha256(partial)]})


def _checksums(folder: Path) -> dict[str, list[str]]:
    manifest = folder / CHECKSUMS
    if not manifest.exists():
        return {}
    found = _mapping(manifest.read_bytes()) if manifest.is_file() else None
    if found is None or not all(isinstance(sums, list) for sums in found.values()):
        raise ValueError(f"{str(manifest)!r} must be checksums of files, and is damaged; without it none are compared")
    return found


def sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    """Write a mapping of plain values, in its order."""
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


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
    """Return the mapping in a file, or None if it holds something else.

    Raises:
        ValueError: if it is not what was written.
    """
    return _mapping(read_checked(path))


def _mapping(content: bytes) -> dict[str, Any] | None:
    """The mapping from texts in a YAML document, or None if it holds something else."""
    try:
        found = load_yaml(content.decode())
    except ValueError:
        return None
    return found if isinstance(found, dict) and all(isinstance(name, str) for name in found) else None
