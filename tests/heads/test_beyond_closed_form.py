"""Heads whose weight has no closed form: the published solver, and softmax codes."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from helpers import generator, normal
from neuralcollapse import FixedETFClassifier, NearestETFClassifier, nearest_simplex_etf
from neuralcollapse.geometry import one_vs_rest_margins, softmax_code


def step(head, seed):
    features = normal(40, 8, seed=seed, dtype=torch.float32).requires_grad_()
    targets = torch.arange(40) % 5
    loss = cross_entropy(head(features, targets), targets)
    loss.backward()
    return loss.detach(), features.grad


def test_the_published_solver_takes_the_steps_of_the_closed_form():
    """The two problems differ by the nuisance column that the proximal term sees, so by little at a small weight."""
    heads = [
        NearestETFClassifier(8, 5, proximal_weight=2e-3, solver=solver) for solver in ("closed-form", "trust-region")
    ]
    for seed in range(3):
        (loss, gradient), (published_loss, published_gradient) = (step(head, seed) for head in heads)
        assert torch.allclose(loss, published_loss, atol=2e-3)
        assert torch.allclose(gradient, published_gradient, atol=2e-3)
    assert torch.allclose(heads[0].weight, heads[1].weight, atol=1e-2)


def test_the_published_solver_keeps_its_last_solution_in_the_state():
    head = NearestETFClassifier(8, 5, solver="trust-region")
    step(head, 0)
    other = NearestETFClassifier(8, 5, solver="trust-region")
    other.load_state_dict(head.state_dict())
    assert torch.equal(step(head, 1)[0], step(other, 1)[0])
    assert torch.equal(head.weight, other.weight)


def test_mahalanobis_distance_is_by_the_moving_within_class_variance():
    head = NearestETFClassifier(8, 5, feature_norm=None, metric="within-class", momentum=0.3, ignore_index=-1)
    variance, anchor, last = None, None, None
    for seed in range(3):
        features = normal(40, 8, seed=seed, dtype=torch.float32) * torch.linspace(0.1, 2, 8)
        targets = torch.arange(40) % 5
        targets[::7] = -1
        features = features + 3 * torch.nn.functional.one_hot(targets.clamp_min(0), 8)
        head(features, targets)
        kept = targets >= 0
        batch_mean = features[kept].mean(0)
        means = torch.stack([features[targets == one].mean(0) for one in range(5)]) - batch_mean
        last = means if last is None else 0.7 * last + 0.3 * means
        deviations = torch.stack(
            [(x - last[y] - batch_mean) ** 2 for x, y in zip(features[kept], targets[kept], strict=True)]
        )
        now = deviations.mean(0)
        variance = now if variance is None else 0.7 * variance + 0.3 * now
        expected = nearest_simplex_etf(
            last.double(),
            anchor=anchor,
            proximal_weight=0.0 if anchor is None else 0.5,
            metric=(1 / (variance + 0.1 * variance.mean())).double(),
        )
        assert torch.allclose(head.weight.double(), expected, atol=2e-3)
        anchor = head.weight.double()
    assert not torch.allclose(nearest_simplex_etf(last.double()), expected, atol=1e-2)


def test_the_metric_is_in_the_state_and_the_first_batch_may_lack_classes():
    head = NearestETFClassifier(8, 5, metric="within-class")
    only = torch.zeros(40, dtype=torch.int64)
    head(normal(40, 8, seed=5, dtype=torch.float32), only)
    step(head, 0)
    other = NearestETFClassifier(8, 5, metric="within-class")
    other.load_state_dict(head.state_dict())
    (loss, gradient), (same, same_gradient) = step(head, 1), step(other, 1)
    assert torch.equal(loss, same)
    assert torch.equal(gradient, same_gradient)
    assert float(gradient.norm()) > 0
    gram = head.weight.double() @ head.weight.double().mT
    assert torch.allclose(gram, (torch.eye(5) * 5 / 4 - 1 / 4).double(), atol=1e-5)


def test_more_classes_than_an_etf_can_hold_have_a_softmax_code():
    head = FixedETFClassifier(4, 10, orientation="softmax-code", generator=generator(1))
    assert torch.equal(head.weight, softmax_code(10, 4, generator=generator(1)))
    assert float(one_vs_rest_margins(head.weight).min()) > 0.5
    logits = head(normal(6, 4, dtype=torch.float32), torch.arange(6))
    assert logits.shape == (6, 10)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="solver must be 'closed-form' or 'trust-region', got 'newton'"):
        NearestETFClassifier(8, 5, solver="newton")
    with pytest.raises(ValueError, match="metric must be 'within-class' or None, got 'euclid'"):
        NearestETFClassifier(8, 5, metric="euclid")
    with pytest.raises(ValueError, match="metric must be None with solver='trust-region'"):
        NearestETFClassifier(8, 5, solver="trust-region", metric="within-class")
    with pytest.raises(ValueError, match="in_features must be at least num_classes = 5, got 4"):
        NearestETFClassifier(4, 5, solver="trust-region")
    with pytest.raises(ValueError, match="at least num_classes - 1"):
        FixedETFClassifier(4, 10)
    with pytest.raises(ValueError, match="'softmax-code' or a \\(K, d\\) tensor, got 'best'"):
        FixedETFClassifier(4, 3, orientation="best")
