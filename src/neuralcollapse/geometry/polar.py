"""The polar factor of a matrix and its exact derivative.

For A (m, n) with m ≤ n and thin SVD A = U S Vᵀ, the polar factor Q = U Vᵀ is the nearest matrix with
orthonormal rows, and the maximiser of ⟨A, Q⟩ over them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuralcollapse._checks import check_finite, check_floating, compute_dtype

# The Gram matrix is worth its squared condition number only when the SVD is much dearer. Measured on two cores,
# fp32, ms: (9, 9) SVD 0.02, Gram 0.03 · (9, 512) 0.11, 0.06 · (100, 100) 0.8, 0.7 · (100, 2048) 4.9, 2.3 ·
# (1000, 1000) 157, 218 · (1000, 2048) 306, 238; in fp64 (1000, 2048) 499, 347.
_GRAM_ASPECT = 2
# Least ratio of extreme eigenvalues of the Gram matrix at which its error, eps₆₄·condition², is within the dtype's own.
_GRAM_CONDITION = {torch.float32: 1e-8, torch.float64: 1e-4}


def polar_factor(matrix: Tensor, *, check_values: bool = True) -> Tensor:
    r"""The orthonormal polar factor Q = U Vᵀ of A = U S Vᵀ, differentiable.

    The derivative is exact where A has full row rank, and holds at equal singular values, where
    differentiating through an SVD gives NaN. For an upstream gradient G of Q,

        X = Uᵀ(G Qᵀ − Q Gᵀ)U,   Y_ij = X_ij/(s_i + s_j),   ∂A = U Y Uᵀ Q + U S⁻¹ Uᵀ G (I − QᵀQ).

    At rank deficiency Q is one of several minimisers, and a cut-off ``eps·max(m, n)·s₁`` keeps the gradient
    finite: S⁻¹ is a pseudo-inverse, and pairs with s_i + s_j below the cut-off contribute nothing.

    Args:
        matrix: (..., m, n) floating, m ≤ n. fp16 and bf16 are computed in fp32.
        check_values: Check that the entries are finite (on an accelerator this waits for the device).

    Returns:
        (..., m, n), orthonormal rows, in the dtype of ``matrix``. Differentiable once; works under
        ``torch.func.vmap`` and ``torch.compile(fullgraph=True)``.

    Raises:
        ValueError: ``matrix`` is not floating, has fewer than two dimensions, more rows than columns, no
            rows, or NaN or infinite entries.

    Source: Higham, Functions of Matrices (2008), chapter 8; the derivative is that of the Sylvester equation there.

    Example:
        >>> import torch
        >>> polar_factor(torch.tensor([[3.0, 0.0, 4.0]]))
        tensor([[0.6000, 0.0000, 0.8000]])
    """
    check_floating("matrix", matrix)
    if matrix.ndim < 2 or not 1 <= matrix.shape[-2] <= matrix.shape[-1]:
        raise ValueError(f"matrix must be of shape (..., m, n) with 1 <= m <= n, got {tuple(matrix.shape)}")
    if check_values:
        check_finite("matrix", matrix)
    factor, _, _ = _PolarFactor.apply(matrix.to(compute_dtype(matrix.dtype)))
    return factor.to(matrix.dtype)


@torch.library.custom_op("neuralcollapse::polar", mutates_args=())
def _polar(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q, U and the singular values. One opaque operator, so that choosing the way by value breaks no compiled graph."""
    rows, columns = matrix.shape[-2:]
    if columns >= _GRAM_ASPECT * rows:
        wide = matrix.double()
        eigenvalues, left = torch.linalg.eigh(wide @ wide.mT)
        # eigh has waited for the device already; on an accelerator this reads one more scalar.
        if bool((eigenvalues[..., 0] > _GRAM_CONDITION[matrix.dtype] * eigenvalues[..., -1]).all()):
            singular = eigenvalues.sqrt()
            factor = ((left / singular.unsqueeze(-2)) @ left.mT) @ wide
            if matrix.dtype == torch.float64:  # one Newton–Schulz step restores what squaring the condition lost
                factor = 1.5 * factor - 0.5 * (factor @ factor.mT) @ factor
            return factor.to(matrix.dtype), left.to(matrix.dtype), singular.to(matrix.dtype)
    left, singular, right = _singular_vectors(matrix)
    return left @ right, left.contiguous(), singular


def _singular_vectors(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD. In fp32 it can fail to converge on singular values that are almost equal, as at collapse."""
    try:
        return torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if matrix.dtype == torch.float64:
            raise
        left, singular, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        return left.to(matrix.dtype), singular.to(matrix.dtype), right.to(matrix.dtype)


@_polar.register_fake
def _(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = matrix.shape[-2]
    return (
        torch.empty_like(matrix, memory_format=torch.contiguous_format),
        matrix.new_empty(*matrix.shape[:-1], rows),
        matrix.new_empty(matrix.shape[:-1]),
    )


class _PolarFactor(torch.autograd.Function):
    """Q with its derivative; U and the singular values come along for the backward pass and carry no gradient."""

    @staticmethod
    def forward(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _polar(matrix)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx, gradient: Tensor, *_: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return _PolarGradient.apply(gradient, *ctx.saved_tensors)

    @staticmethod
    def vmap(info, in_dims, matrix: Tensor):  # type: ignore[no-untyped-def]
        return _PolarFactor.apply(matrix.movedim(in_dims[0], 0)), (0, 0, 0)


class _PolarGradient(torch.autograd.Function):
    """The vector–Jacobian product, a node of its own so that a second derivative meets a clear error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, factor: Tensor, left: Tensor, singular: Tensor) -> Tensor:
        rows, columns = factor.shape[-2:]
        cutoff = torch.finfo(factor.dtype).eps * max(rows, columns) * singular.amax(-1, keepdim=True)
        sums = singular.unsqueeze(-1) + singular.unsqueeze(-2)
        inverse = torch.where(singular > cutoff, 1 / singular, 0)

        outer = gradient @ factor.mT  # G Qᵀ
        rotation = left.mT @ (outer - outer.mT) @ left
        rotation.mul_(torch.where(sums > cutoff.unsqueeze(-1), 1 / sums, 0))
        inverse_stretch = (left * inverse.unsqueeze(-2)) @ left.mT  # U S⁻¹ Uᵀ
        # G(I − QᵀQ) = G − (G Qᵀ)Q, so every (m, n) product is used once; in place, since these are most of the memory.
        along = (left @ rotation @ left.mT).sub_(inverse_stretch @ outer)
        return (along @ factor).add_(inverse_stretch @ gradient)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        pass

    @staticmethod
    def backward(ctx, _: Tensor):  # type: ignore[no-untyped-def]
        raise NotImplementedError("polar_factor is differentiable once; its second derivative is not implemented")
