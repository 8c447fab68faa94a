"""Behaviour that all heads share, and what is special to the learned and the fixed ones."""

from __future__ import annotations

import copy
import gc
import inspect
import math
import weakref

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import cross_entropy

from helpers import normal, simplex_gram
from neuralcollapse import (
    FixedETFClassifier,
    FixedFrameClassifier,
    LearnedClassifier,
    NearestETFClassifier,
    NearestFrameClassifier,
    attach_head,
    random_simplex_etf,
    simplex_etf,
    softmax_code,
)
from neuralcollapse.heads import FeatureNorm, LeadingDirections, collapse_radius

CODE = normal(5, 3, seed=4, dtype=torch.float32)
HEADS = {
    "learned": lambda **options: LearnedClassifier(12, 5, **options),
    "unit": lambda **options: LearnedClassifier(12, 5, unit_weight=True, **options),
    "fixed": lambda **options: FixedETFClassifier(12, 5, **options),
    "fixed, learned bias": lambda **options: FixedETFClassifier(12, 5, bias="learned", **options),
    "fixed, no bias": lambda **options: FixedETFClassifier(12, 5, bias="none", **options),
    "nearest": lambda **options: NearestETFClassifier(12, 5, **options),
    "nearest, no bias": lambda **options: NearestETFClassifier(12, 5, bias="none", **options),
    "fixed frame": lambda **options: FixedFrameClassifier(12, 5, CODE, **options),
    "nearest frame of a code": lambda **options: NearestFrameClassifier(12, 5, frame=CODE, **options),
    "nearest frame of the means": lambda **options: NearestFrameClassifier(12, 5, frame=LeadingDirections(), **options),
    "nearest frame of rank 2": lambda **options: NearestFrameClassifier(12, 5, frame=LeadingDirections(2), **options),
}


@pytest.fixture(params=HEADS)
def make(request):
    return HEADS[request.param]


def trained(head, steps=4):
    for step in range(steps):
        features = normal(30, 12, seed=step, dtype=torch.float32) + 0.5
        head.train()(features, torch.arange(30) % 5)
    return head


@pytest.mark.parametrize("feature_norm", [None, "auto", 5.0])
def test_state_dict_round_trip_gives_the_same_logits(make, feature_norm):
    head, fresh = trained(make(feature_norm=feature_norm)), make(feature_norm=feature_norm)
    fresh.load_state_dict(head.state_dict())
    features = normal(8, 12, seed=9, dtype=torch.float32)
    assert torch.equal(fresh.eval()(features), head.eval()(features))
    targets = torch.arange(8) % 5
    assert torch.equal(fresh.train()(features, targets), head.train()(features, targets))


@pytest.mark.parametrize("feature_norm", [None, 5.0])
def test_logits_are_weight_times_features_plus_bias(make, feature_norm):
    head = trained(make(feature_norm=feature_norm)).eval()
    inputs = normal(8, 12, dtype=torch.float32)
    features = head.features(inputs)
    expected = features @ head.weight.T + (0 if head.bias is None else head.bias)
    assert torch.allclose(head(inputs), expected, atol=1e-6)
    if feature_norm:
        assert torch.allclose(features.norm(dim=1), torch.full((8,), feature_norm))


@pytest.mark.parametrize("feature_norm", [None, 5.0])
def test_inference_form_is_plain_and_decides_the_same(make, feature_norm):
    head = trained(make(feature_norm=feature_norm)).eval()
    plain = head.to_inference()
    assert [type(module) for module in plain.modules()] == (
        [nn.Linear] if feature_norm is None else [nn.Sequential, FeatureNorm, nn.Linear]
    )
    inputs = normal(8, 12, dtype=torch.float32)
    assert torch.allclose(plain(inputs), head(inputs), atol=1e-6)
    exported = torch.export.export(plain, (inputs,)).module()
    assert torch.equal(exported(inputs), plain(inputs))
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(inputs), plain(inputs))


def test_evaluation_changes_nothing(make):
    head = trained(make()).eval()
    before = copy.deepcopy(head.state_dict())
    head(normal(8, 12, dtype=torch.float32), torch.arange(8) % 5)
    head(normal(8, 12, dtype=torch.float32))
    assert all(torch.equal(before[name], value) for name, value in head.state_dict().items())


def test_leading_dimensions_are_kept(make):
    head, tokens = make(), normal(3, 4, 12, dtype=torch.float32)
    targets = torch.arange(12).reshape(3, 4) % 5
    reference = copy.deepcopy(head)
    flat = reference(tokens.reshape(12, 12), targets.reshape(12))
    assert torch.allclose(head(tokens, targets), flat.reshape(3, 4, 5), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(make, dtype):
    head = make().to(dtype)
    logits = head(normal(8, 12, dtype=dtype), torch.arange(8) % 5)
    assert logits.dtype == dtype
    assert torch.isfinite(logits).all()
    head = trained(make()).to(dtype).eval()
    inputs = normal(8, 12, dtype=dtype)
    assert torch.allclose(
        head.to_inference(dtype=dtype)(inputs), head(inputs), atol=0.1 if dtype == torch.bfloat16 else 1e-9
    )


def test_wrong_feature_dimension_is_named(make):
    with pytest.raises(ValueError, match=r"features must be of shape \(\.\.\., 12\), got \(8, 11\)"):
        make().eval()(torch.zeros(8, 11))


@pytest.mark.parametrize("feature_norm", [0, -1.0, math.inf, "big"])
def test_bad_feature_norm_is_named(make, feature_norm):
    with pytest.raises(ValueError, match="feature_norm must be a positive number, 'auto' or None"):
        make(feature_norm=feature_norm)


@pytest.mark.parametrize("kind", [FixedETFClassifier, NearestETFClassifier])
def test_impossible_sizes_are_named(kind):
    with pytest.raises(ValueError, match="feature_dim must be at least num_classes - 1 = 9, got 5"):
        kind(5, 10)
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        kind(5, 1)
    with pytest.raises(ValueError, match="bias must be"):
        kind(5, 3, bias="center")
    assert kind(9, 10)(normal(20, 9, dtype=torch.float32), torch.arange(20) % 10).shape == (20, 10)


def test_radius_gives_the_stated_probability_at_collapse():
    for num_classes in (2, 10, 100, 1000):
        etf = simplex_etf(num_classes, dtype=torch.float64)
        logits = collapse_radius(num_classes) * etf @ etf.T
        assert torch.allclose(logits.softmax(1).diagonal(), torch.tensor(0.99, dtype=torch.float64))
    with pytest.raises(ValueError, match="probability must lie in"):
        collapse_radius(10, 0.05)


def test_zero_features_stay_zero_with_finite_gradients():
    features = torch.zeros(2, 3, requires_grad=True)
    norm = FeatureNorm(5.0)(features)
    norm.sum().backward()
    assert torch.equal(norm, torch.zeros(2, 3))
    assert torch.equal(features.grad, torch.full((2, 3), 5.0))


def test_standard_method_equals_the_explicit_loop():
    """SGD with momentum and weight decay, rows projected after each step: one trajectory, by hand."""
    head = LearnedClassifier(12, 5, feature_norm=4.0, unit_weight=True).double()
    weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
    momenta = [torch.zeros_like(weight), torch.zeros_like(bias)]
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5, momentum=0.9, weight_decay=0.01)
    for step in range(10):
        features, targets = normal(16, 12, seed=step), torch.arange(16) % 5
        optimizer.zero_grad()
        cross_entropy(head(features, targets), targets).backward()
        optimizer.step()

        normalised = 4.0 * features / features.norm(dim=1, keepdim=True)
        error = ((normalised @ weight.T + bias).softmax(1) - torch.nn.functional.one_hot(targets, 5)) / 16
        for value, gradient, momentum in zip(
            (weight, bias), (error.T @ normalised, error.sum(0)), momenta, strict=True
        ):
            momentum.mul_(0.9).add_(gradient + 0.01 * value)
            value.sub_(0.5 * momentum)
        weight.div_(weight.norm(dim=1, keepdim=True))
        assert torch.allclose(head.weight, weight, atol=1e-12)
        assert torch.allclose(head.bias, bias, atol=1e-12)


def test_projection_keeps_zero_rows_and_does_not_keep_a_deleted_head_alive():
    head = LearnedClassifier(12, 5, unit_weight=True)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    with torch.no_grad():
        head.weight.mul_(2)
        head.weight[0] = 0
    optimizer.step()
    assert torch.allclose(head.weight.norm(dim=1), torch.tensor([0.0, 1, 1, 1, 1]))
    reference = weakref.ref(head)
    del head
    gc.collect()
    assert reference() is None
    optimizer.step()


def test_fixed_weight_has_the_given_orientation():
    assert torch.equal(FixedETFClassifier(12, 5, orientation="canonical").weight, simplex_etf(5, 12))
    random = FixedETFClassifier(12, 5, orientation="random", generator=torch.Generator().manual_seed(1)).weight
    assert torch.allclose((random @ random.T).double(), simplex_gram(5), atol=1e-6)
    assert not torch.allclose(random, simplex_etf(5, 12), atol=0.1)
    assert not torch.allclose(random, FixedETFClassifier(12, 5).weight, atol=0.1)
    given = random_simplex_etf(5, 12)
    assert torch.equal(FixedETFClassifier(12, 5, orientation=given).weight, given)
    assert "weight" not in dict(FixedETFClassifier(12, 5).named_parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda: FixedETFClassifier(12, 5),
        lambda: FixedFrameClassifier(12, 5, softmax_code(5, 12)),
        lambda: FixedFrameClassifier(12, 20, softmax_code(20, 12)),
        lambda: FixedFrameClassifier(12, 5, CODE),
    ],
)
def test_the_default_orientation_is_the_same_each_time_and_uses_every_feature(make):
    weight = make().weight
    with torch.random.fork_rng():
        torch.manual_seed(3)
        assert torch.equal(make().weight, weight)
    assert bool((weight.square().sum(0) > 1e-3).all())
    assert int((weight.abs() > 1e-6).sum()) == weight.numel()  # no vector along an axis


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_default_orientation_is_that_of_a_generator_with_seed_0(dtype):
    torch.set_default_dtype(dtype)
    try:
        weight = FixedETFClassifier(12, 5).weight
        seeded = FixedETFClassifier(12, 5, generator=torch.Generator().manual_seed(0)).weight
    finally:
        torch.set_default_dtype(torch.float32)
    assert weight.dtype == dtype
    assert torch.equal(weight, seeded)
    assert torch.equal(weight, random_simplex_etf(5, 12, generator=torch.Generator().manual_seed(0), dtype=dtype))


def test_the_default_orientation_is_made_on_the_default_device():
    with torch.device("meta"):
        assert FixedETFClassifier(12, 5).weight.device.type == "meta"


@pytest.mark.parametrize(
    "head",
    [
        lambda: FixedETFClassifier(32, 10),
        lambda: FixedETFClassifier(32, 10, feature_norm=None, bias="learned"),
        lambda: FixedFrameClassifier(32, 10, softmax_code(10, 32)),
    ],
)
def test_a_fixed_weight_trains_behind_a_relu(head):
    """With the canonical orientation these reach 0.57, 0.78 and 0.57."""
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images[:1000], dtype=torch.float32) / 16, torch.tensor(labels[:1000])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
        model = attach_head(network, head())
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        for _ in range(12):
            for batch in torch.randperm(1000).split(50):
                optimizer.zero_grad()
                cross_entropy(model(images[batch], targets=labels[batch]), labels[batch]).backward()
                optimizer.step()
    assert float((model.eval()(images).argmax(1) == labels).float().mean()) > 0.95


@pytest.mark.parametrize(
    ("orientation", "message"),
    [
        ("up", "orientation must be 'canonical', 'random' or a"),
        (torch.zeros(5, 11), r"orientation must be of shape \(5, 12\), got \(5, 11\)"),
        (torch.eye(5, 12), "orientation must be a unit simplex ETF"),
    ],
)
def test_bad_orientation_is_named(orientation, message):
    with pytest.raises(ValueError, match=message):
        FixedETFClassifier(12, 5, orientation=orientation)


def test_fixed_centring_uses_the_batch_in_training_and_the_moving_mean_in_evaluation():
    head = FixedETFClassifier(12, 5, feature_norm=None, momentum=0.25).double()
    first, second = normal(20, 12) + 1, normal(30, 12, seed=1) + 3
    second.requires_grad_()
    head(first)
    logits = head(second)
    assert torch.allclose(logits.mean(0), torch.zeros(5, dtype=torch.float64), atol=1e-12)
    (gradient,) = torch.autograd.grad(logits.sum(1).sum() + logits[:, 0].sum(), second)
    assert torch.allclose(gradient, head.weight[0].expand(30, 12), atol=1e-12)  # the bias carries none
    moving = 0.75 * first.mean(0) + 0.25 * second.mean(0)
    assert torch.allclose(head.bias, -(head.weight @ moving))
    alone, among = head.eval()(second[:1]), head.eval()(second)[:1]
    assert torch.allclose(alone, among)  # logits do not depend on the rest of the test batch


def test_first_and_second_derivatives_of_the_norm_and_at_a_zero_vector():
    norm, features = FeatureNorm(3.0), normal(4, 5, seed=2).requires_grad_()
    assert gradcheck(norm, features)
    assert gradgradcheck(norm, features)
    zero = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(norm(zero), zero, upstream := normal(2, 5))
    assert torch.equal(gradient, 3.0 * upstream)


SCALES = {  # of the features, from the least normal numbers up, short of those whose gradient τ/‖h‖ overflows
    torch.float64: (1e-300, 1e-200, 1e-25, 1.0, 1e25, 1e200, 1e300),
    torch.float32: (1e-36, 1e-30, 1e-25, 1e-20, 1e-14, 1.0, 1e14, 1e18, 1e20, 1e30, 1e37),
    torch.bfloat16: (1e-36, 1e-30, 1e-20, 1.0, 1e20, 1e30, 1e37),
    torch.float16: (1e-3, 1e-1, 1.0, 1e2, 1e4),
}


@pytest.mark.parametrize("project", [FeatureNorm(5.0), torch.compile(FeatureNorm(5.0), backend="aot_eager")])
@pytest.mark.parametrize(("dtype", "scale"), [(dtype, scale) for dtype in SCALES for scale in SCALES[dtype]])
def test_the_norm_is_accurate_for_features_of_any_size(project, dtype, scale):
    """Against h/max|h| in fp64: values to the rounding of the dtype, and the gradient τ/‖h‖ (g − p p·g/τ²)."""
    features = (normal(6, 8, seed=1).clamp(-3, 3) * scale).to(dtype).requires_grad_()
    upstream = normal(6, 8, seed=2).to(dtype)
    projected = project(features)
    projected.backward(upstream)
    exact, gradient = features.detach().double(), upstream.double()
    largest = exact.abs().amax(1, keepdim=True)
    norm = (exact / largest).norm(dim=1, keepdim=True)
    unit = exact / largest / norm
    across = gradient - unit * (unit * gradient).sum(1, keepdim=True)
    tolerance = 8 * torch.finfo(dtype).eps
    assert torch.allclose(projected.double(), 5 * unit, rtol=0, atol=5 * tolerance)
    # Compared as multiples of 1/max|h|, since in fp64 their size itself is out of range.
    assert torch.allclose(features.grad.double() * largest, 5 * across / norm, rtol=0, atol=20 * tolerance)


def test_features_of_all_sizes_in_one_batch_are_projected_row_by_row():
    sizes = torch.tensor([0.0, 1e-30, 1e-10, 1.0, 1e10, 1e30])
    features = sizes.unsqueeze(1) * normal(1, 8, dtype=torch.float32)
    norms = FeatureNorm(3.0)(features).norm(dim=1)
    assert torch.allclose(norms, torch.tensor([0.0, 3, 3, 3, 3, 3]), rtol=1e-6)
    assert torch.allclose(torch.func.vmap(FeatureNorm(3.0))(features), FeatureNorm(3.0)(features), rtol=1e-6)
    bad = torch.tensor([[torch.inf, 1.0], [torch.nan, 1.0], [3.0, 4.0]])
    assert FeatureNorm(5.0)(bad).isfinite().all(dim=1).tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("head", "general", "hidden", "own"),
    [
        (NearestETFClassifier, NearestFrameClassifier, set(), set()),
        (FixedETFClassifier, FixedFrameClassifier, {"code"}, {"seen"}),
    ],
)
def test_the_signature_of_an_etf_head_names_the_options_of_the_general_head(head, general, hidden, own):
    shown, of_general = inspect.signature(head).parameters, inspect.signature(general).parameters
    assert set(shown) - own == set(of_general) - hidden
    assert all(shown[name].default == of_general[name].default for name in set(shown) - own)
