from __future__ import annotations

import math

import pytest
import torch

from helpers import generator, normal
from neuralcollapse.heads import FixedETFClassifier, LearnedClassifier, NearestETFClassifier
from neuralcollapse.ufm import UnconstrainedFeatures, minimize
from ufm.models import random_model


def loss_by_hand(loss, logits, label, *, smoothing=0.0, focusing=2.0):
    """Loss of one sample from its definition, in plain Python."""
    if loss == "mse":
        return 0.5 * sum((z - (k == label)) ** 2 for k, z in enumerate(logits))
    total = sum(math.exp(z) for z in logits)
    probabilities = [math.exp(z) / total for z in logits]
    if loss == "focal":
        return -((1 - probabilities[label]) ** focusing) * math.log(probabilities[label])
    wanted = [(1 - smoothing) * (k == label) + smoothing / len(logits) for k in range(len(logits))]
    return -sum(q * math.log(p) for q, p in zip(wanted, probabilities, strict=True))


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("cross-entropy", {}),
        ("cross-entropy", {"label_smoothing": 0.2}),
        ("mse", {}),
        ("focal", {}),
        ("focal", {"focusing": 0.5}),
    ],
)
def test_the_objective_is_the_mean_loss_and_the_decay_of_each_parameter(loss, options):
    model = random_model(3, 2, 5, 0.1, 0.2, loss=loss, bias_decay=0.3, class_counts=[1, 3, 2], **options)
    with torch.no_grad():
        model.head.bias.copy_(normal(3))
    logits, targets = model()
    assert targets.tolist() == [0, 1, 1, 1, 2, 2]
    by_hand = {"smoothing": options.get("label_smoothing", 0.0), "focusing": options.get("focusing", 2.0)}
    losses = [
        loss_by_hand(loss, row, label, **by_hand) for row, label in zip(logits.tolist(), targets.tolist(), strict=True)
    ]
    weight, bias, features = model.head.weight, model.head.bias, model.features
    decay = 0.1 * weight.square().sum() + 0.3 * bias.square().sum() + 0.2 * features.square().sum()
    assert model.objective().item() == pytest.approx(sum(losses) / 6 + 0.5 * decay.item(), rel=1e-12)


@pytest.mark.parametrize(
    "head",
    [
        LearnedClassifier(8, 5),
        LearnedClassifier(8, 5, feature_norm="auto", unit_weight=True),
        FixedETFClassifier(8, 5),
        FixedETFClassifier(8, 5, feature_norm=None, bias="learned"),
        NearestETFClassifier(8, 5),
    ],
    ids=lambda head: f"{type(head).__name__}-{head.feature_norm}",
)
def test_any_head_trains_the_features(head):
    model = UnconstrainedFeatures(5, 4, 8, head, generator=generator())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    before = float(model.objective())
    for _ in range(100):
        optimizer.zero_grad()
        model.objective().backward()
        optimizer.step()
    model.eval()
    logits, targets = model()
    assert float(model.objective()) < 0.5 * before
    assert torch.equal(logits.argmax(1), targets)


def test_decay_is_of_the_features_before_normalisation():
    head = NearestETFClassifier(8, 5)
    model = UnconstrainedFeatures(5, 4, 8, head, feature_decay=0.5, weight_decay=7.0)
    assert float(model.decay()) == pytest.approx(0.25 * float(model.features.square().sum()), rel=1e-6)


def test_a_generator_determines_the_initial_features():
    first, again, other = (
        UnconstrainedFeatures(3, 2, 4, LearnedClassifier(4, 3), generator=generator(seed)).features
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    large = UnconstrainedFeatures(10, 100, 500, LearnedClassifier(500, 10), generator=generator())
    assert float(large.features.norm(dim=1).mean()) == pytest.approx(1, abs=0.01)


def test_unbalanced_classes_are_minimised_as_well():
    """No closed form is known; the gradient vanishes, and the larger class is predicted with more confidence."""
    model = random_model(3, 4, 4, 0.01, 0.01, class_counts=[8, 2, 2])
    assert minimize(model).gradient_norm < 1e-7
    confidence = model()[0].softmax(1).gather(1, model.targets[:, None])[:, 0]
    assert confidence[0] > confidence[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"samples_per_class": 0}, "samples_per_class must be at least 1, got 0"),
        ({"samples_per_class": 2.0}, "samples_per_class must be an integer, got 2.0"),
        ({"feature_dim": 0}, "feature_dim must be at least 1, got 0"),
        ({"feature_dim": 6}, "head must be a Head of 3 classes in 6 dimensions"),
        ({"head": torch.nn.Linear(5, 3)}, "head must be a Head of 3 classes in 5 dimensions"),
        ({"class_counts": [1, 2]}, "class_counts must be num_classes = 3 sizes, got 2"),
        ({"class_counts": [1, 2, 4]}, r"class_counts must sum to num_classes \* samples_per_class = 6, got 7"),
        ({"class_counts": [6, 0, 0]}, r"class_counts\[1\] must be at least 1, got 0"),
        ({"loss": "hinge"}, "loss must be one of 'cross-entropy', 'mse', 'focal', got 'hinge'"),
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\), got 1.0"),
        ({"label_smoothing": 0.1, "loss": "mse"}, "label_smoothing must be 0 with loss 'mse', got 0.1"),
        ({"focusing": 1.0}, "focusing must not be given with loss 'cross-entropy', got 1.0"),
        ({"focusing": -1.0, "loss": "focal"}, "focusing must be a finite number of at least 0, got -1.0"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number of at least 0, got -0.1"),
        ({"feature_decay": math.inf}, "feature_decay must be a finite number of at least 0, got inf"),
        ({"bias_decay": "much"}, "bias_decay must be a finite number of at least 0, got 'much'"),
    ],
)
def test_bad_input_is_rejected(options, message):
    arguments = {"num_classes": 3, "samples_per_class": 2, "feature_dim": 5, "head": LearnedClassifier(5, 3)}
    with pytest.raises(ValueError, match=message):
        UnconstrainedFeatures(**(arguments | options))


@pytest.mark.parametrize(
    ("head", "arguments", "message"),
    [
        (FixedETFClassifier(4, 3), (normal(3, 4), normal(6, 4)), "head must have a trained weight"),
        (LearnedClassifier(4, 3), (normal(3, 5), normal(6, 4)), r"weight must be of shape \(3, 4\), got \(3, 5\)"),
        (LearnedClassifier(4, 3), (normal(3, 4), normal(5, 4)), r"features must be of shape \(6, 4\), got \(5, 4\)"),
        (LearnedClassifier(4, 3), (normal(3, 4), normal(6, 4) / 0), "features must be finite"),
        (LearnedClassifier(4, 3, bias=False), (normal(3, 4), normal(6, 4), normal(3)), "bias must be None"),
    ],
)
def test_parameters_that_do_not_fit_are_rejected_and_the_model_is_unchanged(head, arguments, message):
    model = UnconstrainedFeatures(3, 2, 4, head)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=message):
        model.place(*arguments)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
