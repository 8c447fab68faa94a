"""Silent mistakes that are refused: training a model in evaluation mode, targets in another layout."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from helpers import normal
from neuralcollapse import (
    ClassMeanClassifier,
    FixedETFClassifier,
    LearnedClassifier,
    NearestETFClassifier,
    NearestFrameClassifier,
    attach_head,
)
from neuralcollapse.heads import LeadingDirections

CODE = normal(5, 3, seed=4, dtype=torch.float32)
LEARNING = {
    "nearest": lambda **options: NearestETFClassifier(12, 5, **options),
    "nearest, detached": lambda **options: NearestETFClassifier(12, 5, implicit_gradient=False, **options),
    "simplex": lambda **options: NearestFrameClassifier(12, 5, **options),
    "frame of a code": lambda **options: NearestFrameClassifier(12, 5, frame=CODE, **options),
    "frame of the means": lambda **options: NearestFrameClassifier(12, 5, frame=LeadingDirections(2), **options),
    "previous means": lambda **options: ClassMeanClassifier(12, 5, **options),
    "differentiable means": lambda **options: ClassMeanClassifier(12, 5, means="differentiable", **options),
}
OTHERS = {
    "learned": lambda ignore_index=None: LearnedClassifier(12, 5),  # it uses no targets, so it ignores none
    "unit rows": lambda ignore_index=None: LearnedClassifier(12, 5, unit_weight=True),
    "fixed": lambda **options: FixedETFClassifier(12, 5, **options),
    "fixed, learned bias": lambda **options: FixedETFClassifier(12, 5, bias="learned", **options),
}
TARGETS = torch.arange(20) % 5


def batch(seed=0):
    return normal(20, 12, seed=seed, dtype=torch.float32)


def model(make):
    torch.manual_seed(0)
    return attach_head(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 5)), make())


def state(module):
    return copy.deepcopy(module.state_dict())


def unchanged(module, before):
    return all(torch.equal(before[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize("make", LEARNING.values(), ids=LEARNING)
def test_training_in_evaluation_mode_raises(make):
    attached = model(make)
    attached(batch(), targets=TARGETS)
    attached.eval()
    before = state(attached)
    for call in (
        lambda: attached(batch(), targets=TARGETS),
        lambda: attached(batch(), labels=TARGETS),
        lambda: attached.head(batch().requires_grad_(), TARGETS),
        lambda: attached.head.prepare(batch().requires_grad_(), TARGETS),
    ):
        with pytest.raises(
            ValueError, match=r"in evaluation mode with gradients enabled.* call model.train\(\) to train"
        ):
            call()
    with (
        attached.head.use_targets(TARGETS),
        pytest.raises(ValueError, match="in evaluation mode with gradients enabled"),
    ):
        attached(batch())
    assert unchanged(attached, before)
    attached.train()
    cross_entropy(attached(batch(), targets=TARGETS), TARGETS).backward()
    assert attached.model[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("make", LEARNING.values(), ids=LEARNING)
def test_evaluation_accepts_targets_if_nothing_is_trained(make):
    attached = model(make)
    attached(batch(), targets=TARGETS)
    attached.eval()
    before, expected = state(attached), attached(batch()).detach()
    with torch.no_grad():
        assert torch.equal(attached(batch(), targets=TARGETS), expected)
        assert torch.equal(attached(batch(), labels=TARGETS)["logits"], expected)
    with torch.inference_mode():
        assert torch.equal(attached(batch(), targets=TARGETS), expected)
    with attached.head.frozen():
        assert torch.equal(attached(batch(), targets=TARGETS), expected)
    attached(batch()).sum().backward()  # a gradient without targets, as of a saliency map
    for parameter in attached.parameters():
        parameter.requires_grad_(False)
    assert torch.equal(attached(batch(), targets=TARGETS), expected)
    assert unchanged(attached, before)


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_heads_that_do_not_follow_targets_can_be_trained_in_evaluation_mode(make):
    attached = model(make).eval()
    cross_entropy(attached(batch(), targets=TARGETS), TARGETS).backward()
    assert attached.model[0].weight.grad.abs().sum() > 0


TOKENS, LABELS = normal(4, 7, 12, dtype=torch.float32), torch.arange(28).reshape(4, 7) % 5
LAYOUTS = {
    "transposed": (LABELS.T, r"of shape \(4, 7\), .* of shape \(4, 7, 12\), got \(7, 4\)"),
    "flat": (LABELS.flatten(), r"of shape \(4, 7\), .* got \(28,\)"),
    "a column": (LABELS.unsqueeze(-1), r"of shape \(4, 7\), .* got \(4, 7, 1\)"),
    "another grouping": (LABELS.reshape(2, 14), r"of shape \(4, 7\), .* got \(2, 14\)"),
    "per sequence": (LABELS[:, 0], r"of shape \(4, 7\), .* got \(4,\)"),
    "one value": (LABELS[0, 0], r"of shape \(4, 7\), .* got \(\)"),
    "one-hot": (nn.functional.one_hot(LABELS, 5), r"of shape \(4, 7\), .* got \(4, 7, 5\)"),
    "one-hot of floats": (nn.functional.one_hot(LABELS, 5).float(), "integer class indices, got torch.float32"),
    "floats": (LABELS.float(), "integer class indices, got torch.float32"),
}


@pytest.mark.parametrize("ignore_index", [None, -100])
@pytest.mark.parametrize(("targets", "message"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("make", (LEARNING | OTHERS).values(), ids=LEARNING | OTHERS)
def test_targets_of_another_layout_are_refused(make, targets, message, ignore_index):
    head = make(ignore_index=ignore_index)
    head(TOKENS, LABELS)
    before = state(head)
    with pytest.raises(ValueError, match=f"targets must be {message}"):
        head(TOKENS, targets)
    with pytest.raises(ValueError, match=f"targets must be {message}"), torch.no_grad():
        head.eval()(TOKENS, targets)
    assert unchanged(head, before)


@pytest.mark.parametrize("make", (LEARNING | OTHERS).values(), ids=LEARNING | OTHERS)
@pytest.mark.parametrize("shape", [(), (28,), (28, 1), (2, 2, 7)])
def test_targets_of_the_features_layout_are_accepted(make, shape):
    features = TOKENS[0, 0] if shape == () else TOKENS.reshape(*shape, 12)
    targets = LABELS[0, 0] if shape == () else LABELS.reshape(shape)
    assert make()(features, targets).shape == (*shape, 5)
