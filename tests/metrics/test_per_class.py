"""Values of classes and of pairs of classes by their definitions, and scatter about other means."""

from __future__ import annotations

import pytest
import torch

from helpers import generator
from neuralcollapse.metrics import (
    ClassMoments,
    MeasureOptions,
    class_values,
    collapse_metrics,
    moments_about,
    pair_matrices,
)

K, D = 5, 7
TARGETS = torch.tensor([0, 1, 2, 3, 4, 4, 4, 3, 3, 1, 0, 0])
FEATURES = torch.randn(len(TARGETS), D, generator=generator(1)).double() + 2
WEIGHT = torch.randn(K, D, generator=generator(2)).double()
PAIRS = torch.triu_indices(K, K, 1).unbind()


def moments_of(features, targets, **options):
    moments = ClassMoments(K, D, **options)
    moments.update(features, targets)
    return moments


def test_values_of_classes():
    values = class_values(moments_of(FEATURES, TARGETS), WEIGHT)
    groups = [FEATURES[k == TARGETS] for k in range(K)]
    centred = torch.stack([group.mean(0) for group in groups]) - FEATURES.mean(0)
    torch.testing.assert_close(values.mean_norms, centred.norm(dim=1))
    torch.testing.assert_close(values.weight_norms, WEIGHT.norm(dim=1))
    variances = torch.stack([(group - group.mean(0)).square().sum(1).mean() for group in groups])
    torch.testing.assert_close(values.within_class_variances, variances)
    cosines = [w @ c / w.norm() / c.norm() for w, c in zip(WEIGHT, centred, strict=True)]
    torch.testing.assert_close(values.duality, torch.stack(cosines))
    assert values.counts.tolist() == TARGETS.bincount().tolist()


def test_classes_left_out_are_left_out():
    values = class_values(moments_of(FEATURES, TARGETS), WEIGHT, options=MeasureOptions(min_samples=2))
    assert values.classes.tolist() == [0, 1, 3, 4]
    assert len(values.weight_norms) == 4
    assert class_values(moments_of(FEATURES, TARGETS)).duality is None


def test_means_over_the_pairs_are_the_metrics():
    moments = moments_of(FEATURES, TARGETS)
    matrices, metrics = pair_matrices(moments, WEIGHT), collapse_metrics(moments, WEIGHT)
    for name, matrix in matrices.items():
        assert matrix.shape == (K, K)
        torch.testing.assert_close(matrix, matrix.T, equal_nan=True)
        values = matrix[PAIRS]
        if name.startswith("cosines"):
            spread = metrics["nc2_equiangular_" + name.removeprefix("cosines_")]
            assert float(torch.cat([values, values]).std()) == pytest.approx(spread)
            torch.testing.assert_close(matrix.diagonal(), torch.ones(K).double())
        else:
            metric = "nc1_cdnv" if name == "cdnv" else f"nc2_hyperspherical_{name}_mean"
            assert float(values.mean()) == pytest.approx(metrics[metric])
            assert matrix.diagonal().isnan().all() or (name == "dist" and not matrix.diagonal().any())
    assert len(matrices) == 6


def test_exponents_of_matrices():
    moments = moments_of(FEATURES, TARGETS)
    once, thrice = (pair_matrices(moments, exponent=exponent) for exponent in (1, 3))
    torch.testing.assert_close(thrice["riesz"], once["riesz"] ** 3, equal_nan=True)
    torch.testing.assert_close(thrice["log"], once["log"] * 3, equal_nan=True)
    torch.testing.assert_close(thrice["dist"], once["dist"] ** 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_classes": 4},
            r"5 matrices of 5 classes would take 1e-06 GB \(2e-07 GB each\); max_classes=5 allows them",
        ),
        ({"names": ["gauss"]}, "names must be of cosines_means, .*got .'gauss'"),
        ({"names": "cdnv"}, "names must be of cosines_means, .*got cdnv"),
        ({"names": ["cosines_weights"]}, "weight must be given for cosines_weights"),
        ({"exponent": 0}, "exponent must be greater than 0"),
        ({"weight": WEIGHT[:3]}, "weight must be of shape"),
        ({"drop_classes_above": 0}, "drop_classes_above must be at least"),
    ],
)
def test_bad_arguments_of_matrices(options, message):
    def matrices(drop_classes_above=None, **others):
        bounds = MeasureOptions(drop_classes_above=drop_classes_above)
        return pair_matrices(moments_of(FEATURES, TARGETS), options=bounds, **others)

    with pytest.raises(ValueError, match=message):
        matrices(**options)


def test_a_test_split_about_the_means_of_the_train_split():
    train, test = moments_of(FEATURES, TARGETS), moments_of(FEATURES.flip(1)[:9], TARGETS[:9])
    about = moments_about(test, train.means)
    deviations = FEATURES.flip(1)[:9] - train.means[TARGETS[:9]]
    torch.testing.assert_close(about.within_class_scatter, deviations.T @ deviations)
    traces = torch.zeros(K).double().index_add_(0, TARGETS[:9], deviations.square().sum(1))
    torch.testing.assert_close(about.within_class_trace, traces)
    assert torch.equal(about.means, train.means)
    between = (train.means - TARGETS[:9].bincount().double() @ train.means / 9).square().sum() / K
    expected = float(deviations.square().sum() / 9 / between)
    assert collapse_metrics(about)["nc1_quotient"] == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"means must be of shape \(K, d\) = \(5, 7\), got \(4, 7\)"):
        moments_about(test, train.means[1:])
    with pytest.raises(ValueError, match="means must be finite"):
        moments_about(test, train.means * torch.nan)
