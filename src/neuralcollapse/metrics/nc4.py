"""NC4: the classifier's answer becomes the nearest class mean's."""

from __future__ import annotations

import torch
from torch import Tensor

from neuralcollapse._checks import check_integers, check_shapes

_TILE_ELEMENTS = 2**22


def nearest_class_mean(features: Tensor, class_means: Tensor) -> Tensor:
    """The class k of least ‖h − M_k‖, for each sample.

    Args:
        features: h (N, d).
        class_means: M (K, d).

    Returns:
        (N,) indices in [0, K).

    Raises:
        ValueError: Another shape or type.

    Examples:
        >>> nearest_class_mean(torch.tensor([[0.9, 0.2]]), torch.eye(2))
        tensor([0])
    """
    check_shapes(features=(features, "N d"), class_means=(class_means, "K d"))
    center = class_means.mean(dim=0)  # the difference of two distances loses digits far from the origin
    rows = class_means - center
    half_squares = rows.square().sum(dim=1) / 2
    step = max(1, _TILE_ELEMENTS // len(class_means))
    return torch.cat(
        [((block - center).to(rows.dtype) @ rows.T - half_squares).argmax(dim=1) for block in features.split(step)]
    )


def nc4_ncc_mismatch(features: Tensor, predictions: Tensor, class_means: Tensor) -> Tensor:
    """Share of samples whose nearest class mean is not the classifier's answer; 0 at collapse, 1 at most.

    NaN where the class means are all equal, so that none is the nearest, and of no samples.
    Source: Papyan, Han & Donoho, PNAS 2020 (Fig. 7).

    Args:
        features: h (N, d), of either split.
        predictions: (N,) the classifier's answers.
        class_means: M (K, d), of the train split.

    Raises:
        ValueError: Another shape or type.

    Examples:
        >>> nc4_ncc_mismatch(torch.tensor([[0.9, 0.2], [0, 1]]), torch.tensor([0, 0]), torch.eye(2))
        tensor(0.5000, dtype=torch.float64)
    """
    check_shapes(features=(features, "N d"), class_means=(class_means, "K d"))
    check_integers("predictions", predictions, len(features))
    mismatch = (nearest_class_mean(features, class_means) != predictions).double().mean()
    return torch.where((class_means != class_means[:1]).any(), mismatch, torch.nan)


def nc4_bias(weight: Tensor, bias: Tensor | None, center: Tensor) -> Tensor:
    """‖W m + b‖₂, the logits at the features' centre; 0 at collapse. Source: Zhu et al., NeurIPS 2021 (NC4).

    Args:
        weight: W (K, d).
        bias: b (K,), or None for 0.
        center: m (d,).

    Raises:
        ValueError: Another shape or type.

    Examples:
        >>> nc4_bias(torch.eye(2), torch.tensor([-3.0, 4]), torch.tensor([3.0, -4]))
        tensor(0.)
    """
    check_shapes(weight=(weight, "K d"), center=(center, "d"), **({} if bias is None else {"bias": (bias, "K")}))
    logits = weight @ center
    return torch.linalg.vector_norm(logits if bias is None else logits + bias)
