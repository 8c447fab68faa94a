"""Gradient checkpointing: a checkpointed backbone changes nothing, a checkpointed head in training is refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from helpers import normal
from neuralcollapse import (
    ClassMeanClassifier,
    ClassMeans,
    FixedETFClassifier,
    LearnedClassifier,
    NearestETFClassifier,
    NearestFrameClassifier,
    attach_head,
)
from neuralcollapse.heads import LeadingDirections, TrustRegion

TARGETS = torch.arange(16) % 5
FOLLOWING = {
    "nearest": NearestETFClassifier,
    "nearest, detached": partial(NearestETFClassifier, implicit_gradient=False),
    "nearest, no bias or norm": partial(NearestETFClassifier, implicit_gradient=False, bias="none", feature_norm=None),
    "as published": partial(NearestETFClassifier, solver=TrustRegion()),
    "leading directions": partial(NearestFrameClassifier, frame=LeadingDirections()),
    "previous class means": ClassMeanClassifier,
    "differentiable class means": partial(ClassMeanClassifier, means="differentiable"),
    "fixed": FixedETFClassifier,
}
OTHERS = {"learned": LearnedClassifier, "fixed, learned bias": partial(FixedETFClassifier, bias="learned")}
REFUSAL = "must not be recomputed by torch.utils.checkpoint, .*: leave the head out of the checkpointed function"
REENTRANT = pytest.mark.parametrize("use_reentrant", [False, True])


class Backbone(nn.Module):
    """A backbone with a classifier, whose body is checkpointed on request."""

    def __init__(self, call):
        super().__init__()
        self.body, self.fc = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12)), nn.Linear(12, 5)
        self.call = call

    def forward(self, inputs):
        return self.fc(self.call(self.body, inputs))


def trained(make_head, call):
    """Gradients of three steps of two batches each, and the state of the head after them."""
    torch.manual_seed(0)
    model = attach_head(Backbone(call), make_head(12, 5), classifier="fc").double()
    optimizer, gradients = torch.optim.SGD(model.parameters(), lr=0.1), []
    for step in range(3):
        losses = []
        for batch in range(2):
            inputs = normal(16, 6, seed=10 * step + batch).requires_grad_()
            losses.append(cross_entropy(model(inputs, targets=(TARGETS + batch) % 5), (TARGETS + batch) % 5))
        optimizer.zero_grad()
        sum(losses).backward()
        gradients.append(model.model.body[0].weight.grad.clone())
        optimizer.step()
    return gradients, model.head.state_dict()


@REENTRANT
@pytest.mark.parametrize("make_head", (FOLLOWING | OTHERS).values(), ids=FOLLOWING | OTHERS)
def test_a_checkpointed_backbone_gives_the_same_gradients_and_state(make_head, use_reentrant):
    gradients, state = trained(make_head, lambda body, inputs: body(inputs))
    checkpointed, checkpointed_state = trained(make_head, partial(checkpoint, use_reentrant=use_reentrant))
    assert all(map(torch.equal, checkpointed, gradients))
    assert all(torch.equal(checkpointed_state[name], value) for name, value in state.items())


@REENTRANT
@pytest.mark.parametrize("make_head", FOLLOWING.values(), ids=FOLLOWING)
def test_a_checkpointed_head_in_training_is_refused_and_counts_each_batch_once(make_head, use_reentrant):
    head, features = make_head(12, 5), normal(16, 12, dtype=torch.float32).requires_grad_()
    with pytest.raises(ValueError, match=REFUSAL):
        cross_entropy(checkpoint(head, features, TARGETS, use_reentrant=use_reentrant), TARGETS).backward()
    batches = [value for name, value in head.state_dict().items() if name.endswith("batches")]
    assert batches
    assert all(value == 1 for value in batches)


@REENTRANT
def test_checkpointed_class_means_are_refused(use_reentrant):
    means, features = ClassMeans(3, 4), normal(6, 4, dtype=torch.float32).requires_grad_()
    centred, _ = checkpoint(means, features, torch.arange(6) % 3, use_reentrant=use_reentrant)
    with pytest.raises(ValueError, match=REFUSAL):
        centred.square().sum().backward()


@REENTRANT
@pytest.mark.parametrize("make_head", (FOLLOWING | OTHERS).values(), ids=FOLLOWING | OTHERS)
def test_a_checkpointed_head_that_follows_no_means_works(make_head, use_reentrant):
    """In evaluation mode, and in training mode for heads without moving means."""
    head = make_head(12, 5).train(make_head in OTHERS.values())
    gradients = []
    for call in (lambda function, *arguments: function(*arguments), partial(checkpoint, use_reentrant=use_reentrant)):
        features = normal(16, 12, dtype=torch.float32).requires_grad_()
        call(head, features).square().sum().backward()
        gradients.append(features.grad)
    assert torch.equal(*gradients)
