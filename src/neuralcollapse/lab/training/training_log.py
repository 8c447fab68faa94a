"""The log of a run: training metrics of each epoch, and the sizes of its gradients."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from neuralcollapse.lab.training.agd import AGD
from neuralcollapse.lab.training.objective import Objective


@dataclass
class EpochLog:
    """Training metrics of an epoch so far, weighted by samples, and the time that it took without measuring.

    Attributes:
        lr: Learning rate at its beginning; NaN for AGD, which has none.
        samples: Number of samples; those of a batch that overflowed and was skipped do not count.
        sums: Sum of each metric.
        eta: Sum of the steps η of AGD.
        steps: Number of these.
        seconds: Time before training resumed inside the epoch.
    """

    lr: float
    samples: int | Tensor = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    eta: float | Tensor = 0.0
    steps: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._started = time.perf_counter() - self.seconds

    def add(self, metrics: dict[str, Tensor], samples: int | Tensor, optimizer: Optimizer, *, skips: bool) -> None:
        """Add a batch; if steps that overflow are skipped, only where its loss is finite."""
        if skips:
            samples = samples * metrics["batch_loss"].isfinite()
            metrics = {name: torch.where(samples > 0, value, 0.0) for name, value in metrics.items()}
        self.samples += samples
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + samples * value
        if isinstance(optimizer, AGD) and optimizer.eta is not None:
            self.eta += optimizer.eta
            self.steps += 1

    def end(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return the metrics, and the row of the training log; this waits for the device."""
        metrics = {name: float(total / self.samples) for name, total in self.sums.items()}
        row = {"seconds": time.perf_counter() - self._started, **metrics}
        return metrics, row | ({"agd_eta": float(self.eta / self.steps)} if self.steps else {"lr": self.lr})

    def state(self) -> dict[str, Any]:
        """Return the fields, to save."""
        state = {name: value for name, value in vars(self).items() if name != "_started"}
        return state | {"seconds": time.perf_counter() - self._started}


def gradient_sizes(objective: Objective, scale: float = 1.0) -> list[dict[str, Any]]:
    """Return the size of each gradient after a backward pass: mean and largest magnitude, and norm.

    They are of the parameters; and of the features, class means, weight and bias that a head makes of a batch, where
    they are not parameters and their gradients are kept.

    Args:
        objective: The objective.
        scale: Factor by which a gradient scaler multiplied the loss.
    """
    gradients = {name: parameter.grad for name, parameter in objective.model.named_parameters()}
    for name, tensor in objective.head_tensors.items():
        gradients[f"head.{name}"] = None if tensor.grad is None else tensor.grad.float()
    rows = []
    for name, gradient in gradients.items():
        if gradient is not None:
            size = (gradient / scale).abs()
            sizes = torch.stack([size.mean(), size.max(), torch.linalg.vector_norm(size)]).tolist()
            rows.append({"parameter": name, **dict(zip(("mean", "max", "norm"), sizes, strict=True))})
    return rows
