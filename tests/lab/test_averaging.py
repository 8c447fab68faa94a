from __future__ import annotations

import math

import pytest
import torch

from neuralcollapse.lab.config import DataSettings, RunConfig
from neuralcollapse.lab.data.load import load_data
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.training.run import Run
from neuralcollapse.metrics import Measurement

SMALL = {"backbone": "mlp", "width": 24, "depth": 1, "train_samples": 200, "test_samples": 60}


def test_an_average_of_the_weights_is_what_is_measured(tmp_path):
    settings = {"method": "standard", "epochs": 2, "batch_size": 50, "weight_average": 0.5}
    steps: list[dict[str, torch.Tensor]] = []

    config = RunConfig(**SMALL | settings)
    run = RunFolder(tmp_path / "run")
    run.start(config.in_force())
    prepared = Run(config, load_data(config))
    prepared.optimizer.register_step_post_hook(
        lambda *_: steps.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    )
    model, average = prepared.trained.model, prepared.trained.average
    prepared.train(run)
    name = next(name for name in steps[0] if name.endswith("0.weight"))
    # 1/share − 1 = 1: step s counts as s, but for the offset that makes the weights of the recursion exact.
    expected, total = torch.zeros_like(steps[0][name], dtype=torch.float64), 0.0
    for number, state in enumerate(steps):
        weight = math.prod(1 - 1 / (0.5 * later + 1) for later in range(number + 1, len(steps))) / (0.5 * number + 1)
        expected, total = expected + weight * state[name].double(), total + weight
    assert total == pytest.approx(1)
    assert torch.allclose(average.state_dict()[name].double(), expected, atol=1e-6)
    assert torch.allclose(average.head.weight.norm(dim=1), torch.ones(10), atol=1e-6)
    measured = Measurement.load(run.measurement(2, "test"))
    assert torch.equal(measured.weight, average.head.weight)
    assert not torch.equal(measured.weight, model.head.weight)


def _nearest(method: str, weight: torch.Tensor) -> torch.Tensor:
    """Return the simplex ETF, or the matrix of unit rows, nearest to a weight (K, d), by an SVD in fp64."""
    if method == "means":
        return torch.nn.functional.normalize(weight)
    left, _, right = torch.linalg.svd(weight - weight.mean(0), full_matrices=False)
    rank = len(weight) - 1
    return math.sqrt(len(weight) / rank) * left[:, :rank] @ right[:rank]


@pytest.mark.parametrize("method", ["implicit", "means"])
def test_class_means_and_classifiers_that_follow_from_them_are_averaged(method, tmp_path):
    config = RunConfig(**SMALL | {"method": method, "epochs": 3, "batch_size": 50, "weight_average": 0.5, "lr": 0.05})
    data = load_data(DataSettings(train_samples=200, test_samples=60))
    run = RunFolder(tmp_path / "run")
    run.start(config.in_force())
    prepared = Run(config, data)
    model, average = prepared.trained.model, prepared.trained.average
    steps: list[dict[str, torch.Tensor]] = []
    prepared.optimizer.register_step_post_hook(
        lambda *_: steps.append({name: tensor.double() for name, tensor in model.head.state_dict().items()})
    )
    prepared.train(run)

    expected = steps[0]
    for number, state in enumerate(steps):
        expected = {name: tensor.lerp(state[name], 1 / (0.5 * number + 1)) for name, tensor in expected.items()}
    actual = average.head.state_dict()
    assert torch.allclose(actual["class_means.centred.mean"].double(), expected["class_means.centred.mean"], atol=1e-5)
    assert torch.equal(actual["class_means.centred.seen"], model.head.class_means.centred.seen)
    assert torch.allclose(actual["weight"].double(), _nearest(method, expected["weight"]), atol=2e-3)
    assert not torch.allclose(actual["weight"].double(), steps[-1]["weight"], atol=2e-2)


@pytest.mark.parametrize("method", ["implicit", "means", "frame"])
def test_an_average_is_restored_from_a_checkpoint(method, tmp_path):
    config = RunConfig(**SMALL | {"method": method, "epochs": 2, "weight_average": 0.1})
    data = load_data(DataSettings(train_samples=200, test_samples=60))
    run = RunFolder(tmp_path / "run")
    run.start(config.in_force())
    prepared = Run(config, data)
    prepared.train(run)
    again = Run(config, data).trained
    again.load_state_dict(torch.load(run.last_checkpoint, weights_only=True)["state_dict"])
    images = torch.rand(4, *data.image_shape)
    assert torch.equal(again.eval()(images), prepared.trained.eval()(images))
