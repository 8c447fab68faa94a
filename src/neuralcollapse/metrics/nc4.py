"""NC4, agreement of the classifier with the nearest class mean, and NC5, orthogonality of out-of-distribution data."""

from __future__ import annotations

import torch
from torch import Tensor

from neuralcollapse._checks import check_integers, check_shapes
from neuralcollapse.metrics.scaling import unit_rows

_TILE_ELEMENTS = 2**22


def nearest_class_mean(features: Tensor, class_means: Tensor) -> Tensor:
    """Return the class k with the smallest ‖h − M_k‖ for each sample.

    Args:
        features: h (N, d).
        class_means: M (K, d).

    Returns:
        (N,) indices in [0, K).

    Raises:
        ValueError: if a shape or type is wrong.

    Examples:
        >>> nearest_class_mean(torch.tensor([[0.9, 0.2]]), torch.eye(2))
        tensor([0])
    """
    check_shapes(features=(features, "N d"), class_means=(class_means, "K d"))
    center = class_means.mean(dim=0)  # far from the origin, the difference of two distances loses digits
    rows = class_means - center
    half_squares = rows.square().sum(dim=1) / 2
    step = max(1, _TILE_ELEMENTS // len(class_means))
    return torch.cat(
        [((block - center).to(rows.dtype) @ rows.T - half_squares).argmax(dim=1) for block in features.split(step)]
    )


def nc4_ncc_mismatch(features: Tensor, predictions: Tensor, class_means: Tensor) -> Tensor:
    """Share of samples whose nearest class mean differs from the predicted class; 0 at collapse, 1 at most.

    The value is NaN if all class means are equal or there are no samples.
    Source: Papyan, Han & Donoho, PNAS 2020 (Fig. 7).

    Args:
        features: h (N, d), of either split.
        predictions: (N,) predicted classes.
        class_means: M (K, d), of the train split.

    Raises:
        ValueError: if a shape or type is wrong.

    Examples:
        >>> nc4_ncc_mismatch(torch.tensor([[0.9, 0.2], [0, 1]]), torch.tensor([0, 0]), torch.eye(2))
        tensor(0.5000, dtype=torch.float64)
    """
    check_shapes(features=(features, "N d"), class_means=(class_means, "K d"))
    check_integers("predictions", predictions, len(features))
    mismatch = mismatches(features, predictions, class_means).mean()
    return torch.where((class_means != class_means[:1]).any(), mismatch, torch.nan)


def mismatches(features: Tensor, predictions: Tensor, class_means: Tensor) -> Tensor:
    """Return 1.0 for each sample whose nearest class mean differs from the predicted class, else 0.0, (N,)."""
    return (nearest_class_mean(features, class_means) != predictions).double()


def nc4_bias(weight: Tensor, bias: Tensor | None, center: Tensor) -> Tensor:
    """‖W m + b‖₂, the logits at the features' centre; 0 at collapse. Source: Zhu et al., NeurIPS 2021 (NC4).

    Args:
        weight: W (K, d).
        bias: b (K,), or None for 0.
        center: m (d,).

    Raises:
        ValueError: if a shape or type is wrong.

    Examples:
        >>> nc4_bias(torch.eye(2), torch.tensor([-3.0, 4]), torch.tensor([3.0, -4]))
        tensor(0.)
    """
    check_shapes(weight=(weight, "K d"), center=(center, "d"), **({} if bias is None else {"bias": (bias, "K")}))
    logits = weight @ center
    return torch.linalg.vector_norm(logits if bias is None else logits + bias)


def nc5_ood(class_means: Tensor, ood_mean: Tensor) -> Tensor:
    """Mean over k of |cos(M_k, m_ood)|; 0 at collapse, 1 at most; NaN if a mean is zero.

    Source: Ammar et al., ICLR 2024 (NECO).

    Args:
        class_means: M (K, d), not centred.
        ood_mean: (d,) mean feature of the out-of-distribution data.

    Raises:
        ValueError: if a shape or type is wrong.

    Examples:
        >>> nc5_ood(torch.eye(2, 3), torch.tensor([0.0, 0, 1]))
        tensor(0.)
    """
    check_shapes(class_means=(class_means, "K d"), ood_mean=(ood_mean, "d"))
    return torch.mv(unit_rows(class_means), unit_rows(ood_mean)).abs().mean()
