from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.nn.functional import cross_entropy

from helpers import generator, normal, simplex_gram
from neuralcollapse import (
    NearestETFClassifier,
    nearest_simplex_etf,
    random_simplex_etf,
)
from neuralcollapse.geometry import nearest_etf_diagnostics
from neuralcollapse.heads import ClosedForm, TrustRegion


def batch(seed, size=40, dtype=torch.float64):
    return normal(size, 12, seed=seed, dtype=dtype) + 0.5, torch.randint(5, (size,), generator=generator(seed))


def centred(features, targets):
    return torch.stack([features[targets == k].mean(0) for k in range(5)]) - features.mean(0)


def test_training_logits_are_those_of_the_nearest_etf():
    """Three steps written out: moving means, no anchor in the first and then the last ETF, bias −E m."""
    head = NearestETFClassifier(12, 5, feature_norm=3.0, momentum=0.4, proximal_weight=0.2).double()
    etf, moving = None, None
    for seed in range(3):
        features, targets = batch(seed)
        features = 3.0 * features / features.norm(dim=1, keepdim=True)
        moving = centred(features, targets) if moving is None else 0.6 * moving + 0.4 * centred(features, targets)
        etf = nearest_simplex_etf(moving, anchor=etf, proximal_weight=0.0 if etf is None else 0.2)
        logits = head(*batch(seed))
        assert torch.allclose(logits, (features - features.mean(0)) @ etf.T, atol=1e-6)  # the anchor is kept in fp32
        assert torch.allclose(head.weight, etf, atol=1e-6)


@pytest.mark.parametrize("feature_norm", [None, 4.0])
def test_logits_carry_both_gradients_exactly(feature_norm):
    head = NearestETFClassifier(12, 5, feature_norm=feature_norm, momentum=0.5).double()
    head(*batch(0))
    start = head.state_dict()
    features, targets = batch(1, size=8)

    def logits(features):
        head.load_state_dict(start)
        return head(features, targets)

    start = copy.deepcopy(start)
    assert gradcheck(logits, features.requires_grad_())


def test_implicit_gradient_can_be_left_out():
    head = NearestETFClassifier(12, 5, feature_norm=None, bias="none", implicit_gradient=False).double()
    features, targets = batch(0)
    features.requires_grad_()
    upstream = normal(40, 5, seed=3)
    (gradient,) = torch.autograd.grad(head(features, targets), features, upstream)
    assert torch.allclose(gradient, upstream @ head.weight)
    whole = NearestETFClassifier(12, 5, feature_norm=None, bias="none").double()
    (other,) = torch.autograd.grad(whole(features, targets), features, upstream)
    assert not torch.allclose(other, gradient)


def test_training_without_targets_raises_and_says_what_to_do():
    head = NearestETFClassifier(12, 5).double()
    with pytest.raises(ValueError, match="targets must be given in training mode"):
        head(batch(0)[0])


def test_frozen_decides_as_in_evaluation_and_updates_nothing():
    head = NearestETFClassifier(12, 5).double()
    head(*batch(0))
    before = copy.deepcopy(head.state_dict())
    with head.frozen():
        logits = head(batch(1)[0])
    assert all(torch.equal(before[name], value) for name, value in head.state_dict().items())
    assert torch.equal(logits, head.eval()(batch(1)[0]))
    with pytest.raises(ValueError, match="targets must be given"):
        head.train()(batch(1)[0])


def test_use_targets_reaches_through_a_model():
    head = NearestETFClassifier(12, 5).double()
    model = nn.Sequential(nn.Linear(12, 12).double(), head)
    features, targets = batch(0)
    expected = copy.deepcopy(model)
    with head.use_targets(targets):
        logits = model(features)
    assert torch.equal(logits, expected[1](expected[0](features), targets))
    with pytest.raises(ValueError, match="targets must be given"):
        model(features)


def test_two_forwards_can_precede_one_backward():
    head = NearestETFClassifier(12, 5).double()
    features = [batch(seed)[0].requires_grad_() for seed in range(2)]
    targets = [batch(seed)[1] for seed in range(2)]
    losses = [cross_entropy(head(*pair), pair[1]) for pair in zip(features, targets, strict=True)]
    for buffer in head.buffers():  # as a broadcast of buffers would
        buffer.zero_()
    together = torch.autograd.grad(sum(losses), features)

    head = NearestETFClassifier(12, 5).double()
    for feature, target, expected in zip(features, targets, together, strict=True):
        (alone,) = torch.autograd.grad(cross_entropy(head(feature, target), target), feature)
        assert torch.allclose(alone, expected, atol=1e-14)


def test_autocast_keeps_means_and_solve_in_fp32():
    backbone, head = nn.Linear(12, 12), NearestETFClassifier(12, 5)
    features, targets = batch(0, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(backbone(features), targets)
    assert logits.dtype == torch.bfloat16
    assert head.weight.dtype == torch.float32
    assert torch.allclose((head.weight @ head.weight.T).double(), simplex_gram(5), atol=1e-6)
    cross_entropy(logits.float(), targets).backward()
    assert torch.isfinite(backbone.weight.grad).all()


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("inductor", {}),
        pytest.param("aot_eager", {}, marks=pytest.mark.slow),
        pytest.param("aot_eager", {"momentum": "cumulative", "solver": ClosedForm("products")}, marks=pytest.mark.slow),
        pytest.param("aot_eager", {"momentum": "published"}, marks=pytest.mark.slow),
        pytest.param("inductor", {"solver": ClosedForm("products"), "ignore_index": 3}, marks=pytest.mark.slow),
    ],
)
def test_the_whole_training_forward_compiles_into_one_graph(backend, options):
    def model():
        torch.manual_seed(0)
        return nn.ModuleList([nn.Linear(12, 12), NearestETFClassifier(12, 5, **options)])

    def step(parts, features, targets):
        return cross_entropy(parts[1](parts[0](features), targets), targets)

    torch._dynamo.reset()
    eager, compiled = model(), model()
    run = torch.compile(step, fullgraph=True, backend=backend)
    for seed in range(3):
        data = batch(seed, dtype=torch.float32)
        losses = step(eager, *data), run(compiled, *data)
        assert torch.allclose(*losses, atol=1e-6)
        for loss in losses:
            loss.backward()
    assert torch.allclose(eager[0].weight.grad, compiled[0].weight.grad, atol=1e-5)
    assert torch.allclose(eager[1].weight, compiled[1].weight, atol=1e-6)


def test_the_first_solve_has_no_anchor_where_the_data_decide():
    features, targets = batch(0)
    heads = [NearestETFClassifier(12, 5, proximal_weight=weight, feature_norm=None).double() for weight in (0.0, 0.5)]
    for head in heads:
        head(features, targets)
    assert torch.allclose(heads[0].weight, heads[1].weight, atol=1e-12)
    assert torch.allclose(heads[0].weight, nearest_simplex_etf(centred(features, targets)), atol=1e-12)
    for head in heads:
        head(*batch(1))
    assert not torch.allclose(heads[0].weight, heads[1].weight, atol=1e-2)


def test_the_first_solve_leaves_to_its_start_only_what_missing_classes_leave_open():
    """Three of five classes seen: they lie as their own ETF would, up to 1e-3; the other two are near the start's."""
    head = NearestETFClassifier(12, 5, feature_norm=None, proximal_weight=8.0, generator=generator(2)).double()
    start = head.weight.clone()
    features, targets = batch(0)
    head(features, targets % 3)
    assert torch.allclose(head.weight @ head.weight.T, simplex_gram(5), atol=1e-10)
    moving = head.class_means.centred_means
    tiny = nearest_simplex_etf(moving, anchor=start, proximal_weight=1e-6)
    assert (head.weight - tiny).norm() < 5e-3
    anchored = nearest_simplex_etf(moving, anchor=start, proximal_weight=8.0)
    assert (head.weight - anchored).norm() > 0.1


@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_ignored_tokens_are_left_out(ignore_index):
    features, targets = batch(0)
    targets = targets % 4 + 1
    expected = NearestETFClassifier(12, 6).double()
    padded = NearestETFClassifier(12, 6, ignore_index=ignore_index).double()
    tokens = torch.cat([features, torch.full((8, 12), 1e3, dtype=torch.float64)]).reshape(4, 12, 12)
    labels = torch.cat([targets, torch.full((8,), ignore_index)]).reshape(4, 12)
    logits = padded(tokens, labels)
    assert logits.shape == (4, 12, 6)
    assert torch.allclose(logits.reshape(48, 6)[:40], expected(features, targets), atol=1e-6)
    for name, value in expected.state_dict().items():
        assert torch.allclose(padded.state_dict()[name], value), name
    with pytest.raises(ValueError, match="targets must lie in"):
        padded(tokens, labels - 200)


def test_forward_is_prepare_and_a_linear_map():
    heads = [NearestETFClassifier(12, 5).double() for _ in range(2)]
    data = batch(0)
    features, weight, bias = heads[0].prepare(*data)
    assert torch.equal(torch.nn.functional.linear(features, weight, bias), heads[1](*data))
    assert torch.allclose(weight, heads[0].weight.double(), atol=1e-6)


def test_one_class_in_the_first_batch_keeps_the_first_etf():
    head = NearestETFClassifier(12, 5, generator=generator(2)).double()
    first = head.weight.clone()
    head(batch(0)[0], torch.zeros(40, dtype=torch.int64))
    assert torch.allclose(head.weight, first, atol=1e-6)
    assert torch.allclose(first.float(), random_simplex_etf(5, 12, generator=generator(2)), atol=1e-6)


def test_with_unseen_classes_the_weight_stays_an_etf():
    head = NearestETFClassifier(12, 5).double()
    for seed in range(5):
        features, targets = batch(seed)
        head(features, targets % 2)
    assert torch.allclose(head.weight @ head.weight.T, simplex_gram(5), atol=1e-10)


def test_training_mode_leaks_labels_and_evaluation_mode_does_not():
    """Why every compared accuracy is taken in evaluation mode: on noise, training-mode logits know the labels."""
    head = NearestETFClassifier(512, 10, momentum=1.0)
    features, targets = normal(128, 512, dtype=torch.float32), torch.randint(10, (128,), generator=generator())
    assert (head(features, targets).argmax(1) == targets).float().mean() > 0.95
    fresh, labels = normal(5000, 512, seed=1, dtype=torch.float32), torch.randint(10, (5000,), generator=generator(1))
    assert abs((head.eval()(fresh).argmax(1) == labels).float().mean() - 0.1) < 5 * (0.09 / 5000) ** 0.5


def test_each_solution_is_logged_on_request(caplog):
    head = NearestETFClassifier(12, 5).double()
    head(*batch(0))
    assert not caplog.records
    with caplog.at_level("DEBUG", logger="neuralcollapse.heads.nearest"):
        head(*batch(1))
    (record,) = caplog.records
    assert "objective" in record.getMessage()
    assert "distance_to_anchor" in record.getMessage()


def test_labels_out_of_range_are_refused_and_change_nothing():
    head = NearestETFClassifier(12, 5).double()
    head(*batch(0))
    before = copy.deepcopy(head.state_dict())
    with pytest.raises(ValueError, match=r"targets must lie in \[0, 5\), got labels from 0 to 5"):
        head(torch.zeros(2, 12).double(), torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="features must be finite"):
        head(torch.full((2, 12), torch.nan).double(), torch.tensor([0, 1]))
    assert all(torch.equal(before[name], value) for name, value in head.state_dict().items())


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 2, 3, 4, 5])])
def test_diagnostics_of_the_last_solution(weights):
    head = NearestETFClassifier(12, 5, diagnostics=True, momentum=0.4, class_weights=weights).double()
    assert head.last_solve is None
    for seed in range(3):
        last = head.weight
        head(*batch(seed))
        found = dict(head.last_solve)
        anchored = {"anchor": last, "proximal_weight": 0.5} if seed else {"anchor": last}
        expected = nearest_etf_diagnostics(
            head.class_means.centred_means, head.weight, class_weights=weights, **anchored
        )
        assert found.pop("stopping_criterion") == "closed form"
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert found["gradient_norm"] < 1e-6
        assert found["distance_to_anchor"] == pytest.approx(float((head.weight - last).norm()))
    before = head.last_solve
    head.eval()(batch(4)[0])
    assert head.last_solve is before


def test_diagnostics_of_the_published_problem_are_those_of_its_solver():
    head = NearestETFClassifier(12, 5, solver=TrustRegion(), diagnostics=True).double()
    for seed in range(2):
        last = head.weight
        head(*batch(seed))
        assert head.last_solve["stopping_criterion"].startswith("gradient norm within the tolerance")
        assert head.last_solve["distance_to_anchor"] == pytest.approx(float((head.weight - last).norm()))
        assert head.last_solve["iterations"] >= 1
        assert head.last_solve.keys() >= {"objective", "gradient_norm"}


def test_diagnostics_are_off_by_default_and_their_switch_is_checked():
    head = NearestETFClassifier(12, 5)
    head(*batch(0, dtype=torch.float32))
    assert head.last_solve is None
    with pytest.raises(ValueError, match="diagnostics must be True or False, got 1"):
        NearestETFClassifier(12, 5, diagnostics=1)
