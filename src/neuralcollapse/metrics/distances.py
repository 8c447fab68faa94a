"""Distances of classifier rows and class means to their nearest simplex ETFs, and of these to those of an epoch."""

from __future__ import annotations

import torch
from torch import Tensor

from neuralcollapse._checks import check_choice, check_finite, check_integers, check_shapes
from neuralcollapse.geometry import nearest_simplex_etf
from neuralcollapse.metrics.nc3 import nc3_distance
from neuralcollapse.metrics.scaling import rescaled
from neuralcollapse.metrics.statistics import Center
from neuralcollapse.metrics.undefined import Condition, warn_of_undefined, without_undefined


@torch.no_grad()
def etf_distances(
    weight: Tensor,
    class_means: Tensor,
    *,
    center: Center = "samples",
    class_counts: Tensor | None = None,
    reference_weight: Tensor | None = None,
    reference_means: Tensor | None = None,
) -> dict[str, float]:
    """Return squared Frobenius distances of W, C and their nearest simplex ETFs, each scaled to unit Frobenius norm.

    C are the class means minus their centre. Distances to a nearest ETF lie in [0, 2], distances between ETFs in
    [0, 4]. The first three distances are 0 at collapse. If the rows of a matrix are all equal, it has no nearest ETF:
    its distances are NaN, with a warning. Source: Markou, Ajanthan & Gould, NeurIPS 2024.

    Args:
        weight: W (K, d), d at least K − 1.
        class_means: M (K, d). If the classes are balanced, they may already be centred.
        center: ``"samples"``: C is M minus the mean of all samples, as published; ``"classes"``: C is M minus the mean
            of the class means.
        class_counts: (K,) numbers of samples per class, from which the mean of all samples follows; None for balanced
            classes.
        reference_weight: W₀ (K, d) of a reference epoch.
        reference_means: M₀ (K, d) of a reference epoch with the same class counts.

    Returns:
        ``etf_weights`` ‖E(W) − W‖², ``etf_means`` ‖E(C) − C‖², ``etf_between`` ‖E(W) − E(C)‖²; with references
        ``etf_weights_reference`` ‖E(W) − E(W₀)‖² and ``etf_means_reference`` ‖E(C) − E(C₀)‖².

    Raises:
        ValueError: if shapes differ, values are not finite, counts are negative or all zero, or d is less than K − 1.

    Examples:
        >>> from neuralcollapse.geometry import simplex_etf
        >>> distances = etf_distances(simplex_etf(4, 5), 3 * simplex_etf(4, 5) + 1)
        >>> list(distances), max(distances.values()) < 1e-6
        (['etf_weights', 'etf_means', 'etf_between'], True)
    """
    matrices = {"class_means": class_means, "weight": weight}
    matrices |= {} if reference_weight is None else {"reference_weight": reference_weight}
    matrices |= {} if reference_means is None else {"reference_means": reference_means}
    check_shapes(**{name: (matrix, "K d") for name, matrix in matrices.items()})
    for name, matrix in matrices.items():
        check_finite(name, matrix)
    check_choice("center", center, ("samples", "classes"))
    shares = _shares(class_counts, class_means) if center == "samples" else _shares(None, class_means)

    weight, centred_means = weight.double(), _centred(class_means, shares)
    weight_etf, means_etf = _nearest(weight), _nearest(centred_means, class_means)
    # nc3_distance is the squared distance between two matrices scaled to unit Frobenius norm.
    distances = {
        "etf_weights": nc3_distance(weight_etf, weight),
        "etf_means": nc3_distance(means_etf, centred_means),
        "etf_between": nc3_distance(weight_etf, means_etf),
    }
    if reference_weight is not None:
        distances["etf_weights_reference"] = nc3_distance(weight_etf, _nearest(reference_weight.double()))
    if reference_means is not None:
        reference_etf = _nearest(_centred(reference_means, shares), reference_means)
        distances["etf_means_reference"] = nc3_distance(means_etf, reference_etf)
    equal = Condition(
        "equal rows", "the rows of a matrix are all equal, up to rounding, so it has no nearest ETF", False
    )
    values, undefined = without_undefined({name: float(distance) for name, distance in distances.items()}, [equal])
    warn_of_undefined(undefined)
    return values


def _nearest(rows: Tensor, given: Tensor | None = None) -> Tensor:
    """Return the simplex ETF nearest to the rows; NaN if these are all equal, up to the rounding of ``given``."""
    given = rows if given is None else given
    noise = 4 * torch.finfo(given.dtype).eps * torch.linalg.vector_norm(given.double(), dim=1).amax()
    spread = torch.linalg.vector_norm(rows - rows.mean(dim=0), dim=1).amax()
    return nearest_simplex_etf(rescaled(rows)) if spread > noise else torch.full_like(rows, torch.nan)


def _shares(class_counts: Tensor | None, class_means: Tensor) -> Tensor:
    """Return the weight of each class mean in the centre, (K,)."""
    num_classes = len(class_means)
    if class_counts is None:
        return torch.full((num_classes,), 1 / num_classes, dtype=torch.float64, device=class_means.device)
    check_integers("class_counts", class_counts, num_classes)
    if (class_counts < 0).any() or not class_counts.any():
        raise ValueError(f"class_counts must be at least 0, and not all 0, got {class_counts.tolist()[:10]}")
    counts = class_counts.to(class_means.device, torch.float64)
    return counts / counts.sum()


def _centred(class_means: Tensor, shares: Tensor) -> Tensor:
    means = class_means.double()
    return means - shares @ means
