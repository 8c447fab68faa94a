"""Every metric equals its dense two-pass fp64 definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import generator
from metrics.brute_force import dense_metrics, dense_sample_metrics, dense_sphere_metrics
from neuralcollapse.metrics import (
    ClassMoments,
    MeasureOptions,
    alignment,
    class_alignment,
    class_statistics,
    collapse_metrics,
    instance_alignment,
    matrix_information,
    nc2_cos_margin,
    nc4_ncc_mismatch,
)


def assert_equal(measured: dict[str, float], expected: dict[str, float]) -> None:
    assert measured.keys() == expected.keys()
    for name, value in expected.items():
        absolute = 1e-12
        if name.startswith(("nc2_etf", "nc3_duality", "nc2_gram", "nc3_gram")) and value < 1e-6:
            absolute = 1e-7
        if not math.isfinite(value):  # the kernels of two directions on one line
            value = math.nan
        assert measured[name] == pytest.approx(value, rel=1e-8, abs=absolute, nan_ok=True), name


@st.composite
def data_sets(draw: st.DrawFn) -> tuple[int, int, torch.Tensor, torch.Tensor, list[int]]:
    """K, d, features, targets in any order, and sizes of batches."""
    num_classes = draw(st.integers(2, 9))
    feature_dim = draw(
        st.sampled_from([num_classes - 2, num_classes - 1, num_classes, 2 * num_classes + 5]).filter(bool)
    )
    counts = draw(st.lists(st.integers(0, 12), min_size=num_classes, max_size=num_classes))
    counts[0], counts[-1] = counts[0] + 2, counts[-1] + 1
    random = generator(draw(st.integers(0, 10**6)))
    targets = torch.repeat_interleave(torch.arange(num_classes), torch.tensor(counts))
    means = draw(st.sampled_from([0.1, 1.0, 30.0])) * torch.randn(num_classes, feature_dim, generator=random)
    features = means[targets] + torch.randn(len(targets), feature_dim, generator=random) + 2
    order = torch.randperm(len(targets), generator=random) if draw(st.booleans()) else torch.arange(len(targets))
    cuts = sorted(draw(st.lists(st.integers(0, len(targets)), max_size=4)))
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, len(targets)], strict=True)]
    return num_classes, feature_dim, features[order], targets[order], sizes


MOMENTS = {"data": data_sets(), "center": st.sampled_from(["samples", "classes"]), "fp64": st.booleans()}


@settings(max_examples=10, deadline=None)
@given(**MOMENTS)
def test_metrics_of_moments(data, center, fp64):
    check_metrics_of_moments(data, center, fp64)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(**MOMENTS)
def test_metrics_of_moments_on_many_data_sets(data, center, fp64):
    check_metrics_of_moments(data, center, fp64)


def check_metrics_of_moments(data, center, fp64):
    num_classes, feature_dim, features, targets, sizes = data
    features = features.double() if fp64 else features
    random = generator(1)
    weight = torch.randn(num_classes, feature_dim, generator=random)
    bias, ood_mean = torch.randn(num_classes, generator=random), torch.randn(feature_dim, generator=random)
    moments = ClassMoments(num_classes, feature_dim, class_scatter=True)
    for batch, labels in zip(features.split(sizes), targets.split(sizes), strict=True):
        moments.update(batch, labels)
    code = torch.randn(num_classes, 3, generator=random)
    options = MeasureOptions(center=center, code=code)
    measured = collapse_metrics(moments, weight, bias, ood_mean=ood_mean, options=options)
    assert_equal(measured, dense_metrics(features, targets, num_classes, weight, bias, center, ood_mean, code))


@settings(max_examples=20, deadline=None)
@given(data=data_sets(), center=st.sampled_from(["samples", "classes"]))
def test_metrics_of_samples(data, center):
    num_classes, feature_dim, features, targets, _ = data
    _, targets = targets.unique(return_inverse=True)
    num_classes = int(targets.max()) + 1
    weight = torch.randn(num_classes, feature_dim, generator=generator(1)).double()
    bias = torch.randn(num_classes, generator=generator(2)).double()
    moments = ClassMoments(num_classes, feature_dim)
    moments.update(features, targets)
    statistics = class_statistics(moments, MeasureOptions(center=center))
    predictions = (features.double() @ weight.T + bias).argmax(dim=1)
    measured = {
        "nc2_cos_margin": float(nc2_cos_margin(features, targets, weight, statistics.center)),
        "alignment": float(alignment(features, targets, weight, statistics.center)),
        "nc4_ncc_mismatch": float(nc4_ncc_mismatch(features, predictions, statistics.class_means)),
    }
    expected = dense_sample_metrics(features, targets, weight, bias, statistics.class_means, statistics.center)
    assert measured == pytest.approx(expected, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize(("num_classes", "feature_dim"), [(3, 4), (6, 3), (5, 40), (12, 5)])
@pytest.mark.parametrize("samples", [25, 70])
def test_metrics_on_the_sphere(num_classes, feature_dim, samples):
    """With fewer and with more samples than d·rank(W), of which the joint entropy takes the lesser side."""
    random = generator(num_classes)
    features = torch.randn(samples, feature_dim, generator=random).double() + 0.3
    weight = torch.randn(num_classes + 2, feature_dim, generator=random).double()
    targets = torch.randint(num_classes, (samples,), generator=random)  # two classes have no sample
    mir, hdr = matrix_information(features, targets, weight)
    measured = {
        "instance_alignment": instance_alignment(features, targets, weight),
        "class_alignment": class_alignment(features, targets, weight),
        "mir": mir,
        "hdr": hdr,
    }
    expected = dense_sphere_metrics(features, targets, weight)
    assert {name: float(value) for name, value in measured.items()} == pytest.approx(expected, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("center", ["samples", "classes"])
@pytest.mark.parametrize("feature_dim", [5, 15])
def test_more_classes_than_a_tile_holds(feature_dim, center, monkeypatch):
    """Tiles of three classes, and closed forms, against one tile of all classes."""
    from neuralcollapse.metrics import nc2, pairs

    num_classes = 13
    features = torch.randn(60, feature_dim, generator=generator())
    targets = torch.arange(60) % num_classes
    weight, bias = torch.randn(num_classes, feature_dim, generator=generator(1)), torch.zeros(num_classes)
    moments = ClassMoments(num_classes, feature_dim, class_scatter=True)
    moments.update(features, targets)
    monkeypatch.setattr(pairs, "_TILE", 3)
    monkeypatch.setattr(nc2, "_TILE_ELEMENTS", 40)
    code = torch.randn(num_classes, 5, generator=generator(3))
    options = MeasureOptions(center=center, code=code)
    measured = collapse_metrics(moments, weight, bias, ood_mean=features[0], options=options)
    assert_equal(measured, dense_metrics(features, targets, num_classes, weight, bias, center, features[0], code))


def test_distances_of_nearly_equal_class_means_are_accurate():
    """‖a‖² + ‖b‖² − 2ab has no correct digit for a distance of 1e-7 between means of norm 1."""
    means = torch.randn(5, 8, generator=generator()).double()
    means[1] = means[0] + 1e-7 * torch.randn(8, generator=generator(1)).double()
    features = torch.cat([means - 1e-8, means + 1e-8])
    targets = torch.arange(5).repeat(2)
    moments = ClassMoments(5, 8, class_scatter=True)
    moments.update(features, targets)
    expected = dense_metrics(features, targets, 5, means, means[:, 0], "classes", means[0])
    measured = collapse_metrics(moments, options=MeasureOptions(center="classes"))
    for name in ("nc1_cdnv", "nc2_hyperspherical_riesz_mean", "nc2_hyperspherical_log_variance"):
        assert measured[name] == pytest.approx(expected[name], rel=1e-6), name


def test_classes_below_min_samples_are_left_out_of_everything():
    features = torch.randn(34, 6, generator=generator())
    targets = torch.cat([torch.arange(30) % 3, torch.tensor([3, 4, 4, 4])])
    weight, bias = torch.randn(5, 6, generator=generator(1)), torch.randn(5, generator=generator(2))
    moments = ClassMoments(5, 6, class_scatter=True)
    moments.update(features, targets)
    options = MeasureOptions(min_samples=5)
    measured = collapse_metrics(moments, weight, bias, ood_mean=features[0], options=options)
    kept = targets < 3
    expected = dense_metrics(features[kept], targets[kept], 3, weight[:3], bias[:3], "samples", features[0])
    assert_equal(measured, expected)

    pooled = ClassMoments(5, 6)
    pooled.update(features, targets)
    with pytest.warns(UserWarning, match="nc1_pinv, nc1_vci, rank_me: the scatter of classes that min_samples"):
        without = collapse_metrics(pooled, weight, bias, ood_mean=features[0], options=options)
    del expected["nc1_numerical_rank"]
    assert_equal(without, expected | dict.fromkeys(["nc1_pinv", "nc1_vci", "rank_me"], math.nan))


def test_classes_above_drop_classes_above_are_left_out_of_everything():
    features = torch.randn(34, 6, generator=generator())
    targets = torch.cat([torch.arange(28) % 2, torch.tensor([3, 4, 4, 4, 2, 2])])
    weight, bias = torch.randn(5, 6, generator=generator(1)), torch.randn(5, generator=generator(2))
    moments = ClassMoments(5, 6, class_scatter=True)
    moments.update(features, targets)
    options = MeasureOptions(drop_classes_above=3)
    measured = collapse_metrics(moments, weight, bias, ood_mean=features[0], options=options)
    kept = targets >= 2
    assert_equal(
        measured, dense_metrics(features[kept], targets[kept] - 2, 3, weight[2:], bias[2:], "samples", features[0])
    )
