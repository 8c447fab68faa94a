"""Batches that are not finite: they change no mean, counter or frame, and their logits are not finite."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from helpers import normal
from neuralcollapse import (
    ClassMeanClassifier,
    ClassMeans,
    FixedETFClassifier,
    FixedFrameClassifier,
    NearestETFClassifier,
    NearestFrameClassifier,
)
from neuralcollapse.heads import ClosedForm, LeadingDirections, TrustRegion

CODE = normal(5, 3, seed=4, dtype=torch.float32)
HEADS = {
    "nearest": lambda **options: NearestETFClassifier(12, 5, **options),
    "nearest, no anchor": lambda **options: NearestETFClassifier(12, 5, proximal_weight=0.0, **options),
    "nearest, by products": lambda **options: NearestETFClassifier(12, 5, solver=ClosedForm("products"), **options),
    "nearest, cumulative": lambda **options: NearestETFClassifier(12, 5, momentum="cumulative", **options),
    "nearest, published momentum": lambda **options: NearestETFClassifier(12, 5, momentum="published", **options),
    "as published": lambda **options: NearestETFClassifier(12, 5, solver=TrustRegion(), **options),
    "frame of a code": lambda **options: NearestFrameClassifier(12, 5, frame=CODE, **options),
    "frame of the means": lambda **options: NearestFrameClassifier(12, 5, frame=LeadingDirections(), **options),
    "previous means": lambda **options: ClassMeanClassifier(12, 5, **options),
    "differentiable means": lambda **options: ClassMeanClassifier(12, 5, means="differentiable", **options),
    "fixed": lambda **options: FixedETFClassifier(12, 5, **options),
    "fixed frame": lambda **options: FixedFrameClassifier(12, 5, CODE, **options),
}
TARGETS = torch.arange(20) % 5


def batch(seed, bad=None, dtype=torch.float32):
    features = normal(20, 12, seed=seed, dtype=dtype)
    if bad is not None:
        features[3, 5] = bad
    return features


def state(head):
    return copy.deepcopy(dict(head.named_buffers()))


def unchanged(head, before):
    return all(torch.equal(before[name], value) for name, value in head.named_buffers())


@pytest.fixture(params=HEADS)
def make(request):
    return HEADS[request.param]


@pytest.mark.parametrize("feature_norm", [None, "auto"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_nonfinite_batch_is_refused_on_a_cpu_in_full_precision(make, bad, first, feature_norm):
    head = make(feature_norm=feature_norm)
    if not first:
        head(batch(0), TARGETS)
    before = state(head)
    with pytest.raises(ValueError, match="features must be finite"):
        head(batch(1, bad), TARGETS)
    assert unchanged(head, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_nonfinite_batch_is_skipped_in_half_precision(make, bad, first, dtype):
    head = make()
    if not first:
        head(batch(0, dtype=dtype), TARGETS)
    before = state(head)
    features = batch(1, bad, dtype).requires_grad_()
    logits = head(features, TARGETS)
    cross_entropy(logits.float(), TARGETS).backward()
    assert not logits.isfinite().all()
    assert not features.grad.isfinite().all()  # what a GradScaler looks at
    assert unchanged(head, before)
    expected = copy.deepcopy(head)
    assert torch.equal(head(batch(2, dtype=dtype), TARGETS), expected(batch(2, dtype=dtype), TARGETS))
    assert head.eval()(batch(3, dtype=dtype)).isfinite().all()


def test_a_nonfinite_batch_is_skipped_under_autocast(make):
    head = make()
    before = state(head)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        head(batch(0, torch.inf), TARGETS)
    assert unchanged(head, before)


def test_a_scaler_skips_the_step_and_training_continues(make):
    """The whole loop under fp16: one batch overflows, and everything ends as if it had not been there."""

    def run(steps):
        torch.manual_seed(0)
        body, head = nn.Linear(12, 12), make()
        optimizer, scaler = torch.optim.SGD(body.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=16.0)
        for seed in steps:
            with torch.autocast("cpu", dtype=torch.float16):
                loss = cross_entropy(head(body(batch(abs(seed)) * (1e5 if seed < 0 else 1)), TARGETS).float(), TARGETS)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return body, head, scaler

    body, head, scaler = run([1, 2, -3, 4])
    expected_body, expected_head, _ = run([1, 2, 4])
    assert scaler.get_scale() == 8.0  # it has seen the overflow
    assert torch.allclose(body.weight, expected_body.weight, atol=1e-5)  # the scale differs by a power of two
    for name, value in expected_head.named_buffers():
        assert torch.allclose(dict(head.named_buffers())[name], value, atol=1e-4), name


@pytest.mark.parametrize(
    "name",
    [
        "nearest",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("frame of a code", "previous means", "fixed")),
    ],
)
def test_a_compiled_head_skips_a_batch_that_is_not_finite(name):
    head = HEADS[name]()
    expected, compiled = copy.deepcopy(head), torch.compile(head, fullgraph=True, backend="aot_eager")
    for seed, bad in [(0, None), (1, torch.nan), (2, torch.inf), (3, None)]:
        logits = compiled(batch(seed, bad), TARGETS)
        assert bool(logits.isfinite().all()) is (bad is None)
        if bad is None:
            expected(batch(seed), TARGETS)
    for key, value in expected.named_buffers():
        assert torch.allclose(dict(head.named_buffers())[key], value, atol=1e-5), key


def test_sums_that_overflow_are_refused(make):
    head = make(feature_norm=None)
    head(batch(0), TARGETS)
    before = state(head)
    with pytest.raises(ValueError, match="must be .*small enough"):
        head(torch.full((20, 12), 1e38), TARGETS)
    assert unchanged(head, before)


def test_ignored_features_may_be_nan(make):
    head, expected = make(ignore_index=-100), make(ignore_index=-100)
    targets = TARGETS.clone()
    targets[3] = -100
    head(batch(0, torch.nan), targets)
    expected(batch(0), targets)
    assert unchanged(head, state(expected))


def test_class_means_alone_refuse_or_skip():
    means = ClassMeans(5, 12)
    means(batch(0), TARGETS)
    before = state(means)
    with pytest.raises(ValueError, match="features must be finite"):
        means(batch(1, torch.nan), TARGETS)
    centred, batch_mean = means(batch(1, torch.nan).bfloat16(), TARGETS)
    assert unchanged(means, before)
    assert torch.equal(centred, means.centred_means)
    assert batch_mean.isnan().any()
