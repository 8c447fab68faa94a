"""Polar factor of a matrix and its exact derivative.

For A (m, n) with m ≤ n and thin SVD A = U S Vᵀ, the polar factor Q = U Vᵀ is the nearest matrix with orthonormal rows,
and maximises ⟨A, Q⟩ over such matrices. There are two methods: ``"products"`` (`polar_iteration`) and ``"spectral"``,
which uses the eigenvectors of the Gram matrix AAᵀ if they are accurate enough, and an SVD otherwise. The thresholds of
the latter are:

=============================  ==========  ===========================================================================
threshold                      value       reason
=============================  ==========  ===========================================================================
``_GRAM_ASPECT``               n ≥ 2m      For smaller n, the SVD is not slow enough for the Gram matrix, whose
                                           condition number is squared, to be worthwhile.
``_GRAM_RATIO``, fp32          1e-8        Smallest ratio λ_min/λ_max of an fp64 Gram matrix for which its error,
``_GRAM_RATIO``, fp64          1e-4        eps·condition², is within the precision of the dtype of the result.
``_SINGLE_ROWS``               m ≥ 256     From this size, an fp32 Gram matrix and its eigenvectors, which take half
                                           the time of fp64, outweigh the required check of the condition number.
``_SINGLE_RATIO``              1/256       Smallest ratio for which an fp32 Gram matrix gives Q in fp32 accuracy.
``_SINGLE_ORTHONORMAL_RATIO``  1/16        Ratio below which this Q needs a Newton–Schulz step to be orthonormal.
``_SINGLE_PRODUCT_RATIO``      1e-4        Ratio above which the inverse root of an fp64 Gram matrix may be rounded to
                                           fp32 before it is multiplied with A.
=============================  ==========  ===========================================================================
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from neuralcollapse._checks import check_choice, check_finite, check_floating, compute_dtype
from neuralcollapse.geometry import polar_iteration
from neuralcollapse.geometry.polar_iteration import IMMEDIATE, LEAST_RATIO, ConvergenceCheck

Method = Literal["auto", "spectral", "products"]
METHODS = ("auto", "spectral", "products")

_GRAM_ASPECT = 2
_GRAM_RATIO = {torch.float32: 1e-8, torch.float64: 1e-4}
_SINGLE_ROWS = 256
_SINGLE_RATIO, _SINGLE_ORTHONORMAL_RATIO, _SINGLE_PRODUCT_RATIO = 1 / 256, 1 / 16, 1e-4


def polar_factor(matrix: Tensor, *, method: Method = "auto", check_values: bool = True) -> Tensor:
    r"""Return the orthonormal polar factor Q = U Vᵀ of A = U S Vᵀ, differentiable.

    The derivative is exact if A has full row rank, and is valid for equal singular values, for which differentiation
    through an SVD gives NaN. For an upstream gradient G of Q,

        X = Uᵀ(G Qᵀ − Q Gᵀ)U,   Y_ij = X_ij/(s_i + s_j),   ∂A = U Y Uᵀ Q + U S⁻¹ Uᵀ G (I − QᵀQ).

    If A is rank deficient, Q is one of several minimisers, and a cut-off ``eps·max(m, n)·s₁`` keeps the gradient
    finite: S⁻¹ is a pseudo-inverse, and pairs with s_i + s_j below the cut-off contribute nothing.

    Args:
        matrix: (..., m, n) floating, m ≤ n. fp16 and bf16 are computed in fp32.
        method: ``"spectral"``: eigenvectors of the Gram matrix, or an SVD if its condition number is too large;
            ``"products"``: only matrix products in fp64, which are fast on accelerators, up to a condition number of
            about 5,000, otherwise an SVD (for fp64 input, Q is accurate to 1e-8); ``"auto"``: ``"spectral"`` on a CPU,
            ``"products"`` on other devices.
        check_values: Whether to check that the entries are finite and, with products, that the iteration converged (on
            an accelerator, this causes a sync).

    Returns:
        (..., m, n), orthonormal rows, in the dtype of ``matrix``. Differentiable once; works under
        ``torch.func.vmap`` and ``torch.compile(fullgraph=True)``.

    Raises:
        ValueError: if ``matrix`` is not floating, has fewer than two dimensions, more rows than columns, no rows, or
            NaN or infinite entries; or if ``method`` is unknown.

    Source: Higham, Functions of Matrices (2008), chapter 8; the derivative follows from a Sylvester equation.

    Examples:
        >>> import torch
        >>> polar_factor(torch.tensor([[3.0, 0.0, 4.0]]))
        tensor([[0.6000, 0.0000, 0.8000]])
    """
    check_floating("matrix", matrix)
    check_choice("method", method, METHODS)
    if matrix.ndim < 2 or not 1 <= matrix.shape[-2] <= matrix.shape[-1]:
        raise ValueError(f"matrix must be of shape (..., m, n) with 1 <= m <= n, got {tuple(matrix.shape)}")
    if check_values:
        check_finite("matrix", matrix)
    check = IMMEDIATE if check_values else None
    return polar(matrix.to(compute_dtype(matrix.dtype)), method, check).to(matrix.dtype)


def polar(
    matrix: Tensor, method: Method = "auto", check: ConvergenceCheck | None = None, *, null: float = 0.0
) -> Tensor:
    """Return the polar factor of an fp32 or fp64 matrix, without input checks.

    Args:
        matrix: (..., m, n), m ≤ n, or m ≤ n + 1 with a null direction.
        method: As for `polar_factor`.
        check: Check of whether products converged; None for no check.
        null: 0, or σ² > 0 for a centred matrix, whose columns sum to zero. σ² should have the size of its squared
            singular values. The result is then the polar factor on the complement of 1, Q with QQᵀ = I − 11ᵀ/m: the
            first n columns of the polar factor of [A | σ/√m · 1], in which the direction 1 has the singular value σ.
            This makes a basis of the complement unnecessary.
    """
    by_products = method == "products" or (method == "auto" and matrix.device.type != "cpu")
    # An integer handle represents the check, because compiled operators do not accept objects.
    factor: Tensor = _Polar.apply(matrix, null, by_products, 0 if check is None else check.handle)[0]
    return factor


Parts = tuple[Tensor, Tensor, Tensor]


def decompose(matrix: Tensor, null: float, by_products: bool, check_handle: int) -> Parts:
    """Return Q and the tensors that its derivative needs: Uᵀ and the singular values, or (AAᵀ)^(−1/2) and AAᵀ."""
    if not by_products:
        wide = matrix.shape[-1] >= _GRAM_ASPECT * matrix.shape[-2]
        return (_by_gram(matrix, null) if wide else None) or _by_svd(matrix, null)
    check = ConvergenceCheck.of_handle(check_handle)
    if check is None or not check.needs_svd():
        factor, inverse_root, gram, error = polar_iteration.iterate(_gram(matrix.double(), null), matrix)
        if check is None or check.accepts(error):
            return factor, inverse_root, gram
    return _roots_by_svd(matrix, null, check)


# While compiling, a single opaque operator, so that the choice of the algorithm by values does not break the graph.
_operator = torch.library.custom_op("neuralcollapse::polar_factor", decompose, mutates_args=())


@_operator.register_fake
def _(matrix: Tensor, null: float, by_products: bool, check_handle: int) -> Parts:
    batch, rows = matrix.shape[:-2], matrix.shape[-2]
    factor = matrix.new_empty(matrix.shape)
    if by_products:
        square = (*batch, rows, rows)
        return factor, matrix.new_empty(square, dtype=torch.float64), matrix.new_empty(square, dtype=torch.float64)
    return factor, matrix.new_empty(*batch, rows, rows), matrix.new_empty(*batch, rows)


class _Polar(torch.autograd.Function):
    """Polar factor Q with its derivative; the other two outputs are for the backward pass and have no gradient."""

    @staticmethod
    def forward(matrix: Tensor, null: float, by_products: bool, check_handle: int) -> Parts:
        call = _operator if torch.compiler.is_compiling() else decompose
        return call(matrix, null, by_products, check_handle)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, bool, int], output: Parts) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output)
        ctx.by_products = inputs[2]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, None, None, None]:
        if gradient is None:
            return None, None, None, None
        if torch.is_grad_enabled():  # use a separate node, so that a second derivative raises a clear error
            return _Gradient.apply(ctx.by_products, gradient, *ctx.saved_tensors), None, None, None
        return _vector_jacobian(ctx.by_products, gradient, *ctx.saved_tensors), None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, *tuple[None, ...]], matrix: Tensor, *settings: Any
    ) -> tuple[Any, tuple[int, int, int]]:
        return _Polar.apply(matrix.movedim(in_dims[0], 0), *settings), (0, 0, 0)


class _Gradient(torch.autograd.Function):
    """Derivative of `_Polar`; its derivative is not implemented."""

    generate_vmap_rule = True

    @staticmethod
    def forward(by_products: bool, gradient: Tensor, *parts: Tensor) -> Tensor:
        with torch.no_grad():
            return _vector_jacobian(by_products, gradient, *parts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        raise NotImplementedError("polar_factor is differentiable once; its second derivative is not implemented")


def _vector_jacobian(by_products: bool, gradient: Tensor, *parts: Tensor) -> Tensor:
    """Return ∂A for the gradient of Q, given the output of `decompose`."""
    return (polar_iteration.vector_jacobian if by_products else _spectral_vector_jacobian)(gradient, *parts)


def _by_gram(matrix: Tensor, null: float) -> Parts | None:
    """Return Q, Uᵀ and the singular values by the eigenvectors of AAᵀ; None if its condition number is too large."""
    dtype = matrix.dtype
    wide, least_ratio = matrix, _SINGLE_RATIO
    gram = None
    if dtype == torch.float32 and matrix.shape[-2] >= _SINGLE_ROWS:
        gram = _gram(matrix, null)
        gram = gram if _is_well_conditioned(gram) else None
    if gram is None:
        wide, least_ratio = matrix.double(), _GRAM_RATIO[dtype]
        gram = _gram(wide, null)
    eigenvalues, left = torch.linalg.eigh(gram)
    ratios = eigenvalues[..., 0] / eigenvalues[..., -1]
    ratio = float(ratios.amin() if ratios.ndim else ratios)
    if not ratio > least_ratio:
        return None
    singular, vectors = eigenvalues.sqrt(), left.mT
    inverse_root = left @ (vectors / singular.unsqueeze(-1))
    product_dtype = dtype if ratio > _SINGLE_PRODUCT_RATIO else wide.dtype
    factor = inverse_root.to(product_dtype) @ (matrix if product_dtype == dtype else wide)
    # One Newton–Schulz step restores the accuracy that was lost by squaring the condition number.
    if dtype == torch.float64 or (gram.dtype == torch.float32 and ratio < _SINGLE_ORTHONORMAL_RATIO):
        factor = 1.5 * factor - 0.5 * (factor @ factor.mT) @ factor
    return factor.to(dtype), vectors.to(dtype).contiguous(), singular.to(dtype)


def _gram(matrix: Tensor, null: float) -> Tensor:
    """Return AAᵀ + σ²·11ᵀ/m."""
    gram = matrix @ matrix.mT
    return gram.add_(null / matrix.shape[-2]) if null else gram


def _is_well_conditioned(gram: Tensor) -> bool:
    """Return whether λ_min/λ_max > `_SINGLE_RATIO`: whether G − `_SINGLE_RATIO`·λ_max·I has a Cholesky factor.

    Ten power iterations estimate λ_max.
    """
    vector = gram.sum(-1, keepdim=True) + gram[..., :1]
    for _ in range(10):
        vector = gram @ (vector / torch.linalg.vector_norm(vector, dim=-2, keepdim=True))
    shift = _SINGLE_RATIO * torch.linalg.vector_norm(vector, dim=-2)
    shifted = gram.clone()
    shifted.diagonal(dim1=-2, dim2=-1).sub_(shift)
    return bool((torch.linalg.cholesky_ex(shifted).info == 0).all())


def _by_svd(matrix: Tensor, null: float) -> Parts:
    """Return Q, Uᵀ and the singular values by an SVD, for any condition number. Causes a sync on accelerators.

    LAPACK may fail to converge in fp32 if singular values are almost equal, as at collapse; fp64 is then used.
    """
    columns = matrix.shape[-1]
    if null:
        matrix = torch.nn.functional.pad(matrix, (0, 1), value=math.sqrt(null / matrix.shape[-2]))
    try:
        left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if matrix.dtype == torch.float64:
            raise
        left, singular, right = (
            part.to(matrix.dtype) for part in torch.linalg.svd(matrix.double(), full_matrices=False)
        )
    return (left @ right)[..., :columns].contiguous(), left.mT.contiguous(), singular


def _roots_by_svd(matrix: Tensor, null: float, check: ConvergenceCheck | None) -> Parts:
    """Return Q, (AAᵀ)^(−1/2) and AAᵀ by an SVD in fp64, restricted to directions above the rounding error."""
    factor, vectors, singular = _by_svd(matrix.double(), null)
    cutoff = torch.finfo(matrix.dtype).eps * max(matrix.shape[-2:]) * singular.amax(-1, keepdim=True)
    inverse = torch.where(singular > cutoff, 1 / singular, 0)
    if check is not None:
        check.record_svd(1 - (singular[..., -1] / singular[..., 0]).min().div(LEAST_RATIO).clamp_max(1))
    inverse_root, gram = (vectors.mT @ (vectors * scale.unsqueeze(-1)) for scale in (inverse, singular.square()))
    return factor.to(matrix.dtype), inverse_root, gram


def _spectral_vector_jacobian(gradient: Tensor, factor: Tensor, vectors: Tensor, singular: Tensor) -> Tensor:
    """Return ∂A for the gradient of Q, by the formula of `polar_factor`.

    With a null direction, the result is correct up to multiples of 1 in each column, which the derivative of the
    centring removes.
    """
    cutoff = torch.finfo(factor.dtype).eps * max(factor.shape[-2:]) * singular.amax(-1, keepdim=True)
    sums = singular.unsqueeze(-1) + singular.unsqueeze(-2)
    sums = torch.where(sums > cutoff.unsqueeze(-1), sums, math.inf)
    stretch = torch.where(singular > cutoff, singular, math.inf).unsqueeze(-1)

    outer = gradient @ factor.mT  # G Qᵀ
    rotated = vectors @ outer @ vectors.mT
    # G(I − QᵀQ) = G − (G Qᵀ)Q, so every (m, n) product is used once; in place, because they take most of the memory.
    along = vectors.mT @ ((rotated - rotated.mT).div_(sums) - rotated / stretch) @ vectors
    inverse_stretch = vectors.mT @ (vectors / stretch)  # U S⁻¹ Uᵀ
    return (along @ factor).add_(inverse_stretch @ gradient)
