"""Ctrl-C at any moment is one line and exit code 130, and what is resumed ends as if nothing had come between."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import NoReturn

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from neuralcollapse import _files
from neuralcollapse.cli import main
from neuralcollapse.lab import RunFolder
from neuralcollapse.lab.data.sources import digits
from neuralcollapse.lab.figures import summary
from neuralcollapse.lab.training import checkpoint, runs

SETTINGS = [
    "--method=implicit",
    "--backbone=mlp",
    "--width=16",
    "--depth=1",
    "--epochs=4",
    "--train_samples=160",
    "--test_samples=60",
    "--batch_size=16",
    "--checkpoint_minutes=0.0001",
    "--keep_at=2",
]
LINE = "neuralcollapse: interrupted; resume it with --resume"
IMPORTED = digits(), runs  # before any process is forked


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def at_event(name: str, ending: str, number: int) -> Callable[[], None]:
    """Interrupt at an audit event about a file whose name ends as a pattern does, the given time that it comes."""

    def prepare() -> None:
        seen = []

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            if event == name and len(seen) < number and any(fnmatch(str(one), f"*{ending}") for one in arguments):
                seen.append(event)
                if len(seen) == number:
                    interrupt()

        sys.addaudithook(hook)

    return prepare


def inside_checkpoint(number: int, *, times: int = 1) -> Callable[[], None]:
    """Interrupt in the middle of what torch writes into a checkpoint's file."""

    def prepare() -> None:
        saved, seen = torch.save, []

        class File:
            def __init__(self, file):
                self.file = file

            def write(self, data):
                written = self.file.write(data)
                seen.append(1)
                if len(seen) == number:
                    for _ in range(times):
                        interrupt()
                return written

            def __getattr__(self, name):
                return getattr(self.file, name)

        checkpoint.torch.save = lambda content, file: saved(content, File(file))

    return prepare


def while_drawing() -> None:
    summary.draw_figures = lambda *_: interrupt()


def while_syncing() -> None:
    sync, seen = os.fsync, []

    def fsync(number: int) -> None:
        seen.append(1)
        if len(seen) == 30:
            interrupt()
        sync(number)

    _files.os.fsync = fsync


def while_nobody_can_raise() -> None:
    """In the finalizer of an object, whose exceptions Python reports and drops."""

    class Object:
        def __del__(self) -> None:
            interrupt()

    gather = summary.gather
    summary.gather = lambda *arguments: (Object(), time.sleep(0.5), gather(*arguments))[-1]


MOMENTS: dict[str, Callable[[], None] | float] = {
    **{f"at {number + 1} of 10 parts": (number + random.Random(number).random()) / 10 for number in range(10)},
    "opening the first checkpoint": at_event("open", ".last.ckpt.*.partial", 1),
    "opening the ninth checkpoint": at_event("open", ".last.ckpt.*.partial", 9),
    "before the second checkpoint is in its place": at_event("os.rename", "last.ckpt", 2),
    "before a kept checkpoint is in its place": at_event("os.rename", "epoch0002.ckpt", 1),
    "inside the first checkpoint": inside_checkpoint(3),
    "inside another checkpoint": inside_checkpoint(200),
    "before a table is in its place": at_event("os.rename", "metrics.csv", 2),
    "while a file is synced": while_syncing,
    "while figures are drawn": while_drawing,
    "in a finalizer": while_nobody_can_raise,
}
QUICK = ("inside another checkpoint", "before the second checkpoint is in its place", "in a finalizer")


def run(out: Path, prepare: Callable[[], None] | float | None = None) -> tuple[int, str, float]:
    """Train in a process of its own, forked; its exit code, what it said on stderr, and the seconds that it took."""
    there, log = (out / "config.yaml").exists(), out.with_name(f"{out.name}.log")
    arguments = ["train", *(["--resume"] if there else SETTINGS), "--out", str(out)]
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(arguments, log, prepare)
    if isinstance(prepare, float):
        time.sleep(prepare)
        os.kill(pid, signal.SIGINT)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), log.read_text(), time.monotonic() - began


def _child(arguments: list[str], log: Path, prepare: Callable[[], None] | float | None) -> NoReturn:
    code = 1
    try:
        with log.open("w", buffering=1) as sys.stderr, log.open("a") as sys.stdout:
            try:
                summary.draw_figures, summary.write_report = (lambda *_: []), (lambda *_: None)
                if callable(prepare):
                    prepare()
                code = main(arguments)
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, float]:
    out = tmp_path_factory.mktemp("unbroken") / "run"
    code, told, seconds = run(out)
    assert code == 0, told
    return RunFolder(out), seconds


def assert_same(found: RunFolder, expected: RunFolder) -> None:
    for table in ("metrics", "gradients"):
        assert getattr(found, table).read_bytes() == getattr(expected, table).read_bytes()
    logs = [pd.read_csv(folder.training_log).drop(columns="seconds") for folder in (found, expected)]
    pd.testing.assert_frame_equal(*logs, check_exact=True)
    for folder, read in ((expected.checkpoints, load_weights), (expected.moments, load_file)):
        for path in folder.iterdir():
            one, other = read(path), read(found.path / path.relative_to(expected.path))
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one), path.name
    assert not list(found.path.rglob("*.partial"))


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def interrupt_and_resume(name: str, unbroken: tuple[RunFolder, float], out: Path) -> None:
    expected, seconds = unbroken
    moment = MOMENTS[name]
    if isinstance(moment, float):
        moment *= 0.9 * seconds
    code, told, _ = run(out, moment)
    while code == 0 and isinstance(moment, float) and moment > 0.3 * seconds:
        shutil.rmtree(out)  # it had ended before the interrupt, on a machine that was busier when `seconds` was taken
        moment *= 0.9
        code, told, _ = run(out, moment)
    assert code == 130, told
    lines = [line for line in told.strip().split("\n") if line and "epoch" not in line]
    assert lines == [LINE], told
    code, told, _ = run(out)
    assert code == 0 or "is finished" in told, told
    assert_same(RunFolder(out), expected)


@pytest.mark.parametrize("name", QUICK)
def test_ctrl_c_is_one_line_and_resumed_to_the_same_end(name, unbroken, tmp_path):
    interrupt_and_resume(name, unbroken, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MOMENTS if name not in QUICK])
def test_ctrl_c_at_other_moments_is_one_line_and_resumed_to_the_same_end(name, unbroken, tmp_path):
    interrupt_and_resume(name, unbroken, tmp_path / "run")


def test_there_are_twenty_moments():
    assert len(MOMENTS) == 20


KILL = "os.kill(os.getpid(), signal.SIGINT)"
STARTED_SO = {
    # An interrupt in a call of `exec`, after which Python itself would end the process by the signal.
    "exec": [f"exec('import os, signal; {KILL}')"],
    "turned into another error": [f"try: {KILL}", "except KeyboardInterrupt: raise RuntimeError('other')"],
    "swallowed": [f"try: {KILL}", "except KeyboardInterrupt: pass"],
    "twice": [f"try: {KILL}", f"finally: {KILL}; time.sleep(9)"],
}


@pytest.mark.parametrize("name", STARTED_SO)
def test_an_interrupt_is_one_line_whatever_becomes_of_its_exception(name, tmp_path):
    module = tmp_path / "interrupted.py"
    lines = ["import os, signal, sys, time", "from neuralcollapse import cli", "def run(_):"]
    lines += [f"    {line}" for line in [*STARTED_SO[name], "return 0"]]
    lines += ["cli._run = run", "sys.argv = ['neuralcollapse', 'train']", "sys.exit(cli.main())"]
    module.write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, "-m", "interrupted"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, f"{LINE}\n")


def test_an_interrupt_while_packages_are_imported_is_one_line(tmp_path):
    (tmp_path / "jsonargparse.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-m", "neuralcollapse.cli", "recipes"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "neuralcollapse: interrupted\n")


def test_the_answers_to_signals_are_those_of_before_afterwards(capsys):
    def state():
        handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        return *handlers, sys.unraisablehook, sys.stdout, sys.stderr

    before = state()
    assert main(["recipes", "papyan2020-cifar10"]) == 0
    assert main(["train", "--epochs", "few"]) == 2
    assert state() == before
