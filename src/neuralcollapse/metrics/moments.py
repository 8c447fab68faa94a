"""One-pass, mergeable moments of the features of each class."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from neuralcollapse._checks import check_at_least, check_finite, check_floating, check_targets
from neuralcollapse.metrics.doors import check_device, check_shapes

logger = logging.getLogger(__name__)

# An update's temporaries have at most this many elements each, so that they stay in cache.
_CHUNK_ELEMENTS = {"cpu": 2**19, "accelerator": 2**24}
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
        size = math.prod(shape)
        if name not in self._buffers or len(self._buffers[name]) < size:
            self._buffers[name] = torch.empty(size, dtype=dtype)
        return self._buffers[name][:size].view(*shape)


class ClassMoments:
    """Counts, means and within-class scatter of every class, in one pass over the features.

    With a batch's own counts n', means M' and scatter S' (deviations from its own class means), Δ = M' − M and
    w = n n'/(n + n'), an update or a merge is

        S += S' + Σ_k w_k Δ_kΔ_kᵀ,   t += t' + w‖Δ‖²,   M += Δ n'/(n + n'),   n += n',

    which is exact, in any order and over any partition of the data, and does not cancel in deep collapse (Chan,
    Golub & LeVeque 1983). An update takes O(N d² + N d) work; the state takes O(K d + d²) memory.

    Args:
        num_classes: K.
        feature_dim: d.
        dtype: ``torch.float64``, ``torch.float32``, or ``"mixed"``: means and sums in fp64, the product of
            each batch's deviations in fp32 (about twice as fast, accurate to about 1e-6).
        class_scatter: Keep the scatter of each class apart as well, which `nc1_numerical_rank` needs. It takes
            K d² numbers: `required_bytes` says how much that is, and a log line does before the memory is taken.
        device: Where the state lives; batches are moved there.

    Attributes:
        counts: (K,) int64, samples seen.
        means: (K, d) class means M, zero for a class never seen.
        within_class_scatter: (d, d) pooled S = Σ (h − M_y)(h − M_y)ᵀ.
        within_class_trace: (K,) each class's t_k = Σ ‖h − M_k‖².
        class_scatter: (K, d, d) each class's scatter, or None.
        num_batches: Updates so far.

    Raises:
        ValueError: ``num_classes`` under 2, ``feature_dim`` under 1, or an unknown dtype or device.

    Example:
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
        dtype: torch.dtype | Literal["mixed"] = torch.float64,
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
        self.class_scatter = (
            torch.zeros(num_classes, feature_dim, feature_dim, dtype=state_dtype, device=device)
            if class_scatter
            else None
        )
        self.num_batches = 0
        self._workspace = Workspace()

    @classmethod
    def from_state(
        cls,
        state: Mapping[str, Tensor],
        *,
        dtype: torch.dtype | Literal["mixed"] | None = None,
        workspace: Workspace | None = None,
    ) -> ClassMoments:
        """Moments that share the tensors of a `state`, as saved, or as held by a metric.

        Args:
            state: What `state` returned.
            dtype: As in the constructor; by default that of ``state["means"]``.
            workspace: Memory for temporaries that others use as well, one after the other.

        Raises:
            ValueError: A tensor is missing.
        """
        names = ("counts", "means", "within_class_scatter", "within_class_trace")
        if missing := [name for name in names if name not in state]:
            raise ValueError(f"state must hold {', '.join(names)}; {', '.join(missing)} is missing")
        moments = cls.__new__(cls)
        moments.counts, moments.means, moments._scatter, moments.within_class_trace = (state[name] for name in names)
        moments.class_scatter = state.get("class_scatter")
        moments.dtype = moments.means.dtype if dtype is None else dtype
        moments.num_batches = 0
        moments._workspace = Workspace() if workspace is None else workspace
        return moments

    @staticmethod
    def required_bytes(
        num_classes: int,
        feature_dim: int,
        *,
        dtype: torch.dtype | Literal["mixed"] = torch.float64,
        class_scatter: bool = False,
    ) -> int:
        """Memory that the state takes.

        Example:
            >>> ClassMoments.required_bytes(1000, 2048, class_scatter=True) / 1e9
            33.604...
        """
        item = 4 if dtype == torch.float32 else 8
        scatters = 1 + num_classes if class_scatter else 1
        return item * (num_classes * (feature_dim + 1) + scatters * feature_dim**2) + 8 * num_classes

    @property
    def num_classes(self) -> int:
        """K."""
        return self.means.shape[0]

    @property
    def feature_dim(self) -> int:
        """The feature dimension d."""
        return self.means.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the state lives."""
        return self.means.device

    @property
    def within_class_scatter(self) -> Tensor:
        """(d, d) pooled within-class scatter. Updates write its upper triangle only; reading mirrors it."""
        return self._scatter.copy_(self._scatter.triu() + self._scatter.triu(1).T)

    @property
    def state(self) -> dict[str, Tensor]:
        """The state's tensors by name, to be saved or sent; `from_state` takes them."""
        state = {
            "counts": self.counts,
            "means": self.means,
            "within_class_scatter": self.within_class_scatter,
            "within_class_trace": self.within_class_trace,
        }
        return state if self.class_scatter is None else state | {"class_scatter": self.class_scatter}

    def to(self, device: torch.device | str) -> ClassMoments:
        """The moments on another device (the same object when they are there already)."""
        if torch.device(device) == self.device:
            return self
        moved = ClassMoments.from_state({k: v.to(device) for k, v in self.state.items()}, dtype=self.dtype)
        moved.num_batches = self.num_batches
        return moved

    @torch.no_grad()
    def about(self, means: Tensor) -> ClassMoments:
        """The same samples, with their scatter and traces taken about other class means than their own.

        A test split about the train split's means, ``test.about(train.means)``, is what some publications measure.
        S + Σ_k n_k Δ_kΔ_kᵀ and t_k + n_k‖Δ_k‖² with Δ = M − means are exact; the result's means are the given ones.

        Args:
            means: (K, d) finite.

        Returns:
            New moments, without per-class scatter, to be measured but not updated.

        Raises:
            ValueError: ``means`` of another shape or type, or not finite.

        Example:
            >>> moments = ClassMoments(num_classes=2, feature_dim=1)
            >>> moments.update(torch.tensor([[1.0], [3], [5]]), torch.tensor([0, 0, 1]))
            >>> moments.about(torch.tensor([[0.0], [5]])).within_class_trace
            tensor([10.,  0.], dtype=torch.float64)
        """
        check_shapes(moments=(self.means, "K d"), means=(means, "K d"))
        check_finite("means", means)
        means = means.to(self.means)
        counts, difference = self.counts.to(means.dtype), self.means - means
        weighted = counts.sqrt()[:, None] * difference
        state = {
            "counts": self.counts.clone(),
            "means": means.clone(),
            "within_class_scatter": self.within_class_scatter + weighted.T @ weighted,
            "within_class_trace": self.within_class_trace + counts * difference.square().sum(dim=1),
        }
        return ClassMoments.from_state(state, dtype=self.dtype)

    def reset(self) -> None:
        """Forget everything."""
        for tensor in self.state.values():
            tensor.zero_()
        self.num_batches = 0

    @torch.no_grad()
    def update(
        self, features: Tensor, targets: Tensor, *, ignore_index: int | None = None, check_values: bool = True
    ) -> None:
        """Take in a batch.

        Args:
            features: (..., d) floating point; leading dimensions are flattened.
            targets: (...) integer classes in [0, K).
            ignore_index: Samples of this target are left out.
            check_values: Check that features are finite and targets in range. On an accelerator that waits for
                the device, so a training step passes False; shapes and dtypes are always checked.

        Raises:
            ValueError: Wrong shape or dtype, targets out of range, or features that are not finite (the message
                says in which batch). The moments are then as they were.
        """
        check_floating("features", features)
        if features.ndim < 2 or features.shape[-1] != self.feature_dim:
            raise ValueError(f"features must be of shape (N, {self.feature_dim}), got {tuple(features.shape)}")
        if not isinstance(targets, Tensor) or targets.shape != features.shape[:-1]:
            got = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
            raise ValueError(f"targets must be a tensor of shape {tuple(features.shape[:-1])}, got {got}")
        features = features.reshape(-1, self.feature_dim).to(self.device)
        targets = targets.reshape(-1).to(self.device)
        if ignore_index is not None:
            kept = targets != ignore_index
            features, targets = features[kept], targets[kept]
        check_targets(targets, len(features), self.num_classes, values=check_values)
        # The sum is a cheap test: it is finite only if every entry is (or, rarely, when finite entries overflow).
        if check_values and not torch.isfinite(features.sum()):
            check_finite(f"features of batch {self.num_batches}", features)
        self.num_batches += 1
        elements = _CHUNK_ELEMENTS["cpu" if self.device.type == "cpu" else "accelerator"]
        pieces = max(1, math.ceil(len(features) / max(256, elements // self.feature_dim)))
        for chunk, labels in zip(features.chunk(pieces), targets.long().chunk(pieces), strict=True):
            if len(chunk):
                self._update_chunk(chunk, labels)

    def _update_chunk(self, features: Tensor, targets: Tensor) -> None:
        present, members, batch_counts = self._group(targets)
        rows_of_classes = partial(self._workspace.take, (len(present), self.feature_dim), self.means)
        rows_of_samples = partial(self._workspace.take, features.shape, self.means)

        features = rows_of_samples("features").copy_(features)
        counts = self.counts[present]
        means = torch.index_select(self.means, 0, present, out=rows_of_classes("means"))
        sums = rows_of_classes("differences").zero_().index_add_(0, members, features)
        difference = sums.div_(batch_counts.clamp(min=1)[:, None]).sub_(means)  # Δ
        total = (counts + batch_counts).clamp(min=1).to(means.dtype)[:, None]
        share, root = batch_counts[:, None] / total, torch.sqrt(counts[:, None] / total)
        means.addcmul_(share, difference)
        self.means.index_copy_(0, present, means)
        self.counts.index_add_(0, present, batch_counts)

        # Deviations from M' sum to 0 in each class, so those from M' − √(n/(n + n')) Δ give S' + w ΔΔᵀ in one product.
        # With the new mean M + Δ n'/(n + n') that point is the new mean + (1 − n'/(n + n') − √(n/(n + n'))) Δ.
        origin = difference.mul_(1 - share - root).add_(means)
        if self.device.type == "cpu" and not (varies := ((counts > 0) | (batch_counts > 1))[members]).all():
            kept = varies.nonzero().flatten()  # a class's first sample, alone, does not deviate
            members = members[kept]
            features = torch.index_select(features, 0, kept, out=rows_of_samples("kept")[: len(kept)])
        origins = torch.index_select(origin, 0, members, out=rows_of_samples("origins")[: len(members)])
        deviations = features.sub_(origins)
        squared_norms = torch.linalg.vector_norm(deviations, dim=1).square()
        self.within_class_trace.index_add_(0, present[members], squared_norms)
        if self.dtype == "mixed":
            deviations = self._workspace.take(deviations.shape, deviations, "rounded", torch.float32).copy_(deviations)
        self._add_gram(deviations)
        if self.class_scatter is not None:
            for index in members.unique().tolist():
                own = deviations[members == index]
                self.class_scatter[present[index]] += own.T @ own

    def _group(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Classes to look at, each sample's place among them, and how many samples each has."""
        if self.device.type == "cpu":
            return torch.unique(targets, return_inverse=True, return_counts=True)
        # How many classes are present is known to the device alone; all of them, without waiting for it, is faster.
        ones = torch.ones_like(targets)
        counts = torch.zeros_like(self.counts).index_add_(0, targets, ones)
        return torch.arange(self.num_classes, device=self.device), targets, counts

    @torch.no_grad()
    def merge(self, other: ClassMoments) -> None:
        """Take in all that other moments have seen, exactly as if their samples had come here.

        Raises:
            ValueError: ``other`` has another K or d, or only one of the two keeps per-class scatter.
        """
        if not isinstance(other, ClassMoments):
            raise ValueError(f"other must be ClassMoments, got {type(other).__name__}")
        if other.means.shape != self.means.shape:
            raise ValueError(
                f"other must have K, d = {tuple(self.means.shape)} as these moments do, got {tuple(other.means.shape)}"
            )
        if (other.class_scatter is None) != (self.class_scatter is None):
            raise ValueError("other must keep per-class scatter exactly if these moments do (class_scatter=True)")
        self._scatter += other._scatter.to(self._scatter)
        self.within_class_trace += other.within_class_trace.to(self.within_class_trace)
        if self.class_scatter is not None and other.class_scatter is not None:
            self.class_scatter += other.class_scatter.to(self.class_scatter)
        for rows in self._class_tiles():
            means = self.means[rows]
            counts, new = self.counts[rows], other.counts[rows].to(self.device)
            share = (new / (counts + new).clamp(min=1).to(means.dtype))[:, None]
            difference = other.means[rows].to(means) - means
            weighted = torch.sqrt(counts[:, None] * share) * difference
            self._add_gram(weighted)
            self.within_class_trace[rows] += weighted.square().sum(dim=1)
            if self.class_scatter is not None:
                self.class_scatter[rows] += weighted[:, :, None] * weighted[:, None, :]
            means += share * difference
            counts += new
        self.num_batches += other.num_batches

    def _add_gram(self, rows: Tensor) -> None:
        """Add rowsᵀ rows to the scatter's upper triangle, in strips that save 40% of the work."""
        for start in range(0, self.feature_dim, _STRIP):
            strip, left, right = (
                self._scatter[start : start + _STRIP, start:],
                rows[:, start : start + _STRIP],
                rows[:, start:],
            )
            if rows.dtype == strip.dtype:
                strip.addmm_(left.T, right)
            else:
                strip += torch.mm(left.T, right, out=self._workspace.take(strip.shape, rows, "product"))

    def _class_tiles(self) -> Iterator[slice]:
        """Slices of classes whose temporaries in a merge stay small."""
        row_elements = self.feature_dim if self.class_scatter is None else self.feature_dim**2
        step = max(1, 2**22 // row_elements)
        return (slice(start, start + step) for start in range(0, self.num_classes, step))
