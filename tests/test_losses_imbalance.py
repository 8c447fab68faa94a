"""Class weights and priors of the losses against double loops, and against the losses of torch and of others."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from pytorch_metric_learning import losses as metric_learning
from torch import distributed, multiprocessing
from torch.nn import functional

from helpers import generator, normal
from neuralcollapse import losses

COUNTS = torch.tensor([500.0, 120, 30, 7, 1], dtype=torch.float64)
CLASS_WEIGHTS = torch.tensor([0.2, 1.0, 2.5, 0.0, 7.0], dtype=torch.float64)
WITH_PRIOR = {
    "cross-entropy": losses.cross_entropy,
    "normface": losses.normface,
    **{f"decoupled {m}": partial(losses.decoupled_cross_entropy, margin=m) for m in (0.7, math.inf)},
    **{f"bidirectional {m}": partial(losses.bidirectional_nonl, margin=m) for m in (0.7, math.inf)},
    **{f"two-way {m}": partial(losses.two_way, margin=m) for m in (0.7, math.inf)},
}
WITH_WEIGHTS = WITH_PRIOR | {
    "ntce": losses.ntce,
    **{f"nonl {m}": partial(losses.nonl, margin=m) for m in (0.7, math.inf)},
    "dot-regression": losses.dot_regression,
    "center": losses.center_loss,
}


def batch(size=23, num_classes=5, feature_dim=7, seed=0):
    features = 2 * normal(size, feature_dim, seed=seed) + 0.2
    targets = torch.randint(num_classes, (size,), generator=generator(seed))
    return features, targets, 3 * normal(num_classes, feature_dim, seed=seed + 100)


def double_loop(name, features, targets, weight, class_weights=None, prior=None, prior_scale=1.0):
    """Compute a loss by its formula, sample by sample, in Python's floating point."""
    samples, vectors, labels = features.tolist(), weight.tolist(), targets.tolist()
    shifts = [0.0] * len(vectors)
    if prior is not None:
        shifts = [prior_scale * math.log(count / sum(prior.tolist())) for count in prior.tolist()]
    kind, _, margin = name.partition(" ")
    margin = float(margin or 0)

    def dot(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    def score(i, k):
        cosine = dot(samples[i], vectors[k]) / (math.hypot(*samples[i]) * math.hypot(*vectors[k]))
        return (dot(samples[i], vectors[k]) if kind == "cross-entropy" else cosine / 0.1) + shifts[k]

    total = count = 0.0
    for i, y in enumerate(labels):
        own = score(i, y)
        positive = math.exp(own - margin) if margin < math.inf else 0.0
        other_classes = sum(math.exp(score(i, k)) for k in range(len(vectors)) if k != y)
        other_samples = sum(math.exp(score(j, y)) for j in range(len(samples)) if labels[j] != y)
        lengths = math.hypot(*samples[i]) * math.hypot(*vectors[y])
        if kind == "dot-regression":
            term = (dot(samples[i], vectors[y]) - lengths) ** 2 / (2 * lengths)
        elif kind == "center":
            term = 0.5 * math.dist(samples[i], vectors[y]) ** 2
        else:
            sums = {
                "bidirectional": [positive + other_classes + other_samples],
                "two-way": [positive + other_classes, positive + other_samples],
                "nonl": [positive + other_samples],
                "ntce": [sum(math.exp(score(j, y)) for j in range(len(samples)))],
            }.get(kind, [positive + other_classes])
            term = sum(map(math.log, sums)) / len(sums) - own
        of_class = 1.0 if class_weights is None else float(class_weights[y])
        total, count = total + of_class * term, count + of_class
    return total / count


@pytest.mark.parametrize("class_weights", [None, CLASS_WEIGHTS])
@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_a_loss_with_class_weights_is_its_double_loop(name, class_weights):
    features, targets, weight = batch()
    found = WITH_WEIGHTS[name](features, targets, weight, class_weights=class_weights)
    assert float(found) == pytest.approx(double_loop(name, features, targets, weight, class_weights), rel=1e-9)


@pytest.mark.parametrize("prior_scale", [0.0, 1.0, 1.7])
@pytest.mark.parametrize("name", WITH_PRIOR)
def test_a_loss_with_a_prior_is_its_double_loop(name, prior_scale):
    features, targets, weight = batch()
    options = {"prior": COUNTS, "prior_scale": prior_scale, "class_weights": CLASS_WEIGHTS}
    found = WITH_PRIOR[name](features, targets, weight, **options)
    assert float(found) == pytest.approx(double_loop(name, features, targets, weight, **options), rel=1e-9)


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_gradients_are_those_of_finite_differences(name):
    features, targets, weight = batch(9, 3, 4)
    options = {"class_weights": CLASS_WEIGHTS[:3]} | ({"prior": COUNTS[:3]} if name in WITH_PRIOR else {})

    def loss(features, weight):
        if name == "dot-regression":  # norms are constants for its gradient
            features, weight = 4 * functional.normalize(features), 2 * functional.normalize(weight)
        return WITH_WEIGHTS[name](features, targets, weight, **options)

    assert torch.autograd.gradcheck(loss, (features.requires_grad_(), weight.requires_grad_()))


def test_cross_entropy_is_that_of_torch():
    features, targets, weight = batch()
    bias = normal(5, seed=3)
    logits = features @ weight.T + bias
    found = losses.cross_entropy(features, targets, weight, bias)
    assert (found - functional.cross_entropy(logits, targets)).abs() < 1e-12
    found = losses.cross_entropy(features, targets, weight, bias, class_weights=CLASS_WEIGHTS)
    assert (found - functional.cross_entropy(logits, targets, CLASS_WEIGHTS)).abs() < 1e-12
    found = losses.cross_entropy(features, targets, weight, bias, label_smoothing=0.2)
    assert (found - functional.cross_entropy(logits, targets, label_smoothing=0.2)).abs() < 1e-12
    kept = targets.where(targets != 2, -100)
    found = losses.cross_entropy(features, kept, weight, bias, ignore_index=-100)
    assert (found - functional.cross_entropy(logits, kept)).abs() < 1e-12


def test_a_prior_of_counts_is_the_balanced_softmax_in_any_unit():
    features, targets, weight = batch()
    scores = (features @ weight.T).exp() * COUNTS
    balanced = -(scores.gather(1, targets[:, None]) / scores.sum(1, keepdim=True)).log().mean()
    for prior in (COUNTS, COUNTS / COUNTS.sum(), COUNTS.long(), 1e9 * COUNTS.float()):
        assert (losses.cross_entropy(features, targets, weight, prior=prior) - balanced).abs() < 1e-6
    equal = losses.normface(features, targets, weight, prior=torch.full((5,), 3))
    assert (equal - losses.normface(features, targets, weight)).abs() < 1e-12


def test_logit_adjustment_recovers_the_balanced_posterior():
    """The optimum over free logits of the adjusted loss on a long tail is the log-likelihood, without the prior."""
    likelihood = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3]], dtype=torch.float64)  # of two inputs, per class
    likelihood = torch.stack([likelihood[0], 1 - likelihood[0]])
    prior = torch.tensor([0.90, 0.08, 0.02], dtype=torch.float64)
    joint = likelihood * prior  # p(x, y)
    logits = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    inputs, labels = torch.arange(2).repeat_interleave(3), torch.arange(3).repeat(2)
    optimizer = torch.optim.LBFGS([logits], max_iter=300, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def evaluate():
        optimizer.zero_grad()
        parts = [
            joint[x, y] * losses.cross_entropy(logits[x][None], y[None], torch.eye(3).double(), prior=prior)
            for x, y in zip(inputs, labels, strict=True)
        ]
        loss = torch.stack(parts).sum()
        loss.backward()
        return loss

    optimizer.step(evaluate)
    posterior = likelihood / likelihood.sum(1, keepdim=True)
    assert torch.allclose(logits.detach().softmax(1), posterior, atol=1e-5)


def test_center_loss_with_a_radius_has_centres_of_that_norm():
    features, targets, weight = batch()
    centres = 6.1 * functional.normalize(weight)
    found = losses.center_loss(features, targets, weight, radius=6.1)
    assert (found - losses.center_loss(features, targets, centres)).abs() < 1e-12
    with pytest.raises(ValueError, match="^radius must be a positive number or None, got 0"):
        losses.center_loss(features, targets, weight, radius=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": torch.tensor([5, 3, 0, 2, 1])}, "prior must be positive, got 0.0 for class 2; a class without"),
        ({"prior": torch.tensor([0.5, -0.1, 0.2, 0.2, 0.2])}, "prior must be positive, got -0.1.* for class 1"),
        ({"prior": torch.tensor([0.5, math.inf, 0.2, 0.2, 0.2])}, "prior must be finite"),
        ({"prior": torch.ones(4)}, r"prior must be of shape \(5,\), got \(4,\)"),
        ({"prior": [1, 2, 3, 4, 5]}, "prior must be a tensor of frequencies or counts, got list"),
        ({"prior_scale": 2.0}, "prior_scale must not be given without prior, got 2.0"),
        ({"prior": torch.ones(5), "prior_scale": -1.0}, "prior_scale must be finite and at least 0, got -1.0"),
        ({"class_weights": torch.ones(3)}, r"class_weights must be of shape \(5,\), got \(3,\)"),
        ({"class_weights": torch.zeros(5)}, "class_weights must be at least 0 and not all 0, got all 0"),
        ({"class_weights": torch.tensor([1.0, 1, 1, 1, -2])}, "class_weights must be at least 0 .*, got -2.0"),
        ({"class_weights": torch.ones(5).long()}, "class_weights must be a floating-point tensor"),
    ],
)
def test_bad_weights_and_priors_are_rejected(options, message):
    features, _, weight = batch()
    targets = torch.arange(23) % 5
    for loss in (losses.cross_entropy, losses.two_way):
        with pytest.raises(ValueError, match=f"^{message}"):
            loss(features, targets, weight, **options)


def test_losses_that_compare_no_classes_have_no_prior():
    features, targets, weight = batch()
    for loss in (losses.ntce, losses.nonl, losses.dot_regression, losses.center_loss):
        with pytest.raises(TypeError, match="prior"):
            loss(features, targets, weight, prior=COUNTS)


def test_batches_without_a_class_that_has_weight_are_zero():
    features, _, weight = batch()
    features.requires_grad_()
    loss = losses.cross_entropy(features, torch.full((23,), 3), weight, class_weights=CLASS_WEIGHTS)
    assert loss == 0
    assert torch.autograd.grad(loss, features)[0].abs().max() == 0


@pytest.mark.parametrize("name", ["normface", "cosface"])
def test_losses_are_those_of_pytorch_metric_learning(name):
    features, targets, weight = batch()
    if name == "normface":
        theirs = metric_learning.NormalizedSoftmaxLoss(5, 7, temperature=0.1)
        ours = losses.normface(features, targets, weight)
    else:
        theirs = metric_learning.CosFaceLoss(5, 7, margin=0.3, scale=10)
        ours = losses.decoupled_cross_entropy(features, targets, weight, margin=3.0) + 3.0
    theirs = theirs.double()
    with torch.no_grad():
        theirs.W.copy_(weight.T)
    assert (theirs(features, targets) - ours).abs() < 1e-6


SIZES = (13, 4)


def gradients(name, shard):
    features, targets, weight = batch(sum(SIZES))
    features, targets = features[shard].requires_grad_(), targets[shard].where(targets[shard] != 1, -1)
    weight.requires_grad_()
    options = {"class_weights": CLASS_WEIGHTS} | ({"prior": COUNTS} if name in WITH_PRIOR else {})
    loss = WITH_WEIGHTS[name](features, targets, weight, ignore_index=-1, **options)
    return loss.detach(), torch.autograd.grad(loss, (features, weight))


def worker(rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(SIZES))
    torch.set_num_threads(1)
    start = sum(SIZES[:rank])
    torch.save(
        {name: gradients(name, slice(start, start + SIZES[rank])) for name in WITH_WEIGHTS}, f"{folder}/{rank}.pt"
    )
    distributed.barrier()
    distributed.destroy_process_group()


def test_ranks_agree_with_one_process(tmp_path):
    multiprocessing.spawn(worker, (str(tmp_path),), nprocs=len(SIZES))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(len(SIZES))]
    for name in WITH_WEIGHTS:
        value, (of_features, of_weight) = gradients(name, slice(None))
        parts = [rank[name] for rank in ranks]
        assert (sum(part[0] for part in parts) / 2 - value).abs() < 1e-10, name
        assert (torch.cat([part[1][0] for part in parts]) / 2 - of_features).abs().max() < 1e-10, name
        assert (sum(part[1][1] for part in parts) / 2 - of_weight).abs().max() < 1e-10, name
