"""Riemannian trust region on the Stiefel manifold, for costs without a closed-form minimiser.

Each iteration minimises the second-order model ⟨g, V⟩ + ½⟨V, Hess[V]⟩ of the cost over tangent vectors with ‖V‖ ≤ Δ by
truncated conjugate gradients, retracts, and compares the decrease of the cost with that predicted by the model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor

from neuralcollapse._checks import check_at_least
from neuralcollapse.geometry.krylov import truncated_conjugate_gradients
from neuralcollapse.geometry.stiefel import check_point, distance, inner, project, retract, symmetric

logger = logging.getLogger(__name__)

# Ratios of actual to predicted decrease: below the first a step is rejected, below the second the radius shrinks, above
# the third it may grow (Absil, Baker, Gallivan).
_ACCEPT, _SHRINK, _GROW = 0.1, 0.25, 0.75
_INNER_REDUCTION = 0.1

Cost = Callable[[Tensor], Tensor]


class Stop(IntEnum):
    """Reason for which the solver stopped on a problem."""

    CONVERGED = 0
    MAX_ITERATIONS = 1
    STALLED = 2

    def describe(self, tolerance: float, max_iterations: int) -> str:
        """Return the reason in words."""
        return {
            Stop.CONVERGED: f"gradient norm within the tolerance {tolerance:.3g}",
            Stop.MAX_ITERATIONS: f"max_iterations = {max_iterations} reached before the tolerance {tolerance:.3g}",
            Stop.STALLED: f"no step lowers the cost any further, above the tolerance {tolerance:.3g}: "
            "rounding errors, or a cost that is not twice differentiable at the point",
        }[self]


@dataclass(frozen=True)
class StiefelSolution:
    """Result of a solver on the Stiefel manifold. Tensors of shape (...) have one entry per problem.

    Attributes:
        point: (..., p, d), rows orthonormal.
        cost: (...).
        gradient_norm: (...), Frobenius norm of the Riemannian gradient.
        iterations: (...), number of outer iterations.
        converged: (...) bool, whether the gradient norm is within the tolerance.
        status: (...), integers of `Stop`.
        reason: Reason for stopping in words; for a batch, with the number of problems per reason.
    """

    point: Tensor
    cost: Tensor
    gradient_norm: Tensor
    iterations: Tensor
    converged: Tensor
    status: Tensor
    reason: str


def minimize_on_stiefel(
    cost: Cost,
    initial: Tensor,
    *,
    max_iterations: int = 100,
    max_inner_iterations: int | None = None,
    tolerance: float | None = None,
) -> StiefelSolution:
    r"""Minimise a cost over matrices with orthonormal rows, by a Riemannian trust region with truncated CG.

    Leading dimensions are independent problems, each with a separate radius and stopping test. The cost is evaluated
    for all problems together. A start at a critical point is returned unchanged, even if it is a saddle.

    Args:
        cost: Function of points (..., p, d) that returns one value per problem, (...), twice differentiable by torch.
        initial: (..., p, d) of fp32 or fp64 with orthonormal rows.
        max_iterations: Maximum number of outer iterations.
        max_inner_iterations: Maximum number of conjugate-gradient steps per outer iteration; by default the dimension
            of the manifold.
        tolerance: Riemannian gradient norm at which a problem counts as solved; by default √ε of the dtype times the
            norm of the Euclidean gradient at ``initial`` (the largest of the batch).

    Returns:
        `StiefelSolution`. Check ``.converged``: a problem that did not converge is returned where it stopped.

    Raises:
        ValueError: if the start is not on the manifold, the cost does not return one value per problem or is not finite
            at the start, or a setting is out of range.

    Source: Absil, Baker, Gallivan, "Trust-region methods on Riemannian manifolds" (2007); the inner iteration is that
    of Steihaug and Toint, with the norms of Conn, Gould, Toint (2000), 7.5.

    At level DEBUG, the logger of this module reports the objective, the gradient norm and the length of the step of
    each iteration, and the reason for stopping.

    Examples:
        >>> target = torch.tensor([[3.0, 0.0, 4.0]], dtype=torch.float64)
        >>> start = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
        >>> solution = minimize_on_stiefel(lambda point: -(target * point).sum((-2, -1)), start)
        >>> solution.point, bool(solution.converged)
        (tensor([[0.6000, 0.0000, 0.8000]], dtype=torch.float64), True)
    """
    check_point(initial, "initial")
    check_at_least("max_iterations", max_iterations, 0)
    rows, columns = initial.shape[-2:]
    dimension = rows * columns - rows * (rows + 1) // 2
    inner_limit = max(dimension, 1) if max_inner_iterations is None else max_inner_iterations
    check_at_least("max_inner_iterations", inner_limit, 1)
    with torch.no_grad():
        model = SecondOrderModel(cost, initial)
        if not bool(torch.isfinite(model.cost).all() & torch.isfinite(model.euclidean_gradient).all()):
            raise ValueError("cost and its gradient must be finite at initial, got NaN or infinity")
        state = _State(model, _tolerance(tolerance, model))
        for number in range(1, max_iterations + 1):
            if not bool(state.active.any()):
                break
            state.advance(number, lambda point: SecondOrderModel(cost, point), inner_limit)
        solution = state.solution(max_iterations)
        if logger.isEnabledFor(logging.DEBUG):
            moved = float(distance(solution.point, initial).max())
            logger.debug("stopped, %.3e from the start: %s", moved, solution.reason)
    return solution


def _tolerance(tolerance: float | None, model: SecondOrderModel) -> float:
    if tolerance is None:
        largest = float(torch.linalg.matrix_norm(model.euclidean_gradient).max())
        return float(torch.finfo(model.point.dtype).eps ** 0.5) * largest
    if not (isinstance(tolerance, int | float) and 0 <= tolerance < math.inf):
        raise ValueError(f"tolerance must be a finite number of at least 0, got {tolerance!r}")
    return float(tolerance)


class SecondOrderModel:
    r"""Value, Riemannian gradient and Hessian–vector products of a cost f at a point Q, by automatic differentiation.

    With the Euclidean gradient G = ∇f and S = ½(GQᵀ + QGᵀ),

        grad f = G − SQ,   Hess f[V] = proj(∇²f[V] − SV)   for a tangent V.

    Each quantity is computed on first use, so that the value alone takes a single evaluation of f. Tensors larger than
    Q are not formed: ∇²f[V] is the derivative of ⟨G, V⟩.

    Args:
        cost: f, from points (..., p, d) to values (...), one per problem; each value depends only on its matrix.
        point: Q, (..., p, d).

    Source: Absil, Mahony, Trumpf, "An extrinsic look at the Riemannian Hessian" (2013).
    """

    def __init__(self, cost: Cost, point: Tensor) -> None:
        self.point = point.detach()
        with torch.enable_grad():
            self._variable = self.point.clone().requires_grad_()
            self._cost = cost(self._variable)
        _check_one_value_per_problem(self._cost, self.point)
        self.cost = self._cost.detach()

    @cached_property
    def _graph(self) -> Tensor:
        """Euclidean gradient, with the graph that its derivative needs."""
        if not self._cost.requires_grad:
            raise ValueError("cost must depend on its point differentiably, got a value without a gradient")
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self._cost.sum(), self._variable, create_graph=True, allow_unused=True)
        return torch.zeros_like(self.point) if gradient is None else gradient

    @cached_property
    def euclidean_gradient(self) -> Tensor:
        """Euclidean gradient G, (..., p, d)."""
        return self._graph.detach()

    @cached_property
    def _normal(self) -> Tensor:
        return symmetric(self.euclidean_gradient @ self.point.mT)

    @cached_property
    def gradient(self) -> Tensor:
        """Riemannian gradient, (..., p, d)."""
        return self.euclidean_gradient - self._normal @ self.point

    def hessian(self, tangent: Tensor) -> Tensor:
        """Return the Riemannian Hessian applied to a tangent vector, (..., p, d)."""
        curved = self._normal @ tangent
        euclidean = self._euclidean_hessian(tangent)
        return project(self.point, -curved if euclidean is None else euclidean - curved)

    def _euclidean_hessian(self, tangent: Tensor) -> Tensor | None:
        """Return ∇²f[V]; None if the gradient does not depend on the point."""
        if not self._graph.requires_grad:
            return None
        (product,) = torch.autograd.grad(self._graph, self._variable, tangent, retain_graph=True, allow_unused=True)
        return product

    def parameter_gradients(self, tangent: Tensor, parameters: Sequence[Tensor]) -> Iterator[Tensor]:
        """Return ∂_θ⟨∇f(Q, θ), V⟩ for each tensor θ that the cost depends on."""
        if not self._graph.requires_grad or not parameters:
            return (torch.zeros_like(parameter) for parameter in parameters)
        gradients = torch.autograd.grad(self._graph, parameters, tangent, retain_graph=True, allow_unused=True)
        return (
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(parameters, gradients, strict=True)
        )


def _check_one_value_per_problem(values: Tensor, point: Tensor) -> None:
    if not isinstance(values, Tensor) or values.shape != point.shape[:-2]:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"cost must return one value per problem, a tensor of shape {tuple(point.shape[:-2])} for points of shape "
            f"{tuple(point.shape)}, got {got}"
        )


class _State:
    """Progress of all problems of a batch; radii, norms and masks are (..., 1, 1)."""

    def __init__(self, model: SecondOrderModel, tolerance: float) -> None:
        self.model, self.tolerance = model, tolerance
        self.largest_radius = math.sqrt(model.point.shape[-2])  # ‖Q‖: longer steps retract to almost the same points
        scalar = model.cost[..., None, None]
        # A step that is too long costs one iteration. The usual start, an eighth of this radius, costs two of eight
        # iterations on the published problem, and was not clearly better or worse on other problems.
        self.radius = torch.full_like(scalar, self.largest_radius)
        self.status = torch.full_like(scalar, int(Stop.MAX_ITERATIONS), dtype=torch.int64)
        self.iterations = torch.zeros_like(self.status)
        self.active = torch.ones_like(self.status, dtype=torch.bool)
        self._settle()
        self.first_norm = self.gradient_norm

    def _settle(self) -> None:
        """Mark problems as finished if they reached the tolerance or if their steps consist of rounding error only."""
        self.gradient_norm = inner(self.model.gradient, self.model.gradient).sqrt()
        smallest = torch.finfo(self.radius.dtype).eps * self.largest_radius
        for reason, reached in (
            (Stop.CONVERGED, self.gradient_norm <= self.tolerance),
            (Stop.STALLED, self.radius <= smallest),
        ):
            self.status = torch.where(self.active & reached, int(reason), self.status)
            self.active = self.active & ~reached

    def advance(self, number: int, evaluate: Callable[[Tensor], SecondOrderModel], inner_limit: int) -> None:
        """Take one outer iteration."""
        model, active = self.model, self.active
        # Gives superlinear convergence near the solution, but never more accuracy than the tolerance requires.
        forcing = (self.gradient_norm / self.first_norm.clamp_min(self.tolerance)).clamp_max(_INNER_REDUCTION)
        residual_norm = (self.gradient_norm * forcing).clamp_min(0.1 * self.tolerance)
        step, residual, at_boundary, inner_iterations = truncated_conjugate_gradients(
            model.hessian, model.gradient, self.radius, active, residual_norm, inner_limit
        )
        predicted = -0.5 * (inner(model.gradient, step) + inner(residual, step))
        trial = evaluate(retract(model.point, step))
        rounding = self._rounding()
        ratio = ((model.cost - trial.cost)[..., None, None] + rounding) / (predicted + rounding)
        accepted = active & (ratio > _ACCEPT)
        factor = torch.where(
            ratio >= _SHRINK, torch.where((ratio > _GROW) & at_boundary, 2.0, 1.0), 0.25
        )  # NaN shrinks the radius
        self.radius = torch.where(active, self.radius * factor, self.radius).clamp_max(self.largest_radius)
        self.iterations = self.iterations + active
        if bool(accepted.all()):
            self.model = trial
        elif bool(accepted.any()):
            self.model = evaluate(torch.where(accepted, trial.point, model.point))
        self._settle()
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug(
                "iteration %d: objective %.10g, gradient norm %.3e, distance to the last point %.3e, %d CG steps, "
                "%d of %d problems active",
                number,
                float(self.model.cost.mean()),
                float(self.gradient_norm.max()),
                float(distance(self.model.point, model.point).max()),
                inner_iterations,
                int(active.sum()),
                active.numel(),
            )

    def _rounding(self) -> Tensor:
        """Return the resolution of the cost; steps with a smaller predicted decrease are accepted.

        The cost may be a small difference of larger terms, of size ‖G‖‖Q‖ (Conn, Gould, Toint 2000, 17.4.2).
        """
        reach = torch.linalg.matrix_norm(self.model.euclidean_gradient, keepdim=True) * self.largest_radius
        cost = self.model.cost[..., None, None].abs()
        return 100 * torch.finfo(reach.dtype).eps * torch.maximum(cost, reach)

    def solution(self, max_iterations: int) -> StiefelSolution:
        """Return the present state as a result."""
        status = self.status[..., 0, 0]
        counts = torch.bincount(status.flatten(), minlength=len(Stop)).tolist()
        reasons = {
            stop.describe(self.tolerance, max_iterations): count
            for stop, count in zip(Stop, counts, strict=True)
            if count
        }
        return StiefelSolution(
            point=self.model.point,
            cost=self.model.cost,
            gradient_norm=self.gradient_norm[..., 0, 0],
            iterations=self.iterations[..., 0, 0],
            converged=status == int(Stop.CONVERGED),
            status=status,
            reason=next(iter(reasons))
            if status.ndim == 0
            else "; ".join(f"{count} of {status.numel()}: {reason}" for reason, count in reasons.items()),
        )
