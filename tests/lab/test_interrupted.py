"""Commands that are stopped at every change of a file: given again, they end as if they had not been stopped."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import pandas as pd
import pytest
import torch
from torch import nn

from helpers import slow_except
from neuralcollapse.cli import main
from neuralcollapse.lab import RunFolder
from neuralcollapse.lab.commands import plot
from neuralcollapse.lab.data.sources import digits
from neuralcollapse.lab.evaluate import state_dict
from neuralcollapse.lab.figures import panels, report, summary
from neuralcollapse.lab.results.files import write_whole
from neuralcollapse.lab.training import runs

IMPORTED = digits(), runs, state_dict, report, plot, panels  # before any process is forked
SMALL = "--backbone mlp --width 12 --depth 1 --train_samples 80 --test_samples 30 --batch_size 40 --schedule constant"
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
STOPS = ("kill", "interrupt", "full disk")


@dataclass
class Case:
    """A command that may be stopped.

    Attributes:
        command: What is given until it ends.
        before: Commands that make the folder which it finds.
        resumed: What is given in its place once there is a run's folder, where that is another command.
        out: The folder whose changes count.
    """

    command: str
    before: Sequence[str] = ()
    resumed: str | None = None
    out: str = "run"
    files: Sequence[str] = field(default=("metrics.csv",))


CASES = {
    "train": Case("train {small} --epochs 2 --out run", resumed="train --resume --out run", files=("gradients.csv",)),
    "compare": Case(
        "compare {small} --methods standard,fixed --seeds 1 --epochs 2 --out run", resumed="compare --resume --out run"
    ),
    "overwriting": Case(
        "train {small} --epochs 2 --seed 3 --out run --overwrite", before=["train {small} --epochs 3 --out run"]
    ),
    "extending a run": Case("train --resume --epochs 3 --out run", before=["train {small} --epochs 2 --out run"]),
    "extending a comparison": Case(
        "compare --resume --epochs 2 --out run",
        before=["compare {small} --methods standard,fixed --seeds 1 --epochs 1 --out run"],
    ),
    "measuring": Case("measure run", before=["train {small} --epochs 3 --measure_at 3 --keep_at 1 --out run"]),
    "distances": Case("distance run", before=["train {small} --epochs 2 --out run"]),
    "another reference": Case(
        "distance run --reference 2", before=["train {small} --epochs 2 --out run", "distance run"]
    ),
    "statistics": Case(
        "aggregate run --reach accuracy=0.2 --out out/all.csv",
        before=["compare {small} --methods standard --seeds 2 --epochs 2 --out run"],
        out="out",
        files=("all.csv", "all-reach.csv"),
    ),
    "figures": Case(
        "plot run --figure margins --format png,svg --out out",
        before=["train {small} --epochs 1 --out run"],
        out="out",
        files=("margins.png", "margins-margins-train.png", "margins-margins-test.png"),
    ),
    "an external series": Case(
        "measure --checkpoint a.pt --checkpoint b.pt --model made_for_tests.Net --train_samples 60 --test_samples 30 "
        "--out run"
    ),
}


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))


def fingerprints(metrics: pd.DataFrame, folder: Path, *_: object) -> list[Path]:
    """In place of figures, which take longer than the training: what they would be drawn from."""
    for name in ("accuracy.png", "nc1.png"):
        write_figure(metrics, folder / name)
    return [folder / "accuracy.png", folder / "nc1.png"]


def write_figure(metrics: pd.DataFrame, path: Path) -> None:
    digest = hashlib.sha256(metrics.to_csv().encode()).hexdigest()
    write_whole(path, lambda partial: partial.write_text(digest))


class Stopped:
    """A command in a forked process, stopped before one of its changes of a file.

    Attributes:
        code: Its exit code, negative for a signal.
        changes: How many changes there were.
    """

    def __init__(self, command: str, folder: Path, out: str, at: int | None = None, stop: str = "kill") -> None:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            self._run(command, folder, out, at, stop, write)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            self.changes = len(pipe.read())
        self.code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self.log = (folder / "log").read_text()

    def _run(self, command: str, folder: Path, out: str, at: int | None, stop: str, write: int) -> NoReturn:
        code, seen, place = 1, [0], str(folder / out)

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            changed = os.path.abspath(str(arguments[event == "os.rename"])) if event in CHANGES else ""
            if not changed.startswith(place):
                return
            os.write(write, b".")
            seen[0] += 1
            if seen[0] != at:
                return
            if stop == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if stop == "interrupt":
                raise KeyboardInterrupt
            raise OSError(errno.ENOSPC, "No space left on device")

        try:
            os.chdir(folder)
            with Path("log").open("w", buffering=1) as sys.stderr, Path("log").open("a") as sys.stdout:
                summary.draw_figures = fingerprints
                summary.write_report = lambda runs, path: write_figure(pd.concat(map(whole_table, runs)), path)
                sys.addaudithook(watch)
                try:
                    code = main(command.format(small=SMALL).split())
                except BaseException:
                    traceback.print_exc()
        finally:
            os._exit(code)


def whole_table(run: RunFolder) -> pd.DataFrame:
    return pd.read_csv(run.metrics)


def prepared(case: Case, folder: Path) -> Path:
    folder.mkdir()
    (folder / "made_for_tests.py").write_text(f"from {__name__} import Net\n")
    for number, name in enumerate("ab"):
        with torch.random.fork_rng():
            torch.manual_seed(number)
            torch.save(Net().state_dict(), folder / f"{name}.pt")
    for command in case.before:
        stopped = Stopped(command, folder, case.out)
        assert stopped.code == 0, stopped.log
    return folder


def to_its_end(case: Case, folder: Path) -> Stopped:
    goes_on = case.resumed is not None and (folder / case.out / "config.yaml").exists()
    stopped = Stopped(case.resumed if case.resumed and goes_on else case.command, folder, case.out)
    assert "Traceback" not in stopped.log
    assert stopped.code == 0 or "is finished" in stopped.log, stopped.log
    return stopped


def state(case: Case, folder: Path) -> dict[str, object]:
    """All that the folder is to hold in the end, without times."""
    out = folder / case.out
    names = [path for path in sorted(out.rglob("*")) if path.is_file()]
    found: dict[str, object] = {}
    for path in names:
        name = str(path.relative_to(out))
        assert not name.endswith((".partial", ".unfinished")), name
        if path.suffix == ".svg" or path.name in (".lock", "summary.md"):
            found[name] = "there"
        elif path.name == "training.csv":
            found[name] = pd.read_csv(path).drop(columns="seconds").to_csv()
        elif path.suffix == ".ckpt":
            kept = torch.load(path, weights_only=True)
            found[name] = (
                {key: tensor.tolist() for key, tensor in kept["state_dict"].items()},
                kept["neuralcollapse"]["epoch"],
            )
        elif path.name == "environment.yaml":
            made = RunFolder(path.parent).read_environment()
            found[name] = {key: made.get(key) for key in ("finished", "reported", "data", "runs", "checkpoints")}
        elif path.suffix != ".safetensors":
            found[name] = path.read_bytes()
        else:
            found[name] = "there"
    return found


def check(case: Case, base: Path, folder: Path, expected: dict[str, object], at: int, stop: str) -> None:
    shutil.copytree(base, folder, symlinks=True)
    stopped = Stopped(case.command, folder, case.out, at, stop)
    if stop == "kill":
        assert stopped.code == -signal.SIGKILL, stopped.log
    else:
        assert "Traceback" not in stopped.log
    to_its_end(case, folder)
    assert state(case, folder) == expected, (at, stop)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, object], int]]:
    """Of a case: the folder that it begins with, what it is to end with, and how many changes it makes."""
    found: dict[str, tuple[Path, dict[str, object], int]] = {}

    def of(name: str) -> tuple[Path, dict[str, object], int]:
        if name not in found:
            case, place = CASES[name], tmp_path_factory.mktemp("uninterrupted")
            base = prepared(case, place / "base")
            whole = place / "whole"
            shutil.copytree(base, whole)
            ended = Stopped(case.command, whole, case.out)
            assert ended.code == 0, ended.log
            found[name] = base, state(case, whole), ended.changes
        return found[name]

    return of


SLOW_CASES = ("figures", "overwriting", "extending a comparison")


@pytest.mark.parametrize("name", slow_except(CASES, set(CASES) - set(SLOW_CASES)))
def test_a_command_that_is_stopped_is_given_again_to_the_same_end(name, uninterrupted, tmp_path):
    base, expected, changes = uninterrupted(name)
    assert all(f in expected for f in CASES[name].files)
    draw = random.Random(f"{name}")
    for stop in STOPS[:1] if name in ("train", "compare") else draw.sample(STOPS, 2):
        check(CASES[name], base, tmp_path / "stopped", expected, draw.randint(1, changes), stop)


@pytest.mark.slow
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("name", CASES)
def test_a_command_that_is_stopped_at_any_change_is_given_again_to_the_same_end(name, stop, uninterrupted, tmp_path):
    base, expected, changes = uninterrupted(name)
    for at in range(1, changes + 1):
        check(CASES[name], base, tmp_path / "stopped", expected, at, stop)
