"""Accuracy and NC1 of the classes with many, a medium number of and few training samples."""

from __future__ import annotations

import math

import pytest
import torch

from helpers import normal
from neuralcollapse.metrics import (
    ClassMoments,
    Measurement,
    MeasureOptions,
    class_groups,
    group_metrics,
    measure_features,
)

K, D = 6, 5
COUNTS = torch.tensor([900, 101, 100, 20, 19, 3])


def groups_of(*counts):
    return {name: classes.tolist() for name, classes in class_groups(torch.tensor(counts)).items()}


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((900, 101, 100, 20, 19, 0), [[0, 1], [2, 3], [4, 5]]),  # the bounds of Liu et al.
        ((3, 50, 700), [[2], [1], [0]]),
        # CIFAR-10-LT 1:100, of which no class has fewer than 20 images
        ((5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50), [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9]]),
        ((500,) * 5 + (5,) * 5, [[0, 1, 2, 3, 4], [], [5, 6, 7, 8, 9]]),  # a step has two sizes
        ((40,) * 6, [[], [0, 1, 2, 3, 4, 5], []]),
        ((9, 7), [[0], [], [1]]),
    ],
)
def test_classes_of_each_group(counts, expected):
    assert [*groups_of(*counts).values()] == expected


def test_thirds_follow_the_order_of_the_numbers_alone():
    counts = torch.tensor([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50])
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    shuffled = class_groups(counts[order])
    for name, classes in class_groups(counts).items():
        assert sorted(order[shuffled[name]].tolist()) == classes.tolist()


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (torch.tensor([[3, 4]]), r"counts must be of shape \(K,\), got \(1, 2\)"),
        (torch.tensor([3.0, 4.0]), "counts must be"),
        (torch.tensor([3, -4]), "counts must be at least 0, got -4"),
        (torch.tensor([3]), "num_classes must be"),
    ],
)
def test_other_counts_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        class_groups(counts)


@pytest.fixture
def data():
    targets = torch.arange(K).repeat_interleave(torch.tensor([9, 8, 7, 6, 5, 4]))
    features = 2 * normal(K, D, seed=1)[targets] + normal(len(targets), D, seed=2)
    return features, targets, normal(K, D, seed=4), normal(K, seed=5)


def brute_force(features, targets, weight, bias, options):
    right = (features @ weight.T + bias).argmax(1) == targets
    means = torch.stack([features[targets == k].mean(0) for k in range(K)])
    center = features.mean(0) if options.center == "samples" else means.mean(0)
    between = sum(float(((mean - center) ** 2).sum()) for mean in means) / K
    values = {}
    for name, classes in {"many": (0, 1), "medium": (2, 3), "few": (4, 5)}.items():
        values[f"accuracy_{name}"] = sum(float(right[targets == k].double().mean()) for k in classes) / 2
        within = sum(float(((features[targets == k] - means[k]) ** 2).sum(1).mean()) for k in classes) / 2
        values[f"nc1_quotient_{name}"] = within / between
    return values


@pytest.mark.parametrize("center", ["samples", "classes"])
def test_values_are_those_of_their_definition(data, center):
    options = MeasureOptions(center=center)
    measurement = measure_features(*data, options=options, progress=False)
    found = group_metrics(measurement, COUNTS)
    assert found == pytest.approx(brute_force(*data, options), rel=1e-10)


def test_class_accuracy_is_kept_in_the_record_and_older_records_have_none(data, tmp_path):
    measurement = measure_features(*data, progress=False)
    weighted = (measurement.class_accuracy * measurement.moments.counts).sum() / len(data[1])
    assert float(weighted) == pytest.approx(measurement.metrics["accuracy"], rel=1e-12)
    measurement.save(tmp_path / "record.safetensors")
    loaded = Measurement.load(tmp_path / "record.safetensors")
    assert group_metrics(loaded, COUNTS) == pytest.approx(group_metrics(measurement, COUNTS), rel=1e-12)
    older = Measurement(**{**vars(measurement), "class_accuracy": torch.empty(0)})
    assert list(group_metrics(older, COUNTS)) == ["nc1_quotient_many", "nc1_quotient_medium", "nc1_quotient_few"]


def test_equal_numbers_of_samples_average_to_nc1_quotient():
    targets = torch.arange(K).repeat(10)
    features = normal(K, D, seed=1)[targets] + normal(60, D, seed=2)
    measurement = measure_features(features, targets, progress=False)
    values = [group_metrics(measurement, COUNTS)[f"nc1_quotient_{name}"] for name in ("many", "medium", "few")]
    assert sum(values) / 3 == pytest.approx(measurement.metrics["nc1_quotient"], rel=1e-10)  # two classes in each


def test_the_numbers_are_those_of_the_train_split(data):
    train = ClassMoments(K, D)
    train.update(normal(int(COUNTS.sum()), D, seed=9), torch.arange(K).repeat_interleave(COUNTS))
    measurement = measure_features(*data, train=train, progress=False)
    assert group_metrics(measurement) == group_metrics(measurement, COUNTS)


def test_a_group_without_a_measured_sample_is_nan(data):
    features, targets, weight, bias = (data[0][:30], data[1][:30], *data[2:])
    measurement = measure_features(features, targets, weight, bias, progress=False)
    found = group_metrics(measurement, COUNTS)
    assert math.isnan(found["accuracy_few"])
    assert math.isnan(found["nc1_quotient_few"])
    assert not math.isnan(found["accuracy_medium"])


def test_counts_of_other_classes_are_refused(data):
    measurement = measure_features(*data, progress=False)
    with pytest.raises(ValueError, match=r"counts must be of shape \(6,\)"):
        group_metrics(measurement, COUNTS[:5])
