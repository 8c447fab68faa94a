"""Real processes, killed, terminated, or on a disk that fills, at random moments: what they resume to is the same."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from neuralcollapse.cli import main
from neuralcollapse.lab import RunFolder
from neuralcollapse.lab.data.sources import digits
from neuralcollapse.lab.figures import summary
from neuralcollapse.lab.training import runs

SETTINGS = [
    "--epochs=4",
    "--width=8",
    "--train_samples=400",
    "--test_samples=100",
    "--batch_size=16",
    "--augmentation={crop_padding: 1, flip: true, rotation: 10}",
    "--checkpoint_minutes=0.002",
    "--keep_at=2",
]
RUNS = {
    "implicit-sgd": ["--method=implicit"],
    "standard-adamw": ["--method=standard", "--optimizer=adamw", "--lr=0.01"],
    "fixed-agd": [
        "--method=fixed",
        "--optimizer=agd",
        "--backbone_options={batch_norm_affine: false}",
        "--classifier_bias=none",
    ],
}
NAMES = list(RUNS)
IMPORTED = digits(), runs  # before any process is forked
MOMENTS = range(10)


class Process:
    """The command in a process of its own, forked: what it would import is there already.

    Its figures are left out, which take longer than the training. No file that it writes can be longer than the limit.
    """

    def __init__(self, name: str, out: Path, limit: int | None = None) -> None:
        there = (out / "config.yaml").exists()
        arguments = ["--resume"] if there else [*SETTINGS, *RUNS[name]]
        self.log = out.parent.with_name(f"{out.parent.name}-{out.name}.log")
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._run(["train", *arguments, "--out", str(out)], limit)

    def _run(self, arguments: list[str], limit: int | None) -> NoReturn:
        code = 1
        try:
            with self.log.open("w", buffering=1) as sys.stderr, self.log.open("a") as sys.stdout:
                if limit is not None:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                try:
                    summary.draw_figures = lambda *_: []
                    code = main(arguments)
                except BaseException:
                    traceback.print_exc()
        finally:
            os._exit(code)

    def is_running(self) -> bool:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode is None

    def message(self) -> str:
        """What it said, once it has ended."""
        while self.is_running():
            time.sleep(0.005)
        return self.log.read_text()


def to_its_end(name: str, out: Path) -> RunFolder:
    process = Process(name, out)
    message = process.message()
    assert process.returncode == 0 or "is finished" in message, message
    return RunFolder(out)


Unbroken = dict[str, tuple[RunFolder, float]]


def to_the_end_at_once(name: str, out: Path) -> tuple[RunFolder, float]:
    """Its folder, and the seconds from its first file to its end."""
    process = Process(name, out)
    while not (out / "config.yaml").exists() and process.is_running():
        time.sleep(0.005)
    began = time.monotonic()
    message = process.message()
    assert process.returncode == 0, message
    return RunFolder(out), time.monotonic() - began


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    return {name: to_the_end_at_once(name, tmp_path_factory.mktemp("unbroken") / name) for name in NAMES}


@pytest.fixture(scope="module")
def one_unbroken(tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    return {NAMES[0]: to_the_end_at_once(NAMES[0], tmp_path_factory.mktemp("unbroken") / "one")}


def at_moment(process: Process, out: Path, seconds: float, number: signal.Signals) -> str:
    """Send a signal so long after the run's folder is begun."""
    while not (out / "config.yaml").exists() and process.is_running():
        time.sleep(0.005)
    time.sleep(seconds)
    if process.is_running():
        os.kill(process.pid, number)
    return process.message()


def assert_same(run: RunFolder, expected: RunFolder) -> None:
    weights, others = (torch.load(one.last_checkpoint, weights_only=True)["state_dict"] for one in (run, expected))
    assert all(torch.equal(weights[name], others[name]) for name in others)
    for table in ("metrics", "gradients"):
        assert getattr(run, table).read_bytes() == getattr(expected, table).read_bytes()


def stop_and_go_on(number: signal.Signals, moment: int, unbroken: Unbroken, out: Path) -> None:
    name = NAMES[moment % len(NAMES)]
    expected, seconds = unbroken[name]
    share = (moment + random.Random(int(number) * 100 + moment).random()) / len(MOMENTS)
    process = Process(name, out)
    message = at_moment(process, out, share * seconds, number)
    assert "Traceback" not in message
    assert process.returncode in ((-9, 0) if number == signal.SIGKILL else (143, 0))
    if process.returncode == 143:
        assert message.strip().split("\n")[-1].startswith("neuralcollapse: terminated; resume it with --resume")
    assert_same(to_its_end(name, out), expected)


def fill_and_go_on(moment: int, unbroken: Unbroken, out: Path) -> None:
    name = NAMES[moment % len(NAMES)]
    expected, seconds = unbroken[name]
    draw = random.Random(moment)
    process = Process(name, out)
    at_moment(process, out, draw.random() * seconds / 2, signal.SIGKILL)
    left = set(out.rglob("*.partial"))  # by the kill; the next write of that file takes its place
    process = Process(name, out, limit=round(10 ** draw.uniform(2, 4.5)))
    message = process.message()
    assert process.returncode in (0, 2)
    assert "Traceback" not in message
    if process.returncode == 2 and "is finished" not in message:
        assert "File too large" in message.strip().split("\n")[-1]
    assert set(out.rglob("*.partial")) <= left
    assert_same(to_its_end(name, out), expected)
    assert not list(out.rglob("*.partial"))


def test_a_run_that_is_killed_goes_on_to_the_same_end(one_unbroken, tmp_path):
    stop_and_go_on(signal.SIGKILL, 3, one_unbroken, tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_stopped_at_a_random_moment_goes_on_to_the_same_end(number, moment, unbroken, tmp_path):
    stop_and_go_on(number, moment, unbroken, tmp_path / "stopped")


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_whose_disk_fills_at_a_random_moment_goes_on_to_the_same_end(moment, unbroken, tmp_path):
    fill_and_go_on(moment, unbroken, tmp_path / "full")


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a small file system")
@pytest.mark.parametrize("kibibytes", [40, 60, 90])
def test_a_small_file_system_that_fills_leaves_the_last_state(kibibytes, unbroken, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        process = Process(NAMES[0], disk / "run")
        message = process.message()
        assert process.returncode == 2
        assert "No space left on device" in message.strip().split("\n")[-1]
        assert "Traceback" not in message
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert_same(to_its_end(NAMES[0], disk / "run"), unbroken[NAMES[0]][0])
    finally:
        subprocess.run(["umount", str(disk)], check=True)
