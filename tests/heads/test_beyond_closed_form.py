"""Heads whose weight has no closed form: the published solver, and softmax codes."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from helpers import generator, normal
from neuralcollapse import FixedETFClassifier, FixedFrameClassifier, NearestETFClassifier
from neuralcollapse.geometry import softmax_code
from neuralcollapse.geometry.softmax_code import one_vs_rest_margins
from neuralcollapse.heads import ClosedForm, TrustRegion


def step(head, seed):
    features = normal(40, 8, seed=seed, dtype=torch.float32).requires_grad_()
    targets = torch.arange(40) % 5
    loss = cross_entropy(head(features, targets), targets)
    loss.backward()
    return loss.detach(), features.grad


def test_the_published_solver_takes_the_steps_of_the_closed_form():
    """The two problems differ by the nuisance column that the proximal term sees, so by little at a small weight."""
    heads = [
        NearestETFClassifier(8, 5, proximal_weight=2e-3, solver=solver) for solver in (ClosedForm(), TrustRegion())
    ]
    for seed in range(3):
        (loss, gradient), (published_loss, published_gradient) = (step(head, seed) for head in heads)
        assert torch.allclose(loss, published_loss, atol=2e-3)
        assert torch.allclose(gradient, published_gradient, atol=2e-3)
    assert torch.allclose(heads[0].weight, heads[1].weight, atol=1e-2)


def test_the_published_solver_keeps_its_last_solution_in_the_state():
    head = NearestETFClassifier(8, 5, solver=TrustRegion())
    step(head, 0)
    other = NearestETFClassifier(8, 5, solver=TrustRegion())
    other.load_state_dict(head.state_dict())
    assert torch.equal(step(head, 1)[0], step(other, 1)[0])
    assert torch.equal(head.weight, other.weight)


def test_more_classes_than_an_etf_can_hold_have_a_softmax_code():
    code = softmax_code(10, 4, generator=generator(1))
    head = FixedFrameClassifier(4, 10, code, orientation="given")
    assert torch.equal(head.weight, code)
    rotated = FixedFrameClassifier(4, 10, code).weight
    centred = code - code.mean(0)
    assert torch.allclose(rotated @ rotated.T, centred @ centred.T, atol=1e-5)
    assert float(one_vs_rest_margins(head.weight).min()) > 0.5
    logits = head(normal(6, 4, dtype=torch.float32), torch.arange(6))
    assert logits.shape == (6, 10)


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"solver must be ClosedForm\(\) or TrustRegion\(\), got 'newton'"):
        NearestETFClassifier(8, 5, solver="newton")
    with pytest.raises(ValueError, match="in_features must be at least num_classes = 5, got 4"):
        NearestETFClassifier(4, 5, solver=TrustRegion())
    with pytest.raises(ValueError, match="at least num_classes - 1"):
        FixedETFClassifier(4, 10)
    with pytest.raises(ValueError, match="'random' or a \\(K, d\\) tensor, got 'best'"):
        FixedETFClassifier(4, 3, orientation="best")
