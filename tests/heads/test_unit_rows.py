"""Unit rows under every optimiser: the trajectory is that of a plain weight whose rows are scaled after each step."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from helpers import normal
from neuralcollapse import LearnedClassifier, attach_head

ONES = torch.ones(5, dtype=torch.float64)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation around another optimiser, stepped in two calls or by a closure."""

    def __init__(self, parameters, base, rho=0.3, subtract=False, **options):
        super().__init__(parameters, dict(options))
        self.base, self.rho, self.subtract = base(self.param_groups, **options), rho, subtract

    def _parameters(self):
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def first_step(self):
        norm = torch.stack([parameter.grad.norm() for parameter in self._parameters()]).norm()
        for parameter in self._parameters():
            ascent = self.rho * parameter.grad / norm
            self.state[parameter] |= {"ascent": ascent, "start": parameter.clone()}
            parameter.add_(ascent)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for parameter in self._parameters():
            if self.subtract:
                parameter.sub_(self.state[parameter]["ascent"])
            else:
                parameter.data = self.state[parameter]["start"]
        self.base.step()
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure):
        closure = torch.enable_grad()(closure)
        self.first_step()
        closure()
        self.second_step()


class Wrapped:
    """A wrapper around an optimiser, as in accelerate, that is not an optimiser itself."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        self.optimizer.step()


def batch(step):
    return normal(16, 12, seed=step), torch.arange(16) % 5


def loss_of(weight, bias, step):
    features, targets = batch(step)
    return cross_entropy(linear(features, weight, bias), targets)


def plainly(optimizer, loss, step):
    optimizer.zero_grad()
    loss(step).backward()
    optimizer.step()


def by_closure(optimizer, loss, step):
    def closure():
        optimizer.zero_grad()
        value = loss(step)
        value.backward()
        return value

    if isinstance(optimizer, SAM):
        closure()
    optimizer.step(closure)


def in_two_calls(optimizer, loss, step):
    loss(step).backward()
    optimizer.first_step()
    loss(step).backward()
    optimizer.second_step()


SGD = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.01}
LOOPS = {
    "sgd": (lambda p: torch.optim.SGD(p, **SGD), plainly),
    "sgd, nesterov, foreach": (lambda p: torch.optim.SGD(p, **SGD, nesterov=True, foreach=True), plainly),
    "adam, fused": (lambda p: torch.optim.Adam(p, 0.1, fused=True), plainly),
    "adamw": (lambda p: torch.optim.AdamW(p, 0.1), plainly),
    "rmsprop": (lambda p: torch.optim.RMSprop(p, 0.05), plainly),
    "lbfgs": (lambda p: torch.optim.LBFGS(p, 0.5, max_iter=4, line_search_fn="strong_wolfe"), by_closure),
    "sam": (lambda p: SAM(p, torch.optim.SGD, **SGD), in_two_calls),
    "sam that subtracts": (lambda p: SAM(p, torch.optim.SGD, subtract=True, **SGD), in_two_calls),
    "sam by closure": (lambda p: SAM(p, torch.optim.Adam, lr=0.1), by_closure),
}


@pytest.mark.parametrize(("make", "step_of"), LOOPS.values(), ids=LOOPS)
def test_the_trajectory_is_that_of_projecting_after_each_step(make, step_of):
    head = LearnedClassifier(12, 5, unit_weight=True).double()
    weight, bias = (nn.Parameter(tensor.detach().clone()) for tensor in (head.weight, head.bias))
    optimizer, plain = make(head.parameters()), make([weight, bias])
    for step in range(6):
        step_of(optimizer, lambda step: cross_entropy(head(batch(step)[0]), batch(step)[1]), step)
        step_of(plain, lambda step: loss_of(weight, bias, step), step)
        with torch.no_grad():
            weight.div_(weight.norm(dim=1, keepdim=True))
        stored = head.get_parameter("weight").detach()
        assert torch.allclose(stored, weight, rtol=0, atol=1e-12)
        assert torch.allclose(head.bias, bias, rtol=0, atol=1e-12)
    assert (weight - LearnedClassifier(12, 5).weight).norm() > 0.1


def test_a_copy_of_head_and_optimiser_goes_on_alike():
    head = LearnedClassifier(12, 5, unit_weight=True).double()
    optimizer = torch.optim.SGD(head.parameters(), **SGD)
    pairs = [(head, optimizer)]
    for step in range(3):
        plainly(optimizer, lambda step: cross_entropy(head(batch(step)[0]), batch(step)[1]), step)
        if step == 1:
            pairs.append(copy.deepcopy((head, optimizer)))
    other, optimizer = pairs[1]
    plainly(optimizer, lambda step: cross_entropy(other(batch(step)[0]), batch(step)[1]), 2)
    assert torch.equal(dict(other.named_parameters())["weight"], dict(head.named_parameters())["weight"])
    again = pickle.loads(pickle.dumps(head))  # as torch.save of a whole model
    plainly(torch.optim.SGD(again.parameters(), 1.0), lambda step: again(batch(step)[0]).square().sum(), 3)
    assert torch.allclose(dict(again.named_parameters())["weight"].norm(dim=1), ONES)


def test_a_wrapped_optimiser_and_a_scaler_step_the_same():
    weights = []
    for wrap in (lambda optimizer: optimizer, Wrapped, None):
        torch.manual_seed(0)
        head = LearnedClassifier(12, 5, unit_weight=True)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
        scaler = torch.amp.GradScaler("cpu", enabled=wrap is None)
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale(cross_entropy(head(batch(step)[0].float()), batch(step)[1])).backward()
            scaler.step(optimizer) if wrap is None else wrap(optimizer).step()
            scaler.update()
        weights.append(dict(head.named_parameters())["weight"].detach())
    assert torch.allclose(weights[0].norm(dim=1), ONES.float())
    assert torch.equal(weights[0], weights[1])
    assert torch.allclose(weights[0], weights[2], atol=1e-6)


READS = {
    "by its name": lambda head: head.weight,
    "state dict": lambda head: head.state_dict()["weight"],
    "inference form": lambda head: head.to_inference().weight,
    "prepare": lambda head: head.eval().prepare(batch(0)[0])[1],
    "evaluation mode": lambda head: dict(head.eval().named_parameters())["weight"],
    "no gradient": lambda head: torch.no_grad()(head.prepare)(batch(0)[0])[1],
    "inference mode": lambda head: torch.inference_mode()(head.prepare)(batch(0)[0])[1],
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_rows_that_something_else_has_changed_have_unit_norm_when_they_are_read(read):
    head = LearnedClassifier(12, 5, unit_weight=True).double()
    with torch.no_grad():
        for name, parameter in head.named_parameters():  # as an update by hand does
            parameter.add_(normal(*parameter.shape, seed=1)).mul_(1 if name == "bias" else 3)
        stored = dict(head.named_parameters())["weight"].detach().clone()
    weight = read(head)
    assert torch.allclose(weight, stored / stored.norm(dim=1, keepdim=True), atol=1e-12)
    head(batch(0)[0]).sum().backward()  # it is still the parameter that is trained
    assert head.weight.grad.abs().sum() > 0
    assert isinstance(head.weight, nn.Parameter)


def test_updates_by_hand_keep_unit_rows():
    model = attach_head(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 5)), LearnedClassifier(12, 5, unit_weight=True))
    for step in range(6):
        features, targets = batch(step)
        _, weight, _ = model.head.prepare(model.model(features.float()))
        if step != 1:  # where a first update by hand cannot be distinguished from the ascent of SAM
            assert torch.allclose(weight.norm(dim=1), ONES.float(), atol=1e-6)
        cross_entropy(model(features.float()), targets).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.5 * parameter.grad
                parameter.grad = None
    assert torch.allclose(model.eval().head.weight.norm(dim=1), ONES.float(), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_projecting_again_changes_nothing(dtype):
    head = LearnedClassifier(300, 40, unit_weight=True).to(dtype)
    with torch.no_grad():
        head.weight.mul_(torch.linspace(0.5, 20, 40, dtype=dtype).unsqueeze(1))
    once = head.weight.detach().clone()
    head.project_weight()
    assert torch.equal(head.weight, once)
    tolerance = {torch.float64: 1e-14, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert ((once.double().norm(dim=1) - 1).abs() < tolerance).all()


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.7)])
def test_an_average_of_unit_rows_has_unit_rows(average):
    head = LearnedClassifier(12, 5, feature_norm=4.0, unit_weight=True).double()
    averaged = AveragedModel(head, multi_avg_fn=average)
    optimizer = torch.optim.SGD(head.parameters(), lr=2.0)
    for step in range(6):
        plainly(optimizer, lambda step: cross_entropy(head(batch(step)[0]), batch(step)[1]), step)
        averaged.update_parameters(head)
    stored = dict(averaged.module.named_parameters())["weight"].detach().clone()
    assert (stored.norm(dim=1) < 0.999).all()
    expected = stored / stored.norm(dim=1, keepdim=True)
    logits = averaged.eval()(batch(9)[0])
    assert torch.allclose(logits, linear(head.features(batch(9)[0]), expected, averaged.module.bias), atol=1e-12)
    assert torch.allclose(averaged.state_dict()["module.weight"], expected, atol=1e-12)


def test_heads_of_others_and_without_unit_rows_are_left_alone():
    free, other = LearnedClassifier(12, 5), LearnedClassifier(12, 5, unit_weight=True)
    before = other.weight.detach().clone()
    free(batch(0)[0].float()).square().sum().backward()
    torch.optim.SGD(free.parameters(), lr=1.0).step()
    assert not torch.allclose(free.weight.norm(dim=1), ONES.float(), atol=0.1)
    assert torch.equal(other.weight, before)


def test_a_compiled_training_step_keeps_unit_rows():
    head = LearnedClassifier(12, 5, unit_weight=True).double()
    optimizer, compiled = torch.optim.SGD(head.parameters(), lr=0.5), torch.compile(head, backend="aot_eager")
    for step in range(3):
        plainly(optimizer, lambda step: cross_entropy(compiled(batch(step)[0]), batch(step)[1]), step)
        assert torch.allclose(dict(head.named_parameters())["weight"].norm(dim=1), ONES)
