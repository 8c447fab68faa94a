"""The closed-form optimum compared with L-BFGS."""

from __future__ import annotations

import math

import pytest
import torch

from helpers import simplex_gram
from neuralcollapse.ufm import decay_strength, global_optimum, minimize
from ufm.models import SETTINGS, random_model

KINDS = {
    "cross-entropy": {"loss": "cross-entropy"},
    "cross-entropy without bias": {"loss": "cross-entropy", "bias": False},
    "smoothed": {"loss": "cross-entropy", "label_smoothing": 0.1},
    "mse": {"loss": "mse"},
    "mse without bias": {"loss": "mse", "bias": False},
}


def check_descent_ends_at_the_optimum(setting, kind, seed):
    """The loss to 1e-8, never under it by more than 1e-10; W and H to 1e-4, up to the rotation that is free."""
    options = KINDS[kind]
    num_classes, samples_per_class, feature_dim, weight_decay, feature_decay = setting
    optimum = global_optimum(
        num_classes, samples_per_class, weight_decay, feature_decay, feature_dim=feature_dim, **options
    )
    model = random_model(*setting, seed=seed, **options)
    descent = minimize(model)
    assert descent.objective == pytest.approx(optimum.loss, rel=1e-8)
    assert descent.objective >= optimum.loss - 1e-10
    weight, features = model.head.weight.detach(), model.features.detach()
    if optimum.frame == "origin":
        assert weight.abs().max() < 1e-4
        assert features.abs().max() < 1e-4
        return
    assert float(weight.square().sum()) == pytest.approx(optimum.weight_norm_squared, rel=1e-4)
    assert float(features.square().sum()) == pytest.approx(optimum.feature_norm_squared, rel=1e-4)
    truncated = kind == "mse without bias" and feature_dim < num_classes
    gram = weight @ weight.T
    if truncated:  # one of many: all but one direction of the classes, equally long
        lengths = torch.linalg.eigvalsh(gram) * (num_classes - 1) / optimum.weight_norm_squared
        assert torch.allclose(lengths, torch.tensor([0.0] + [1.0] * (num_classes - 1)).double(), atol=1e-4)
    else:
        frame = torch.eye(num_classes).double() if optimum.frame == "orthogonal" else simplex_gram(num_classes)
        assert torch.allclose(gram, optimum.weight_norm_squared / num_classes * frame, atol=1e-4 * gram.max())
    ratio = math.sqrt(weight_decay / (feature_decay * samples_per_class))
    aligned = ratio * weight.repeat_interleave(samples_per_class, 0)
    assert torch.allclose(features, aligned, atol=1e-4 * float(features.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_descent_from_a_random_start_ends_at_the_closed_form(setting, kind):
    check_descent_ends_at_the_optimum(setting, kind, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_descent_from_a_hundred_random_starts_ends_at_the_closed_form(setting, kind):
    for seed in range(100):
        check_descent_ends_at_the_optimum(setting, kind, seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_parameters_returned_have_the_loss_and_the_norms_returned_and_no_gradient(setting, kind):
    options = KINDS[kind]
    num_classes, samples_per_class, feature_dim, weight_decay, feature_decay = setting
    optimum = global_optimum(
        num_classes, samples_per_class, weight_decay, feature_decay, feature_dim=feature_dim, **options
    )
    model = random_model(*setting, **options)
    model.place(optimum.weight, optimum.features, optimum.bias if options.get("bias", True) else None)
    objective = model.objective()
    assert float(objective) == pytest.approx(optimum.loss, rel=1e-13)
    assert float(optimum.weight.square().sum()) == pytest.approx(optimum.weight_norm_squared, rel=1e-12)
    assert float(optimum.features.square().sum()) == pytest.approx(optimum.feature_norm_squared, rel=1e-12)
    assert all(gradient.norm() < 1e-14 for gradient in torch.autograd.grad(objective, list(model.parameters())))
    logits, targets = model()
    true = logits.gather(1, targets[:, None])
    others = logits[torch.arange(num_classes) != targets[:, None]].view(len(targets), -1)
    assert torch.allclose(true - others, torch.tensor(optimum.margin).double(), atol=1e-12)


def test_the_closed_form_is_that_of_the_formulas():
    """The formulas of section 5, written out."""
    for num_classes, samples_per_class, _, weight_decay, feature_decay in SETTINGS:
        c = math.sqrt(weight_decay / (feature_decay * samples_per_class)) / (num_classes - 1)
        inside = (num_classes - 1) * (c - weight_decay) / weight_decay
        rho = max(0.0, math.log(inside) / c) if inside > 0 else 0.0
        loss = math.log(1 + (num_classes - 1) * math.exp(-c * rho)) + weight_decay * rho
        optimum = global_optimum(num_classes, samples_per_class, weight_decay, feature_decay)
        assert optimum.weight_norm_squared == pytest.approx(rho, rel=1e-12)
        assert optimum.loss == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_optimum_reaches_the_origin_without_a_jump(kind):
    options, smoothing = KINDS[kind], KINDS[kind].get("label_smoothing", 0.0)
    decay = (1 - smoothing) / (7 * math.sqrt(3))  # at which s + ε = 1
    assert decay_strength(7, 3, decay, decay) == pytest.approx(1 - smoothing)
    under, over = (global_optimum(7, 3, decay * factor, decay, **options) for factor in (1 - 1e-9, 1 + 1e-9))
    assert over.frame == "origin"
    assert over.weight_norm_squared == over.feature_norm_squared == over.margin == 0
    assert under.frame != "origin"
    assert 0 < under.weight_norm_squared < 1e-6
    assert under.loss == pytest.approx(over.loss, rel=1e-8)
    origin = 0.5 * (1 - 1 / 7 if options.get("bias", True) else 1) if options["loss"] == "mse" else math.log(7)
    assert over.loss == pytest.approx(origin)


def test_the_optimum_of_100_000_classes_needs_no_matrix():
    optimum = global_optimum(100_000, 1, 1e-7, 1e-7)
    assert optimum.frame == "simplex"
    assert optimum.margin == pytest.approx(math.log(99_999 * (1 - 0.0099999) / 0.0099999))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((1, 2, 0.1, 0.1), {}, "num_classes must be at least 2, got 1"),
        ((4, 0, 0.1, 0.1), {}, "samples_per_class must be at least 1, got 0"),
        ((4, 2, 0.0, 0.1), {}, "weight_decay must be greater than 0, got 0.0"),
        ((4, 2, 0.1, -0.1), {}, "feature_decay must be a finite number of at least 0, got -0.1"),
        ((4, 2, 0.1, None), {}, "feature_decay must be a finite number of at least 0, got None"),
        ((4, 2, 0.1, 0.1), {"feature_dim": 2}, "feature_dim must be at least num_classes - 1 = 3, got 2"),
        ((4, 2, 0.1, 0.1), {"loss": "focal"}, "loss must be 'cross-entropy' or 'mse', of which the optimum is known"),
        ((4, 2, 0.1, 0.1), {"label_smoothing": 1}, r"label_smoothing must lie in \[0, 1\), got 1"),
        ((4, 2, 0.1, 0.1), {"label_smoothing": 0.1, "loss": "mse"}, "label_smoothing must be 0 with loss 'mse'"),
    ],
)
def test_bad_input_is_rejected(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        global_optimum(*arguments, **options)
