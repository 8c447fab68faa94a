"""Losses by dotted path: of pytorch-metric-learning and of a module in the working directory."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.nn import functional

from helpers import error_of, normal
from neuralcollapse.cli import main
from neuralcollapse.lab.config import RunConfig
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.tables import read_table
from neuralcollapse.lab.training.objective import OwnLoss
from neuralcollapse.metrics import Measurement

ARCFACE = "pytorch_metric_learning.losses.ArcFaceLoss"
SMALL = ("--backbone=mlp", "--width=32", "--depth=1", "--train_samples=300", "--test_samples=200", "--measure_at=99")
MINE = '''
import torch
from torch import nn

class Rows(nn.Module):
    """Cross-entropy of a linear layer, whose weight is (K, d)."""

    def __init__(self, num_classes, embedding_size):
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(num_classes, embedding_size))

    def forward(self, features, targets):
        return nn.functional.cross_entropy(features @ self.rows.T, targets)

class WithBias(Rows):
    def __init__(self, num_classes, embedding_size):
        super().__init__(num_classes, embedding_size)
        self.bias = nn.Parameter(torch.zeros(num_classes))

class PerSample(Rows):
    def forward(self, features, targets):
        return nn.functional.cross_entropy(features @ self.rows.T, targets, reduction="none")

class Square(nn.Module):
    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor

    def forward(self, features, targets):
        return self.factor * features.square().mean()

def function(features, targets):
    raise AssertionError("called")

instance = Square()
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Module in the working directory; its name is that of the test, because modules stay imported."""
    name = f"mine_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    return name


def values(folder):
    table = read_table(RunFolder(folder).metrics)
    return table[table["epoch"] == table["epoch"].max()].set_index(["split", "metric"])["value"]


def test_arcface_is_that_of_pytorch_metric_learning_with_the_weight_of_the_classifier():
    features, weight = normal(6, 8, seed=1).requires_grad_(), normal(4, 8, seed=2).requires_grad_()
    targets = torch.tensor([0, 2, 1, 1, 3, 0])
    loss = OwnLoss(RunConfig(loss=ARCFACE, method="linear", loss_options={"margin": 20.0, "scale": 8}), 4, 8)
    found = loss(features, targets, weight)
    # ArcFace by its formula: the angle to the own class grows by the margin.
    cosines = functional.normalize(features) @ functional.normalize(weight).T
    margin = functional.one_hot(targets, 4) * 20 * torch.pi / 180
    expected = functional.cross_entropy(8 * torch.cos(cosines.acos() + margin), targets)
    assert (found - expected).abs() < 1e-6
    for mine, theirs in zip(
        torch.autograd.grad(found, (features, weight)), torch.autograd.grad(expected, (features, weight)), strict=True
    ):
        assert torch.allclose(mine, theirs, atol=1e-6)


@pytest.mark.parametrize("name", ["ProxyNCALoss", "NormalizedSoftmaxLoss", "SphereFaceLoss"])
def test_the_shape_of_class_weights_is_seen(name):
    loss = OwnLoss(RunConfig(loss=f"pytorch_metric_learning.losses.{name}", method="linear"), 4, 8)
    weight = normal(4, 8, seed=2).requires_grad_()
    value = loss(normal(6, 8, seed=1), torch.tensor([0, 2, 1, 1, 3, 0]), weight)
    (gradient,) = torch.autograd.grad(value, weight)
    assert gradient.abs().sum(1).gt(0).all()
    assert not any(parameter.requires_grad and parameter.grad is not None for parameter in loss.module.parameters())


def test_a_run_with_arcface_trains_its_classifier(tmp_path):
    out = tmp_path / "out"
    asked = [f"--loss={ARCFACE}", "--loss_options={margin: 10, scale: 16}", "--method=standard", "--epochs=6"]
    assert main(["train", *SMALL, *asked, f"--out={out}"]) == 0
    assert values(out)["test", "accuracy"] > 0.6  # chance is 0.1
    record = Measurement.load(RunFolder(out).measurement(6, "train"))
    assert record.bias is None
    assert torch.allclose(record.weight.norm(dim=1), torch.ones(10, dtype=torch.float64), atol=1e-5)


def test_a_class_of_ones_own_is_the_loss_that_it_computes(mine, tmp_path):
    shared = [*SMALL, "--method=linear", "--epochs=2"]
    assert main(["train", *shared, f"--loss={mine}.Rows", "--out=own"]) == 0
    assert main(["train", *shared, "--classifier_bias=none", "--out=named"]) == 0
    own, named = values(tmp_path / "own"), values(tmp_path / "named")
    assert (own - named).abs().max() < 1e-4


def test_a_loss_without_class_weights_goes_with_class_means(mine, tmp_path, capsys):
    asked = [f"--loss={mine}.Square", "--loss_options={factor: 0.5}", "--epochs=1"]
    line = error_of(capsys, "train", *SMALL, *asked, "--method=linear", "--out=refused")
    assert line.startswith(f"loss {mine}.Square has no class weights: it needs a method whose classifier follows")
    assert not (tmp_path / "refused").exists()
    assert main(["train", *SMALL, *asked, "--method=means", "--feature_norm=none", "--out=out"]) == 0


@pytest.mark.parametrize(
    ("loss", "arguments", "message"),
    [
        ("{}.WithBias", [], "loss must have no state besides class weights (10, 32) or (32, 10), but "),
        ("{}.Missing", [], "loss '{}.Missing' cannot be imported: "),
        ("{}.function", [], "loss must be a class that is a torch.nn.Module, but '{}.function' is a function"),
        ("{}.instance", [], "loss must be a class that is a torch.nn.Module, but '{}.instance' is a Square"),
        ("{}.Rows", ["--loss_options={depth: 1}"], "loss '{}.Rows' cannot be made with loss_options"),
        ("{}.Rows", ["--width=10"], "feature_dim must differ from the number of classes, 10, for the loss {}.Rows"),
        ("{}.Rows", ["--devices=2"], "a loss by dotted path needs one rank"),
        ("{}.Rows", ["--temperature=0.1"], "temperature belongs to loss normface"),
        ("{}/Rows.x", [], "loss must be one of cross-entropy, "),
        ("arcface", [], "loss must be one of cross-entropy, "),
    ],
)
def test_losses_that_cannot_be_used_are_refused(mine, loss, arguments, message, tmp_path, capsys):
    given = [
        argument for argument in SMALL if not any(argument.split("=")[0] == one.split("=")[0] for one in arguments)
    ]
    flags = [f"--loss={loss.format(mine)}", "--method=linear", "--out=out", *arguments]
    assert error_of(capsys, "train", *given, *flags).startswith(message.replace("{}", mine))
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_a_scalar_is_refused(mine, tmp_path, capsys):
    loss = OwnLoss(RunConfig(loss=f"{mine}.PerSample", method="linear"), 4, 8)
    with pytest.raises(ValueError, match=r"loss must return a scalar, but .*PerSample returns shape \(6,\)"):
        loss(normal(6, 8), torch.tensor([0, 2, 1, 1, 3, 0]), normal(4, 8))


def test_the_class_is_imported_only_if_the_command_line_names_it(mine, tmp_path, capsys):
    shared = [*SMALL, "--method=linear", "--schedule=constant", f"--loss={mine}.Rows", "--out=out"]
    assert main(["train", *shared, "--epochs=1"]) == 0
    (tmp_path / f"{mine}.py").write_text("raise AssertionError('imported')")
    del sys.modules[mine]
    assert main(["measure", "out"]) == 0  # without the loss
    line = error_of(capsys, "train", "--out=out", "--resume", "--epochs=2")
    assert line.startswith(
        f"loss '{mine}.Rows' is a class named in 'out/config.yaml', which is not imported automatically"
    )
    (tmp_path / f"{mine}.py").write_text(MINE)
    assert main(["train", "--out=out", "--resume", "--epochs=2", f"--loss={mine}.Rows"]) == 0
