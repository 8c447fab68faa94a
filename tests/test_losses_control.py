"""Losses of features alone against double loops: variability, KoLeo, supervised contrast."""

from __future__ import annotations

import math
import warnings
from functools import partial

import pytest
import torch
from pytorch_metric_learning import losses as metric_learning
from torch import distributed, multiprocessing

from helpers import generator, normal
from neuralcollapse import losses
from neuralcollapse.metrics import nc1_quotient

LOSSES = {
    **{
        f"variability {of} {sign}": partial(losses.variability, of=of, sign=sign)
        for of in ("log", "ratio")
        for sign in (1, -1)
    },
    "koleo all": losses.koleo,
    "koleo class": partial(losses.koleo, within_classes=True),
    "supcon 0.1": losses.supcon,
    "supcon 0.7": partial(losses.supcon, temperature=0.7),
}


def batch(size=23, num_classes=5, feature_dim=7, seed=0):
    """Return features and targets, of which the last class has one sample."""
    targets = torch.randint(num_classes - 1, (size,), generator=generator(seed))
    targets[size // 2] = num_classes - 1
    return 2 * normal(size, feature_dim, seed=seed) + 0.2, targets


def double_loop(name, features, targets):
    """Compute a loss by its formula in Python's floating point."""
    samples, labels = features.tolist(), targets.tolist()
    kind, *options = name.split()
    indices = range(len(samples))
    units = [[value / math.hypot(*row) for value in row] for row in samples]
    if kind == "variability":
        rows_of = {k: [samples[i] for i in indices if labels[i] == k] for k in sorted(set(labels))}
        means = {k: [sum(column) / len(rows) for column in zip(*rows, strict=True)] for k, rows in rows_of.items()}
        centre = [sum(column) / len(means) for column in zip(*means.values(), strict=True)]
        spreads = [
            sum(math.dist(row, means[k]) ** 2 for row in rows) / len(rows)
            for k, rows in rows_of.items()
            if len(rows) > 1
        ]
        between = sum(math.dist(mean, centre) ** 2 for mean in means.values()) / len(means)
        ratio = sum(spreads) / len(spreads) / between
        return int(options[1]) * (math.log(ratio) if options[0] == "log" else ratio)
    terms = []
    for i in indices:
        others = [j for j in indices if j != i]
        own = [j for j in others if labels[j] == labels[i]]
        if kind == "koleo":
            candidates = others if options[0] == "all" else own
            if candidates:
                terms.append(-math.log(min(math.dist(units[i], units[j]) for j in candidates) + 1e-8))
        elif own:
            scores = [sum(a * b for a, b in zip(units[i], unit, strict=True)) / float(options[0]) for unit in units]
            total = sum(math.exp(scores[j]) for j in others)
            terms.append(-sum(math.log(math.exp(scores[j]) / total) for j in own) / len(own))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_double_loop(name, seed):
    features, targets = batch(seed=seed)
    assert float(LOSSES[name](features, targets)) == pytest.approx(double_loop(name, features, targets), rel=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name):
    features, targets = batch(9, 3, 4)
    assert torch.autograd.gradcheck(lambda rows: LOSSES[name](rows, targets), (features.requires_grad_(),))


@pytest.mark.parametrize("of", ["log", "ratio"])
def test_variability_is_nc1_of_balanced_features(of):
    features, targets = 3 * normal(24, 7, seed=1) + 1, torch.arange(24) % 4
    means = torch.stack([features[targets == k].mean(0) for k in range(4)])
    within = torch.stack([(features[targets == k] - means[k]).square().sum(1).mean() for k in range(4)]).mean()
    quotient = nc1_quotient(within, means - means.mean(0))
    found = losses.variability(features, targets, of=of)
    assert float(found.exp() if of == "log" else found) * 1.0 == pytest.approx(float(quotient), rel=1e-9)
    scaled = losses.variability(1e3 * features - 40, targets, of=of)
    assert float(scaled) == pytest.approx(float(found), rel=1e-9)


def test_the_signs_collapse_and_prevent_collapse():
    features, targets = batch()
    ratio = partial(losses.variability, of="ratio")
    for sign in (1, -1):
        rows = features.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(losses.variability(rows, targets, sign=sign), rows)
        changed = ratio(features - 0.1 * gradient, targets) - ratio(features, targets)
        assert float(changed) * sign < 0


def test_a_detached_between_scatter_moves_no_class_mean():
    features, targets = batch()
    features.requires_grad_()
    loss = losses.variability(features, targets, detach_between=True)
    assert loss == losses.variability(features, targets)
    (gradient,) = torch.autograd.grad(loss, features)
    (whole,) = torch.autograd.grad(losses.variability(features, targets), features)
    for k in range(5):
        assert gradient[targets == k].sum(0).abs().max() < 1e-12
    assert whole[targets == 0].sum(0).abs().max() > 1e-3


@pytest.mark.parametrize("of", ["log", "ratio"])
@pytest.mark.parametrize("targets", [torch.arange(6), torch.zeros(6, dtype=torch.long)], ids=["singles", "one class"])
def test_variability_without_a_value_is_zero_and_says_so(targets, of):
    features = normal(6, 4).requires_grad_()
    with pytest.warns(UserWarning, match="variability is 0 without gradient for this batch: it needs two classes"):
        loss = losses.variability(features, targets, of=of)
    assert loss == 0
    assert torch.autograd.grad(loss, features)[0].abs().max() == 0


def test_variability_of_collapsed_features_is_finite():
    features, targets = normal(3, 4).repeat(4, 1).requires_grad_(), torch.arange(3).repeat(4)
    for of, least in (("log", math.log(torch.finfo(torch.float64).tiny)), ("ratio", 0.0)):
        loss = losses.variability(features, targets, of=of)
        assert least <= float(loss.detach()) < -60 or float(loss.detach()) < 1e-25
        assert torch.autograd.grad(loss, features)[0].isfinite().all()


def test_supcon_of_singles_is_zero_and_says_so():
    features = normal(6, 4).requires_grad_()
    with pytest.warns(UserWarning, match="supcon is 0 without gradient for this batch: no class has two samples"):
        loss = losses.supcon(features, torch.arange(6))
    assert loss == 0
    assert torch.autograd.grad(loss, features)[0].abs().max() == 0


def test_koleo_of_equal_features_and_of_one_is_finite():
    features = torch.ones(4, 3).requires_grad_()
    loss = losses.koleo(features)
    assert float(loss.detach()) == pytest.approx(-math.log(1e-8))
    assert torch.autograd.grad(loss, features)[0].isfinite().all()
    assert losses.koleo(torch.ones(1, 3)) == 0
    assert losses.koleo(normal(4, 3), torch.arange(4), within_classes=True) == 0


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_samples_do_not_count(name):
    features, targets = batch()
    kept = torch.arange(23) % 4 != 0
    features.requires_grad_()
    expected = LOSSES[name](features[kept], targets[kept])
    found = LOSSES[name](features.reshape(1, 23, 7), targets.where(kept, -100).reshape(1, 23), ignore_index=-100)
    assert (found - expected).abs() < 1e-12
    gradient, of_kept = (torch.autograd.grad(loss, features)[0] for loss in (found, expected))
    assert (gradient - of_kept).abs().max() < 1e-12
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert LOSSES[name](features, torch.full_like(targets, -100), ignore_index=-100) == 0


@pytest.mark.parametrize("name", LOSSES)
def test_low_precision_is_computed_in_fp32(name):
    features, targets = batch()
    low = features.bfloat16()
    expected = LOSSES[name](low.float(), targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(LOSSES[name](low, targets), expected)
    assert expected.dtype == torch.float32


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (losses.variability, {"sign": 0}, r"sign must be 1 \(towards collapse\) or -1 \(against it\), got 0"),
        (losses.variability, {"sign": True}, "sign must be 1"),
        (losses.variability, {"of": "trace"}, "of must be 'log' or 'ratio', got 'trace'"),
        (losses.variability, {"detach_between": 1}, "detach_between must be True or False, got 1"),
        (losses.variability, {"targets": torch.zeros(4)}, "targets must be integer class indices"),
        (losses.variability, {"targets": torch.arange(4)}, r"targets must be of shape \(23,\), got \(4,\)"),
        (losses.variability, {"features": torch.full((23, 7), math.nan)}, "features must be finite"),
        (losses.koleo, {"targets": None, "within_classes": True}, "targets must be given with within_classes"),
        (losses.koleo, {"features": torch.ones(7)}, r"features must be of shape \(..., d\), got \(7,\)"),
        (losses.supcon, {"temperature": 0}, "temperature must be a positive number, got 0"),
    ],
)
def test_bad_input_is_rejected(loss, options, message):
    given = dict(zip(("features", "targets"), batch(), strict=True)) | options
    with pytest.raises(ValueError, match=f"^{message}"):
        loss(given.pop("features"), given.pop("targets"), **given)


@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_supcon_is_that_of_pytorch_metric_learning(temperature):
    features, targets = batch()
    theirs = metric_learning.SupConLoss(temperature=temperature)(features, targets)
    assert (theirs - losses.supcon(features, targets, temperature=temperature)).abs() < 1e-6


SIZES = (13, 4)


def gradients(name, shard):
    features, targets = batch(sum(SIZES))
    features = features[shard].requires_grad_()
    loss = LOSSES[name](features, targets[shard])
    return loss.detach(), torch.autograd.grad(loss, features)[0]


def worker(rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(SIZES))
    torch.set_num_threads(1)
    start = sum(SIZES[:rank])
    torch.save({name: gradients(name, slice(start, start + SIZES[rank])) for name in LOSSES}, f"{folder}/{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def test_ranks_agree_with_one_process(tmp_path):
    multiprocessing.spawn(worker, (str(tmp_path),), nprocs=len(SIZES))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(len(SIZES))]
    for name in LOSSES:
        value, of_features = gradients(name, slice(None))
        for rank in ranks:
            assert (rank[name][0] - value).abs() < 1e-10, name
        # DistributedDataParallel takes the mean over ranks of a parameter's gradients.
        assert (torch.cat([rank[name][1] for rank in ranks]) / 2 - of_features).abs().max() < 1e-10, name


# --- at a named layer ----------------------------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 6, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(6 * 36, 7), torch.nn.Linear(7, 3)
    )


@pytest.mark.parametrize("layer", ["1", "3"])
def test_a_regulariser_is_the_weighted_loss_of_the_layer(layer):
    model, inputs, targets = network(), normal(12, 1, 8, 8, dtype=torch.float32), torch.arange(12) % 3
    regulariser = losses.regularise(model, layer, losses.variability, -0.3)
    model(inputs)
    gradients = torch.autograd.grad(regulariser(targets), model[0].weight)
    output = model[:2](inputs).mean((2, 3)) if layer == "1" else model[:4](inputs)
    expected = torch.autograd.grad(-0.3 * losses.variability(output, targets), model[0].weight)
    assert torch.allclose(gradients[0], expected[0], rtol=1e-5)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("sign", [1, -1])
def test_a_regulariser_moves_nc1_of_a_trained_network(sign):
    model, targets = network(), torch.arange(60) % 3
    inputs = normal(60, 1, 8, 8, dtype=torch.float32) + normal(3, 1, 8, 8, dtype=torch.float32, seed=1)[targets]
    with torch.no_grad():
        before = float(losses.variability(model[:4](inputs), targets))
    regulariser = losses.regularise(model, "3", losses.variability, sign)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)  # larger steps overshoot with sign -1
    for _ in range(20):
        optimizer.zero_grad()
        model(inputs)
        regulariser(targets).backward()
        optimizer.step()
    with torch.no_grad():
        assert sign * (float(losses.variability(model[:4](inputs), targets)) - before) < -0.1


def test_a_regulariser_uses_each_output_once_and_can_be_removed():
    model, inputs, targets = network(), normal(6, 1, 8, 8, dtype=torch.float32), torch.arange(6) % 3
    regulariser = losses.regularise(model, "3", losses.koleo)
    with torch.no_grad():
        model(inputs)
    with pytest.raises(ValueError, match="^layer '3' must have run with gradients before its regulariser is called"):
        regulariser(targets)
    model(inputs)
    with pytest.raises(ValueError, match=r"^layer '3' must return one feature vector per target, of shape \(4,\) and"):
        regulariser(targets[:4])
    model(inputs)
    regulariser(targets)
    regulariser.remove()
    model(inputs)
    with pytest.raises(ValueError, match="^layer '3' must have run"):
        regulariser(targets)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "9"}, "layer must be the name of a module of the model, such as 0, 1, 2, got '9'"),
        ({"layer": ""}, "layer must be the name of a module of the model"),
        ({"loss": "koleo"}, "loss must be a function of features and targets, got str"),
        ({"weight": 0.0}, "weight must be a finite number other than 0, got 0.0"),
        ({"weight": math.nan}, "weight must be a finite number other than 0, got nan"),
        ({"model": 3}, "model must be an nn.Module"),
    ],
)
def test_a_regulariser_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        losses.regularise(**{"model": network(), "layer": "3", "loss": losses.koleo, "weight": 1.0} | options)
