from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from geometry.riemannian_costs import PROBLEMS, brockett, published
from helpers import generator, normal
from neuralcollapse import polar_factor
from neuralcollapse.geometry import argmin_on_stiefel, stiefel
from neuralcollapse.geometry.trust_region import SecondOrderModel


def start(*shape, seed=5):
    return stiefel.random_point(*shape, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("size", [(1, 3), (3, 6), (4, 4)])
def test_gradients_equal_finite_differences(kind, size):
    problem = PROBLEMS[kind](*size)
    solution = argmin_on_stiefel(problem.cost, problem.parameters, start(*size), tolerance=1e-12)
    parameters = tuple(parameter.clone().requires_grad_() for parameter in problem.parameters)

    def point(*values):
        return argmin_on_stiefel(problem.cost, values, solution.point, tolerance=1e-12).point

    assert gradcheck(point, parameters, eps=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 3), (3, 6), (9, 40), (2, 3, 6)])
def test_gradient_of_the_published_cost_is_that_of_the_closed_form(size):
    target, upstream = normal(*size).requires_grad_(), normal(*size, seed=1)
    point = argmin_on_stiefel(published(1, 1).cost, (target,), polar_factor(target.detach()), tolerance=1e-11).point
    (ours,) = torch.autograd.grad(point, target, upstream)
    (exact,) = torch.autograd.grad(polar_factor(target), target, upstream)
    assert torch.allclose(ours, exact, atol=1e-9)


def test_parameters_may_be_shared_by_a_batch_and_need_no_gradient():
    metric = normal(6, 12) @ normal(6, 12).mT
    shared, targets = metric.clone().requires_grad_(), normal(2, 3, 6)
    cost, initial = PROBLEMS["unbalanced Procrustes"](3, 6).cost, polar_factor(targets)
    together = argmin_on_stiefel(cost, [targets, shared], initial, tolerance=1e-11)
    together.point.pow(3).sum().backward()
    total = torch.zeros_like(metric)
    for target, at in zip(targets, initial, strict=True):
        alone = metric.clone().requires_grad_()
        argmin_on_stiefel(cost, (target, alone), at, tolerance=1e-11).point.pow(3).sum().backward()
        total += alone.grad
    assert torch.allclose(shared.grad, total, atol=1e-9)
    assert together.adjoint.converged.tolist() == [True, True]
    assert not argmin_on_stiefel(cost, (targets, metric), initial).point.requires_grad


def test_composes_with_layers_below_and_a_loss_above():
    """Through a layer below and a loss above, equal to differentiating the closed form."""
    weight, inputs = normal(4, 6).requires_grad_(), normal(6, 8)

    def loss(layer):
        return (layer(torch.tanh(weight @ inputs)) - 1).pow(2).cumsum(-1).sum()

    (ours,) = torch.autograd.grad(
        loss(lambda target: argmin_on_stiefel(published(1, 1).cost, (target,), start(4, 8), tolerance=1e-11).point),
        weight,
    )
    (exact,) = torch.autograd.grad(loss(polar_factor), weight)
    assert torch.allclose(ours, exact, atol=1e-8)


def test_a_singular_hessian_gives_the_gradient_of_least_norm_and_reports_it():
    """With equal weights the Brockett cost does not see rotations of the rows; reference: a dense pseudo-inverse."""
    matrix = brockett(3, 6).parameters[0].clone().requires_grad_()
    weights, upstream = torch.ones(3, dtype=torch.float64), normal(3, 6, seed=3)
    cost = brockett(3, 6).cost
    solution = argmin_on_stiefel(cost, (matrix, weights), start(3, 6), tolerance=1e-12)
    assert solution.adjoint.reason == "no backward pass yet"
    with pytest.warns(RuntimeWarning, match="singular"):
        (ours,) = torch.autograd.grad(solution.point, matrix, upstream)
    assert bool(solution.adjoint.singular)
    assert bool(solution.adjoint.converged)
    assert "minimal norm" in solution.adjoint.reason

    at = solution.point.detach()
    units = torch.eye(18, dtype=torch.float64).reshape(18, 3, 6)
    with torch.no_grad():
        model = SecondOrderModel(lambda point: cost(point, (matrix, weights)), at)
        dense = torch.stack([model.hessian(stiefel.project(at, unit)).flatten() for unit in units])
        tangent = torch.linalg.pinv(dense, rtol=1e-8) @ stiefel.project(at, upstream).flatten()
        (expected,) = model.parameter_gradients(-tangent.reshape(3, 6), [matrix])
    assert torch.allclose(ours, expected, atol=1e-8)


def test_a_regular_solution_is_recorded_as_such(recwarn):
    target = normal(3, 6).requires_grad_()
    solution = argmin_on_stiefel(published(1, 1).cost, (target,), start(3, 6))
    solution.point.pow(3).sum().backward()
    assert solution.adjoint.reason == "adjoint equation solved"
    assert not bool(solution.adjoint.singular)
    assert float(solution.adjoint.residual) < 1e-9
    assert not recwarn.list


def test_a_saddle_is_recorded_as_not_a_minimum():
    """The start has a row of the minimiser turned round: critical, and a maximum along some geodesic."""
    target = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    saddle = torch.tensor([[1.0, 0.0, 0.0], [0.0, -1.0, 0.0]], dtype=torch.float64)
    solution = argmin_on_stiefel(published(1, 1).cost, (target,), saddle)
    assert int(solution.iterations) == 0
    with pytest.warns(RuntimeWarning, match="negative curvature"):
        solution.point.backward(normal(2, 3))


def test_no_convergence_warns():
    problem = brockett(4, 12)
    with pytest.warns(RuntimeWarning, match="not converged: max_iterations = 1"):
        solution = argmin_on_stiefel(problem.cost, problem.parameters, start(4, 12), max_iterations=1)
    assert not bool(solution.converged)


def test_a_second_derivative_is_refused():
    target = normal(2, 4).requires_grad_()
    point = argmin_on_stiefel(published(1, 1).cost, (target,), start(2, 4)).point
    (first,) = torch.autograd.grad(point.pow(3).sum(), target, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_invalid_arguments_are_refused():
    cost, target = published(1, 1).cost, normal(2, 4)
    with pytest.raises(ValueError, match="parameters must be a tensor, or a tuple or list"):
        argmin_on_stiefel(cost, {"target": target}, start(2, 4))
    with pytest.raises(ValueError, match="parameters\\[1\\] must be a floating-point tensor, got int"):
        argmin_on_stiefel(cost, (target, 3), start(2, 4))
    with pytest.raises(ValueError, match="parameters\\[0\\] must be finite"):
        argmin_on_stiefel(cost, (target * float("inf"),), start(2, 4))
    hidden = target.clone().requires_grad_()
    with pytest.raises(ValueError, match="not among the parameters"):
        argmin_on_stiefel(lambda point, _: cost(point, (hidden,)), (target,), start(2, 4))
