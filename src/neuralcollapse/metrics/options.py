"""Options of a measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from neuralcollapse._checks import (
    check_at_least,
    check_bool,
    check_choice,
    check_finite,
    check_floating,
    check_ignore_index,
    check_sample_bounds,
)
from neuralcollapse.metrics.moments import MomentsDtype

Center = Literal["samples", "classes"]
Pooling = Literal["mean", "flatten"] | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MeasureOptions:
    """Options of `measure`, `NeuralCollapse` and `collapse_metrics`.

    `collapse_metrics` and `undefined_metrics` use the first five; `NeuralCollapse` uses ``ignore_index``, ``dtype`` and
    ``class_scatter`` as well; `measure` uses all.

    Args:
        center: ``"samples"``: deviations are taken from the mean of all samples; ``"classes"``: from the mean of the
            class means, for which an exact ETF has its values at collapse on unbalanced data as well.
        min_samples: Classes with fewer samples are left out of all metrics. With 0, a class without samples is an
            error.
        drop_classes_above: Classes with more samples are left out of all metrics; None for no limit.
        pairwise: Include the metrics over all pairs of classes, O(K² d).
        code: L (K, r). The classifier is compared with the Gram matrix LLᵀ (`neuralcollapse.geometry.code_from_gram`).
        ignore_index: Samples with this target are left out.
        dtype: As for `ClassMoments`.
        class_scatter: Keep the scatter of each class, K d² numbers. ``nc1_numerical_rank`` is then computed from it,
            for layers too, instead of from single samples.
        per_sample: Include the metrics of single samples, O(N K d); without them no features are kept.
        information: Include ``mir`` and ``hdr`` of 512 samples, whose cost is cubic in their number.
        layer_pooling: Pooling of layer outputs with more than two dimensions: ``"mean"`` over positions ((B, C, ...)
            keeps C, and (B, T, d) keeps d), ``"flatten"``, or a function to (B, d). Outputs (B, T, d) with targets
            (B, T) are not pooled. The moments of a layer with d dimensions take d² numbers.
        cache_bytes: Maximum size of the features kept in memory; the others are memory-mapped to a temporary file.

    Raises:
        ValueError: if an option has another type or is out of range.

    Examples:
        >>> MeasureOptions(center="classes").min_samples
        1
    """

    center: Center = "samples"
    min_samples: int = 1
    drop_classes_above: int | None = None
    pairwise: bool = True
    code: Tensor | None = field(default=None, compare=False)
    ignore_index: int | None = None
    dtype: MomentsDtype = torch.float64
    class_scatter: bool = False
    per_sample: bool = True
    information: bool = False
    layer_pooling: Pooling = "mean"
    cache_bytes: int = 2**31

    def __post_init__(self) -> None:
        check_choice("center", self.center, ("samples", "classes"))
        check_sample_bounds(self.min_samples, self.drop_classes_above)
        if self.code is not None:
            check_floating("code", self.code)
            check_finite("code", self.code)
        check_ignore_index(self.ignore_index)
        if self.dtype not in (torch.float64, torch.float32, "mixed"):
            raise ValueError(f"dtype must be torch.float64, torch.float32 or 'mixed', got {self.dtype!r}")
        for name in ("pairwise", "class_scatter", "per_sample", "information"):
            check_bool(name, getattr(self, name))
        if not callable(self.layer_pooling) and self.layer_pooling not in ("mean", "flatten"):
            raise ValueError(f"layer_pooling must be 'mean', 'flatten' or a function, got {self.layer_pooling!r}")
        check_at_least("cache_bytes", self.cache_bytes, 0)
