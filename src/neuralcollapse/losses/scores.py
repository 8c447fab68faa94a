"""Cosines of features and class vectors over a temperature, and what each sample's own is compared with."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from neuralcollapse._checks import (
    check_finite,
    check_floating,
    check_ignore_index,
    check_targets,
    compute_dtype,
    is_number,
    values_readable,
)
from neuralcollapse._distributed import greatest_over_ranks, number_of_ranks, sum_over_ranks

DEFAULT_TEMPERATURE = 0.1


class Batch:
    """Checked features (N, d) and weight (K, d) in at least fp32, and the targets (N,) of the samples that count."""

    def __init__(self, features: Tensor, targets: Tensor, weight: Tensor, ignore_index: int | None) -> None:
        check_ignore_index(ignore_index)
        features, targets = _flat(features, targets, weight, ignore_index)
        self._inputs = {"features": features, "weight": weight}
        self.counted = torch.ones_like(targets, dtype=torch.bool) if ignore_index is None else targets != ignore_index
        self.targets = targets.long().where(self.counted, 0)
        dtype = compute_dtype(features.dtype)
        self.features, self.weight = features.to(dtype), weight.to(dtype)

    def mean(self, terms: Tensor) -> Tensor:
        """The mean over the samples that count, of all ranks; of a rank its share times their number."""
        total, ranks = terms.where(self.counted, 0).sum(), number_of_ranks()
        count = sum_over_ranks(self.counted.sum().to(terms.dtype)).clamp_min(1)
        loss = total * (ranks / count)
        if loss.device.type == "cpu" and values_readable(loss) and not math.isfinite(loss.detach()):
            for name, tensor in self._inputs.items():
                check_finite(name, tensor)
        return loss


class Scores(Batch):
    """The scores s (N, K) of a batch, and what each sample's own is compared with; every term is (N,)."""

    def __init__(
        self, features: Tensor, targets: Tensor, weight: Tensor, temperature: float, ignore_index: int | None
    ) -> None:
        check_temperature(temperature)
        super().__init__(features, targets, weight, ignore_index)
        with torch.autocast(features.device.type, enabled=False):
            self.values = unit_rows(self.features) @ unit_rows(self.weight).T / temperature
            self.own = self.values.gather(1, self.targets[:, None])[:, 0]

    def among_classes(self, margin: float) -> Tensor:
        """log(e^{s_{i,y_i}−m} + Σ_{k≠y_i} e^{s_ik}) − s_{i,y_i}."""
        held_back = self.values.scatter(1, self.targets[:, None], (self.own - margin)[:, None])
        return held_back.logsumexp(1) - self.own

    def among_all_samples(self) -> Tensor:
        """Of logarithms of sums over columns: log Σ_j e^{s_{j,y_i}} − s_{i,y_i}."""
        sums, _ = _log_sum_of_columns(self.values.masked_fill(~self.counted[:, None], -math.inf))
        return sums[self.targets] - self.own

    def among_samples_of_other_classes(self, margin: float, *, and_classes: bool = False) -> Tensor:
        """log(e^{s_{i,y_i}−m} + Σ_{j: y_j≠y_i} e^{s_{j,y_i}}) − s_{i,y_i}; if asked, Σ_{k≠y_i} e^{s_ik} in the sum."""
        others = self.values.scatter(1, self.targets[:, None], -math.inf)
        sums, there = _log_sum_of_columns(others.masked_fill(~self.counted[:, None], -math.inf))
        sums, there = sums[self.targets], there[self.targets]
        if and_classes:
            sums, there = torch.logaddexp(sums, others.logsumexp(1)), torch.ones_like(there)
        if margin < math.inf:
            return torch.logaddexp(self.own - margin, sums) - self.own
        alone = self.counted & ~there
        if alone.device.type == "cpu" and values_readable(alone) and bool(alone.any()):
            warnings.warn(
                "a batch of one class has no samples of other classes: its logarithm is left out of the loss "
                "(more samples in a batch, or a finite margin)",
                stacklevel=3,
            )
        return sums.where(there, 0) - self.own


def _log_sum_of_columns(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithm of the sum of each column's exponentials over all ranks (K,), and whether there is anything to sum.

    Where all scores are −∞ it is −∞, with a gradient of 0.
    """
    rows = scores if len(scores) else scores.new_full((1, scores.shape[1]), -math.inf)
    greatest = greatest_over_ranks(rows.amax(0))
    there = greatest != -math.inf  # NaN is passed on
    greatest = greatest.where(there, 0)
    sums = sum_over_ranks((scores - greatest).exp().sum(0))
    return (greatest + sums.where(there, 1).log()).where(there, -math.inf), there


def row_norms(rows: Tensor) -> Tensor:
    """Norms of rows, (..., 1), right also where squares overflow or vanish."""
    peaks = rows.detach().abs().amax(-1, keepdim=True)
    peaks = peaks.where(peaks > 0, 1)
    return peaks * torch.linalg.vector_norm(rows / peaks, dim=-1, keepdim=True)


def unit_rows(rows: Tensor) -> Tensor:
    """Rows of norm 1; zero rows stay zero."""
    norms = row_norms(rows)
    return rows / norms.where(norms > 0, 1)


def _flat(features: Tensor, targets: Tensor, weight: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Features (N, d) and targets (N,), checked with the weight."""
    check_floating("weight", weight)
    if weight.ndim != 2 or weight.shape[0] < 2:
        raise ValueError(f"weight must be of shape (K, d) with K at least 2, got {tuple(weight.shape)}")
    check_floating("features", features)
    if features.ndim < 2 or features.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"features must be of shape (..., {weight.shape[1]}), as weight {tuple(weight.shape)} is, "
            f"got {tuple(features.shape)}"
        )
    if isinstance(targets, Tensor) and targets.shape != features.shape[:-1]:
        raise ValueError(f"targets must be of shape {tuple(features.shape[:-1])}, got {tuple(targets.shape)}")
    features, targets = features.flatten(0, -2), targets.flatten() if isinstance(targets, Tensor) else targets
    readable = features.device.type == "cpu"  # elsewhere, reading a value would wait for the device at every step
    check_targets(targets, len(features), len(weight), values=readable, ignore_index=ignore_index)
    return features, targets


def check_temperature(temperature: float) -> None:
    """Raise unless it is a positive number."""
    if not (is_number(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a positive number, got {temperature!r}")


def check_margin(margin: float) -> None:
    """Raise unless it is at least 0."""
    if not ((is_number(margin) and margin >= 0) or margin == math.inf):
        raise ValueError(f"margin must be at least 0 (math.inf included), got {margin!r}")
