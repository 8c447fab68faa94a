"""NC3, self-duality: classifier rows align with class means, and features with their classifier rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from neuralcollapse.metrics.doors import check_samples, check_shapes
from neuralcollapse.metrics.nc2 import distance_to_simplex_gram


def nc3_duality(weight: Tensor, centred_means: Tensor) -> Tensor:
    """‖WCᵀ/‖WCᵀ‖_F − T‖_F with T = (I − 11ᵀ/K)/√(K − 1); 0 at collapse, 2 at most. Source: Zhu et al., NeurIPS 2021.

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
    """‖W/‖W‖_F − C/‖C‖_F‖_F²; 0 at collapse, 4 at most. Source: Papyan, Han & Donoho, PNAS 2020 (Fig. 5).

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
    difference = weight / torch.linalg.matrix_norm(weight)
    difference = difference.addcmul_(centred_means, -1 / torch.linalg.matrix_norm(centred_means))
    return torch.linalg.matrix_norm(difference).square()


def nc3_uniform(weight: Tensor, centred_means: Tensor) -> Tensor:
    """Variance over the classes of w_k·c_k; 0 at collapse. Source: Wu & Papyan, NeurIPS 2024 (UNC3).

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
    return (weight * centred_means).sum(dim=1).var()


def nc3_uniform_cos(weight: Tensor, centred_means: Tensor) -> Tensor:
    """Variance over the classes of cos(w_k, c_k); 0 at collapse. Source: Wu & Papyan, NeurIPS 2024 (UNC3).

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
    norms = torch.linalg.vector_norm(weight, dim=1) * torch.linalg.vector_norm(centred_means, dim=1)
    return ((weight * centred_means).sum(dim=1) / norms).var()


def alignment(features: Tensor, targets: Tensor, weight: Tensor, center: Tensor) -> Tensor:
    """Mean over the samples of cos(h − m, w_y − w̄); 1 at collapse. Source: Markou, Ajanthan & Gould, NeurIPS 2024.

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
    check_samples(features, targets, weight, center)
    rows = weight - weight.mean(dim=0)
    centred = (features - center).to(rows.dtype)
    return cosine_similarity(centred, rows[targets], dim=1, eps=torch.finfo(rows.dtype).tiny).mean()
