"""Statistics of a measurement for out-of-distribution scores, beyond moments, weight and bias."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from helpers import normal
from neuralcollapse import Measurement
from neuralcollapse.metrics.principal import logit_origin
from ood_reference import measured

N, D = 90, 8


def residual_norms(features, weight, bias) -> np.ndarray:
    """Mean norms outside the leading eigenvectors of the second moment about −W⁺b, by projection with each of them."""
    features, weight = features.double().numpy(), weight.double().numpy()
    origin = 0 if bias is None else -np.linalg.pinv(weight) @ bias.double().numpy()
    deviations = features - origin
    _, vectors = np.linalg.eigh(deviations.T @ deviations / len(deviations))
    vectors = vectors[:, ::-1]
    return np.array([np.linalg.norm(deviations @ vectors[:, j:], axis=1).mean() for j in range(features.shape[1])])


@pytest.mark.parametrize("num_classes", [3, 12])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("dtype", "moments", "tolerance"),
    [(torch.float64, torch.float64, 1e-10), (torch.float32, "mixed", 1e-5), (torch.bfloat16, torch.float64, 1e-10)],
)
def test_mean_logit_and_residual_norms_equal_those_of_kept_features(num_classes, bias, dtype, moments, tolerance):
    targets = torch.arange(N) % (num_classes - 1)  # the last class has no samples
    features = (normal(N, D, seed=1) + 2 * normal(num_classes, D, seed=2)[targets]).to(dtype)
    weight, bias = normal(num_classes, D, seed=3).to(dtype), normal(num_classes, seed=4).to(dtype) if bias else None
    measurement = measured(features, weight, bias, targets, dtype=moments)
    expected = residual_norms(features, weight, bias)
    assert np.abs(measurement.residual_norms.numpy() - expected).max() <= tolerance * expected.max()
    logits = nn.functional.linear(features, weight, bias).double()
    assert measurement.mean_max_logit == pytest.approx(float(logits.max(dim=1).values.mean()), rel=tolerance)


def test_residual_norms_do_not_cancel_in_deep_collapse():
    targets, means = torch.arange(N) % 3, 4 * normal(3, D, seed=2)
    basis = torch.linalg.qr(means.T, mode="complete")[0][:, 3:]  # directions without class means
    deviations = normal(N, D - 3, seed=1)
    for label in range(3):
        deviations[targets == label] -= deviations[targets == label].mean(dim=0)
    deviations = 1e-6 * deviations @ basis.T
    features = means[targets] + deviations
    for dtype, tolerance in ((torch.float64, 1e-6), ("mixed", 1e-5)):
        norms = measured(features, normal(3, D, seed=3), None, targets, dtype=dtype).residual_norms
        assert float(norms[3]) == pytest.approx(float(deviations.norm(dim=1).mean()), rel=tolerance)


def test_batches_do_not_matter():
    targets, features = torch.arange(N) % 3, normal(N, D)
    weight, bias = normal(3, D, seed=3), normal(3, seed=4)
    whole, single = (measured(features, weight, bias, targets, batch=size) for size in (N, 1))
    torch.testing.assert_close(whole.residual_norms, single.residual_norms, rtol=1e-10, atol=0)
    assert whole.mean_max_logit == pytest.approx(single.mean_max_logit, rel=1e-12)


def test_the_origin_is_that_of_the_pseudoinverse():
    for num_classes in (3, 12):
        weight, bias = normal(num_classes, D), normal(num_classes, seed=1)
        expected = -np.linalg.pinv(weight.numpy()) @ bias.numpy()
        np.testing.assert_allclose(logit_origin(weight, bias).numpy(), expected, rtol=1e-10, atol=1e-12)


def test_ignored_samples_do_not_count():
    targets, features = torch.arange(N) % 3, normal(N, D)
    weight = normal(3, D, seed=3)
    padded = torch.cat([features, 100 * features]), torch.cat([targets, torch.full((N,), -100)])
    ignoring = measured(padded[0], weight, None, padded[1], ignore_index=-100)
    plain = measured(features, weight, None, targets)
    torch.testing.assert_close(ignoring.residual_norms, plain.residual_norms, rtol=1e-10, atol=0)
    assert ignoring.mean_max_logit == pytest.approx(plain.mean_max_logit)


@pytest.mark.filterwarnings("ignore:undefined metrics")
def test_without_samples_or_features_they_are_undefined():
    targets, features, weight = torch.arange(N) % 3, normal(N, D), normal(3, D, seed=3)
    without = measured(features, weight, None, targets, per_sample=False)
    assert without.residual_norms.numel() == 0
    assert math.isfinite(without.mean_max_logit)
    nothing = measured(features, weight, None, torch.full((N,), -100), ignore_index=-100)
    assert math.isnan(nothing.mean_max_logit)
    assert nothing.residual_norms.isnan().all()


def test_they_are_saved_and_kept_by_recompute(tmp_path):
    measurement = measured(normal(N, D), normal(3, D, seed=3), None, torch.arange(N) % 3)
    measurement.save(tmp_path / "new")
    loaded = Measurement.load(tmp_path / "new")
    assert loaded.mean_max_logit == measurement.mean_max_logit
    assert torch.equal(loaded.residual_norms, measurement.residual_norms)
    assert torch.equal(measurement.recompute(center="classes").residual_norms, measurement.residual_norms)


def test_a_file_of_an_earlier_version_has_none():
    path = Path(__file__).parent / "metrics" / "data" / "measurement-format2.safetensors"
    earlier = Measurement.load(path)
    assert math.isnan(earlier.mean_max_logit)
    assert earlier.residual_norms.numel() == 0
