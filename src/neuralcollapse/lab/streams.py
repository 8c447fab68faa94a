"""Standard streams that outlast their readers: a pipe that is closed ends no training."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Lasting:
    """A stream that drops what cannot be written.

    Args:
        stream: The stream.
        lost: Kinds of errors by which it is known to be lost.
    """

    def __init__(self, stream: Any, lost: type[OSError]) -> None:
        self._stream = stream
        self._lost = lost

    def write(self, text: str) -> int:
        """Write, or drop the text."""
        with contextlib.suppress(self._lost):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or do nothing."""
        with contextlib.suppress(self._lost):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_streams(*, alone: bool) -> Iterator[None]:
    """Keep what is inside from failing when stdout or stderr is closed.

    Of stdout, other errors are raised, such as those of a full disk.

    Args:
        alone: Whether the process ends afterwards. Then a stream that is closed is opened on the null device, so that
            no file takes its number; stdout is written line by line, also into a file, in any encoding; and what could
            not be written is dropped in the end.
    """
    if alone:
        _open_closed()
    stdout, stderr = sys.stdout, sys.stderr
    if alone and isinstance(stdout, io.TextIOWrapper):
        stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    sys.stdout, sys.stderr = _Lasting(stdout, BrokenPipeError), _Lasting(stderr, OSError)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = stdout, stderr
        if alone:
            _drop_unwritten(stdout)


def _open_closed() -> None:
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115


def _drop_unwritten(stream: Any) -> None:
    try:
        stream.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())  # the interpreter flushes once more
