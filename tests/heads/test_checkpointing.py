"""Gradient checkpointing runs the forward again in the backward pass: gradients and means are those without it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from helpers import normal
from neuralcollapse import ClassMeans, FixedETFClassifier, NearestETFClassifier, NearestFrameClassifier

HEADS = [
    NearestETFClassifier,
    partial(NearestETFClassifier, implicit_gradient=False),
    partial(NearestETFClassifier, implicit_gradient=False, bias="none", feature_norm=None),
    partial(NearestFrameClassifier, geometry="means"),
    FixedETFClassifier,
]


def trained(make_head, call):
    """Gradients of three steps of two batches each, and what the head holds after them."""
    torch.manual_seed(0)
    body, head = nn.Linear(6, 12).double(), make_head(12, 5).double()
    optimizer, gradients = torch.optim.SGD(body.parameters(), lr=0.1), []
    for step in range(3):
        losses = []
        for batch in range(2):  # two graphs alive at once: each forward is repeated from where it began
            inputs, targets = normal(16, 6, seed=10 * step + batch), (torch.arange(16) + batch) % 5
            losses.append(cross_entropy(call(lambda x, y: head(body(x).relu(), y), inputs, targets), targets))
        optimizer.zero_grad()
        sum(losses).backward()
        gradients.append(body.weight.grad.clone())
        optimizer.step()
    return gradients, head.state_dict()


@pytest.mark.parametrize("make_head", HEADS)
def test_a_checkpointed_head_counts_each_batch_once(make_head):
    gradients, state = trained(make_head, lambda function, *arguments: function(*arguments))
    repeated, state_repeated = trained(make_head, partial(checkpoint, use_reentrant=False))
    assert all(map(torch.equal, repeated, gradients))
    assert all(torch.equal(state_repeated[name], value) for name, value in state.items())


def test_class_means_alone_count_a_batch_once():
    means, body = ClassMeans(3, 4, momentum=0.5), nn.Linear(4, 4)
    for seed in range(3):
        features = normal(6, 4, seed=seed, dtype=torch.float32)
        centred, _ = checkpoint(lambda x: means(body(x).exp(), torch.arange(6) % 3), features, use_reentrant=False)
        centred.square().sum().backward()
    assert means.centred.batches == 3
    assert means.centred.seen.tolist() == [6, 6, 6]


def test_the_repetition_is_in_the_context_of_the_first_run():
    head, body, inputs = NearestETFClassifier(12, 5), nn.Linear(6, 12), normal(10, 6, dtype=torch.float32)
    with head.use_targets(torch.arange(10) % 5):
        logits = checkpoint(lambda x: head(body(x).relu()), inputs, use_reentrant=False)
    with head.frozen():
        frozen = checkpoint(lambda x: head(body(x).relu()), 2 * inputs, use_reentrant=False)
    (logits.sum() + frozen.square().sum()).backward()
    assert head.class_means.overall.batches == 1
    with pytest.raises(ValueError, match="targets must be given in training mode"):
        head(body(inputs))


def test_reentrant_checkpoints_are_refused_where_they_would_count_twice():
    features = normal(10, 12, dtype=torch.float32).requires_grad_()
    logits = checkpoint(NearestETFClassifier(12, 5), features, torch.arange(10) % 5, use_reentrant=True)
    with pytest.raises(ValueError, match="checkpoint with use_reentrant=False"):
        logits.sum().backward()


def test_steps_that_cannot_be_told_apart_are_refused():
    head, body, inputs = NearestETFClassifier(12, 5), nn.Linear(6, 12), normal(10, 6, dtype=torch.float32)
    twice = [checkpoint(lambda x, y: head(body(x), y), inputs, torch.arange(10) % 5, use_reentrant=False) for _ in "ab"]
    with pytest.raises(ValueError, match="two with the same features await their backward pass"):
        sum(twice).sum().backward()
