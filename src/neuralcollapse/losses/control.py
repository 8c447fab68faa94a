"""Losses of features alone, which increase or decrease collapse: variability, KoLeo and supervised contrastive loss."""

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

# Added to the distance of nearest neighbours before the logarithm, as in the published regulariser.
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
    r"""Ratio of within-class to between-class variability of the batch, tr S_W / tr S_B, or its logarithm.

    Here tr S_W = mean_k (1/n_k) Σ_{i: y_i=k} ‖h_i − μ_k‖² over the classes with at least two samples in the batch, and
    tr S_B = mean_k ‖μ_k − μ‖² over all classes in the batch, with μ the mean of the class means μ_k. The ratio is NC1
    (`nc1_quotient`) of the batch. Minimising it collapses the features; with ``sign=-1``, its negative is minimised,
    which prevents collapse. It is invariant to scaling and shifting all features.

    The logarithm has no lower bound: near collapse, its gradient grows as 1/‖h_i − μ_k‖, whereas the gradient of the
    ratio vanishes. With sign −1, both are unbounded below: the gradient grows as the class means approach each other,
    and large steps overshoot. To prevent this, use a small weight or ``detach_between=True``, with which only the other
    losses move the class means.

    If no class has two samples, or the batch has a single class, the loss is 0 without gradient; on a CPU a warning is
    given. Memory grows with N².

    Args:
        features: (..., d), floating.
        targets: (...), integers.
        sign: 1: minimising the loss collapses the features; −1: it prevents collapse.
        of: ``"log"`` or ``"ratio"``.
        detach_between: Whether the gradient treats tr S_B as constant, so that only distances within classes change.
        ignore_index: Target of samples that are left out.

    Returns:
        A scalar, computed from the samples of all ranks and equal on all ranks.

    Raises:
        ValueError: if an argument has the wrong shape or type; on a CPU also if features are not finite.

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
        counts = same.sum(1)  # size of the sample's class; 0 for samples that are left out
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

    Up to constants, this is the Kozachenko-Leonenko estimate of the negative entropy of the unit features u. Minimising
    it spreads the features over the sphere, which counteracts collapse. A small constant, 1e-8, is added to distances.
    Samples without a neighbour are left out; if all samples are left out, the loss is 0. Memory grows with N².

    Args:
        features: (..., d), floating.
        targets: (...), integers, used only with ``within_classes`` or ``ignore_index``.
        within_classes: Whether neighbours are restricted to samples of the same class, so that samples spread within
            their class but classes are not pushed apart.
        ignore_index: Target of samples that are left out.

    Returns:
        A scalar, computed from the samples of all ranks and equal on all ranks.

    Raises:
        ValueError: if an argument has the wrong shape or type, or targets are needed and missing; on a CPU also if
            features are not finite.

    Source: Sablayrolles et al., "Spreading vectors for similarity search" (ICLR 2019). Use against collapse: Harun,
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
            # Cosines lose small distances: they determine the neighbour, and the difference gives the distance.
            nearest = (units @ units.T).masked_fill(~candidates, -math.inf).argmax(1)
        distances = row_norms(units - units[nearest])[:, 0]
        has_neighbour = candidates.any(1)
        terms = -(distances + _SMALLEST_DISTANCE).log()
        return terms.where(has_neighbour, 0).sum() / has_neighbour.sum().clamp_min(1)


def supcon(features: Tensor, targets: Tensor, *, temperature: float = 0.1, ignore_index: int | None = None) -> Tensor:
    r"""Supervised contrastive loss: mean_i −1/|P_i| Σ_{p∈P_i} log( e^{u_i·u_p/t} / Σ_{j≠i} e^{u_i·u_j/t} ).

    Here P_i is the set of the other samples of the class of i in the batch. Samples whose class has no other sample are
    left out of the mean. If all samples are left out, the loss is 0, and on a CPU a warning is given. Memory grows with
    N².

    Args:
        features: (..., d), floating.
        targets: (...), integers.
        temperature: t > 0.
        ignore_index: Target of samples that are left out.

    Returns:
        A scalar, computed from the samples of all ranks and equal on all ranks.

    Raises:
        ValueError: if an argument has the wrong shape or type, or the temperature is not positive; on a CPU also if
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
        is_anchor = number > 0  # the sum of an anchor is then not empty
        sums = scores.masked_fill(~others & is_anchor[:, None], -math.inf).logsumexp(1)
        terms = (sums - (positives * scores).sum(1) / number.clamp_min(1)).where(is_anchor, 0)
        _warn_unless(
            is_anchor.any(),
            "supcon is 0 without gradient for this batch: no class has two samples (use larger batches)",
        )
        return terms.sum() / is_anchor.sum().clamp_min(1)


def _gathered(features: Tensor, targets: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the samples of all ranks: features (N, d), whether classes are equal (N, N), and which are counted (N,).

    Samples that are left out have features 0 and do not share a class with any sample.
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
    """Warn about a batch without a defined loss; on accelerators the flag is not read, which avoids a device sync."""
    if defined.device.type == "cpu" and values_readable(defined) and not bool(defined):
        warnings.warn(message, stacklevel=3)
