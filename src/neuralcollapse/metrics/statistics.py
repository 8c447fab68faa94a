"""Options of a measurement, and statistics of the measured classes: means, centre and covariance."""

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
    listed,
)
from neuralcollapse.metrics.moments import ClassMoments, MomentsDtype
from neuralcollapse.metrics.scaling import power_of_two

Center = Literal["samples", "classes"]
Pooling = Literal["mean", "flatten"] | Callable[[Tensor], Tensor]
_ROUNDING = 64  # error of a mean over thousands of batches, in units of rounding of its dtype


@dataclass(frozen=True)
class MeasureOptions:
    """Options of `measure`, `NeuralCollapse` and `collapse_metrics`.

    `collapse_metrics` and `undefined_metrics` use the first five options; `NeuralCollapse` also uses ``ignore_index``,
    ``dtype`` and ``class_scatter``; `measure` uses all options.

    Args:
        center: ``"samples"``: deviations are taken from the mean of all samples; ``"classes"``: deviations are taken
            from the mean of the class means, so that an exact ETF has the values at collapse on unbalanced data as
            well.
        min_samples: Classes with fewer samples are left out of all metrics. With 0, a class without samples is an
            error.
        drop_classes_above: Classes with more samples are left out of all metrics; None for no limit.
        pairwise: Include the metrics over all pairs of classes, which take O(K² d) work.
        code: L (K, r). Means and classifier are compared with the Gram matrix LLᵀ
            (`neuralcollapse.geometry.code_from_gram`).
        ignore_index: Samples with this target are left out.
        dtype: As for `ClassMoments`.
        class_scatter: Keep the scatter of each class, K d² numbers. ``nc1_numerical_rank`` is then computed from it
            instead of from single samples, for layers as well.
        per_sample: Include the metrics of single samples, which take O(N K d) work; without them, features are not
            cached.
        information: Include ``mir`` and ``hdr`` of 512 samples; their cost is cubic in this number.
        layer_pooling: Pooling of layer outputs with more than two dimensions: ``"mean"`` over positions ((B, C, ...)
            becomes (B, C), and (B, T, d) becomes (B, d)), ``"flatten"``, or a function that returns (B, d). Outputs
            (B, T, d) with targets (B, T) are not pooled. The moments of a layer with d dimensions take d² numbers.
        cache_bytes: Maximum size of the features cached in memory; the others are memory-mapped to a temporary file.

    Raises:
        ValueError: if an option has the wrong type or is out of range.

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
        check_at_least("min_samples", self.min_samples, 0)
        if self.drop_classes_above is not None:
            check_at_least("drop_classes_above", self.drop_classes_above, max(self.min_samples, 1), "min_samples")
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


@dataclass(frozen=True)
class ClassStatistics:
    """Statistics of the measured classes in fp64. In all formulas, K is the number of measured classes.

    Attributes:
        classes: (K,) indices among all classes.
        counts: (K,) numbers of samples n_k.
        class_means: (K, d) class means M.
        center: (d,) centre m; NaN if K is 0.
        centred_means: (K, d) C = M − m. The row of a class whose mean is at the centre, up to rounding, is zero; all
            rows are zero if the features are the same for all samples, up to the rounding of their dtype.
        within_class_variances: (K,) variances v_k = t_k/n_k.
        within_class_covariance: (d, d) Σ_W = S/N, or None if the pooled scatter includes that of other classes.
        class_scatter: (K, d, d) scatter of each class, or None if the moments do not keep it.
        scale: Root mean square √(Σ‖h‖²/N) of the feature norms.
        resolution: Distance within which two class means are considered equal, up to rounding.
        constant: Whether the features are the same for all samples, up to the rounding of their dtype.
    """

    classes: Tensor
    counts: Tensor
    class_means: Tensor
    center: Tensor
    centred_means: Tensor
    within_class_variances: Tensor
    within_class_covariance: Tensor | None
    class_scatter: Tensor | None
    scale: Tensor
    resolution: Tensor
    constant: bool


def class_statistics(moments: ClassMoments, options: MeasureOptions = MeasureOptions()) -> ClassStatistics:
    """Return the statistics of the classes with ``min_samples`` to ``drop_classes_above`` samples.

    Fewer than two measured classes are an error only if these bounds exclude the other classes.

    Args:
        moments: Moments of the features.
        options: Bounds of the number of samples per class, and the centre.

    Raises:
        ValueError: if the bounds leave fewer than two classes, a class has no sample and ``min_samples`` is 0, or
            ``moments`` has the wrong type.

    Examples:
        >>> moments = ClassMoments(3, 2)
        >>> moments.update(torch.tensor([[1.0, 0], [3, 0], [0, 2]]), torch.tensor([0, 0, 2]))
        >>> class_statistics(moments).classes
        tensor([0, 2])
    """
    if not isinstance(moments, ClassMoments):
        raise ValueError(f"moments must be ClassMoments, got {type(moments).__name__}")
    min_samples, most = options.min_samples, options.drop_classes_above
    if min_samples == 0 and (moments.counts == 0).any():
        names = listed((moments.counts == 0).nonzero().flatten().tolist())
        raise ValueError(f"every class must have a sample, got none of class {names}; min_samples=1 leaves it out")
    measured = moments.counts >= max(min_samples, 1)
    if most is not None:
        measured &= moments.counts <= most
    classes = measured.nonzero().flatten()
    if len(classes) < 2 and len(classes) < (with_samples := int((moments.counts > 0).sum())):
        limit = "" if most is None else f" to drop_classes_above = {most}"
        raise ValueError(
            f"moments must hold at least 2 classes of min_samples = {max(min_samples, 1)}{limit} samples, "
            f"got {len(classes)} of {with_samples} classes (and {int(moments.counts.sum())} samples in all)"
        )
    if moments.device.type == "mps":  # MPS does not support fp64
        moments, measured, classes = moments.to("cpu"), measured.cpu(), classes.cpu()
    everything = len(classes) == moments.num_classes
    counts = moments.counts[classes]
    class_means = (moments.means if everything else moments.means[classes]).double()
    weights = (
        counts.double() / counts.sum()
        if options.center == "samples"
        else torch.full_like(counts, 1 / max(len(counts), 1), dtype=torch.float64)
    )
    mean = weights @ class_means if len(classes) else torch.full_like(moments.means[0], torch.nan, dtype=torch.float64)
    trace = moments.within_class_trace[classes].double()
    scatter = moments.class_scatter
    if scatter is not None and not everything:
        scatter = scatter[classes]

    pooled: Tensor | None = moments.within_class_scatter
    if (moments.within_class_trace[~measured] != 0).any():
        pooled = None if scatter is None else scatter.sum(dim=0)
    centred_means, variances = class_means - mean, trace / counts
    distances, scale, resolution, constant = _rounding(moments, class_means, centred_means, variances, counts)
    return ClassStatistics(
        classes=classes,
        counts=counts,
        class_means=class_means,
        center=mean,
        centred_means=centred_means.masked_fill((distances <= resolution)[:, None] | constant, 0),
        within_class_variances=variances,
        within_class_covariance=None if pooled is None else pooled.double() / counts.sum(),
        class_scatter=None if scatter is None else scatter.double(),
        scale=scale,
        resolution=resolution,
        constant=constant,
    )


def _rounding(
    moments: ClassMoments, class_means: Tensor, centred_means: Tensor, variances: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Return the distances of the means to the centre, and scale, resolution and constant of `ClassStatistics`."""
    factor = power_of_two(class_means, variances.sqrt())  # the square of 1e-170 would underflow
    shares = counts.double() / counts.sum()
    spread = (shares @ (variances.sqrt() * factor).square()).sqrt() / factor
    scale = (shares @ (class_means * factor).square().sum(dim=1) + (spread * factor).square()).sqrt() / factor
    distances = torch.linalg.vector_norm(centred_means * factor, dim=1) / factor
    rounding = float(moments.rounding)
    # Rounding errors average out if the features vary; otherwise the errors of a class may all be the same.
    resolution = _ROUNDING * torch.finfo(moments.means.dtype).eps * scale
    resolution = resolution + min(rounding, 4 * torch.finfo(torch.float32).eps) * spread
    constant = bool((spread <= rounding * scale) & (distances <= rounding * scale).all())
    return distances, scale, torch.where(torch.isfinite(resolution), resolution, 0), constant
