"""Values of each class and of each pair of classes; metrics are statistics of these values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from neuralcollapse._checks import check_at_least, check_exponent, check_integers, check_shapes
from neuralcollapse.metrics.moments import ClassMoments
from neuralcollapse.metrics.nc1 import cdnv
from neuralcollapse.metrics.nc2 import KERNELS, cosines
from neuralcollapse.metrics.pairs import PairTile
from neuralcollapse.metrics.scaling import unit_rows
from neuralcollapse.metrics.statistics import MeasureOptions, class_statistics

if TYPE_CHECKING:
    from neuralcollapse.metrics.measurement import Measurement

MATRICES = ("cosines_means", "cosines_weights", "cdnv", *KERNELS)


@dataclass(frozen=True, eq=False)
class ClassValues:
    """Values of the K measured classes, in fp64.

    Attributes:
        classes: (K,) indices among all classes.
        counts: (K,) numbers of samples n_k.
        mean_norms: (K,) norms ‖c_k‖ of the centred means; ``nc2_equinorm_means`` is their relative spread.
        weight_norms: (K,) norms ‖w_k‖, or None without a weight.
        within_class_variances: (K,) variances v_k, mean squared distances to the class mean.
        duality: (K,) cosines cos(w_k, c_k); ``nc3_uniform_cos`` is their variance. NaN for a class whose row or centred
            mean is zero; None without a weight.
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
    """Return (K, K) matrices over pairs of classes; the pairwise metrics are statistics of their entries.

    The matrices are ``cosines_means`` and ``cosines_weights``, the cosines of the centred means (also called
    interference) and of the rows of W; ``cdnv``; and the kernels ``dist``, ``log`` and ``riesz`` of the distance
    between unit centred means. Undefined values are NaN: ``cdnv``, ``log`` and ``riesz`` of a class with itself, or
    with a class of the same mean (for the kernels, the same direction) up to rounding, and values that need the
    direction of a zero vector.

    Args:
        moments: Moments of the features that the weight multiplies.
        weight: W (K, d).
        names: Names of the matrices; by default all.
        options: Centre and classes left out.
        exponent: Exponent of the distance in kernels, and of the squared distance in CDNV.
        max_classes: Maximum number of classes. If there are more, the error states the memory that the matrices need.

    Raises:
        ValueError: if a name is unknown, ``cosines_weights`` is requested without a weight, the exponent is not
            positive, or there are too many classes, or as for `collapse_metrics`.

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


GROUPS = ("many", "medium", "few")
# Smallest number of training images of a class with many images, and with a medium number (Liu et al., CVPR 2019).
_MANY, _MEDIUM = 101, 20


def class_groups(counts: Tensor) -> dict[str, Tensor]:
    """Return the classes with many, with a medium number of, and with few training samples.

    Classes with more than 100 samples have many, those with 20 to 100 a medium number, and those with fewer than 20
    few, if each of these groups then has a class. Otherwise, the groups are thirds of the classes by number of samples:
    class k is in group ⌊3 (r_k + ½)/K⌋, where r_k is its rank, from 0 for the largest number; classes with equal
    numbers share their mean rank. All classes of a balanced data set are therefore medium.

    Args:
        counts: (K,) integers, numbers of training samples.

    Returns:
        Indices of the classes of each group, by the name of the group. If the groups are thirds, one may be empty.

    Raises:
        ValueError: if the counts have the wrong type or shape, there are fewer than two, or one is negative.

    Source: Liu et al., "Large-scale long-tailed recognition in an open world" (CVPR 2019) for the limits 20 and 100.
    Thirds are a definition of this project, for data sets such as CIFAR-10-LT, in which every class has at least 20
    images.

    Examples:
        >>> {name: classes.tolist() for name, classes in class_groups(torch.tensor([500, 70, 5, 120])).items()}
        {'many': [0, 3], 'medium': [1], 'few': [2]}
        >>> {name: classes.tolist() for name, classes in class_groups(torch.tensor([5000, 900, 200])).items()}
        {'many': [0], 'medium': [1], 'few': [2]}
    """
    check_integers("counts", counts)
    if counts.ndim != 1:
        raise ValueError(f"counts must be of shape (K,), got {tuple(counts.shape)}")
    check_at_least("num_classes", len(counts), 2)
    if bool((counts < 0).any()):
        raise ValueError(f"counts must be at least 0, got {int(counts.min())}")
    group = (counts < _MANY).long() + (counts < _MEDIUM).long()
    if len(group.unique()) < len(GROUPS):
        larger = (counts[:, None] < counts).sum(dim=1)
        equal = (counts[:, None] == counts).sum(dim=1)
        group = 3 * (2 * larger + equal) // (2 * len(counts))
    return {name: (group == number).nonzero().flatten() for number, name in enumerate(GROUPS)}


@torch.no_grad()
def group_metrics(measurement: Measurement, counts: Tensor | None = None) -> dict[str, float]:
    """Return the accuracy and NC1 of the classes with many, with a medium number of, and with few training samples.

    With g a group of `class_groups`, v_k the within-class variances and c_k the centred means of the K measured
    classes, ``accuracy_g`` is the mean over the group's classes of the accuracy of each, and ``nc1_quotient_g`` is
    (1/|g|) Σ_{k∈g} v_k / ((1/K) Σ_k ‖c_k‖²): variability within the group's classes relative to that between all
    classes. If all classes have the same number of measured samples, the mean of ``nc1_quotient_g`` over all classes is
    ``nc1_quotient``.

    Args:
        measurement: The measurement.
        counts: (K,) integers, numbers of training samples of each class; by default those of the train split to which
            the measurement refers, or else those of the measured split.

    Returns:
        Dictionary from name to value, for groups that have a class; NaN for a group without a measured sample.
        Accuracies are absent for measurements without a classifier, and for records of versions that did not save
        ``class_accuracy``.

    Raises:
        ValueError: if the counts do not have shape (K,), or as for `class_groups` and `class_statistics`.

    Examples:
        >>> from neuralcollapse.metrics import measure_features
        >>> features, targets = torch.tensor([[1.0, 0], [2.0, 0], [0, 1.0], [2, 0.5]]), torch.tensor([0, 0, 1, 2])
        >>> weight = torch.tensor([[1.0, 0], [0, 1.0], [-1.0, -1.0]])
        >>> measurement = measure_features(features, targets, weight, progress=False)
        >>> values = group_metrics(measurement, torch.tensor([200, 50, 5]))
        >>> values["accuracy_many"], values["accuracy_few"], values["nc1_quotient_few"]
        (1.0, 0.0, 0.0)
    """
    if counts is None:
        counts = (measurement.train_moments or measurement.moments).counts
    num_classes = measurement.num_classes
    if not isinstance(counts, Tensor) or counts.shape != (num_classes,):
        raise ValueError(f"counts must be of shape ({num_classes},), got {getattr(counts, 'shape', counts)}")
    statistics = class_statistics(measurement.moments, measurement.options)
    classes = statistics.classes.cpu()
    between = statistics.centred_means.square().sum(dim=1).mean().cpu()
    within = torch.full((num_classes,), torch.nan, dtype=torch.float64)
    within[classes] = statistics.within_class_variances.cpu() / torch.where(between > 0, between, torch.nan)
    values = {"nc1_quotient": within}
    if len(measurement.weight) and len(measurement.class_accuracy):
        values = {"accuracy": measurement.class_accuracy.double()} | values
    groups = {name: members for name, members in class_groups(counts.cpu()).items() if len(members)}
    return {
        f"{metric}_{name}": float(of_class[members].nanmean())
        for metric, of_class in values.items()
        for name, members in groups.items()
    }


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
            f"max_classes={num_classes} allows them, max_classes is {max_classes}"
        )
