"""What the metrics are functions of: the classes that count, their centre, means and covariance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from neuralcollapse._checks import check_finite, check_sample_bounds, check_shapes
from neuralcollapse.metrics.moments import ClassMoments
from neuralcollapse.metrics.scaling import power_of_two

_ROUNDING = 64  # what a mean over thousands of batches may lose, in units of rounding of its dtype

Center = Literal["samples", "classes"]


def check_center(center: object) -> None:
    """Raise unless the argument is a `Center`."""
    if center not in ("samples", "classes"):
        raise ValueError(f"center must be 'samples' or 'classes', got {center!r}")


@dataclass(frozen=True)
class ClassStatistics:
    """Moments of the classes that are measured, in fp64. K counts these classes alone, in every formula.

    Attributes:
        classes: (K,) their indices among all classes.
        counts: (K,) their samples n_k.
        class_means: (K, d) M.
        center: (d,) m; NaN where K is 0.
        centred_means: (K, d) C = M − m. The row of a class whose mean is at the centre, up to rounding, is zero; all
            rows are where the features are the same for all samples, up to the rounding of their dtype.
        within_class_variances: (K,) v_k = t_k/n_k.
        within_class_covariance: (d, d) Σ_W = S/N, or None when classes were left out whose scatter is pooled
            with the others'.
        class_scatter: (K, d, d) each class's scatter, or None when the moments do not keep it.
        scale: √(Σ‖h‖²/N), the size of a feature.
        resolution: The distance within which rounding makes two class means the same.
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


def class_statistics(
    moments: ClassMoments, *, center: Center = "samples", min_samples: int = 1, drop_classes_above: int | None = None
) -> ClassStatistics:
    """Return the statistics of the classes that have from ``min_samples`` to ``drop_classes_above`` samples.

    Fewer than two classes are an error only if these bounds leave out the others.

    Args:
        moments: The moments of the features.
        center: ``"samples"``: m is the mean of all samples of the measured classes; ``"classes"``: the mean of the
            class means. They differ on unbalanced data.
        min_samples: Classes with fewer are left out of everything. With 0, a class without samples is an error.
        drop_classes_above: Classes with more are left out of everything; None for no limit.

    Raises:
        ValueError: if the bounds leave fewer than two classes, a class has no sample while ``min_samples`` is 0,
            ``drop_classes_above`` is under ``min_samples``, ``center`` is unknown, or an argument has another type.

    Examples:
        >>> moments = ClassMoments(3, 2)
        >>> moments.update(torch.tensor([[1.0, 0], [3, 0], [0, 2]]), torch.tensor([0, 0, 2]))
        >>> class_statistics(moments).classes
        tensor([0, 2])
    """
    if not isinstance(moments, ClassMoments):
        raise ValueError(f"moments must be ClassMoments, got {type(moments).__name__}")
    check_sample_bounds(min_samples, drop_classes_above)
    check_center(center)
    if min_samples == 0 and (moments.counts == 0).any():
        absent = (moments.counts == 0).nonzero().flatten().tolist()
        names = ", ".join(map(str, absent[:10])) + (", …" if len(absent) > 10 else "")
        raise ValueError(f"every class must have a sample, got none of class {names}; min_samples=1 leaves it out")
    measured = moments.counts >= max(min_samples, 1)
    if drop_classes_above is not None:
        measured &= moments.counts <= drop_classes_above
    classes = measured.nonzero().flatten()
    if len(classes) < 2 and len(classes) < (with_samples := int((moments.counts > 0).sum())):
        limit = "" if drop_classes_above is None else f" to drop_classes_above = {drop_classes_above}"
        raise ValueError(
            f"moments must hold at least 2 classes of min_samples = {max(min_samples, 1)}{limit} samples, "
            f"got {len(classes)} of {with_samples} classes (and {int(moments.counts.sum())} samples in all)"
        )
    if moments.device.type == "mps":  # which has no fp64
        moments, measured, classes = moments.to("cpu"), measured.cpu(), classes.cpu()
    everything = len(classes) == moments.num_classes
    counts = moments.counts[classes]
    class_means = (moments.means if everything else moments.means[classes]).double()
    weights = (
        counts.double() / counts.sum()
        if center == "samples"
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
    """Return each mean's distance to the centre, and `scale`, `resolution` and `constant` of `ClassStatistics`."""
    factor = power_of_two(class_means, variances.sqrt())  # squares of 1e-170 vanish
    shares = counts.double() / counts.sum()
    spread = (shares @ (variances.sqrt() * factor).square()).sqrt() / factor
    scale = (shares @ (class_means * factor).square().sum(dim=1) + (spread * factor).square()).sqrt() / factor
    distances = torch.linalg.vector_norm(centred_means * factor, dim=1) / factor
    rounding = float(moments.rounding)
    # The rounding of features averages out where they vary; where they do not, all of a class may be off alike.
    resolution = _ROUNDING * torch.finfo(moments.means.dtype).eps * scale
    resolution = resolution + min(rounding, 4 * torch.finfo(torch.float32).eps) * spread
    constant = bool((spread <= rounding * scale) & (distances <= rounding * scale).all())
    return distances, scale, torch.where(torch.isfinite(resolution), resolution, 0), constant


@torch.no_grad()
def moments_about(moments: ClassMoments, means: Tensor) -> ClassMoments:
    """The same samples, with their scatter and traces taken about other class means than their own.

    A test split about the train split's means, ``moments_about(test, train.means)``, is what some publications measure.
    S + Σ_k n_k Δ_kΔ_kᵀ and t_k + n_k‖Δ_k‖² with Δ = M − means are exact; the result's means are the given ones.

    Args:
        moments: The samples' moments.
        means: (K, d) finite.

    Returns:
        New moments, without per-class scatter, to be measured but not updated.

    Raises:
        ValueError: ``means`` of another shape or type, or not finite.

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
