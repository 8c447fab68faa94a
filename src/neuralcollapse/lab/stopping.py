"""How a process is ended from outside: SIGTERM, as schedulers of clusters send it before they kill."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

# What a shell says of a process that SIGTERM ended.
TERMINATED = 128 + signal.SIGTERM


class Terminated(SystemExit):
    """SIGTERM came; left alone, it ends the process with exit code 143."""


def terminate(*_: Any) -> NoReturn:
    """End by raising `Terminated`; also as a handler of signals."""
    raise Terminated(TERMINATED)


@contextmanager
def on_sigterm(handler: Callable[..., Any]) -> Iterator[None]:
    """Have SIGTERM answered by this handler inside; in a thread other than the first, which gets none, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
