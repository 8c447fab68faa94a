"""Validated batches of features and targets, means over their samples, and rows of unit norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neuralcollapse._checks import (
    check_finite,
    check_floating,
    check_ignore_index,
    check_not_negative,
    check_targets,
    compute_dtype,
    values_readable,
)
from neuralcollapse._distributed import number_of_ranks, sum_over_ranks


class Batch:
    """Validated features (N, d) and weight (K, d) in at least fp32, targets (N,), and the weight of each sample.

    Attributes:
        counted: (N,), whether each sample is counted.
        class_weights: (K,), or None.
    """

    def __init__(
        self,
        features: Tensor,
        targets: Tensor,
        weight: Tensor,
        ignore_index: int | None,
        class_weights: Tensor | None = None,
    ) -> None:
        check_ignore_index(ignore_index)
        features, targets = _flatten(features, targets, weight, ignore_index)
        self._inputs = {"features": features, "weight": weight}
        self.counted = torch.ones_like(targets, dtype=torch.bool) if ignore_index is None else targets != ignore_index
        self.targets = targets.long().where(self.counted, 0)
        dtype = compute_dtype(features.dtype)
        self.features, self.weight = features.to(dtype), weight.to(dtype)
        self.class_weights = None
        if class_weights is not None:
            check_class_values("class_weights", class_weights, len(weight))
            self.class_weights = class_weights.detach().to(self.features)

    def mean(self, terms: Tensor) -> Tensor:
        """Return the weighted mean of terms (N,) over the counted samples, or 0 if no sample is counted.

        With several ranks, the result is the rank's share of the mean times the number of ranks.
        """
        counted, ranks = self.counted.to(terms.dtype), number_of_ranks()
        if self.class_weights is not None:
            counted = counted * self.class_weights[self.targets]
        total = (terms if self.class_weights is None else terms * counted).where(counted > 0, 0).sum()
        count = sum_over_ranks(counted.sum())
        loss = total * (ranks / count.where(count > 0, 1))
        if loss.device.type == "cpu" and values_readable(loss) and not math.isfinite(loss.detach()):
            for name, tensor in self._inputs.items():
                check_finite(name, tensor)
        return loss


def row_norms(rows: Tensor) -> Tensor:
    """Return the norms of rows, (..., 1), which are exact even if squares overflow or underflow."""
    peaks = rows.detach().abs().amax(-1, keepdim=True)
    peaks = peaks.where(peaks > 0, 1)
    return peaks * torch.linalg.vector_norm(rows / peaks, dim=-1, keepdim=True)


def unit_rows(rows: Tensor) -> Tensor:
    """Return rows scaled to norm 1; zero rows stay zero."""
    norms = row_norms(rows)
    return rows / norms.where(norms > 0, 1)


def _flatten(features: Tensor, targets: Tensor, weight: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Check the arguments, and return features as (N, d) and targets as (N,)."""
    check_floating("weight", weight)
    if weight.ndim != 2 or weight.shape[0] < 2:
        raise ValueError(f"weight must be of shape (K, d) with K at least 2, got {tuple(weight.shape)}")
    check_floating("features", features)
    if features.ndim < 2 or features.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"features must be of shape (..., {weight.shape[1]}), to fit weight {tuple(weight.shape)}, "
            f"got {tuple(features.shape)}"
        )
    if isinstance(targets, Tensor) and targets.shape != features.shape[:-1]:
        raise ValueError(f"targets must be of shape {tuple(features.shape[:-1])}, got {tuple(targets.shape)}")
    features, targets = features.flatten(0, -2), targets.flatten() if isinstance(targets, Tensor) else targets
    readable = features.device.type == "cpu"
    check_targets(targets, len(features), len(weight), values=readable, ignore_index=ignore_index)
    return features, targets


def check_class_values(name: str, values: Tensor, num_classes: int, *, positive: bool = False) -> None:
    """Raise unless the argument has (K,) finite values that are at least 0 and not all 0, or that are positive."""
    if not positive or name != "prior":
        check_floating(name, values)
    elif not isinstance(values, Tensor) or values.dtype == torch.bool or values.is_complex():
        raise ValueError(f"{name} must be a tensor of frequencies or counts, got {type(values).__name__}")
    if values.shape != (num_classes,):
        raise ValueError(f"{name} must be of shape ({num_classes},), got {tuple(values.shape)}")
    if values.device.type != "cpu" or not values_readable(values):
        return
    check_finite(name, values)
    smallest = float(values.min())
    if positive and smallest <= 0:
        hint = "; a class without samples needs a positive count, such as 1" if name == "prior" else ""
        raise ValueError(f"{name} must be positive, got {smallest} for class {int(values.argmin())}{hint}")
    if smallest < 0 or not bool((values > 0).any()):
        raise ValueError(f"{name} must be at least 0 and not all 0, got {'all 0' if smallest == 0 else smallest}")


def log_prior(prior: Tensor | None, prior_scale: float, like: Tensor, num_classes: int) -> Tensor | None:
    """Return τ log π (K,) in the dtype and on the device of a tensor, or None without a prior."""
    check_not_negative("prior_scale", prior_scale)
    if prior is None:
        if prior_scale != 1:
            raise ValueError(f"prior_scale must not be given without prior, got {prior_scale!r}")
        return None
    check_class_values("prior", prior, num_classes, positive=True)
    logarithms = prior.detach().double().log() if like.device.type == "cpu" else prior.detach().to(like).log()
    return (prior_scale * (logarithms - logarithms.logsumexp(0))).to(like)
