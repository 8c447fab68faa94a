"""Training of an unconstrained features model, with measurements."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor
from torch.optim import Optimizer

from neuralcollapse._checks import check_at_least
from neuralcollapse.geometry import nearest_simplex_etf
from neuralcollapse.metrics import ClassMoments, nc1_quotient, nc2_etf, nc3_distance, nc3_duality
from neuralcollapse.ufm.model import UnconstrainedFeatures


@dataclass(frozen=True)
class Snapshot:
    """Measurements after an iteration.

    Attributes:
        iteration: Number of steps.
        seconds: Training time since the start in seconds, without measurements.
        values: Values by name; see `measure_unconstrained_features`.
    """

    iteration: int
    seconds: float
    values: dict[str, float]


def train_unconstrained_features(
    model: UnconstrainedFeatures, optimizer: Optimizer, iterations: int, measure_at: Collection[int]
) -> Iterator[Snapshot | None]:
    """Train a model with all samples in every step, and measure it in evaluation mode.

    Args:
        model: The model, trained in place.
        optimizer: Optimiser of the model's parameters.
        iterations: Number of steps.
        measure_at: Iterations after which to measure; 0 is the start.

    Yields:
        The measurements after each iteration, or None.

    Raises:
        ValueError: if ``iterations`` is less than 1, or the objective is not finite.

    Examples:
        >>> from neuralcollapse.heads import NearestETFClassifier
        >>> model = UnconstrainedFeatures(4, 5, 8, NearestETFClassifier(8, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
        >>> snapshots = [s for s in train_unconstrained_features(model, optimizer, 50, {1, 50}) if s]
        >>> [snapshot.iteration for snapshot in snapshots], snapshots[1].values["loss"] < snapshots[0].values["loss"]
        ([1, 50], True)
    """
    check_at_least("iterations", iterations, 1)
    if 0 in measure_at:
        yield Snapshot(0, 0.0, measure_unconstrained_features(model))
    seconds = 0.0
    for iteration in range(1, iterations + 1):
        started = perf_counter()
        model.train()
        optimizer.zero_grad(set_to_none=True)
        objective = model.objective()
        objective.backward()
        optimizer.step()
        seconds += perf_counter() - started
        if iteration not in measure_at:
            yield None
            continue
        if not torch.isfinite(objective):
            raise ValueError(f"training diverged: the objective is not finite at iteration {iteration}")
        yield Snapshot(iteration, seconds, measure_unconstrained_features(model))


@torch.no_grad()
def measure_unconstrained_features(model: UnconstrainedFeatures) -> dict[str, float]:
    """Measure the loss and the collapse of a model in evaluation mode, in fp64.

    The features are the tensor that the weight of the head multiplies. Class means are centred at the mean of all
    samples.

    Args:
        model: The model; its mode is restored.

    Returns:
        ``loss`` (without decay), ``accuracy``, ``nc1_quotient``, ``nc2_etf_means``, ``nc2_etf_weights``,
        ``nc3_duality``, and ``etf_means``, ``etf_weights``: the squared distance to the nearest simplex ETF, with both
        matrices scaled to unit Frobenius norm.

    Examples:
        >>> from neuralcollapse.heads import LearnedClassifier
        >>> model = UnconstrainedFeatures(3, 2, 4, LearnedClassifier(4, 3), weight_decay=0.01, feature_decay=0.01)
        >>> sorted(measure_unconstrained_features(model))[:3]
        ['accuracy', 'etf_means', 'etf_weights']
    """
    training = model.training
    model.eval()
    logits, targets = model()
    features: Tensor = model.head.features(model.features)
    weight = model.head.weight.double()
    loss, accuracy = model.risk(logits.double(), targets), (logits.argmax(1) == targets).double().mean()
    model.train(training)
    moments = ClassMoments(model.num_classes, model.feature_dim, device=features.device)
    moments.update(features, targets)
    means = moments.means - features.double().mean(0)
    values = {
        "loss": loss,
        "accuracy": accuracy,
        "nc1_quotient": nc1_quotient(moments.within_class_trace.sum() / len(targets), means),
        "nc2_etf_means": nc2_etf(means),
        "nc2_etf_weights": nc2_etf(weight),
        "nc3_duality": nc3_duality(weight, means),
        "etf_means": nc3_distance(nearest_simplex_etf(means), means),
        "etf_weights": nc3_distance(nearest_simplex_etf(weight), weight),
    }
    return {name: float(value) for name, value in values.items()}
