"""Gradients of all metrics that are formulas of tensors: right, and finite at collapse, so that each can be a loss."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.autograd import gradcheck

import neuralcollapse.metrics
from helpers import generator
from neuralcollapse.geometry import random_simplex_etf, simplex_etf

K, D, N = 5, 7, 20
TARGETS = torch.arange(N) % K
WITHOUT_GRADIENT = {
    "nearest_class_mean": "a class index",
    "nc4_ncc_mismatch": "a share of samples, piecewise constant",
    "collapse_metrics": "numbers, of moments that keep no graph",
    "undefined_metrics": "words",
    "etf_distances": "numbers; nearest_simplex_etf and nc3_distance have gradients",
    "class_statistics": "of moments, which keep no graph",
    "moments_about": "of moments, which keep no graph",
    "class_values": "of moments, which keep no graph",
    "pair_matrices": "of moments, which keep no graph",
    "nc2_one_vs_rest": "the value of a minimisation, whose solution keeps no graph",
    "effective_depth": "a number of layers",
    "LayerProfile": "a class",
    "UnlabelledMeasurement": "a class",
    "class_groups": "class indices",
    "group_metrics": "numbers, of a record",
    "plot": "a figure",
    "TransferredLayer": "a class",
    "transfer": "runs the model without gradients",
    "linear_probe": "of moments, which keep no graph",
    "measure": "runs the model without gradients",
    "measure_features": "numbers, of stored features",
    "ClassMoments": "a class",
    "ClassStatistics": "a class",
    "ClassValues": "a class",
    "LinearProbe": "a class",
    "Measurement": "a class",
    "MeasureOptions": "a class",
    "Provenance": "a class",
    "NeuralCollapse": "a class",
}
FUNCTIONS = [name for name in neuralcollapse.metrics.__all__ if name not in WITHOUT_GRADIENT]
VARIANTS = {
    "nc2_hyperspherical": [
        {"kernel": "dist"},
        {"kernel": "distance"},
        {"kernel": "log"},
        {"kernel": "riesz"},
        {"kernel": "riesz", "exponent": 2.5},
    ],
    "nc1_cdnv": [{}, {"power": 2.0}],
}


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def covariances(seed: int, *shape: int) -> torch.Tensor:
    factors = normal(seed, *shape, shape[-1])
    return factors @ factors.mT / shape[-1]


GENERIC = {
    "vectors": normal(1, K, D),
    "weight": normal(2, K, D),
    "class_means": normal(3, K, D),
    "centred_means": normal(4, K, D) - normal(4, K, D).mean(0),
    "features": normal(5, N, D),
    "code": normal(6, K, 3),
    "bias": normal(7, K),
    "center": normal(8, D),
    "ood_mean": normal(9, D),
    "within_class_covariance": covariances(10, D),
    "class_scatter": covariances(11, K, D),
    "within_class_trace": torch.tensor(1.3, dtype=torch.float64),
    "within_class_variances": normal(12, K).square() + 0.1,
    "targets": TARGETS,
    "counts": torch.full((K,), N // K),
}
SMALLER = {  # one eigenvalue decomposition for each of K d² inputs
    "nc1_numerical_rank": {
        "class_scatter": GENERIC["class_scatter"][:3, :4, :4],
        "class_means": GENERIC["class_means"][:3, :4],
        "counts": GENERIC["counts"][:3],
    }
}
ETF = random_simplex_etf(K, D, generator=generator(3), dtype=torch.float64)
COLLAPSED = GENERIC | {
    **dict.fromkeys(("vectors", "weight", "class_means", "centred_means"), ETF),
    "features": 3 * ETF[TARGETS],
    "code": simplex_etf(K, K - 1, dtype=torch.float64),
    "bias": torch.zeros(K, dtype=torch.float64),
    "center": torch.zeros(D, dtype=torch.float64),
    "within_class_covariance": torch.zeros(D, D, dtype=torch.float64),
    "class_scatter": torch.zeros(K, D, D, dtype=torch.float64),
    "within_class_trace": torch.zeros((), dtype=torch.float64),
    "within_class_variances": torch.zeros(K, dtype=torch.float64),
}
POINTS = {
    "collapsed": COLLAPSED,
    "nearly": {
        name: value + 1e-9 * normal(20, *value.shape) if value.is_floating_point() else value
        for name, value in COLLAPSED.items()
    }
    | {"within_class_covariance": 1e-16 * covariances(10, D), "class_scatter": 1e-16 * covariances(11, K, D)},
    "isotropic": COLLAPSED
    | {
        "within_class_covariance": 0.1 * torch.eye(D, dtype=torch.float64),
        "class_scatter": torch.eye(D, dtype=torch.float64).repeat(K, 1, 1),
        "within_class_variances": torch.ones(K, dtype=torch.float64),
    },
}


def tensors(result: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def call(name: str, point: dict[str, torch.Tensor], replaced: dict[str, torch.Tensor], options) -> tuple:
    function = getattr(neuralcollapse.metrics, name)
    arguments = {key: point[key] for key in inspect.signature(function).parameters if key in point}
    return tensors(function(**arguments | replaced, **options))


def differentiable(name: str) -> list[str]:
    parameters = inspect.signature(getattr(neuralcollapse.metrics, name)).parameters
    return [key for key in parameters if key in GENERIC and GENERIC[key].is_floating_point()]


EACH = [(name, options) for name in FUNCTIONS for options in VARIANTS.get(name, [{}])]
IDS = [" ".join([name, *map(str, options.values())]) for name, options in EACH]


def test_the_two_lists_are_complete():
    assert set(FUNCTIONS) | set(WITHOUT_GRADIENT) == set(neuralcollapse.metrics.__all__)
    assert all(differentiable(name) for name in FUNCTIONS)


@pytest.mark.parametrize(("name", "options"), EACH, ids=IDS)
def test_gradients_are_those_of_finite_differences(name, options):
    arguments, point = differentiable(name), SMALLER.get(name, GENERIC)
    inputs = [point[key].clone().requires_grad_() for key in arguments]

    def function(*values):
        return call(name, point, dict(zip(arguments, values, strict=True)), options)

    assert gradcheck(function, inputs, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize(("name", "options"), EACH, ids=IDS)
def test_gradients_are_finite_at_collapse_where_eigenvalues_repeat(name, options, point):
    values = POINTS[point]
    arguments = {key: values[key].clone().requires_grad_() for key in differentiable(name)}
    for result in call(name, values, arguments, options):
        assert torch.isfinite(result).all()
        gradients = torch.autograd.grad(result.sum(), list(arguments.values()), retain_graph=True, allow_unused=True)
        for key, gradient in zip(arguments, gradients, strict=True):
            assert gradient is None or torch.isfinite(gradient).all(), key


SHAPES = [(4, 9), (5, 5), (6, 3)]


@pytest.mark.parametrize(("num_classes", "feature_dim"), SHAPES)
@pytest.mark.parametrize("rows", ["any", "equal singular values", "rank two", "not centred"])
@pytest.mark.parametrize("name", ["nc1_pinv", "nc1_vci"])
def test_spectral_gradients_in_the_class_means(name, rows, num_classes, feature_dim):
    """Through the centring, as in training; and without it, where the K-th singular value is cut off."""
    means = normal(1, num_classes, feature_dim)
    within = covariances(2, feature_dim)
    if rows == "equal singular values" and feature_dim >= num_classes - 1:
        means = random_simplex_etf(num_classes, feature_dim, generator=generator(3), dtype=torch.float64) + 2
    if rows == "rank two":
        means = normal(1, num_classes, 2) @ normal(5, 2, feature_dim)
    function = getattr(neuralcollapse.metrics, name)

    def of_means(means, within):
        if rows == "rank two":  # perturbed within the matrices of that rank
            means = means @ torch.linalg.pinv(BASIS[feature_dim]) @ BASIS[feature_dim]
        return function(within, means if rows == "not centred" else means - means.mean(0))

    BASIS = {feature_dim: normal(5, 2, feature_dim)}
    assert gradcheck(of_means, (means.requires_grad_(), within.requires_grad_()), atol=1e-6, rtol=1e-5)


def test_deep_collapse_has_a_precise_gradient():
    """At a spread of 1e-6 the closed form of nc1_vci loses no digit: it is linear in Σ_W."""
    means = normal(1, K, D) - normal(1, K, D).mean(0)
    scale = torch.tensor(1e-12, dtype=torch.float64, requires_grad=True)
    value = neuralcollapse.metrics.nc1_vci(scale * covariances(2, D), means)
    (gradient,) = torch.autograd.grad(value, scale)
    assert float(gradient * scale.detach()) == pytest.approx(float(value.detach()), rel=1e-9)  # linear in Σ_W there


def test_a_step_against_the_gradient_of_every_nc1_metric_lowers_it():
    """From features, as a loss is used: class means and covariances in the graph."""
    from neuralcollapse.metrics import nc1_cdnv, nc1_numerical_rank, nc1_pinv, nc1_quotient, nc1_vci

    start = normal(1, K, D)[TARGETS] + 0.3 * normal(2, N, D)

    def losses(features):
        means = torch.stack([features[k == TARGETS].mean(0) for k in range(K)])
        centred, deviations = means - means.mean(0), features - means[TARGETS]
        scatter = torch.stack([deviations[k == TARGETS].T @ deviations[k == TARGETS] for k in range(K)])
        within = scatter.sum(0) / N
        variances = torch.stack([deviations[k == TARGETS].square().sum(1).mean() for k in range(K)])
        return {
            "nc1_pinv": nc1_pinv(within, centred),
            "nc1_vci": nc1_vci(within, centred),
            "nc1_quotient": nc1_quotient(within.trace(), centred),
            "nc1_cdnv": nc1_cdnv(means, variances),
            "nc1_numerical_rank": nc1_numerical_rank(scatter, means, torch.full((K,), N // K)),
        }

    for name in losses(start):
        features = start.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(losses(features)[name], features)
        step = 1e-3 * gradient / gradient.norm()
        assert losses(start - step)[name] < losses(start)[name] < losses(start + step)[name], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_under_function_transforms(dtype):
    means, within = GENERIC["centred_means"].to(dtype), GENERIC["within_class_covariance"].to(dtype)
    for name in ("nc1_pinv", "nc1_vci"):
        function = getattr(neuralcollapse.metrics, name)
        leaf = means.clone().requires_grad_()
        (expected,) = torch.autograd.grad(function(within, leaf), leaf)
        torch.testing.assert_close(torch.func.grad(function, argnums=1)(within, means), expected)
