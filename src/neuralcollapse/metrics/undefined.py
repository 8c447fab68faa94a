"""Conditions under which metrics are undefined, and their reasons in words.

The catalogue names the conditions of each metric (`Metric.conditions`). This module determines which conditions hold
for the measured data, in order of priority. The reason for an undefined metric is the first of them that its entry
names.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from neuralcollapse._checks import listed
from neuralcollapse.catalogue import METRICS
from neuralcollapse.metrics.moments import ClassMoments
from neuralcollapse.metrics.statistics import ClassStatistics

_NOT_FINITE = "the formula has no finite value for the measured data"


class Condition(NamedTuple):
    """A condition that holds.

    Attributes:
        name: Name of the condition in the catalogue.
        reason: Text for the user.
        certain: Whether a metric is undefined under this condition even if its formula gives a finite value; otherwise
            the condition only explains NaN.
    """

    name: str
    reason: str
    certain: bool = True


class MetricValues(NamedTuple):
    """Metrics by name, NaN for undefined ones, and the reasons for these."""

    metrics: dict[str, float]
    undefined: dict[str, str]


CONSTANT = Condition(
    "constant features",
    "the features are the same for all samples, up to rounding: there is no between-class scatter",
)
EQUAL_MEANS = Condition("equal means", "the class means are equal, up to rounding: there is no between-class scatter")
NO_SAMPLE = Condition("no sample", "no sample was measured")


def one_class(classes: Tensor) -> Condition:
    """Return the condition that fewer than two classes have samples."""
    return Condition("one class", f"only class {int(classes[0])} has samples") if len(classes) else NO_SAMPLE


def without_undefined(values: Mapping[str, float], conditions: Iterable[Condition]) -> MetricValues:
    """Return the values, with NaN for undefined metrics, and the reasons for these.

    Args:
        values: Dictionary from name to value; infinite and NaN values are undefined.
        conditions: Conditions that hold, in order of priority.

    Examples:
        >>> without_undefined({"nc1_pinv": 0.0, "rank_me": 1.5}, [Condition("no spread", "no class has two samples")])
        MetricValues(metrics={'nc1_pinv': nan, 'rank_me': 1.5}, undefined={'nc1_pinv': 'no class has two samples'})
    """
    conditions = list(conditions)
    undefined = {}
    for name, value in values.items():
        finite, known = math.isfinite(value), METRICS[name].conditions
        reasons = [
            reason for condition, reason, certain in conditions if condition in known and (certain or not finite)
        ]
        if reasons or not finite:
            undefined[name] = reasons[0] if reasons else _NOT_FINITE
    return MetricValues({name: math.nan if name in undefined else value for name, value in values.items()}, undefined)


def conditions_of_moments(
    moments: ClassMoments,
    measured: ClassStatistics,
    *,
    weight: Tensor | None = None,
    code: Tensor | None = None,
    ood_mean: Tensor | None = None,
) -> Iterator[Condition]:
    """Yield the conditions that hold, in order of priority.

    Args:
        moments: Moments of the features.
        measured: Statistics of the measured classes.
        weight: Rows of W of these classes.
        code: Rows of the code of these classes.
        ood_mean: (d,) mean feature of the out-of-distribution data.
    """
    means, classes = measured.centred_means, measured.classes
    if len(classes) < 2:
        yield one_class(classes)
    if not len(classes):
        return
    yield from _range(moments, measured)
    if int(measured.counts.max()) < 2:
        yield Condition("no spread", "no class has more than one sample, so there is no within-class variation")
    if measured.constant:
        yield CONSTANT
    if not means.any():
        yield EQUAL_MEANS
    if (zero := ~means.any(dim=1)).any():
        reason = f"a class mean is at the centre, up to rounding, and has no direction ({_named(classes[zero])})"
        yield Condition("mean at the centre", reason)
    if measured.within_class_covariance is None:
        reason = "the scatter of classes that min_samples or drop_classes_above leaves out is pooled with the others"
        yield Condition("pooled scatter", f"{reason} (class_scatter=True keeps it separately)")
    if not measured.class_means.any() and not measured.within_class_variances.any():
        yield Condition("zero features", "all features are zero")
    if (zero := ~measured.class_means.any(dim=1) & (measured.within_class_variances == 0)).any():
        yield Condition("zero features of a class", f"all features of a class are zero ({_named(classes[zero])})")
    if weight is not None:
        yield from _conditions_of_weight(weight, classes)
    if code is not None and not (code - code.mean(dim=0)).any():
        yield Condition("equal rows of the code", "the rows of the code are all equal")
    if ood_mean is not None and not ood_mean.any():
        yield Condition("zero ood mean", "the mean of the out-of-distribution features is zero")
    small = torch.linalg.vector_norm(measured.class_means, dim=1) <= measured.resolution
    if small.any():
        yield Condition("zero class mean", f"a class mean is zero, up to rounding ({_named(classes[small])})")
    yield Condition("equal mean of two classes", "two classes have the same mean, up to rounding", False)
    reason = "two class means have the same direction from the centre, up to rounding"
    yield Condition("equal directions", reason, False)


def _conditions_of_weight(weight: Tensor, classes: Tensor) -> Iterator[Condition]:
    if not weight.any():
        yield Condition("zero weight", "the weight is zero")
    if (zero := ~weight.any(dim=1)).any():
        reason = f"a row of the weight is zero and has no direction ({_named(classes[zero])})"
        yield Condition("zero row of the weight", reason)
    if not (weight - weight[0]).any():
        yield Condition("equal rows of the weight", "the rows of the weight are all equal")


def _range(moments: ClassMoments, measured: ClassStatistics) -> Iterator[Condition]:
    """Yield a condition if features, or their squares, are outside the range of the dtype of the moments."""
    dtype = moments.means.dtype
    limits, name = torch.finfo(dtype), str(dtype).removeprefix("torch.")
    advice = "" if dtype == torch.float64 else "; dtype=torch.float64 or 'mixed' has a wider range"
    if not torch.isfinite(measured.class_means).all():
        yield Condition("range", f"features are beyond the range of {name}{advice}")
    covariance, variances = measured.within_class_covariance, measured.within_class_variances
    if not (torch.isfinite(variances).all() and (covariance is None or torch.isfinite(covariance).all())):
        yield Condition("range of squares", f"squares of features are beyond the range of {name}{advice}")
    size = float(measured.scale)
    if 0 < size * limits.eps < limits.tiny**0.5 and float(variances.max()) < limits.tiny / limits.eps:
        reason = f"features of size {size:.0e} are so small that their squares underflow in {name}{advice}"
        yield Condition("range of squares", reason)


def _named(classes: Tensor) -> str:
    """Return "class 3", or "classes 1, 2, …"."""
    return f"class{'es' if len(classes) > 1 else ''} {listed(classes.tolist())}"


def grouped(undefined: Mapping[str, str], layers: Mapping[str, Mapping[str, str]] | None = None) -> list[str]:
    """Return one line per reason, with the metrics that it concerns, for the classifier's features and for layers.

    Examples:
        >>> grouped({"nc1_pinv": "no class has two samples", "nc1_vci": "no class has two samples"})
        ['nc1_pinv, nc1_vci: no class has two samples']
    """
    names: dict[str, list[str]] = {}
    for name, reason in undefined.items():
        names.setdefault(reason, []).append(name)
    lines = [f"{', '.join(metrics)}: {reason}" for reason, metrics in names.items()]
    for layer, of_layer in (layers or {}).items():
        lines += [f"layer {layer!r}: {line}" for line in grouped(of_layer)]
    return lines


def warn_of_undefined(
    undefined: Mapping[str, str], layers: Mapping[str, Mapping[str, str]] | None = None, depth: int = 3
) -> None:
    """Issue one warning for all undefined metrics, including those of layers; ``depth`` is its `stacklevel`."""
    if lines := grouped(undefined, layers):
        warnings.warn(f"undefined metrics are NaN. {'. '.join(lines)}", UserWarning, stacklevel=depth)
