"""Losses of features alone, which raise or lower collapse: variability, nearest neighbours, supervised contrast."""

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch
from torch import Tensor

from neuralcollapse._checks import (
    check_bool,
    check_choice,
    check_finite,
    check_floating,
    check_ignore_index,
    check_integers,
    compute_dtype,
    is_number,
    values_readable,
)
from neuralcollapse._distributed import gather_over_ranks
from neuralcollapse.losses.batch import row_norms, unit_rows

# Added to the distance of nearest neighbours, whose logarithm is taken; as in the published regulariser.
_SMALLEST_DISTANCE = 1e-8


def variability(
    features: Tensor,
    targets: Tensor,
    *,
    sign: Literal[1, -1] = 1,
    of: Literal["log", "ratio"] = "log",
    detach_between: bool = False,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Within-class over between-class variability of the batch, tr S_W / tr S_B, or its logarithm.

    tr S_W = mean_k (1/n_k) Σ_{i: y_i=k} ‖h_i − μ_k‖² over the classes with at least two samples in the batch, and
    tr S_B = mean_k ‖μ_k − μ‖² over its classes, with μ the mean of the class means μ_k. It is NC1 (the quotient
    `nc1_quotient`) of the batch. Minimising it collapses the features; with ``sign=-1``, minimising the negative value
    prevents that. It does not change if all features are scaled or shifted.

    The logarithm has no lower bound: near collapse its gradient grows as 1/‖h_i − μ_k‖. The ratio's vanishes there.
    With sign −1 both are unbounded: the gradient grows as the class means meet, and large steps overshoot. A small
    weight or ``detach_between=True``, which leaves the class means to the other losses, prevents that.

    If no class has two samples, or there is one class only, the loss is 0 without gradient; on a CPU a warning is
    given. Memory grows with N².

    Args:
        features: (..., d), floating.
        targets: (...), integers.
        sign: 1: minimising the loss collapses; −1: it prevents collapse.
        of: ``"log"`` or ``"ratio"``.
        detach_between: Whether tr S_B is a constant for the gradient, so that only distances within classes change.
        ignore_index: Target of samples that are left out.

    Returns:
        A scalar: of the samples of all ranks, the same on each.

    Raises:
        ValueError: if an argument has another shape or kind; on a CPU also if features are not finite.

    Examples:
        >>> import torch
        >>> features, targets = torch.tensor([[0.0, 1], [0, -1], [4, 1], [4, -1]]), torch.tensor([0, 0, 1, 1])
        >>> float(variability(features, targets, of="ratio"))  # distances 1 from class means, 2 from their mean
        0.25
        >>> regulariser = variability(features.requires_grad_(), targets, sign=-1)  # against collapse
        >>> regulariser.backward()
    """
    if isinstance(sign, bool) or sign not in (1, -1):
        raise ValueError(f"sign must be 1 (towards collapse) or -1 (against it), got {sign!r}")
    check_choice("of", of, ("log", "ratio"))
    check_bool("detach_between", detach_between)
    rows, same, _ = _gathered(features, targets, ignore_index)
    with torch.autocast(features.device.type, enabled=False):
        counts = same.sum(1)  # of the sample's class; 0 for samples left out
        shares = 1 / counts.clamp_min(1)
        # Sums over classes are sums over samples with weight 1/n_k.
        of_classes = shares.where(counts > 0, 0)
        of_pairs = shares.where(counts > 1, 0)
        means = (same @ rows) * shares[:, None]
        num_classes = of_classes.sum()
        within = (of_pairs * (rows - means).square().sum(1)).sum() / of_pairs.sum().clamp_min(1)
        centre = (of_classes[:, None] * means).sum(0) / num_classes.clamp_min(1)
        between = (of_classes * (means - centre).square().sum(1)).sum() / num_classes.clamp_min(1)
        between = between.detach() if detach_between else between
        defined = (of_pairs.sum() > 0) & (num_classes > 1.5) & (between > 0)
        _warn_unless(
            defined,
            "variability is 0 without gradient for this batch: it needs two classes with different means, one of "
            "them with two samples (use larger batches, or draw several samples of each class)",
        )
        smallest = torch.finfo(within.dtype).tiny
        ratio = within / between.where(defined, 1)
        value = ratio.clamp_min(smallest).log() if of == "log" else ratio
        return sign * value.where(defined, 0)


def koleo(
    features: Tensor,
    targets: Tensor | None = None,
    *,
    within_classes: bool = False,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Negative mean logarithm of the distance to the nearest neighbour (KoLeo): −mean_i log min_{j≠i} ‖u_i − u_j‖.

    It is, up to constants, the Kozachenko-Leonenko estimate of the negative entropy of the unit features u. Minimising
    it spreads them over the sphere, against collapse. A small constant, 1e-8, is added to distances. Samples without
    another one to compare with are left out; if there are none, the loss is 0. Memory grows with N².

    Args:
        features: (..., d), floating.
        targets: (...), integers, for ``within_classes`` and ``ignore_index``; not used otherwise.
        within_classes: Whether neighbours are sought among the samples of the same class only, so that the classes
            themselves are not spread.
        ignore_index: Target of samples that are left out.

    Returns:
        A scalar: of the samples of all ranks, the same on each.

    Raises:
        ValueError: if an argument has another shape or kind, or targets are needed and missing; on a CPU also if
            features are not finite.

    Source: Sablayrolles et al., "Spreading vectors for similarity search" (ICLR 2019). Against neural collapse: Harun,
    Gallardo, Kanan, "Controlling neural collapse enhances out-of-distribution detection and transfer learning"
    (ICML 2025).

    Examples:
        >>> import torch
        >>> square = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
        >>> round(float(koleo(square)), 4)  # −log √2
        -0.3466
    """
    check_bool("within_classes", within_classes)
    if targets is None and (within_classes or ignore_index is not None):
        raise ValueError("targets must be given with within_classes or ignore_index")
    check_floating("features", features)
    labels = features.new_zeros(features.shape[:-1], dtype=torch.int64) if targets is None else targets
    rows, same, counted = _gathered(features, labels, ignore_index)
    if not len(rows):
        return rows.sum()
    with torch.autocast(features.device.type, enabled=False):
        units = unit_rows(rows)
        candidates = same.bool() if within_classes else counted[:, None] & counted[None, :]
        candidates = candidates & ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        with torch.no_grad():
            # Small distances are lost in cosines: they choose the neighbour, and the difference gives the distance.
            nearest = (units @ units.T).masked_fill(~candidates, -math.inf).argmax(1)
        distances = row_norms(units - units[nearest])[:, 0]
        has_neighbour = candidates.any(1)
        terms = -(distances + _SMALLEST_DISTANCE).log()
        return terms.where(has_neighbour, 0).sum() / has_neighbour.sum().clamp_min(1)


def supcon(features: Tensor, targets: Tensor, *, temperature: float = 0.1, ignore_index: int | None = None) -> Tensor:
    r"""Supervised contrastive loss: mean_i −1/|P_i| Σ_{p∈P_i} log( e^{u_i·u_p/t} / Σ_{j≠i} e^{u_i·u_j/t} ).

    P_i are the other samples of the class of i in the batch. Samples whose class has no other sample are left out of
    the mean; if there are none, the loss is 0, and on a CPU a warning is given. Memory grows with N².

    Args:
        features: (..., d), floating.
        targets: (...), integers.
        temperature: t > 0.
        ignore_index: Target of samples that are left out.

    Returns:
        A scalar: of the samples of all ranks, the same on each.

    Raises:
        ValueError: if an argument has another shape or kind, or the temperature is not positive; on a CPU also if
            features are not finite.

    Source: Khosla et al., "Supervised contrastive learning" (NeurIPS 2020), equation 2. Its optimum is a simplex ETF:
    Graf et al., "Dissecting supervised contrastive learning" (ICML 2021).

    Examples:
        >>> import torch
        >>> from neuralcollapse import simplex_etf
        >>> features, targets = simplex_etf(4).repeat(8, 1), torch.arange(4).repeat(8)
        >>> collapsed = supcon(features, targets)
        >>> bool(collapsed < supcon(torch.randn(32, 4), targets))
        True
    """
    if not (is_number(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a positive number, got {temperature!r}")
    rows, same, counted = _gathered(features, targets, ignore_index)
    if not len(rows):
        return rows.sum()
    with torch.autocast(features.device.type, enabled=False):
        units = unit_rows(rows)
        itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        positives = same.masked_fill(itself, 0)
        scores = units @ units.T / temperature
        others = counted[None, :] & ~itself
        number = positives.sum(1)
        is_anchor = number > 0  # and then has another sample in its sum
        sums = scores.masked_fill(~others & is_anchor[:, None], -math.inf).logsumexp(1)
        terms = (sums - (positives * scores).sum(1) / number.clamp_min(1)).where(is_anchor, 0)
        _warn_unless(
            is_anchor.any(),
            "supcon is 0 without gradient for this batch: no class has two samples (use larger batches)",
        )
        return terms.sum() / is_anchor.sum().clamp_min(1)


def _gathered(features: Tensor, targets: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the samples of all ranks: features (N, d), whether two have the same class (N, N), and which count (N,).

    Samples that are left out have features 0 and the class of no sample.
    """
    check_ignore_index(ignore_index)
    check_floating("features", features)
    if features.ndim < 2:
        raise ValueError(f"features must be of shape (..., d), got {tuple(features.shape)}")
    check_integers("targets", targets)
    if targets.shape != features.shape[:-1]:
        raise ValueError(f"targets must be of shape {tuple(features.shape[:-1])}, got {tuple(targets.shape)}")
    rows, labels = features.flatten(0, -2), targets.flatten().long()
    if rows.device.type == "cpu":
        check_finite("features", rows)
    rows = gather_over_ranks(rows.to(compute_dtype(rows.dtype)))
    labels = gather_over_ranks(labels)
    counted = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    rows = rows.where(counted[:, None], 0)
    same = (labels[:, None] == labels[None, :]) & counted[:, None] & counted[None, :]
    return rows, same.to(rows.dtype), counted


def _warn_unless(defined: Tensor, message: str) -> None:
    """Warn of a batch without a value, where reading it does not wait for a device."""
    if defined.device.type == "cpu" and values_readable(defined) and not bool(defined):
        warnings.warn(message, stacklevel=3)
