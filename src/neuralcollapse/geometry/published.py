"""Published problem of the nearest simplex ETF and its published solver, for comparison with the closed form."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from neuralcollapse._checks import check_at_least, check_finite, check_floating, check_not_negative
from neuralcollapse.geometry.argmin import ArgminSolution, argmin_on_stiefel

PUBLISHED_PROXIMAL_WEIGHT = 1e-3
PUBLISHED_MAX_ITERATIONS = 30


def published_nearest_frame(
    class_means: Tensor,
    last: Tensor | None = None,
    *,
    proximal_weight: float = PUBLISHED_PROXIMAL_WEIGHT,
    max_iterations: int = PUBLISHED_MAX_ITERATIONS,
    **solver: Any,
) -> ArgminSolution:
    r"""Return the solution P of the published problem, by a Riemannian trust region, differentiable in the class means.

    With Ĉ the centred means of unit Frobenius norm and Π = I − 11ᵀ/K, it minimises

        ‖Ĉ − ΠP/√(K−1)‖²_F + (δ/2) ‖P − P₀‖²_F   over P (K, d) with orthonormal rows.

    The simplex ETF is √(K/(K−1)) ΠP (`frame_to_etf`). It does not depend on the component of P along the all-ones
    vector. Because of this component, the problem needs d ≥ K and is singular for δ = 0; `nearest_simplex_etf` solves
    the problem without it. If no previous solution is given, the problem is first solved with δ = 0 to obtain one, as
    in the publication.

    Args:
        class_means: (..., K, d) floating, d ≥ K.
        last: P₀, (..., K, d), the previous solution, which is also the start.
        proximal_weight: δ ≥ 0.
        max_iterations: Maximum number of outer iterations; by default the published 30.
        **solver: Keyword arguments of `minimize_on_stiefel`.

    Returns:
        `ArgminSolution` with point P.

    Raises:
        ValueError: if shapes or the weight are out of range, the means are not finite or all equal, or the last
            solution is not on the manifold.

    Source: Markou, Ajanthan, Gould, "Guiding Neural Collapse" (NeurIPS 2024).

    Examples:
        >>> from neuralcollapse import nearest_simplex_etf
        >>> means = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> etf = frame_to_etf(published_nearest_frame(means).point)
        >>> bool(torch.allclose(etf, nearest_simplex_etf(means), atol=1e-5))
        True
    """
    check_floating("class_means", class_means)
    if class_means.ndim < 2:
        raise ValueError(f"class_means must be of shape (..., K, d), got {tuple(class_means.shape)}")
    num_classes, feature_dim = class_means.shape[-2:]
    check_at_least("num_classes", num_classes, 2)
    check_at_least("feature_dim", feature_dim, num_classes, "num_classes")
    check_finite("class_means", class_means)
    check_not_negative("proximal_weight", proximal_weight)
    centred = class_means - class_means.mean(-2, keepdim=True)
    norm = torch.linalg.matrix_norm(centred, keepdim=True)
    if not bool((norm > 4 * torch.finfo(norm.dtype).eps * torch.linalg.matrix_norm(class_means, keepdim=True)).all()):
        raise ValueError("class_means must not be all equal (centred, they are all zero)")
    unit = centred / norm
    solver |= {"max_iterations": max_iterations}
    if last is None:
        start = torch.eye(num_classes, feature_dim, dtype=unit.dtype, device=unit.device).expand(unit.shape)
        last = argmin_on_stiefel(_data_term, unit.detach(), start, **solver).point
    anchor = last.detach()

    def cost(point: Tensor, unit: Tensor) -> Tensor:
        return _data_term(point, unit) + proximal_weight / 2 * (point - anchor).square().sum((-2, -1))

    return argmin_on_stiefel(cost, unit, anchor, **solver)


def frame_to_etf(frame: Tensor) -> Tensor:
    """Return the unit simplex ETF √(K/(K−1)) ΠP of a matrix P (..., K, d) with orthonormal rows.

    Examples:
        >>> frame_to_etf(torch.eye(2))
        tensor([[ 0.7071, -0.7071],
                [-0.7071,  0.7071]])
    """
    num_classes = frame.shape[-2]
    return math.sqrt(num_classes / (num_classes - 1)) * (frame - frame.mean(-2, keepdim=True))


def _data_term(point: Tensor, unit: Tensor) -> Tensor:
    scale = 1 / math.sqrt(point.shape[-2] - 1)
    return (unit - scale * (point - point.mean(-2, keepdim=True))).square().sum((-2, -1))
