"""The nearest frame under a metric of the feature space: what has no closed form."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from neuralcollapse._checks import check_finite, check_floating, values_readable
from neuralcollapse.geometry.declarative import ArgminSolution, argmin_on_stiefel
from neuralcollapse.geometry.simplex import expand


def nearest_frame_under_metric(
    unit_means: Tensor,
    metric: Tensor,
    start: Tensor,
    *,
    code: Tensor | None = None,
    class_weights: Tensor | None = None,
    anchor: Tensor | None = None,
    proximal_weight: float = 0.0,
    **solver: Any,
) -> ArgminSolution:
    r"""The orthonormal rows Q of the frame nearest to class means in the metric ‖x‖²_M = xᵀMx, differentiable.

    With Ĉ the centred means of unit Frobenius norm and L the code (√(K/(K−1)) B for the simplex ETF), it minimises

        (r/2) Σ_k ω_k ‖ĉ_k − l_kQ/‖L‖_F‖²_M + (γ/2) ‖Q − Q₀‖²_F,   M scaled to trace d,

    over Q (r, d) with orthonormal rows, by a Riemannian trust region. At M = I this is the problem that has the closed
    form (formulas of `nearest_simplex_etf`), and γ means the same under every metric. With M the inverse of the
    within-class covariance the distance is Mahalanobis'. The problem is an unbalanced Procrustes one and can have
    several local minima: the one found is the one below ``start``.

    Args:
        unit_means: Ĉ, (..., K, d).
        metric: M, (d,) for a diagonal, or (..., d, d), symmetric and positive definite.
        start: Q to start from, (..., r, d): the closed form.
        code: L, (K, r) or (..., K, r), centred; the simplex ETF's, with r = K−1, if not given.
        class_weights: ω, (..., K, 1) with mean 1; equal if not given.
        anchor: Q₀, (..., r, d); used if γ > 0.
        proximal_weight: γ ≥ 0.
        **solver: As for `argmin_on_stiefel`.

    Returns:
        `ArgminSolution` of Q, differentiable in means, metric, code and anchor.

    Raises:
        ValueError: A metric of another shape, not finite, not symmetric or not positive definite; and as
            `argmin_on_stiefel`.

    Source: Mahalanobis (1936) for the distance; Eldén, Park, "A Procrustes problem on the Stiefel manifold" (1999).

    Examples:
        >>> from neuralcollapse.geometry import stiefel
        >>> from neuralcollapse.geometry.simplex import reduce, simplex_etf
        >>> means = simplex_etf(3, 4, dtype=torch.float64) / 3**0.5
        >>> start = stiefel.random_point(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> solution = nearest_frame_under_metric(means, torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), start)
        >>> bool(torch.allclose(solution.point, (2 / 3) ** 0.5 * reduce(3**0.5 * means), atol=1e-6))
        True
    """
    scaled = unit_trace(metric, unit_means)
    rank = start.shape[-2]
    factor = None if code is None else code / torch.linalg.matrix_norm(code, keepdim=True)
    given = {"means": unit_means, "metric": scaled}
    if factor is not None:
        given["code"] = factor
    if proximal_weight > 0 and anchor is not None:
        given["anchor"] = anchor
    names = tuple(given)
    diagonal = metric.ndim == 1

    def cost(point: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        now = dict(zip(names, parameters, strict=True))
        frame = now["code"] @ point if "code" in now else expand(point) / math.sqrt(rank)
        difference = now["means"] - frame
        measured = difference * now["metric"] if diagonal else difference @ now["metric"]
        if class_weights is not None:
            measured = class_weights * measured
        value = rank / 2 * (measured * difference).sum((-2, -1))
        if "anchor" in now:
            value = value + proximal_weight / 2 * (point - now["anchor"]).square().sum((-2, -1))
        return value

    return argmin_on_stiefel(cost, tuple(given.values()), start, **solver)


def unit_trace(metric: Tensor, like: Tensor) -> Tensor:
    """The metric, symmetric and scaled to mean eigenvalue 1, in the dtype of ``like``; raise if it is no metric."""
    check_floating("metric", metric)
    dimension = like.shape[-1]
    if metric.shape != (dimension,) and (metric.ndim < 2 or metric.shape[-2:] != (dimension, dimension)):
        raise ValueError(
            f"metric must be of shape ({dimension},) or (..., {dimension}, {dimension}), got {tuple(metric.shape)}"
        )
    check_finite("metric", metric)
    metric = metric.to(like)
    if metric.ndim == 1:
        if values_readable(metric) and not bool((metric > 0).all()):
            raise ValueError(f"metric must be positive, got a least entry of {float(metric.min()):.3g}")
        return metric / metric.mean()
    if values_readable(metric):
        _check_positive_definite(metric.detach())
    return 0.5 * (metric + metric.mT) / metric.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]


def _check_positive_definite(metric: Tensor) -> None:
    asymmetry = float((metric - metric.mT).abs().max())
    if asymmetry > torch.finfo(metric.dtype).eps ** 0.5 * float(metric.abs().max()):
        raise ValueError(f"metric must be symmetric, got entries that differ from their mirror by {asymmetry:.3g}")
    _, failed = torch.linalg.cholesky_ex(metric)
    if bool(failed.any()):
        least = float(torch.linalg.eigvalsh(metric).min())
        raise ValueError(f"metric must be positive definite, got a least eigenvalue of {least:.3g}")
