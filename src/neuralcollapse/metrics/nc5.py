"""NC5: features of out-of-distribution data become orthogonal to the class means."""

from __future__ import annotations

import torch
from torch import Tensor

from neuralcollapse._checks import check_shapes
from neuralcollapse.metrics.scaling import unit_rows


def nc5_ood(class_means: Tensor, ood_mean: Tensor) -> Tensor:
    """Mean over k of |cos(M_k, m_ood)|; 0 at collapse, 1 at most; NaN with a zero mean.

    Source: Ammar et al., ICLR 2024 (NECO).

    Args:
        class_means: M (K, d), not centred.
        ood_mean: (d,) mean feature of the out-of-distribution data.

    Raises:
        ValueError: Another shape or type.

    Examples:
        >>> nc5_ood(torch.eye(2, 3), torch.tensor([0.0, 0, 1]))
        tensor(0.)
    """
    check_shapes(class_means=(class_means, "K d"), ood_mean=(ood_mean, "d"))
    return torch.mv(unit_rows(class_means), unit_rows(ood_mean)).abs().mean()
