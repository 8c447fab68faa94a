"""Metrics without a value for what was measured: which they are, and why."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from neuralcollapse.metrics.moments import ClassMoments
from neuralcollapse.metrics.statistics import ClassStatistics

_WITHIN = {"nc1_pinv", "nc1_vci", "nc1_quotient", "nc1_cdnv", "nc1_numerical_rank"}
_ANGLES = {"nc2_equiangular", "nc2_max_angle"}
_OF_MEANS = ("nc2_etf", "nc2_equinorm", "nc2_equiangular", "nc2_max_angle", "nc2_gram", "effective_rank")
_DUALITY = {"nc3_duality", "nc3_distance", "nc3_uniform", "nc3_uniform_cos", "nc3_gram_duality"}
_SHARED = _DUALITY | {"nc2_equinorm_difference"}
_KERNELS = {f"nc2_hyperspherical_{kernel}_{of}" for kernel in ("dist", "log", "riesz") for of in ("mean", "variance")}
_SINGULAR = {name for name in _KERNELS if "dist" not in name}
_BETWEEN = (_WITHIN - {"nc1_numerical_rank"}) | {f"{name}_means" for name in _OF_MEANS} | _KERNELS | _SHARED
_OF_WEIGHTS = {f"{name}_weights" for name in _OF_MEANS} | {"nc0_weight_sum"} | _SHARED
_OF_FEATURES = _BETWEEN | _WITHIN | {"feature_norm", "rank_me", "nc4_bias", "nc5_ood"}

NO_BETWEEN = "the class means are equal, up to rounding: there is no between-class scatter"
CONSTANT = "the features are the same for all samples, up to rounding: there is no between-class scatter"
NO_SAMPLE = "no sample was measured"
POOLED = (
    "the scatter of classes that min_samples or drop_classes_above leaves out is pooled with the others' "
    "(class_scatter=True keeps it apart)"
)
NOT_FINITE = "the formula has no finite value for what was measured"
# What it means if these have no value and no other reason is known.
_OF_PAIRS = {"nc1_cdnv": "two classes have the same mean, up to rounding"} | dict.fromkeys(
    _SINGULAR, "two class means have the same direction from the centre, up to rounding"
)

Reason = tuple[str, Iterable[str]]


def without_undefined(values: dict[str, float], known: Mapping[str, str]) -> tuple[dict[str, float], dict[str, str]]:
    """Return the values with NaN for those that have none, and the reason of each of these.

    Args:
        values: Name to value.
        known: Name to reason, of these metrics or of others.

    Examples:
        >>> without_undefined({"nc1_pinv": 0.0, "nc1_vci": 0.5}, {"nc1_pinv": "no class has two samples"})
        ({'nc1_pinv': nan, 'nc1_vci': 0.5}, {'nc1_pinv': 'no class has two samples'})
    """
    undefined = {
        name: known.get(name) or _OF_PAIRS.get(name, NOT_FINITE)
        for name, value in values.items()
        if name in known or not math.isfinite(value)
    }
    return {name: math.nan if name in undefined else value for name, value in values.items()}, undefined


def reasons_of_moments(
    moments: ClassMoments,
    measured: ClassStatistics,
    names: Iterable[str],
    *,
    weight: Tensor | None = None,
    code: Tensor | None = None,
    ood_mean: Tensor | None = None,
) -> dict[str, str]:
    """Return which of the metrics of `collapse_metrics` have no value, and why; without those of pairs of classes.

    Args:
        moments: What was measured.
        measured: The statistics of the classes that count.
        names: The metrics asked for.
        weight: Their rows of W.
        code: Their rows of the code.
        ood_mean: As for `collapse_metrics`.
    """
    names = set(names)
    found: dict[str, str] = {}
    for reason, affected in _reasons(moments, measured, names, weight, code, ood_mean):
        found |= {name: reason for name in names & set(affected) if name not in found}
    return found


def _reasons(
    moments: ClassMoments,
    measured: ClassStatistics,
    names: set[str],
    weight: Tensor | None,
    code: Tensor | None,
    ood_mean: Tensor | None,
) -> Iterator[Reason]:
    """Yield each reason that holds, with the metrics that it leaves without a value; the first one counts."""
    if len(measured.classes) == 0:
        yield NO_SAMPLE, names
        return
    if len(measured.classes) == 1:
        yield f"only class {int(measured.classes[0])} has samples", names - {"feature_norm", "rank_me"}
    yield from _out_of_range(moments, measured)
    if int(measured.counts.max()) < 2:
        yield "no class has more than one sample, so that nothing can vary within one", _WITHIN
    if measured.constant:
        yield CONSTANT, _BETWEEN | _WITHIN
    if not measured.centred_means.any():
        yield NO_BETWEEN, _BETWEEN
    if places := _zero_rows(measured.centred_means, measured.classes):
        affected = _KERNELS | {f"{name}_means" for name in _ANGLES} | {"nc3_uniform_cos"}
        yield f"a class mean is at the centre, up to rounding, and has no direction ({places})", affected
    if measured.within_class_covariance is None:
        yield POOLED, {"nc1_pinv", "nc1_vci", "rank_me"}
    if not measured.class_means.any() and not measured.within_class_variances.any():
        yield "all features are zero", {"rank_me"}
    if empty := _zero_rows(measured.class_means, measured.classes, measured.within_class_variances):
        yield f"all features of a class are zero ({empty})", {"nc1_numerical_rank"}
    if weight is not None:
        yield from _of_weight(weight, measured.classes)
    if code is not None and not (code - code.mean(dim=0)).any():
        yield "the rows of the code are all equal", {"nc2_gram_means", "nc2_gram_weights", "nc3_gram_duality"}
    if ood_mean is not None and not ood_mean.any():
        yield "the mean of the out-of-distribution features is zero", {"nc5_ood"}
    small = torch.linalg.vector_norm(measured.class_means, dim=1) <= measured.resolution
    if small.any():
        yield f"a class mean is zero, up to rounding ({_named(measured.classes[small])})", {"nc5_ood"}


def _of_weight(weight: Tensor, classes: Tensor) -> Iterator[Reason]:
    if not weight.any():
        yield "the weight is zero", _OF_WEIGHTS
    if places := _zero_rows(weight, classes):
        affected = {f"{name}_weights" for name in _ANGLES} | {"nc3_uniform_cos"}
        yield f"a row of the weight is zero and has no direction ({places})", affected
    if not (weight - weight[0]).any():
        yield "the rows of the weight are all equal", {"nc2_gram_weights", "nc3_gram_duality"}


def _out_of_range(moments: ClassMoments, measured: ClassStatistics) -> Iterator[Reason]:
    """Yield what is not right because squares of features are beyond the range of the dtype of the moments."""
    dtype = moments.means.dtype
    limits = torch.finfo(dtype)
    name = str(dtype).removeprefix("torch.")
    advice = "" if dtype == torch.float64 else "; dtype=torch.float64 or 'mixed' has a wider one"
    if not torch.isfinite(measured.class_means).all():
        yield f"features are beyond the range of {name}{advice}", _OF_FEATURES
    squares = _WITHIN | {"feature_norm", "rank_me"}
    covariance = measured.within_class_covariance
    whole = covariance is None or bool(torch.isfinite(covariance).all())
    if not (whole and torch.isfinite(measured.within_class_variances).all()):
        yield f"squares of features are beyond the range of {name}{advice}", squares
    size = float(measured.scale)
    spread = float(measured.within_class_variances.max())
    if 0 < size * limits.eps < limits.tiny**0.5 and spread < limits.tiny / limits.eps:
        yield f"features of size {size:.0e} are so small that their squares vanish in {name}{advice}", squares


def _zero_rows(rows: Tensor, classes: Tensor, other: Tensor | None = None) -> str:
    """Return the names of the classes whose row, and whose other value if given, is zero; empty for none."""
    zero = ~rows.any(dim=1)
    if other is not None:
        zero &= other == 0
    return _named(classes[zero]) if bool(zero.any()) else ""


def _named(classes: Tensor) -> str:
    """Return "class 3", or "classes 1, 2, …"."""
    several = len(classes) > 1
    return f"class{'es' if several else ''} {listed(classes.tolist())}"


def listed(classes: list[int], most: int = 10) -> str:
    """Return the first of the classes, and an ellipsis for the others.

    Examples:
        >>> listed([3, 5, 8], most=2)
        '3, 5, …'
    """
    return ", ".join(map(str, classes[:most])) + (", …" if len(classes) > most else "")


def grouped(undefined: Mapping[str, str]) -> list[str]:
    """Return one line per reason, with the metrics that it concerns.

    Examples:
        >>> grouped({"nc1_pinv": "no class has two samples", "nc1_vci": "no class has two samples"})
        ['nc1_pinv, nc1_vci: no class has two samples']
    """
    names: dict[str, list[str]] = {}
    for name, reason in undefined.items():
        names.setdefault(reason, []).append(name)
    return [f"{', '.join(of)}: {reason}" for reason, of in names.items()]


def warn_of(
    undefined: Mapping[str, str], layers: Mapping[str, Mapping[str, str]] | None = None, depth: int = 3
) -> None:
    """Warn once of all metrics that have no value, also of layers.

    Args:
        undefined: Name to reason.
        layers: The same of each layer.
        depth: The `stacklevel` of the warning.
    """
    lines = grouped(undefined)
    for layer, of_layer in (layers or {}).items():
        lines += [f"layer {layer!r}: {line}" for line in grouped(of_layer)]
    if lines:
        warnings.warn(f"metrics that are not defined are NaN. {'. '.join(lines)}", UserWarning, stacklevel=depth)
