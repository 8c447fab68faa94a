"""NC0: the classifier's rows sum to zero."""

from __future__ import annotations

import torch
from torch import Tensor

from neuralcollapse._checks import check_shapes
from neuralcollapse.metrics.scaling import rescaled


def nc0_weight_sum(weight: Tensor) -> Tensor:
    """‖Σ_k w_k‖₂/‖W‖_F; 0 at collapse, √K at most; NaN of W = 0. Source: NC0 of arXiv 2602.16642, made scale-free.

    Args:
        weight: W (K, d).

    Raises:
        ValueError: Another shape or type.

    Examples:
        >>> nc0_weight_sum(torch.tensor([[3.0, 0], [0, 4]]))
        tensor(1.)
    """
    check_shapes(weight=(weight, "K d"))
    weight = rescaled(weight)
    return torch.linalg.vector_norm(weight.sum(dim=0)) / torch.linalg.matrix_norm(weight)
