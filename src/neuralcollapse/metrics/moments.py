"""One-pass, mergeable moments of the features of each class.

A batch enters in three steps: its samples are grouped by class (`group_by_class`), the deviations of the samples from
the points of `merge_means` are formed, in the dtype of the means or in fp32 (`exact_deviations`, `fp32_deviations`),
and the products of these deviations are added to the scatter (`add_gram`, `add_class_grams`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from neuralcollapse._checks import (
    check_at_least,
    check_device,
    check_finite,
    check_floating,
    check_integers,
    check_shapes,
    check_targets,
    compute_dtype,
)
from neuralcollapse._html import html_table
from neuralcollapse.metrics.scaling import power_of_two

logger = logging.getLogger(__name__)

MomentsDtype = torch.dtype | Literal["mixed"]

# Maximum number of elements of each temporary of an update, so that it stays in cache.
_CHUNK_ELEMENTS = {"cpu": 2**19, "accelerator": 2**24}
_STRIP = 192  # width of the strips in which a symmetric product is formed


class ClassMoments:
    """Counts, means and within-class scatter of all classes, in one pass over the features.

    With counts n', class means M' and scatter S' of a batch (S' about M'), Δ = M' − M and w = n n'/(n + n'), an update
    or a merge is

        S += S' + Σ_k w_k Δ_kΔ_kᵀ,   t += t' + w‖Δ‖²,   M += Δ n'/(n + n'),   n += n',

    which is exact, in any order and for any partition of the data, and does not suffer from cancellation in deep
    collapse (Chan, Golub & LeVeque 1983). An update takes O(N d² + N d) work; the state takes O(K d + d²) memory.

    Args:
        num_classes: K.
        feature_dim: d.
        dtype: ``torch.float64``, ``torch.float32``, or ``"mixed"``. Mixed moments keep means and merges in fp64, and
            compute the deviations of each batch from its class means and their product in fp32 (about twice as fast,
            accurate to about 1e-6). fp64 and mixed moments represent fp64 features between 1e-140 and 1e140, and
            features of all other dtypes; fp32 moments represent squares between 1e-38 and 1e38, and metrics of features
            outside this range are NaN.
        class_scatter: Keep the scatter of each class separately, for `nc1_numerical_rank`. It takes K d² numbers;
            `required_bytes` returns the memory, which is also logged before it is allocated.
        device: Device of the state; batches are moved there.

    Attributes:
        counts: (K,) int64, numbers of samples.
        means: (K, d) class means M, zero for a class without samples.
        within_class_scatter: (d, d) pooled S = Σ (h − M_y)(h − M_y)ᵀ.
        within_class_trace: (K,) traces t_k = Σ ‖h − M_k‖².
        class_scatter: (K, d, d) scatter of each class, or None.
        rounding: (), relative rounding error of the features, that of the coarsest of their dtypes.
        num_batches: Number of updates.

    Raises:
        ValueError: if ``num_classes`` is less than 2 or ``feature_dim`` less than 1, or the dtype or device is unknown.

    Examples:
        >>> moments = ClassMoments(num_classes=2, feature_dim=3)
        >>> moments.update(torch.tensor([[1.0, 0, 0], [3, 0, 0], [0, 1, 0]]), torch.tensor([0, 0, 1]))
        >>> moments.means
        tensor([[2., 0., 0.],
                [0., 1., 0.]], dtype=torch.float64)
        >>> moments.within_class_trace
        tensor([2., 0.], dtype=torch.float64)
    """

    def __init__(
        self,
        num_classes: int,
        feature_dim: int,
        *,
        dtype: MomentsDtype = torch.float64,
        class_scatter: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        check_at_least("num_classes", num_classes, 2)
        check_at_least("feature_dim", feature_dim, 1)
        if dtype not in (torch.float64, torch.float32, "mixed"):
            raise ValueError(f"dtype must be torch.float64, torch.float32 or 'mixed', got {dtype!r}")
        check_device(device)
        self.dtype = dtype
        if class_scatter:
            needed = self.required_bytes(num_classes, feature_dim, dtype=dtype, class_scatter=True)
            logger.info("per-class scatter: the moments take %.2f GB", needed / 1e9)
        state_dtype = torch.float64 if dtype == "mixed" else dtype
        self.counts = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self.means = torch.zeros(num_classes, feature_dim, dtype=state_dtype, device=device)
        self.within_class_trace = torch.zeros(num_classes, dtype=state_dtype, device=device)
        self._scatter = torch.zeros(feature_dim, feature_dim, dtype=state_dtype, device=device)
        self._class_scatter = (
            torch.zeros(num_classes, feature_dim, feature_dim, dtype=state_dtype, device=device)
            if class_scatter
            else None
        )
        self.rounding = torch.zeros((), dtype=state_dtype, device=device)
        self.num_batches = 0
        self._workspace = Workspace()

    @classmethod
    def from_state(
        cls,
        state: Mapping[str, Tensor],
        *,
        dtype: MomentsDtype | None = None,
        workspace: Workspace | None = None,
    ) -> ClassMoments:
        """Return moments that share the tensors of a saved `state`, or of one held by a metric.

        Args:
            state: The `state` of other moments. If ``rounding`` is missing, it follows from the dtype of the means.
            dtype: As for the constructor; by default that of ``state["means"]``.
            workspace: Memory for temporaries. It may be shared by moments that are not updated at the same time.

        Raises:
            ValueError: if a tensor is missing.
        """
        names = ("counts", "means", "within_class_scatter", "within_class_trace")
        if missing := [name for name in names if name not in state]:
            raise ValueError(f"state must contain {', '.join(names)}; {', '.join(missing)} is missing")
        moments = cls.__new__(cls)
        moments.counts, moments.means, moments._scatter, moments.within_class_trace = (state[name] for name in names)
        moments._class_scatter = state.get("class_scatter")
        moments.rounding = state.get("rounding", moments.means.new_tensor(_rounding_of(moments.means.dtype)))
        moments.dtype = moments.means.dtype if dtype is None else dtype
        moments.num_batches = 0
        moments._workspace = Workspace() if workspace is None else workspace
        return moments

    @staticmethod
    def required_bytes(
        num_classes: int,
        feature_dim: int,
        *,
        dtype: MomentsDtype = torch.float64,
        class_scatter: bool = False,
    ) -> int:
        """Return the number of bytes of the state.

        Examples:
            >>> ClassMoments.required_bytes(1000, 2048, class_scatter=True) / 1e9
            33.604...
        """
        item = 4 if dtype == torch.float32 else 8
        scatters = 1 + num_classes if class_scatter else 1
        return item * (num_classes * (feature_dim + 1) + scatters * feature_dim**2 + 1) + 8 * num_classes

    def _repr_html_(self) -> str:
        samples, with_samples = int(self.counts.sum()), self.counts[self.counts > 0]
        sizes = f"{int(with_samples.min()):,} to {int(with_samples.max()):,}" if samples else "0"
        rows = [
            ["classes K, of these with samples", f"{self.num_classes:,}, {len(with_samples):,}"],
            ["dimensions d", f"{self.feature_dim:,}"],
            ["samples", f"{samples:,}"],
            ["samples per class", sizes],
            ["batches", f"{self.num_batches:,}"],
            ["dtype, device", f"{self.dtype}, {self.device}".replace("torch.", "")],
        ]
        return html_table("ClassMoments", ["", ""], rows)

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return self.means.shape[0]

    @property
    def feature_dim(self) -> int:
        """Feature dimension d."""
        return self.means.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the state."""
        return self.means.device

    @property
    def within_class_scatter(self) -> Tensor:
        """Pooled within-class scatter (d, d). Updates write only the upper triangle; this property mirrors it."""
        pooled = self._scatter if self._class_scatter is None else self._class_scatter.sum(dim=0)
        return self._scatter.copy_(pooled.triu() + pooled.triu(1).T)

    @property
    def class_scatter(self) -> Tensor | None:
        """Scatter of each class (K, d, d), or None."""
        if self._class_scatter is not None:
            for rows in self._class_tiles():
                scatter = self._class_scatter[rows]
                scatter.copy_(scatter.triu() + scatter.triu(1).mT)
        return self._class_scatter

    @property
    def state(self) -> dict[str, Tensor]:
        """Tensors of the state by name, to be saved or sent, and read by `from_state`."""
        state = {
            "counts": self.counts,
            "means": self.means,
            "within_class_scatter": self.within_class_scatter,
            "within_class_trace": self.within_class_trace,
            "rounding": self.rounding,
        }
        return state if self.class_scatter is None else state | {"class_scatter": self.class_scatter}

    def to(self, device: torch.device | str) -> ClassMoments:
        """Return the moments on another device; the same object if they are already on it."""
        if torch.device(device) == self.device:
            return self
        moved = ClassMoments.from_state({k: v.to(device) for k, v in self.state.items()}, dtype=self.dtype)
        moved.num_batches = self.num_batches
        return moved

    def reset(self) -> None:
        """Remove all samples."""
        for tensor in self.state.values():
            tensor.zero_()
        self.num_batches = 0

    @torch.no_grad()
    def update(
        self, features: Tensor, targets: Tensor, *, ignore_index: int | None = None, check_values: bool = True
    ) -> None:
        """Add a batch.

        Args:
            features: (..., d) floating point; leading dimensions are flattened.
            targets: (...) integer classes in [0, K).
            ignore_index: Samples with this target are left out.
            check_values: Check that features are finite and targets in range. On an accelerator, this check waits for
                the device: pass False in a training step. Shapes and dtypes, and targets on a CPU, are always checked.

        Raises:
            ValueError: if a shape or dtype is wrong, targets are out of range, or features are not finite (the message
                gives the number of the batch). The moments are then left unchanged.
        """
        features, targets = flat_batch(features, targets, self.feature_dim, self.device, ignore_index)
        on_cpu = self.device.type == "cpu"
        check_targets(targets, len(features), self.num_classes, values=check_values or on_cpu)
        # The sum is a cheap test: if it is finite, every entry is. If not, entries are tested, as a sum may overflow.
        if check_values and not torch.isfinite(features.sum()):
            check_finite(f"features of batch {self.num_batches}", features)
        self.num_batches += 1
        if len(features):
            arithmetic = torch.float32 if self.dtype in ("mixed", torch.float32) else compute_dtype(features.dtype)
            self.rounding.clamp_(min=max(_rounding_of(features.dtype), _rounding_of(arithmetic)))
        elements = _CHUNK_ELEMENTS["cpu" if on_cpu else "accelerator"]
        pieces = max(1, math.ceil(len(features) / max(256, elements // self.feature_dim)))
        for chunk, labels in zip(features.chunk(pieces), targets.chunk(pieces), strict=True):
            if len(chunk):
                self._update_chunk(chunk, labels)

    def _update_chunk(self, features: Tensor, targets: Tensor) -> None:
        group = group_by_class(targets, self.num_classes)
        counts = self.counts[group.present]
        means = self._workspace.take((len(group.present), self.feature_dim), self.means, "means")
        torch.index_select(self.means, 0, group.present, out=means)
        # Sums in fp32 save time only if classes have several samples each.
        fast = self.dtype == "mixed" and 2 * len(group.present) <= len(targets)
        take_deviations = fp32_deviations if fast else exact_deviations
        deviations, means, unit = take_deviations(features, group, means, counts, self._workspace)
        self.means.index_copy_(0, group.present, means)
        self.counts.index_add_(0, group.present, group.counts)

        classes = targets
        if self.device.type == "cpu" and not (varies := ((counts > 0) | (group.counts > 1))[group.members]).all():
            rows = varies.nonzero().flatten()  # the first sample of a class equals its mean and has no deviation
            classes = classes[rows]
            out = self._workspace.take((len(rows), self.feature_dim), deviations, "selected")
            deviations = torch.index_select(deviations, 0, rows, out=out)
        if self.dtype == "mixed" and not fast:
            factor = power_of_two(deviations)
            rounded = self._workspace.take(deviations.shape, deviations, "rounded", torch.float32)
            deviations, unit = torch.mul(deviations, factor, out=rounded), factor.reciprocal()
        squared_norms = torch.linalg.vector_norm(deviations, dim=1).to(self.means.dtype).mul_(unit).square_()
        self.within_class_trace.index_add_(0, classes, squared_norms)
        if self._class_scatter is None:
            add_gram(self._scatter, deviations, unit, self._workspace)
        else:
            add_class_grams(self._class_scatter, deviations, unit, classes, self._workspace)

    @torch.no_grad()
    def merge(self, other: ClassMoments) -> None:
        """Add all samples of other moments; the result is the same as if they had been added to these.

        Raises:
            ValueError: if ``other`` has another K or d, or only one of the two has per-class scatter.
        """
        if not isinstance(other, ClassMoments):
            raise ValueError(f"other must be ClassMoments, got {type(other).__name__}")
        if other.means.shape != self.means.shape:
            raise ValueError(
                f"other must have K, d = {tuple(self.means.shape)} as these moments do, got {tuple(other.means.shape)}"
            )
        if (other._class_scatter is None) != (self._class_scatter is None):
            raise ValueError("other must keep per-class scatter if and only if these moments do (class_scatter=True)")
        if self._class_scatter is None:
            self._scatter += other._scatter.to(self._scatter)
        self.within_class_trace += other.within_class_trace.to(self.within_class_trace)
        if self._class_scatter is not None and other._class_scatter is not None:
            self._class_scatter += other._class_scatter.to(self._class_scatter)
        for rows in self._class_tiles():
            means = self.means[rows]
            counts, new = self.counts[rows], other.counts[rows].to(self.device)
            share = (new / (counts + new).clamp(min=1).to(means.dtype))[:, None]
            difference = other.means[rows].to(means) - means
            weighted = torch.sqrt(counts[:, None] * share) * difference
            if self._class_scatter is None:
                add_gram(self._scatter, weighted, 1, self._workspace)
            else:
                self._class_scatter[rows] += weighted[:, :, None] * weighted[:, None, :]
            self.within_class_trace[rows] += weighted.square().sum(dim=1)
            means += share * difference
            counts += new
        self.rounding.clamp_(min=other.rounding.to(self.rounding))
        self.num_batches += other.num_batches

    def _class_tiles(self) -> Iterator[slice]:
        """Return slices of classes for which the temporaries of a merge are small."""
        row_elements = self.feature_dim if self._class_scatter is None else self.feature_dim**2
        step = max(1, 2**22 // row_elements)
        return (slice(start, start + step) for start in range(0, self.num_classes, step))


def _rounding_of(dtype: torch.dtype) -> float:
    """Return the relative error of features of a dtype: that of sums for fp32 and fp64, else that of rounding."""
    return torch.finfo(dtype).eps * (1 if dtype.itemsize < 4 else 4)


@torch.no_grad()
def moments_about(moments: ClassMoments, means: Tensor) -> ClassMoments:
    """Return the moments of the same samples with scatter and traces about given class means.

    Some publications measure a test split about the means of the train split: ``moments_about(test, train.means)``.
    The result has scatter S + Σ_k n_k Δ_kΔ_kᵀ and traces t_k + n_k‖Δ_k‖² with Δ = M − means, which are exact; its means
    are the given ones.

    Args:
        moments: Moments of the samples.
        means: (K, d), finite.

    Returns:
        New moments without per-class scatter, which can be measured but not updated.

    Raises:
        ValueError: if ``means`` has the wrong shape or type, or is not finite.

    Examples:
        >>> moments = ClassMoments(num_classes=2, feature_dim=1)
        >>> moments.update(torch.tensor([[1.0], [3], [5]]), torch.tensor([0, 0, 1]))
        >>> moments_about(moments, torch.tensor([[0.0], [5]])).within_class_trace
        tensor([10.,  0.], dtype=torch.float64)
    """
    check_shapes(moments=(moments.means, "K d"), means=(means, "K d"))
    check_finite("means", means)
    means = means.to(moments.means)
    counts, difference = moments.counts.to(means.dtype), moments.means - means
    weighted = counts.sqrt()[:, None] * difference
    state = {
        "counts": moments.counts.clone(),
        "means": means.clone(),
        "within_class_scatter": moments.within_class_scatter + weighted.T @ weighted,
        "within_class_trace": moments.within_class_trace + counts * difference.square().sum(dim=1),
        "rounding": moments.rounding.clone(),
    }
    return ClassMoments.from_state(state, dtype=moments.dtype)


class Workspace:
    """Memory for temporaries that all updates reuse: on a CPU, new pages can take more time than the arithmetic.

    Copies and pickles of a workspace are empty.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def __reduce__(self) -> tuple[type[Workspace], tuple[()]]:
        return Workspace, ()

    def take(self, shape: Sequence[int], like: Tensor, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return an uninitialised tensor with the device, and by default the dtype, of the tensor ``like``."""
        dtype = like.dtype if dtype is None else dtype
        if like.device.type != "cpu":  # torch caches freed memory of accelerators itself
            return torch.empty(*shape, dtype=dtype, device=like.device)
        size, name = math.prod(shape), f"{name} {dtype}"
        if name not in self._buffers or len(self._buffers[name]) < size:
            self._buffers[name] = torch.empty(size, dtype=dtype)
        return self._buffers[name][:size].view(*shape)


def flat_batch(
    features: Tensor, targets: Tensor, feature_dim: int, device: torch.device, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    """Check shapes, and return features (N, d) and targets (N,) on the device, without ignored samples."""
    check_floating("features", features)
    if features.ndim < 2 or features.shape[-1] != feature_dim:
        raise ValueError(f"features must be of shape (N, {feature_dim}), got {tuple(features.shape)}")
    if not isinstance(targets, Tensor) or targets.shape != features.shape[:-1]:
        got = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(f"targets must be a tensor of shape {tuple(features.shape[:-1])}, got {got}")
    check_integers("targets", targets)
    # In uint8, -100 would be equal to 156.
    features, targets = features.reshape(-1, feature_dim).to(device), targets.reshape(-1).to(device, torch.int64)
    if ignore_index is None:
        return features, targets
    counted = targets != ignore_index
    return features[counted], targets[counted]


class Group(NamedTuple):
    """Classes (P,), index of the class of each sample among them (N,), and number of samples of each class (P,)."""

    present: Tensor
    members: Tensor
    counts: Tensor


def group_by_class(targets: Tensor, num_classes: int) -> Group:
    """Return the group of the present classes; on an accelerator that of all classes, to avoid a device sync."""
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
    """Deviations (N, d) divided by ``unit``, a power of two, and new class means (P, d)."""

    rows: Tensor
    means: Tensor
    unit: Tensor | float


class Merge(NamedTuple):
    """New means (P, d), and the points (P, d) from which deviations are taken."""

    means: Tensor
    origins: Tensor


def merge_means(means: Tensor, counts: Tensor, batch_means: Tensor, batch_counts: Tensor) -> Merge:
    """Merge the means M of n samples with the means M' of n' samples of a batch, in the memory of the arguments.

    Deviations from M' sum to 0 in each class. The product of the deviations from the point M' − √(n/(n + n')) Δ, with
    Δ = M' − M, is therefore S' + w ΔΔᵀ. Relative to the new mean M + Δ n'/(n + n'), this point is the new mean +
    (1 − n'/(n + n') − √(n/(n + n'))) Δ.
    """
    difference = batch_means.sub_(means)
    total = (counts + batch_counts).clamp(min=1).to(means.dtype)[:, None]
    share, root = batch_counts[:, None] / total, torch.sqrt(counts[:, None] / total)
    means = means.addcmul_(share, difference)
    return Merge(means, difference.mul_(1 - share - root).add_(means))


def exact_deviations(features: Tensor, group: Group, means: Tensor, counts: Tensor, workspace: Workspace) -> Deviations:
    """Return the deviations from the points of `merge_means` in the dtype of the means, and the new means."""
    features = workspace.take(features.shape, means, "features").copy_(features)
    sums = workspace.take(means.shape, means, "sums").zero_().index_add_(0, group.members, features)
    batch_means = sums.div_(group.counts.clamp(min=1)[:, None])
    means, origins = merge_means(means, counts, batch_means, group.counts)
    subtracted = torch.index_select(origins, 0, group.members, out=workspace.take(features.shape, means, "subtracted"))
    return Deviations(features.sub_(subtracted), means, 1.0)


def fp32_deviations(features: Tensor, group: Group, means: Tensor, counts: Tensor, workspace: Workspace) -> Deviations:
    """Return the result of `exact_deviations` with deviations in fp32 and means in fp64.

    First, one sample r of the class is subtracted: x − r is accurate however far from 0 the class lies, because both
    have the precision of the features. The class mean follows from the sums of these differences, and a second, small
    shift gives the deviations from the points of `merge_means`. All values are divided by the greatest magnitude, so
    that squares stay in the range of fp32.
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
    """Add unit² rowsᵀ rows to the upper triangle of a scatter (d, d), in strips, which saves 40% of the work.

    Rows with the dtype of the scatter have unit 1.
    """
    for start in range(0, len(scatter), _STRIP):
        strip, left, right = scatter[start : start + _STRIP, start:], rows[:, start : start + _STRIP], rows[:, start:]
        if rows.dtype == strip.dtype:
            strip.addmm_(left.T, right)
            continue
        product = torch.mm(left.T, right, out=workspace.take(strip.shape, rows, "product"))
        if strip.device.type == "cpu":
            strip.add_(product, alpha=float(unit) * float(unit))
        else:  # reading the value of the unit would wait for the device
            strip.add_(product.to(strip.dtype).mul_(unit).mul_(unit))


def add_class_grams(
    class_scatter: Tensor, rows: Tensor, unit: Tensor | float, classes: Tensor, workspace: Workspace
) -> None:
    """Add unit² rowsᵀ rows of each class to the upper triangle of its scatter (K, d, d), sorted by class."""
    order = classes.argsort(stable=True)
    rows = torch.index_select(rows, 0, order, out=workspace.take(rows.shape, rows, "sorted"))
    present, counts = torch.unique_consecutive(classes[order], return_counts=True)
    for index, segment in zip(present.tolist(), rows.split(counts.tolist()), strict=True):
        add_gram(class_scatter[index], segment, unit, workspace)
