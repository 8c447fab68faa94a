"""`Measurement.named`: the conventions of the library of Wu & Papyan, by a dense computation in two passes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import normal
from neuralcollapse.metrics import Measurement, MeasureOptions, measure_features

K, D = 6, 9
NAMES = [
    "nc1_pinv",
    "nc1_svd",
    "nc1_quot",
    "nc1_cdnv",
    "nc2_etf_err",
    "nc2g_dist",
    "nc2g_log",
    "nc3_dual_err",
    "nc3u_uni_dual",
    "nc4_agree",
    "nc5_ood_dev",
]


def unbalanced(seed: int, classes: int = K) -> tuple[Tensor, Tensor]:
    targets = torch.cat([torch.full((5 + 4 * k,), k) for k in range(classes)])
    return normal(K, D, seed=9)[targets] + normal(len(targets), D, seed=seed), targets


def reference(
    features: Tensor, targets: Tensor, weight: Tensor, test: Tensor, of_ood: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """Return the eleven values from their definitions, the means and variances of absent classes 0."""
    means, variances, within = torch.zeros(K, D).double(), torch.zeros(K).double(), torch.zeros(D, D).double()
    for k in range(K):
        members = features[targets == k]
        if len(members):
            means[k] = members.mean(0)
            variances[k] = (members - means[k]).square().sum(1).mean()
            within += (members - means[k]).T @ (members - means[k]) / len(features)
    centred = means - means.mean(0)
    between = centred.T @ centred / K
    ideal = (torch.eye(K, dtype=torch.float64) - 1 / K) / math.sqrt(K - 1)
    left, values, right = torch.linalg.svd(between)
    inverse = right[: K - 1].T @ torch.diag(1 / values[: K - 1]) @ left[:, : K - 1].T
    pairs = list(itertools.combinations(range(K), 2))
    unit = centred / centred.norm(dim=1, keepdim=True)
    distances = torch.stack([(unit[k] - unit[j]).norm() for k, j in pairs])
    gram, duality = centred @ centred.T, weight @ centred.T
    nearest = torch.cdist(test, means).argmin(1)
    ood_mean = of_ood[0].mean(0)
    return {
        "nc1_pinv": float(torch.trace(torch.linalg.pinv(between) @ within)) / K,
        "nc1_svd": float(torch.trace(inverse @ within)) / K,
        "nc1_quot": float(within.trace() / between.trace()),
        "nc1_cdnv": float(
            sum((variances[k] + variances[j]) / 2 / (means[k] - means[j]).square().sum() for k, j in pairs) / len(pairs)
        ),
        "nc2_etf_err": float((gram / gram.norm() - ideal).norm()),
        "nc2g_dist": float((distances - distances.mean()).square().mean()),
        "nc2g_log": float((distances.log() - distances.log().mean()).square().mean()),
        "nc3_dual_err": float((duality / duality.norm() - ideal).norm()),
        "nc3u_uni_dual": float((weight * centred).sum(1).var()),
        "nc4_agree": float((nearest == (test @ weight.T).argmax(1)).double().mean()),
        "nc5_ood_dev": float(torch.cosine_similarity(means, ood_mean[None]).abs().mean()),
    }


@pytest.mark.parametrize("bias", [None, 3.0])
@pytest.mark.parametrize("center", ["samples", "classes"])
def test_the_eleven_values_are_those_of_their_definitions(bias, center, tmp_path):
    features, targets = unbalanced(1)
    weight, test = normal(K, D, seed=2), unbalanced(3)
    ood = normal(40, D, seed=4) + 1
    bias = None if bias is None else bias * normal(K, seed=5)
    options = MeasureOptions(center=center)
    train = measure_features(features, targets, weight, bias, ood=ood, options=options, progress=False)
    other = measure_features(*test, weight, bias, train=train.moments, progress=False)
    expected = reference(features, targets, weight, test[0], (ood, targets))
    assert list(expected) == NAMES
    of_train = expected | {"nc4_agree": reference(features, targets, weight, features, (ood, targets))["nc4_agree"]}
    assert list(train.named("wu2024")) == NAMES
    assert train.named("wu2024") == pytest.approx(of_train, rel=1e-9)
    assert other.named("wu2024")["nc4_agree"] == expected["nc4_agree"]
    if bias is not None:  # otherwise the test could not see the difference
        assert other.named("wu2024")["nc4_agree"] != pytest.approx(1 - other.metrics["nc4_ncc_mismatch"])
    train.save(tmp_path / "it")
    assert Measurement.load(tmp_path / "it").named("wu2024") == pytest.approx(of_train, rel=1e-9)


def test_a_class_without_samples_has_the_mean_0():
    features, targets = unbalanced(1, classes=K - 1)
    weight = normal(K, D, seed=2)
    measurement = measure_features(features, targets, weight, progress=False)
    expected = reference(features, targets, weight, features, (features, targets))
    with pytest.warns(UserWarning, match="nc4_agree: classes without samples"):
        values = measurement.named("wu2024")
    assert math.isnan(values.pop("nc4_agree"))
    assert values == pytest.approx({name: expected[name] for name in values}, rel=1e-9)


def test_the_values_that_the_library_itself_has_printed():
    """Three blobs in R⁵; the value of NC1 is that which a test of the package blme cites from a run of the library."""
    generator = np.random.default_rng(0)
    features = [np.eye(3, 5)[k] * 3 + 0.15 * generator.standard_normal((30, 5)) for k in range(3)]
    targets = np.repeat(np.arange(3), 30)
    values = measure_features(np.concatenate(features), targets, progress=False).named("wu2024")
    assert values["nc1_pinv"] == pytest.approx(0.00409094387203806, rel=1e-12)
    assert values["nc1_svd"] == pytest.approx(0.004090943872038059, rel=1e-12)


def test_values_whose_inputs_were_not_measured_are_left_out():
    features, targets = unbalanced(1)
    assert list(measure_features(features, targets, progress=False).named("wu2024")) == NAMES[:7]
    options = MeasureOptions(per_sample=False)
    without = measure_features(features, targets, normal(K, D, seed=2), options=options, progress=False)
    assert list(without.named("wu2024")) == NAMES[:9]
    with pytest.raises(ValueError, match="convention must be"):
        without.named("papyan")


def test_other_classes_leave_the_agreement_out_of_the_record():
    features, targets = unbalanced(1)
    measurement = measure_features(features, targets, normal(K, D, seed=2), progress=False)
    assert measurement.recompute().agreement_without_bias == measurement.agreement_without_bias
    with pytest.warns(UserWarning, match="undefined metrics"):
        assert math.isnan(measurement.recompute(min_samples=10).agreement_without_bias)
