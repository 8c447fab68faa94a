"""Values of each class and of each pair of classes, whose statistics are the metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from neuralcollapse._checks import check_at_least, check_exponent, check_shapes
from neuralcollapse.metrics.moments import ClassMoments
from neuralcollapse.metrics.nc1 import cdnv
from neuralcollapse.metrics.nc2 import KERNELS, cosines
from neuralcollapse.metrics.pairs import PairTile
from neuralcollapse.metrics.scaling import unit_rows
from neuralcollapse.metrics.statistics import MeasureOptions, class_statistics

MATRICES = ("cosines_means", "cosines_weights", "cdnv", *KERNELS)


@dataclass(frozen=True, eq=False)
class ClassValues:
    """Values of the K measured classes, in fp64.

    Attributes:
        classes: (K,) indices among all classes.
        counts: (K,) numbers of samples n_k.
        mean_norms: (K,) norms ‖c_k‖ of the centred means, whose spread is ``nc2_equinorm_means``.
        weight_norms: (K,) norms ‖w_k‖, or None without a weight.
        within_class_variances: (K,) variances v_k, mean squared distances to the class mean.
        duality: (K,) cosines cos(w_k, c_k), whose variance is ``nc3_uniform_cos``; NaN for a class whose row or centred
            mean is zero. None without a weight.
    """

    classes: Tensor
    counts: Tensor
    mean_norms: Tensor
    weight_norms: Tensor | None
    within_class_variances: Tensor
    duality: Tensor | None


@torch.no_grad()
def class_values(
    moments: ClassMoments,
    weight: Tensor | None = None,
    *,
    options: MeasureOptions = MeasureOptions(),
) -> ClassValues:
    """Return norms, within-class variance and duality of each class.

    Args:
        moments: Moments of the features that the weight multiplies.
        weight: W (K, d).
        options: Centre and classes left out.

    Raises:
        ValueError: as for `collapse_metrics`.

    Examples:
        >>> moments = ClassMoments(2, 2)
        >>> moments.update(torch.tensor([[3.0, 0.5], [3, -0.5], [-3, 0], [-3, 0]]), torch.tensor([0, 0, 1, 1]))
        >>> values = class_values(moments)
        >>> values.mean_norms.tolist(), values.within_class_variances.tolist()
        ([3.0, 3.0], [0.25, 0.0])
    """
    measured = class_statistics(moments, options)
    rows = _rows(weight, moments, measured.classes)
    means = measured.centred_means
    return ClassValues(
        classes=measured.classes,
        counts=measured.counts,
        mean_norms=torch.linalg.vector_norm(means, dim=1),
        weight_norms=None if rows is None else torch.linalg.vector_norm(rows, dim=1),
        within_class_variances=measured.within_class_variances,
        duality=None if rows is None else (unit_rows(rows) * unit_rows(means)).sum(dim=1),
    )


@torch.no_grad()
def pair_matrices(
    moments: ClassMoments,
    weight: Tensor | None = None,
    *,
    names: Sequence[str] | None = None,
    options: MeasureOptions = MeasureOptions(),
    exponent: float = 1.0,
    max_classes: int = 2048,
) -> dict[str, Tensor]:
    """Return (K, K) matrices of pairs of classes, whose statistics over pairs are the pairwise metrics.

    They are ``cosines_means`` and ``cosines_weights`` of centred means (also called interference) and of W; ``cdnv``;
    and the kernels ``dist``, ``log`` and ``riesz`` of the distance between unit centred means. Undefined values are
    NaN: ``cdnv``, ``log`` and ``riesz`` of a class with itself or with a class of equal mean (direction), up to
    rounding, and values that need the direction of a zero vector.

    Args:
        moments: Moments of the features that the weight multiplies.
        weight: W (K, d).
        names: Names of the matrices; by default all.
        options: Centre and classes left out.
        exponent: Exponent of the distance of kernels, and of the squared distance of CDNV.
        max_classes: Maximum number of classes; with more, the error states the memory that the matrices would take.

    Raises:
        ValueError: if a name is unknown, ``cosines_weights`` is requested without a weight, the exponent is not
            positive, or there are too many classes; else as for `collapse_metrics`.

    Examples:
        >>> moments = ClassMoments(2, 2)
        >>> moments.update(torch.tensor([[3.0, 0.5], [3, -0.5], [-3, 0], [-3, 0]]), torch.tensor([0, 0, 1, 1]))
        >>> pair_matrices(moments, names=["cosines_means"])["cosines_means"].tolist()
        [[1.0, -1.0], [-1.0, 1.0]]
    """
    measured = class_statistics(moments, options)
    rows = _rows(weight, moments, measured.classes)
    check_exponent("exponent", exponent)
    if names is None:
        names = [name for name in MATRICES if name != "cosines_weights" or rows is not None]
    elif isinstance(names, str) or (unknown := [name for name in names if name not in MATRICES]):
        raise ValueError(f"names must be of {', '.join(MATRICES)}, got {names if isinstance(names, str) else unknown}")
    _check_memory(len(measured.classes), len(names), max_classes)
    functions: dict[str, Callable[[PairTile], Tensor]] = {
        "cosines_means": cosines,
        "cosines_weights": cosines,
        "cdnv": partial(cdnv, within_class_variances=measured.within_class_variances, power=exponent),
        **{name: partial(kernel, exponent=exponent) for name, kernel in KERNELS.items()},
    }
    means = PairTile.of_all(measured.centred_means, measured.resolution)
    matrices = {}
    for name in names:
        if name != "cosines_weights":
            matrices[name] = functions[name](means).clone()
        elif rows is None:
            raise ValueError("weight must be given for cosines_weights, got None")
        else:
            matrices[name] = functions[name](PairTile.of_all(rows)).clone()
    return matrices


def _rows(weight: Tensor | None, moments: ClassMoments, classes: Tensor) -> Tensor | None:
    if weight is None:
        return None
    check_shapes(means=(moments.means, "K d"), weight=(weight, "K d"))
    return weight.to(moments.device, torch.float64)[classes]


def _check_memory(num_classes: int, matrices: int, max_classes: int) -> None:
    check_at_least("max_classes", max_classes, 2)
    if num_classes > max_classes:
        needed = 8 * num_classes**2 / 1e9
        raise ValueError(
            f"{matrices} matrices of {num_classes} classes would take {needed * matrices:.3g} GB "
            f"({needed:.3g} GB each); "
            f"max_classes={num_classes} takes it, max_classes is {max_classes}"
        )
