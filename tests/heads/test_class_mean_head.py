"""The classifier of class means: which means a batch sees, unseen classes, state, gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.nn.functional import cross_entropy, normalize

from helpers import generator, normal
from neuralcollapse import ClassMeanClassifier

MEANS = ("previous", "current", "differentiable")


def batch(seed, size=40, num_classes=5):
    return normal(size, 6, seed=seed) + 0.5, torch.randint(num_classes, (size,), generator=generator(seed))


def centred(features, targets):
    return torch.stack([features[targets == k].mean(0) for k in range(5)]) - features.mean(0)


@pytest.mark.parametrize("means", MEANS)
def test_training_logits_are_those_of_the_moving_means(means):
    """Three steps written out: unit rows of moving centred means, bias −W m."""
    head = ClassMeanClassifier(6, 5, means=means, feature_norm=3.0, momentum=0.4).double()
    weight, moving = head.weight, None
    for seed in range(3):
        features, targets = batch(seed)
        unit = 3.0 * normalize(features)
        moving = centred(unit, targets) if moving is None else 0.6 * moving + 0.4 * centred(unit, targets)
        after = normalize(moving)
        seen = weight if means == "previous" else after
        assert torch.allclose(head(features, targets), (unit - unit.mean(0)) @ seen.T, atol=1e-6)
        assert torch.allclose(head.weight, after, atol=1e-6)  # the means are kept in fp32
        weight = after


def test_logits_of_previous_means_do_not_know_the_labels_of_their_batch():
    features, targets = batch(1)
    same = {}
    for means in MEANS:
        heads = [ClassMeanClassifier(6, 5, means=means).double() for _ in range(2)]
        for head in heads:
            head(*batch(0))
        same[means] = torch.allclose(heads[0](features, targets), heads[1](features, targets.flip(0)), atol=1e-12)
    assert same == {"previous": True, "current": False, "differentiable": False}


@pytest.mark.parametrize("means", MEANS)
def test_training_accuracy_on_noise_is_chance_with_previous_means_alone(means):
    head = ClassMeanClassifier(256, 10, means=means, momentum=1.0)
    right = 0
    for seed in range(20):
        features, targets = normal(64, 256, seed=seed).float(), torch.randint(10, (64,), generator=generator(seed))
        right += int((head(features, targets).argmax(1) == targets).sum())
    chance = 0.1 * 1280
    assert abs(right - chance) < 4.5 * (0.9 * chance) ** 0.5 if means == "previous" else right > 0.95 * 1280


@pytest.mark.parametrize("means", MEANS)
def test_without_bias_the_gradient_is_direct_unless_the_means_are_differentiable(means):
    head = ClassMeanClassifier(6, 5, means=means, feature_norm=None, bias="none", momentum=0.5).double()
    features, targets = batch(0)
    features.requires_grad_()
    _, weight, bias = head.prepare(features, targets)
    (gradient,) = torch.autograd.grad((features @ weight.T), features, upstream := normal(40, 5, seed=3))
    assert bias is None
    assert torch.allclose(gradient, upstream @ weight) == (means != "differentiable")


def test_differentiable_means_carry_their_gradient_exactly():
    head = ClassMeanClassifier(6, 5, means="differentiable", momentum=0.5).double()
    head(*batch(0))
    start = copy.deepcopy(head.state_dict())
    features, targets = batch(1, size=8)

    def logits(features):
        head.load_state_dict(start)
        return head(features, targets)

    assert gradcheck(logits, features.requires_grad_())


def test_classes_not_seen_have_random_unit_rows_and_keep_them_until_they_are():
    head = ClassMeanClassifier(6, 5).double()
    start = head.weight
    assert torch.equal(start, ClassMeanClassifier(6, 5).double().weight)
    assert not torch.equal(start, ClassMeanClassifier(6, 5, generator=generator(1)).double().weight)
    assert torch.allclose(start.norm(dim=1), torch.ones(5).double(), atol=1e-6)
    head(*batch(0, num_classes=3))
    assert torch.equal(head.weight[3:], start[3:])
    assert not torch.allclose(head.weight[:3], start[:3], atol=0.1)
    features, _ = batch(0)
    one_class = ClassMeanClassifier(6, 5).double()
    one_class(features, torch.full((40,), 2))  # whose centred mean is zero
    assert torch.equal(one_class.weight, start)
    assert one_class.eval()(features).isfinite().all()


def test_more_classes_than_any_etf_has():
    head = ClassMeanClassifier(6, 300)
    features, targets = normal(900, 6).float().requires_grad_(), torch.arange(900) % 300
    cross_entropy(head(features, targets), targets).backward()
    assert features.grad.isfinite().all()
    assert torch.allclose(head.weight.norm(dim=1), torch.ones(300), atol=1e-6)


def test_ignored_targets_are_left_out_of_the_means():
    plain, ignoring = ClassMeanClassifier(6, 5).double(), ClassMeanClassifier(6, 5, ignore_index=-100).double()
    features, targets = batch(0)
    kept = torch.arange(40) % 3 != 0
    plain(features[kept], targets[kept])
    logits = ignoring(features.reshape(4, 10, 6), targets.where(kept, -100).reshape(4, 10))
    assert logits.shape == (4, 10, 5)
    for name, value in plain.state_dict().items():
        assert torch.allclose(value.double(), ignoring.state_dict()[name].double(), atol=1e-6)


def test_targets_are_needed_in_training_and_reach_through_a_model():
    head = ClassMeanClassifier(6, 5).double()
    model, (features, targets) = nn.Sequential(nn.Identity(), head), batch(0)
    with pytest.raises(ValueError, match="targets must be given in training mode"):
        model(features)
    with head.use_targets(targets):
        model(features)
    before = copy.deepcopy(head.state_dict())
    with head.frozen():
        logits = model(features)
    assert all(torch.equal(before[name], value) for name, value in head.state_dict().items())
    assert torch.equal(logits, head.eval()(features))


def test_a_loaded_state_and_the_inference_form_give_the_same_logits():
    head, again = ClassMeanClassifier(6, 5).double(), ClassMeanClassifier(6, 5, generator=generator(7)).double()
    head(*batch(0, num_classes=3))
    again.load_state_dict(head.state_dict())
    assert torch.equal(head(*batch(1)), again(*batch(1)))
    features, _ = batch(2)
    assert torch.allclose(head.to_inference()(features), head.eval()(features), atol=1e-12)


def test_two_forwards_can_precede_one_backward():
    features = [batch(seed)[0].requires_grad_() for seed in range(2)]
    targets = [batch(seed)[1] for seed in range(2)]
    head = ClassMeanClassifier(6, 5, means="differentiable").double()
    losses = [cross_entropy(head(*pair), pair[1]) for pair in zip(features, targets, strict=True)]
    for buffer in head.buffers():  # as a broadcast of buffers would
        buffer.zero_()
    together = torch.autograd.grad(sum(losses), features)
    head = ClassMeanClassifier(6, 5, means="differentiable").double()
    for feature, target, expected in zip(features, targets, together, strict=True):
        (alone,) = torch.autograd.grad(cross_entropy(head(feature, target), target), feature)
        assert torch.allclose(alone, expected, atol=1e-14)


def test_low_precision_keeps_the_means_in_fp32():
    head = ClassMeanClassifier(6, 5).to(torch.bfloat16)
    features, targets = batch(0)
    assert head(features.bfloat16(), targets).dtype == torch.bfloat16
    assert head.weight.dtype == head.class_means.centred_means.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(features.bfloat16(), targets).dtype == torch.bfloat16
    assert head.weight.dtype == torch.float32


def test_the_training_forward_compiles_into_one_graph():
    def run(compiled):
        head = ClassMeanClassifier(6, 5, means="differentiable").double()
        forward = torch.compile(head, fullgraph=True, backend="aot_eager") if compiled else head
        logits = [forward(*batch(seed)) for seed in range(2)]
        return torch.stack(logits), head.weight

    for plain, compiled in zip(run(False), run(True), strict=True):
        assert torch.allclose(plain, compiled, atol=1e-12)
