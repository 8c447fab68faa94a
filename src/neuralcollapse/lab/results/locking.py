"""One writer a folder: an advisory lock of the kernel's, gone with its process however that ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not on every system; there, nothing is locked
    fcntl = None  # type: ignore[assignment]

_LOCK = ".lock"


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold a folder, made if it is not there, for writing.

    Raises:
        ValueError: Another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("a+") as file:
        _lock(file, folder)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def check_free(folder: Path) -> None:
    """See that no process holds a folder for writing; change nothing.

    Raises:
        ValueError: One does.
    """
    if (folder / _LOCK).exists():
        with (folder / _LOCK).open("a+") as file:
            _lock(file, folder)


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
