"""Optimiser of a run, schedule of its learning rate, and average of the weights of the model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from neuralcollapse.heads import AttachedHead, LearnedClassifier
from neuralcollapse.lab.config import Optimisation, RunConfig, derived_seed
from neuralcollapse.lab.training.agd import AGD, orthogonal_start
from neuralcollapse.metrics.measure import Layers

_T = TypeVar("_T")
_BATCH_NORM = nn.modules.batchnorm._BatchNorm
# Constant that, combined with the seed of a run, gives the seed of initial weights that the optimiser requires.
_START = 2


def build_optimizer(config: RunConfig, model: AttachedHead) -> torch.optim.Optimizer:
    """Return the optimiser of all parameters.

    If the weight does not start with unit rows, the rows have unit norm after the first step. AGD needs special initial
    weights, which are drawn here from the seed of the run.

    Raises:
        ValueError: if the optimiser cannot train this model.
    """
    optimizer = _optimizer(config, model)
    if config.optimizer == "agd":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(config.seed, _START))
            orthogonal_start(model)
    head = model.head
    if isinstance(head, LearnedClassifier) and config.unit_weight:
        if config.unit_weight is True:
            head.project_weight()
        else:
            optimizer.register_step_post_hook(lambda *_: setattr(head, "unit_weight", True))
    return optimizer


def _optimizer(config: RunConfig, model: AttachedHead) -> torch.optim.Optimizer:
    if config.optimizer == "agd":
        try:
            return AGD(model.named_parameters(), gain=_value(config.optimizer_options)["gain"])
        except ValueError as error:
            hint = "backbone_options.batch_norm_affine false, classifier_bias centring or none"
            raise ValueError(f"{error} ({hint})") from error
    parameters, rate = model.parameters(), _value(config.lr)
    if config.optimizer == "lbfgs":
        # torch's LBFGS cannot flatten the gradients of weights in channels-last layout.
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        return torch.optim.LBFGS(
            parameters,
            lr=rate,
            max_iter=_value(config.optimizer_options)["iterations"],
            history_size=_value(config.optimizer_options)["history"],
            line_search_fn="strong_wolfe",
        )
    # With feature decay, weight decay is part of the loss.
    weight_decay = _value(config.weight_decay) if config.feature_decay is None else 0.0
    if config.optimizer == "sgd":
        momentum = 0.9 if config.momentum is None else config.momentum  # None: one-cycle sets it
        options = config.optimizer_options or {}
        groups = _groups(model, rate, weight_decay, options.get("shift_lr_factor", 1.0))
        return torch.optim.SGD(groups, momentum=momentum, nesterov=options.get("nesterov", False))
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return kind(parameters, lr=rate, weight_decay=weight_decay)


def _groups(model: AttachedHead, rate: float, weight_decay: float, factor: float) -> list[dict[str, Any]]:
    """Return the parameter groups: batch norm shifts are a separate group if their learning rate differs."""
    if factor == 1:
        return [{"params": list(model.parameters()), "lr": rate, "weight_decay": weight_decay}]
    shifts = [module.bias for module in model.modules() if isinstance(module, _BATCH_NORM) and module.bias is not None]
    if not shifts:
        raise ValueError("optimizer_options.shift_lr_factor needs batch norm with a shift, but the model has none")
    others = [parameter for parameter in model.parameters() if all(parameter is not shift for shift in shifts)]
    return [
        {"params": others, "lr": rate, "weight_decay": weight_decay},
        {"params": shifts, "lr": factor * rate, "weight_decay": weight_decay / factor},
    ]


def build_schedule(
    config: Optimisation, optimizer: torch.optim.Optimizer, batches: int
) -> lr_scheduler.LRScheduler | None:
    """Return the schedule of the learning rate, stepped after every optimiser step; None without a learning rate.

    Args:
        config: The settings.
        optimizer: The optimiser.
        batches: Number of optimiser steps per epoch.
    """
    if config.schedule is None:
        return None
    steps, options = config.epochs * batches, _value(config.schedule_options)
    if options.get("warmup_epochs"):
        return lr_scheduler.LambdaLR(optimizer, _after_warmup(config, batches))
    if config.schedule == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if config.schedule == "step":
        step_at, factor = options["step_at"], options["lr_factor"]
        if isinstance(step_at, int):
            return lr_scheduler.StepLR(optimizer, step_at * batches, factor)
        return lr_scheduler.MultiStepLR(optimizer, [epoch * batches for epoch in step_at], factor)
    if config.schedule == "one-cycle":
        return lr_scheduler.OneCycleLR(
            optimizer,
            [group["lr"] for group in optimizer.param_groups],
            total_steps=max(steps, 2),
            **{"cycle_momentum": False, **options},
        )
    return lr_scheduler.ConstantLR(optimizer, factor=1.0)


def _after_warmup(config: Optimisation, batches: int) -> Callable[[int], float]:
    """Return the factor of the learning rate at step t: (t+1)/W in the W warm-up steps, then that of the schedule."""
    options = _value(config.schedule_options)
    warmup, steps = options["warmup_epochs"] * batches, config.epochs * batches

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        if config.schedule == "step":
            step_at = options["step_at"]
            if isinstance(step_at, int):
                passed = step // (step_at * batches)
            else:
                passed = sum(step >= epoch * batches for epoch in step_at)
            return float(options["lr_factor"] ** passed)
        return 1.0

    return factor


def _value(setting: _T | None) -> _T:
    """Return a setting that is in force here."""
    assert setting is not None
    return setting


class TrainedModel(nn.Module):
    """Model in training, with the average of its weights if the average is measured in its place.

    Args:
        model: The model.
        average: Share of the steps over which the average is mainly taken; None for no average.

    Attributes:
        model: The model.
        average: Copy of the model with averaged weights, or None.
    """

    def __init__(self, model: AttachedHead, average: float | None = None) -> None:
        super().__init__()
        self.model = model
        self.average = None if average is None else copy.deepcopy(model).requires_grad_(False)
        self._share = average

    @property
    def measured(self) -> AttachedHead:
        """Measured model: the average, if there is one, else the model."""
        return self.model if self.average is None else self.average

    def measured_layers(self, layers: Layers) -> Layers:
        """Return names of modules of the measured model as names in this module; ``"blocks"`` is unchanged."""
        if isinstance(layers, str):
            return layers
        return [f"{'model' if self.average is None else 'average'}.{name}" for name in layers]

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the measured model."""
        logits: Tensor = self.measured(images)
        return logits

    def update_average(self, steps: int) -> None:
        """Move the average towards the model after a step, given the number of preceding steps."""
        if self.average is not None and self._share is not None:
            update_average(self.average, self.model, share=self._share, steps=steps)


@torch.no_grad()
def update_average(average: AttachedHead, model: AttachedHead, *, share: float, steps: int) -> None:
    """Move an average of the weights of a model towards the model, in place.

    After step t, the weight of every earlier step s is proportional to s^(1/share − 1): a share of 1 is the mean of all
    steps, a share of 0.1 is mainly the mean of the last tenth. The running statistics of batch norm, the moving class
    means and the classifiers that follow from them are averaged in the same way. The classifier is then replaced by the
    nearest one that satisfies its constraint: a frame, or rows of unit norm.

    Args:
        average: Copy of the model.
        model: The model after its step.
        share: In (0, 1].
        steps: Number of steps averaged before; with 0, the average becomes equal to the model.

    Source: polynomial-decay averaging of Shamir and Zhang (ICML 2013), with η = 1/share − 1.
    """
    rate = 1 / (share * steps + 1)
    for averaged, current in zip(_averaged_tensors(average), _averaged_tensors(model), strict=True):
        averaged.lerp_(current, rate)
    for copied, current in zip(average.head.buffers(), model.head.buffers(), strict=True):
        if not current.is_floating_point():  # numbers of batches and samples
            copied.copy_(current)
    if isinstance(average.head, LearnedClassifier) and isinstance(model.head, LearnedClassifier):
        average.head.unit_weight = model.head.unit_weight
        if average.head.unit_weight:
            average.head.project_weight()
    _ = average.head.weight  # reading it restores its constraint


def _averaged_tensors(model: AttachedHead) -> list[Tensor]:
    tensors = [*model.parameters(), *model.model.buffers(), *model.head.buffers()]
    return [tensor for tensor in tensors if tensor.is_floating_point()]
