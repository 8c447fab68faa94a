"""The process of a command: signals that end it, its standard streams, and its rank in a run."""

from __future__ import annotations

import atexit
import contextlib
import io
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


class LostRank(ValueError):
    """Another rank of the run is lost: the first rank may be that one, so each rank that is left prints the error."""


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


def global_rank() -> int:
    """Return the rank among all processes of a run; 0 if no launcher has set it."""
    for name in ("RANK", "SLURM_PROCID"):
        if name in os.environ:
            return int(os.environ[name])
    return int(os.environ.get("LOCAL_RANK", 0)) + int(os.environ.get("NODE_RANK", 0))


def local_rank() -> int:
    """Return the rank among the processes of this machine."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))


def launched_ranks() -> int | None:
    """Return the number of processes that torchrun has started; None without it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return None
