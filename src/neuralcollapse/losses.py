"""Losses of directions alone: features and class vectors on the unit sphere, at a temperature.

With u_i = h_i/‖h_i‖, ŵ_k = w_k/‖w_k‖ and s_ik = u_i·ŵ_k/t, a sample is told from the other classes by its row of s, and
a class vector from the other samples by its column. Rows and columns give the losses here; none has a bias.

All take features (..., d), targets (...) and a weight (K, d): what `Head.prepare` gives (without its bias), an
``nn.Linear``'s, or any other. They are computed in at least fp32, under autocast and for low-precision input as well,
and their value is of the precision they are computed in.

Under ``torch.distributed`` the batch is that of all ranks of the default process group, whatever its split: columns
are summed over the ranks, with gradient. Each rank's value is its share of the loss times the number of ranks, so that
the mean over ranks is the loss of the whole batch, and the mean of the gradients, which is what
DistributedDataParallel takes, is its gradient.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from neuralcollapse._checks import (
    check_finite,
    check_floating,
    check_ignore_index,
    check_targets,
    compute_dtype,
    is_number,
    values_readable,
)
from neuralcollapse._ranks import greatest_over_ranks, number_of_ranks, sum_over_ranks

DEFAULT_TEMPERATURE = 0.1


def normface(
    features: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    temperature: float = DEFAULT_TEMPERATURE,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Cross-entropy of cosines (NormFace): mean_i [ log Σ_k e^{s_ik} − s_{i,y_i} ].

    Args:
        features: h (..., d).
        targets: y (...), integers in [0, K) or ``ignore_index``.
        weight: (K, d).
        temperature: t > 0.
        ignore_index: Samples with this target count nowhere.

    Returns:
        A scalar; 0 where no sample counts.

    Raises:
        ValueError: A temperature that is not positive, or tensors of other shapes or kinds; on a CPU also labels out of
            range, and features or a weight that are not finite.

    Source: Wang, Xiang, Cheng, Yuille, "NormFace" (ACM Multimedia 2017).

    Example:
        >>> from neuralcollapse import simplex_etf
        >>> etf = simplex_etf(4)
        >>> round(float(normface(etf, torch.arange(4), etf)), 6)
        5e-06
    """
    return decoupled_cross_entropy(
        features, targets, weight, temperature=temperature, margin=0.0, ignore_index=ignore_index
    )


def decoupled_cross_entropy(
    features: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    temperature: float = DEFAULT_TEMPERATURE,
    margin: float = math.inf,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Cross-entropy of cosines, the positive held back by a margin.

    mean_i [ log(e^{s_{i,y_i}−m} + Σ_{k≠y_i} e^{s_ik}) − s_{i,y_i} ], CosFace's loss less the constant m. At m = 0 it is
    `normface`; at m = ∞ the positive has left the denominator.

    Args:
        features: h (..., d).
        targets: y (...), integers in [0, K) or ``ignore_index``.
        weight: (K, d).
        temperature: t > 0.
        margin: m ≥ 0, ``math.inf`` included, in units of s: 1/t times a margin of cosines.
        ignore_index: Samples with this target count nowhere.

    Returns:
        A scalar; 0 where no sample counts.

    Raises:
        ValueError: As `normface`; or a margin that is negative.

    Source: Wang et al., "CosFace" (CVPR 2018); Yeh et al., "Decoupled contrastive learning" (ECCV 2022) for m = ∞.

    Example:
        >>> from neuralcollapse import simplex_etf
        >>> etf = simplex_etf(4)
        >>> loss = decoupled_cross_entropy(etf, torch.arange(4), etf)  # log 3 − K/((K−1)t)
        >>> round(float(loss), 3)
        -12.235
    """
    scores = _Scores(features, targets, weight, temperature, ignore_index)
    _check_margin(margin)
    return scores.mean(scores.among_classes(margin))


def ntce(
    features: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    temperature: float = DEFAULT_TEMPERATURE,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Cross-entropy over the samples of the batch: mean_i [ log Σ_j e^{s_{j,y_i}} − s_{i,y_i} ].

    The sum is over all samples j, those of the same class included: with n of each class it is at least log n.

    Args:
        features: h (..., d).
        targets: y (...), integers in [0, K) or ``ignore_index``.
        weight: (K, d).
        temperature: t > 0.
        ignore_index: Samples with this target count nowhere.

    Returns:
        A scalar; 0 where no sample counts.

    Raises:
        ValueError: As `normface`.

    Source: NTCE of Koromilas et al., "Neural Collapse by Design" (ICML 2026), arXiv 2605.20302.

    Example:
        >>> from neuralcollapse import simplex_etf
        >>> etf = simplex_etf(4)
        >>> batch = etf.repeat(8, 1), torch.arange(4).repeat(8)
        >>> float(ntce(*batch, etf)) - math.log(8) < 1e-4
        True
    """
    scores = _Scores(features, targets, weight, temperature, ignore_index)
    return scores.mean(scores.among_all_samples())


def nonl(
    features: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    temperature: float = DEFAULT_TEMPERATURE,
    margin: float = math.inf,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Each sample against the batch's samples of other classes, for the vector of its class.

    mean_i [ log(e^{s_{i,y_i}−m} + Σ_{j: y_j≠y_i} e^{s_{j,y_i}}) − s_{i,y_i} ]. In the published loss m = ∞: the
    positive is not in the denominator. There, a batch of one class has nothing to sum over: the logarithm is left out,
    and on a CPU a warning says so.

    Args:
        features: h (..., d).
        targets: y (...), integers in [0, K) or ``ignore_index``.
        weight: (K, d).
        temperature: t > 0.
        margin: m ≥ 0, ``math.inf`` included, in units of s.
        ignore_index: Samples with this target count nowhere.

    Returns:
        A scalar; 0 where no sample counts.

    Raises:
        ValueError: As `normface`; or a margin that is negative.

    Source: NONL of Koromilas et al., "Neural Collapse by Design" (ICML 2026), arXiv 2605.20302.

    Example:
        >>> from neuralcollapse import simplex_etf
        >>> etf = simplex_etf(4)
        >>> round(float(nonl(etf, torch.arange(4), etf)), 3)
        -12.235
    """
    scores = _Scores(features, targets, weight, temperature, ignore_index)
    _check_margin(margin)
    return scores.mean(scores.among_samples_of_other_classes(margin))


def two_way(
    features: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    temperature: float = DEFAULT_TEMPERATURE,
    margin: float = math.inf,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Half `decoupled_cross_entropy` and half `nonl`, of one margin: rows and columns alike.

    Args:
        features: h (..., d).
        targets: y (...), integers in [0, K) or ``ignore_index``.
        weight: (K, d).
        temperature: t > 0.
        margin: m ≥ 0, ``math.inf`` included, in units of s.
        ignore_index: Samples with this target count nowhere.

    Returns:
        A scalar; 0 where no sample counts.

    Raises:
        ValueError: As `normface`; or a margin that is negative.

    Example:
        >>> from neuralcollapse import NearestETFClassifier
        >>> head = NearestETFClassifier(64, 10, bias="none")
        >>> features, targets = torch.randn(32, 64, requires_grad=True), torch.randint(10, (32,))
        >>> prepared, weight, _ = head.prepare(features, targets)
        >>> two_way(prepared, targets, weight, margin=3.0).backward()
    """
    scores = _Scores(features, targets, weight, temperature, ignore_index)
    _check_margin(margin)
    rows, columns = scores.among_classes(margin), scores.among_samples_of_other_classes(margin)
    return scores.mean(0.5 * (rows + columns))


class _Scores:
    """The scores s (N, K) of a batch, and what each sample's own is compared with; every term is (N,)."""

    def __init__(
        self, features: Tensor, targets: Tensor, weight: Tensor, temperature: float, ignore_index: int | None
    ) -> None:
        _check_temperature(temperature)
        check_ignore_index(ignore_index)
        features, targets = _flat(features, targets, weight, ignore_index)
        self._inputs = {"features": features, "weight": weight}
        self.counted = torch.ones_like(targets, dtype=torch.bool) if ignore_index is None else targets != ignore_index
        self.targets = targets.long().where(self.counted, 0)
        dtype = compute_dtype(features.dtype)
        with torch.autocast(features.device.type, enabled=False):
            self.values = _unit_rows(features.to(dtype)) @ _unit_rows(weight.to(dtype)).T / temperature
            self.own = self.values.gather(1, self.targets[:, None])[:, 0]

    def among_classes(self, margin: float) -> Tensor:
        """log(e^{s_{i,y_i}−m} + Σ_{k≠y_i} e^{s_ik}) − s_{i,y_i}."""
        held_back = self.values.scatter(1, self.targets[:, None], (self.own - margin)[:, None])
        return held_back.logsumexp(1) - self.own

    def among_all_samples(self) -> Tensor:
        """Of logarithms of sums over columns: log Σ_j e^{s_{j,y_i}} − s_{i,y_i}."""
        sums, _ = _log_sum_of_columns(self.values.masked_fill(~self.counted[:, None], -math.inf))
        return sums[self.targets] - self.own

    def among_samples_of_other_classes(self, margin: float) -> Tensor:
        """log(e^{s_{i,y_i}−m} + Σ_{j: y_j≠y_i} e^{s_{j,y_i}}) − s_{i,y_i}."""
        others = self.values.scatter(1, self.targets[:, None], -math.inf)
        sums, there = _log_sum_of_columns(others.masked_fill(~self.counted[:, None], -math.inf))
        sums, there = sums[self.targets], there[self.targets]
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

    def mean(self, terms: Tensor) -> Tensor:
        """The mean over the samples that count, of all ranks; of a rank its share times their number."""
        total, ranks = terms.where(self.counted, 0).sum(), number_of_ranks()
        count = sum_over_ranks(self.counted.sum().to(terms.dtype)).clamp_min(1)
        loss = total * (ranks / count)
        if loss.device.type == "cpu" and values_readable(loss) and not math.isfinite(loss.detach()):
            for name, tensor in self._inputs.items():
                check_finite(name, tensor)
        return loss


def _log_sum_of_columns(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithm of the sum of each column's exponentials over all ranks (K,), and whether there is anything to sum.

    Where all scores are −∞ it is −∞, with a gradient of 0.
    """
    rows = scores if len(scores) else scores.new_full((1, scores.shape[1]), -math.inf)
    greatest = greatest_over_ranks(rows.amax(0))
    there = greatest > -math.inf
    greatest = greatest.where(there, 0)
    sums = sum_over_ranks((scores - greatest).exp().sum(0))
    return (greatest + sums.where(there, 1).log()).where(there, -math.inf), there


def _unit_rows(rows: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
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


def _check_temperature(temperature: float) -> None:
    if not (is_number(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a positive number, got {temperature!r}")


def _check_margin(margin: float) -> None:
    if not ((is_number(margin) and margin >= 0) or margin == math.inf):
        raise ValueError(f"margin must be at least 0 (math.inf included), got {margin!r}")


class _Loss(nn.Module):
    """A loss with its settings."""

    def __init__(self, *, temperature: float = DEFAULT_TEMPERATURE, ignore_index: int | None = None) -> None:
        super().__init__()
        _check_temperature(temperature)
        check_ignore_index(ignore_index)
        self.settings: dict[str, Any] = {"temperature": temperature, "ignore_index": ignore_index}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings.items() if value is not None)


class _LossWithMargin(_Loss):
    def __init__(
        self,
        *,
        temperature: float = DEFAULT_TEMPERATURE,
        margin: float = math.inf,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(temperature=temperature, ignore_index=ignore_index)
        _check_margin(margin)
        self.settings["margin"] = margin


class NormFaceLoss(_Loss):
    """`normface` as a module: ``forward(features, targets, weight)``."""

    def forward(self, features: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        return normface(features, targets, weight, **self.settings)


class NTCELoss(_Loss):
    """`ntce` as a module: ``forward(features, targets, weight)``."""

    def forward(self, features: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        return ntce(features, targets, weight, **self.settings)


class NONLLoss(_LossWithMargin):
    """`nonl` as a module: ``forward(features, targets, weight)``."""

    def forward(self, features: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        return nonl(features, targets, weight, **self.settings)


class DecoupledCrossEntropyLoss(_LossWithMargin):
    """`decoupled_cross_entropy` as a module: ``forward(features, targets, weight)``."""

    def forward(self, features: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        return decoupled_cross_entropy(features, targets, weight, **self.settings)


class TwoWayLoss(_LossWithMargin):
    """`two_way` as a module: ``forward(features, targets, weight)``.

    Example:
        >>> from neuralcollapse import LearnedClassifier
        >>> head, loss = LearnedClassifier(64, 10), TwoWayLoss(margin=3.0)
        >>> features, targets = torch.randn(32, 64, requires_grad=True), torch.randint(10, (32,))
        >>> loss(features, targets, head.weight).backward()
    """

    def forward(self, features: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        return two_way(features, targets, weight, **self.settings)
