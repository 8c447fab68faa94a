"""The optimiser of a run, and the schedule of its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.optim import lr_scheduler

from neuralcollapse.heads import AttachedHead, LearnedClassifier
from neuralcollapse.lab.config import Optimisation, RunConfig
from neuralcollapse.lab.seeds import derived_seed
from neuralcollapse.lab.training.agd import AGD, orthogonal_start

_T = TypeVar("_T")
# Beside a run's seed, this one gives the seed of first weights that the optimiser asks for.
_START = 2


def build_optimizer(config: RunConfig, model: AttachedHead) -> torch.optim.Optimizer:
    """The optimiser of all parameters; without a unit start, its first step gives the rows of a unit weight unit norm.

    AGD asks for first weights of its own, which the model is given; they follow from the seed.

    Raises:
        ValueError: The optimiser cannot train this model.
    """
    optimizer = _optimizer(config, model)
    if config.optimizer == "agd":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(config.seed, _START))
            orthogonal_start(model)
    head = model.head
    if isinstance(head, LearnedClassifier) and config.unit_weight:
        if config.unit_start:
            head.project_weight()
        else:
            optimizer.register_step_post_hook(lambda *_: setattr(head, "unit_weight", True))
    return optimizer


def _optimizer(config: RunConfig, model: AttachedHead) -> torch.optim.Optimizer:
    if config.optimizer == "agd":
        try:
            return AGD(model.named_parameters(), gain=_value(config.gain))
        except ValueError as error:
            raise ValueError(f"{error} (batch_norm_affine false, classifier_bias centring or none)") from error
    parameters, rate = model.parameters(), _value(config.lr)
    if config.optimizer == "lbfgs":
        return torch.optim.LBFGS(
            parameters,
            lr=rate,
            max_iter=_value(config.lbfgs_iterations),
            history_size=_value(config.lbfgs_history),
            line_search_fn="strong_wolfe",
        )
    # With a feature decay, the weight decay is part of the loss.
    weight_decay = _value(config.weight_decay) if config.feature_decay is None else 0.0
    if config.optimizer == "sgd":
        momentum = 0.0 if config.momentum is None else config.momentum  # None: the schedule gives it
        return torch.optim.SGD(parameters, lr=rate, momentum=momentum, weight_decay=weight_decay)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return kind(parameters, lr=rate, weight_decay=weight_decay)


def build_schedule(
    config: Optimisation, optimizer: torch.optim.Optimizer, batches: int
) -> lr_scheduler.LRScheduler | None:
    """The schedule of the learning rate, stepped after every batch; None for an optimiser that has no rate.

    Args:
        config: The settings.
        optimizer: Theirs.
        batches: In an epoch.
    """
    if config.schedule is None:
        return None
    steps = config.epochs * batches
    if config.warmup_epochs:
        return lr_scheduler.LambdaLR(optimizer, _after_warmup(config, batches))
    if config.schedule == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if config.schedule == "step":
        return lr_scheduler.StepLR(optimizer, _value(config.step_epochs) * batches, _value(config.lr_factor))
    if config.schedule == "multistep":
        milestones = [epoch * batches for epoch in _value(config.milestones)]
        return lr_scheduler.MultiStepLR(optimizer, milestones, _value(config.lr_factor))
    if config.schedule == "one-cycle":
        return lr_scheduler.OneCycleLR(
            optimizer,
            _value(config.lr),
            total_steps=max(steps, 2),
            three_phase=_value(config.three_phase),
            div_factor=_value(config.div_factor),
            final_div_factor=_value(config.final_div_factor),
            cycle_momentum=bool(config.cycle_momentum),
        )
    return lr_scheduler.ConstantLR(optimizer, factor=1.0)


def _after_warmup(config: Optimisation, batches: int) -> Callable[[int], float]:
    """Return the factor of the learning rate at step t: (t+1)/W in the W steps of the warm-up, then the schedule's."""
    warmup, steps = _value(config.warmup_epochs) * batches, config.epochs * batches

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        if config.schedule == "step":
            return _value(config.lr_factor) ** (step // (_value(config.step_epochs) * batches))
        if config.schedule == "multistep":
            passed = sum(step >= epoch * batches for epoch in _value(config.milestones))
            return _value(config.lr_factor) ** passed
        return 1.0

    return factor


def _value(setting: _T | None) -> _T:
    """A setting that is in force here."""
    assert setting is not None
    return setting
