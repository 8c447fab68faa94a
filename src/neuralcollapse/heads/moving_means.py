"""Moving class means, which are equal on every rank."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from neuralcollapse._checks import (
    check_at_least,
    check_features,
    check_finite,
    check_ignore_index,
    check_targets,
    compute_dtype,
    is_number,
    values_readable,
)
from neuralcollapse._distributed import number_of_ranks, sum_over_ranks
from neuralcollapse.heads.growth import padded
from neuralcollapse.heads.head import skips_nonfinite

Momentum = float | Literal["cumulative", "published"]
# The best of the values compared on a validation split with K = 10 and K = 100; see docs/heads.md.
DEFAULT_MOMENTUM: Momentum = 0.1


def full_precision() -> torch.dtype:
    """Return the default dtype, or fp32 if the default has lower precision."""
    return compute_dtype(torch.get_default_dtype())


class KeepsFullPrecision(nn.Module):
    """Module that keeps certain buffers in at least fp32 when it is cast to another dtype."""

    _full_precision_buffers: tuple[str, ...]

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        before = {name: self._buffers[name] for name in self._full_precision_buffers}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after is not None and after.dtype in (torch.bfloat16, torch.float16):
                self._buffers[name] = buffer.to(after.device)
        return self


class MovingMean(KeepsFullPrecision):
    """Moving means of several vectors, each updated by the batches that contain samples of it.

    The update is mean ← (1−α) mean + α batch_mean, with α = 1 for the first batch that contains samples of a vector,
    and α = 0 for batches that do not. Batches that are not finite change nothing. The buffers are replaced by new
    tensors, not changed in place. They stay in at least fp32 regardless of the dtype of the module, because in bf16 an
    α below 2⁻⁸ would have no effect.

    Args:
        rows: Number of vectors.
        feature_dim: d.
        momentum: α, the weight of the new batch (as in BatchNorm); ``"cumulative"``: α = n/(n + seen);
            ``"published"``: α = 2/(t+1) after t batches, at least 1e-4.
    """

    _full_precision_buffers = ("mean",)
    mean: Tensor
    seen: Tensor
    batches: Tensor

    def __init__(self, rows: int, feature_dim: int, momentum: Momentum) -> None:
        super().__init__()
        named = isinstance(momentum, str) and momentum in ("cumulative", "published")
        if not (named or (is_number(momentum) and 0 < momentum <= 1)):
            raise ValueError(f"momentum must lie in (0, 1] or be 'cumulative' or 'published', got {momentum!r}")
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(rows, feature_dim, dtype=full_precision()))
        self.register_buffer("seen", torch.zeros(rows, dtype=torch.int64))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def grow(self, num_new: int) -> None:
        """Add vectors without samples."""
        self.mean, self.seen = padded(self.mean, num_new), padded(self.seen, num_new)

    def forward(self, batch_mean: Tensor, batch_count: Tensor, finite: Tensor | None = None) -> Tensor:
        """Update with the means and counts of a batch, and return the moving means, differentiable in the batch means.

        Args:
            batch_mean: (rows, d).
            batch_count: (rows,).
            finite: Whether the batch is finite, of shape (); by default whether ``batch_mean`` is finite. If not,
                nothing changes.

        Raises:
            ValueError: inside a backward pass, because a forward in it can only be the recomputation of a checkpoint.
        """
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise ValueError(
                "a head in training mode must not be recomputed by torch.utils.checkpoint, which would count each "
                "batch twice in its moving means: leave the head out of the checkpointed function"
            )
        if finite is None:
            finite = torch.isfinite(batch_mean.detach()).all()
        batch_mean = torch.where(finite, batch_mean, self.mean.to(batch_mean))
        batch_count = batch_count * finite
        self.batches = self.batches + finite
        weight: Tensor | float
        if self.momentum == "cumulative":
            weight = batch_count / (batch_count + self.seen).clamp_min(1)
        elif self.momentum == "published":
            weight = (2 / (self.batches + 1)).clamp_min(1e-4)
        else:
            weight = float(self.momentum)
        weight = (self.seen == 0).to(batch_mean.dtype).clamp_min(weight) * (batch_count > 0)
        moved = torch.lerp(self.mean.to(batch_mean), batch_mean, weight.to(batch_mean).unsqueeze(-1))
        # If a graph holds `moved`, the buffer is a copy, because restoring or broadcasting buffers writes into them.
        self.mean = moved.detach().to(self.mean.dtype, copy=moved.requires_grad)
        self.seen = self.seen + batch_count.to(torch.int64)
        return moved


class ClassMeans(nn.Module):
    """Moving means of the features of each class, centred at the global mean of each batch.

    With batch sums S_k and counts n_k, first summed over all ranks of the default process group:

        M_k = S_k/n_k,   m = Σ S_k/Σ n_k,   C̄_k ← (1−α) C̄_k + α (M_k − m)   for the classes in the batch.

    The mean of a class that is absent from the batch does not change. The mean of a class is zero until the first batch
    with samples of the class, which sets it. A batch that is not finite changes nothing and is not counted.

    Args:
        num_classes: K ≥ 2.
        feature_dim: d ≥ 1.
        momentum: α in (0, 1], the weight of the new batch; ``"cumulative"``: α = n_k/(n_k + seen_k); or
            ``"published"``: α = 2/(t+1) after t batches, at least 1e-4. Gradients flow only through the contribution of
            the batch, so they scale with α.
        ignore_index: Samples with this target are left out.

    Raises:
        ValueError: if K < 2, d < 1, or the momentum is invalid.

    Source: Markou, Ajanthan, Gould (NeurIPS 2024), section 3.

    Examples:
        >>> means = ClassMeans(2, 1, momentum=0.5)
        >>> centred, batch_mean = means(torch.tensor([[1.0], [3.0], [8.0]]), torch.tensor([0, 0, 1]))
        >>> centred.flatten().tolist(), batch_mean.tolist()
        ([-2.0, 4.0], [4.0])
    """

    def __init__(
        self,
        num_classes: int,
        feature_dim: int,
        *,
        momentum: Momentum = DEFAULT_MOMENTUM,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        check_ignore_index(ignore_index)
        self.ignore_index = ignore_index
        check_at_least("num_classes", num_classes, 2)
        check_at_least("feature_dim", feature_dim, 1)
        self.num_classes = num_classes
        self.feature_dim = feature_dim
        self.centred = MovingMean(num_classes, feature_dim, momentum)
        self.overall = MovingMean(1, feature_dim, momentum)

    def grow(self, num_new: int) -> None:
        """Add classes without samples; the means and counts of the other classes do not change.

        Args:
            num_new: n ≥ 1.

        Raises:
            ValueError: if n < 1.
        """
        check_at_least("num_new", num_new, 1)
        self.centred.grow(num_new)
        self.num_classes += num_new

    @property
    def centred_means(self) -> Tensor:
        """Moving centred class means C̄ (K, d), detached."""
        return self.centred.mean

    @property
    def batches(self) -> Tensor:
        """Number of batches so far, of shape ()."""
        return self.overall.batches

    @property
    def global_mean(self) -> Tensor:
        """Moving global mean m̄ (d,), detached."""
        return self.overall.mean[0]

    def forward(
        self, features: Tensor, targets: Tensor, *, skip_nonfinite: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """Update the means with a batch.

        Args:
            features: (N, d) floating.
            targets: (N,) integers in [0, K), or ``ignore_index``.
            skip_nonfinite: Whether a batch that is not finite is skipped on a CPU instead of raising an error. By
                default this is the case in half precision and under autocast, where training loops skip such steps.

        Returns:
            The moving centred class means C̄ (K, d) and the global mean m (d,) of the batch, both differentiable in the
            features of every rank and in at least fp32.

        Raises:
            ValueError: if shapes do not match; inside a backward pass (see `MovingMean`); on a CPU also if labels are
                out of range or the batch is not finite.
        """
        check_features(features, self.feature_dim)
        if skip_nonfinite is None:
            skip_nonfinite = skips_nonfinite(features)
        readable = features.device.type == "cpu"  # on accelerators, reading a value at every step would cause a sync
        check_targets(targets, features.shape[0], self.num_classes, values=readable, ignore_index=self.ignore_index)
        features = features.to(compute_dtype(features.dtype))
        sums, counts = sums_over_ranks(*class_sums(features, targets, self.num_classes, self.ignore_index))
        total = counts.sum()
        batch_mean = sums.sum(0) / total.clamp_min(1)
        centred = sums / counts.clamp_min(1).unsqueeze(-1) - batch_mean
        finite = torch.isfinite(centred.detach()).all()
        if not skip_nonfinite:
            check_batch_mean("features", features, finite)
        self.overall(batch_mean.detach().unsqueeze(0), total.unsqueeze(0), finite)
        return self.centred(centred, counts, finite), batch_mean


def check_batch_mean(name: str, features: Tensor, finite: Tensor) -> None:
    """Raise on a CPU if the mean of the features is not finite."""
    if finite.device.type == "cpu" and values_readable(finite) and not bool(finite):
        check_finite(name, features)
        greatest = float(features.detach().abs().max()) if features.numel() else 0.0
        raise ValueError(
            f"{name} must be finite on every rank and small enough to be summed in {features.dtype}, got magnitudes "
            f"up to {greatest:.3g} on this rank"
        )


def class_sums(features: Tensor, targets: Tensor, num_classes: int, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Return sums S (K, d) and counts n (K,) per class; counts have the dtype of the features and are exact to 2²⁴."""
    index, rows = targets.long(), num_classes
    if ignore_index is not None:  # ignored samples are summed in an additional row, which is dropped
        index, rows = index.masked_fill(index == ignore_index, num_classes), num_classes + 1
    counts = features.new_zeros(rows).index_add(0, index, features.new_ones(len(index)))
    sums = features.new_zeros(rows, features.shape[1]).index_add(0, index, features)
    return sums[:num_classes], counts[:num_classes]


def sums_over_ranks(sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over the default process group by one reduction; gradients of the sums are summed over ranks as well."""
    if number_of_ranks() == 1:
        return sums, counts
    totals = sum_over_ranks(torch.cat([sums, counts.unsqueeze(-1)], -1))
    return totals[..., :-1], totals[..., -1].detach()
