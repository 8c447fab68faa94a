"""NC3, self-duality: alignment of the classifier rows with the class means.

Common arguments, all floating:

- ``weight``: W (K, d) of the classifier.
- ``centred_means``: C (K, d), class means minus their centre.
- ``class_means``: M (K, d), class means relative to any centre.
- ``code``: L (K, r) of a Gram matrix G = LLᵀ (`neuralcollapse.geometry.code_from_gram`).

Every metric returns a scalar. It raises ``ValueError`` if a shape or type is wrong.

The alignment of single samples with classifier rows is in `neuralcollapse.metrics.alignment`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuralcollapse._checks import check_shapes
from neuralcollapse.metrics.nc2 import SimplexGram, distance_to_code_gram, distance_to_gram
from neuralcollapse.metrics.scaling import rescaled, unit_rows


def nc3_duality(weight: Tensor, centred_means: Tensor) -> Tensor:
    """‖WCᵀ/‖WCᵀ‖_F − T‖_F with T = (I − 11ᵀ/K)/√(K − 1); 0 at collapse, 2 at most; NaN if WCᵀ = 0.

    Source: Zhu et al., NeurIPS 2021 (NC3).

    Arguments, result and errors: see `neuralcollapse.metrics.nc3`.

    Examples:
        >>> nc3_duality(torch.tensor([[2.0, 0], [-2, 0]]), torch.tensor([[1.0, 0], [-1, 0]]))
        tensor(0.)
    """
    check_shapes(weight=(weight, "K d"), centred_means=(centred_means, "K d"))
    return distance_to_gram(weight, centred_means, SimplexGram(len(weight)))


def nc3_gram_duality(weight: Tensor, class_means: Tensor, code: Tensor) -> Tensor:
    """‖ΠWMᵀΠ/‖ΠWMᵀΠ‖_F − ΠGΠ/‖ΠGΠ‖_F‖_F, Π = I − 11ᵀ/K; 0 at collapse to a frame with Gram G = LLᵀ, 2 at most.

    The value is NaN if ΠWMᵀΠ = 0 or the rows of L are all equal.

    Source: `nc3_duality` (Zhu et al., NeurIPS 2021) with a given Gram matrix instead of that of a simplex ETF.

    Arguments, result and errors: see `neuralcollapse.metrics.nc3`.

    Examples:
        >>> rows = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
        >>> nc3_gram_duality(2 * rows, rows, rows), nc3_gram_duality(-rows, rows, rows)
        (tensor(0.), tensor(2.))
    """
    check_shapes(weight=(weight, "K d"), class_means=(class_means, "K d"), code=(code, "K r"))
    return distance_to_code_gram(weight, class_means, code)


def nc3_distance(weight: Tensor, centred_means: Tensor) -> Tensor:
    """‖W/‖W‖_F − C/‖C‖_F‖_F²; 0 at collapse, 4 at most; NaN if W = 0 or C = 0.

    Source: Papyan, Han & Donoho, PNAS 2020 (Fig. 5).

    Arguments, result and errors: see `neuralcollapse.metrics.nc3`.

    Examples:
        >>> nc3_distance(torch.eye(2), -torch.eye(2))
        tensor(4.0000)
    """
    check_shapes(weight=(weight, "K d"), centred_means=(centred_means, "K d"))
    weight, means = rescaled(weight), rescaled(centred_means)
    return (weight / torch.linalg.matrix_norm(weight) - means / torch.linalg.matrix_norm(means)).square().sum()


def nc3_uniform(weight: Tensor, centred_means: Tensor) -> Tensor:
    """Variance over classes of w_k·c_k; 0 at collapse; NaN if W = 0 or C = 0.

    Source: Wu & Papyan, NeurIPS 2024 (UNC3).

    Arguments, result and errors: see `neuralcollapse.metrics.nc3`.

    Examples:
        >>> nc3_uniform(torch.eye(2), torch.eye(2))
        tensor(0.)
    """
    check_shapes(weight=(weight, "K d"), centred_means=(centred_means, "K d"))
    defined = weight.detach().any() & centred_means.detach().any()
    return torch.where(defined, _variance((weight * centred_means).sum(dim=1)), torch.nan)


def nc3_uniform_cos(weight: Tensor, centred_means: Tensor) -> Tensor:
    """Variance over classes of cos(w_k, c_k); 0 at collapse; NaN if a row is zero.

    Source: Wu & Papyan, NeurIPS 2024 (UNC3).

    Arguments, result and errors: see `neuralcollapse.metrics.nc3`.

    Examples:
        >>> nc3_uniform_cos(torch.eye(2), 3 * torch.eye(2))
        tensor(0.)
    """
    check_shapes(weight=(weight, "K d"), centred_means=(centred_means, "K d"))
    return _variance((unit_rows(weight) * unit_rows(centred_means)).sum(dim=1))


def _variance(values: Tensor) -> Tensor:
    """Return the unbiased variance; NaN for fewer than two values."""
    return values.var() if len(values) > 1 else values.new_full((), torch.nan)
