"""Files of run folders: locks for a single writer, and reading and writing of text files with protections."""

from __future__ import annotations

import copy
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import yaml

from neuralcollapse import _files
from neuralcollapse.lab.untrusted import load_yaml

try:
    import fcntl
except ImportError:  # not available on every system; without it, locks have no effect
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import pandas as pd

_LOCK = ".lock"
# Beginning of a cell that a spreadsheet would interpret as a formula; numbers are not formulas.
_FORMULA = re.compile(r"[=+@\t\r]|-(?![\d.]|inf)")
# Content of YAML files that this process has read or written, with their signature.
_PARSED: dict[Path, tuple[tuple[int, int, int], dict[str, Any] | None]] = {}


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file completely or not at all, in a folder that is not locked by another process.

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
        raise ValueError(f"{str(path)!r} must be a regular file, but is not")
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
    """Write a table without its index, and without cells that a spreadsheet would interpret as formulas."""
    text = without_formulas(table)
    write_whole(path, lambda partial: text.to_csv(partial, index=False, na_rep="nan"))


def without_formulas(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table in which texts and headings that look like formulas to a spreadsheet begin with an apostrophe.

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
    """Return the mapping with text keys in a file, or None if the file contains something else.

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
    """Return inode, time of modification and size of a file, which show whether it has changed."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


# --- advisory locks of the kernel, which are released when their process ends, even if it is killed -------------------


@dataclass
class _Held:
    """Lock that this process holds."""

    file: IO[str]
    folder: str
    process: int
    depth: int = 1


_HELD: dict[tuple[int, int], _Held] = {}


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Lock a folder for writing; create it if it does not exist, and delete temporary files of killed processes.

    A process may acquire a lock that it already holds. If an exception occurs before anything else is written, the lock
    file and the folders that were created for it are removed.

    Raises:
        ValueError: if another process holds the lock.
        OSError: if the folder cannot be created or written to.
    """
    created = [place for place in (folder, *folder.parents) if not place.exists()]
    before = set() if created else set(os.listdir(folder))
    folder.mkdir(parents=True, exist_ok=True)
    file = _open(folder)
    held = _HELD.get(_inode(file))
    if held is not None and held.process == os.getpid():
        file.close()
        held.depth += 1
        try:
            yield
        finally:
            held.depth -= 1
        return
    with file:
        _lock(file, folder)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        key = _inode(file)
        _HELD[key] = _Held(file, os.path.abspath(folder), os.getpid())
        try:
            _delete_temporary_files(folder)
            yield
        except BaseException:
            _undo(folder, created, before)
            raise
        finally:
            del _HELD[key]


def _undo(folder: Path, created: list[Path], before: set[str]) -> None:
    """Remove the lock file and the folders created for it, if they are new and nothing else was written."""
    with suppress(OSError):
        if _LOCK not in before and set(os.listdir(folder)) <= before | {_LOCK}:
            (folder / _LOCK).unlink()
            for place in created:  # beginning with the innermost folder
                place.rmdir()


def check_held(path: Path) -> None:
    """Check that the locked folder in which a file will be written, if any, has not been replaced since it was locked.

    Raises:
        OSError: if it was deleted or replaced, because the new folder would lack all earlier files.
    """
    place = os.path.abspath(path)
    for held in _HELD.values():
        if place.startswith(held.folder + os.sep) and held.process == os.getpid():
            lock = os.path.join(held.folder, _LOCK)
            if not os.path.exists(lock) or not os.path.samestat(os.stat(lock), os.fstat(held.file.fileno())):
                raise OSError(f"{held.folder!r} was deleted or replaced while this process was writing to it")


def _open(folder: Path) -> IO[str]:
    """Return the opened lock file, which must not be a link to another file."""
    path = folder / _LOCK
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if path.is_symlink():
            raise ValueError(f"{str(path)!r} must be a regular file, but is a link: delete it") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{str(path)!r} must be a regular file, but is not: delete it")
    return os.fdopen(descriptor, "a+")


def _inode(file: IO[str]) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino


def _lock(file: IO[str], folder: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ValueError(
            f"{str(folder)!r} is being written by process {file.read() or 'unknown'}: wait until it ends, "
            "or use another folder"
        ) from None


def _delete_temporary_files(folder: Path) -> None:
    """Delete temporary files in a folder and its subfolders, except those of single runs, which have separate locks."""
    for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        with suppress(OSError):  # files that cannot be deleted are replaced or left, which is harmless
            for path in list(place.iterdir()):
                if _files.TEMPORARY.fullmatch(path.name) and (path.is_file() or path.is_symlink()):
                    path.unlink()
