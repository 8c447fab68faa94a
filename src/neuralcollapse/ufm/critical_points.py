"""Critical points of a model: descent to a critical point, its classification, and escape from a saddle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from neuralcollapse._checks import check_at_least
from neuralcollapse.heads import LearnedClassifier
from neuralcollapse.ufm.model import UnconstrainedFeatures
from neuralcollapse.ufm.optimum import GlobalOptimum, global_optimum
from neuralcollapse.ufm.spectrum import FlatObjective, hessian_extremes, scipy_module, set_parameters

Kind = Literal["global optimum", "strict saddle", "not critical", "undecided"]
_HISTORY = 20
_MOST_DOUBLINGS = 60


@dataclass(frozen=True)
class Descent:
    """Final point of a descent.

    Attributes:
        objective: f.
        gradient_norm: ‖∇f‖₂.
        iterations: Number of iterations.
        reason: Message of the solver about why it stopped.
    """

    objective: float
    gradient_norm: float
    iterations: int
    reason: str


@dataclass(frozen=True)
class CriticalPoint:
    """Classification of the point at which a model is, with the supporting values.

    Attributes:
        kind: ``"not critical"`` if the gradient exceeds the tolerance. Otherwise ``"strict saddle"`` if the least
            eigenvalue is negative beyond the tolerance. Otherwise ``"global optimum"`` if f equals the value of the
            closed form, and ``"undecided"`` if f is larger or a closed form is not known for the model.
        objective: f.
        gradient_norm: ‖∇f‖₂.
        least_eigenvalue: Least eigenvalue of the Hessian; None if the point is not critical.
        direction: (P,) unit eigenvector of the least eigenvalue, in the order of ``model.parameters()``; None if the
            point is not critical.
        optimum: Value of f from the closed form, or None if it is not known.
    """

    kind: Kind
    objective: float
    gradient_norm: float
    least_eigenvalue: float | None
    direction: Tensor | None
    optimum: float | None


@dataclass(frozen=True)
class Escape:
    """Step along negative curvature.

    Attributes:
        step: Length of the step.
        least_eigenvalue: Curvature along the step.
        objective_before: f at the saddle.
        objective_after: f after the step, which is less.
    """

    step: float
    least_eigenvalue: float
    objective_before: float
    objective_after: float


def minimize(
    model: UnconstrainedFeatures, *, max_iterations: int = 20_000, gradient_tolerance: float = 1e-10
) -> Descent:
    """Minimise f by L-BFGS in fp64 from the model's parameters, and set them to the result.

    Args:
        model: The model. Its head must be in evaluation mode, or of a type that does not update class means.
        max_iterations: Maximum number of iterations.
        gradient_tolerance: The descent stops if no entry of the gradient exceeds this value, or if f cannot be reduced
            further in fp64.

    Returns:
        The final point. The model's parameters keep their dtype: for fp64 results, call ``model.double()`` first.

    Raises:
        ValueError: if the model's objective is not a function of its parameters alone, or an argument is out of range.
        ImportError: if scipy is not installed.

    Examples:
        >>> from neuralcollapse.heads import LearnedClassifier
        >>> from neuralcollapse.ufm import UnconstrainedFeatures, global_optimum
        >>> decay = {"weight_decay": 0.01, "feature_decay": 0.01}
        >>> model = UnconstrainedFeatures(4, 3, 4, LearnedClassifier(4, 4), **decay).double()
        >>> abs(minimize(model).objective - global_optimum(4, 3, **decay).loss) < 1e-9
        True
    """
    check_at_least("max_iterations", max_iterations, 1)
    if not gradient_tolerance > 0:
        raise ValueError(f"gradient_tolerance must be greater than 0, got {gradient_tolerance}")
    optimize = scipy_module("optimize")
    objective = FlatObjective(model)

    def value_and_gradient(point: Any) -> tuple[float, Any]:
        value, gradient = objective.value_and_gradient(torch.from_numpy(point))
        return float(value), gradient.numpy()

    solution = optimize.minimize(
        value_and_gradient,
        objective.point().numpy(),
        jac=True,
        method="L-BFGS-B",
        options={
            "maxcor": _HISTORY,
            "ftol": 0.0,
            "gtol": gradient_tolerance,
            "maxiter": max_iterations,
            "maxfun": 10 * max_iterations,
        },
    )
    point = torch.from_numpy(solution.x)
    set_parameters(model, point)
    value, gradient = objective.value_and_gradient(point)
    return Descent(float(value), float(gradient.norm()), int(solution.nit), str(solution.message))


def known_optimum(model: UnconstrainedFeatures) -> GlobalOptimum | None:
    """Return the global optimum of a model in closed form, or None if it is not known.

    It is known for balanced classes, d ≥ K−1, positive decay of W and H, cross-entropy (with or without smoothing) or
    MSE, and a `LearnedClassifier` without normalisation; for MSE with a bias, only if the bias is not decayed.

    Args:
        model: The model; its parameters are not used.

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
    """Decide whether a model is at the global optimum, at a strict saddle, or not at a critical point.

    Args:
        model: The model. Its head must be in evaluation mode, or of a type that does not update class means.
        gradient_tolerance: Largest ‖∇f‖₂ of a critical point.
        curvature_tolerance: The least eigenvalue of a strict saddle is less than minus this value.
        loss_tolerance: Largest relative excess of f over the closed form at the optimum.
        generator: Generator of the random start vector of Lanczos.

    Raises:
        ValueError: if the model's objective is not a function of its parameters alone.
        ImportError: if scipy is not installed.

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
    loss, gradient_norm = float(value), float(gradient.norm())
    optimum = None if known is None else known.loss
    if gradient_norm > gradient_tolerance:
        return CriticalPoint("not critical", loss, gradient_norm, None, None, optimum)
    extremes = hessian_extremes(model, generator=generator)
    least = float(extremes.least[0])
    kind: Kind = "undecided"
    if least < -curvature_tolerance:
        kind = "strict saddle"
    elif optimum is not None and loss - optimum <= loss_tolerance * optimum:
        kind = "global optimum"
    return CriticalPoint(kind, loss, gradient_norm, least, extremes.least_directions[0], optimum)


def escape(
    model: UnconstrainedFeatures,
    *,
    gradient_tolerance: float = 1e-6,
    curvature_tolerance: float = 1e-7,
    generator: torch.Generator | None = None,
) -> Escape:
    """Move a model away from a strict saddle along the direction of most negative curvature, while f decreases.

    The first step changes f by about 1e-8 of its value; the length is doubled as long as this lowers f.

    Args:
        model: A model at a strict saddle; its parameters are changed.
        gradient_tolerance: As for `classify_critical_point`.
        curvature_tolerance: As for `classify_critical_point`.
        generator: Generator of the random vector that selects one of several directions with the same curvature.

    Raises:
        ValueError: if the model is not at a critical point, or the point is not a strict saddle.
        ImportError: if scipy is not installed.

    Examples:
        >>> from neuralcollapse.ufm import minimize, symmetric_saddle
        >>> model = symmetric_saddle(6, 2, 2, 0.01, 0.01)
        >>> escaped = escape(model)
        >>> escaped.objective_after < escaped.objective_before
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
        length = (2e-8 * max(point.objective, 1e-8) / -point.least_eigenvalue) ** 0.5
        for _ in range(_MOST_DOUBLINGS):
            value = float(objective(start + length * point.direction))
            if not value < after:
                break
            step, after, length = length, value, 2 * length
    set_parameters(model, start + step * point.direction)
    return Escape(step, point.least_eigenvalue, point.objective, after)
