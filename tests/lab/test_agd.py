from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from helpers import generator
from neuralcollapse.lab.training.agd import AGD, orthogonal_start

SHAPES = {"linear": (7, 5), "wide": (4, 9), "convolution": (6, 3, 3, 2), "one_by_one": (5, 8, 1, 1)}


def weights_with_gradients(dtype: torch.dtype = torch.float64) -> dict[str, nn.Parameter]:
    random = generator(0)
    weights = {}
    for name, shape in SHAPES.items():
        weights[name] = nn.Parameter(torch.randn(shape, generator=random, dtype=dtype))
        weights[name].grad = torch.randn(shape, generator=random, dtype=dtype)
    return weights


def published_step(weights: dict[str, nn.Parameter], gain: float) -> tuple[dict[str, torch.Tensor], float]:
    """Formulas section 6, by loops over kernel positions."""
    scales, norms = {}, {}
    for name, weight in weights.items():
        fan_out, fan_in, *kernel = weight.shape
        scales[name] = math.sqrt(fan_out / fan_in) / math.sqrt(math.prod(kernel))
        flat = weight.grad.reshape(fan_out, fan_in, -1)
        norms[name] = [math.sqrt(sum(float(x) ** 2 for x in flat[:, :, p].flatten())) for p in range(flat.shape[2])]
    summary = sum(scales[name] * sum(norms[name]) for name in weights) / len(weights)
    eta = math.log(0.5 * (1 + math.sqrt(1 + 4 * summary)))
    moved = {}
    for name, weight in weights.items():
        after = weight.detach().clone().reshape(*weight.shape[:2], -1)
        gradient = weight.grad.reshape(after.shape)
        for p, norm in enumerate(norms[name]):
            if norm > 0:
                after[:, :, p] -= gain * eta / len(weights) * scales[name] * gradient[:, :, p] / norm
        moved[name] = after.reshape(weight.shape)
    return moved, eta


@pytest.mark.parametrize("gain", [1.0, 10.0])
def test_a_step_is_the_published_one(gain):
    weights = weights_with_gradients()
    weights["convolution"].grad[:, :, 1, 1] = 0  # a kernel position without gradient stays
    expected, eta = published_step(weights, gain)
    optimizer = AGD(weights.values(), gain=gain)
    optimizer.step()
    assert float(optimizer.eta) == pytest.approx(eta, rel=1e-12)
    for name, weight in weights.items():
        assert torch.allclose(weight, expected[name], rtol=1e-12, atol=1e-14), name


def test_the_start_is_orthogonal_and_scaled_at_every_kernel_position():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 4, 1, bias=False), nn.Linear(6, 10))
    bias = network[2].bias.detach().clone()
    orthogonal_start(network)
    for weight in (network[0].weight, network[1].weight, network[2].weight):
        fan_out, fan_in, *kernel = weight.shape
        positions = weight.detach().reshape(fan_out, fan_in, -1).permute(2, 0, 1)
        expected = math.sqrt(fan_out / fan_in / math.prod(kernel))
        values = torch.linalg.svdvals(positions.double())
        assert torch.allclose(values, torch.full_like(values, expected), rtol=1e-5)
    assert torch.equal(network[2].bias, bias)


def test_it_trains_without_a_learning_rate():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(10, 64, bias=False), nn.ReLU(), nn.Linear(64, 3, bias=False))
    orthogonal_start(network)
    inputs = torch.randn(200, 10)
    targets = (inputs @ torch.randn(10, 3)).argmax(1)
    optimizer = AGD(network.parameters(), gain=1.0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(inputs), targets)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(100)]
    assert losses[-1] < 0.2 * losses[0]


def test_a_weight_without_a_gradient_stays():
    weights = weights_with_gradients()
    weights["wide"].grad = None
    before = weights["wide"].detach().clone()
    AGD(weights.values()).step()
    assert torch.equal(weights["wide"], before)


def test_vectors_are_refused_by_name():
    with pytest.raises(ValueError, match=r"agd has no rule for biases and other vectors, but 1 .* \(bias, \.\.\.\)"):
        AGD(nn.Linear(3, 2).named_parameters())
    with pytest.raises(ValueError, match="gain must be positive and finite, got 0"):
        AGD(nn.Linear(3, 2, bias=False).parameters(), gain=0)
