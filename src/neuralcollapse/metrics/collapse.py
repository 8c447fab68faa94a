"""All metrics that class moments can give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neuralcollapse._checks import check_code, check_finite, check_floating
from neuralcollapse.catalogue import in_order
from neuralcollapse.metrics import gram, nc0, nc1, nc2, nc3, nc4, nc5
from neuralcollapse.metrics.features import effective_rank, feature_norm, rank_me
from neuralcollapse.metrics.moments import ClassMoments
from neuralcollapse.metrics.pairs import PairStatistics, pair_statistics
from neuralcollapse.metrics.scaling import power_of_two, rescaled
from neuralcollapse.metrics.statistics import Center, ClassStatistics, class_statistics
from neuralcollapse.metrics.undefined import reasons_of_moments, warn_of, without_undefined


def collapse_metrics(
    moments: ClassMoments,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    center: Center = "samples",
    min_samples: int = 1,
    drop_classes_above: int | None = None,
    ood_mean: Tensor | None = None,
    pairwise: bool = True,
    code: Tensor | None = None,
) -> dict[str, float]:
    """Every metric of neural collapse that needs no single samples, in fp64.

    What each is, and where it comes from, is said at the function of its name. Metrics of the classifier are there
    when ``weight`` is given, ``nc5_ood`` when ``ood_mean`` is, those relative to a Gram (``nc2_gram_means``,
    ``nc2_gram_weights``, ``nc3_gram_duality``) when a ``code`` is, ``nc1_numerical_rank`` when the moments keep
    per-class scatter.

    A metric that is not defined for what was measured is NaN, and one warning says why; `undefined_metrics` returns
    the reasons. ``nc1_pinv``, ``nc1_vci`` and ``rank_me`` are among them when ``min_samples`` or
    ``drop_classes_above`` leaves out classes whose scatter the moments have pooled with the others' (none that has one
    sample only, and none at all with ``ClassMoments(..., class_scatter=True)``).

    Args:
        moments: The moments of the features that the weight multiplies.
        weight: W (K, d).
        bias: b (K,), of a weight; None is 0.
        center: ``"samples"``: deviations are taken from the mean of all samples; ``"classes"``: from the mean of
            the class means, with which an exact ETF measures 0 on unbalanced data too.
        min_samples: Classes with fewer samples are left out everywhere; 0 makes an absent class an error.
        drop_classes_above: Classes with more samples are left out everywhere.
        ood_mean: (d,) mean feature of out-of-distribution data.
        pairwise: Include the metrics over all pairs of classes, O(K² d).
        code: L (K, r), whose Gram matrix LLᵀ the classifier is compared with
            (`neuralcollapse.geometry.code_from_gram`).

    Returns:
        Name to value, in the order of `neuralcollapse.catalogue.METRICS`.

    Raises:
        ValueError: if the options leave fewer than two classes, a bias is given without a weight, or an argument has
            another shape than the moments' or another type.

    Examples:
        >>> features = torch.tensor([[1.0, 0.1], [1, -0.1], [-1, 0.1], [-1, -0.1]])
        >>> moments = ClassMoments(num_classes=2, feature_dim=2)
        >>> moments.update(features, torch.tensor([0, 0, 1, 1]))
        >>> metrics = collapse_metrics(moments, weight=torch.tensor([[1.0, 0], [-1, 0]]))
        >>> print(f"{metrics['nc1_quotient']:.4f} {metrics['nc3_duality']:.4f}")
        0.0100 0.0000
    """
    values, undefined = measure_moments(
        moments,
        weight,
        bias,
        center=center,
        min_samples=min_samples,
        drop_classes_above=drop_classes_above,
        ood_mean=ood_mean,
        pairwise=pairwise,
        code=code,
    )
    warn_of(undefined)
    return values


def undefined_metrics(
    moments: ClassMoments, weight: Tensor | None = None, bias: Tensor | None = None, **options: Any
) -> dict[str, str]:
    """Return which of the metrics that `collapse_metrics` returns for the same arguments are NaN, and why.

    Args:
        moments: As for `collapse_metrics`.
        weight: As for `collapse_metrics`.
        bias: As for `collapse_metrics`.
        **options: As for `collapse_metrics`.

    Returns:
        Name to reason.

    Raises:
        ValueError: As for `collapse_metrics`.

    Examples:
        >>> moments = ClassMoments(num_classes=2, feature_dim=2)
        >>> moments.update(torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([0, 1]))
        >>> undefined_metrics(moments)["nc1_quotient"]
        'no class has more than one sample, so that nothing can vary within one'
    """
    return measure_moments(moments, weight, bias, **options)[1]


@torch.no_grad()
def measure_moments(
    moments: ClassMoments,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    center: Center = "samples",
    min_samples: int = 1,
    drop_classes_above: int | None = None,
    ood_mean: Tensor | None = None,
    pairwise: bool = True,
    code: Tensor | None = None,
) -> tuple[dict[str, float], dict[str, str]]:
    """Return what `collapse_metrics` and `undefined_metrics` return, without a warning."""
    measured = class_statistics(moments, center=center, min_samples=min_samples, drop_classes_above=drop_classes_above)
    num_classes, feature_dim = moments.means.shape
    place = measured.center.device
    weight = _like_state("weight", weight, (num_classes, feature_dim), place)
    bias = _like_state("bias", bias, (num_classes,), place)
    if bias is not None and weight is None:
        raise ValueError("bias must come with the weight of the same classifier, got weight = None")
    ood_mean = _like_state("ood_mean", ood_mean, (feature_dim,), place)
    check_code(code, num_classes)
    code = None if code is None else code.to(place, torch.float64)[measured.classes]
    if weight is not None and len(measured.classes) < num_classes:
        weight = weight[measured.classes]
        bias = None if bias is None else bias[measured.classes]
    means, variances = measured.centred_means, measured.within_class_variances

    # In units of a power of two, so that squares of squares stay in the range of fp64.
    unit = power_of_two(measured.class_means, variances.sqrt().nan_to_num(0, 0, 0)).reciprocal()
    values = _of_features(measured, unit) | _of_means(measured, unit, code, pairwise)
    if weight is not None:
        values |= _of_weight(weight, pairwise)
        values["nc2_equinorm_difference"] = nc2.nc2_equinorm_difference(means / unit, weight)
        values["nc3_duality"] = nc3.nc3_duality(weight, means)
        values["nc3_distance"] = nc3.nc3_distance(weight, means)
        values["nc3_uniform"] = nc3.nc3_uniform(weight, means)
        values["nc3_uniform_cos"] = nc3.nc3_uniform_cos(weight, means)
        if code is not None:
            values["nc2_gram_weights"] = gram.nc2_gram(weight, code)
            values["nc3_gram_duality"] = gram.nc3_gram_duality(weight, means, code)
        values["nc4_bias"] = nc4.nc4_bias(weight, bias, measured.center)
    if ood_mean is not None:
        values["nc5_ood"] = nc5.nc5_ood(measured.class_means, ood_mean)
    # One copy from the device, not one for each metric.
    found = in_order(dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True)))
    known = reasons_of_moments(moments, measured, found, weight=weight, code=code, ood_mean=ood_mean)
    return without_undefined(found, known)


def _of_features(measured: ClassStatistics, unit: Tensor) -> dict[str, Tensor]:
    """Return the metrics of class means and of what varies within the classes."""
    means, centred = measured.class_means / unit, measured.centred_means / unit
    variances, counts = measured.within_class_variances / unit / unit, measured.counts
    within = measured.within_class_covariance
    within = None if within is None else within / unit / unit
    missing = torch.full_like(unit, torch.nan)
    values = dict.fromkeys(("nc1_pinv", "nc1_vci", "rank_me"), missing)
    if within is not None and len(counts) and bool(torch.isfinite(within).all() & torch.isfinite(means).all()):
        spectrum = nc1.BetweenClassSpectrum.of(centred)
        values["nc1_pinv"] = nc1.nc1_pinv(within, centred, spectrum=spectrum)
        values["nc1_vci"] = nc1.nc1_vci(within, centred, spectrum=spectrum)
        values["rank_me"] = rank_me(within, means, counts)
    values["nc1_quotient"] = nc1.nc1_quotient(variances @ (counts.double() / counts.sum()), centred)
    if measured.class_scatter is not None:
        finite = bool(torch.isfinite(variances).all() & torch.isfinite(means).all())
        scatter = measured.class_scatter
        values["nc1_numerical_rank"] = (
            nc1.nc1_numerical_rank(scatter, measured.class_means, counts) if finite and len(counts) else missing
        )
    values["feature_norm"] = feature_norm(means, variances, counts) * unit
    return values


def _of_means(measured: ClassStatistics, unit: Tensor, code: Tensor | None, pairwise: bool) -> dict[str, Tensor]:
    """Return the metrics of the centred class means."""
    means = measured.centred_means / unit
    values = {"nc2_etf_means": nc2.nc2_etf(means), "nc2_equinorm_means": nc2.nc2_equinorm(means)}
    finite = bool(torch.isfinite(means).all())
    values["effective_rank_means"] = effective_rank(means) if finite else torch.full_like(unit, torch.nan)
    if code is not None:
        values["nc2_gram_means"] = gram.nc2_gram(means, code)
    if pairwise:
        variances = measured.within_class_variances / unit / unit
        values |= _pairwise_of_means(means, variances, measured.resolution / unit)
    return values


def _of_weight(weight: Tensor, pairwise: bool) -> dict[str, Tensor]:
    """Return the metrics of the classifier's rows alone."""
    values = {
        "nc0_weight_sum": nc0.nc0_weight_sum(weight),
        "nc2_etf_weights": nc2.nc2_etf(weight),
        "nc2_equinorm_weights": nc2.nc2_equinorm(weight),
        "effective_rank_weights": effective_rank(weight),
    }
    if pairwise:
        values |= _angles(pair_statistics(rescaled(weight), _ANGLES), "weights")
    return values


_ANGLES = {"equiangular": nc2.cosines, "max_angle": nc2.distance_to_max_angle}
_KERNELS = {kernel: nc2.hyperspherical_kernel(kernel) for kernel in nc2.HYPERSPHERICAL_KERNELS}


def _angles(statistics: dict[str, PairStatistics], suffix: str) -> dict[str, Tensor]:
    _, variance, count = statistics["equiangular"]
    return {
        f"nc2_equiangular_{suffix}": nc2.std_over_ordered_pairs(variance, count),
        f"nc2_max_angle_{suffix}": statistics["max_angle"].mean,
    }


def _pairwise_of_means(means: Tensor, variances: Tensor, resolution: Tensor) -> dict[str, Tensor]:
    """All that needs the pairs of class means, in one pass over them."""
    functions = {"cdnv": nc1.cdnv_of_pairs(variances), **_ANGLES, **_KERNELS}
    statistics = pair_statistics(means, functions, resolution=resolution)
    values = {"nc1_cdnv": statistics["cdnv"].mean} | _angles(statistics, "means")
    for kernel in _KERNELS:
        values[f"nc2_hyperspherical_{kernel}_mean"] = statistics[kernel].mean
        values[f"nc2_hyperspherical_{kernel}_variance"] = statistics[kernel].variance
    return values


def _like_state(name: str, tensor: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    """The argument checked, in fp64, where the statistics are."""
    if tensor is None:
        return None
    check_floating(name, tensor)
    if tensor.shape != shape:
        raise ValueError(f"{name} must be of shape {shape}, got {tuple(tensor.shape)}")
    check_finite(name, tensor)
    return tensor.to(device, torch.float64)
