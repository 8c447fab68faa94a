"""The simplex ETF nearest to given class means, in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neuralcollapse._checks import (
    check_etf_sizes,
    check_finite,
    check_floating,
    check_not_negative,
    compute_dtype,
    values_readable,
)
from neuralcollapse.geometry.polar import polar_factor
from neuralcollapse.geometry.simplex import check_simplex_etf, expand, reduce


def nearest_simplex_etf(
    class_means: Tensor,
    *,
    anchor: Tensor | None = None,
    proximal_weight: float = 0.0,
    class_weights: Tensor | None = None,
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
        check_values: Check finiteness, that the means are not all equal, and that the anchor is an ETF (on an
            accelerator this waits for the device).

    Returns:
        (..., K, d), unit rows with pairwise cosine −1/(K−1), in the dtype of ``class_means``.

    Raises:
        ValueError: An argument of another kind, K < 2, d < K−1, shapes that do not match, non-finite values,
            negative weights, γ > 0 without an anchor, an anchor that is no simplex ETF, or means that are all
            equal with no anchor to decide.

    Source: after Markou, Ajanthan, Gould, "Guiding Neural Collapse" (NeurIPS 2024), reduced to the complement
    of the all-ones vector.

    Example:
        >>> from neuralcollapse import nearest_simplex_etf, random_simplex_etf
        >>> etf = random_simplex_etf(10, 64, generator=torch.Generator().manual_seed(0))
        >>> bool(torch.allclose(nearest_simplex_etf(5 * etf + 2), etf, atol=1e-5))
        True
    """
    target, _, _ = _target(class_means, anchor, proximal_weight, class_weights, check_values)
    frame = polar_factor(target, check_values=False)
    num_classes = class_means.shape[-2]
    return (math.sqrt(num_classes / (num_classes - 1)) * expand(frame)).to(class_means.dtype)


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

    Example:
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
    target, unit, weighted = _target(class_means.double(), anchor, proximal_weight, class_weights, False)
    others = class_means.shape[0] - 1
    frame = math.sqrt(others / (others + 1)) * reduce(etf.double())
    product = target @ frame.mT
    gradient = target - 0.5 * (product + product.mT) @ frame
    return {
        "objective": float(others / 2 * ((unit * weighted).sum() + 1) + proximal_weight * others - product.trace()),
        "gradient_norm": float(torch.linalg.matrix_norm(gradient)),
        "least_singular_value": float(torch.linalg.svdvals(target)[-1]),
        "distance_to_anchor": math.nan if anchor is None else float((etf - anchor).double().norm()),
    }


def _target(
    class_means: Tensor,
    anchor: Tensor | None,
    proximal_weight: float,
    class_weights: Tensor | None,
    check_values: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """A = √(K−1) Bᵀ diag(ω) Ĉ + γ Q₀, with which the objective is a constant − ⟨A, Q⟩; Ĉ; and diag(ω) Ĉ."""
    check_floating("class_means", class_means)
    if class_means.ndim < 2:
        raise ValueError(f"class_means must be of shape (..., K, d), got {tuple(class_means.shape)}")
    num_classes, feature_dim = class_means.shape[-2:]
    check_etf_sizes(num_classes, feature_dim)
    check_not_negative("proximal_weight", proximal_weight)
    if anchor is not None:
        _check_like("anchor", anchor, class_means, (num_classes, feature_dim))
        if check_values:
            check_simplex_etf("anchor", anchor)
    if proximal_weight > 0 and anchor is None:
        raise ValueError(f"proximal_weight = {proximal_weight} needs an anchor, got None")
    if check_values:
        check_finite("class_means", class_means)

    means = class_means.to(compute_dtype(class_means.dtype))
    weights = None if class_weights is None else _unit_mean(class_weights, means, check_values)
    if weights is None:
        centred = means - means.mean(-2, keepdim=True)
    else:
        centred = means - (weights * means).mean(-2, keepdim=True)
    unit = _unit_frobenius(centred, means, check_values=check_values and (anchor is None or proximal_weight == 0))
    weighted = unit if weights is None else weights * unit
    target = math.sqrt(num_classes - 1) * reduce(weighted)
    if anchor is not None and proximal_weight > 0:
        anchor_weight = proximal_weight * math.sqrt((num_classes - 1) / num_classes)
        target = target + anchor_weight * reduce(anchor.to(means.dtype))
    return target, unit, weighted


def _check_like(name: str, tensor: Tensor, means: Tensor, ending: tuple[int, ...]) -> None:
    """Raise unless the tensor is floating and of that ending shape, with no batch dimensions but those of the means."""
    check_floating(name, tensor)
    if tensor.shape[tensor.ndim - len(ending) :] != ending or tensor.ndim < len(ending):
        raise ValueError(f"{name} must end in the shape {ending}, got {tuple(tensor.shape)}")
    batch, whole = tensor.shape[: tensor.ndim - len(ending)], means.shape[:-2]
    if len(batch) > len(whole) or any(
        size not in (1, want) for size, want in zip(batch[::-1], whole[::-1], strict=False)
    ):
        raise ValueError(f"{name} must have the leading dimensions {tuple(whole)} or none, got {tuple(batch)}")


def _unit_mean(class_weights: Tensor, means: Tensor, check_values: bool) -> Tensor:
    """The weights as (..., K, 1) with mean 1."""
    _check_like("class_weights", class_weights, means, (means.shape[-2],))
    weights = class_weights.to(means)
    if check_values and values_readable(weights):
        check_finite("class_weights", weights)
        if bool((weights < 0).any()) or bool((weights.sum(-1) == 0).any()):
            raise ValueError("class_weights must be at least 0 with a positive sum")
    return (weights / weights.mean(-1, keepdim=True)).unsqueeze(-1)


def _unit_frobenius(centred: Tensor, means: Tensor, *, check_values: bool) -> Tensor:
    """C/‖C‖_F; zero, with a zero gradient, where C is nothing but the rounding error of the centring."""
    norm = torch.linalg.matrix_norm(centred, keepdim=True)
    rounding = 4 * torch.finfo(means.dtype).eps * torch.linalg.matrix_norm(means.detach(), keepdim=True)
    degenerate = norm <= rounding
    if check_values and values_readable(degenerate) and bool(degenerate.any()):
        raise ValueError(
            "class_means must not be all equal (centred, they are all zero), "
            "unless an anchor with a positive proximal_weight decides the orientation"
        )
    return torch.where(degenerate, 0, centred) / torch.where(degenerate, 1, norm)
