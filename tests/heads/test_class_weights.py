"""Heads with class weights: their weight is the solution of the weighted problem, as `geometry` solves it."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.functional import normalize

from helpers import generator, normal
from neuralcollapse import (
    ClassMeanClassifier,
    NearestETFClassifier,
    NearestFrameClassifier,
    nearest_frame,
    nearest_simplex_etf,
)
from neuralcollapse.heads import LeadingDirections, Simplex, TrustRegion

CODE = normal(5, 3, seed=4)
WEIGHTS = torch.tensor([0.2, 1.0, 1.0, 3.0, 5.0], dtype=torch.float64)
HEADS = {
    "etf": lambda **options: NearestETFClassifier(12, 5, **options),
    "simplex": lambda **options: NearestFrameClassifier(12, 5, **options),
    "code": lambda **options: NearestFrameClassifier(12, 5, frame=CODE, **options),
    "means": lambda **options: NearestFrameClassifier(12, 5, frame=LeadingDirections(2), **options),
    "class means": lambda **options: ClassMeanClassifier(12, 5, means="current", **options),
    "previous class means": lambda **options: ClassMeanClassifier(12, 5, **options),
    "differentiable class means": lambda **options: ClassMeanClassifier(12, 5, means="differentiable", **options),
}


def batch(seed, size=40):
    return normal(size, 12, seed=seed) + 0.5, torch.randint(5, (size,), generator=generator(seed))


def moving_means(seeds, momentum=0.4):
    moving = None
    for seed in seeds:
        features, targets = batch(seed)
        means = torch.stack([features[targets == k].mean(0) for k in range(5)]) - features.mean(0)
        moving = means if moving is None else (1 - momentum) * moving + momentum * means
        yield moving


@pytest.mark.parametrize("frame", [Simplex(), CODE], ids=["simplex", "code"])
def test_the_frame_is_the_nearest_in_the_weighted_distance(frame):
    options = {"feature_norm": None, "momentum": 0.4, "proximal_weight": 0.2, "class_weights": WEIGHTS}
    heads = [NearestFrameClassifier(12, 5, frame=frame, **options).double()]
    simplex = isinstance(frame, Simplex)
    if simplex:
        heads.append(NearestETFClassifier(12, 5, **options).double())
    expected = None
    for seed, means in enumerate(moving_means(range(3))):
        anchored = {} if expected is None else {"anchor": expected, "proximal_weight": 0.2}
        solve = nearest_simplex_etf if simplex else lambda m, **o: nearest_frame(m, CODE, **o)
        expected = solve(means, class_weights=WEIGHTS, **anchored)
        for head in heads:
            head(*batch(seed))
            assert torch.allclose(head.weight, expected, atol=1e-6)  # the code and the first frame are kept in fp32
    plain = nearest_simplex_etf(means) if simplex else nearest_frame(means, CODE)
    assert not torch.allclose(expected - expected.mean(0), plain - plain.mean(0), atol=1e-2)


def test_class_means_are_centred_at_their_weighted_mean():
    current = ClassMeanClassifier(
        12, 5, means="current", feature_norm=None, momentum=0.4, class_weights=WEIGHTS
    ).double()
    previous = ClassMeanClassifier(12, 5, feature_norm=None, momentum=0.4, class_weights=WEIGHTS).double()
    shares, last, overall = WEIGHTS / WEIGHTS.sum(), None, None
    for seed, means in enumerate(moving_means(range(3))):
        features, targets = batch(seed)
        overall = features.mean(0) if overall is None else 0.6 * overall + 0.4 * features.mean(0)
        centre = shares @ means
        rows = normalize(means - centre)
        logits = (features - features.mean(0) - centre) @ rows.T
        assert torch.allclose(current(features, targets), logits, atol=1e-10)
        found = previous(features, targets)
        if last is not None:  # decided by what was known before the batch, of which it needs no label
            assert torch.allclose(found, (features - features.mean(0) - last[1]) @ last[0].T, atol=1e-10)
        last = rows, centre
        inputs = batch(9)[0]
        for head in (current, previous):
            assert torch.allclose(head.weight, rows, atol=1e-12)
            with head.frozen():
                assert torch.allclose(head(inputs), (inputs - overall - centre) @ rows.T, atol=1e-10)


def test_classes_not_seen_do_not_move_the_centre():
    head = ClassMeanClassifier(12, 5, means="current", feature_norm=None, class_weights=WEIGHTS).double()
    start = head.weight.clone()
    features, targets = batch(0)
    head(features, targets % 3)
    means = torch.stack([features[targets % 3 == k].mean(0) for k in range(3)])
    centre = (WEIGHTS[:3] @ means) / WEIGHTS[:3].sum()
    assert torch.allclose(head.weight[:3], normalize(means - centre), atol=1e-12)
    assert torch.equal(head.weight[3:], start[3:])


@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
def test_a_common_factor_changes_nothing_and_equal_weights_little(make):
    heads = [make(class_weights=weights).double() for weights in (WEIGHTS, 7 * WEIGHTS.float())]
    for seed in range(3):
        logits = [head(*batch(seed)) for head in heads]
        assert torch.allclose(*logits, atol=1e-5)
    if not isinstance(heads[0], ClassMeanClassifier):  # whose centre is otherwise the mean of the samples
        heads = [make(class_weights=weights).double() for weights in (None, torch.full((5,), 3.0))]
        for seed in range(3):
            logits = [head(*batch(seed)) for head in heads]
            assert torch.allclose(*logits, atol=1e-5)


@pytest.mark.parametrize("name", ["etf", "code", "means", "differentiable class means"])
def test_gradients_are_exact(name):
    head = HEADS[name](class_weights=WEIGHTS, momentum=0.5).double()
    head(*batch(0))
    start = {key: value.clone() for key, value in head.state_dict().items()}
    features, targets = batch(1, size=8)

    def logits(features):
        head.load_state_dict(start)
        return head(features, targets)

    if name == "means":  # whose code is a constant of the step, by definition
        assert torch.autograd.grad(logits(features.requires_grad_()).sum(), features)[0].isfinite().all()
    else:
        assert gradcheck(logits, features.requires_grad_())


@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
def test_class_weights_are_kept_in_full_precision_and_saved(make):
    head = make(class_weights=WEIGHTS).to(torch.bfloat16)
    assert torch.allclose(head.class_weights.double(), WEIGHTS)
    assert head.class_weights.dtype in (torch.float32, torch.float64)
    assert "class_weights" in head.state_dict()
    assert "class_weights" not in make().state_dict()


@pytest.mark.parametrize(
    "name", [name if name == "etf" else pytest.param(name, marks=pytest.mark.slow) for name in HEADS]
)
def test_a_head_with_class_weights_compiles_into_one_graph(name):
    heads = [HEADS[name](class_weights=WEIGHTS).double() for _ in range(2)]
    compiled = torch.compile(heads[0], fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(*batch(0)), heads[1](*batch(0)), atol=1e-10)


@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0] * 5, "class_weights must be a floating-point tensor, got list"),
        (torch.ones(5, dtype=torch.int64), "class_weights must be a floating-point tensor, got torch.int64"),
        (torch.ones(4), r"class_weights must be of shape \(5,\), got \(4,\)"),
        (torch.ones(5, 1), r"class_weights must be of shape \(5,\), got \(5, 1\)"),
        (torch.tensor([1.0, -1, 1, 1, 1]), "class_weights must be at least 0 with a positive sum"),
        (torch.zeros(5), "class_weights must be at least 0 with a positive sum"),
        (torch.tensor([1.0, torch.nan, 1, 1, 1]), "class_weights must be finite"),
        (torch.ones(5, requires_grad=True), "class_weights must not require a gradient"),
    ],
)
def test_invalid_class_weights_are_refused(make, weights, message):
    with pytest.raises(ValueError, match=message):
        make(class_weights=weights)


def test_the_published_problem_has_no_class_weights():
    with pytest.raises(ValueError, match="class_weights must be None with solver=TrustRegion\\(\\)"):
        NearestETFClassifier(12, 5, solver=TrustRegion(), class_weights=WEIGHTS)
