"""A run that diverges stops with one line, and takes no other run with it."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers import error_of
from neuralcollapse.cli import main
from neuralcollapse.lab import RunConfig, RunFolder, train_runs
from neuralcollapse.lab.training import objective
from neuralcollapse.lab.training.objective import Diverged, FirstNonFinite

SMALL = ["--backbone=mlp", "--width=12", "--depth=1", "--train_samples=60", "--test_samples=40", "--batch_size=20"]
RUN = {"backbone": "mlp", "width": 12, "depth": 1, "train_samples": 60, "test_samples": 40, "batch_size": 20}
COMPARE = ["compare", *SMALL, "--methods=standard,fixed", "--seeds=2", "--epochs=2"]
EVENTS = st.tuples(st.integers(1, 9), st.integers(0, 5), st.sampled_from([math.nan, math.inf, -math.inf]))


@given(st.lists(EVENTS, max_size=4, unique_by=lambda event: event[:2]))
@settings(max_examples=60, deadline=None)
def test_the_first_value_that_is_not_finite_is_found(events):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))  # four parameters
    names = ["the square of a feature", "the loss", *(f"the parameter {name}" for name, _ in model.named_parameters())]
    first = FirstNonFinite(model)
    for step in range(1, 10):
        values = {kind: value for at, kind, value in events if at == step}
        features = torch.ones(5, 3)
        features[2, 1] = values.get(0, 1.0)
        first.see_loss(step, torch.tensor(values.get(1, 0.5)), features)
        with torch.no_grad():
            for kind, parameter in enumerate(model.parameters(), 2):
                parameter.view(-1)[-1] = values.get(kind, 1e30)
        first.see_parameters(step)
    expected = min(((at, kind) for at, kind, _ in events), default=None)
    assert first.find() == (None if expected is None else (expected[0], names[expected[1]]))
    first.begin_epoch()
    assert first.find() is None


def test_features_whose_squares_overflow_have_diverged():
    first = FirstNonFinite(nn.Linear(2, 2))
    first.see_loss(3, torch.tensor(1.0), torch.tensor([[1e20, -1e20]]))
    assert first.find() == (3, "the square of a feature")


def test_of_scaled_losses_only_those_that_stay_infinite_count():
    first = FirstNonFinite(nn.Linear(2, 2))
    for step, loss in enumerate((math.inf, math.nan, 1.0), 1):
        first.see_loss(step, torch.tensor(loss), torch.ones(1, 2))
        first.see_parameters(step)
    assert first.find(scaled=True) is None
    assert first.find() == (1, "the loss")
    first.begin_epoch()
    first.see_loss(1, torch.tensor(math.inf), torch.ones(1, 2))
    assert first.find(scaled=True) == (1, "the loss")


def spoil_batch(monkeypatch, spoil, *, epoch=2, step=3, only=lambda config: True):
    """Have the loss of one batch spoiled; batches of 20 of 60 images are three per epoch."""
    loss_of, seen = objective.batch_loss, {}

    def batch_loss(config, *arguments):
        loss, key = loss_of(config, *arguments), (config.method, config.seed)
        seen[key] = seen.get(key, 0) + 1
        return spoil(loss) if only(config) and seen[key] == 3 * (epoch - 1) + step else loss

    monkeypatch.setattr(objective, "batch_loss", batch_loss)
    return seen


def infinite_gradient(loss):
    return loss + (0 * loss).sqrt()  # finite, but its derivative is not


SPOILT = {
    "nan": (lambda loss: loss * math.nan, "the loss"),
    "inf": (lambda loss: loss + math.inf, "the loss"),
    "gradient": (infinite_gradient, "the parameter model.0.layers"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_the_line_names_epoch_step_and_value_and_no_row_is_written(name, tmp_path, monkeypatch, capsys):
    spoil, value = SPOILT[name]
    out, reason = tmp_path / "out", f"lr must be smaller: training diverged in epoch 2, step 3, where {value}"
    with pytest.MonkeyPatch.context() as patch:
        spoil_batch(patch, spoil)
        assert error_of(capsys, "train", *SMALL, "--epochs=4", "--out", str(out)).startswith(reason)
    for table in ("metrics.csv", "training.csv", "gradients.csv"):
        assert pd.read_csv(out / table)["epoch"].unique().tolist() == [1]
    assert torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["neuralcollapse"]["epoch"] == 1
    assert not (out / "summary.md").exists()
    facts = RunFolder(out).read_environment()
    assert not facts["finished"]
    assert facts["diverged"].startswith(reason)
    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    message = error_of(capsys, "train", "--resume", "--out", str(out))
    assert message == f"the run in {str(out)!r} cannot be resumed: {facts['diverged']}"
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == kept
    assert main(["train", *SMALL, "--epochs=1", "--overwrite", "--out", str(out)]) == 0
    assert "diverged" not in RunFolder(out).read_environment()


DIVERGING = [
    "--method=linear --lr=1e30",
    "--method=implicit --lr=1e30",
    "--method=standard --feature_norm=none --lr=1e30 --precision=bf16-mixed",
    "--method=means --loss=nonl --lr=1e30",
    "--method=frame --lr=1e30 --weight_average=0.5",
]


@pytest.mark.parametrize("flags", DIVERGING)
def test_whatever_diverges_is_one_line_and_leaves_no_nan(flags, tmp_path, capsys):
    out = tmp_path / "out"
    message = error_of(capsys, "train", *SMALL, *flags.split(), "--epochs=3", "--out", str(out))
    assert "training diverged in epoch " in message
    for table in ("training.csv", "gradients.csv"):
        assert not (out / table).exists() or not pd.read_csv(out / table).isna().any().any()


def test_what_has_diverged_is_not_saved_inside_an_epoch(tmp_path, monkeypatch):
    spoil_batch(monkeypatch, SPOILT["nan"][0], step=2)
    with pytest.raises(Diverged, match="in epoch 2, step 2, where the loss"):
        train_runs(RunConfig(**RUN, epochs=3, checkpoint_minutes=1e-9), tmp_path / "out", progress=False)
    saved = torch.load(tmp_path / "out" / "checkpoints" / "last.ckpt", weights_only=True)
    assert (saved["neuralcollapse"]["epoch"], saved["neuralcollapse"]["batches"]) == (2, 1)
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())


def test_a_run_that_diverges_takes_no_other_with_it(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    one = ("fixed", 0)
    seen = spoil_batch(monkeypatch, SPOILT["nan"][0], only=lambda config: (config.method, config.seed) == one)
    assert main([*COMPARE, "--out", str(out)]) == 1
    captured = capsys.readouterr()
    reason = "lr must be smaller: training diverged in epoch 2, step 3, where the loss is not finite"
    told = captured.err.strip().split("\n")[-1]
    assert told == f"neuralcollapse: skipped in table and figures: fixed-seed0: {reason}"
    assert "| standard" in captured.out
    metrics = pd.read_csv(out / "metrics.csv")
    runs = set(zip(metrics["method"], metrics["seed"], strict=True))
    assert runs == {("standard", 0), ("standard", 1), ("fixed", 1)}
    assert metrics.groupby(["method", "seed"])["epoch"].max().unique().tolist() == [2]
    trained = sum(seen.values())
    assert main(["compare", "--resume", "--out", str(out)]) == 1
    assert sum(seen.values()) == trained
    assert "fixed-seed0: the run in " in capsys.readouterr().err
    assert main(["aggregate", str(out), "--out", str(tmp_path / "all.csv")]) == 0
    assert "skipped: fixed-seed0, which diverged" in capsys.readouterr().err


def test_a_comparison_of_runs_that_all_diverge_is_an_error(tmp_path, capsys):
    flags = ["--methods=standard", "--feature_norm=none", "--lr=1e30", "--out", str(tmp_path / "out")]
    line = error_of(capsys, *COMPARE, *flags)
    for name in ("standard-seed0", "standard-seed1"):
        assert f"{name}: lr must be smaller: training diverged in epoch 1, step " in line


@pytest.mark.slow
def test_runs_in_processes_diverge_alone_as_well(tmp_path):
    runs = [RunConfig(**RUN, epochs=1, method="linear", seed=seed, lr=lr) for seed, lr in ((0, 1e30), (1, 0.01))]
    with pytest.raises(Diverged, match="training diverged in epoch 1"):
        train_runs(runs, tmp_path / "out", progress=False, parallel=2)
    (left,) = RunFolder(tmp_path / "out").run_folders()
    assert left.read_environment()["finished"] is True
    assert len(RunFolder(tmp_path / "out").run_folders(diverged=True)) == 2


def test_a_rate_at_which_training_diverges_loses(tmp_path, capsys):
    flags = ["compare", *SMALL, "--methods=linear", "--seeds=1", "--epochs=2", "--lr=auto"]
    assert main([*flags, "--lr_candidates=0.01,1e30", "--out", str(tmp_path / "out")]) == 0
    assert RunFolder(tmp_path / "out").run_folders()[0].settings()["lr"] == 0.01
    capsys.readouterr()
    assert main([*flags, "--lr_candidates=1e29,1e30", "--out", str(tmp_path / "other")]) == 2
    line = capsys.readouterr().err.strip().split("\n")[-1]
    assert line.endswith("lr_candidates must have one at which linear trains with cross-entropy, got [1e+29, 1e+30]")
