"""Simplex equiangular tight frame (ETF), and the Helmert basis in which it is expressed.

Every unit simplex ETF of K vectors is E = √(K/(K−1)) B Q with Q (K−1, d) of orthonormal rows and B (K, K−1)
an orthonormal basis of the complement of the all-ones vector. The columns of the Helmert basis are
b_j = (1, …, 1, −j, 0, …, 0)/√(j(j+1)), which begin with j ones, so that products with it are cumulative sums.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neuralcollapse._checks import check_at_least, check_etf_sizes, check_factory, compute_dtype, values_readable


def simplex_etf(
    num_classes: int,
    feature_dim: int | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the canonical unit simplex ETF: unit rows with pairwise cosine −1/(K−1).

    For d ≥ K it is √(K/(K−1)) (I − 11ᵀ/K) padded with zero columns; for d = K−1 it consists of the same vectors in
    Helmert coordinates, √(K/(K−1)) B.

    Args:
        num_classes: K ≥ 2.
        feature_dim: d ≥ K−1; K if not given.
        dtype: Floating dtype; the default dtype if not given.
        device: Device of the result.

    Returns:
        (K, d).

    Raises:
        ValueError: if K < 2, d < K−1, the dtype is not floating, or the device is unknown.

    Source: Papyan, Han, Donoho (PNAS 2020), definition of the simplex ETF.

    Examples:
        >>> etf = simplex_etf(3)
        >>> etf @ etf.T
        tensor([[ 1.0000, -0.5000, -0.5000],
                [-0.5000,  1.0000, -0.5000],
                [-0.5000, -0.5000,  1.0000]])
    """
    feature_dim = num_classes if feature_dim is None else feature_dim
    check_etf_sizes(num_classes, feature_dim)
    check_factory(dtype, device)
    dtype = dtype or torch.get_default_dtype()
    if feature_dim == num_classes - 1:
        etf = expand(torch.eye(feature_dim, dtype=compute_dtype(dtype), device=device))
    else:
        etf = torch.zeros(num_classes, feature_dim, dtype=compute_dtype(dtype), device=device)
        etf.fill_diagonal_(1)
        etf[:, :num_classes] -= 1 / num_classes
    return etf.mul_(math.sqrt(num_classes / (num_classes - 1))).to(dtype)


def random_simplex_etf(
    num_classes: int,
    feature_dim: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return a unit simplex ETF E with Haar-uniform orientation: E U has the same distribution for any orthogonal U.

    The orthonormal factor of a Gaussian matrix is Haar-uniform if the signs of its columns make the diagonal of the
    triangular factor positive.

    Args:
        num_classes: K ≥ 2.
        feature_dim: d ≥ K−1.
        generator: Source of randomness, on ``device``.
        dtype: Floating dtype; the default dtype if not given.
        device: Device of the result.

    Returns:
        (K, d).

    Raises:
        ValueError: if K < 2, d < K−1, the dtype is not floating, the device is unknown, or the generator has the wrong
            type or is on another device.

    Source: Mezzadri, "How to generate random matrices from the classical compact groups" (2007).

    Examples:
        >>> etf = random_simplex_etf(4, 8, generator=torch.Generator().manual_seed(0))
        >>> etf.shape, round(float(etf[0] @ etf[1]), 4)
        (torch.Size([4, 8]), -0.3333)
    """
    check_etf_sizes(num_classes, feature_dim)
    check_factory(dtype, device, generator)
    dtype = dtype or torch.get_default_dtype()
    gaussian = torch.randn(feature_dim, num_classes - 1, generator=generator, dtype=compute_dtype(dtype), device=device)
    orthonormal, triangular = torch.linalg.qr(gaussian)
    haar = orthonormal * triangular.diagonal().sign()
    return (math.sqrt(num_classes / (num_classes - 1)) * expand(haar.mT)).to(dtype)


def simplex_basis(
    num_classes: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Return the Helmert basis B (K, K−1) as a matrix: orthonormal columns, each orthogonal to the all-ones vector.

    Products do not need the matrix: `reduce` applies Bᵀ and `expand` applies B in O(Kd).

    Args:
        num_classes: K ≥ 2.
        dtype: Floating dtype; the default dtype if not given.
        device: Device of the result.

    Returns:
        (K, K−1).

    Raises:
        ValueError: if K < 2, the dtype is not floating, or the device is unknown.

    Examples:
        >>> simplex_basis(3)
        tensor([[ 0.7071,  0.4082],
                [-0.7071,  0.4082],
                [ 0.0000, -0.8165]])
    """
    check_at_least("num_classes", num_classes, 2)
    check_factory(dtype, device)
    return expand(torch.eye(num_classes - 1, dtype=dtype, device=device))


def check_simplex_etf(name: str, etf: Tensor) -> None:
    """Raise unless (..., K, d) class vectors are a unit simplex ETF; skipped if values are unreadable.

    The product of the Gram matrix with a fixed vector is compared with that of K/(K−1) Π (Freivalds' check), in O(Kd)
    and without forming a (K, K) matrix.
    """
    if not values_readable(etf):
        return
    exact = etf.detach().to(compute_dtype(etf.dtype))
    num_classes = exact.shape[-2]
    ratio, share = num_classes / (num_classes - 1), num_classes // 2 / num_classes
    probed = exact @ exact[..., 1::2, :].sum(-2, keepdim=True).mT  # product with the vector 0, 1, 0, 1, …
    tolerance = 1e-3 if etf.dtype == exact.dtype else 3e-2
    # Uses Python floats, because each operation on tensors would take as long as the product.
    expected = [-ratio * share, ratio * (1 - share)]
    values = probed.flatten().tolist()
    if not all(abs(value - expected[index % num_classes % 2]) <= tolerance for index, value in enumerate(values)):
        raise ValueError(f"{name} must be a unit simplex ETF: unit rows with pairwise cosine -1/(K-1)")


def reduce(class_vectors: Tensor) -> Tensor:
    """Return Bᵀ X, the coordinates (..., K−1, d) of (..., K, d) class vectors after centring.

    Examples:
        >>> reduce(torch.ones(3, 2))
        tensor([[0., 0.],
                [0., 0.]])
    """
    index, length = _helmert(class_vectors, class_vectors.shape[-2])
    return (class_vectors.cumsum(-2)[..., :-1, :] - index * class_vectors[..., 1:, :]) / length


def expand(coordinates: Tensor) -> Tensor:
    """Return B Y, the class vectors (..., K, d) with zero mean of given coordinates (..., K−1, d).

    Examples:
        >>> expand(torch.tensor([[2.0**0.5]]))
        tensor([[ 1.],
                [-1.]])
    """
    index, length = _helmert(coordinates, coordinates.shape[-2] + 1)
    scaled = coordinates / length
    sums = scaled.flip(-2).cumsum(-2).flip(-2)
    zero = torch.zeros_like(scaled[..., :1, :])
    return torch.cat([sums, zero], -2) - torch.cat([zero, index * scaled], -2)


def _helmert(like: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return the column index j = 1 … K−1 and the length √(j(j+1)), as columns."""
    index = torch.arange(1, num_classes, dtype=like.dtype, device=like.device).unsqueeze(-1)
    return index, (index * (index + 1)).sqrt()
