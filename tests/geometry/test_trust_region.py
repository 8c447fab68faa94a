from __future__ import annotations

import itertools
import logging
import math

import pymanopt
import pytest
import torch
from pymanopt.manifolds import Stiefel
from pymanopt.optimizers import TrustRegions

from geometry.riemannian_costs import PROBLEMS, published
from helpers import generator, normal
from neuralcollapse import nearest_simplex_etf, polar_factor
from neuralcollapse.geometry import minimize_on_stiefel, stiefel
from neuralcollapse.geometry.published import frame_to_etf, published_nearest_frame
from neuralcollapse.geometry.simplex import expand, reduce
from neuralcollapse.geometry.trust_region import Stop


def start(*shape, seed=5):
    return stiefel.random_point(*shape, generator=generator(seed), dtype=torch.float64)


def solve(problem, initial, **solver):
    return minimize_on_stiefel(lambda point: problem.cost(point, problem.parameters), initial, **solver)


def pymanopt_minimum(problem, initial):
    manifold = Stiefel(problem.columns, problem.rows)

    def array(function):
        def transposed(*matrices):
            result = function(*(torch.from_numpy(matrix.T.copy()) for matrix in matrices))
            return result.T.numpy() if result.ndim else float(result)

        return pymanopt.function.numpy(manifold)(transposed)

    posed = pymanopt.Problem(
        manifold,
        array(lambda point: problem.cost(point, problem.parameters)),
        euclidean_gradient=array(problem.gradient),
        euclidean_hessian=array(problem.hessian),
    )
    solver = TrustRegions(max_iterations=300, min_gradient_norm=1e-9, verbosity=0)
    return solver.run(posed, initial_point=initial.T.numpy()).cost


@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("size", [(1, 4), (3, 8), (9, 20)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_finds_the_minimum_that_pymanopt_finds(kind, size, seed):
    problem, initial = PROBLEMS[kind](*size, seed=seed), start(*size, seed=seed + 10)
    if kind == "unbalanced Procrustes":  # it has several minima: start near the one that pymanopt finds
        initial = polar_factor(problem.parameters[0])
    solution = solve(problem, initial, tolerance=1e-9)
    assert bool(solution.converged), solution.reason
    assert float(solution.cost) == pytest.approx(pymanopt_minimum(problem, initial), rel=1e-10)
    stiefel.check_point(solution.point)


def test_finds_the_eigenvectors_of_a_brockett_cost():
    problem = PROBLEMS["brockett"](3, 8)
    matrix, weights = problem.parameters
    eigenvalues = torch.linalg.eigvalsh(0.5 * (matrix + matrix.mT))
    solution = solve(problem, start(3, 8), tolerance=1e-9)
    assert float(solution.cost) == pytest.approx(float(weights @ eigenvalues[:3]), rel=1e-12)


@pytest.mark.parametrize("proximal_weight", [0.0, 0.7])
def test_the_reduced_nearest_etf_cost_has_the_closed_form_as_minimum(proximal_weight):
    means, anchor = normal(10, 16), nearest_simplex_etf(normal(10, 16, seed=1))
    unit = reduce(means) / reduce(means).norm()
    before = math.sqrt(9 / 10) * reduce(anchor)

    def cost(point):
        data = 9 / 2 * (unit - point / 3).square().sum((-2, -1))
        return data + proximal_weight / 2 * (point - before).square().sum((-2, -1))

    solution = minimize_on_stiefel(cost, start(9, 16), tolerance=1e-11)
    etf = math.sqrt(10 / 9) * expand(solution.point)
    expected = nearest_simplex_etf(means, anchor=anchor, proximal_weight=proximal_weight)
    assert bool(solution.converged)
    assert (etf - expected).norm() < 1e-8


def test_the_published_problem_has_the_closed_form_as_solution():
    means = normal(6, 10)
    first = published_nearest_frame(means, proximal_weight=0.0, tolerance=1e-11)
    assert (frame_to_etf(first.point) - nearest_simplex_etf(means)).norm() < 1e-8
    moved = means + 0.1 * normal(6, 10, seed=1)
    centred = moved - moved.mean(0)
    for weight in (1e-3, 1.0):  # linear in P as well: the polar factor of the posed problem's own matrix
        solved = published_nearest_frame(moved, first.point, proximal_weight=weight, tolerance=1e-11)
        matrix = 2 / math.sqrt(5) * centred / centred.norm() + weight * first.point
        assert (solved.point - polar_factor(matrix)).norm() < 1e-6
    with pytest.raises(ValueError, match="feature_dim must be at least num_classes = 6, got 5"):
        published_nearest_frame(normal(6, 5))
    with pytest.raises(ValueError, match="all equal"):
        published_nearest_frame(torch.ones(3, 5))


def test_a_batch_is_solved_like_its_single_problems():
    """Each has its own radius and stopping test: one starts solved, one starts far, one is scaled by 1000."""
    targets = torch.stack([normal(3, 6), normal(3, 6, seed=1), 1000 * normal(3, 6, seed=2)])
    initial = torch.stack([polar_factor(targets[0]), start(3, 6), start(3, 6, seed=6)])
    together = minimize_on_stiefel(
        lambda point: 0.5 * (targets - point).square().sum((-2, -1)), initial, tolerance=1e-8
    )
    assert together.converged.tolist() == [True, True, True]
    assert int(together.iterations[0]) == 0
    assert "3 of 3" in together.reason
    for index in range(3):
        alone = minimize_on_stiefel(
            lambda point, target=targets[index]: 0.5 * (target - point).square().sum((-2, -1)),
            initial[index],
            tolerance=1e-8,
        )
        assert torch.allclose(alone.point, together.point[index], atol=1e-9)
        assert int(alone.iterations) == int(together.iterations[index])


def test_leading_dimensions_can_be_several():
    targets = normal(2, 3, 4, 7)
    solution = minimize_on_stiefel(lambda point: -(targets * point).sum((-2, -1)), start(2, 3, 4, 7), tolerance=1e-9)
    assert solution.converged.shape == (2, 3)
    assert torch.allclose(solution.point, polar_factor(targets), atol=1e-8)


def test_the_cost_never_rises():
    problem = PROBLEMS["brockett"](4, 12)
    solution = solve(problem, start(4, 12))
    shorter = [solve(problem, start(4, 12), max_iterations=count) for count in range(int(solution.iterations) + 1)]
    assert [int(each.iterations) for each in shorter] == list(range(len(shorter)))
    costs = [float(each.cost) for each in shorter]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(costs))
    assert costs[-1] == float(solution.cost)


def test_the_log_has_objective_gradient_norm_distance_and_the_reason_for_stopping(caplog):
    with caplog.at_level(logging.DEBUG, logger="neuralcollapse.geometry.trust_region"):
        solve(published(2, 5), start(2, 5))
    assert all(word in caplog.messages[0] for word in ("objective", "gradient norm", "distance to the last point"))
    assert "within the tolerance" in caplog.messages[-1]


def test_converges_in_single_precision():
    target = normal(5, 9, dtype=torch.float32)
    solution = minimize_on_stiefel(lambda point: -(target * point).sum((-2, -1)), start(5, 9).float())
    assert solution.point.dtype == torch.float32
    assert bool(solution.converged), solution.reason
    assert torch.allclose(solution.point, polar_factor(target), atol=1e-3)


def test_running_out_of_iterations_is_reported():
    solution = solve(PROBLEMS["brockett"](4, 12), start(4, 12), max_iterations=1)
    assert not bool(solution.converged)
    assert int(solution.status) == Stop.MAX_ITERATIONS
    assert "max_iterations = 1 reached" in solution.reason


def test_a_cost_with_a_kink_stalls_and_reports_it():
    """|q₀| has a kink: the gradient norm never falls."""
    solution = minimize_on_stiefel(
        lambda point: point[..., 0].abs().sum(-1), torch.tensor([[0.6, 0.8]], dtype=torch.float64), tolerance=1e-6
    )
    assert not bool(solution.converged)
    assert int(solution.status) in (Stop.STALLED, Stop.MAX_ITERATIONS)
    assert float(solution.cost) < 1e-6


def test_points_where_the_cost_is_nan_are_avoided():
    """log q₀ is NaN beyond the start's half-circle."""
    solution = minimize_on_stiefel(
        lambda point: -point[..., 0, 0].log() + 0.5 * point[..., 0, 1],
        polar_factor(torch.tensor([[0.02, -1.0]]).double()),
    )
    assert bool(solution.converged)
    angle = torch.linspace(-math.pi / 2 + 1e-6, math.pi / 2 - 1e-6, 200001, dtype=torch.float64)
    assert float(solution.cost) == pytest.approx(float((-angle.cos().log() + 0.5 * angle.sin()).min()), abs=1e-8)


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        (lambda point: point, "one value per problem, a tensor of shape \\(\\) .* got \\(2, 5\\)"),
        (lambda point: 1.0, "one value per problem.* got float"),
        (lambda point: point.sum((-2, -1)) * float("nan"), "finite at initial"),
        (lambda point: point.detach().sum((-2, -1)), "differentiably"),
    ],
)
def test_invalid_costs_are_refused(cost, message):
    with pytest.raises(ValueError, match=message):
        minimize_on_stiefel(cost, start(2, 5))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tolerance": -1.0}, "tolerance must be"),
        ({"tolerance": "small"}, "tolerance must be"),
        ({"max_iterations": -1}, "max_iterations must be at least 0"),
        ({"max_iterations": 1.5}, "max_iterations must be an integer"),
        ({"max_inner_iterations": 0}, "max_inner_iterations must be at least 1"),
    ],
)
def test_invalid_settings_are_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        solve(published(2, 5), start(2, 5), **wrong)


def test_a_start_off_the_manifold_is_refused():
    with pytest.raises(ValueError, match="initial must have orthonormal rows; row 0 has norm 2"):
        solve(published(2, 5), 2 * torch.eye(2, 5).double())
