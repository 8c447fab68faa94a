"""The simplex ETF nearest to given class means, in closed form."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from neuralcollapse._checks import (
    check_etf_sizes,
    check_floating,
    compute_dtype,
    values_readable,
)
from neuralcollapse.geometry.centring import centre, check_arguments, check_weight_values
from neuralcollapse.geometry.polar import Method, decompose, polar, takes_products, vector_jacobian
from neuralcollapse.geometry.simplex import check_simplex_etf, reduce
from neuralcollapse.geometry.watch import Watch


def nearest_simplex_etf(
    class_means: Tensor,
    *,
    anchor: Tensor | None = None,
    proximal_weight: float = 0.0,
    class_weights: Tensor | None = None,
    method: Method = "auto",
    check_values: bool = True,
) -> Tensor:
    r"""The unit simplex ETF nearest to the class means, differentiable in them.

    With C the means centred at their (weighted) mean, Ĉ = C/‖C‖_F, and E = √(K/(K−1)) B Q, it minimises

        ((K−1)/2) Σ_k ω_k ‖ĉ_k − e_k/√K‖² + (γ/2) ‖Q − Q₀‖_F²

    over Q with orthonormal rows. The objective is linear in Q, so the minimiser is the polar factor of
    √(K−1) Bᵀ diag(ω) Ĉ + γ Q₀: no iteration, and a derivative in closed form. It is unique where that
    matrix has full rank.

    Args:
        class_means: (..., K, d) floating, d ≥ K−1. fp16 and bf16 are computed in fp32.
        anchor: (K, d) or (..., K, d), a unit simplex ETF E₀ to stay close to (the last solution); used if γ > 0.
        proximal_weight: γ ≥ 0, in units in which the singular values of the data term are 1 at collapse.
        class_weights: (K,) or (..., K), ω ≥ 0 up to a common factor; equal if not given.
        method: How the polar factor is found, as for `polar_factor`.
        check_values: Check finiteness, that the means are not all equal, that the anchor is an ETF and that products
            converged (on an accelerator this waits for the device).

    Returns:
        (..., K, d), unit rows with pairwise cosine −1/(K−1), in the dtype of ``class_means``.

    Raises:
        ValueError: An argument of another kind, K < 2, d < K−1, shapes that do not match, non-finite values,
            negative weights, γ > 0 without an anchor, an anchor that is no simplex ETF, or means that are all
            equal with no anchor to decide.

    Source: after Markou, Ajanthan, Gould, "Guiding Neural Collapse" (NeurIPS 2024), reduced to the complement
    of the all-ones vector.

    Examples:
        >>> from neuralcollapse import nearest_simplex_etf, random_simplex_etf
        >>> etf = random_simplex_etf(10, 64, generator=torch.Generator().manual_seed(0))
        >>> bool(torch.allclose(nearest_simplex_etf(5 * etf + 2), etf, atol=1e-5))
        True
    """
    _check(class_means, anchor, proximal_weight, class_weights, method)
    if check_values:
        _check_values(anchor, class_weights)
    means = class_means.to(compute_dtype(class_means.dtype))
    watch = Watch.AT_ONCE if check_values else 0
    etf = solve(means, anchor, proximal_weight, class_weights, method, watch, check_values, proximal_weight)
    return etf.to(class_means.dtype)


def solve(
    means: Tensor,
    anchor: Tensor | None,
    proximal_weight: float | Tensor,
    class_weights: Tensor | None = None,
    method: Method = "auto",
    watch: int = 0,
    check_values: bool = False,
    greatest_weight: float = 0.0,
) -> Tensor:
    """`nearest_simplex_etf` behind its door, of fp32 or fp64 means; γ may be a tensor; `watch` is that of `polar`."""
    if isinstance(proximal_weight, float | int) and proximal_weight == 0:
        anchor = None
    # σ of the size that singular values have at collapse, where those of the data are 1.
    null = (1 + (0.0 if anchor is None else greatest_weight)) ** 2
    if class_weights is None and values_readable(means) and (anchor is None or not anchor.requires_grad):
        by_products = takes_products(method, means)
        etf: Tensor = _EagerNearest.apply(means, anchor, proximal_weight, null, by_products, watch, check_values)
        return etf
    centred, norm, weights = centre(means, class_weights, check_values, anchor is None)
    target = _target(centred if weights is None else weights * centred, norm, anchor, proximal_weight)
    return _expansion(means) * polar(target, null=null, method=method, watch=watch)


class _EagerNearest(torch.autograd.Function):
    """The same in one node, where nothing is transformed or compiled and classes weigh the same: half the overhead."""

    @staticmethod
    def forward(
        ctx: Any,
        means: Tensor,
        anchor: Tensor | None,
        proximal_weight: float | Tensor,
        null: float,
        by_products: bool,
        watch: int,
        check_values: bool,
    ) -> Tensor:
        centred, norm, _ = centre(means, None, check_values, anchor is None)
        parts = decompose(_target(centred, norm, anchor, proximal_weight), null, by_products, watch)
        ctx.save_for_backward(centred, norm, *parts)
        ctx.by_products = by_products
        return _expansion(means) * parts[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        centred, norm, *parts = ctx.saved_tensors
        inner = vector_jacobian(ctx.by_products, gradient, *parts)
        # That of √(K−1) C/‖C‖, and that of the centring.
        inner = inner - (centred * inner).sum((-2, -1), keepdim=True) / norm.square() * centred
        inner = (inner - inner.mean(-2, keepdim=True)) * (math.sqrt(centred.shape[-2]) / norm)
        return inner, None, None, None, None, None, None


def _expansion(means: Tensor) -> float:
    """√(K/(K−1)), of unit rows over orthonormal ones."""
    return math.sqrt(means.shape[-2] / (means.shape[-2] - 1))


@torch.no_grad()
def nearest_etf_diagnostics(
    class_means: Tensor,
    etf: Tensor,
    *,
    anchor: Tensor | None = None,
    proximal_weight: float = 0.0,
    class_weights: Tensor | None = None,
) -> dict[str, float]:
    """How good a simplex ETF is as the answer of `nearest_simplex_etf` to the same arguments, in fp64.

    Args:
        class_means: (K, d).
        etf: (K, d), a unit simplex ETF.
        anchor: As for `nearest_simplex_etf`.
        proximal_weight: As for `nearest_simplex_etf`.
        class_weights: As for `nearest_simplex_etf`.

    Returns:
        ``objective``, the function minimised; ``gradient_norm`` of its Riemannian gradient, 0 at the minimiser;
        ``least_singular_value`` of the matrix whose polar factor the minimiser is, 0 where it is not unique;
        ``distance_to_anchor``, ‖E − E₀‖_F, NaN without an anchor.

    Raises:
        ValueError: Shapes or a proximal weight that `nearest_simplex_etf` refuses, or another shape of ``etf``.

    Examples:
        >>> from neuralcollapse import nearest_simplex_etf, simplex_etf
        >>> means = 3 * simplex_etf(4, 6) + 1
        >>> diagnostics = nearest_etf_diagnostics(means, nearest_simplex_etf(means))
        >>> abs(diagnostics["objective"]) < 1e-6, round(diagnostics["least_singular_value"], 6)
        (True, 1.0)
    """
    check_floating("class_means", class_means)
    check_floating("etf", etf)
    if class_means.ndim != 2 or etf.shape != class_means.shape:
        raise ValueError(
            f"etf must be of the shape (K, d) of class_means {tuple(class_means.shape)}, got {tuple(etf.shape)}"
        )
    _check(class_means, anchor, proximal_weight, class_weights, "auto")
    centred, norm, weights = centre(class_means.double(), class_weights, False, False)
    weighted = centred if weights is None else weights * centred
    target = reduce(_target(weighted, norm, anchor if proximal_weight > 0 else None, proximal_weight))
    others = class_means.shape[0] - 1
    frame = math.sqrt(others / (others + 1)) * reduce(etf.double())
    product = target @ frame.mT
    gradient = target - 0.5 * (product + product.mT) @ frame
    return {
        "objective": float(
            others / 2 * ((centred * weighted).sum() / norm**2 + 1) + proximal_weight * others - product.trace()
        ),
        "gradient_norm": float(torch.linalg.matrix_norm(gradient)),
        "least_singular_value": float(torch.linalg.svdvals(target)[-1]),
        "distance_to_anchor": math.nan if anchor is None else float((etf - anchor).double().norm()),
    }


def _target(weighted: Tensor, norm: Tensor, anchor: Tensor | None, proximal_weight: float | Tensor) -> Tensor:
    """Ã = √(K−1) diag(ω) Ĉ + γ √((K−1)/K) E₀, whose columns sum to zero; the objective is a constant − ⟨BᵀÃ, Q⟩."""
    num_classes = weighted.shape[-2]
    target = weighted * (math.sqrt(num_classes - 1) / norm)
    if anchor is None:
        return target
    return target + proximal_weight * math.sqrt((num_classes - 1) / num_classes) * anchor.to(weighted.dtype)


def _check(
    class_means: Tensor,
    anchor: Tensor | None,
    proximal_weight: float,
    class_weights: Tensor | None,
    method: str,
) -> None:
    """What can be said without reading values."""
    check_arguments(class_means, anchor, proximal_weight, class_weights, method)
    check_etf_sizes(*class_means.shape[-2:])


def _check_values(anchor: Tensor | None, class_weights: Tensor | None) -> None:
    """What their values say, where they can be read; those of the means are looked at where their norm is."""
    if anchor is not None:
        check_simplex_etf("anchor", anchor)
    if class_weights is not None:
        check_weight_values(class_weights)
