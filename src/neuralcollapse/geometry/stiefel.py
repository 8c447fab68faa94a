"""Stiefel manifold of matrices with orthonormal rows, as a submanifold of Euclidean space.

A point Q (p, d), p ≤ d, satisfies QQᵀ = I. For a tangent vector V at Q, VQᵀ is skew-symmetric. The inner product is
that of Euclidean space. All functions accept leading batch dimensions.

Source: Absil, Mahony, Sepulchre, Optimization Algorithms on Matrix Manifolds (2008); Absil, Mahony, Trumpf, "An
extrinsic look at the Riemannian Hessian" (2013).
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuralcollapse._checks import check_at_least, check_finite, check_floating, compute_dtype
from neuralcollapse.geometry.polar import polar_factor


def inner(first: Tensor, second: Tensor) -> Tensor:
    """Return ⟨X, Y⟩ of (..., p, d) matrices, as (..., 1, 1) so that it broadcasts with them.

    Examples:
        >>> inner(torch.ones(2, 3), torch.ones(2, 3))
        tensor([[6.]])
    """
    product: Tensor = torch.linalg.vecdot(first.flatten(-2), second.flatten(-2))
    return product[..., None, None]


def symmetric(square: Tensor) -> Tensor:
    """Return the symmetric part ½(X + Xᵀ)."""
    return 0.5 * (square + square.mT)


def project(point: Tensor, ambient: Tensor) -> Tensor:
    """Return the tangent vector at Q that is nearest to Z: Z − ½(ZQᵀ + QZᵀ)Q.

    Args:
        point: Q, (..., p, d).
        ambient: Z, (..., p, d).

    Returns:
        (..., p, d).

    Examples:
        >>> project(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([[0., 4.]])
    """
    return ambient - symmetric(ambient @ point.mT) @ point


def retract(point: Tensor, tangent: Tensor) -> Tensor:
    """Return the point reached from Q along V: the orthonormal factor of Q + V, as in a QR decomposition.

    It is computed from a Cholesky factor of (Q+V)(Q+V)ᵀ = I + VVᵀ. This matrix is never close to singular, so the
    method is as accurate as Householder's QR; it takes two matrix products.

    Args:
        point: Q, (..., p, d).
        tangent: V, (..., p, d), tangent at Q.

    Returns:
        (..., p, d).

    Examples:
        >>> retract(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.75]]))
        tensor([[0.8000, 0.6000]])
    """
    moved = point + tangent
    factor, _ = torch.linalg.cholesky_ex(moved @ moved.mT)
    reached: Tensor = torch.linalg.solve_triangular(factor, moved, upper=False)
    return reached.contiguous()  # so that a solution gives the same numbers after saving and loading


def distance(first: Tensor, second: Tensor) -> Tensor:
    """Return the chordal distance ‖Q₁ − Q₂‖_F, (...) of (..., p, d).

    Examples:
        >>> distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]]))
        tensor(0.8944)
    """
    chord: Tensor = torch.linalg.matrix_norm(first - second)
    return chord


def random_point(
    *shape: int,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return a Haar-uniform point: the polar factor of a Gaussian matrix.

    Args:
        *shape: ..., p, d with p ≤ d.
        generator: Source of randomness, on ``device``.
        dtype: Floating dtype; the default dtype if not given.
        device: Device of the result.

    Returns:
        Tensor of the given shape, rows orthonormal.

    Raises:
        ValueError: if there are fewer than two sizes, a size is below 1, or p > d.

    Examples:
        >>> point = random_point(2, 4, generator=torch.Generator().manual_seed(0))
        >>> bool(torch.allclose(point @ point.T, torch.eye(2), atol=1e-6))
        True
    """
    if len(shape) < 2:
        raise ValueError(f"shape must be (..., p, d), got {shape}")
    for size in shape:
        check_at_least("every size of shape", size, 1)
    if shape[-2] > shape[-1]:
        raise ValueError(f"shape must be (..., p, d) with p <= d, got {shape}")
    dtype = dtype or torch.get_default_dtype()
    gaussian = torch.randn(shape, generator=generator, dtype=compute_dtype(dtype), device=device)
    return polar_factor(gaussian, check_values=False).to(dtype)


def check_point(point: Tensor, name: str = "point") -> None:
    """Raise unless the rows of every matrix are orthonormal, up to the square root of the resolution of the dtype.

    Args:
        point: (..., p, d) of fp32 or fp64.
        name: Name of the argument in the message.

    Raises:
        ValueError: if the dtype or shape is wrong, values are not finite, or rows are not orthonormal; the message
            names the row or pair of rows with the greatest error.

    Examples:
        >>> check_point(torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
        Traceback (most recent call last):
        ...
        ValueError: point must have orthonormal rows; rows 0 and 1 have inner product 0.6
    """
    check_floating(name, point)
    if point.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} must be of float32 or float64, got {point.dtype}")
    if point.ndim < 2 or not 1 <= point.shape[-2] <= point.shape[-1]:
        raise ValueError(f"{name} must be of shape (..., p, d) with 1 <= p <= d, got {tuple(point.shape)}")
    if point.numel() == 0:
        raise ValueError(f"{name} must hold at least one matrix, got shape {tuple(point.shape)}")
    check_finite(name, point)
    point = point.detach()
    gram = point @ point.mT
    excess = gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    worst = int(excess.abs().argmax())
    if abs(float(excess.flatten()[worst])) <= torch.finfo(point.dtype).eps ** 0.5:
        return
    index = torch.unravel_index(torch.tensor(worst), gram.shape)
    *batch, row, other = (int(i) for i in index)
    value = float(gram.flatten()[worst])
    where = f" of matrix {tuple(batch)}" if batch else ""
    finding = (
        f"row {row}{where} has norm {max(value, 0) ** 0.5:.9g}"
        if row == other
        else f"rows {row} and {other}{where} have inner product {value:.6g}"
    )
    raise ValueError(f"{name} must have orthonormal rows; {finding}")
