"""What a solver on the Stiefel manifold says of its result and on its way."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor


class Stop(IntEnum):
    """Why a problem was left where it is."""

    CONVERGED = 0
    MAX_ITERATIONS = 1
    STALLED = 2

    def describe(self, tolerance: float, max_iterations: int) -> str:
        """The reason in words."""
        return {
            Stop.CONVERGED: f"gradient norm within the tolerance {tolerance:.3g}",
            Stop.MAX_ITERATIONS: f"max_iterations = {max_iterations} reached before the tolerance {tolerance:.3g}",
            Stop.STALLED: f"no step lowers the cost any further, above the tolerance {tolerance:.3g}: "
            "rounding, or a cost that is not twice differentiable there",
        }[self]


@dataclass(frozen=True)
class StiefelSolution:
    """What a solver found. Tensors of shape (...) have one entry a problem.

    Attributes:
        point: (..., p, d), rows orthonormal.
        cost: (...).
        gradient_norm: (...), Frobenius norm of the Riemannian gradient.
        iterations: (...), outer iterations taken.
        converged: (...) bool, whether the gradient norm is within the tolerance.
        status: (...), integers of `Stop`.
        reason: In words why each problem stopped; for a batch, how many for which reason.
    """

    point: Tensor
    cost: Tensor
    gradient_norm: Tensor
    iterations: Tensor
    converged: Tensor
    status: Tensor
    reason: str


@dataclass(frozen=True)
class Iteration:
    """One outer iteration, as a callback sees it; tensors have one entry a problem.

    Attributes:
        number: 1, 2, …
        point: (..., p, d), where the problems are now.
        cost: (...).
        gradient_norm: (...).
        step: (...), distance to the last point; 0 where the step was refused or the problem was done.
        radius: (...), of the trust region from now on.
        accepted: (...) bool.
        active: (...) bool, problems that were still being solved.
        inner_iterations: Conjugate-gradient steps, of the longest problem.
    """

    number: int
    point: Tensor
    cost: Tensor
    gradient_norm: Tensor
    step: Tensor
    radius: Tensor
    accepted: Tensor
    active: Tensor
    inner_iterations: int
