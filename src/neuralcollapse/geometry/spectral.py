"""The polar factor and its derivative by eigenvectors of the Gram matrix, or by an SVD: the way on a CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The Gram matrix is worth its squared condition number only when the SVD is much dearer.
_GRAM_ASPECT = 2
# Least ratio of extreme eigenvalues of the fp64 Gram matrix at which its error, eps·condition², is within the dtype's.
_GRAM_RATIO = {torch.float32: 1e-8, torch.float64: 1e-4}
# From this many rows on an fp32 Gram matrix and its eigenvectors, at half the price, are worth a look at the condition.
_SINGLE_ROWS = 256
# The ratio at which those are as good as fp32 asks for, that at which their Q is orthonormal without a polish, and
# that at which a product with the fp32 inverse root is.
_SINGLE_RATIO, _SINGLE_ORTHONORMAL_RATIO, _SINGLE_PRODUCT_RATIO = 1 / 256, 1 / 16, 1e-4


def decompose(matrix: Tensor, null: float) -> tuple[Tensor, Tensor, Tensor]:
    """Q, Uᵀ and the singular values, of A or, with σ² = ``null`` > 0, of [A | σ/√m · 1] less Q's last column."""
    rows, columns = matrix.shape[-2:]
    found = _by_gram(matrix, null) if columns >= _GRAM_ASPECT * rows else None
    return by_svd(matrix, null) if found is None else found


def _by_gram(matrix: Tensor, null: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """By the eigenvectors of AAᵀ; None where its condition is too large for that."""
    dtype = matrix.dtype
    wide, least = matrix, _SINGLE_RATIO
    gram = None
    if dtype == torch.float32 and matrix.shape[-2] >= _SINGLE_ROWS:
        gram = gram_matrix(matrix, null)
        gram = gram if _is_well_conditioned(gram) else None
    if gram is None:
        wide, least = matrix.double(), _GRAM_RATIO[dtype]
        gram = gram_matrix(wide, null)
    eigenvalues, left = torch.linalg.eigh(gram)
    ratios = eigenvalues[..., 0] / eigenvalues[..., -1]
    ratio = float(ratios.amin() if ratios.ndim else ratios)
    if not ratio > least:
        return None
    singular, vectors = eigenvalues.sqrt(), left.mT
    inverse = left @ (vectors / singular.unsqueeze(-1))
    product_dtype = dtype if ratio > _SINGLE_PRODUCT_RATIO else wide.dtype
    factor = inverse.to(product_dtype) @ (matrix if product_dtype == dtype else wide)
    # One Newton–Schulz step restores what squaring the condition lost.
    if dtype == torch.float64 or (gram.dtype == torch.float32 and ratio < _SINGLE_ORTHONORMAL_RATIO):
        factor = 1.5 * factor - 0.5 * (factor @ factor.mT) @ factor
    return factor.to(dtype), vectors.to(dtype).contiguous(), singular.to(dtype)


def gram_matrix(matrix: Tensor, null: float) -> Tensor:
    """AAᵀ + σ²·11ᵀ/m."""
    gram = matrix @ matrix.mT
    return gram.add_(null / matrix.shape[-2]) if null else gram


def _is_well_conditioned(gram: Tensor) -> bool:
    """Whether the Gram matrix less a 256th of its greatest eigenvalue (ten power iterations) has a Cholesky factor."""
    vector = gram.sum(-1, keepdim=True) + gram[..., :1]
    for _ in range(10):
        vector = gram @ (vector / torch.linalg.vector_norm(vector, dim=-2, keepdim=True))
    shift = _SINGLE_RATIO * torch.linalg.vector_norm(vector, dim=-2)
    shifted = gram.clone()
    shifted.diagonal(dim1=-2, dim2=-1).sub_(shift)
    return bool((torch.linalg.cholesky_ex(shifted).info == 0).all())


def by_svd(matrix: Tensor, null: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same, whatever the condition. Waits for an accelerator."""
    columns = matrix.shape[-1]
    if null:
        matrix = torch.nn.functional.pad(matrix, (0, 1), value=math.sqrt(null / matrix.shape[-2]))
    left, singular, right = _singular_vectors(matrix)
    return (left @ right)[..., :columns].contiguous(), left.mT.contiguous(), singular


def _singular_vectors(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD. In fp32 it can fail to converge on singular values that are almost equal, as at collapse."""
    try:
        return torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if matrix.dtype == torch.float64:
            raise
        left, singular, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        return left.to(matrix.dtype), singular.to(matrix.dtype), right.to(matrix.dtype)


def vector_jacobian(gradient: Tensor, factor: Tensor, vectors: Tensor, singular: Tensor) -> Tensor:
    """∂A for the gradient of Q.

    With a null direction it is that of [A | σ/√m · 1] less its last column, and right up to multiples of 1 along the
    columns, which the centring that comes before takes away.
    """
    cutoff = torch.finfo(factor.dtype).eps * max(factor.shape[-2:]) * singular.amax(-1, keepdim=True)
    sums = singular.unsqueeze(-1) + singular.unsqueeze(-2)
    sums = torch.where(sums > cutoff.unsqueeze(-1), sums, math.inf)
    stretch = torch.where(singular > cutoff, singular, math.inf).unsqueeze(-1)

    outer = gradient @ factor.mT  # G Qᵀ
    rotated = vectors @ outer @ vectors.mT
    # G(I − QᵀQ) = G − (G Qᵀ)Q, so every (m, n) product is used once; in place, since these are most of the memory.
    along = vectors.mT @ ((rotated - rotated.mT).div_(sums) - rotated / stretch) @ vectors
    inverse_stretch = vectors.mT @ (vectors / stretch)  # U S⁻¹ Uᵀ
    return (along @ factor).add_(inverse_stretch @ gradient)
