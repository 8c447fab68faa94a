"""Training free features: the published experiments on the unconstrained features model."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from neuralcollapse.heads import (
    FixedETFClassifier,
    Head,
    LearnedClassifier,
    NearestETFClassifier,
    collapse_radius,
)
from neuralcollapse.lab.config import PublishedMethod
from neuralcollapse.lab.seeds import derived_seed
from neuralcollapse.lab.training.agd import AGD, orthogonal_start
from neuralcollapse.ufm import UnconstrainedFeatures, train_unconstrained_features

OptimizerName = Literal["sgd", "agd"]
_MOMENTUM = 0.9
# Published (δ = 1e-3 of formulas §1), as the proximal weight of an ETF of K classes: δ(K−1)/2. Every batch is all the
# data, so that the class means are its own.
_PROXIMAL_WEIGHT, _MEANS_MOMENTUM = 1e-3, 1.0


@dataclass(frozen=True)
class FreeRun:
    """One run of free features under the head of a method.

    Attributes:
        method: standard, fixed or implicit.
        optimizer: sgd (momentum 0.9) or agd.
        num_classes: K.
        samples_per_class: n.
        feature_dim: d.
        feature_norm: τ.
        seed: From which the first features and weights follow, the same for every method and rate.
    """

    method: PublishedMethod
    optimizer: OptimizerName
    num_classes: int
    samples_per_class: int
    feature_dim: int
    feature_norm: float
    seed: int


def feature_radius(feature_norm: float | Literal["auto"], num_classes: int) -> float:
    """τ, where it follows from the number of classes."""
    return collapse_radius(num_classes) if feature_norm == "auto" else float(feature_norm)


def least_loss(run: FreeRun) -> float:
    """The least cross-entropy with features of norm τ and unit rows: at collapse, log(1 + (K−1) e^(−τK/(K−1))).

    Examples:
        >>> round(least_loss(FreeRun("fixed", "sgd", 10, 5, 16, 5.0, 0)), 4)
        0.0342
    """
    others = run.num_classes - 1
    return math.log1p(others * math.exp(-run.feature_norm * run.num_classes / others))


def train_run(
    run: FreeRun, rate: float, iterations: int, measure_at: Collection[int], after_step: Callable[[], Any] = int
) -> list[dict[str, Any]]:
    """Train one run, and return what was measured: iteration, metric, value.

    Args:
        run: What to train.
        rate: The learning rate of sgd (a feature moves by it times the gradient of its own sample's loss, a class's
            weight by it times that of its own samples' mean loss), or the gain of agd.
        iterations: Steps, each of all samples.
        measure_at: After which to measure.
        after_step: Called after each.

    Raises:
        ValueError: Training diverged, or sizes that do not fit.
    """
    model = _model(run)
    optimizer = _optimizer(run, model, rate)
    rows = []
    for snapshot in train_unconstrained_features(model, optimizer, iterations, measure_at):
        after_step()
        if snapshot is not None:
            values = snapshot.values | {"excess_loss": snapshot.values["loss"] - least_loss(run)}
            values |= {"seconds": snapshot.seconds}
            rows += [
                {"iteration": snapshot.iteration, "metric": name, "value": value} for name, value in values.items()
            ]
    return rows


def loss_after(run: FreeRun, rate: float, iterations: int, after_step: Callable[[], Any] = int) -> float:
    """The excess loss of a run after so many iterations; infinite if it diverges."""
    try:
        rows = train_run(run, rate, iterations, {iterations}, after_step)
    except ValueError as error:
        if "diverged" not in str(error):
            raise
        return math.inf
    return next(float(row["value"]) for row in rows if row["metric"] == "excess_loss")


def _model(run: FreeRun) -> UnconstrainedFeatures:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(run.seed, 0))
        model = UnconstrainedFeatures(
            run.num_classes,
            run.samples_per_class,
            run.feature_dim,
            _head(run),
            generator=torch.Generator().manual_seed(derived_seed(run.seed, 1)),
        )
        if run.optimizer == "agd":
            torch.manual_seed(derived_seed(run.seed, 2))
            orthogonal_start(model)  # features come first, the same whatever the head
    if isinstance(model.head, LearnedClassifier):
        model.head.project_weight()
    return model


def _head(run: FreeRun) -> Head:
    sizes = (run.feature_dim, run.num_classes)
    if run.method == "standard":
        return LearnedClassifier(*sizes, bias=False, feature_norm=run.feature_norm, unit_weight=True)
    if run.method == "fixed":
        # As published. Free features reach every orientation alike.
        return FixedETFClassifier(
            *sizes, orientation="canonical", feature_norm=run.feature_norm, momentum=_MEANS_MOMENTUM
        )
    return NearestETFClassifier(
        *sizes,
        feature_norm=run.feature_norm,
        momentum=_MEANS_MOMENTUM,
        proximal_weight=0.5 * _PROXIMAL_WEIGHT * (run.num_classes - 1),
    )


def _optimizer(run: FreeRun, model: UnconstrainedFeatures, rate: float) -> Optimizer:
    weights = list(model.head.parameters())
    if run.optimizer == "agd":
        return AGD([model.features, *weights], gain=rate)
    # The mean loss gives each sample 1/N of the gradient, and each class 1/K.
    groups = [{"params": [model.features], "lr": rate * len(model.targets)}]
    groups += [{"params": weights, "lr": rate * run.num_classes}] if weights else []
    return torch.optim.SGD(groups, momentum=_MOMENTUM)
