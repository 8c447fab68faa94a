"""All metrics that class moments can give."""

from __future__ import annotations

import torch
from torch import Tensor

from neuralcollapse._checks import check_finite, check_floating
from neuralcollapse.metrics import gram, nc0, nc1, nc2, nc3, nc4, nc5
from neuralcollapse.metrics.catalogue import in_order
from neuralcollapse.metrics.doors import check_code
from neuralcollapse.metrics.features import effective_rank, feature_norm, rank_me
from neuralcollapse.metrics.moments import ClassMoments
from neuralcollapse.metrics.pairs import PairStatistics, pair_statistics
from neuralcollapse.metrics.statistics import Center, class_statistics


@torch.no_grad()
def collapse_metrics(
    moments: ClassMoments,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    center: Center = "samples",
    min_samples: int = 1,
    max_samples: int | None = None,
    ood_mean: Tensor | None = None,
    pairwise: bool = True,
    code: Tensor | None = None,
) -> dict[str, float]:
    """Every metric of neural collapse that needs no single samples, in fp64.

    What each is, and where it comes from, is said at the function of its name. Metrics of the classifier are there
    when ``weight`` is given, ``nc5_ood`` when ``ood_mean`` is, those relative to a Gram (``nc2_gram_means``,
    ``nc2_gram_weights``, ``nc3_gram_duality``) when a ``code`` is, ``nc1_numerical_rank`` when the moments keep
    per-class scatter. ``nc1_pinv``, ``nc1_vci`` and ``rank_me`` are missing when ``min_samples`` or ``max_samples``
    leaves out classes whose scatter the moments have pooled with the others' (none that has one sample only, and none
    at all with ``ClassMoments(..., class_scatter=True)``).

    Args:
        moments: The moments of the features that the weight multiplies.
        weight: W (K, d).
        bias: b (K,); None is 0.
        center: ``"samples"``: deviations are taken from the mean of all samples; ``"classes"``: from the mean of
            the class means, with which an exact ETF measures 0 on unbalanced data too.
        min_samples: Classes with fewer samples are left out everywhere; 0 makes an absent class an error.
        max_samples: Classes with more samples are left out everywhere.
        ood_mean: (d,) mean feature of out-of-distribution data.
        pairwise: Include the metrics over all pairs of classes, O(K² d).
        code: L (K, r), whose Gram matrix LLᵀ the classifier is compared with (`neuralcollapse.code_from_gram`).

    Returns:
        Name to value, in the order of `neuralcollapse.metrics.catalogue.METRICS`.

    Raises:
        ValueError: Fewer than two classes measured, or an argument of another shape than the moments' or of another
            type.

    Examples:
        >>> features = torch.tensor([[1.0, 0.1], [1, -0.1], [-1, 0.1], [-1, -0.1]])
        >>> moments = ClassMoments(num_classes=2, feature_dim=2)
        >>> moments.update(features, torch.tensor([0, 0, 1, 1]))
        >>> metrics = collapse_metrics(moments, weight=torch.tensor([[1.0, 0], [-1, 0]]))
        >>> print(f"{metrics['nc1_quotient']:.4f} {metrics['nc3_duality']:.4f}")
        0.0100 0.0000
    """
    measured = class_statistics(moments, center=center, min_samples=min_samples, max_samples=max_samples)
    num_classes, feature_dim = moments.means.shape
    weight = _like_state("weight", weight, (num_classes, feature_dim), moments)
    bias = _like_state("bias", bias, (num_classes,), moments)
    ood_mean = _like_state("ood_mean", ood_mean, (feature_dim,), moments)
    check_code(code, num_classes)
    if code is not None:
        code = code.to(moments.device, torch.float64)[measured.classes]
    means, variances = measured.centred_means, measured.within_class_variances
    if weight is not None and len(measured.classes) < num_classes:
        weight = weight[measured.classes]
        bias = None if bias is None else bias[measured.classes]

    values: dict[str, Tensor] = {}
    if measured.within_class_covariance is not None:
        spectrum = nc1.BetweenClassSpectrum.of(means)
        values["nc1_pinv"] = nc1.nc1_pinv(measured.within_class_covariance, means, spectrum=spectrum)
        values["nc1_vci"] = nc1.nc1_vci(measured.within_class_covariance, means, spectrum=spectrum)
        values["rank_me"] = rank_me(measured.within_class_covariance, measured.class_means, measured.counts)
    within_class_trace = variances @ measured.counts.double() / measured.counts.sum()
    values["nc1_quotient"] = nc1.nc1_quotient(within_class_trace, means)
    if measured.class_scatter is not None:
        values["nc1_numerical_rank"] = nc1.nc1_numerical_rank(
            measured.class_scatter, measured.class_means, measured.counts
        )
    values["feature_norm"] = feature_norm(measured.class_means, variances, measured.counts)
    values["nc2_etf_means"] = nc2.nc2_etf(means)
    values["nc2_equinorm_means"] = nc2.nc2_equinorm(means)
    values["effective_rank_means"] = effective_rank(means)
    if code is not None:
        values["nc2_gram_means"] = gram.nc2_gram(means, code)
    if pairwise:
        values |= _pairwise_of_means(means, variances)
    if weight is not None:
        values["nc0_weight_sum"] = nc0.nc0_weight_sum(weight)
        values["nc2_etf_weights"] = nc2.nc2_etf(weight)
        values["nc2_equinorm_weights"] = nc2.nc2_equinorm(weight)
        values["nc2_equinorm_difference"] = nc2.nc2_equinorm_difference(means, weight)
        if pairwise:
            values |= _angles(pair_statistics(weight, _ANGLES), "weights")
        values["nc3_duality"] = nc3.nc3_duality(weight, means)
        values["nc3_distance"] = nc3.nc3_distance(weight, means)
        values["nc3_uniform"] = nc3.nc3_uniform(weight, means)
        values["nc3_uniform_cos"] = nc3.nc3_uniform_cos(weight, means)
        values["effective_rank_weights"] = effective_rank(weight)
        if code is not None:
            values["nc2_gram_weights"] = gram.nc2_gram(weight, code)
            values["nc3_gram_duality"] = gram.nc3_gram_duality(weight, means, code)
        values["nc4_bias"] = nc4.nc4_bias(weight, bias, measured.center)
    if ood_mean is not None:
        values["nc5_ood"] = nc5.nc5_ood(measured.class_means, ood_mean)
    # One copy from the device, not one for each metric.
    return in_order(dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True)))


_ANGLES = {"equiangular": nc2.cosines, "max_angle": nc2.distance_to_max_angle}
_KERNELS = {kernel: nc2.hyperspherical_kernel(kernel) for kernel in nc2.HYPERSPHERICAL_KERNELS}


def _angles(statistics: dict[str, PairStatistics], suffix: str) -> dict[str, Tensor]:
    _, variance, count = statistics["equiangular"]
    return {
        f"nc2_equiangular_{suffix}": nc2.std_over_ordered_pairs(variance, count),
        f"nc2_max_angle_{suffix}": statistics["max_angle"].mean,
    }


def _pairwise_of_means(means: Tensor, variances: Tensor) -> dict[str, Tensor]:
    """All that needs the pairs of class means, in one pass over them."""
    functions = {"cdnv": nc1.cdnv_of_pairs(variances), **_ANGLES, **_KERNELS}
    statistics = pair_statistics(means, functions)
    values = {"nc1_cdnv": statistics["cdnv"].mean} | _angles(statistics, "means")
    for kernel in _KERNELS:
        values[f"nc2_hyperspherical_{kernel}_mean"] = statistics[kernel].mean
        values[f"nc2_hyperspherical_{kernel}_variance"] = statistics[kernel].variance
    return values


def _like_state(name: str, tensor: Tensor | None, shape: tuple[int, ...], moments: ClassMoments) -> Tensor | None:
    """The argument checked, in fp64, where the moments are."""
    if tensor is None:
        return None
    check_floating(name, tensor)
    if tensor.shape != shape:
        raise ValueError(f"{name} must be of shape {shape}, got {tuple(tensor.shape)}")
    check_finite(name, tensor)
    return tensor.to(moments.device, torch.float64)
