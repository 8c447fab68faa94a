"""What kind of critical point a model is at, and the way out of a saddle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from neuralcollapse.heads import LearnedClassifier
from neuralcollapse.ufm.flat import FlatObjective, move_to
from neuralcollapse.ufm.hessian import hessian_extremes
from neuralcollapse.ufm.model import UnconstrainedFeatures
from neuralcollapse.ufm.optimum import GlobalOptimum, global_optimum

Kind = Literal["global optimum", "strict saddle", "not critical", "undecided"]
_MOST_DOUBLINGS = 60


@dataclass(frozen=True)
class CriticalPoint:
    """What kind of point a model is at, with the evidence.

    Attributes:
        kind: ``"not critical"``: the gradient is larger than the tolerance. ``"strict saddle"``: the least eigenvalue
            is negative beyond the tolerance. ``"global optimum"``: it is not, and f is that of the closed form.
            ``"undecided"``: it is not, and f is larger, or no closed form is known for the model.
        objective: f.
        gradient_norm: ‖∇f‖₂.
        least_eigenvalue: Of the Hessian; None where the point is not critical.
        direction: (P,) the unit direction of it, in the order of ``model.parameters()``; None likewise.
        optimum: The closed form's f, or None.
    """

    kind: Kind
    objective: float
    gradient_norm: float
    least_eigenvalue: float | None
    direction: Tensor | None
    optimum: float | None


@dataclass(frozen=True)
class Escape:
    """A step along negative curvature.

    Attributes:
        step: Its length.
        least_eigenvalue: The curvature it followed.
        objective_before: f at the saddle.
        objective_after: f after it, less.
    """

    step: float
    least_eigenvalue: float
    objective_before: float
    objective_after: float


def known_optimum(model: UnconstrainedFeatures) -> GlobalOptimum | None:
    """The global optimum of a model in closed form, or None where none is known.

    Known for balanced classes, d ≥ K−1, positive decay of W and H, cross-entropy (smoothed or not) or MSE, and a
    `LearnedClassifier` that normalises nothing; for MSE with a bias, only if that is not decayed.

    Args:
        model: Its parameters are not looked at.

    Examples:
        >>> from neuralcollapse.heads import LearnedClassifier
        >>> decay = {"weight_decay": 0.01, "feature_decay": 0.01}
        >>> round(known_optimum(UnconstrainedFeatures(4, 2, 4, LearnedClassifier(4, 4), **decay)).loss, 4)
        0.2222
    """
    head = model.head
    plain = isinstance(head, LearnedClassifier) and head.feature_norm is None and not head.unit_weight
    decayed = model.weight_decay > 0 and model.feature_decay > 0
    if not (plain and decayed and model.balanced and model.feature_dim >= model.num_classes - 1):
        return None
    if model.loss == "focal" or (model.loss == "mse" and head.bias is not None and model.bias_decay > 0):
        return None
    return global_optimum(
        model.num_classes,
        model.samples_per_class,
        model.weight_decay,
        model.feature_decay,
        feature_dim=model.feature_dim,
        loss=model.loss,
        label_smoothing=model.label_smoothing,
        bias=head.bias is not None,
    )


def classify_critical_point(
    model: UnconstrainedFeatures,
    *,
    gradient_tolerance: float = 1e-6,
    curvature_tolerance: float = 1e-7,
    loss_tolerance: float = 1e-8,
    generator: torch.Generator | None = None,
) -> CriticalPoint:
    """Say whether a model is at the global optimum, at a strict saddle, or at no critical point.

    Args:
        model: Its head in evaluation mode, or of a kind that moves no class means.
        gradient_tolerance: The largest ‖∇f‖₂ of a critical point.
        curvature_tolerance: A strict saddle's least eigenvalue is under minus this.
        loss_tolerance: How much f may exceed the closed form's at the optimum, relative to it.
        generator: Source of the random vector that Lanczos starts from.

    Raises:
        ValueError: A model that is not a function of its parameters alone.
        ImportError: scipy is not installed.

    Examples:
        >>> from neuralcollapse.ufm import symmetric_saddle
        >>> model = symmetric_saddle(6, 3, 2, 0.01, 0.01)
        >>> classify_critical_point(model).kind
        'strict saddle'
        >>> with torch.no_grad():
        ...     _ = model.features.add_(0.1)
        >>> classify_critical_point(model).kind
        'not critical'
    """
    objective = FlatObjective(model)
    value, gradient = objective.value_and_gradient(objective.point())
    known = known_optimum(model)
    figures = (float(value), float(gradient.norm()))
    optimum = None if known is None else known.loss
    if figures[1] > gradient_tolerance:
        return CriticalPoint("not critical", *figures, None, None, optimum)
    extremes = hessian_extremes(model, generator=generator)
    least = float(extremes.least[0])
    kind: Kind = "undecided"
    if least < -curvature_tolerance:
        kind = "strict saddle"
    elif optimum is not None and figures[0] - optimum <= loss_tolerance * optimum:
        kind = "global optimum"
    return CriticalPoint(kind, *figures, least, extremes.least_directions[0], optimum)


def escape(
    model: UnconstrainedFeatures,
    *,
    gradient_tolerance: float = 1e-6,
    curvature_tolerance: float = 1e-7,
    generator: torch.Generator | None = None,
) -> Escape:
    """Move a model off a strict saddle along its direction of most negative curvature, as far as f falls.

    The step's length is doubled as long as that lowers f, from one that changes f by about 1e-8 of itself.

    Args:
        model: At a strict saddle; its parameters are changed.
        gradient_tolerance: As for `classify_critical_point`.
        curvature_tolerance: As for `classify_critical_point`.
        generator: Source of the random vector that decides between directions of the same curvature.

    Raises:
        ValueError: The model is not at a critical point, or the point is no strict saddle.
        ImportError: scipy is not installed.

    Examples:
        >>> from neuralcollapse.ufm import minimize, symmetric_saddle
        >>> model = symmetric_saddle(6, 2, 2, 0.01, 0.01)
        >>> way_out = escape(model)
        >>> way_out.objective_after < way_out.objective_before
        True
        >>> _ = minimize(model)
        >>> classify_critical_point(model).kind
        'global optimum'
    """
    point = classify_critical_point(
        model, gradient_tolerance=gradient_tolerance, curvature_tolerance=curvature_tolerance, generator=generator
    )
    if point.kind == "not critical":
        raise ValueError(
            f"model must be at a critical point: the gradient's norm must be at most {gradient_tolerance:g}, "
            f"got {point.gradient_norm:.3g}; minimize(model) descends to one"
        )
    if point.kind != "strict saddle" or point.direction is None or point.least_eigenvalue is None:
        raise ValueError(
            f"model must be at a strict saddle: the Hessian's least eigenvalue must be under {-curvature_tolerance:g}, "
            f"got {point.least_eigenvalue:.3g} ({point.kind})"
        )
    objective = FlatObjective(model)
    start, step, after = objective.point(), 0.0, point.objective
    with torch.no_grad():
        longer = (2e-8 * max(point.objective, 1e-8) / -point.least_eigenvalue) ** 0.5
        for _ in range(_MOST_DOUBLINGS):
            value = float(objective(start + longer * point.direction))
            if not value < after:
                break
            step, after, longer = longer, value, 2 * longer
    move_to(model, start + step * point.direction)
    return Escape(step, point.least_eigenvalue, point.objective, after)
