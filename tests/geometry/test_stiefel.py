from __future__ import annotations

import pytest
import torch

from helpers import generator, normal
from neuralcollapse import polar_factor
from neuralcollapse.geometry import stiefel
from neuralcollapse.geometry.trust_region import SecondOrderModel

SHAPES = [(1, 1), (1, 5), (4, 4), (3, 7), (2, 3, 5)]


def point(*shape, seed=0):
    return stiefel.random_point(*shape, generator=generator(seed), dtype=torch.float64)


def tangent(at, seed=1):
    return stiefel.project(at, normal(*at.shape, seed=seed))


def quartic(at):
    """A cost with every kind of term: not quadratic, not symmetric in rows."""
    weights = torch.arange(1, at.shape[-2] + 1, dtype=at.dtype).unsqueeze(-1)
    return (weights * at.pow(4) + at.pow(3)).sum((-2, -1)) + (at[..., 0] * at[..., -1]).sum(-1)


@pytest.mark.parametrize("shape", SHAPES)
def test_projection_is_the_nearest_tangent_vector(shape):
    at, ambient = point(*shape), normal(*shape, seed=1)
    projected = stiefel.project(at, ambient)
    product = projected @ at.mT
    assert torch.allclose(product, -product.mT, atol=1e-13)
    assert torch.allclose(stiefel.inner(ambient - projected, tangent(at, seed=2)), torch.zeros(()).double(), atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_retraction_leaves_along_the_tangent_and_stays_on_the_manifold(shape):
    at = point(*shape)
    direction = tangent(at)
    far = stiefel.retract(at, 100 * direction)
    assert torch.allclose(far @ far.mT, torch.eye(shape[-2]).double(), atol=1e-11)
    assert torch.allclose(stiefel.retract(at, 0 * direction), at, atol=1e-14)
    errors = [float((stiefel.retract(at, t * direction) - at - t * direction).norm()) for t in (1e-2, 1e-3)]
    assert errors[1] <= 1.5e-2 * errors[0] + 1e-15  # second order in the step


def test_qr_retraction_is_the_orthonormal_factor_with_positive_diagonal():
    at = point(3, 7)
    moved = at + tangent(at)
    orthonormal, triangular = torch.linalg.qr(moved.mT)
    assert torch.allclose(stiefel.retract(at, tangent(at)), (orthonormal * triangular.diagonal().sign()).mT)


@pytest.mark.parametrize("shape", SHAPES)
def test_model_agrees_with_the_cost_along_a_curve_to_second_order(shape):
    at = point(*shape)
    direction = tangent(at)
    with torch.no_grad():
        model = SecondOrderModel(quartic, at)
        slope = stiefel.inner(model.gradient, direction)[..., 0, 0]
        curvature = stiefel.inner(direction, model.hessian(direction))[..., 0, 0]
        size = 1e-3
        ahead, behind = (quartic(polar_factor(at + s * direction)) for s in (size, -size))
    assert torch.allclose((ahead - behind) / (2 * size), slope, rtol=1e-4, atol=1e-3)
    assert torch.allclose((ahead - 2 * quartic(at) + behind) / size**2, curvature, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 5)])
def test_hessian_is_symmetric_on_the_tangent_space_and_linear(shape):
    at = point(*shape)
    first, second = tangent(at, 1), tangent(at, 2)
    with torch.no_grad():
        model = SecondOrderModel(quartic, at)
        assert torch.allclose(stiefel.inner(first, model.hessian(second)), stiefel.inner(second, model.hessian(first)))
        both = model.hessian(2 * first - second)
        assert torch.allclose(both, 2 * model.hessian(first) - model.hessian(second))
        assert torch.allclose(stiefel.project(at, both), both, atol=1e-12)


def test_random_points_are_on_the_manifold_and_have_no_preferred_direction():
    points = stiefel.random_point(4000, 2, 3, generator=generator(), dtype=torch.float64)
    stiefel.check_point(points)
    assert points.mean(0).abs().max() < 0.05  # four standard errors
    assert torch.allclose((points.mT @ points).mean(0), 2 / 3 * torch.eye(3).double(), atol=0.04)


def test_distance_is_frobenius_with_one_value_per_problem():
    first, second = point(2, 3, 5), point(2, 3, 5, seed=1)
    assert torch.allclose(stiefel.distance(first, second), (first - second).square().sum((1, 2)).sqrt())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.eye(3)[:, :2], "shape .* p <= d, got \\(3, 2\\)"),
        (torch.eye(3).half(), "float32 or float64, got torch.float16"),
        (torch.eye(3).long(), "floating-point"),
        ([[1.0]], "floating-point tensor, got list"),
        (torch.tensor([[float("nan"), 0.0]]), "finite"),
        (torch.tensor([[1.0, 0.0], [0.0, 1.2]]), "row 1 has norm 1.2"),
        (torch.tensor([[[1.0, 0.0]], [[0.0, 0.5]]]), "row 0 of matrix \\(1,\\) has norm 0.5"),
        (torch.tensor([[1.0, 0.0], [0.6, 0.8]]), "rows 0 and 1 have inner product 0.6"),
        (torch.ones(0, 2, 3), "at least one"),
    ],
)
def test_the_check_of_a_point_names_what_is_wrong(bad, message):
    with pytest.raises(ValueError, match=f"start must .*{message}"):
        stiefel.check_point(bad, "start")


def test_invalid_shapes_are_refused():
    with pytest.raises(ValueError, match="p <= d"):
        stiefel.random_point(3, 2)
    with pytest.raises(ValueError, match="shape must be"):
        stiefel.random_point(3)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        stiefel.random_point(0, 2)
