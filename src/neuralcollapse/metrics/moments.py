"""One-pass, mergeable moments of the features of each class."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from neuralcollapse._checks import check_at_least, check_device, check_finite, check_targets, compute_dtype
from neuralcollapse.metrics.accumulation import (
    Workspace,
    add_class_grams,
    add_gram,
    deviations_exactly,
    deviations_in_fp32,
    flat_batch,
    group_by_class,
)
from neuralcollapse.metrics.scaling import power_of_two

logger = logging.getLogger(__name__)

# An update's temporaries have at most this many elements each, so that they stay in cache.
_CHUNK_ELEMENTS = {"cpu": 2**19, "accelerator": 2**24}


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
        dtype: ``torch.float64``, ``torch.float32``, or ``"mixed"``: means and merges in fp64, each batch's deviations
            from its own class means and their product in fp32 (about twice as fast, accurate to about 1e-6). With
            the first and the last, features from 1e-140 to 1e140 are right (in fp64; those of other dtypes always);
            fp32 moments hold squares from 1e-38 to 1e38, and metrics of others are NaN.
        class_scatter: Keep the scatter of each class apart as well, which `nc1_numerical_rank` needs. It takes
            K d² numbers: `required_bytes` says how much that is, and a log line does before the memory is taken.
        device: Where the state lives; batches are moved there.

    Attributes:
        counts: (K,) int64, samples seen.
        means: (K, d) class means M, zero for a class never seen.
        within_class_scatter: (d, d) pooled S = Σ (h − M_y)(h − M_y)ᵀ.
        within_class_trace: (K,) each class's t_k = Σ ‖h − M_k‖².
        class_scatter: (K, d, d) each class's scatter, or None.
        rounding: The relative rounding error of the features seen, (): that of the coarsest of their dtypes.
        num_batches: Updates so far.

    Raises:
        ValueError: if ``num_classes`` is under 2 or ``feature_dim`` under 1, or the dtype or device is unknown.

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
        dtype: torch.dtype | Literal["mixed"] | None = None,
        workspace: Workspace | None = None,
    ) -> ClassMoments:
        """Moments that share the tensors of a `state`, as saved, or as held by a metric.

        Args:
            state: The `state` of other moments; one without ``rounding`` is taken to be of features of its own dtype.
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
        dtype: torch.dtype | Literal["mixed"] = torch.float64,
        class_scatter: bool = False,
    ) -> int:
        """Memory that the state takes.

        Examples:
            >>> ClassMoments.required_bytes(1000, 2048, class_scatter=True) / 1e9
            33.604...
        """
        item = 4 if dtype == torch.float32 else 8
        scatters = 1 + num_classes if class_scatter else 1
        return item * (num_classes * (feature_dim + 1) + scatters * feature_dim**2 + 1) + 8 * num_classes

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
        """(d, d) pooled within-class scatter. Updates write upper triangles only; reading mirrors it."""
        pooled = self._scatter if self._class_scatter is None else self._class_scatter.sum(dim=0)
        return self._scatter.copy_(pooled.triu() + pooled.triu(1).T)

    @property
    def class_scatter(self) -> Tensor | None:
        """(K, d, d) each class's scatter, or None."""
        if self._class_scatter is not None:
            for rows in self._class_tiles():
                scatter = self._class_scatter[rows]
                scatter.copy_(scatter.triu() + scatter.triu(1).mT)
        return self._class_scatter

    @property
    def state(self) -> dict[str, Tensor]:
        """The state's tensors by name, to be saved or sent; `from_state` takes them."""
        state = {
            "counts": self.counts,
            "means": self.means,
            "within_class_scatter": self.within_class_scatter,
            "within_class_trace": self.within_class_trace,
            "rounding": self.rounding,
        }
        return state if self.class_scatter is None else state | {"class_scatter": self.class_scatter}

    def to(self, device: torch.device | str) -> ClassMoments:
        """The moments on another device (the same object when they are there already)."""
        if torch.device(device) == self.device:
            return self
        moved = ClassMoments.from_state({k: v.to(device) for k, v in self.state.items()}, dtype=self.dtype)
        moved.num_batches = self.num_batches
        return moved

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
                the device, so a training step passes False; shapes and dtypes, and on a CPU targets, are always
                checked.

        Raises:
            ValueError: Wrong shape or dtype, targets out of range, or features that are not finite (the message
                says in which batch). The moments are then as they were.
        """
        features, targets = flat_batch(features, targets, self.feature_dim, self.device, ignore_index)
        on_cpu = self.device.type == "cpu"
        check_targets(targets, len(features), self.num_classes, values=check_values or on_cpu)
        # The sum is a cheap test: it is finite only if every entry is (or, rarely, when finite entries overflow).
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
        # Sums in fp32 pay where a class has several samples; with one each they save nothing.
        fast = self.dtype == "mixed" and 2 * len(group.present) <= len(targets)
        take_deviations = deviations_in_fp32 if fast else deviations_exactly
        deviations, means, unit = take_deviations(features, group, means, counts, self._workspace)
        self.means.index_copy_(0, group.present, means)
        self.counts.index_add_(0, group.present, group.counts)

        classes = targets
        if self.device.type == "cpu" and not (varies := ((counts > 0) | (group.counts > 1))[group.members]).all():
            kept = varies.nonzero().flatten()  # a class's first sample, alone, does not deviate
            classes = classes[kept]
            out = self._workspace.take((len(kept), self.feature_dim), deviations, "kept")
            deviations = torch.index_select(deviations, 0, kept, out=out)
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
        if (other._class_scatter is None) != (self._class_scatter is None):
            raise ValueError("other must keep per-class scatter exactly if these moments do (class_scatter=True)")
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
        """Slices of classes whose temporaries in a merge stay small."""
        row_elements = self.feature_dim if self._class_scatter is None else self.feature_dim**2
        step = max(1, 2**22 // row_elements)
        return (slice(start, start + step) for start in range(0, self.num_classes, step))


def _rounding_of(dtype: torch.dtype) -> float:
    """Return the relative error of features of a dtype: of fp32 and fp64 that of sums, else that of the last digit."""
    return torch.finfo(dtype).eps * (1 if dtype.itemsize < 4 else 4)
