"""NC3, self-duality: classifier rows align with class means, and features with their classifier rows."""

from __future__ import annotations

import torch
from torch import Tensor

from neuralcollapse._checks import check_samples, check_shapes
from neuralcollapse.metrics.nc2 import distance_to_simplex_gram
from neuralcollapse.metrics.scaling import rescaled, unit_deviations, unit_rows


def nc3_duality(weight: Tensor, centred_means: Tensor) -> Tensor:
    """‖WCᵀ/‖WCᵀ‖_F − T‖_F with T = (I − 11ᵀ/K)/√(K − 1); 0 at collapse, 2 at most; NaN where WCᵀ = 0.

    Source: Zhu et al., NeurIPS 2021 (NC3).

    Args:
        weight: W (K, d).
        centred_means: C (K, d).

    Raises:
        ValueError: Another shape or type.

    Examples:
        >>> nc3_duality(torch.tensor([[2.0, 0], [-2, 0]]), torch.tensor([[1.0, 0], [-1, 0]]))
        tensor(0.)
    """
    check_shapes(weight=(weight, "K d"), centred_means=(centred_means, "K d"))
    return distance_to_simplex_gram(weight, centred_means)


def nc3_distance(weight: Tensor, centred_means: Tensor) -> Tensor:
    """‖W/‖W‖_F − C/‖C‖_F‖_F²; 0 at collapse, 4 at most; NaN where W or C is 0.

    Source: Papyan, Han & Donoho, PNAS 2020 (Fig. 5).

    Args:
        weight: W (K, d).
        centred_means: C (K, d).

    Raises:
        ValueError: Another shape or type.

    Examples:
        >>> nc3_distance(torch.eye(2), -torch.eye(2))
        tensor(4.0000)
    """
    check_shapes(weight=(weight, "K d"), centred_means=(centred_means, "K d"))
    weight, means = rescaled(weight), rescaled(centred_means)
    return (weight / torch.linalg.matrix_norm(weight) - means / torch.linalg.matrix_norm(means)).square().sum()


def nc3_uniform(weight: Tensor, centred_means: Tensor) -> Tensor:
    """Variance over the classes of w_k·c_k; 0 at collapse; NaN where W or C is 0.

    Source: Wu & Papyan, NeurIPS 2024 (UNC3).

    Args:
        weight: W (K, d).
        centred_means: C (K, d).

    Raises:
        ValueError: Another shape or type.

    Examples:
        >>> nc3_uniform(torch.eye(2), torch.eye(2))
        tensor(0.)
    """
    check_shapes(weight=(weight, "K d"), centred_means=(centred_means, "K d"))
    defined = weight.detach().any() & centred_means.detach().any()
    return torch.where(defined, _variance((weight * centred_means).sum(dim=1)), torch.nan)


def nc3_uniform_cos(weight: Tensor, centred_means: Tensor) -> Tensor:
    """Variance over the classes of cos(w_k, c_k); 0 at collapse; NaN with a zero row.

    Source: Wu & Papyan, NeurIPS 2024 (UNC3).

    Args:
        weight: W (K, d).
        centred_means: C (K, d).

    Raises:
        ValueError: Another shape or type.

    Examples:
        >>> nc3_uniform_cos(torch.eye(2), 3 * torch.eye(2))
        tensor(0.)
    """
    check_shapes(weight=(weight, "K d"), centred_means=(centred_means, "K d"))
    return _variance((unit_rows(weight) * unit_rows(centred_means)).sum(dim=1))


def alignment(features: Tensor, targets: Tensor, weight: Tensor, center: Tensor) -> Tensor:
    """Mean over the samples of cos(h − m, w_y − w̄); 1 at collapse. Source: Markou, Ajanthan & Gould, NeurIPS 2024.

    NaN if a sample is at the centre, or the row of a sample's class is the mean row: such a vector has no direction.

    Args:
        features: h (N, d).
        targets: (N,) classes in [0, K).
        weight: W (K, d).
        center: m (d,), the features' centre.

    Raises:
        ValueError: Another shape or type, or targets out of range.

    Examples:
        >>> weight = torch.tensor([[1.0, 0], [-1, 0]])
        >>> alignment(torch.tensor([[2.0, 1]]), torch.tensor([0]), weight, center=torch.tensor([0, 1.0]))
        tensor(1.)
    """
    targets = check_samples(features, targets, weight, center)
    rows = unit_deviations(weight, weight.mean(dim=0))
    return (unit_deviations(features, center).to(rows.dtype) * rows[targets]).sum(dim=1).mean()


def _variance(values: Tensor) -> Tensor:
    """Return the unbiased variance; NaN of fewer than two values."""
    return values.var() if len(values) > 1 else values.new_full((), torch.nan)
