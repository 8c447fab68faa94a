"""Values of the metrics at perfect collapse, and for random features."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers import generator
from metrics.brute_force import released_information
from neuralcollapse.catalogue import METRICS
from neuralcollapse.geometry import attribute_gram, code_from_gram, nearest_frame, random_simplex_etf, simplex_etf
from neuralcollapse.metrics import (
    ClassMoments,
    MeasureOptions,
    collapse_metrics,
    etf_distances,
    matrix_information,
    measure,
    nc2_gram,
    nc3_gram_duality,
)

K, D = 10, 16
MNIST_COUNTS = torch.tensor([5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949])
ETF = random_simplex_etf(K, D, generator=generator(), dtype=torch.float64)
REFERENCE = random_simplex_etf(K, D, generator=generator(9), dtype=torch.float64)
CODE = simplex_etf(K, K - 1, dtype=torch.float64)
BIAS = torch.zeros(K, dtype=torch.float64)
# Out of distribution: orthogonal to every class mean.
OOD = torch.linalg.svd(ETF)[2][-1]

AT_COLLAPSE = {name: value for name, metric in METRICS.items() if (value := metric.value_at_collapse(K)) is not None}


def all_metrics(features, targets, weight, center):
    """Everything that can be measured: of a model that is its classifier, and the distances to ETFs."""
    model = nn.Sequential(nn.Identity(), nn.Linear(D, K, dtype=torch.float64))
    model[1].weight.data, model[1].bias.data = weight, BIAS
    measurement = measure(
        model,
        [(features, targets)],
        ood=[OOD[None]],
        layers=["0"],
        probes=True,
        options=MeasureOptions(center=center, class_scatter=True, information=True, code=CODE),
        progress=False,
    )
    moments = measurement.moments
    return measurement.metrics | etf_distances(
        weight,
        moments.means,
        center=center,
        class_counts=moments.counts,
        reference_weight=REFERENCE,
        reference_means=REFERENCE,
    )


def assert_collapsed(values, balanced=True):
    assert values.keys() == METRICS.keys()
    for name, value in AT_COLLAPSE.items():
        tolerance = 1e-6 if name == "nc1_numerical_rank" else 1e-12
        if balanced or METRICS[name].center != "balanced":
            assert values[name] == pytest.approx(value, abs=tolerance), name


@pytest.mark.parametrize("center", ["samples", "classes"])
def test_balanced_exact_etf(center):
    targets = torch.arange(K).repeat(7)
    assert_collapsed(all_metrics(3 * ETF[targets], targets, ETF, center))


def test_balanced_frame_of_a_gram():
    """At collapse to another frame than an ETF, it is the metrics of that Gram that vanish."""
    gram = attribute_gram(torch.cartesian_prod(torch.arange(5), torch.arange(2)), torch.tensor([0.4, 0.4]).double())
    frame = nearest_frame(torch.randn(K, D, generator=generator(2)).double(), code_from_gram(gram, feature_dim=D))
    moments = ClassMoments(K, D)
    moments.update(3 * frame.repeat(4, 1) + 1, torch.arange(K).repeat(4))
    relative = ("nc2_gram_means", "nc2_gram_weights", "nc3_gram_duality")
    code = code_from_gram(gram, feature_dim=K) + 5
    intended = collapse_metrics(moments, frame, options=MeasureOptions(code=code))
    simplex = collapse_metrics(moments, frame, options=MeasureOptions(code=CODE))
    for name, absolute in zip(relative, ("nc2_etf_means", "nc2_etf_weights", "nc3_duality"), strict=True):
        assert intended[name] < 1e-12, name
        assert simplex[name] > 0.3, name
        assert simplex[name] == pytest.approx(simplex[absolute]), name
    assert not set(relative) & collapse_metrics(moments, frame).keys()
    assert set(relative) & collapse_metrics(moments, options=MeasureOptions(code=CODE)).keys() == {"nc2_gram_means"}


def test_more_classes_than_dimensions_collapse_to_a_gram_without_a_square_matrix():
    code = torch.randn(60, 4, generator=generator(3)).double()
    frame = nearest_frame(torch.randn(60, 6, generator=generator(2)).double(), code)
    assert nc2_gram(2 * frame + 1, code) < 1e-12
    assert nc3_gram_duality(frame, 2 * frame + 1, code) < 1e-12
    away = frame + 1e-5 * torch.randn(60, 6, generator=generator(4)).double()
    grams = [rows @ rows.T for rows in (away - away.mean(0), code - code.mean(0))]
    expected = (grams[0] / grams[0].norm() - grams[1] / grams[1].norm()).norm()
    assert float(nc2_gram(away, code)) == pytest.approx(float(expected), rel=1e-8)


def test_the_released_formula_of_hdr_is_noise_at_collapse():
    targets = torch.arange(K).repeat(7)
    noise = 1e-7 * torch.randn(len(targets), D, generator=generator(1)).double()
    features = ETF[targets] + noise
    mir, hdr = matrix_information(features, targets, ETF)
    assert float(mir) == pytest.approx(AT_COLLAPSE["mir"], abs=1e-5)
    assert hdr < 1e-5
    assert released_information(features, targets, ETF)["hdr"] > 0.1


def test_two_classes_leave_no_entropy_to_share():
    etf, targets = simplex_etf(2, 5, dtype=torch.float64), torch.arange(8) % 2
    assert all(torch.isnan(value) for value in matrix_information(etf[targets], targets, etf))
    assert METRICS["mir"].value_at_collapse(2) is None


def test_mnist_counts_need_the_centre_of_the_classes():
    targets = torch.repeat_interleave(torch.arange(K), MNIST_COUNTS)
    assert_collapsed(all_metrics(3 * ETF[targets], targets, ETF, "classes"), balanced=False)
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
    """Every metric but those with units (nc3_uniform, nc4_bias, feature_norm) does not change with scale."""
    targets = torch.arange(K).repeat(30)
    features = torch.randn(len(targets), D, generator=generator(5)).double()
    weight = torch.randn(K, D, generator=generator(6)).double()
    ordinary = all_metrics(features, targets, weight, "samples")
    tiny = all_metrics(1e-12 * features, targets, weight, "samples")
    for name in ordinary.keys() - {"nc3_uniform", "nc4_bias", "feature_norm"}:
        assert tiny[name] == pytest.approx(ordinary[name], rel=1e-8), name


def test_etf_distances_vanish_at_collapse_only():
    near = etf_distances(2 * ETF, 3 * ETF + 5, reference_weight=ETF, reference_means=ETF - 1)
    assert list(near) == [name for name in METRICS if name.startswith("etf_")]
    assert max(near.values()) < 1e-7
    away = etf_distances(2 * ETF, REFERENCE, reference_weight=ETF, reference_means=ETF)
    for name in ("etf_weights", "etf_means", "etf_weights_reference"):
        assert away[name] < 1e-12, name
    expected = float((ETF / ETF.norm() - REFERENCE / REFERENCE.norm()).square().sum())
    for name in ("etf_between", "etf_means_reference"):
        assert away[name] == pytest.approx(expected), name


def test_etf_distances_against_a_minimisation_over_orthogonal_matrices():
    """The nearest ETF, found by the definition of Procrustes in fp64: no basis, no anchor, scaled to norm 1."""

    def nearest(rows):
        u, _, v = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
        etf = u[:, : K - 1] @ v[: K - 1]
        return etf / etf.norm()

    weight, means, weight_0, means_0 = torch.randn(4, K, D, generator=generator(4)).double()
    origin = MNIST_COUNTS.double() @ means / MNIST_COUNTS.sum()
    origin_0 = MNIST_COUNTS.double() @ means_0 / MNIST_COUNTS.sum()
    centred, centred_0 = means - origin, means_0 - origin_0
    expected = {
        "etf_weights": nearest(weight) - weight / weight.norm(),
        "etf_means": nearest(centred) - centred / centred.norm(),
        "etf_between": nearest(weight) - nearest(centred),
        "etf_weights_reference": nearest(weight) - nearest(weight_0),
        "etf_means_reference": nearest(centred) - nearest(centred_0),
    }
    measured = etf_distances(
        weight, means, class_counts=MNIST_COUNTS, reference_weight=weight_0, reference_means=means_0
    )
    assert measured == pytest.approx({name: float(value.square().sum()) for name, value in expected.items()}, rel=1e-8)
    of_classes = etf_distances(weight, means, center="classes", class_counts=MNIST_COUNTS)
    assert of_classes == etf_distances(weight, means)
    assert of_classes["etf_means"] != measured["etf_means"]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((ETF[:, :-1], ETF), {}, r"weight must be of shape \(K, d\) = \(10, 16\), got \(10, 15\)"),
        ((ETF, ETF), {"reference_weight": ETF[:-1]}, r"reference_weight must be of shape .* got \(9, 16\)"),
        ((ETF, ETF), {"reference_means": "epoch 1"}, "reference_means must be a floating-point tensor, got str"),
        ((torch.full_like(ETF, torch.nan), ETF), {}, "weight must be finite"),
        ((ETF, [1, 2]), {}, "class_means must be a floating-point tensor, got list"),
        ((ETF, ETF), {"center": "mean"}, "center must be 'samples' or 'classes', got 'mean'"),
        ((ETF, ETF), {"class_counts": torch.ones(K)}, "class_counts must be integer"),
        (
            (ETF, ETF),
            {"class_counts": torch.zeros(K, dtype=torch.long)},
            "class_counts must be at least 0, and not all 0",
        ),
        ((ETF[:, :8], ETF[:, :8]), {}, "feature_dim|num_classes - 1"),
    ],
)
def test_bad_arguments_of_etf_distances(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        etf_distances(*arguments, **options)
