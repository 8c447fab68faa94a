"""Symmetric saddles of the cross-entropy model in closed form."""

from __future__ import annotations

import math

import torch

from neuralcollapse._checks import check_at_least, check_etf_sizes
from neuralcollapse.geometry import simplex_etf
from neuralcollapse.heads import LearnedClassifier
from neuralcollapse.ufm.model import UnconstrainedFeatures, check_decay
from neuralcollapse.ufm.optimum import check_nontrivial_optimum, decay_strength


def cross_entropy_model(
    num_classes: int,
    samples_per_class: int,
    feature_dim: int,
    weight_decay: float,
    feature_decay: float,
    generator: torch.Generator | None = None,
) -> UnconstrainedFeatures:
    """Return a model whose critical points are known: fp64, balanced classes, a `LearnedClassifier` with a bias.

    The arguments are those of `UnconstrainedFeatures`.
    """
    return UnconstrainedFeatures(
        num_classes,
        samples_per_class,
        feature_dim,
        LearnedClassifier(feature_dim, num_classes),
        weight_decay=weight_decay,
        feature_decay=feature_decay,
        generator=generator,
    ).double()


def origin_curvature(num_classes: int, samples_per_class: int, weight_decay: float, feature_decay: float) -> float:
    """Least eigenvalue of the Hessian at the origin.

    It is (λ_W + λ_H)/2 − √(((λ_W − λ_H)/2)² + 1/(K²n)), which is negative if and only if λ_W λ_H < 1/(K²n), that is, if
    the global optimum is another point. It is also an upper bound of the least eigenvalue of every `symmetric_saddle`:
    if two classes of a group move apart in a direction orthogonal to all class vectors, the logits do not change to
    first order, and the second-order terms are those of the origin.

    Args:
        num_classes: K ≥ 2.
        samples_per_class: n ≥ 1.
        weight_decay: λ_W > 0.
        feature_decay: λ_H > 0.

    Raises:
        ValueError: if an argument is out of range or not a number.

    Examples:
        >>> round(origin_curvature(10, 4, 0.01, 0.01), 12), round(origin_curvature(10, 4, 0.05, 0.05), 12)
        (-0.04, 0.0)
    """
    check_at_least("num_classes", num_classes, 2)
    check_at_least("samples_per_class", samples_per_class, 1)
    weight_decay = check_decay("weight_decay", weight_decay, positive=True)
    feature_decay = check_decay("feature_decay", feature_decay, positive=True)
    coupling = 1 / (num_classes * math.sqrt(samples_per_class))
    return (weight_decay + feature_decay) / 2 - math.hypot((weight_decay - feature_decay) / 2, coupling)


def symmetric_saddle(
    num_classes: int,
    groups: int,
    samples_per_class: int,
    weight_decay: float,
    feature_decay: float,
    *,
    feature_dim: int | None = None,
) -> UnconstrainedFeatures:
    r"""Return a model at the critical point where the classes of each group share one direction.

    With g groups of K/g classes, group G of class k, and a unit simplex ETF v of g vectors, w_k = α v_G and
    h = √(λ_W/(n λ_H)) α v_G. The gradient vanishes if a feature's margin x over the other groups satisfies

        g/(e^x + g − 1) = s,   s = K √(n λ_W λ_H),   so that   x = log(1 + g (1 − s)/s),

    which is positive for s < 1, and α² = x ((g−1)/g) √(n λ_H/λ_W). The rank is g−1: one group gives the origin, and
    K groups would give the global optimum. The point is a strict saddle (see `origin_curvature`).

    Args:
        num_classes: K ≥ 2.
        groups: g, a divisor of K less than K.
        samples_per_class: n ≥ 1.
        weight_decay: λ_W > 0.
        feature_decay: λ_H > 0.
        feature_dim: d ≥ K−1; K if not given.

    Returns:
        A model in fp64 with cross-entropy and a `LearnedClassifier`, at the saddle.

    Raises:
        ValueError: if an argument is out of range, or ``groups`` does not divide the number of classes; for more than
            one group also if the decay is so strong that the origin is the only critical point (s ≥ 1).

    Examples:
        >>> model = symmetric_saddle(6, 3, 2, 0.01, 0.01)
        >>> model.objective().backward()
        >>> bool(model.features.grad.norm() < 1e-12), int(torch.linalg.matrix_rank(model.features))
        (True, 2)
    """
    feature_dim = num_classes if feature_dim is None else feature_dim
    check_etf_sizes(num_classes, feature_dim)
    check_at_least("groups", groups, 1)
    check_at_least("samples_per_class", samples_per_class, 1)
    if num_classes % groups or groups == num_classes:
        raise ValueError(f"groups must divide num_classes = {num_classes} and be fewer, got {groups}")
    weight_decay = check_decay("weight_decay", weight_decay, positive=True)
    feature_decay = check_decay("feature_decay", feature_decay, positive=True)
    strength = decay_strength(num_classes, samples_per_class, weight_decay, feature_decay)
    weight = torch.zeros(num_classes, feature_dim, dtype=torch.float64)
    if groups > 1:
        check_nontrivial_optimum(num_classes, samples_per_class, weight_decay, feature_decay)
        margin = math.log1p(groups * (1 - strength) / strength)
        ratio = math.sqrt(samples_per_class * feature_decay / weight_decay)
        length = math.sqrt(margin * (groups - 1) / groups * ratio)
        directions = simplex_etf(groups, feature_dim, dtype=torch.float64)
        weight = length * directions.repeat_interleave(num_classes // groups, 0)
    model = cross_entropy_model(num_classes, samples_per_class, feature_dim, weight_decay, feature_decay)
    scale = math.sqrt(weight_decay / (samples_per_class * feature_decay))
    model.place(weight, scale * weight.repeat_interleave(samples_per_class, 0))
    return model
