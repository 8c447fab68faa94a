from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from helpers import generator, normal
from neuralcollapse import losses
from neuralcollapse.lab.config import RunConfig
from neuralcollapse.lab.models.build import build_head, build_model
from neuralcollapse.lab.training.objective import batch_loss, penalty
from neuralcollapse.lab.training.optimizers import build_optimizer, build_schedule

SHAPE = (1, 6, 6)


def small(**settings) -> RunConfig:
    return RunConfig(**{"backbone": "mlp", "width": 24, "depth": 1} | settings)


def rates(config: RunConfig, batches: int) -> list[float]:
    """The learning rate of every step of a run."""
    optimizer = build_optimizer(config, build_model(config, SHAPE, 10))
    schedule = build_schedule(config, optimizer, batches)
    found = []
    for _ in range(config.epochs * batches):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant"}, [1] * 6),
        ({"schedule": "step", "schedule_options": {"step_at": 2}}, [1, 1, 0.1, 0.1, 0.01, 0.01]),
        ({"schedule": "step", "schedule_options": {"step_at": 3, "lr_factor": 0.5}}, [1, 1, 1, 0.5, 0.5, 0.5]),
        ({"schedule": "step"}, [1, 1, 0.1, 0.1, 0.01, 0.01]),
        ({"schedule": "step", "epochs": 2}, [1, 0.1]),
        ({"schedule": "step", "epochs": 1}, [1]),
        ({"schedule": "step", "schedule_options": {"step_at": [1, 5]}}, [1, 0.1, 0.1, 0.1, 0.1, 0.01]),
        ({"schedule": "cosine"}, [0.5 * (1 + math.cos(math.pi * epoch / 6)) for epoch in range(6)]),
        ({"schedule": "constant", "schedule_options": {"warmup_epochs": 2}}, [0.1, 0.6, 1, 1, 1, 1]),
        ({"schedule": "step", "schedule_options": {"step_at": 2, "warmup_epochs": 1}}, [0.2, 1, 0.1, 0.1, 0.01, 0.01]),
        (
            {"schedule": "step", "schedule_options": {"step_at": [1, 5], "warmup_epochs": 1}},
            [0.2, 0.1, 0.1, 0.1, 0.1, 0.01],
        ),
        (
            {"schedule": "cosine", "schedule_options": {"warmup_epochs": 2}},
            [0.1, 0.6, *(0.5 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4))],
        ),
    ],
)
def test_the_schedule_at_the_start_of_each_epoch(settings, expected):
    found = rates(small(**{"method": "standard", "lr": 0.4, "epochs": 6} | settings), batches=5)
    assert found[::5] == pytest.approx([0.4 * factor for factor in expected])


def test_one_cycle_rises_to_the_rate_and_falls_to_nothing():
    found = rates(small(method="standard", lr=0.4, epochs=6, schedule="one-cycle"), batches=5)
    top = found.index(max(found))
    assert max(found) == pytest.approx(0.4, rel=0.02)
    assert 0 < top < 15
    assert found[:top] == sorted(found[:top])
    assert found[top:] == sorted(found[top:], reverse=True)
    assert found[-1] < 1e-3


def test_the_warm_up_is_linear_and_the_cosine_after_it_ends_at_nothing():
    found = rates(small(method="standard", lr=0.4, epochs=6, schedule_options={"warmup_epochs": 3}), batches=5)
    assert found[:15] == pytest.approx([0.4 * (step + 1) / 15 for step in range(15)])
    assert found[15:] == pytest.approx([0.2 * (1 + math.cos(math.pi * step / 15)) for step in range(15)])


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("cycle_momentum", [True, False])
def test_one_cycle_is_torchs_with_the_settings_and_moves_the_momentum(optimizer, cycle_momentum):
    settings = {"momentum": 0.7} if optimizer == "sgd" and not cycle_momentum else {}
    config = small(
        method="standard",
        optimizer=optimizer,
        lr=0.4,
        epochs=4,
        schedule="one-cycle",
        schedule_options={"div_factor": 8.0, "final_div_factor": 50.0, "cycle_momentum": cycle_momentum},
        **settings,
    )
    built = build_optimizer(config, build_model(config, SHAPE, 10))
    schedule, found = build_schedule(config, built, 5), []
    for _ in range(20):
        group = built.param_groups[0]
        found.append((group["lr"], group["momentum"] if optimizer == "sgd" else group["betas"][0]))
        built.step()
        schedule.step()
    rate, momentum = zip(*found, strict=True)
    assert (rate[0], max(rate), rate[-1]) == pytest.approx((0.05, 0.4, 0.001), rel=1e-6)
    if cycle_momentum:
        assert (momentum[0], min(momentum), momentum[-1]) == pytest.approx((0.95, 0.85, 0.95))
        assert rate.index(max(rate)) == momentum.index(min(momentum))
    else:
        assert set(momentum) == {0.7 if optimizer == "sgd" else 0.9}


def test_one_cycle_of_three_phases_falls_as_fast_as_it_rose():
    found = rates(
        small(method="standard", lr=0.4, epochs=10, schedule="one-cycle", schedule_options={"three_phase": True}),
        batches=10,
    )
    top = found.index(max(found))
    assert found[: top + 1] == pytest.approx(found[top : 2 * top + 1][::-1], rel=0.05)
    assert found[2 * top + 2] < found[0]
    assert found[-1] < 1e-3


def test_a_linear_one_cycle_is_the_triangular_schedule():
    triangle = {"pct_start": 0.2, "anneal_strategy": "linear", "div_factor": 5, "final_div_factor": 4}
    config = small(
        method="standard",
        lr=0.4,
        epochs=10,
        schedule="one-cycle",
        schedule_options={**triangle, "cycle_momentum": False},
    )
    found = rates(config, batches=10)
    steps = [0, 0.2 * 100 - 1, 99]
    assert found == pytest.approx(np.interp(range(100), steps, [0.08, 0.4, 0.02]).tolist())


def test_shifts_of_batch_norm_have_their_own_rate_and_the_same_decay():
    options = {"optimizer_options": {"shift_lr_factor": 8.0, "nesterov": True}}
    model = build_model(small(**options), SHAPE, 10)
    optimizer = build_optimizer(small(lr=0.5, weight_decay=0.01, **options), model)
    others, shifts = optimizer.param_groups
    expected = [module.bias for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    assert all(one is other for one, other in zip(shifts["params"], expected, strict=True))
    assert len(others["params"]) + len(expected) == len(list(model.parameters()))
    assert (others["lr"], shifts["lr"]) == (0.5, 4.0)
    assert shifts["lr"] * shifts["weight_decay"] == others["lr"] * others["weight_decay"] == 0.005
    assert (others["nesterov"], shifts["nesterov"]) == (True, True)


def test_a_factor_for_shifts_that_are_not_there_is_refused():
    config = small(optimizer_options={"shift_lr_factor": 8.0}, backbone_options={"batch_norm_affine": False})
    with pytest.raises(ValueError, match="shift_lr_factor needs batch norm with a shift, but the model has none"):
        build_optimizer(config, build_model(config, SHAPE, 10))


def test_nesterov_without_momentum_is_refused():
    with pytest.raises(ValueError, match="optimizer_options.nesterov needs momentum above 0, got 0"):
        small(optimizer_options={"nesterov": True}, momentum=0.0)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_the_optimiser_is_torchs_with_the_settings(name):
    momentum = {"momentum": 0.7} if name == "sgd" else {}
    config = small(method="standard", optimizer=name, lr=0.03, weight_decay=0.02, **momentum)
    group = build_optimizer(config, build_model(config, SHAPE, 10)).param_groups[0]
    assert (group["lr"], group["weight_decay"], group.get("momentum", 0.7)) == (0.03, 0.02, 0.7)


def test_lbfgs_searches_along_a_line_and_decays_inside_the_loss():
    plain = {"method": "standard", "unit_weight": False, "optimizer": "lbfgs"}
    config = small(**plain, lr=0.1, optimizer_options={"history": 7, "iterations": 3}, weight_decay=0.02)
    model = build_model(config, SHAPE, 10)
    group = build_optimizer(config, model).param_groups[0]
    assert (group["lr"], group["history_size"], group["max_iter"]) == (0.1, 7, 3)
    assert group["line_search_fn"] == "strong_wolfe"
    expected = 0.01 * sum(float(parameter.detach().square().sum()) for parameter in model.parameters())
    assert penalty(config, model, torch.randn(4, 24)).item() == pytest.approx(expected, rel=1e-5)


def test_lbfgs_refuses_the_implicit_head():
    with pytest.raises(ValueError, match="optimizer lbfgs cannot train method implicit"):
        small(method="implicit", optimizer="lbfgs")


def test_lbfgs_refuses_unit_rows():
    with pytest.raises(ValueError, match="optimizer lbfgs needs unit_weight false"):
        small(method="standard", optimizer="lbfgs")


def test_decay_of_features_that_are_normalised_is_refused():
    with pytest.raises(ValueError, match="feature_decay needs feature_norm none"):
        small(method="standard", feature_decay=0.1)


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"classifier_bias": "none"}, "weight"), ({"backbone_options": {"batch_norm_affine": False}}, "head.bias")],
)
def test_agd_says_what_it_cannot_train(settings, name):
    config = small(method="standard", optimizer="agd", **settings)
    with pytest.raises(ValueError, match=f"agd has no rule for.*{name}.*backbone_options.batch_norm_affine false"):
        build_optimizer(config, build_model(config, SHAPE, 10))


@pytest.mark.parametrize("method", ["standard", "fixed", "implicit"])
def test_agd_trains_every_method_without_vectors_from_an_orthogonal_start(method):
    bias = "none" if method == "standard" else "centring"
    config = small(method=method, optimizer="agd", backbone_options={"batch_norm_affine": False}, classifier_bias=bias)
    model = build_model(config, SHAPE, 10)
    build_optimizer(config, model)
    weight = model.model[0].layers[1][0].weight.double()
    assert torch.allclose(weight @ weight.T, torch.eye(24, dtype=torch.float64) * 24 / 36, atol=1e-5)
    if method == "standard":
        assert torch.allclose(model.head.weight.norm(dim=1), torch.ones(10))


def test_the_losses_are_their_formulas():
    random = generator(1)
    logits = torch.randn(6, 4, generator=random, dtype=torch.float64)
    targets = torch.tensor([0, 3, 1, 1, 2, 0])
    one_hot = torch.eye(4, dtype=torch.float64)[targets]
    log_shares = logits - logits.exp().sum(1, keepdim=True).log()
    smoothed = 0.9 * one_hot + 0.1 / 4
    expected = {
        "mse": sum((logits[i, k] - one_hot[i, k]) ** 2 for i in range(6) for k in range(4)) / 24,
        "dot-regression-published": sum(0.5 * (logits[i, targets[i]] - 1) ** 2 for i in range(6)) / 6,
        "cross-entropy": -(smoothed * log_shares).sum() / 6,
    }
    for name, value in expected.items():
        smoothing = {"label_smoothing": 0.1} if name == "cross-entropy" else {}
        found = batch_loss(small(loss=name, **smoothing), logits, targets, logits, logits)
        assert float(found) == pytest.approx(float(value), rel=1e-12), name


def test_losses_of_directions_are_those_of_the_library_with_their_settings():
    features, weight = normal(6, 8, seed=1), normal(4, 8, seed=2)
    targets = torch.tensor([0, 3, 1, 1, 2, 0])
    expected = {
        "normface": losses.normface(features, targets, weight, temperature=0.3),
        "ntce": losses.ntce(features, targets, weight, temperature=0.3),
        "nonl": losses.nonl(features, targets, weight, temperature=0.3, margin=2.0),
        "decoupled": losses.decoupled_cross_entropy(features, targets, weight, temperature=0.3, margin=2.0),
        "two-way": losses.two_way(features, targets, weight, temperature=0.3, margin=2.0),
    }
    assert len({float(value) for value in expected.values()}) == 5
    for name, call in (
        ({"loss": "bidirectional-nonl"}, partial(losses.bidirectional_nonl, temperature=0.1)),
        ({"loss": "dot-regression"}, losses.dot_regression),
    ):
        assert batch_loss(small(**name), features @ weight.T, targets, features, weight) == call(
            features, targets, weight
        )
    for name, value in expected.items():
        margin = {} if name in ("normface", "ntce") else {"margin": 2.0}
        config = small(loss=name, temperature=0.3, **margin)
        assert batch_loss(config, features @ weight.T, targets, features, weight) == value
    plain = small(loss="two-way", temperature=0.3, margin="inf")
    found = batch_loss(plain, features @ weight.T, targets, features, weight)
    assert found == losses.two_way(features, targets, weight, temperature=0.3)


def test_separate_decay_is_of_the_classifier_and_of_what_it_multiplies():
    config = small(method="standard", feature_norm="none", unit_weight=False, weight_decay=0.02, feature_decay=0.3)
    model = build_model(config, SHAPE, 10)
    features = torch.randn(5, 24, generator=generator(2), requires_grad=True)
    head = model.head
    expected = 0.01 * (head.weight.square().sum() + head.bias.square().sum()) + 0.15 * features.square().sum()
    found = penalty(config, model, features)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert build_optimizer(config, model).param_groups[0]["weight_decay"] == 0
    found.backward()
    assert torch.allclose(features.grad, 0.3 * features)
    assert all(parameter.grad is None for parameter in model.model.parameters())


def test_the_published_quirk_penalises_a_constant():
    config = small(method="standard", weight_decay=0.0, feature_decay="published")
    model = build_model(config, SHAPE, 10)
    features = torch.randn(5, 24, generator=generator(2), requires_grad=True)
    found = penalty(config, model, features)
    assert found.item() == pytest.approx(0.5e-4 * 5, rel=1e-6)
    found.backward()
    assert features.grad.abs().max() < 3e-10  # as small, relative to the penalty, as 1e-6 is to 0.15


@pytest.mark.parametrize(("method", "bias"), [("standard", "centring"), ("implicit", "learned")])
def test_a_bias_that_a_method_does_not_have_is_refused(method, bias):
    with pytest.raises(ValueError, match=f"classifier_bias must be .* for method {method}, got '{bias}'"):
        small(method=method, classifier_bias=bias)


def test_the_classifier_of_zhu_et_al():
    learned = build_head(small(method="standard", feature_norm="none", unit_weight=False), 24, 10)
    assert isinstance(learned.bias, nn.Parameter)
    assert not torch.allclose(learned.weight.norm(dim=1), torch.ones(10), atol=1e-3)
    fixed = build_head(small(method="fixed", feature_norm="none", classifier_bias="learned"), 24, 10)
    assert isinstance(fixed.bias, nn.Parameter)
    assert not any(parameter is fixed.weight for parameter in fixed.parameters())
