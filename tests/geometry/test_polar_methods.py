"""The two methods of the polar factor and its gradient, spectral and by products, and their compiled operator."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from torch.autograd import gradcheck

from helpers import normal, simplex_gram
from neuralcollapse import nearest_simplex_etf, polar_factor, random_simplex_etf
from neuralcollapse.geometry.polar import decompose
from neuralcollapse.geometry.polar_iteration import IMMEDIATE, SIGN_POLYNOMIALS, ConvergenceCheck

METHODS = ["spectral", "products"]
ORTHONORMALITY = {torch.float32: 1e-5, torch.float64: 1e-12}
# ‖Q − Q₆₄‖_F/√m up to condition 1,000; what the spectrum leaves in fp64 grows with the square of the condition.
ACCURACY = {
    ("spectral", torch.float32): lambda _: 3e-5,
    ("products", torch.float32): lambda _: 3e-5,
    ("spectral", torch.float64): lambda condition: 1e-14 * condition**2 + 1e-12,
    ("products", torch.float64): lambda _: 1e-8,
}
CONDITIONS = [1, 1.5, 3, 10, 100, 1000]


def with_condition(rows: int, columns: int, condition: float) -> torch.Tensor:
    left, _ = torch.linalg.qr(normal(rows, rows, seed=1))
    right, _ = torch.linalg.qr(normal(columns, rows, seed=2))
    singular = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), rows, dtype=torch.float64)
    return left * singular @ right.T


def exact(matrix):
    """Q, U and s by SVD in fp64."""
    left, singular, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left @ right, left, singular


def exact_gradient(matrix, gradient):
    """∂A of formulas §1, entry by entry in the singular basis, in fp64."""
    factor, left, singular = exact(matrix)
    outer = left.T @ (gradient @ factor.T - factor @ gradient.T) @ left
    rotation = left @ (outer / (singular[:, None] + singular[None, :])) @ left.T @ factor
    return rotation + left / singular @ left.T @ (gradient - gradient @ factor.T @ factor)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("shape", [(9, 512), (20, 20), (99, 300), (300, 640)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_rows_are_orthonormal_and_the_factor_is_accurate(method, dtype, shape, condition):
    matrix = with_condition(*shape, condition).to(dtype)
    factor = polar_factor(matrix, method=method)
    assert (factor @ factor.mT - torch.eye(shape[0], dtype=dtype)).abs().max() <= ORTHONORMALITY[dtype]
    assert (factor - exact(matrix)[0]).norm() / shape[0] ** 0.5 <= ACCURACY[method, dtype](condition)


@pytest.mark.parametrize("condition", [2, 3, 3.9, 4.1, 6, 10, 15.5, 16.5, 99, 101])
def test_many_rows_in_fp32_keep_both_bounds_where_most_directions_are_the_least(condition):
    """The hardest spectrum for an fp32 Gram matrix, on both sides of the conditions at which the way changes."""
    singular = torch.full((300,), 1 / condition, dtype=torch.float64)
    singular[:40] = 1
    left, right = torch.linalg.qr(normal(300, 300, seed=1))[0], torch.linalg.qr(normal(640, 300, seed=2))[0]
    matrix = (left * singular @ right.T).float()
    factor = polar_factor(matrix)
    assert (factor @ factor.T - torch.eye(300)).abs().max() <= 1e-5
    assert (factor - exact(matrix)[0]).norm() / 300**0.5 <= 3e-5


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("shape", [(9, 512), (60, 200)])
@pytest.mark.parametrize("method", METHODS)
def test_gradient_is_the_formulas_at_every_condition(method, shape, condition):
    matrix, upstream = with_condition(*shape, condition), normal(*shape, seed=3)
    expected = exact_gradient(matrix, upstream)
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-5 * condition)):
        leaf = matrix.to(dtype).requires_grad_()
        (gradient,) = torch.autograd.grad(polar_factor(leaf, method=method), leaf, upstream.to(dtype))
        assert (gradient - expected).norm() / expected.norm() <= tolerance


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [(2, 1), (4, 3), (4, 15), (10, 64)])
def test_an_exact_etf_is_its_own_nearest_with_an_exact_gradient(size, method):
    etf = random_simplex_etf(*size, dtype=torch.float64)
    means = (3 * etf + 1).requires_grad_()
    assert torch.allclose(nearest_simplex_etf(means, method=method), etf, atol=1e-12)
    assert gradcheck(lambda means: nearest_simplex_etf(means, method=method), means)
    single = nearest_simplex_etf(means.detach().float(), method=method).double()
    assert (single @ single.T - simplex_gram(size[0])).abs().max() <= 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_equal_class_weights_change_neither_the_solution_nor_its_gradient(method):
    means, anchor = normal(10, 30).requires_grad_(), random_simplex_etf(10, 30, dtype=torch.float64)
    options = {"anchor": anchor, "proximal_weight": 0.3, "method": method}
    plain = nearest_simplex_etf(means, **options)
    weighted = nearest_simplex_etf(means, class_weights=torch.ones(10, dtype=torch.float64), **options)
    assert torch.allclose(plain, weighted, atol=1e-12)
    gradients = [torch.autograd.grad(etf, means, normal(10, 30, seed=5))[0] for etf in (plain, weighted)]
    assert torch.allclose(*gradients, atol=1e-12)
    batched = torch.func.vmap(lambda means: nearest_simplex_etf(means, method=method))(normal(3, 5, 8))
    assert torch.allclose(batched, nearest_simplex_etf(normal(3, 5, 8), method=method), atol=1e-11)


def test_an_svd_replaces_products_that_do_not_converge():
    for matrix in (with_condition(20, 50, 1e9), normal(20, 3) @ normal(3, 50, seed=1), torch.zeros(4, 9).double()):
        leaf = matrix.clone().requires_grad_()
        factor = polar_factor(leaf, method="products")
        assert (factor @ factor.mT - torch.eye(len(matrix))).abs().max() <= 1e-12
        factor.backward(normal(*matrix.shape, seed=2))
        assert torch.isfinite(leaf.grad).all()


def test_the_polynomials_are_minimax_and_end_at_the_sign():
    """Chebyshev: 1 − p has its greatest value with alternating signs at four points of each interval."""
    least, greatest = 1e-4, 1.0
    for index, (a, b, c) in enumerate(SIGN_POLYNOMIALS):
        roots = torch.tensor([(-3 * b + sign * (9 * b * b - 20 * a * c) ** 0.5) / (10 * c) for sign in (-1, 1)])
        points = torch.tensor([least, *roots.double().sqrt().sort().values, greatest], dtype=torch.float64)
        error = 1 - points * (a + b * points**2 + c * points**4)
        if index < 8:  # the last interval is too narrow to tell in fp64
            assert torch.allclose(error, error[0] * torch.tensor([1.0, -1, 1, -1]).double(), rtol=1e-4, atol=1e-12)
        least, greatest = 1 - float(error.abs().max()), 1 + float(error.abs().max())
    assert greatest - 1 < 1e-9


def test_a_deferred_check_takes_an_svd_a_fixed_number_of_solves_later(caplog):
    good, bad, check = with_condition(6, 20, 10), with_condition(6, 20, 1e9), ConvergenceCheck()

    def solve(matrix):
        return decompose(matrix, 0.0, True, check.handle)[0]

    def is_orthonormal(factor):
        return bool((factor @ factor.mT - torch.eye(6)).abs().max() < 1e-9)

    assert is_orthonormal(solve(bad))  # the first solve is checked at once
    assert check.fallbacks == 1
    with caplog.at_level(logging.WARNING, logger="neuralcollapse.geometry.polar_iteration"):
        assert is_orthonormal(solve(good))
        assert not is_orthonormal(solve(bad))  # not checked yet
        results = [is_orthonormal(solve(bad)) for _ in range(check.lag)]
    assert results == [False] * (check.lag - 2) + [True, True] or results[-1]
    assert check.fallbacks >= 2
    assert "polar factor by SVD" in caplog.text
    for _ in range(2 * check.lag):
        solve(good)
    before = check.fallbacks
    assert is_orthonormal(solve(good))
    assert check.fallbacks == before
    for twin in (copy.deepcopy(check), pickle.loads(pickle.dumps(check))):
        assert twin.handle != check.handle


@pytest.mark.parametrize("by_products", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("null", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 4), (5, 5), (5, 9), (5, 40), (2, 3, 7), (2, 2, 3, 30), (260, 600)])
def test_the_operator_passes_opcheck(shape, null, dtype, by_products):
    matrix = normal(*shape, dtype=dtype)
    matrix = matrix - matrix.mean(-2, keepdim=True) if null else matrix
    if shape[-2] == 1 and null:
        pytest.skip("no complement")
    torch.library.opcheck(torch.ops.neuralcollapse.polar_factor.default, (matrix, null, by_products, IMMEDIATE.handle))


def test_the_operator_passes_opcheck_if_rank_deficient():
    matrix = normal(5, 1) @ normal(1, 12, seed=1)
    torch.library.opcheck(torch.ops.neuralcollapse.polar_factor.default, (matrix, 0.0, False, 0))
