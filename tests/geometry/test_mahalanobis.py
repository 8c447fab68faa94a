from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from helpers import generator, normal
from neuralcollapse import nearest_simplex_etf
from neuralcollapse.geometry import stiefel
from neuralcollapse.geometry.mahalanobis import nearest_frame_under_metric
from neuralcollapse.geometry.simplex import expand, reduce


def unit(means):
    centred = means - means.mean(-2, keepdim=True)
    return centred / torch.linalg.matrix_norm(centred, keepdim=True)


def closed_form(means, **options):
    return math.sqrt((means.shape[-2] - 1) / means.shape[-2]) * reduce(nearest_simplex_etf(means, **options))


def metric(dimension, seed=7):
    root = normal(dimension, 2 * dimension, seed=seed)
    return root @ root.mT


def objective(means, frame, matrix):
    """As it is posed: distances of class vectors in the metric, M scaled to trace d."""
    count, dimension = means.shape
    difference = unit(means) - expand(frame) / math.sqrt(count - 1)
    scaled = dimension * matrix / matrix.trace()
    return float((count - 1) / 2 * sum(row @ scaled @ row for row in difference))


@pytest.mark.parametrize("matrix", [torch.eye(9).double(), 5 * torch.ones(9).double()])
@pytest.mark.parametrize("anchored", [False, True])
def test_the_euclidean_metric_gives_the_closed_form(matrix, anchored):
    means, anchor = normal(5, 9), nearest_simplex_etf(normal(5, 9, seed=1))
    options = {"anchor": anchor, "proximal_weight": 0.4} if anchored else {}
    here = {"anchor": math.sqrt(4 / 5) * reduce(anchor), "proximal_weight": 0.4} if anchored else {}
    start = stiefel.random_point(4, 9, generator=generator(), dtype=torch.float64)
    solution = nearest_frame_under_metric(unit(means), matrix, start, tolerance=1e-11, **here)
    assert (solution.point - closed_form(means, **options)).norm() < 1e-8


def test_no_rotation_of_the_solution_is_nearer_in_the_metric():
    means, matrix = normal(5, 9), metric(9)
    frame = nearest_frame_under_metric(unit(means), matrix, closed_form(means)).point
    least = objective(means, frame, matrix)
    assert least < objective(means, closed_form(means), matrix) - 1e-3
    for seed, size in enumerate([1e-3, 1e-2, 0.1] * 5):
        skew = size * normal(9, 9, seed=seed)
        assert objective(means, frame @ torch.linalg.matrix_exp(skew - skew.mT), matrix) >= least - 1e-12


def test_the_scale_of_the_metric_does_not_matter_and_a_diagonal_is_a_matrix():
    means, weights = normal(5, 9), torch.linspace(0.5, 4, 9, dtype=torch.float64)
    first, second, third = (
        nearest_frame_under_metric(unit(means), matrix, closed_form(means), tolerance=1e-11).point
        for matrix in (weights, 100 * weights, weights.diag())
    )
    assert torch.allclose(first, second, atol=1e-9)
    assert torch.allclose(first, third, atol=1e-9)


def test_weights_and_a_code_of_the_simplex_are_the_same_problem_as_without_a_code():
    means, weights = normal(4, 7), torch.tensor([[0.5], [1.0], [1.0], [1.5]]).double()
    code = math.sqrt(4 / 3) * expand(torch.eye(3).double())
    first, second = (
        nearest_frame_under_metric(
            unit(means), metric(7), closed_form(means), class_weights=weights, tolerance=1e-11, **option
        ).point
        for option in ({}, {"code": code})
    )
    assert torch.allclose(first, second, atol=1e-9)


@pytest.mark.parametrize("diagonal", [False, True])
def test_gradients_in_means_metric_and_anchor_equal_finite_differences(diagonal):
    means, matrix = normal(4, 5), torch.linspace(0.5, 2, 5).double() if diagonal else metric(5) / 10
    anchor = closed_form(normal(4, 5, seed=1))
    options = {"proximal_weight": 0.3, "tolerance": 1e-11}
    start = nearest_frame_under_metric(unit(means), matrix, closed_form(means), anchor=anchor, **options).point

    def frame(means, matrix, anchor):
        symmetric = matrix if diagonal else 0.5 * (matrix + matrix.mT)
        return nearest_frame_under_metric(unit(means), symmetric, start, anchor=anchor, **options).point

    inputs = [value.clone().requires_grad_() for value in (means, matrix, anchor)]
    assert gradcheck(frame, inputs, atol=1e-6)


def test_a_batch_has_its_own_metrics():
    means = normal(2, 4, 6)
    matrices = torch.stack([metric(6, 1), metric(6, 2)])
    together = nearest_frame_under_metric(unit(means), matrices, closed_form(means), tolerance=1e-11).point
    for index in range(2):
        alone = nearest_frame_under_metric(
            unit(means[index]), matrices[index], closed_form(means[index]), tolerance=1e-11
        ).point
        assert torch.allclose(together[index], alone, atol=1e-8)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.ones(6), "shape \\(7,\\) or \\(..., 7, 7\\), got \\(6,\\)"),
        (torch.ones(7, 6), "got \\(7, 6\\)"),
        (torch.tensor(1.0), "got \\(\\)"),
        (torch.eye(7, dtype=torch.int64), "floating-point"),
        (torch.full((7,), float("nan")), "finite"),
        (torch.linspace(0, 1, 7), "positive, got a least entry of 0"),
        (torch.ones(7, 7).triu(), "symmetric"),
        (torch.linspace(-1, 1, 7).diag(), "positive definite, got a least eigenvalue of -1"),
    ],
)
def test_what_is_no_metric_is_refused(bad, message):
    means = normal(4, 7)
    with pytest.raises(ValueError, match=f"metric must be .*{message}"):
        nearest_frame_under_metric(unit(means), bad, closed_form(means))


@pytest.mark.parametrize("size", [(5, 4), (5, 9)])
def test_nearest_simplex_etf_takes_a_metric_and_its_gradient(size):
    means, matrix = normal(*size).requires_grad_(), metric(size[1])
    etf = nearest_simplex_etf(means, metric=matrix)
    frame = math.sqrt(4 / 5) * reduce(etf.detach())
    stiefel.check_point(frame)
    assert objective(means.detach(), frame, matrix) < objective(means.detach(), closed_form(means.detach()), matrix)
    upstream = normal(*size, seed=4)
    (gradient,) = torch.autograd.grad(etf, means, upstream)
    step = 1e-5 * normal(*size, seed=3)
    ahead, behind = (nearest_simplex_etf((means + sign * step).detach(), metric=matrix) for sign in (1, -1))
    change = float((upstream * (ahead - behind)).sum() / 2)
    assert float((gradient * step).sum()) == pytest.approx(change, rel=1e-3)
    assert torch.allclose(nearest_simplex_etf(means.detach(), metric=torch.ones(size[1])), nearest_simplex_etf(means))
    single = nearest_simplex_etf(means.detach().float(), metric=matrix)
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), etf, atol=1e-2)
