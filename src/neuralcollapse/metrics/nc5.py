"""NC5: features of out-of-distribution data become orthogonal to the class means."""

from __future__ import annotations

import torch
from torch import Tensor

from neuralcollapse.metrics.doors import check_shapes


def nc5_ood(class_means: Tensor, ood_mean: Tensor) -> Tensor:
    """Mean over k of |cos(M_k, m_ood)|; 0 at collapse, 1 at most. Source: Ammar et al., ICLR 2024 (NECO).

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
    norms = torch.linalg.vector_norm(class_means, dim=1) * torch.linalg.vector_norm(ood_mean)
    return (class_means @ ood_mean / norms).abs().mean()
