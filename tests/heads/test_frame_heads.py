"""Heads whose weight is a frame of a given code, or of the leading directions of the class means."""

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
    FixedETFClassifier,
    FixedFrameClassifier,
    NearestETFClassifier,
    NearestFrameClassifier,
    nearest_frame,
    simplex_etf,
)
from neuralcollapse.geometry import attribute_gram, code_from_gram, code_of_means
from neuralcollapse.heads import LeadingDirections, Simplex, TrustRegion

GRAM = attribute_gram(torch.cartesian_prod(torch.arange(3), torch.arange(2)), torch.tensor([0.5, 0.5]).double())
CODE = code_from_gram(GRAM, feature_dim=12)  # six classes of two attributes, rank 3
HEADS = {
    "code": lambda **options: NearestFrameClassifier(12, 6, frame=CODE, **options),
    "more classes than dimensions": lambda **options: NearestFrameClassifier(
        12, 20, frame=LeadingDirections(), **options
    ),
    "means": lambda **options: NearestFrameClassifier(12, 6, frame=LeadingDirections(), **options),
    "means of rank 2": lambda **options: NearestFrameClassifier(12, 6, frame=LeadingDirections(2), **options),
}


@pytest.fixture(params=HEADS)
def make(request):
    return HEADS[request.param]


def batch(seed, size=80, num_classes=6, dtype=torch.float64):
    targets = torch.cat([torch.arange(num_classes), torch.randint(num_classes, (size,), generator=generator(seed))])
    return normal(len(targets), 12, seed=seed, dtype=dtype) + 0.5, targets[torch.randperm(len(targets))]


def centred(features, targets):
    return torch.stack([features[targets == k].mean(0) for k in range(6)]) - features.mean(0)


def test_training_logits_are_those_of_the_nearest_frame():
    """Three steps written out: moving means, no anchor in the first and then the last frame, bias −W m."""
    head = NearestFrameClassifier(12, 6, frame=CODE, feature_norm=3.0, momentum=0.4, proximal_weight=0.2).double()
    frame, moving = None, None
    for seed in range(3):
        features, targets = batch(seed)
        on_sphere = 3.0 * features / features.norm(dim=1, keepdim=True)
        means = centred(on_sphere, targets)
        moving = means if moving is None else 0.6 * moving + 0.4 * means
        frame = nearest_frame(moving, CODE, anchor=frame, proximal_weight=0.0 if frame is None else 0.2)
        logits = head(features, targets)
        assert torch.allclose(logits, (on_sphere - on_sphere.mean(0)) @ frame.T, atol=1e-5)  # code and anchor in fp32
        assert torch.allclose((head.weight @ head.weight.T).double(), GRAM, atol=1e-6)


@pytest.mark.parametrize("rank", ["auto", 2, 5])
def test_the_geometry_of_the_means_is_the_code_of_the_moving_means(rank):
    head = NearestFrameClassifier(12, 6, frame=LeadingDirections(rank), proximal_weight=0.0, feature_norm=None).double()
    for seed in range(3):
        features, targets = batch(seed)
        logits = head(features, targets)
        moving = head.class_means.centred_means.double()
        frame = nearest_frame(moving, code_of_means(moving, rank))
        assert torch.allclose(logits, (features - features.mean(0)) @ frame.T, atol=1e-5)
    if rank == 5:
        assert torch.allclose((head.weight @ head.weight.T).double(), simplex_gram(6), atol=1e-6)


def test_the_simplex_geometry_is_the_etf_head():
    heads = NearestFrameClassifier(12, 6), NearestETFClassifier(12, 6)
    for seed in range(3):
        data = batch(seed, dtype=torch.float32)
        assert torch.equal(heads[0](*data), heads[1](*data))
    assert heads[0].state_dict().keys() == heads[1].state_dict().keys()
    heads[0].load_state_dict(heads[1].state_dict())


def test_state_dicts_of_the_etf_heads_keep_their_names():
    """State dicts of earlier versions have these names, and `frame` for `published_point`."""
    means = [f"class_means.{part}.{name}" for part in ("centred", "overall") for name in ("mean", "seen", "batches")]
    assert list(NearestETFClassifier(8, 5).state_dict()) == ["weight", *means]
    assert list(NearestETFClassifier(8, 5, solver=TrustRegion()).state_dict()) == ["weight", "published_point", *means]
    head = NearestETFClassifier(8, 5, solver=TrustRegion())
    saved = head.state_dict()
    saved["frame"] = saved.pop("published_point").flip(0)
    head.load_state_dict(saved)
    assert torch.equal(head.published_point, torch.eye(5, 8).flip(0))
    moving = [f"global_mean.{name}" for name in ("mean", "seen", "batches")]
    assert list(FixedETFClassifier(8, 5).state_dict()) == ["weight", *moving]
    assert set(FixedETFClassifier(8, 5, bias="learned").state_dict()) == {"weight", "learned_bias"}


def test_logits_carry_both_gradients_exactly():
    head = NearestFrameClassifier(12, 6, frame=CODE, feature_norm=4.0, momentum=0.5).double()
    head(*batch(0))
    start = copy.deepcopy(head.state_dict())
    features, targets = batch(1, size=2)

    def logits(features):
        head.load_state_dict(start)
        return head(features, targets)

    assert gradcheck(logits, features.requires_grad_())


def test_a_run_that_is_stopped_and_resumed_gives_the_same_numbers(make):
    count = make().num_classes
    head, data = make(), [batch(seed, num_classes=count, dtype=torch.float32) for seed in range(4)]
    for pair in data[:2]:
        head(*pair)
    resumed = make()
    resumed.load_state_dict(head.state_dict())
    for pair in data[2:]:
        assert torch.equal(head(*pair), resumed(*pair))
    assert torch.equal(head.eval()(data[0][0]), resumed.eval()(data[0][0]))


def test_frozen_and_given_targets(make):
    head = make()
    features, targets = batch(0, num_classes=head.num_classes, dtype=torch.float32)
    with pytest.raises(ValueError, match="targets must be given in training mode"):
        head(features)
    expected = copy.deepcopy(head)(features, targets)
    with head.use_targets(targets):
        assert torch.equal(head(features), expected)
    before = copy.deepcopy(head.state_dict())
    with head.frozen():
        logits = head(features)
    assert all(torch.equal(before[name], value) for name, value in head.state_dict().items())
    assert torch.equal(logits, head.eval()(features))


def test_autocast_and_low_precision_keep_means_code_and_solve_in_fp32(make):
    head = make()
    backbone = nn.Linear(12, 12)
    features, targets = batch(0, num_classes=head.num_classes, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(backbone(features), targets)
    assert logits.dtype == torch.bfloat16
    cross_entropy(logits.float(), targets).backward()
    assert torch.isfinite(backbone.weight.grad).all()
    before = {name: value for name, value in head.named_buffers() if value.is_floating_point()}
    head.to(torch.bfloat16)
    for name, value in head.named_buffers():
        assert name not in before or torch.equal(value, before[name]), name
    logits = head(features.bfloat16(), targets)
    assert logits.dtype == torch.bfloat16
    gram = head.weight @ head.weight.T
    rank = int(torch.linalg.matrix_rank(gram, rtol=1e-4))
    assert head.weight.dtype == torch.float32
    assert torch.linalg.svdvals(head.weight)[rank:].max() < 1e-5 if rank < min(head.weight.shape) else True


@pytest.mark.parametrize("ignore_index", [-100, 6])
def test_ignored_tokens_are_left_out(make, ignore_index):
    if ignore_index == 6 and make().num_classes != 6:
        pytest.skip("6 is a class of this head")
    count = make().num_classes
    features, targets = batch(0, num_classes=count)
    expected, padded = make().double(), make(ignore_index=ignore_index).double()
    tokens = torch.cat([features, torch.full((6, 12), 1e3, dtype=torch.float64)])
    labels = torch.cat([targets, torch.full((6,), ignore_index)])
    logits = padded(tokens, labels)
    assert torch.allclose(logits[: len(targets)], expected(features, targets), atol=1e-6)
    for name, value in expected.state_dict().items():
        assert torch.allclose(padded.state_dict()[name], value), name


def test_with_unseen_classes_or_one_class_alone_the_frame_stays_finite(make):
    head = make().double()
    features, targets = batch(0, num_classes=head.num_classes)
    for labels in (torch.zeros_like(targets), targets % 2, targets % 3, targets):
        features.requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(head(features, labels), labels), features)
        assert torch.isfinite(head.weight).all()
        assert torch.isfinite(gradient).all()
    assert head.weight.norm(dim=1).min() > 1e-3


def test_one_class_in_the_first_batch_keeps_the_first_frame():
    head = NearestFrameClassifier(12, 6, frame=CODE, generator=generator(2)).double()
    first = head.weight.clone()
    assert torch.allclose(first @ first.T, GRAM, atol=1e-6)
    head(batch(0)[0], torch.zeros(86, dtype=torch.int64))
    assert torch.allclose(head.weight, first, atol=1e-6)


def test_two_forwards_can_precede_one_backward(make):
    head = make().double()
    data = [batch(seed, num_classes=head.num_classes) for seed in range(2)]
    features = [pair[0].requires_grad_() for pair in data]
    losses = [cross_entropy(head(*pair), pair[1]) for pair in data]
    for buffer in head.buffers():  # as a broadcast of buffers would
        buffer.zero_()
    together = torch.autograd.grad(sum(losses), features)
    head = make().double()
    for pair, expected in zip(data, together, strict=True):
        (alone,) = torch.autograd.grad(cross_entropy(head(*pair), pair[1]), pair[0])
        assert torch.allclose(alone, expected, atol=1e-12)


def test_labels_do_not_reach_the_logits_of_evaluation(make):
    head = make().eval()
    features, targets = batch(0, num_classes=head.num_classes, dtype=torch.float32)
    assert torch.equal(head(features, targets), head(features, targets.flip(0)))


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize(
    "options", [pytest.param({"frame": CODE}, marks=pytest.mark.slow), {"frame": LeadingDirections(2)}]
)
def test_the_whole_training_forward_compiles_into_one_graph(options):
    def model():
        torch.manual_seed(0)
        return nn.ModuleList([nn.Linear(12, 12), NearestFrameClassifier(12, 6, **options)])

    def step(parts, features, targets):
        return cross_entropy(parts[1](parts[0](features), targets), targets)

    torch._dynamo.reset()
    eager, compiled = model(), model()
    run = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        data = batch(seed, dtype=torch.float32)
        losses = step(eager, *data), run(compiled, *data)
        assert torch.allclose(*losses, atol=1e-5)
        for loss in losses:
            loss.backward()
    assert torch.allclose(eager[0].weight.grad, compiled[0].weight.grad, atol=1e-4)
    assert torch.allclose(eager[1].weight, compiled[1].weight, atol=1e-5)


@pytest.mark.parametrize("options", [{"orientation": "canonical"}, {}, {"generator": generator(3)}])
def test_the_fixed_frame_has_the_gram_of_its_code(options):
    head = FixedFrameClassifier(12, 6, CODE.float() + 2, **options)
    assert torch.allclose((head.weight @ head.weight.T).double(), GRAM, atol=1e-5)
    assert bool((head.weight[:, 3:] == 0).all()) == ("orientation" in options)
    assert "weight" not in dict(head.named_parameters())


def test_attached_and_made_plain_it_decides_the_same():
    head = NearestFrameClassifier(12, 6, frame=CODE)
    for seed in range(2):
        head(*batch(seed, dtype=torch.float32))
    features, _ = batch(7, dtype=torch.float32)
    assert torch.allclose(head.to_inference()(features), head.eval()(features), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NearestFrameClassifier(4, 9), "feature_dim must be at least num_classes - 1 = 8, got 4"),
        (
            lambda: NearestFrameClassifier(8, 5, frame="etf"),
            r"frame must be Simplex\(\), .* or a code \(K, r\), got 'etf'",
        ),
        (
            lambda: NearestFrameClassifier(8, 5, frame=None),
            r"frame must be Simplex\(\), LeadingDirections\(\) or a code",
        ),
        (lambda: NearestFrameClassifier(8, 5, frame=Simplex), r"frame must be Simplex\(\), LeadingDirections\(\) or a"),
        (
            lambda: NearestETFClassifier(8, 6, frame=CODE),
            r"frame must be Simplex\(\) for NearestETFClassifier, got .*: use NearestFrameClassifier for other frames",
        ),
        (
            lambda: NearestFrameClassifier(8, 5, frame=CODE),
            r"code must be of shape \(K, r\) with K = 5, got \(6, 3\)",
        ),
        (lambda: NearestFrameClassifier(2, 6, frame=CODE), "a rank of at most feature_dim = 2, got 3"),
        (lambda: NearestFrameClassifier(8, 6, frame=CODE, solver=TrustRegion()), r"solver must be ClosedForm\(\) with"),
        (
            lambda: NearestFrameClassifier(8, 5, frame=LeadingDirections(5)),
            "rank must be 'auto' or an integer from 1 to",
        ),
        (lambda: NearestFrameClassifier(8, 5, bias="learned"), "bias must be"),
        (lambda: FixedFrameClassifier(8, 5, CODE), r"code must be of shape \(K, r\) with K = 5"),
        (lambda: FixedFrameClassifier(2, 6, CODE), "a rank of at most feature_dim = 2, got 3"),
        (lambda: FixedFrameClassifier(8, 6, "simplex"), "code must be a floating-point tensor, got str"),
        (lambda: FixedFrameClassifier(8, 6, CODE, bias="center"), "bias must be"),
        (lambda: FixedFrameClassifier(8, 6, CODE, generator=3), "generator must be a torch.Generator, got int"),
        (lambda: FixedFrameClassifier(8, 4, simplex_etf(4)[:, :0]), "code must"),
    ],
)
def test_options_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
