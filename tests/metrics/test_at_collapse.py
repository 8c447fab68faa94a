"""What the metrics say of perfect collapse, and of random features."""

from __future__ import annotations

import pytest
import torch

from helpers import generator
from neuralcollapse.geometry import random_simplex_etf
from neuralcollapse.metrics import (
    ClassMoments,
    alignment,
    class_statistics,
    collapse_metrics,
    etf_distances,
    nc2_cos_margin,
    nc4_ncc_mismatch,
)

K, D = 10, 16
MNIST_COUNTS = torch.tensor([5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949])
ETF = random_simplex_etf(K, D, generator=generator(), dtype=torch.float64)
BIAS = torch.zeros(K, dtype=torch.float64)
# Out of distribution: orthogonal to every class mean.
OOD = torch.linalg.svd(ETF)[2][-1]

AT_COLLAPSE = {
    "nc1_pinv": 0,
    "nc1_quotient": 0,
    "nc1_cdnv": 0,
    "nc1_vci": 0,
    "nc1_numerical_rank": 1,
    "nc2_etf_means": 0,
    "nc2_etf_weights": 0,
    "nc2_equinorm_means": 0,
    "nc2_equinorm_weights": 0,
    "nc2_equinorm_difference": 0,
    "nc2_equiangular_means": 0,
    "nc2_equiangular_weights": 0,
    "nc2_max_angle_means": 0,
    "nc2_max_angle_weights": 0,
    "nc2_hyperspherical_dist_mean": (2 * K / (K - 1)) ** 0.5,
    "nc2_hyperspherical_dist_variance": 0,
    "nc2_hyperspherical_log_variance": 0,
    "nc2_hyperspherical_riesz_variance": 0,
    "nc2_cos_margin": K / (K - 1),
    "nc3_duality": 0,
    "nc3_distance": 0,
    "nc3_uniform": 0,
    "nc3_uniform_cos": 0,
    "alignment": 1,
    "nc4_ncc_mismatch": 0,
    "nc4_bias": 0,
    "nc5_ood": 0,
}


def all_metrics(features, targets, weight, center):
    moments = ClassMoments(K, D, class_scatter=True)
    moments.update(features, targets)
    statistics = class_statistics(moments, center=center)
    values = collapse_metrics(moments, weight, BIAS, center=center, ood_mean=OOD)
    values["nc2_cos_margin"] = float(nc2_cos_margin(features, targets, weight, statistics.center))
    values["alignment"] = float(alignment(features, targets, weight, statistics.center))
    predictions = (features @ weight.T).argmax(dim=1)
    values["nc4_ncc_mismatch"] = float(nc4_ncc_mismatch(features, predictions, statistics.class_means))
    return values


def assert_collapsed(values):
    for name, value in AT_COLLAPSE.items():
        tolerance = 1e-6 if name == "nc1_numerical_rank" else 1e-12
        assert values[name] == pytest.approx(value, abs=tolerance), name


@pytest.mark.parametrize("center", ["samples", "classes"])
def test_balanced_exact_etf(center):
    targets = torch.arange(K).repeat(7)
    assert_collapsed(all_metrics(3 * ETF[targets], targets, ETF, center))


def test_mnist_counts_need_the_centre_of_the_classes():
    targets = torch.repeat_interleave(torch.arange(K), MNIST_COUNTS)
    assert_collapsed(all_metrics(3 * ETF[targets], targets, ETF, "classes"))
    moments = ClassMoments(K, D)
    moments.update(3 * ETF[targets], targets)
    assert collapse_metrics(moments, ETF)["nc2_etf_means"] == pytest.approx(0.025, abs=0.001)


def test_random_features_are_not_collapsed():
    targets = torch.arange(K).repeat(30)
    features = torch.randn(len(targets), D, generator=generator(5)).double()
    values = all_metrics(features, targets, torch.randn(K, D, generator=generator(6)).double(), "samples")
    for name, value in AT_COLLAPSE.items():
        assert abs(values[name] - value) > 1e-4, name


def test_scale_does_not_matter():
    """Every metric but those with units (nc3_uniform, nc4_bias) is the same for features a trillion times smaller."""
    targets = torch.arange(K).repeat(30)
    features = torch.randn(len(targets), D, generator=generator(5)).double()
    weight = torch.randn(K, D, generator=generator(6)).double()
    ordinary = all_metrics(features, targets, weight, "samples")
    tiny = all_metrics(1e-12 * features, targets, weight, "samples")
    for name in ordinary.keys() - {"nc3_uniform", "nc4_bias"}:
        assert tiny[name] == pytest.approx(ordinary[name], rel=1e-8), name


def test_etf_distances_vanish_at_collapse_only():
    distances = etf_distances(2 * ETF, 3 * ETF + 5, reference=ETF)
    assert max(distances.values()) < 1e-7
    other = random_simplex_etf(K, D, generator=generator(9), dtype=torch.float64)
    away = etf_distances(2 * ETF, other, reference=ETF)
    assert away["weight_to_etf"] < 1e-12
    assert away["means_to_etf"] < 1e-12
    assert away["weight_etf_to_reference"] < 1e-12
    expected = float((ETF / ETF.norm() - other / other.norm()).square().sum())
    for name in ("etf_to_etf", "weight_to_means", "means_etf_to_reference"):
        assert away[name] == pytest.approx(expected), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ETF[:, :-1], ETF), r"weight must be of shape \(10, 16\) \(K, d\), got \(10, 15\)"),
        ((ETF, ETF, ETF[:-1]), r"reference must be of shape \(10, 16\) \(K, d\), got \(9, 16\)"),
        ((torch.full_like(ETF, torch.nan), ETF), "weight must be finite"),
        ((ETF, [1, 2]), "class_means must be a floating-point tensor"),
    ],
)
def test_bad_arguments_of_etf_distances(arguments, message):
    with pytest.raises(ValueError, match=message):
        etf_distances(*arguments)
