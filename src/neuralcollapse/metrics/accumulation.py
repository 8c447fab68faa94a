"""How a batch enters class moments: grouped by class, its deviations taken, their products added."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from neuralcollapse._checks import check_floating, check_integers
from neuralcollapse.metrics.scaling import power_of_two

_STRIP = 192  # width of the strips in which a symmetric product is formed


class Workspace:
    """Memory for temporaries that outlives an update: on a CPU, fresh pages can cost more than the arithmetic on them.

    Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def __reduce__(self) -> tuple[type[Workspace], tuple[()]]:
        return Workspace, ()

    def take(self, shape: Sequence[int], like: Tensor, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor of this shape, on the device and by default of the dtype of another."""
        dtype = like.dtype if dtype is None else dtype
        if like.device.type != "cpu":  # accelerators keep freed memory themselves
            return torch.empty(*shape, dtype=dtype, device=like.device)
        size, name = math.prod(shape), f"{name} {dtype}"
        if name not in self._buffers or len(self._buffers[name]) < size:
            self._buffers[name] = torch.empty(size, dtype=dtype)
        return self._buffers[name][:size].view(*shape)


def flat_batch(
    features: Tensor, targets: Tensor, feature_dim: int, device: torch.device, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    """Features (N, d) and targets (N,) on the device, of which none is to be ignored; their shapes checked."""
    check_floating("features", features)
    if features.ndim < 2 or features.shape[-1] != feature_dim:
        raise ValueError(f"features must be of shape (N, {feature_dim}), got {tuple(features.shape)}")
    if not isinstance(targets, Tensor) or targets.shape != features.shape[:-1]:
        got = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(f"targets must be a tensor of shape {tuple(features.shape[:-1])}, got {got}")
    check_integers("targets", targets)
    # Compared as they are, labels of uint8 would take -100 for 156.
    features, targets = features.reshape(-1, feature_dim).to(device), targets.reshape(-1).to(device, torch.int64)
    if ignore_index is None:
        return features, targets
    kept = targets != ignore_index
    return features[kept], targets[kept]


class Group(NamedTuple):
    """The classes to look at (P,), each sample's place among them (N,), and how many samples each has (P,)."""

    present: Tensor
    members: Tensor
    counts: Tensor


def group_by_class(targets: Tensor, num_classes: int) -> Group:
    """The classes that are present; on an accelerator all, since which are present is known to the device alone."""
    if targets.device.type != "cpu":
        counts = torch.zeros(num_classes, dtype=torch.int64, device=targets.device)
        counts.index_add_(0, targets, torch.ones_like(targets))
        return Group(torch.arange(num_classes, device=targets.device), targets, counts)
    if num_classes > len(targets):
        return Group(*torch.unique(targets, return_inverse=True, return_counts=True))
    counts = targets.bincount(minlength=num_classes)
    present = counts.nonzero().flatten()
    if len(present) == num_classes:
        return Group(present, targets, counts)
    return Group(present, (counts > 0).cumsum(0).sub_(1)[targets], counts[present])


class Deviations(NamedTuple):
    """Rows (N, d) of deviations, in units of a power of two, and new class means (P, d)."""

    rows: Tensor
    means: Tensor
    unit: Tensor | float


class Merge(NamedTuple):
    """New means (P, d), and the points (P, d) from which deviations are to be taken."""

    means: Tensor
    origins: Tensor


def merge_means(means: Tensor, counts: Tensor, batch_means: Tensor, batch_counts: Tensor) -> Merge:
    """Old means M of n samples and the batch's M' of n', merged; in the memory of the arguments.

    Deviations from M' sum to 0 in each class, so those from M' − √(n/(n + n')) Δ, Δ = M' − M, give S' + w ΔΔᵀ in one
    product. With the new mean M + Δ n'/(n + n') that point is the new mean + (1 − n'/(n + n') − √(n/(n + n'))) Δ.
    """
    difference = batch_means.sub_(means)
    total = (counts + batch_counts).clamp(min=1).to(means.dtype)[:, None]
    share, root = batch_counts[:, None] / total, torch.sqrt(counts[:, None] / total)
    means = means.addcmul_(share, difference)
    return Merge(means, difference.mul_(1 - share - root).add_(means))


def deviations_exactly(
    features: Tensor, group: Group, means: Tensor, counts: Tensor, workspace: Workspace
) -> Deviations:
    """Deviations in the means' dtype from the points of `merge_means`, and the new means."""
    features = workspace.take(features.shape, means, "features").copy_(features)
    sums = workspace.take(means.shape, means, "sums").zero_().index_add_(0, group.members, features)
    batch_means = sums.div_(group.counts.clamp(min=1)[:, None])
    means, origins = merge_means(means, counts, batch_means, group.counts)
    subtracted = torch.index_select(origins, 0, group.members, out=workspace.take(features.shape, means, "subtracted"))
    return Deviations(features.sub_(subtracted), means, 1.0)


def deviations_in_fp32(
    features: Tensor, group: Group, means: Tensor, counts: Tensor, workspace: Workspace
) -> Deviations:
    """The same in fp32, new means in fp64: every large difference is taken from a sample of the class itself.

    x − r for a sample r of the class loses nothing that matters, however far from 0 the class lies: both are of the
    features' own precision. Sums and a second, small shift of these differences bring them to the points wanted. All
    is in units of the greatest magnitude, so that no square leaves the range of fp32.
    """
    if features.dtype not in (torch.float32, torch.float64):
        features = features.float()
    low, high = torch.aminmax(features)
    greatest = torch.maximum(torch.maximum(-low, high).to(means.dtype), means.abs().amax())
    factor = power_of_two(greatest.clamp(min=torch.finfo(features.dtype).tiny))
    out = workspace.take(features.shape, features, "scaled")
    features, means = torch.mul(features, factor.to(features.dtype), out=out), means.mul_(factor)
    order = torch.arange(len(features), device=features.device)
    last = torch.full_like(group.counts, len(features) - 1)
    references = features[last.scatter_reduce_(0, group.members, order, "amin")]
    deviations = workspace.take(features.shape, features, "deviations", torch.float32)
    subtracted = torch.index_select(
        references, 0, group.members, out=workspace.take(features.shape, features, "subtracted")
    )
    torch.sub(features, subtracted, out=deviations)
    sums = workspace.take(means.shape, deviations, "sums").zero_().index_add_(0, group.members, deviations)
    batch_means = sums.to(means.dtype).div_(group.counts.clamp(min=1)[:, None]).add_(references)
    means, origins = merge_means(means, counts, batch_means, group.counts)
    shifts = origins.sub_(references).float()
    subtracted = torch.index_select(
        shifts, 0, group.members, out=workspace.take(features.shape, deviations, "subtracted")
    )
    unit = factor.reciprocal()
    return Deviations(deviations.sub_(subtracted), means.mul_(unit), unit)


def add_gram(scatter: Tensor, rows: Tensor, unit: Tensor | float, workspace: Workspace) -> None:
    """Add unit² rowsᵀ rows to the upper triangle of a scatter (d, d), in strips that save 40% of the work.

    The unit of rows in the scatter's own dtype is 1.
    """
    for start in range(0, len(scatter), _STRIP):
        strip, left, right = scatter[start : start + _STRIP, start:], rows[:, start : start + _STRIP], rows[:, start:]
        if rows.dtype == strip.dtype:
            strip.addmm_(left.T, right)
            continue
        product = torch.mm(left.T, right, out=workspace.take(strip.shape, rows, "product"))
        if strip.device.type == "cpu":
            strip.add_(product, alpha=float(unit) * float(unit))
        else:  # where reading the unit would wait for the device
            strip.add_(product.to(strip.dtype).mul_(unit).mul_(unit))


def add_class_grams(
    class_scatter: Tensor, rows: Tensor, unit: Tensor | float, classes: Tensor, workspace: Workspace
) -> None:
    """Add each class's unit² rowsᵀ rows to the upper triangle of its scatter (K, d, d), in segments of sorted rows."""
    order = classes.argsort(stable=True)
    rows = torch.index_select(rows, 0, order, out=workspace.take(rows.shape, rows, "sorted"))
    present, counts = torch.unique_consecutive(classes[order], return_counts=True)
    for index, segment in zip(present.tolist(), rows.split(counts.tolist()), strict=True):
        add_gram(class_scatter[index], segment, unit, workspace)
