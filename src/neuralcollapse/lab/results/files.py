"""Files that are there whole or not at all, and that are known to be as they were written."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    import pandas as pd

# In a folder that has it, the SHA-256 of every file written beside it: of the last one, and of the one before.
CHECKSUMS = "checksums.yaml"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Have a file written under another name, synced to disk and put in place; enter it in the folder's checksums.

    A kill, a full disk or a loss of power leaves the old file or the new one.

    Raises:
        OSError: It cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
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


def check(path: Path) -> None:
    """See that a file is what was written last, where its folder keeps checksums.

    Raises:
        ValueError: It was changed or damaged since.
    """
    known = _checksums(path.parent).get(path.name)
    if known is not None and _sha256(path) not in known:
        raise ValueError(
            f"{str(path)!r} was changed or damaged after it was written: its SHA-256 is not that in {CHECKSUMS}; "
            "without its line there it is taken as it is"
        )


def _enter_checksum(path: Path, partial: Path) -> None:
    """Before the file is in its place: a kill between the two leaves the one before, whose checksum stays."""
    folder = path.parent
    if (folder / CHECKSUMS).exists():
        sums = _checksums(folder)
        before = _sha256(path) if path.exists() else None
        kept = [before] if before in sums.get(path.name, []) else []
        write_yaml(folder / CHECKSUMS, sums | {path.name: [*kept, _sha256(partial)]})


def _checksums(folder: Path) -> dict[str, Any]:
    manifest = folder / CHECKSUMS
    if not manifest.exists():
        return {}
    found = _parsed(manifest)
    if found is None:
        raise ValueError(f"{str(manifest)!r} must be checksums of files, and is damaged; without it none are compared")
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    """Write a mapping of plain values, in its order."""
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write a table without its index."""
    write_whole(path, lambda partial: table.to_csv(partial, index=False, na_rep="nan"))


def read_yaml(path: Path) -> dict[str, Any] | None:
    """The mapping in a file, or None if it holds something else; raises ValueError if it is not what was written."""
    check(path)
    return _parsed(path)


def _parsed(path: Path) -> dict[str, Any] | None:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _LOADER)
    except (yaml.YAMLError, UnicodeDecodeError):
        return None
    return content if isinstance(content, dict) else None
