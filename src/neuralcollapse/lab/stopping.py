"""Signals that end a process: Ctrl-C, and SIGTERM, which schedulers of clusters send before they kill."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

# What a shell says of a process that these signals ended.
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
# Seconds until Ctrl-C comes again where its exception could not be raised.
_AGAIN = 0.05


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


class StopRequests:
    """Ctrl-C and SIGTERM in training, which wait until a step is done.

    Attributes:
        waits: Whether a signal waits for `answer`; a second Ctrl-C does not. Otherwise it is answered at once.
        signal: Number of the signal that waits; 0 for none.
    """

    def __init__(self) -> None:
        self.waits = False
        self.signal = 0
        self._handlers: dict[int, Any] = {}

    def on_signal(self, number: int, frame: Any) -> None:
        """Keep or answer a signal, as its handler."""
        if not self.waits or number == self.signal == signal.SIGINT:
            self.answer(number)
        self.signal = number

    def answer(self, number: int | None = None) -> None:
        """End as the handler of before would for a signal: of that number, or the one that waits, if any.

        Raises:
            KeyboardInterrupt: for Ctrl-C.
            Terminated: for SIGTERM.
        """
        number = self.signal if number is None else number
        self.signal = 0
        if number:
            handler = self._handlers.get(number)
            usual = signal.default_int_handler if number == signal.SIGINT else terminate
            (handler if callable(handler) else usual)(number, None)


@contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Have Ctrl-C and SIGTERM answered by `StopRequests` inside, in the main thread; another one gets no signals."""
    requests = StopRequests()
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    requests._handlers = {number: signal.signal(number, requests.on_signal) for number in numbers}
    try:
        yield requests
    finally:
        for number, handler in requests._handlers.items():
            signal.signal(number, handler)


class Signals:
    """Answers to signals while a command runs.

    Args:
        line: What to write to stderr at a second Ctrl-C, which then ends the process at once; None if the process goes
            on after the command.

    Attributes:
        interrupted: Whether Ctrl-C came, whatever became of the exception that it raised: a library may have turned it
            into another one.
    """

    def __init__(self, line: str | None) -> None:
        self.line = line
        self.interrupted = False

    def on_interrupt(self, *_: Any) -> NoReturn:
        """Raise KeyboardInterrupt, as a handler of SIGINT."""
        if self.interrupted and self.line is not None:
            with contextlib.suppress(OSError):
                os.write(2, f"{self.line}\n".encode())
            os._exit(INTERRUPTED)
        self.interrupted = True
        raise KeyboardInterrupt

    def exit_as_interrupted(self) -> None:
        """End the process with exit code 130 if Ctrl-C came, as the last thing that it does.

        Python itself may end it by the signal, for an interrupt that came in a call of `exec`, although it was caught.
        """
        if self.interrupted:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(INTERRUPTED)

    def ignore(self) -> None:
        """Ignore Ctrl-C from now on: the command ends already."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def answering_signals(line: str | None) -> Iterator[Signals]:
    """Have Ctrl-C raise KeyboardInterrupt and SIGTERM raise `Terminated` inside, in the main thread.

    An interrupt that comes where no exception can be raised, as in the finalizer of an object, comes again.

    Args:
        line: As for `Signals`; unless it is None, Ctrl-C is ignored afterwards.
    """
    signals = Signals(line)
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def on_unraisable(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            report(unraisable)
            return
        signals.interrupted = False
        threading.Timer(_AGAIN, os.kill, (os.getpid(), signal.SIGINT)).start()

    if line is not None:
        atexit.register(signals.exit_as_interrupted)  # first, so that it is called last
    report, before = sys.unraisablehook, signal.signal(signal.SIGINT, signals.on_interrupt)
    sys.unraisablehook = on_unraisable
    try:
        with on_sigterm(terminate):
            yield signals
    finally:
        signal.signal(signal.SIGINT, before if line is None else signal.SIG_IGN)
        sys.unraisablehook = report


def caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Return whether an exception is of a kind, or was raised in answer to one."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        if isinstance(one, kind):
            return True
        seen.add(id(one))
        waiting += [one.__cause__, one.__context__]
    return False
