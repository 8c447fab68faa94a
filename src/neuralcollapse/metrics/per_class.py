"""Values of each class and of each pair of classes, where one figure for all of them hides which it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuralcollapse._checks import check_at_least, check_exponent, check_shapes
from neuralcollapse.metrics.moments import ClassMoments
from neuralcollapse.metrics.nc1 import cdnv_of_pairs
from neuralcollapse.metrics.nc2 import HYPERSPHERICAL_KERNELS, cosines, hyperspherical_kernel
from neuralcollapse.metrics.pairs import PairTile
from neuralcollapse.metrics.scaling import power_of_two, rescaled, unit_rows
from neuralcollapse.metrics.statistics import Center, class_statistics

MATRICES = ("cosines_means", "cosines_weights", "cdnv", *HYPERSPHERICAL_KERNELS)


@dataclass(frozen=True, eq=False)
class ClassValues:
    """Figures of the K classes measured, in fp64.

    Attributes:
        classes: (K,) their indices among all classes.
        counts: (K,) n_k.
        mean_norms: (K,) ‖c_k‖ of the centred means, whose spread is ``nc2_equinorm_means``.
        weight_norms: (K,) ‖w_k‖, or None without a weight.
        within_class_variances: (K,) v_k, mean squared distance to the class mean.
        duality: (K,) cos(w_k, c_k), whose variance is ``nc3_uniform_cos``; NaN of a class whose row or centred mean is
            zero. None without a weight.
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
    center: Center = "samples",
    min_samples: int = 1,
    drop_classes_above: int | None = None,
) -> ClassValues:
    """Norms, within-class variance and duality of each class.

    Args:
        moments: The moments of the features that the weight multiplies.
        weight: W (K, d).
        center: As for `collapse_metrics`.
        min_samples: As for `collapse_metrics`.
        drop_classes_above: As for `collapse_metrics`.

    Raises:
        ValueError: As for `collapse_metrics`.

    Examples:
        >>> moments = ClassMoments(2, 2)
        >>> moments.update(torch.tensor([[3.0, 0.5], [3, -0.5], [-3, 0], [-3, 0]]), torch.tensor([0, 0, 1, 1]))
        >>> values = class_values(moments)
        >>> values.mean_norms.tolist(), values.within_class_variances.tolist()
        ([3.0, 3.0], [0.25, 0.0])
    """
    measured = class_statistics(moments, center=center, min_samples=min_samples, drop_classes_above=drop_classes_above)
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
    center: Center = "samples",
    min_samples: int = 1,
    drop_classes_above: int | None = None,
    exponent: float = 1.0,
    max_classes: int = 2048,
) -> dict[str, Tensor]:
    """(K, K) matrices of pairs of classes: those whose means over pairs are the pairwise metrics.

    ``cosines_means`` and ``cosines_weights`` of centred means (what others call interference) and of W; ``cdnv``; and
    the kernels ``dist``, ``log`` and ``riesz`` of the distance between unit centred means. What is not defined is NaN:
    ``cdnv``, ``log`` and ``riesz`` of a class with itself or with one of the same mean (direction), up to rounding, and
    what takes the direction of a zero vector.

    Args:
        moments: The moments of the features that the weight multiplies.
        weight: W (K, d).
        names: Which; all that there are by default.
        center: As for `collapse_metrics`.
        min_samples: As for `collapse_metrics`.
        drop_classes_above: As for `collapse_metrics`.
        exponent: Of the kernels' distance and of CDNV's squared distance.
        max_classes: Above so many classes an error says how much memory the matrices would take.

    Raises:
        ValueError: An unknown name, ``cosines_weights`` without a weight, an exponent that is not positive, too many
            classes; else as for `collapse_metrics`.

    Examples:
        >>> moments = ClassMoments(2, 2)
        >>> moments.update(torch.tensor([[3.0, 0.5], [3, -0.5], [-3, 0], [-3, 0]]), torch.tensor([0, 0, 1, 1]))
        >>> pair_matrices(moments, names=["cosines_means"])["cosines_means"].tolist()
        [[1.0, -1.0], [-1.0, 1.0]]
    """
    measured = class_statistics(moments, center=center, min_samples=min_samples, drop_classes_above=drop_classes_above)
    rows = _rows(weight, moments, measured.classes)
    check_exponent("exponent", exponent)
    if names is None:
        names = [name for name in MATRICES if name != "cosines_weights" or rows is not None]
    elif isinstance(names, str) or (unknown := [name for name in names if name not in MATRICES]):
        raise ValueError(f"names must be of {', '.join(MATRICES)}, got {names if isinstance(names, str) else unknown}")
    _check_memory(len(measured.classes), len(names), max_classes)
    unit = power_of_two(measured.centred_means)
    functions: dict[str, Callable[[PairTile], Tensor]] = {
        "cosines_means": cosines,
        "cosines_weights": cosines,
        "cdnv": cdnv_of_pairs(measured.within_class_variances * unit ** (2 * exponent), exponent),
    } | {kernel: hyperspherical_kernel(kernel, exponent) for kernel in HYPERSPHERICAL_KERNELS}
    tiles = {False: _tile(measured.centred_means * unit, measured.resolution * unit)}
    tiles |= {} if rows is None else {True: _tile(rescaled(rows))}
    matrices = {}
    for name in names:
        if name == "cosines_weights" and rows is None:
            raise ValueError("weight must be given for cosines_weights, got None")
        matrices[name] = functions[name](tiles[name == "cosines_weights"]).clone()
    return matrices


def _tile(vectors: Tensor, resolution: Tensor | float = 0.0) -> PairTile:
    return PairTile(vectors, torch.linalg.vector_norm(vectors, dim=1), slice(None), slice(None), resolution)


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
