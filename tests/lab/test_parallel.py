"""Runs of a comparison in processes of their own, against one after another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from helpers import error_of
from neuralcollapse.cli import main
from neuralcollapse.lab import RunFolder
from neuralcollapse.lab.results.files import sole_writer
from neuralcollapse.lab.training.distributed import in_processes

SMALL = ["--backbone=mlp", "--width=24", "--depth=1", "--train_samples=200", "--test_samples=60", "--batch_size=20"]
SETTINGS = [*SMALL, "--epochs=2", "--methods=standard,implicit", "--seeds=2", "--label_noise=0.1", "--device=cpu"]


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    out = tmp_path_factory.mktemp("runs") / "one_by_one"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("neuralcollapse.lab.figures.summary.draw_figures", lambda *_: [])
        assert main(["compare", *SETTINGS, "--out", str(out)]) == 0
    return RunFolder(out)


def assert_same(one: RunFolder, other: RunFolder) -> None:
    assert one.metrics.read_bytes() == other.metrics.read_bytes()
    pairs = zip(one.run_folders(), other.run_folders(), strict=True)
    for found, expected in pairs:
        assert found.path.name == expected.path.name
        assert found.read_environment()["finished"] is True
        weights, others = (
            torch.load(run.last_checkpoint, weights_only=True)["state_dict"] for run in (found, expected)
        )
        assert all(torch.equal(weights[name], others[name]) for name in others)


def test_runs_at_a_time_end_as_one_by_one(one_by_one, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compare", *SETTINGS, "--parallel=2", "--out", str(out)]) == 0
    assert "ended, 4 of 4 runs" in capsys.readouterr().err
    assert_same(RunFolder(out), one_by_one)


@pytest.mark.slow
@pytest.mark.parametrize("stopped_by", [signal.SIGTERM, signal.SIGKILL])
def test_runs_at_a_time_are_stopped_together_and_end_as_one_by_one(stopped_by, one_by_one, tmp_path):
    out = RunFolder(tmp_path / "out")
    command = [sys.executable, "-m", "neuralcollapse.cli", "compare", *SETTINGS, "--parallel=2", "--out", str(out.path)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(list(out.runs.glob("*/checkpoints/last.ckpt"))) < 2:
        time.sleep(0.01)
    process.send_signal(stopped_by)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (143 if stopped_by == signal.SIGTERM else -signal.SIGKILL), errors
    assert "Traceback" not in errors
    if stopped_by == signal.SIGKILL:
        time.sleep(5)  # the runs see that they are alone, and stop
    for run in out.runs.iterdir():
        with sole_writer(run):  # no process writes there
            pass
    assert main(["compare", "--resume", "--parallel=2", "--out", str(out.path)]) == 0
    assert_same(out, one_by_one)


def test_a_run_that_fails_is_named(tmp_path, capsys):
    arguments = [*SETTINGS, "--lr=1e30", "--no-unit_weight", "--parallel=2", "--out", str(tmp_path / "out")]
    assert "-seed0: " in error_of(capsys, "compare", *arguments)


def test_parallel_that_means_nothing_is_refused(tmp_path, capsys):
    message = error_of(capsys, "compare", *SETTINGS, "--parallel=0", "--out", str(tmp_path / "out"))
    assert message.startswith("parallel must be at least 1")
    assert not (tmp_path / "out").exists()


def act(how: str) -> None:
    if how == "error":
        raise ValueError("as it must")
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    assert torch.get_num_threads() == 1


def test_a_process_that_dies_fails_its_task_alone():
    ended = dict(in_processes(act, {how: (how,) for how in ("error", "die", "work")}, 2))
    assert {name: str(failure) for name, failure in ended.items()} == {
        "error": "as it must",
        "die": "its process ended with exit code -9",
        "work": "None",
    }
