"""The optimiser of a run, and the schedule of its learning rate."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import lr_scheduler

from neuralcollapse.heads import AttachedHead, LearnedClassifier, NearestETFClassifier, project_after_step
from neuralcollapse.lab.config import Optimisation, RunConfig
from neuralcollapse.lab.seeds import derived_seed
from neuralcollapse.lab.training.agd import AGD, orthogonal_start

# Beside a run's seed, this one gives the seed of first weights that the optimiser asks for.
_START = 2


def build_optimizer(config: RunConfig, model: AttachedHead) -> torch.optim.Optimizer:
    """The optimiser of all parameters; it keeps the rows of a unit weight at unit norm.

    AGD asks for first weights of its own, which the model is given; they follow from the seed.

    Raises:
        ValueError: The optimiser cannot train this model.
    """
    if config.feature_decay and not config.published_quirk and model.head.feature_norm is not None:
        raise ValueError("feature_decay needs feature_norm none: of normalised features it is a constant")
    optimizer = _optimizer(config, model)
    if config.optimizer == "agd":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(config.seed, _START))
            orthogonal_start(model)
        if isinstance(model.head, LearnedClassifier) and model.head.unit_weight:
            model.head.project_weight()
    if isinstance(model.head, LearnedClassifier) and model.head.unit_weight:
        project_after_step(optimizer, model.head)
    return optimizer


def _optimizer(config: Optimisation, model: AttachedHead) -> torch.optim.Optimizer:
    if config.optimizer == "agd":
        try:
            return AGD(model.named_parameters(), gain=config.gain)
        except ValueError as error:
            raise ValueError(f"{error} (batch_norm_affine false, classifier_bias centring or none)") from error
    parameters = model.parameters()
    if config.optimizer == "lbfgs":
        if isinstance(model.head, NearestETFClassifier):
            raise ValueError(
                "optimizer lbfgs cannot train the method implicit, whose ETF would move under its line search: "
                "take method fixed or standard, or another optimiser"
            )
        if isinstance(model.head, LearnedClassifier) and model.head.unit_weight:
            raise ValueError("optimizer lbfgs needs unit_weight false: it cannot keep the rows at unit norm")
        return torch.optim.LBFGS(
            parameters,
            lr=config.lr,
            max_iter=config.lbfgs_iterations,
            history_size=config.lbfgs_history,
            line_search_fn="strong_wolfe",
        )
    # With a feature decay, the weight decay is part of the loss.
    weight_decay = config.weight_decay if config.feature_decay is None else 0.0
    rates: dict[str, Any] = {"lr": config.lr, "weight_decay": weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=config.momentum, **rates)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer](parameters, **rates)


def build_schedule(
    config: Optimisation, optimizer: torch.optim.Optimizer, batches: int
) -> lr_scheduler.LRScheduler | None:
    """The schedule of the learning rate, stepped after every batch; None for an optimiser that has no rate.

    Args:
        config: The settings.
        optimizer: Theirs.
        batches: In an epoch.
    """
    if config.optimizer == "agd":
        return None
    steps = config.epochs * batches
    if config.schedule == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if config.schedule == "step":
        return lr_scheduler.StepLR(optimizer, config.step_epochs * batches, config.lr_factor)
    if config.schedule == "multistep":
        milestones = [epoch * batches for epoch in _milestones(config)]
        return lr_scheduler.MultiStepLR(optimizer, milestones, config.lr_factor)
    if config.schedule == "one-cycle":
        # Momentum stays, as the settings say.
        return lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=max(steps, 2), cycle_momentum=False)
    return lr_scheduler.ConstantLR(optimizer, factor=1.0)


def _milestones(config: Optimisation) -> list[int]:
    """Epochs after which `multistep` multiplies the rate: one and two thirds of them, if the settings name none."""
    if config.milestones is not None:
        return config.milestones
    return sorted({config.epochs // 3, 2 * config.epochs // 3} - {0})
