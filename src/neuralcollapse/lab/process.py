"""Process of a command: signals that end it, standard streams, and ranks."""

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

# Exit codes that shells report for processes ended by these signals.
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
# Seconds after which Ctrl-C is raised again if its exception could not be raised.
_AGAIN = 0.05


class Terminated(SystemExit):
    """SIGTERM was received; if not caught, this exception ends the process with exit code 143."""


class LostRank(ValueError):
    """Another rank of the run is lost, possibly the first rank; therefore each remaining rank prints the error."""


def terminate(*_: Any) -> NoReturn:
    """Raise `Terminated`; can be used as a signal handler."""
    raise Terminated(TERMINATED)


@contextmanager
def on_sigterm(handler: Callable[..., Any]) -> Iterator[None]:
    """Use a handler for SIGTERM inside the context; do nothing outside the main thread, which receives all signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopRequests:
    """Requests to stop training by Ctrl-C or SIGTERM, which are deferred to the end of a step.

    Attributes:
        waits: Whether a signal is deferred until `answer` is called; otherwise it is handled immediately, and so is a
            second Ctrl-C.
        signal: Number of the deferred signal; 0 for none.
    """

    def __init__(self) -> None:
        self.waits = False
        self.signal = 0
        self._handlers: dict[int, Any] = {}

    def on_signal(self, number: int, frame: Any) -> None:
        """Defer or handle a signal; the signal handler."""
        if not self.waits or number == self.signal == signal.SIGINT:
            self.answer(number)
        self.signal = number

    def answer(self, number: int | None = None) -> None:
        """Call the previous handler for the signal with this number, or for the deferred signal, if any.

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
    """Handle Ctrl-C and SIGTERM by `StopRequests` inside the context, if this is the main thread."""
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
    """Handlers of signals while a command runs.

    Args:
        line: Text to write to stderr at a second Ctrl-C, which then ends the process immediately; None if the process
            continues after the command.

    Attributes:
        interrupted: Whether Ctrl-C was received, regardless of the exception that it raised, because a library may
            have converted it to another one.
    """

    def __init__(self, line: str | None) -> None:
        self.line = line
        self.interrupted = False

    def on_interrupt(self, *_: Any) -> NoReturn:
        """Raise KeyboardInterrupt; the handler of SIGINT."""
        if self.interrupted and self.line is not None:
            with contextlib.suppress(OSError):
                os.write(2, f"{self.line}\n".encode())
            os._exit(INTERRUPTED)
        self.interrupted = True
        raise KeyboardInterrupt

    def exit_as_interrupted(self) -> None:
        """End the process with exit code 130 if Ctrl-C was received, as its last action.

        Python may otherwise end the process by the signal for an interrupt during a call of `exec`, even if the
        interrupt was caught.
        """
        if self.interrupted:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(INTERRUPTED)

    def ignore(self) -> None:
        """Ignore Ctrl-C from now on, because the command is already ending."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def answering_signals(line: str | None) -> Iterator[Signals]:
    """Let Ctrl-C raise KeyboardInterrupt and SIGTERM raise `Terminated` inside the context, in the main thread.

    An interrupt that is received while exceptions cannot be raised, as in the finalizer of an object, is repeated.

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
        atexit.register(signals.exit_as_interrupted)  # registered first, so that it is called last
    report, before = sys.unraisablehook, signal.signal(signal.SIGINT, signals.on_interrupt)
    sys.unraisablehook = on_unraisable
    try:
        with on_sigterm(terminate):
            yield signals
    finally:
        signal.signal(signal.SIGINT, before if line is None else signal.SIG_IGN)
        sys.unraisablehook = report


def caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Return whether an exception has a type, or was raised while one of this type was handled."""
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
    """Stream that drops text which cannot be written.

    Args:
        stream: The stream.
        lost: Types of errors that indicate that the stream is lost.
    """

    def __init__(self, stream: Any, lost: type[OSError]) -> None:
        self._stream = stream
        self._lost = lost

    def write(self, text: str) -> int:
        """Write the text, or drop it if the stream is lost."""
        with contextlib.suppress(self._lost):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream, or do nothing if it is lost."""
        with contextlib.suppress(self._lost):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_streams(*, alone: bool) -> Iterator[None]:
    """Prevent failures inside the context if stdout or stderr is closed.

    Other errors of stdout, such as those of a full disk, are raised.

    Args:
        alone: Whether the process ends afterwards. In this case, closed streams are opened on the null device, so that
            files do not reuse their numbers; stdout is written line by line, even to files, in any encoding; and text
            that could not be written is dropped at the end.
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
            os.open(os.devnull, os.O_RDWR)  # uses the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115


def _drop_unwritten(stream: Any) -> None:
    try:
        stream.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())  # the interpreter flushes once more at exit


def global_rank() -> int:
    """Return the rank among all processes of a run; 0 without a launcher."""
    for name in ("RANK", "SLURM_PROCID"):
        if name in os.environ:
            return int(os.environ[name])
    return int(os.environ.get("LOCAL_RANK", 0)) + int(os.environ.get("NODE_RANK", 0))


def local_rank() -> int:
    """Return the rank among the processes of this machine."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))


def launched_ranks() -> int | None:
    """Return the number of processes started by torchrun; None without torchrun."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return None
