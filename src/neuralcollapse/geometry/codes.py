"""Codes: class vectors (K, r) that stand for their Gram matrix, to be rotated into feature space."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from neuralcollapse._checks import (
    check_at_least,
    check_factory,
    check_finite,
    check_floating,
    check_integers,
    compute_dtype,
)
from neuralcollapse.geometry.grams import check_semidefinite, check_square
from neuralcollapse.geometry.simplex import expand, reduce


def code_from_gram(gram: Tensor, feature_dim: int) -> Tensor:
    """A code L (K, r) with LLᵀ = Π G Π: class vectors of that Gram, less what is common to all of them.

    By eigenvectors of Π G Π; eigenvalues under K·eps times the greatest count as 0.

    Args:
        gram: G (K, K) floating, symmetric and positive semi-definite: negative eigenvalues up to 1e-6 of the greatest
            are dropped.
        feature_dim: d, which the rank r must not exceed.

    Returns:
        (K, r), r ≤ min(d, K−1), orthogonal columns of falling norm, in the dtype of ``gram``.

    Raises:
        ValueError: Another shape or kind; values that are not finite; a matrix that is not symmetric or not positive
            semi-definite (how far), or of rank above d (which rank); a class that has no direction of its own.

    Source: classical scaling (Torgerson, 1952).

    Examples:
        >>> from neuralcollapse.geometry import simplex_gram
        >>> code = code_from_gram(simplex_gram(4), feature_dim=8)
        >>> code.shape, bool(torch.allclose(code @ code.T, simplex_gram(4), atol=1e-6))
        (torch.Size([4, 3]), True)
    """
    check_floating("gram", gram)
    check_square("gram", gram)
    check_at_least("feature_dim", feature_dim, 1)
    wide = gram.double()
    wide = 0.5 * (wide + wide.T)
    check_semidefinite("gram", torch.linalg.eigvalsh(wide))
    centred = wide - wide.mean(0)
    centred = centred - centred.mean(1, keepdim=True)
    eigenvalues, vectors = torch.linalg.eigh(centred)
    kept = eigenvalues > len(gram) * torch.finfo(gram.dtype).eps * eigenvalues[-1].clamp_min(0)
    _check_rank("gram", int(kept.sum()), feature_dim)
    code = (vectors[:, kept] * eigenvalues[kept].sqrt()).flip(-1)
    _check_rows("gram", code, torch.finfo(gram.dtype).eps ** 0.5)
    return code.to(gram.dtype)


def seli_code(class_counts: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    r"""The classifier's code of imbalanced classes: the simplex-encoded-labels interpolation, SELI.

    With the simplex-encoded labels Z (K, N), whose column of a sample of class k is e_k − 1/K, and Z = V Λ Uᵀ, the
    max-margin classifier has the Gram V Λ Vᵀ ∝ (Π diag(n) Π)^(1/2). It is scaled to a mean squared norm of 1. At equal
    counts it is the simplex ETF; at K = 2 it is so for all counts.

    Args:
        class_counts: n (K,) integers, each at least 1.
        dtype: Floating dtype; the default dtype if not given.

    Returns:
        (K, K−1), of rank K−1.

    Raises:
        ValueError: Counts of another kind or shape, fewer than two, or one that is not positive.

    Source: Thrampoulidis, Kini, Vakilian, Behnia, "Imbalance Trouble" (NeurIPS 2022).

    Examples:
        >>> code = seli_code(torch.tensor([100, 100, 10]))
        >>> code.norm(dim=1)
        tensor([1.0548, 1.0548, 0.8803])
    """
    check_integers("class_counts", class_counts)
    check_factory(dtype, None)
    if class_counts.ndim != 1:
        raise ValueError(f"class_counts must be of shape (K,), got {tuple(class_counts.shape)}")
    check_at_least("num_classes", len(class_counts), 2)
    if bool((class_counts < 1).any()):
        empty = (class_counts < 1).nonzero().flatten().tolist()
        raise ValueError(f"class_counts must be at least 1, got {int(class_counts.min())} among classes {empty[:10]}")
    # Eigenvectors on the complement of 1, where Z Zᵀ = Π diag(n) Π is regular.
    half = expand(torch.eye(len(class_counts) - 1, dtype=torch.float64, device=class_counts.device))
    eigenvalues, vectors = torch.linalg.eigh(half.T @ (class_counts.double().unsqueeze(-1) * half))
    code = half @ vectors * eigenvalues.pow(0.25)
    code = code * (math.sqrt(len(code)) / torch.linalg.matrix_norm(code))
    return code.to(dtype or torch.get_default_dtype())


@torch.no_grad()
def code_of_means(class_means: Tensor, rank: int | Literal["auto"] = "auto") -> Tensor:
    r"""The tight code of the class means' own r leading directions.

    With the means centred, their rows scaled to norm 1, centred again and = U S Vᵀ, it is √(K/r) · U_r. The nearest
    frame of that code is the nearest tight frame of rank r that keeps the means' directions; at r = K−1, as at K = 2,
    it is the nearest simplex ETF. A class whose mean is the mean of all has a zero row before the second centring.

    Args:
        class_means: (K, d) floating.
        rank: r, from 1 to min(d, K−1); ``"auto"``: the exponential of the entropy of the squared singular values'
            shares, rounded (K−1 at collapse to an ETF), which waits for an accelerator.

    Returns:
        (K, r), detached, in the dtype of ``class_means``.

    Raises:
        ValueError: Means of another shape or kind, or not finite; or a rank out of range.

    Source: this project; the effective rank after Roy and Vetterli (2007).

    Examples:
        >>> from neuralcollapse import simplex_etf
        >>> code_of_means(simplex_etf(5, 8)).shape, code_of_means(simplex_etf(5, 8), rank=2).shape
        (torch.Size([5, 4]), torch.Size([5, 2]))
    """
    check_floating("class_means", class_means)
    if class_means.ndim != 2:
        raise ValueError(f"class_means must be of shape (K, d), got {tuple(class_means.shape)}")
    num_classes, feature_dim = class_means.shape
    check_at_least("num_classes", num_classes, 2)
    check_at_least("feature_dim", feature_dim, 1)
    check_code_rank(rank, num_classes, feature_dim)
    check_finite("class_means", class_means)
    means = class_means.to(compute_dtype(class_means.dtype))
    if not bool(means.sub(means[0]).any()):
        raise ValueError("class_means must not be all equal")
    return leading_code(means, rank).to(class_means.dtype)


def check_code_rank(rank: object, num_classes: int, feature_dim: int) -> None:
    """Raise unless it is ``"auto"`` or a rank that class means can have."""
    if isinstance(rank, str) and rank == "auto":
        return
    greatest = min(feature_dim, num_classes - 1)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= greatest:
        raise ValueError(f"rank must be 'auto' or an integer from 1 to min(d, K-1) = {greatest}, got {rank!r}")


def leading_code(means: Tensor, rank: int | Literal["auto"]) -> Tensor:
    """`code_of_means` behind its door, of fp32 or fp64 means."""
    wide = means.detach().double()
    centred = wide - wide.mean(0)
    norms = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    rounding = 4 * torch.finfo(means.dtype).eps * torch.linalg.vector_norm(wide, dim=1).amax()
    rows = reduce(centred / torch.where(norms > rounding, norms, math.inf))
    if len(rows) <= rows.shape[1]:
        eigenvalues, left = torch.linalg.eigh(rows @ rows.T)
        squares, left = eigenvalues.flip(-1).clamp_min(0), left.flip(-1)
    else:
        left, singular, _ = torch.linalg.svd(rows, full_matrices=False)
        squares = singular.square()
    kept = rank if isinstance(rank, int) else _effective_rank(squares)
    return (math.sqrt(len(means) / kept) * expand(left[:, :kept])).to(means.dtype)


def _effective_rank(squares: Tensor) -> int:
    """The exponential of the entropy of their shares, rounded; all of them where they are all zero."""
    total = squares.sum()
    if not bool(total > 0):
        return len(squares)
    return max(1, round(math.exp(float(torch.special.entr(squares / total).sum()))))


def check_code(code: Tensor, num_classes: int | None = None) -> None:
    """Raise unless it is a constant code (K, r), of K classes where that is given."""
    check_floating("code", code)
    if code.ndim != 2 or (num_classes is not None and len(code) != num_classes):
        expected = "(K, r)" if num_classes is None else f"(K, r) with K = {num_classes}"
        raise ValueError(f"code must be of shape {expected}, got {tuple(code.shape)}")
    check_at_least("num_classes", len(code), 2)
    if code.requires_grad:
        raise ValueError("code must not require a gradient, since it is taken as a constant: give code.detach()")
    check_finite("code", code)


def principal_code(code: Tensor, feature_dim: int) -> Tensor:
    """A checked code, centred, in its r principal coordinates: orthogonal columns of falling norm, (K, r), in fp64.

    Raises:
        ValueError: A zero row, before or after centring, or a rank above d.
    """
    eps = torch.finfo(code.dtype).eps
    wide = code.double()
    _check_rows("code", wide, 0.0)
    centred = wide - wide.mean(0)
    left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
    kept = singular > max(code.shape) * eps * torch.linalg.matrix_norm(wide, 2)
    _check_rank("code", int(kept.sum()), feature_dim)
    principal = left[:, kept] * singular[kept]
    _check_rows("code", principal, 4 * eps * math.sqrt(len(code)))
    return principal


def coordinates(code: Tensor, frame: Tensor) -> Tensor:
    """Q of a frame LQ (..., K, d) of a code L with orthogonal columns: diag(‖l_j‖⁻²) Lᵀ (LQ)."""
    return (code / code.square().sum(-2)).mT @ frame


def _check_rank(name: str, rank: int, feature_dim: int) -> None:
    if rank == 0:
        raise ValueError(
            f"{name} must tell classes apart, got nothing but what is common to all (rank 0 after centring)"
        )
    if rank > feature_dim:
        raise ValueError(f"{name} must have, after centring, a rank of at most feature_dim = {feature_dim}, got {rank}")


def _check_rows(name: str, rows: Tensor, tolerance: float) -> None:
    """Raise if a class has no direction: a zero row."""
    norms = torch.linalg.vector_norm(rows, dim=1)
    least = int(norms.argmin())
    if not float(norms[least]) > tolerance * float(norms.max()):
        raise ValueError(f"{name} must give every class a direction, got a zero row for class {least}")
