"""All metrics of class moments: every entry of the catalogue whose inputs are available."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from neuralcollapse._checks import check_code, check_finite, check_floating
from neuralcollapse.catalogue import METRICS, Metric
from neuralcollapse.metrics.moments import ClassMoments
from neuralcollapse.metrics.nc1 import BetweenClassSpectrum
from neuralcollapse.metrics.pairs import pair_statistics
from neuralcollapse.metrics.statistics import ClassStatistics, MeasureOptions, class_statistics
from neuralcollapse.metrics.undefined import MetricValues, conditions_of_moments, warn_of_undefined, without_undefined


def collapse_metrics(
    moments: ClassMoments,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    ood_mean: Tensor | None = None,
    options: MeasureOptions = MeasureOptions(),
) -> dict[str, float]:
    """Return every metric of neural collapse that can be computed from class moments, in fp64.

    Each metric is documented by the function of the same name. Metrics of the classifier need ``weight``, ``nc5_ood``
    needs ``ood_mean``, metrics relative to a Gram matrix (``nc2_gram_means``, ``nc2_gram_weights``,
    ``nc3_gram_duality``) need ``options.code``, and ``nc1_numerical_rank`` needs moments with per-class scatter.

    Undefined metrics are NaN, and one warning gives the reasons; `undefined_metrics` returns them. ``nc1_pinv``,
    ``nc1_vci`` and ``rank_me`` are undefined if the options leave out classes whose scatter is pooled with that of the
    other classes. A class with a single sample has no scatter, and ``ClassMoments(..., class_scatter=True)`` keeps the
    scatter of each class separately.

    Args:
        moments: Moments of the features that the weight multiplies.
        weight: W (K, d).
        bias: b (K,) of the same classifier; None for 0.
        ood_mean: (d,) mean feature of out-of-distribution data.
        options: Centre, classes left out, pairs and code.

    Returns:
        Dictionary from name to value, in the order of `neuralcollapse.catalogue.METRICS`.

    Raises:
        ValueError: if the options leave fewer than two classes, a bias is given without a weight, or a shape or type is
            wrong.

    Examples:
        >>> features = torch.tensor([[1.0, 0.1], [1, -0.1], [-1, 0.1], [-1, -0.1]])
        >>> moments = ClassMoments(num_classes=2, feature_dim=2)
        >>> moments.update(features, torch.tensor([0, 0, 1, 1]))
        >>> metrics = collapse_metrics(moments, weight=torch.tensor([[1.0, 0], [-1, 0]]))
        >>> print(f"{metrics['nc1_quotient']:.4f} {metrics['nc3_duality']:.4f}")
        0.0100 0.0000
    """
    values, undefined = measure_moments(moments, weight, bias, ood_mean, options)
    warn_of_undefined(undefined)
    return values


def undefined_metrics(
    moments: ClassMoments,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    ood_mean: Tensor | None = None,
    options: MeasureOptions = MeasureOptions(),
) -> dict[str, str]:
    """Return the reason for each metric that is NaN in `collapse_metrics` with the same arguments.

    Args:
        moments: As for `collapse_metrics`.
        weight: As for `collapse_metrics`.
        bias: As for `collapse_metrics`.
        ood_mean: As for `collapse_metrics`.
        options: As for `collapse_metrics`.

    Returns:
        Dictionary from name to reason.

    Raises:
        ValueError: as for `collapse_metrics`.

    Examples:
        >>> moments = ClassMoments(num_classes=2, feature_dim=2)
        >>> moments.update(torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([0, 1]))
        >>> undefined_metrics(moments)["nc1_quotient"]
        'no class has more than one sample, so there is no within-class variation'
    """
    return measure_moments(moments, weight, bias, ood_mean, options).undefined


@torch.no_grad()
def measure_moments(
    moments: ClassMoments,
    weight: Tensor | None,
    bias: Tensor | None,
    ood_mean: Tensor | None,
    options: MeasureOptions,
) -> MetricValues:
    """Return the results of `collapse_metrics` and of `undefined_metrics`, without a warning."""
    measured = class_statistics(moments, options)
    inputs = MomentInputs.of(moments, measured, weight, bias, ood_mean, options.code)
    entries = [
        entry
        for entry in METRICS.values()
        if entry.function and {*entry.inputs} <= inputs.known and (options.pairwise or entry.over != "pairs")
    ]
    values = _values(entries, inputs, measured.resolution) if len(measured.classes) else {}
    results = dict.fromkeys([entry.name for entry in entries], math.nan)
    if values:  # one copy from the device, not one per metric
        results |= dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))
    conditions = conditions_of_moments(
        moments, measured, weight=inputs.weight, code=inputs.code, ood_mean=inputs.ood_mean
    )
    return without_undefined(results, conditions)


@dataclass(frozen=True)
class MomentInputs:
    """Inputs of the metrics of moments, in fp64, with the names used in the catalogue; None if unknown.

    K is the number of measured classes; weight, bias and code have the rows of these classes only.
    """

    class_means: Tensor
    centred_means: Tensor
    center: Tensor
    counts: Tensor
    within_class_trace: Tensor
    within_class_variances: Tensor
    within_class_covariance: Tensor
    class_scatter: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    ood_mean: Tensor | None
    code: Tensor | None

    @classmethod
    def of(
        cls,
        moments: ClassMoments,
        measured: ClassStatistics,
        weight: Tensor | None,
        bias: Tensor | None,
        ood_mean: Tensor | None,
        code: Tensor | None,
    ) -> MomentInputs:
        """Check the arguments of `collapse_metrics`, and return the inputs for the measured classes."""
        num_classes, feature_dim = moments.means.shape
        device = measured.center.device
        rows = slice(None) if len(measured.classes) == num_classes else measured.classes
        weight = _in_fp64("weight", weight, (num_classes, feature_dim), device)
        bias = _in_fp64("bias", bias, (num_classes,), device)
        if weight is None and bias is not None:
            raise ValueError("bias must come with the weight of the same classifier, got weight = None")
        if code is not None:
            check_code(code, num_classes)
        if weight is not None:
            bias = weight.new_zeros(num_classes) if bias is None else bias
        counts, variances, covariance = (
            measured.counts,
            measured.within_class_variances,
            measured.within_class_covariance,
        )
        return cls(
            class_means=measured.class_means,
            centred_means=measured.centred_means,
            center=measured.center,
            counts=counts,
            within_class_trace=variances @ (counts.double() / counts.sum()),
            within_class_variances=variances,
            within_class_covariance=variances.new_full((), torch.nan) if covariance is None else covariance,
            class_scatter=measured.class_scatter,
            weight=None if weight is None else weight[rows],
            bias=None if bias is None else bias[rows],
            ood_mean=_in_fp64("ood_mean", ood_mean, (feature_dim,), device),
            code=None if code is None else code.to(device, torch.float64)[rows],
        )

    @property
    def known(self) -> set[str]:
        """Names of the inputs that are known."""
        return {"spectrum", *(field.name for field in fields(self) if getattr(self, field.name) is not None)}

    @cached_property
    def spectrum(self) -> BetweenClassSpectrum:
        """Spectrum of Σ_B."""
        return BetweenClassSpectrum.of(self.centred_means)

    @cached_property
    def finite(self) -> dict[str, bool]:
        """Name of each known tensor to whether its values are finite; the class scatter is tested by its traces."""
        tensors = {name: getattr(self, name) for name in self.known - {"spectrum", "class_scatter"}}
        flags = torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()]).tolist()
        finite = dict(zip(tensors, flags, strict=True))
        return finite | {"spectrum": True, "class_scatter": finite["within_class_variances"]}


def find_function(name: str) -> Any:
    """Return the function ``"MODULE.FUNCTION"`` of `neuralcollapse.metrics`."""
    module, function = name.split(".")
    return getattr(import_module(f"neuralcollapse.metrics.{module}"), function)


def _values(entries: list[Metric], inputs: MomentInputs, resolution: Tensor) -> dict[str, Tensor]:
    """Return the values of the entries whose inputs are finite."""
    entries = [entry for entry in entries if all(inputs.finite[name] for name in entry.inputs)]
    values = {
        entry.name: find_function(entry.function)(*(getattr(inputs, name) for name in entry.inputs))
        for entry in entries
        if not entry.over
    }
    for vectors, distance in (("centred_means", resolution), ("weight", 0.0)):
        over_pairs = [entry for entry in entries if entry.over == "pairs" and entry.inputs[0] == vectors]
        functions = {
            entry.function: _of_tile(entry.function, [getattr(inputs, name) for name in entry.inputs[1:]])
            for entry in over_pairs
        }
        if functions:  # one pass over the pairs of class means, and one over the pairs of rows of W
            statistics = pair_statistics(getattr(inputs, vectors), functions, resolution=distance)
            values |= {entry.name: getattr(statistics[entry.function], entry.statistic) for entry in over_pairs}
    return values


def _of_tile(name: str, others: list[Tensor]) -> Any:
    """Return a metric's function of a tile of pairs, with the other inputs bound."""
    function = find_function(name)
    return lambda tile: function(tile, *others)


def _in_fp64(name: str, tensor: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    """Check a tensor, and return it in fp64 on a device."""
    if tensor is None:
        return None
    check_floating(name, tensor)
    if tensor.shape != shape:
        raise ValueError(f"{name} must be of shape {shape}, got {tuple(tensor.shape)}")
    check_finite(name, tensor)
    return tensor.to(device, torch.float64)
