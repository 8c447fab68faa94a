"""The polar factor of a matrix and its exact derivative.

For A (m, n) with m ≤ n and thin SVD A = U S Vᵀ, the polar factor Q = U Vᵀ is the nearest matrix with
orthonormal rows, and the maximiser of ⟨A, Q⟩ over them.

A **centred** matrix, whose columns sum to zero, has the all-ones vector as a null direction. There the polar factor of
[A | σ/√m · 1] is taken, for any σ > 0: that direction gets a singular value of its own, and the first n columns are the
polar factor on the rest, Q with QQᵀ = I − 11ᵀ/m. This spares a basis of that rest.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from neuralcollapse._checks import check_choice, check_finite, check_floating, compute_dtype, values_readable
from neuralcollapse.geometry import products, spectral
from neuralcollapse.geometry.watch import Watch

Method = Literal["auto", "spectral", "products"]
METHODS = ("auto", "spectral", "products")


def polar_factor(matrix: Tensor, *, method: Method = "auto", check_values: bool = True) -> Tensor:
    r"""The orthonormal polar factor Q = U Vᵀ of A = U S Vᵀ, differentiable.

    The derivative is exact where A has full row rank, and holds at equal singular values, where
    differentiating through an SVD gives NaN. For an upstream gradient G of Q,

        X = Uᵀ(G Qᵀ − Q Gᵀ)U,   Y_ij = X_ij/(s_i + s_j),   ∂A = U Y Uᵀ Q + U S⁻¹ Uᵀ G (I − QᵀQ).

    At rank deficiency Q is one of several minimisers, and a cut-off ``eps·max(m, n)·s₁`` keeps the gradient
    finite: S⁻¹ is a pseudo-inverse, and pairs with s_i + s_j below the cut-off contribute nothing.

    Args:
        matrix: (..., m, n) floating, m ≤ n. fp16 and bf16 are computed in fp32.
        method: ``"spectral"``: eigenvectors of the Gram matrix in fp64, or an SVD where its condition does not allow
            that; ``"products"``: matrix products in fp64 only, which an accelerator is made for, up to a condition of
            about 5,000, then an SVD (fp64 input comes out right to 1e-8); ``"auto"``: the first on a CPU, the second
            elsewhere.
        check_values: Check that the entries are finite and, with products, that they converged (on an accelerator
            this waits for the device). If False, products are taken as they come.

    Returns:
        (..., m, n), orthonormal rows, in the dtype of ``matrix``. Differentiable once; works under
        ``torch.func.vmap`` and ``torch.compile(fullgraph=True)``.

    Raises:
        ValueError: ``matrix`` is not floating, has fewer than two dimensions, more rows than columns, no
            rows, or NaN or infinite entries; or there is no such method.

    Source: Higham, Functions of Matrices (2008), chapter 8; the derivative is that of the Sylvester equation there.

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
    factor = polar(matrix.to(compute_dtype(matrix.dtype)), method=method, watch=Watch.AT_ONCE if check_values else 0)
    return factor.to(matrix.dtype)


def polar(matrix: Tensor, *, null: float = 0.0, method: Method = "auto", watch: int = 0) -> Tensor:
    """The polar factor of an fp32 or fp64 matrix, or the one on the complement of 1 of a centred matrix; unchecked.

    Args:
        matrix: (..., m, n).
        null: 0, or σ² > 0 for a matrix whose columns sum to zero; of the size of its squared singular values.
        method: As for `polar_factor`.
        watch: Who looks whether products converged: the handle of a `Watch`, ``Watch.AT_ONCE``, or 0 for nobody.
    """
    by_products = takes_products(method, matrix)
    if values_readable(matrix):
        factor: Tensor = _EagerPolar.apply(matrix, null, by_products, watch)
    else:
        factor = _Polar.apply(matrix, null, by_products, watch)[0]
    return factor


def takes_products(method: Method, matrix: Tensor) -> bool:
    """Whether the method means products for a matrix on that device."""
    return method == "products" or (method == "auto" and matrix.device.type != "cpu")


Parts = tuple[Tensor, Tensor, Tensor]


def decompose(matrix: Tensor, null: float, by_products: bool, watch: int) -> Parts:
    """Q and what its derivative needs: Uᵀ and the singular values, or (AAᵀ)^(−1/2) and AAᵀ."""
    return products.decompose(matrix, null, watch) if by_products else spectral.decompose(matrix, null)


# One opaque operator while compiling, so that choosing the way by value breaks no graph.
_operator = torch.library.custom_op("neuralcollapse::polar_factor", decompose, mutates_args=())


@_operator.register_fake
def _(matrix: Tensor, null: float, by_products: bool, watch: int) -> Parts:
    batch, rows = matrix.shape[:-2], matrix.shape[-2]
    factor = matrix.new_empty(matrix.shape)
    if by_products:
        square = (*batch, rows, rows)
        return factor, matrix.new_empty(square, dtype=torch.float64), matrix.new_empty(square, dtype=torch.float64)
    return factor, matrix.new_empty(*batch, rows, rows), matrix.new_empty(*batch, rows)


class _Polar(torch.autograd.Function):
    """Q with its derivative; the other two come along for the backward pass and carry no gradient."""

    @staticmethod
    def forward(matrix: Tensor, null: float, by_products: bool, watch: int) -> Parts:
        call = _operator if torch.compiler.is_compiling() else decompose
        return call(matrix, null, by_products, watch)

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
        return vector_jacobian(ctx.by_products, gradient, *ctx.saved_tensors), None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, None, None, None], matrix: Tensor, null: float, by_products: bool, watch: int
    ) -> tuple[Any, tuple[int, int, int]]:
        return _Polar.apply(matrix.movedim(in_dims[0], 0), null, by_products, watch), (0, 0, 0)


def vector_jacobian(by_products: bool, gradient: Tensor, *parts: Tensor) -> Tensor:
    """∂A for the gradient of Q, of what `decompose` returned."""
    if torch.is_grad_enabled():  # a node of its own, so that a second derivative meets a clear error
        inner: Tensor = _Gradient.apply(by_products, gradient, *parts)
        return inner
    way = products.vector_jacobian if by_products else spectral.vector_jacobian
    return way(gradient, *parts)


class _EagerPolar(_Polar):
    """The same where nothing is transformed or compiled, for half the overhead."""

    setup_context = torch.autograd.Function.setup_context

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, null: float, by_products: bool, watch: int) -> Tensor:  # type: ignore[override]
        output = decompose(matrix, null, by_products, watch)
        ctx.save_for_backward(*output)
        ctx.by_products = by_products
        return output[0]


class _Gradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(by_products: bool, gradient: Tensor, *parts: Tensor) -> Tensor:
        with torch.no_grad():
            return vector_jacobian(by_products, gradient, *parts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        raise NotImplementedError("polar_factor is differentiable once; its second derivative is not implemented")
