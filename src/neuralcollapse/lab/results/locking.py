"""One writer per folder: an advisory lock of the kernel, which ends with its process however that ends."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from neuralcollapse._files import TEMPORARY

try:
    import fcntl
except ImportError:  # not on every system; there, nothing is locked
    fcntl = None  # type: ignore[assignment]

_LOCK = ".lock"


@dataclass
class _Held:
    """A lock that this process holds."""

    file: IO[str]
    folder: str
    process: int
    depth: int = 1


_HELD: dict[tuple[int, int], _Held] = {}


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Lock a folder for writing, created if it does not exist; delete temporary files that a killed process left.

    The process that holds the lock may take it again. If an exception leaves the folder as it was, the file of the lock
    and the folders that were created for it are removed.

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
    """Remove the file of a lock, and the folders created for it, if they are new and nothing else was written."""
    with suppress(OSError):
        if _LOCK not in before and set(os.listdir(folder)) <= before | {_LOCK}:
            (folder / _LOCK).unlink()
            for place in created:  # the innermost first
                place.rmdir()


def check_held(path: Path) -> None:
    """Check that the locked folder in which a file is to be written, if any, is still the one that was locked.

    Raises:
        OSError: if it was deleted or replaced: what is written now would be all that a new one has.
    """
    place = os.path.abspath(path)
    for held in _HELD.values():
        if place.startswith(held.folder + os.sep) and held.process == os.getpid():
            lock = os.path.join(held.folder, _LOCK)
            if not os.path.exists(lock) or not os.path.samestat(os.stat(lock), os.fstat(held.file.fileno())):
                raise OSError(f"{held.folder!r} was deleted or replaced while this process was writing to it")


def _open(folder: Path) -> IO[str]:
    """The lock's file, which is not a link that leads elsewhere."""
    path = folder / _LOCK
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if path.is_symlink():
            raise ValueError(f"{str(path)!r} must be a file of its own, and is a link: delete it") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{str(path)!r} must be a regular file, and is not: delete it")
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
            f"{str(folder)!r} is being written by process {file.read() or 'unknown'}: wait for its end, "
            "or name another folder"
        ) from None


def _delete_temporary_files(folder: Path) -> None:
    """In the folder and in the folders inside it; those of single runs are locked by themselves."""
    for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        with suppress(OSError):  # what cannot be deleted is replaced or left, and harms nothing
            for path in list(place.iterdir()):
                if TEMPORARY.fullmatch(path.name) and (path.is_file() or path.is_symlink()):
                    path.unlink()
