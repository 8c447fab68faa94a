from __future__ import annotations

import pytest
import torch

from helpers import normal
from neuralcollapse import ClassMeans


def batch(seed, size=40, num_classes=4, feature_dim=3):
    targets = torch.randint(num_classes, (size,), generator=torch.Generator().manual_seed(seed))
    return normal(size, feature_dim, seed=seed), targets


def centred_means(features, targets, num_classes=4):
    means = torch.stack([features[targets == k].mean(0) for k in range(num_classes)])
    return means - features.mean(0)


def test_first_batch_sets_the_means():
    means = ClassMeans(4, 3).double()
    features, targets = batch(0)
    centred, batch_mean = means(features, targets)
    assert torch.allclose(centred, centred_means(features, targets))
    assert torch.allclose(batch_mean, features.mean(0))
    assert torch.equal(means.centred_means, centred)
    assert torch.equal(means.global_mean, batch_mean)


def test_exponential_means_follow_the_formula():
    means = ClassMeans(4, 3, momentum=0.3).double()
    expected = None
    for seed in range(5):
        current = centred_means(*batch(seed))
        expected = current if expected is None else 0.7 * expected + 0.3 * current
        means(*batch(seed))
    assert torch.allclose(means.centred_means, expected)


def test_cumulative_means_weigh_every_sample_the_same():
    means = ClassMeans(4, 3, momentum="cumulative").double()
    total, count = torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4)
    for seed in range(5):
        features, targets = batch(seed, size=20 + 10 * seed)
        counts = torch.bincount(targets, minlength=4)
        total += counts[:, None] * centred_means(features, targets)
        count += counts
        means(features, targets)
    assert torch.allclose(means.centred_means, total / count[:, None].double())
    everything = torch.cat([batch(seed, size=20 + 10 * seed)[0] for seed in range(5)])
    assert torch.allclose(means.global_mean, everything.mean(0))


def test_published_weight_is_two_over_t_plus_one():
    means = ClassMeans(4, 3, momentum="published").double()
    expected = torch.zeros(4, 3, dtype=torch.float64)
    for seed in range(4):
        weight = 2 / (seed + 2)
        expected = (1 - weight) * expected + weight * centred_means(*batch(seed))
        means(*batch(seed))
    assert torch.allclose(means.centred_means, expected)
    means.centred.batches = torch.tensor(10**6)
    before = means.centred_means
    means(*batch(9))
    assert torch.allclose(means.centred_means, before + 1e-4 * (centred_means(*batch(9)) - before))


@pytest.mark.parametrize("momentum", [0.2, "cumulative", "published"])
def test_an_absent_class_keeps_its_mean_and_the_first_batch_sets_it(momentum):
    means = ClassMeans(4, 3, momentum=momentum).double()
    for _ in range(3):
        means(torch.ones(2, 3, dtype=torch.float64) * torch.tensor([[1.0], [3.0]]), torch.tensor([0, 1]))
    assert (means.centred_means[2:] == 0).all()
    kept = means.centred_means[0]
    features = normal(6, 3)
    means(features, torch.tensor([1, 1, 2, 2, 2, 1]))
    assert torch.equal(means.centred_means[0], kept)
    assert torch.allclose(means.centred_means[2], features[2:5].mean(0) - features.mean(0))
    assert (means.centred_means[3] == 0).all()


def test_gradient_is_scaled_by_the_momentum():
    means = ClassMeans(4, 3, momentum=0.1).double()
    means(*batch(0))
    features, targets = batch(1)
    features.requires_grad_()
    upstream = normal(4, 3, seed=5)
    (actual,) = torch.autograd.grad(means(features, targets)[0], features, upstream)
    (whole,) = torch.autograd.grad(centred_means(features, targets), features, upstream)
    assert torch.allclose(actual, 0.1 * whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_buffers_keep_fp32_in_a_low_precision_module(dtype):
    means = ClassMeans(4, 3, momentum=2**-10)
    means(normal(8, 3, dtype=torch.float32), torch.arange(8) % 4)
    before = means.centred_means
    means = means.to(dtype)
    assert means.centred_means.dtype == torch.float32
    assert torch.equal(means.centred_means, before)
    means(normal(8, 3, seed=1, dtype=dtype), torch.arange(8) % 4)
    assert not torch.equal(means.centred_means, before)


def test_an_empty_batch_changes_no_mean():
    means = ClassMeans(4, 3).double()
    means(*batch(0))
    before = means.centred_means
    means(torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, dtype=torch.int64))
    assert torch.equal(means.centred_means, before)


@pytest.mark.parametrize(
    ("features", "targets", "message"),
    [
        (torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64), r"features must be of shape \(N, 3\), got \(3, 5\)"),
        (torch.zeros(3, 3), torch.zeros(2, dtype=torch.int64), r"targets must be of shape \(3,\), got \(2,\)"),
        (torch.zeros(3, 3), torch.tensor([0, 1, 4]), r"targets must lie in \[0, 4\), got labels from 0 to 4"),
        (torch.zeros(3, 3), torch.tensor([0, -1, 2]), r"got labels from -1 to 2"),
        (torch.zeros(3, 3), torch.zeros(3), "targets must be integer class indices, got torch.float32"),
    ],
)
def test_bad_batches_are_named(features, targets, message):
    with pytest.raises(ValueError, match=message):
        ClassMeans(4, 3)(features, targets)


@pytest.mark.parametrize("momentum", [0, -0.1, 1.5, "mean", float("nan")])
def test_bad_momentum_is_named(momentum):
    with pytest.raises(ValueError, match="momentum must lie in"):
        ClassMeans(4, 3, momentum=momentum)
