"""Losses for long tails, and regularisers, as settings of a run."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from helpers import error_of, normal
from neuralcollapse import losses
from neuralcollapse.cli import main
from neuralcollapse.lab.config import RunConfig
from neuralcollapse.lab.evaluate.checkpoints import saved_run
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.training.checkpoint import CheckpointFiles
from neuralcollapse.lab.training.objective import batch_loss, class_options
from neuralcollapse.lab.training.runs import Preparation

COUNTS = torch.tensor([400, 50, 5, 0])
PRESENT = torch.tensor([400.0, 50, 5, 1], dtype=torch.float64)
SMALL = ("--backbone=mlp", "--width=32", "--depth=1", "--train_samples=300", "--test_samples=200", "--measure_at=99")


def test_options_are_the_arguments_of_the_loss():
    features, weight, bias = normal(6, 8, seed=1), normal(4, 8, seed=2), normal(4, seed=3)
    targets = torch.tensor([0, 2, 1, 1, 2, 0])
    inverse = torch.tensor([1 / 400, 1 / 50, 1 / 5, 0], dtype=torch.float64)
    adjusted = {"class_weights": inverse, "prior": PRESENT, "prior_scale": 0.5}
    lengths = (COUNTS.double().mean() / PRESENT).sqrt()
    batch = (features, targets, weight)
    for settings, expected in (
        (
            {"loss": "cross-entropy", "label_smoothing": 0.1},
            losses.cross_entropy(*batch, bias, label_smoothing=0.1, **adjusted),
        ),
        ({"loss": "normface"}, losses.normface(*batch, **adjusted)),
        ({"loss": "two-way", "margin": 2.0}, losses.two_way(*batch, margin=2.0, **adjusted)),
        ({"loss": "nonl"}, losses.nonl(*batch, class_weights=inverse)),
        ({"loss": "dot-regression"}, losses.dot_regression(*batch, lengths, class_weights=inverse)),
    ):
        options = {"class_weights": "inverse"}
        options |= {"class_lengths": "inverse-root"} if settings["loss"] == "dot-regression" else {}
        options |= {"prior": 0.5} if settings["loss"] not in ("dot-regression", "nonl") else {}
        config = RunConfig(**settings, loss_options=options)
        of_classes = {"bias": bias, **class_options(config, COUNTS)}
        found = batch_loss(config, features @ weight.T + bias, targets, features, weight, 1.0, of_classes)
        assert (found - expected).abs() < 1e-12, settings


def test_no_option_leaves_the_loss_as_it_is():
    assert class_options(RunConfig(), COUNTS) == {}
    assert class_options(RunConfig(loss_options={"class_weights": "none", "prior": 0.0}), COUNTS) == {}


def values(folder) -> pd.Series:
    table = pd.read_csv(folder / "metrics.csv")
    return table[table["epoch"] == table["epoch"].max()].set_index(["split", "metric"])["value"]


@pytest.mark.parametrize("layer", [None, "model.0"])
def test_the_weight_of_variability_moves_nc1_both_ways(layer, tmp_path):
    found = {}
    for weight in (-0.2, None, 0.2):
        out = tmp_path / str(weight)
        of_layer = "" if layer is None else f", layer: '{layer}'"
        asked = [] if weight is None else [f"--regulariser={{weight: {weight}{of_layer}}}"]
        assert main(["train", *SMALL, "--method=linear", "--epochs=6", f"--out={out}", *asked]) == 0
        found[weight] = values(out)["train", "nc1_quotient"]
    assert found[0.2] < 0.8 * found[None]
    assert found[-0.2] > 1.25 * found[None]


@torch.no_grad()
def accuracy_of_rare(folder) -> float:
    """Return the test accuracy over the second half of the ten classes, by the last checkpoint."""
    run = RunFolder(folder)
    prepared = saved_run(run, Preparation(resumed=True, progress=False), None)
    checkpoint = CheckpointFiles(prepared.config, prepared.fingerprint).load(run.last_checkpoint)
    prepared.trained.load_state_dict(checkpoint["state_dict"])
    prepared.trained.eval()
    answers = [(prepared.trained(images).argmax(1), labels) for images, labels in prepared.evaluation["test"]]
    given, labels = (torch.cat(parts) for parts in zip(*answers, strict=True))
    return float((given == labels)[labels >= 5].float().mean())


def test_a_prior_helps_the_classes_with_few_images(tmp_path):
    of_rare = {}
    for prior in (0, 1):
        out = tmp_path / str(prior)
        tail = ["--imbalance={step: 0.05}", "--train_samples=1200", "--test_samples=400", "--method=linear"]
        asked = [f"--loss_options={{prior: {prior}}}"] if prior else []
        assert main(["train", *SMALL, *tail, "--epochs=4", f"--out={out}", *asked]) == 0
        of_rare[prior] = accuracy_of_rare(out)
    assert of_rare[1] > of_rare[0] + 0.02, of_rare


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss=mse", "--loss_options={class_weights: inverse}"], "loss_options belongs to loss cross-entropy, "),
        (["--loss=nonl", "--loss_options={prior: 1}"], "loss_options.prior is not a setting"),
        (["--loss_options={prior: -1}"], "loss_options.prior must be at least 0, got -1"),
        (["--loss_options={class_lengths: inverse-root}"], "loss_options.class_lengths is not a setting"),
        (["--regulariser={loss: koleo}"], "regulariser.weight must be finite and other than 0, got None"),
        (["--regulariser={weight: 0}"], "regulariser.weight must be finite and other than 0, got 0"),
        (
            ["--regulariser={weight: 1, loss: center, layer: a}"],
            "regulariser.layer belongs to a loss other than center",
        ),
        (
            ["--regulariser={weight: 1, loss: koleo, detach_between: true}"],
            "regulariser.detach_between belongs to loss",
        ),
        (["--regulariser={weight: 1, layer: a}", "--compile=true"], "compile must be false with regulariser.layer"),
        (["--regulariser={weight: 1, layer: nothing}"], "regulariser.layer must be the name of a module of the model"),
    ],
)
def test_options_without_an_effect_are_refused(arguments, message, tmp_path, capsys):
    assert error_of(capsys, "train", *SMALL, f"--out={tmp_path / 'out'}", *arguments).startswith(message)
