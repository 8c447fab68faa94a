"""How far a classifier and its class means are from simplex ETFs, and from each other."""

from __future__ import annotations

import torch
from torch import Tensor

from neuralcollapse._checks import check_finite, check_floating
from neuralcollapse.geometry import nearest_simplex_etf
from neuralcollapse.metrics.nc3 import nc3_distance, nc3_duality


@torch.no_grad()
def etf_distances(weight: Tensor, class_means: Tensor, reference: Tensor | None = None) -> dict[str, float]:
    """Squared Frobenius distances between W, C, and their nearest simplex ETFs, each scaled to unit Frobenius norm.

    C are the class means less their mean. Every distance lies in [0, 4]; at collapse all are 0.
    Source: Markou, Ajanthan & Gould, NeurIPS 2024.

    Args:
        weight: W (K, d), d at least K − 1.
        class_means: M (K, d).
        reference: (K, d) class means or weight of a reference epoch.

    Returns:
        ``weight_to_etf`` ‖etf(W) − W‖², ``means_to_etf`` ‖etf(C) − C‖², ``etf_to_etf`` ‖etf(W) − etf(C)‖²,
        ``weight_to_means`` ‖W − C‖², ``duality`` ‖WCᵀ/‖WCᵀ‖ − T‖; with a reference ``weight_etf_to_reference`` and
        ``means_etf_to_reference``, ‖etf(·) − etf(reference)‖².

    Raises:
        ValueError: Shapes that differ, values that are not finite, or d under K − 1.

    Example:
        >>> from neuralcollapse.geometry import simplex_etf
        >>> distances = etf_distances(simplex_etf(4, 5), 3 * simplex_etf(4, 5) + 1)
        >>> max(distances.values()) < 1e-6
        True
    """
    check_floating("class_means", class_means)
    matrices = {"weight": weight, "class_means": class_means}
    if reference is not None:
        matrices["reference"] = reference
    for name, matrix in matrices.items():
        check_floating(name, matrix)
        if matrix.ndim != 2 or matrix.shape != class_means.shape:
            raise ValueError(f"{name} must be of shape {tuple(class_means.shape)} (K, d), got {tuple(matrix.shape)}")
        check_finite(name, matrix)
    weight, centred_means = weight.double(), class_means.double() - class_means.double().mean(dim=0)
    weight_etf, means_etf = nearest_simplex_etf(weight), nearest_simplex_etf(centred_means)
    # Of two matrices, nc3_distance is the squared distance at unit Frobenius norm.
    distances = {
        "weight_to_etf": nc3_distance(weight_etf, weight),
        "means_to_etf": nc3_distance(means_etf, centred_means),
        "etf_to_etf": nc3_distance(weight_etf, means_etf),
        "weight_to_means": nc3_distance(weight, centred_means),
        "duality": nc3_duality(weight, centred_means),
    }
    if reference is not None:
        reference_etf = nearest_simplex_etf(reference.double())
        distances["weight_etf_to_reference"] = nc3_distance(weight_etf, reference_etf)
        distances["means_etf_to_reference"] = nc3_distance(means_etf, reference_etf)
    return {name: float(distance) for name, distance in distances.items()}
