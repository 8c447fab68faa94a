"""A run that is stopped at any point resumes as if it had not been stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from neuralcollapse.cli import main
from neuralcollapse.lab import RunConfig, RunFolder, train_runs
from neuralcollapse.lab.process import Terminated
from neuralcollapse.lab.training import objective
from neuralcollapse.lab.training import run as training

SMALL = {
    "backbone": "convnet",
    "width": 6,
    "train_samples": 100,
    "test_samples": 40,
    "batch_size": 12,
    "epochs": 2,
    "augmentation": {"crop_padding": 1, "flip": True, "rotation": 10.0},
}
DOCS = Path(__file__).parents[2] / "docs" / "running.md"
BATCHES = 9  # 100 images in batches of 12
RUNS = {
    "sgd": {"method": "implicit"},
    "adamw": {"method": "standard", "optimizer": "adamw", "lr": 0.01, "schedule": "one-cycle"},
    "cycled": {"method": "standard", "schedule": "one-cycle"},
    "balanced": {
        "method": "fixed",
        "sampling": 6,
        "schedule": "step",
        "schedule_options": {"step_at": 1, "warmup_epochs": 1},
    },
    "agd": {
        "method": "fixed",
        "optimizer": "agd",
        "backbone_options": {"batch_norm_affine": False},
        "classifier_bias": "none",
    },
    "lbfgs": {"method": "fixed", "optimizer": "lbfgs", "optimizer_options": {"iterations": 3}},
    "averaged": {"method": "frame", "weight_average": 0.1, "accumulate": 2},
    "streamed": {"workers": 0, "sampling": "stratified", "means_momentum": "cumulative"},
    "dropout": {"backbone": "a_net_with_dropout.Net", "width": None},
}
NET = """
from torch import nn
class Net(nn.Sequential):
    def __init__(self, image_shape):
        super().__init__(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 16), nn.ReLU())
"""


def config(name: str, **more: object) -> RunConfig:
    return RunConfig(**SMALL | RUNS[name] | more)


@contextmanager
def at_batch(number: int, act: Callable[[], None]) -> Iterator[None]:
    """Have something happen while a batch is trained on, counted from 1 over all epochs."""
    seen, loss = [], objective.batch_loss

    def counted(*arguments: object) -> torch.Tensor:
        seen.append(1)
        if len(seen) == number:
            act()
        return loss(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "batch_loss", counted)
        yield


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    return torch.load(folder.last_checkpoint, weights_only=True)["state_dict"]


def assert_same(one: RunFolder, other: RunFolder) -> None:
    """Weights, metrics and gradients to the bit, and all that training itself saw but its seconds."""
    found, expected = weights(one), weights(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    for table in ("metrics", "gradients"):
        assert getattr(one, table).read_bytes() == getattr(other, table).read_bytes()
    logs = [pd.read_csv(folder.training_log).drop(columns="seconds") for folder in (one, other)]
    pd.testing.assert_frame_equal(*logs, check_exact=True)


@pytest.fixture(autouse=True)
def own_net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_net_with_dropout.py").write_text(NET)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_sigterm_stops_inside_an_epoch_goes_on_there(name, tmp_path):
    run, out = config(name), tmp_path / "stopped"
    whole = train_runs(run, tmp_path / "whole", progress=False)
    per_batch = 4 if name == "lbfgs" else 1  # evaluations of the loss, at least
    with at_batch((BATCHES + 3) * per_batch, sigterm), pytest.raises(Terminated) as ended:
        train_runs(run, out, progress=False)
    assert ended.value.code == 143
    kept = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["neuralcollapse"]
    assert 0 < kept["batches"] < BATCHES
    stopped = train_runs(run, out, resume=True, progress=False)
    assert_same(stopped, whole)


def test_a_run_that_is_killed_goes_on_from_the_last_minutes(tmp_path):
    run, out = config("sgd", checkpoint_minutes=1e-9), tmp_path / "killed"
    whole = train_runs(run, tmp_path / "whole", progress=False)

    def fail() -> None:
        raise OSError("pulled the plug")

    for batch in (4, 3, BATCHES + 2):  # counted from where it resumes
        with at_batch(batch, fail), pytest.raises(OSError, match="pulled the plug"):
            train_runs(run, out, resume=True, progress=False)
    kept = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["neuralcollapse"]
    assert (kept["epoch"], kept["batches"]) == (2, 6)
    assert_same(train_runs(run, out, resume=True, progress=False), whole)


def test_sigterm_while_measuring_leaves_the_epoch_before(tmp_path, monkeypatch):
    run, out = config("sgd"), tmp_path / "stopped"
    whole = train_runs(run, tmp_path / "whole", progress=False)
    measured = []

    def measure(*arguments: object, **options: object) -> object:
        measured.append(1)
        if len(measured) == 2:
            sigterm()
        return splits(*arguments, **options)

    splits = training.measure_splits
    monkeypatch.setattr(training, "measure_splits", measure)
    with pytest.raises(Terminated):
        train_runs(run, out, progress=False)
    kept = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["neuralcollapse"]
    assert kept["epoch"] == 1
    assert "batches" not in kept
    assert_same(train_runs(run, out, resume=True, progress=False), whole)


def test_the_command_says_how_to_go_on_and_exits_with_143(tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)
    arguments = ["--backbone=mlp", "--width=12", "--epochs=1", "--train_samples=60", "--batch_size=10"]
    with at_batch(2, sigterm):
        assert main(["train", *arguments, "--out", str(tmp_path / "out")]) == 143
    assert capsys.readouterr().err.strip().split("\n")[-1] == ("neuralcollapse: terminated; resume it with --resume")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_the_slurm_script_of_the_docs_requeues_a_job_whose_time_is_over_and_resumes_it(tmp_path):
    """Run the script with a fake srun, in which SIGTERM comes during the twelfth batch, and a fake scontrol."""
    documented = re.search(r"```\n(#!/bin/bash\n.*?)```", DOCS.read_text(), re.DOTALL)[1]
    assert "--signal=TERM@120" in documented
    assert "--requeue" in documented
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(SMALL | RUNS["sgd"] | {"device": "cpu"}))
    job = tmp_path / "job"
    job.write_text(documented.replace("--recipe papyan2020-cifar10", "--config settings.yaml"))
    commands = {
        "srun": 'exec "$@"',
        "scontrol": f'echo "$@" >> {tmp_path}/asked',
        "neuralcollapse": f'exec {sys.executable} {tmp_path}/command.py "$@"',
    }
    for name, line in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "command.py").write_text(
        "import os, signal, sys\n"
        "from neuralcollapse.cli import main\n"
        "from neuralcollapse.lab.figures import summary\n"
        "from neuralcollapse.lab.training import objective\n"
        "loss, seen = objective.batch_loss, []\n"
        "def batch_loss(*arguments):\n"
        "    seen.append(1)\n"
        f"    if len(seen) == {BATCHES + 3} and '--resume' not in sys.argv:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return loss(*arguments)\n"
        "objective.batch_loss = batch_loss\n"
        "summary.draw_figures, summary.write_report = (lambda *_: []), (lambda *_: None)\n"
        "sys.exit(main())\n"
    )
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "1234"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for ended in (False, True):
        done = subprocess.run(["bash", str(job)], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (tmp_path / "asked").read_text() == "requeue 1234\n", done.stderr
        assert RunFolder(tmp_path / "runs" / "long").read_environment()["finished"] is ended
    whole = train_runs(config("sgd"), tmp_path / "whole", progress=False)
    assert_same(RunFolder(tmp_path / "runs" / "long"), whole)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_waits_for_the_step_and_a_second_one_does_not(times, tmp_path):
    run, out = config("sgd"), tmp_path / "stopped"
    whole = train_runs(run, tmp_path / "whole", progress=False)

    def interrupt() -> None:
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background process of a shell
    try:
        with at_batch(BATCHES + 3, interrupt), pytest.raises(KeyboardInterrupt):
            train_runs(run, out, progress=False)
    finally:
        signal.signal(signal.SIGINT, before)
    kept = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["neuralcollapse"]
    assert (kept["epoch"], kept.get("batches")) == ((2, 3) if times == 1 else (1, None))
    assert_same(train_runs(run, out, resume=True, progress=False), whole)


def test_a_checkpoint_says_whose_it_is(tmp_path):
    run = config("sgd", epochs=1)
    folder = train_runs(run, tmp_path / "out", progress=False)
    kept = torch.load(folder.last_checkpoint, weights_only=True)["neuralcollapse"]
    assert (kept["format_version"], kept["epoch"], kept["seed"]) == (2, 1, 0)
    assert kept["config"] == run.in_force()


def test_a_checkpoint_inside_an_epoch_is_not_measured(tmp_path, capsys):
    out = tmp_path / "out"
    with at_batch(2, sigterm), pytest.raises(Terminated):
        train_runs(config("sgd"), out, progress=False)
    assert main(["measure", str(out)]) == 1
    assert "the run was stopped within epoch 1" in capsys.readouterr().err
