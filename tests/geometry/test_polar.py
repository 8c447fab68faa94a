from __future__ import annotations

import pytest
import scipy.linalg
import torch
from torch.autograd import gradcheck

from helpers import normal
from neuralcollapse import polar_factor

ORTHONORMALITY = {torch.float32: 1e-5, torch.float64: 1e-12}
SHAPES = [(1, 1), (1, 6), (5, 5), (5, 9), (5, 10), (9, 512), (40, 41), (99, 300)]


def with_condition(rows: int, columns: int, condition: float) -> torch.Tensor:
    left, _ = torch.linalg.qr(normal(rows, rows, seed=1))
    right, _ = torch.linalg.qr(normal(columns, rows, seed=2))
    singular = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), rows, dtype=torch.float64)
    return left * singular @ right.T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_scipy(shape, dtype):
    matrix = normal(*shape)
    expected = torch.from_numpy(scipy.linalg.polar(matrix.numpy(), side="left")[0])
    assert torch.allclose(
        polar_factor(matrix.to(dtype)).double(), expected, atol=2e-5 if dtype == torch.float32 else 1e-12
    )


@pytest.mark.parametrize("condition", [1, 1e2, 1e4, 1e6, 1e12])
@pytest.mark.parametrize("shape", [(20, 20), (20, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_are_orthonormal_at_any_condition(shape, condition, dtype):
    factor = polar_factor(with_condition(*shape, condition).to(dtype))
    assert (factor @ factor.mT - torch.eye(shape[0], dtype=dtype)).abs().max() <= ORTHONORMALITY[dtype]


@pytest.mark.parametrize("condition", [1, 30, 1e2, 1e3, 1e4])
def test_error_grows_no_faster_than_the_condition(condition):
    matrix = with_condition(20, 200, condition)
    expected = torch.from_numpy(scipy.linalg.polar(matrix.numpy(), side="left")[0])
    assert (polar_factor(matrix) - expected).abs().max() <= 1e-14 * condition + 1e-12
    rounded = matrix.float()
    expected = torch.from_numpy(scipy.linalg.polar(rounded.double().numpy(), side="left")[0])
    assert (polar_factor(rounded) - expected).abs().max() <= 1e-6 * condition


@pytest.mark.parametrize("rank", [0, 1, 4])
@pytest.mark.parametrize("shape", [(5, 6), (5, 40)])
def test_rank_deficiency_gives_orthonormal_rows_and_finite_gradients(shape, rank):
    matrix = (normal(shape[0], rank) @ normal(rank, shape[1], seed=1)).requires_grad_()
    factor = polar_factor(matrix)
    assert (factor @ factor.mT - torch.eye(shape[0])).abs().max() < 1e-12
    factor.backward(normal(*shape, seed=2))
    assert torch.isfinite(matrix.grad).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 3), (3, 4), (3, 9), (2, 3, 7)])
def test_gradient_is_exact(shape):
    assert gradcheck(polar_factor, normal(*shape).requires_grad_())


@pytest.mark.parametrize("shape", [(4, 4), (4, 5), (4, 12)])
def test_gradient_is_exact_at_equal_singular_values(shape):
    """Where differentiating through an SVD gives NaN."""
    orthonormal = torch.linalg.qr(normal(*shape[::-1]))[0].mT.contiguous().requires_grad_()
    left, _, right = torch.linalg.svd(orthonormal, full_matrices=False)
    (naive,) = torch.autograd.grad(left @ right, orthonormal, normal(*shape, seed=1))
    assert not torch.allclose(
        naive, torch.autograd.grad(polar_factor(orthonormal), orthonormal, normal(*shape, seed=1))[0]
    )
    assert gradcheck(polar_factor, orthonormal)


def test_singular_values_that_fp32_cannot_tell_apart_are_solved_in_fp64(monkeypatch):
    """LAPACK's fp32 SVD fails on some matrices of unconstrained features at collapse; here it is made to fail."""
    solve, tried = torch.linalg.svd, []

    def svd(matrix, **options):
        tried.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("failed to converge")
        return solve(matrix, **options)

    matrix = with_condition(20, 25, 1.001).float()
    expected = polar_factor(matrix)
    monkeypatch.setattr(torch.linalg, "svd", svd)
    assert torch.allclose(polar_factor(matrix), expected, atol=1e-6)
    assert tried == [torch.float32, torch.float64]


def test_batches_equal_one_by_one():
    matrices = normal(2, 3, 4, 11)
    expected = torch.stack([torch.stack([polar_factor(matrix) for matrix in row]) for row in matrices])
    assert torch.allclose(polar_factor(matrices), expected, atol=1e-13)


def test_vmap_of_values_and_gradients_equals_batches():
    matrices, weights = normal(6, 4, 11), normal(6, 4, 11, seed=1)
    assert torch.allclose(torch.func.vmap(polar_factor)(matrices), polar_factor(matrices), atol=1e-13)

    def objective(matrix, weight):
        return (polar_factor(matrix) * weight).sum()

    expected = torch.stack([torch.func.grad(objective)(*pair) for pair in zip(matrices, weights, strict=True)])
    actual = torch.func.vmap(torch.func.grad(objective))(matrices, weights)
    assert torch.allclose(actual, expected, atol=1e-12)
    last = torch.func.vmap(polar_factor, in_dims=2, out_dims=2)(matrices.permute(1, 2, 0))
    assert torch.allclose(last.permute(2, 0, 1), polar_factor(matrices), atol=1e-13)


def test_a_second_derivative_raises_a_clear_error():
    matrix = normal(3, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(polar_factor(matrix)[0, 0], matrix, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        gradient.sum().backward()


def test_compiles_whole():
    matrix = normal(4, 9).requires_grad_()
    compiled = torch.compile(polar_factor, fullgraph=True, backend="aot_eager")(matrix)
    assert torch.allclose(compiled, polar_factor(matrix))
    (actual,) = torch.autograd.grad(compiled, matrix, normal(4, 9, seed=1))
    (expected,) = torch.autograd.grad(polar_factor(matrix), matrix, normal(4, 9, seed=1))
    assert torch.allclose(actual, expected)


def test_bfloat16_is_computed_in_fp32():
    matrix = normal(3, 8).bfloat16()
    assert torch.equal(polar_factor(matrix), polar_factor(matrix.float()).bfloat16())


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.zeros(3), r"matrix must be of shape \(\.\.\., m, n\) with 1 <= m <= n, got \(3,\)"),
        (torch.zeros(4, 3), r"got \(4, 3\)"),
        (torch.full((2, 3), float("nan")), "matrix must be finite"),
        (torch.zeros(2, 3, dtype=torch.int64), "matrix must be a floating-point tensor, got torch.int64"),
    ],
)
def test_bad_input_is_named(matrix, message):
    with pytest.raises(ValueError, match=message):
        polar_factor(matrix)
