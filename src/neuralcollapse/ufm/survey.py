"""Survey of the landscape: classified critical points that are reached from random starts and from saddles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from neuralcollapse._checks import check_at_least, check_etf_sizes
from neuralcollapse.ufm.critical_points import (
    CriticalPoint,
    classify_critical_point,
    escape,
    known_optimum,
    minimize,
)
from neuralcollapse.ufm.model import UnconstrainedFeatures, check_decay
from neuralcollapse.ufm.optimum import check_nontrivial_optimum
from neuralcollapse.ufm.saddles import cross_entropy_model, symmetric_saddle
from neuralcollapse.ufm.spectrum import FlatObjective


@dataclass(frozen=True)
class Visit:
    """Critical point of a survey.

    Attributes:
        name: Origin of the point: ``"start 3"``, ``"origin"``, ``"2 groups"``, ``"from origin"``, ``"from 2 groups"``.
        model: A model at the point.
        point: Classification of the point, with the supporting values.
        iterations: Number of iterations of the descent that ended at the point.
        constructed: Whether the point was constructed without a descent.
    """

    name: str
    model: UnconstrainedFeatures
    point: CriticalPoint
    iterations: int = 0
    constructed: bool = False


def survey(
    model: UnconstrainedFeatures, *, starts: int = 20, generator: torch.Generator | None = None
) -> Iterator[Visit]:
    """Descend from random starts and from every symmetric saddle after an escape, and classify every point reached.

    Args:
        model: Model with balanced classes, d ≥ K−1, positive decay of W and H, no decay of b, cross-entropy without
            smoothing, and a `LearnedClassifier` with a bias and without normalisation. Its parameters are not used.
        starts: Number of random starts, which have normal entries of variance 1/d.
        generator: Source of randomness.

    Yields:
        The final point of each descent from a random start; then, for every number of groups that divides K (one group
        is the origin), the saddle, and the final point of the descent after the escape.

    Raises:
        ValueError: if ``starts`` is negative, the model does not satisfy these conditions, or λ_W λ_H ≥ 1/(K²n), in
            which case the origin is the only critical point.
        ImportError: if scipy is not installed.

    Examples:
        >>> from neuralcollapse.heads import LearnedClassifier
        >>> model = UnconstrainedFeatures(4, 2, 4, LearnedClassifier(4, 4), weight_decay=0.01, feature_decay=0.01)
        >>> for visit in survey(model, starts=2):
        ...     print(f"{visit.name}: {visit.point.kind}")
        start 0: global optimum
        start 1: global optimum
        origin: strict saddle
        from origin: global optimum
        2 groups: strict saddle
        from 2 groups: global optimum
    """
    FlatObjective(model)  # raises unless it is an UnconstrainedFeatures
    sizes = num_classes, samples_per_class, feature_dim = model.num_classes, model.samples_per_class, model.feature_dim
    check_etf_sizes(num_classes, feature_dim)
    check_at_least("starts", starts, 0)
    weight_decay = check_decay("weight_decay", model.weight_decay, positive=True)
    feature_decay = check_decay("feature_decay", model.feature_decay, positive=True)
    check_nontrivial_optimum(num_classes, samples_per_class, weight_decay, feature_decay)
    plain = model.loss == "cross-entropy" and not model.label_smoothing and not model.bias_decay
    if not plain or model.head.bias is None or known_optimum(model) is None:
        raise ValueError(
            "model must have balanced classes, cross-entropy without label smoothing, no bias_decay, and a "
            f"LearnedClassifier with a bias and without normalisation, got {model!r}"
        )
    for start in range(starts):
        model = cross_entropy_model(*sizes, weight_decay, feature_decay, generator)
        weight = torch.randn(num_classes, feature_dim, generator=generator, dtype=torch.float64)
        model.place(weight / feature_dim**0.5, model.features.detach())
        yield _descend(f"start {start}", model, generator)
    for groups in range(1, num_classes):
        if num_classes % groups:
            continue
        name = "origin" if groups == 1 else f"{groups} groups"
        settings = (num_classes, groups, samples_per_class, weight_decay, feature_decay)
        saddle, model = (symmetric_saddle(*settings, feature_dim=feature_dim) for _ in range(2))
        yield Visit(name, saddle, classify_critical_point(saddle, generator=generator), constructed=True)
        escape(model, generator=generator)
        yield _descend(f"from {name}", model, generator)


def _descend(name: str, model: UnconstrainedFeatures, generator: torch.Generator | None) -> Visit:
    descent = minimize(model)
    return Visit(name, model, classify_critical_point(model, generator=generator), descent.iterations)


@torch.no_grad()
def loss_slice(model: UnconstrainedFeatures, direction: Tensor, steps: Tensor) -> Tensor:
    """Values of f along a line through the model's parameters.

    Args:
        model: The model; it is not changed.
        direction: (P,), in the order of ``model.parameters()``.
        steps: (m,) multiples of the direction.

    Returns:
        (m,) in fp64.

    Raises:
        ValueError: if the direction has the wrong length.

    Examples:
        >>> model = symmetric_saddle(4, 1, 2, 0.01, 0.01)
        >>> direction = classify_critical_point(model).direction
        >>> values = loss_slice(model, direction, torch.tensor([-0.5, 0.0, 0.5]))
        >>> bool(values[1] > values[0]), bool(values[1] > values[2])
        (True, True)
    """
    objective = FlatObjective(model)
    if direction.shape != (objective.size,):
        raise ValueError(f"direction must be of shape ({objective.size},), got {tuple(direction.shape)}")
    start = objective.point()
    return torch.stack([objective(start + step * direction.double()) for step in steps.double()])
