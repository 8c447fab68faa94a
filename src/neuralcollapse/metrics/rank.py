"""Norm of the features, and effective rank of features, class means and classifier rows."""

from __future__ import annotations

import torch
from torch import Tensor

from neuralcollapse._checks import check_finite, check_integers, check_shapes
from neuralcollapse.metrics.scaling import power_of_two, rescaled, square_root


def feature_norm(class_means: Tensor, within_class_variances: Tensor, counts: Tensor) -> Tensor:
    """Root mean square √(Σ‖h‖²/N) of the feature norms, from Σ‖h‖² = Σ_k n_k(v_k + ‖M_k‖²).

    Args:
        class_means: M (K, d), not centred.
        within_class_variances: v (K,), mean squared distance of the samples of each class to the class mean.
        counts: n (K,).

    Raises:
        ValueError: if a shape or type is wrong.

    Examples:
        >>> feature_norm(torch.tensor([[3.0, 0], [0, 4]]), torch.zeros(2), torch.tensor([8, 8]))
        tensor(3.5355)
    """
    check_shapes(class_means=(class_means, "K d"), within_class_variances=(within_class_variances, "K"))
    check_integers("counts", counts, len(class_means))
    unit = power_of_two(class_means, within_class_variances.detach().clamp(min=0).sqrt())
    squares = within_class_variances * unit * unit + (class_means * unit).square().sum(dim=1)
    return square_root(squares @ (counts.to(squares.dtype) / counts.sum())) / unit


def rank_me(within_class_covariance: Tensor, class_means: Tensor, counts: Tensor) -> Tensor:
    """RankMe, exp(−Σ p_i log p_i) with p_i = σ_i/Σσ, σ the singular values of the features (N, d).

    The squares σ² are the eigenvalues of S + Σ n_k M_kM_kᵀ; eigenvalues below d·eps·λ₁ count as 0 and have no gradient.
    The value is K − 1 at collapse of balanced classes with global mean 0, at most min(N, d), and NaN if all features
    are zero. Source: Garrido et al., ICML 2023.

    Args:
        within_class_covariance: Σ_W = S/N (d, d).
        class_means: M (K, d), not centred.
        counts: n (K,).

    Raises:
        ValueError: if a shape or type is wrong.

    Examples:
        >>> rank_me(torch.zeros(3, 3), torch.eye(2, 3), torch.tensor([5, 5]))
        tensor(2.)
    """
    check_shapes(within_class_covariance=(within_class_covariance, "d d"), class_means=(class_means, "K d"))
    check_integers("counts", counts, len(class_means))
    check_finite("within_class_covariance", within_class_covariance)
    check_finite("class_means", class_means)
    unit = power_of_two(class_means, within_class_covariance.detach().diagonal().clamp(min=0).sqrt())
    means, shares = class_means * unit, counts.to(class_means.dtype) / counts.sum()
    within = (within_class_covariance + within_class_covariance.T) / 2 * unit * unit
    eigenvalues = torch.linalg.eigvalsh(within + means.T @ (shares[:, None] * means))
    zero = len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps * eigenvalues.detach()[-1]
    return _exponential_entropy(square_root(torch.where(eigenvalues.detach() > zero, eigenvalues, 0)))


def effective_rank(vectors: Tensor) -> Tensor:
    """Effective rank exp(−Σ p_i log p_i), p_i = σ_i/Σσ, of a matrix; K − 1 at collapse, min(K, d) at most.

    The value is NaN if X = 0. Singular values below max(K, d)·eps·σ₁ count as 0 and have no gradient. `rank_me` is the
    effective rank of all features. Source: Roy & Vetterli, EUSIPCO 2007.

    Args:
        vectors: X (K, d): centred class means or classifier rows.

    Raises:
        ValueError: if a shape or type is wrong.

    Examples:
        >>> round(float(effective_rank(torch.eye(3, 5))), 4)
        3.0
    """
    check_shapes(vectors=(vectors, "K d"))
    check_finite("vectors", vectors)
    singular_values = torch.linalg.svdvals(rescaled(vectors))
    zero = max(vectors.shape) * torch.finfo(vectors.dtype).eps * singular_values.detach()[:1]
    return _exponential_entropy(torch.where(singular_values.detach() > zero, singular_values, 0))


def _exponential_entropy(values: Tensor) -> Tensor:
    """Return exp(−Σ p_i log p_i) for p = values/Σ values; NaN if all values are 0."""
    positive = values > 0
    shares = values / values.sum()
    entropy = torch.where(positive, torch.special.entr(torch.where(positive, shares, 1)), 0).sum()
    return torch.where(positive.any(), entropy.exp(), torch.nan)
