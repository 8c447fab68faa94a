"""The closed-form linear probe equals dense least squares on the features, also where the covariance is singular."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from helpers import generator
from neuralcollapse.metrics import ClassMoments, linear_probe

K, D, N = 5, 8, 60


def features_of_rank(rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, D) whose deviations from their mean have the given rank, and unbalanced targets."""
    random = generator(seed)
    targets = torch.randint(0, K, (N,), generator=random).clamp(max=K - 2)  # the last class has no sample
    coordinates = torch.randn(N, rank, generator=random, dtype=torch.float64) + targets[:, None] % 3
    directions = torch.randn(rank, D, generator=random, dtype=torch.float64)
    return coordinates @ directions + 2, targets


def moments_of(features: torch.Tensor, targets: torch.Tensor, **options) -> ClassMoments:
    moments = ClassMoments(K, features.shape[1], **options)
    for batch, labels in zip(features.split(17), targets.split(17), strict=True):
        moments.update(batch, labels)
    return moments


def dense_least_squares(features: torch.Tensor, targets: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias of least norm among those that minimise the mean squared error to one-hot targets."""
    rows, one_hot = features.double().numpy(), np.eye(K)[targets.numpy()]
    mean = rows.mean(axis=0)
    weight = np.linalg.lstsq(rows - mean, one_hot - one_hot.mean(axis=0), rcond=1e-8)[0].T
    return weight, one_hot.mean(axis=0) - weight @ mean


@pytest.mark.parametrize("rank", [D, 3, 1])
def test_it_is_least_squares_on_the_features(rank):
    features, targets = features_of_rank(rank)
    probe = linear_probe(moments_of(features, targets))
    weight, bias = dense_least_squares(features, targets)
    assert np.linalg.matrix_rank(features.numpy() - features.mean(dim=0).numpy()) == rank
    np.testing.assert_allclose(probe.weight.numpy(), weight, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(probe.bias.numpy(), bias, rtol=1e-8, atol=1e-10)
    scores = features.numpy() @ weight.T + bias
    assert probe.predict(features).tolist() == scores.argmax(axis=1).tolist()


def test_more_dimensions_than_samples_interpolate():
    random = generator(3)
    features, targets = torch.randn(K, 40, generator=random, dtype=torch.float64), torch.arange(K)
    probe = linear_probe(moments_of(features, targets))
    torch.testing.assert_close(features @ probe.weight.T + probe.bias, torch.eye(K, dtype=torch.float64))


@pytest.mark.parametrize("ridge", [0.01, 3.0])
def test_a_ridge_is_that_of_scikit_learn(ridge):
    features, targets = features_of_rank(3)
    variance = features.var(dim=0, correction=0).mean()
    oracle = Ridge(alpha=float(ridge * variance * N)).fit(features.numpy(), np.eye(K)[targets.numpy()])
    probe = linear_probe(moments_of(features, targets), ridge=ridge)
    np.testing.assert_allclose(probe.weight.numpy(), oracle.coef_, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(probe.bias.numpy(), oracle.intercept_, rtol=1e-9, atol=1e-12)


def test_equal_features_give_the_most_frequent_class():
    probe = linear_probe(moments_of(torch.ones(10, D), torch.tensor([0] * 4 + [2] * 6)))
    assert not probe.weight.any()
    assert probe.predict(torch.randn(3, D)).tolist() == [2, 2, 2]


def test_a_class_without_samples_is_never_predicted():
    features, targets = features_of_rank(D)
    probe = linear_probe(moments_of(features, targets))
    assert not probe.weight[K - 1].any()
    far = 1e3 * torch.randn(500, D, generator=generator(1))
    assert (probe.predict(far) != K - 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, "mixed"])
def test_moments_in_lower_precision_do_not_use_directions_of_rounding(dtype):
    features, targets = features_of_rank(3)
    exact = linear_probe(moments_of(features, targets))
    probe = linear_probe(moments_of(features.float(), targets, dtype=dtype))
    torch.testing.assert_close(probe.weight, exact.weight, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-100, 1e100])
def test_the_scale_of_the_features_does_not_matter(scale):
    features, targets = features_of_rank(D)
    probe = linear_probe(moments_of(features * scale, targets))
    weight, _ = dense_least_squares(features, targets)
    np.testing.assert_allclose(probe.weight.numpy() * scale, weight, rtol=1e-8, atol=1e-10)


def test_wrong_arguments_are_refused():
    features, targets = features_of_rank(D)
    moments = moments_of(features, targets)
    with pytest.raises(ValueError, match="moments must be ClassMoments, got Tensor"):
        linear_probe(features)
    with pytest.raises(ValueError, match="at least one sample, got none"):
        linear_probe(ClassMoments(K, D))
    with pytest.raises(ValueError, match="ridge must be finite and at least 0, got -1"):
        linear_probe(moments, ridge=-1)
    with pytest.raises(ValueError, match=r"features must be of shape \(N, d\), got \(8,\)"):
        linear_probe(moments).predict(features[0])
    with pytest.raises(ValueError, match=r"weight must be of shape \(K, d\)"):
        linear_probe(moments).predict(features[:, :3])
    moments.means[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the class means of moments"):
        linear_probe(moments)
