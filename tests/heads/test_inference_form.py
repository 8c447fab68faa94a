"""The inference form: callable in any precision, traced, scripted and exported."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from helpers import normal
from neuralcollapse import (
    ClassMeanClassifier,
    FixedETFClassifier,
    FixedFrameClassifier,
    LearnedClassifier,
    NearestETFClassifier,
    NearestFrameClassifier,
    attach_head,
)
from neuralcollapse.heads import FeatureNorm, LeadingDirections, TrustRegion

CODE = normal(4, 3, seed=4)
HEADS = {
    "learned": lambda **options: LearnedClassifier(16, 4, **options),
    "unit rows": lambda **options: LearnedClassifier(16, 4, unit_weight=True, **options),
    "fixed": lambda **options: FixedETFClassifier(16, 4, orientation="canonical", **options),
    "fixed frame": lambda **options: FixedFrameClassifier(16, 4, CODE, **options),
    "nearest": lambda **options: NearestETFClassifier(16, 4, **options),
    "as published": lambda **options: NearestETFClassifier(16, 4, solver=TrustRegion(), **options),
    "nearest frame of a code": lambda **options: NearestFrameClassifier(16, 4, frame=CODE, **options),
    "nearest frame of the means": lambda **options: NearestFrameClassifier(16, 4, frame=LeadingDirections(), **options),
    "class means": lambda **options: ClassMeanClassifier(16, 4, **options),
}
TARGETS = torch.arange(32) % 4
DTYPES = [torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=HEADS)
def make(request):
    return HEADS[request.param]


@pytest.fixture
def default_dtype(request) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def inputs(dtype):
    return normal(32, 8, seed=1, dtype=dtype)


def decides_alike(model, dtype):
    """Return whether the inference form gives the same logits in the same dtype."""
    model.eval()
    expected = model(inputs(dtype))
    plain = model.to_inference()
    found = plain(inputs(dtype))
    return found.dtype == expected.dtype == dtype and torch.equal(found, expected)


@pytest.mark.parametrize("default_dtype", DTYPES, indirect=True, ids=str)
@pytest.mark.parametrize(("train", "feature_norm"), itertools.product([True, False], ["auto", None]))
def test_the_inference_form_is_callable_under_any_default_dtype(make, default_dtype, train, feature_norm):
    model = attach_head(network(), make(feature_norm=feature_norm))
    if train:
        model(inputs(default_dtype), targets=TARGETS).float().sum().backward()
    plain = model.head.to_inference()
    assert {parameter.dtype for parameter in plain.parameters()} == {default_dtype}
    assert decides_alike(model, default_dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cast", ["before attaching", "after attaching", "after training", "after to_inference"])
def test_the_inference_form_is_callable_however_the_model_was_cast(make, dtype, cast):
    model, head = network(), make()
    if cast == "before attaching":
        model.to(dtype)
    model = attach_head(model, head)
    if cast == "after attaching":
        model.to(dtype)
    first = dtype if cast in ("before attaching", "after attaching") else torch.float32
    model(inputs(first), targets=TARGETS)
    if cast == "after training":
        model.to(dtype)
    if cast != "after to_inference":
        assert decides_alike(model, dtype)
        return
    expected = model.eval()(inputs(torch.float32))
    found = model.to_inference().to(dtype)(inputs(dtype))
    assert found.dtype == dtype
    assert torch.allclose(found.float(), expected, atol=0.2 if dtype == torch.bfloat16 else 0.03)


def test_autocast_does_not_change_the_dtype_of_the_inference_form(make):
    model = attach_head(network(), make())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(inputs(torch.float32), targets=TARGETS)
    assert decides_alike(model, torch.float32)


def test_means_and_frames_have_the_default_dtype_where_it_is_higher():
    torch.set_default_dtype(torch.float64)
    try:
        head = NearestETFClassifier(16, 4)
    finally:
        torch.set_default_dtype(torch.float32)
    head(normal(32, 16), TARGETS)
    assert head.weight.dtype == head.class_means.centred_means.dtype == torch.float64
    assert (head.weight.norm(dim=1) - 1).abs().max() < 1e-13


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("feature_norm", ["auto", 3, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_inference_form_traces_scripts_and_exports(make, feature_norm, dtype):
    model = attach_head(network(), make(feature_norm=feature_norm)).to(dtype)
    model(inputs(dtype), targets=TARGETS)
    plain = model.eval().to_inference()
    expected = plain(inputs(dtype))
    forms = {
        "trace": lambda: torch.jit.trace(plain, inputs(dtype)[:3]),
        "trace without gradients": lambda: torch.no_grad()(torch.jit.trace)(plain, inputs(dtype)[:3]),
        "script": lambda: torch.jit.script(plain),
        "script of the trace": lambda: torch.jit.script(torch.jit.trace(plain, inputs(dtype)[:3])),
        "frozen": lambda: torch.jit.freeze(torch.jit.script(plain)),
        "export": lambda: torch.export.export(plain, (inputs(dtype),)).module(),
    }
    for name, make_form in forms.items():
        assert torch.equal(make_form()(inputs(dtype)), expected), name


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_norm_is_the_norm_and_differentiates_alike():
    norm = FeatureNorm(5.0)
    scripted, traced = torch.jit.script(norm), torch.jit.trace(norm, normal(2, 6))
    for scale in (0.0, 1e-200, 1.0, 1e200):
        gradients = []
        for form in (norm, scripted, traced):
            features = (scale * normal(3, 6)).requires_grad_()
            form(features).mul(normal(3, 6, seed=2)).sum().backward()
            gradients.append(features.grad)
        assert torch.allclose(gradients[1], gradients[0], rtol=1e-12)
        assert torch.allclose(gradients[2], gradients[0], rtol=1e-12)
