"""Descent to a critical point of the unconstrained features model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from neuralcollapse._checks import check_at_least
from neuralcollapse.ufm._scipy import scipy_module
from neuralcollapse.ufm.flat import FlatObjective, move_to
from neuralcollapse.ufm.model import UnconstrainedFeatures

_HISTORY = 20


@dataclass(frozen=True)
class Descent:
    """Where a descent ended.

    Attributes:
        objective: f.
        gradient_norm: ‖∇f‖₂.
        iterations: Iterations taken.
        reason: What the solver says of why it ended.
    """

    objective: float
    gradient_norm: float
    iterations: int
    reason: str


def minimize(
    model: UnconstrainedFeatures, *, max_iterations: int = 20_000, gradient_tolerance: float = 1e-10
) -> Descent:
    """Descend from where the model is by L-BFGS in fp64, and leave the model there.

    Args:
        model: Its head in evaluation mode, or of a kind that moves no class means.
        max_iterations: The most iterations.
        gradient_tolerance: Ends where no entry of the gradient is larger, or where f cannot be resolved further.

    Returns:
        Where it ended. The model's parameters are of its own dtype: for figures of fp64, call ``model.double()`` first.

    Raises:
        ValueError: A model that is not a function of its parameters alone, or an argument out of range.
        ImportError: scipy is not installed.

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
    move_to(model, point)
    value, gradient = objective.value_and_gradient(point)
    return Descent(float(value), float(gradient.norm()), int(solution.nit), str(solution.message))
