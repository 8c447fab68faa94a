"""Losses on the sphere against a double loop, their limits, and two processes against one."""

from __future__ import annotations

import math
import warnings
from functools import partial

import pytest
import torch
from torch import distributed, multiprocessing

from helpers import generator, normal
from neuralcollapse import ClassMeanClassifier, NearestETFClassifier, losses, simplex_etf

MARGINS = (0.0, 0.7, 3.0, math.inf)
LOSSES = {
    "normface": losses.normface,
    "ntce": losses.ntce,
    **{f"nonl {m}": partial(losses.nonl, margin=m) for m in MARGINS},
    **{f"bidirectional {m}": partial(losses.bidirectional_nonl, margin=m) for m in MARGINS},
    **{f"decoupled {m}": partial(losses.decoupled_cross_entropy, margin=m) for m in MARGINS},
    **{f"two-way {m}": partial(losses.two_way, margin=m) for m in MARGINS},
}


def batch(size=23, num_classes=5, feature_dim=7, seed=0):
    features = 2 * normal(size, feature_dim, seed=seed) + 0.2
    targets = torch.randint(num_classes, (size,), generator=generator(seed))
    return features, targets, 3 * normal(num_classes, feature_dim, seed=seed + 100)


def double_loop(name, features, targets, weight, temperature):
    """Compute a loss by its formula, sample by sample, in Python's floating point."""
    samples, vectors = features.tolist(), weight.tolist()

    def score(i, k):
        dot = sum(a * b for a, b in zip(samples[i], vectors[k], strict=True))
        return dot / (math.hypot(*samples[i]) * math.hypot(*vectors[k])) / temperature

    kind, _, margin = name.partition(" ")
    margin = float(margin or 0)
    labels, indices = targets.tolist(), range(len(samples))
    total = 0.0
    for i, y in enumerate(labels):
        own = score(i, y)
        positive = math.exp(own - margin) if margin < math.inf else 0.0
        other_classes = sum(math.exp(score(i, k)) for k in range(len(vectors)) if k != y)
        other_samples = sum(math.exp(score(j, y)) for j in indices if labels[j] != y)
        rows, columns = positive + other_classes, positive + other_samples
        every_sample = sum(math.exp(score(j, y)) for j in indices)
        total += {
            "normface": math.log(rows),
            "decoupled": math.log(rows),
            "nonl": math.log(columns),
            "bidirectional": math.log(positive + other_classes + other_samples),
            "two-way": 0.5 * math.log(rows) + 0.5 * math.log(columns),
            "ntce": math.log(every_sample),
        }[kind] - own
    return total / len(labels)


@pytest.mark.parametrize("temperature", [0.1, 1.3])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_double_loop(name, temperature):
    features, targets, weight = batch()
    found = LOSSES[name](features, targets, weight, temperature=temperature)
    assert abs(float(found) - double_loop(name, features, targets, weight, temperature)) < 1e-9


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name):
    features, targets, weight = batch(9, 3, 4)
    inputs = (features.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, w: LOSSES[name](x, targets, w, temperature=0.4), inputs)


def test_a_margin_interpolates_between_cross_entropy_and_the_positive_left_out():
    features, targets, weight = batch()
    unit = [torch.nn.functional.normalize(tensor) for tensor in (features, weight)]
    scores = unit[0] @ unit[1].T / 0.1
    plain = torch.nn.functional.cross_entropy(scores, targets)
    assert (losses.normface(features, targets, weight) - plain).abs() < 1e-12
    assert (losses.decoupled_cross_entropy(features, targets, weight, margin=0) - plain).abs() < 1e-12
    cosface = torch.nn.functional.cross_entropy(scores - 3 * torch.nn.functional.one_hot(targets, 5), targets)
    found = losses.decoupled_cross_entropy(features, targets, weight, margin=3.0)
    assert (found - (cosface - 3.0)).abs() < 1e-12
    for loss in (losses.decoupled_cross_entropy, losses.nonl, losses.two_way):
        values = [float(loss(features, targets, weight, margin=m)) for m in (0.0, 1.0, 5.0, 60.0, math.inf)]
        assert values == sorted(values, reverse=True)
        assert values[-2] - values[-1] < 1e-15 * abs(values[-1]) + 1e-12


def test_the_floor_of_ntce_is_the_logarithm_of_the_samples_of_a_class():
    etf, each = simplex_etf(6, dtype=torch.float64), 16
    collapsed = losses.ntce(etf.repeat(each, 1), torch.arange(6).repeat(each), etf, temperature=0.02)
    assert abs(float(collapsed) - math.log(each)) < 1e-12
    for seed in range(5):
        features, _, weight = batch(6 * each, 6, seed=seed)
        assert losses.ntce(features, torch.arange(6).repeat(each), weight, temperature=0.02) > math.log(each)


@pytest.mark.parametrize("name", LOSSES)
def test_norms_do_not_matter_from_1e_30_to_1e30(name):
    features, targets, weight = batch()
    expected = LOSSES[name](features, targets, weight)
    for scale in (1e-30, 1e-20, 1e20, 1e30):
        inputs = (features * scale).float().requires_grad_(), targets, (weight / scale).float()
        found = LOSSES[name](*inputs)
        assert found.item() == pytest.approx(float(expected), rel=1e-4)
        (gradient,) = torch.autograd.grad(found, inputs[0])
        assert float(gradient.double().norm() * scale) > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_small_temperatures_and_bad_scales_stay_finite(name):
    features, targets, weight = batch()
    features[0] = 0
    scaled = (features.float() * 1e15).requires_grad_()
    loss = LOSSES[name](scaled, targets, weight.float() * 1e-15, temperature=0.001)
    loss.backward()
    assert loss.isfinite()
    assert scaled.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_samples_do_not_count(name):
    features, targets, weight = batch()
    kept = torch.arange(len(targets)) % 4 != 0
    features.requires_grad_()
    expected = LOSSES[name](features[kept], targets[kept], weight)
    tokens, labels = features.reshape(1, 23, 7), targets.where(kept, -100).reshape(1, 23)
    found = LOSSES[name](tokens, labels, weight, ignore_index=-100)
    assert (found - expected).abs() < 1e-12
    (gradient,) = torch.autograd.grad(found, features)
    assert gradient[~kept].abs().max() == 0
    (of_kept,) = torch.autograd.grad(expected, features)
    assert (gradient - of_kept).abs().max() < 1e-12
    assert LOSSES[name](features, torch.full_like(targets, -100), weight, ignore_index=-100) == 0


@pytest.mark.parametrize("loss", [losses.nonl, losses.two_way])
def test_a_batch_of_one_class_leaves_the_term_out_and_says_so(loss):
    features, _, weight = batch()
    targets = torch.full((23,), 2)
    features.requires_grad_()
    with pytest.warns(UserWarning, match="the batch has no samples of other classes"):
        value = loss(features, targets, weight)
    own = (torch.nn.functional.normalize(features) @ torch.nn.functional.normalize(weight[2], dim=0)).mean() / 0.1
    rows = losses.decoupled_cross_entropy(features, targets, weight) if loss is losses.two_way else -own
    assert (value - 0.5 * (rows - own)).abs() < 1e-12
    (gradient,) = torch.autograd.grad(value, features)
    assert gradient.isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (losses.nonl(features, targets, weight, margin=2.0) + 2.0).abs() < 1e-12  # log e^{s−m} − s


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_low_precision_is_computed_in_fp32(name, dtype):
    features, targets, weight = batch()
    low, weight = features.to(dtype), weight.float()
    expected = LOSSES[name](low.float(), targets, weight)
    assert torch.equal(LOSSES[name](low, targets, weight), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(LOSSES[name](low, targets, weight), expected)
    assert expected.dtype == torch.float32


def test_a_bidirectional_batch_of_one_class_has_the_other_class_vectors():
    features, _, weight = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = losses.bidirectional_nonl(features, torch.full((23,), 2), weight)
    rows = losses.decoupled_cross_entropy(features, torch.full((23,), 2), weight)
    assert (found - rows).abs() < 1e-12


# --- dot regression ------------------------------------------------------------------------------------------------


def dot_regression_by_hand(features, targets, weight, class_lengths=None):
    total = 0.0
    for h, y in zip(features.tolist(), targets.tolist(), strict=True):
        w = weight[y].tolist()
        if class_lengths is not None:
            w = [float(class_lengths[y]) * value / math.hypot(*w) for value in w]
        lengths = math.hypot(*h) * math.hypot(*w)
        total += (sum(a * b for a, b in zip(h, w, strict=True)) - lengths) ** 2 / (2 * lengths)
    return total / len(targets)


@pytest.mark.parametrize("class_lengths", [None, torch.tensor([0.3, 1.0, 2.0, 5.0, 0.1])])
def test_dot_regression_is_its_formula(class_lengths):
    features, targets, weight = batch()
    expected = dot_regression_by_hand(features, targets, weight, class_lengths)
    assert float(losses.dot_regression(features, targets, weight, class_lengths)) == pytest.approx(expected, rel=1e-7)
    tokens, labels = features.float().reshape(1, 23, 7), targets.where(targets != 3, -100).reshape(1, 23)
    found = losses.dot_regression(tokens, labels, weight.float(), class_lengths, ignore_index=-100)
    kept = targets != 3
    assert found.item() == pytest.approx(
        dot_regression_by_hand(features[kept], targets[kept], weight, class_lengths), rel=1e-5
    )


@pytest.mark.parametrize("radius", [1e-3, 1.0, 6.1, 20.0])
@pytest.mark.parametrize("length", [0.2, 1.0, 7.0])
def test_dot_regression_is_least_at_cosine_1_for_any_norms(radius, length):
    _, targets, weight = batch()
    rows = length * torch.nn.functional.normalize(weight)
    optimum = (radius * torch.nn.functional.normalize(weight[targets])).requires_grad_()
    least = losses.dot_regression(optimum, targets, rows)
    assert abs(float(least.detach())) < 1e-12
    (gradient,) = torch.autograd.grad(least, optimum)
    assert float(gradient.abs().max()) < 1e-12
    away = radius * torch.nn.functional.normalize(optimum.detach() + 0.1 * radius * normal(23, 7, seed=3))
    cosines = (away * rows[targets]).sum(1) / (radius * length)
    found = losses.dot_regression(away, targets, rows)
    assert float(found) == pytest.approx(float((0.5 * radius * length * (1 - cosines) ** 2).mean()), rel=1e-9)


def test_the_gradient_of_dot_regression_pulls_by_one_less_the_cosine_whatever_the_norm():
    features, targets, weight = batch()
    features.requires_grad_()
    (gradient,) = torch.autograd.grad(losses.dot_regression(features, targets, weight), features)
    cosines = torch.nn.functional.cosine_similarity(features, weight[targets])
    assert torch.allclose(gradient, -(1 - cosines)[:, None] * weight[targets] / 23, atol=1e-12)
    dead = torch.zeros(2, 7).requires_grad_()
    (pull,) = torch.autograd.grad(losses.dot_regression(dead, targets[:2], weight.float()), dead)
    assert torch.allclose(pull, -weight[targets[:2]].float() / 2, rtol=1e-4)


def test_the_gradients_of_dot_regression_are_those_of_finite_differences_on_the_sphere():
    features, targets, weight = batch(9, 3, 4)
    lengths = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    inputs = (features.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda x, w: losses.dot_regression(4 * torch.nn.functional.normalize(x), targets, w, lengths), inputs
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dot_regression_of_low_precision_is_computed_in_fp32(dtype):
    features, targets, weight = batch()
    low = features.to(dtype)
    expected = losses.dot_regression(low.float(), targets, weight.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(losses.dot_regression(low, targets, weight.float()), expected)


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_dot_regression_of_tiny_and_huge_features(scale):
    features, targets, weight = batch()
    found = losses.dot_regression((scale * features).float(), targets, weight.float())
    assert found.item() == pytest.approx(scale * dot_regression_by_hand(features, targets, weight), rel=1e-4)


@pytest.mark.parametrize(
    ("class_lengths", "message"),
    [
        (torch.ones(4), r"class_lengths must be of shape \(5,\), got \(4,\)"),
        (torch.ones(5).long(), "class_lengths must be a floating-point tensor"),
        (torch.tensor([1.0, 1, 0, 1, 1]), "class_lengths must be positive, got 0.0"),
        (torch.tensor([1.0, 1, math.nan, 1, 1]), "class_lengths must be finite"),
        ([1.0] * 5, "class_lengths must be a floating-point tensor, got list"),
    ],
)
def test_bad_class_lengths_are_rejected(class_lengths, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        losses.dot_regression(*batch(), class_lengths)


def test_every_gradient_path_of_a_head_is_kept():
    """The gradient of a loss of the outputs of `prepare` also flows through the solved ETF."""
    features, targets, _ = batch(12, 4, 6)
    gradients = []
    for implicit in (True, False):
        head = NearestETFClassifier(6, 4, momentum=1.0, bias="none", implicit_gradient=implicit).double()
        inputs = features.clone().requires_grad_()
        prepared, weight, _ = head.prepare(inputs, targets)
        gradients.append(torch.autograd.grad(losses.two_way(prepared, targets, weight), inputs)[0])
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature must be a positive number, got 0"),
        ({"temperature": math.nan}, "temperature must be a positive number, got nan"),
        ({"margin": -1.0}, "margin must be at least 0 .math.inf included., got -1.0"),
        ({"margin": math.nan}, "margin must be at least 0 .math.inf included., got nan"),
        ({"ignore_index": 0.5}, "ignore_index must be an integer or None, got 0.5"),
        ({"weight": torch.ones(5, 6)}, r"features must be of shape \(..., 6\), to fit weight \(5, 6\), got \(23, 7\)"),
        ({"weight": torch.ones(7)}, r"weight must be of shape \(K, d\) with K at least 2, got \(7,\)"),
        ({"weight": torch.ones(1, 7)}, r"weight must be of shape \(K, d\) with K at least 2, got \(1, 7\)"),
        ({"weight": torch.ones(5, 7, dtype=torch.int)}, "weight must be a floating-point tensor, got torch.int32"),
        ({"weight": torch.full((5, 7), math.nan)}, "weight must be finite"),
        ({"features": torch.full((23, 7), math.inf)}, "features must be finite"),
        ({"features": torch.ones(7)}, r"features must be of shape \(..., 7\)"),
        ({"targets": torch.zeros(4, dtype=torch.long)}, r"targets must be of shape \(23,\), got \(4,\)"),
        ({"targets": torch.zeros(23)}, "targets must be integer class indices"),
        ({"targets": [0] * 23}, "targets must be integer class indices, got list"),
        ({"targets": torch.full((23,), 5)}, r"targets must lie in \[0, 5\)"),
    ],
)
def test_bad_input_is_rejected(options, message):
    names = ("features", "targets", "weight")
    labels = {"targets": torch.arange(23) % 5}
    given = dict(zip(names, batch(), strict=True)) | labels | options
    with pytest.raises(ValueError, match=f"^{message}"):
        losses.two_way(*[given.pop(name) for name in names], **given)


# Two processes with batches of unequal size, one of them of few classes, against one process on the whole batch.
SIZES, STEPS = (13, 4), 2
HEADS = {
    "learned": lambda: None,
    "nearest": lambda: NearestETFClassifier(7, 5, momentum=0.3, bias="none").double(),
    "means": lambda: ClassMeanClassifier(7, 5, means="differentiable", bias="none").double(),
}


def gradients(name, head, shard):
    """Return the losses of one rank, and the gradients of inputs and weight, at each step."""
    found, values = [], []
    make = HEADS[head]()
    for step in range(STEPS):
        features, targets, weight = batch(sum(SIZES), seed=step)
        features, targets = features[shard].requires_grad_(), targets[shard].where(targets[shard] != 3, -1)
        weight.requires_grad_()
        prepared, used = (features, weight) if make is None else make.prepare(features, targets.clamp_min(0))[:2]
        loss = LOSSES[name](prepared, targets, used, ignore_index=-1)
        wanted = (features, weight) if make is None else (features,)
        found.append(torch.autograd.grad(loss, wanted))
        values.append(loss.detach())
    return torch.stack(values), found


def worker(rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(SIZES))
    torch.set_num_threads(1)
    start = sum(SIZES[:rank])
    shard = slice(start, start + SIZES[rank])
    found = {f"{name}, {head}": gradients(name, head, shard) for name in LOSSES for head in HEADS}
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def test_ranks_agree_with_one_process(tmp_path):
    multiprocessing.spawn(worker, (str(tmp_path),), nprocs=len(SIZES))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(len(SIZES))]
    for name in LOSSES:
        for head in HEADS:
            values, whole = gradients(name, head, slice(None))
            parts = [rank[f"{name}, {head}"] for rank in ranks]
            assert (sum(value for value, _ in parts) / len(SIZES) - values).abs().max() < 1e-10
            for step in range(STEPS):
                # DistributedDataParallel takes the mean over ranks of a parameter's gradients.
                of_features = torch.cat([found[step][0] for _, found in parts]) / len(SIZES)
                tolerance = 1e-10 if head == "learned" else 1e-6
                assert (of_features - whole[step][0]).abs().max() < tolerance
                if head == "learned":
                    of_weight = sum(found[step][1] for _, found in parts) / len(SIZES)
                    assert (of_weight - whole[step][1]).abs().max() < 1e-10
