"""A Riemannian trust region on the Stiefel manifold: what has no closed form.

Each iteration minimises the cost's second-order model ⟨g, V⟩ + ½⟨V, Hess[V]⟩ over tangent vectors with ‖V‖ ≤ Δ by
truncated conjugate gradients, retracts, and compares what the cost lost with what the model promised.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from neuralcollapse._checks import check_at_least
from neuralcollapse.geometry.krylov import truncated_conjugate_gradients
from neuralcollapse.geometry.local_model import Cost, Gradient, Hessian, LocalModel
from neuralcollapse.geometry.solution import Iteration, StiefelSolution, Stop
from neuralcollapse.geometry.stiefel import Retraction, check_point, distance, inner, retract

logger = logging.getLogger(__name__)

_ACCEPT, _SHRINK, _GROW = 0.1, 0.25, 0.75  # of the promised decrease, as Absil, Baker, Gallivan have them
_INNER_REDUCTION = 0.1


def minimize_on_stiefel(
    cost: Cost,
    initial: Tensor,
    *,
    gradient: Gradient | None = None,
    hessian: Hessian | None = None,
    max_iterations: int = 100,
    max_inner_iterations: int | None = None,
    tolerance: float | None = None,
    retraction: Retraction = "qr",
    callback: Callable[[Iteration], object] | None = None,
) -> StiefelSolution:
    r"""Minimise a cost over matrices with orthonormal rows, by a Riemannian trust region with truncated CG.

    Leading dimensions are independent problems, each with its own radius and its own end. The cost is evaluated for all
    of them together. A start at a critical point is returned as it is, be it a saddle.

    Args:
        cost: Function of points (..., p, d) that returns one value a problem, (...). Twice differentiable by torch.
        initial: (..., p, d) of fp32 or fp64, rows orthonormal.
        gradient: Euclidean gradient as a function of the point; by automatic differentiation if not given.
        hessian: Euclidean Hessian–vector product as a function of (point, tangent); automatic if not given.
        max_iterations: Outer iterations.
        max_inner_iterations: Conjugate-gradient steps in each; the manifold's dimension if not given.
        tolerance: Riemannian gradient norm at which a problem is solved; if not given, √ε of the dtype times the
            norm of the Euclidean gradient at ``initial`` (the largest of the batch).
        retraction: ``"qr"`` or ``"polar"``, as for `stiefel.retract`.
        callback: Called with every `Iteration`.

    Returns:
        `StiefelSolution`. Look at ``.converged``: a problem that did not converge is returned where it stopped.

    Raises:
        ValueError: A start that is not on the manifold, a cost that does not return one value a problem or is not
            finite at the start, derivatives of another shape, or settings out of range.

    Source: Absil, Baker, Gallivan, "Trust-region methods on Riemannian manifolds" (2007); the inner iteration is
    Steihaug's and Toint's, with the norms of Conn, Gould, Toint (2000), 7.5.

    The logger of this module says of every iteration, at level DEBUG, the objective, the gradient norm and the distance
    to the last point, and at the end why it stopped.

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
    if retraction not in ("qr", "polar"):
        raise ValueError(f"retraction must be 'qr' or 'polar', got {retraction!r}")
    with torch.no_grad():
        model = LocalModel(cost, initial, gradient, hessian)
        if not bool(torch.isfinite(model.cost).all() & torch.isfinite(model.euclidean_gradient).all()):
            raise ValueError("cost and its gradient must be finite at initial, got NaN or infinity")
        state = _State(model, _tolerance(tolerance, model))
        for number in range(1, max_iterations + 1):
            if not bool(state.active.any()):
                break
            seen = state.advance(
                number, lambda point: LocalModel(cost, point, gradient, hessian), inner_limit, retraction
            )
            _report(seen, callback)
        solution = state.solution(max_iterations)
        if logger.isEnabledFor(logging.DEBUG):
            moved = float(distance(solution.point, initial).max())
            logger.debug("stopped, %.3e from the start: %s", moved, solution.reason)
    return solution


def _tolerance(tolerance: float | None, model: LocalModel) -> float:
    if tolerance is None:
        largest = float(torch.linalg.matrix_norm(model.euclidean_gradient).max())
        return float(torch.finfo(model.point.dtype).eps ** 0.5) * largest
    if not (isinstance(tolerance, int | float) and 0 <= tolerance < math.inf):
        raise ValueError(f"tolerance must be a finite number of at least 0, got {tolerance!r}")
    return float(tolerance)


def _report(seen: Iteration, callback: Callable[[Iteration], object] | None) -> None:
    if callback is not None:
        callback(seen)
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug(
            "iteration %d: objective %.10g, gradient norm %.3e, distance to the last point %.3e, %d CG steps, "
            "%d of %d problems active",
            seen.number,
            float(seen.cost.mean()),
            float(seen.gradient_norm.max()),
            float(seen.step.max()),
            seen.inner_iterations,
            int(seen.active.sum()),
            seen.active.numel(),
        )


class _State:
    """Where all problems of a batch are; radii, norms and masks are (..., 1, 1)."""

    def __init__(self, model: LocalModel, tolerance: float) -> None:
        self.model, self.tolerance = model, tolerance
        self.largest_radius = math.sqrt(model.point.shape[-2])  # ‖Q‖: steps beyond it retract to much the same points
        scalar = model.cost[..., None, None]
        # A step that is too long is found out at the cost of one. An eighth of it, the usual start, costs two
        # iterations of eight on the published problem, and was not clearly better or worse on others.
        self.radius = torch.full_like(scalar, self.largest_radius)
        self.status = torch.full_like(scalar, int(Stop.MAX_ITERATIONS), dtype=torch.int64)
        self.iterations = torch.zeros_like(self.status)
        self.active = torch.ones_like(self.status, dtype=torch.bool)
        self._settle()
        self.first_norm = self.gradient_norm

    def _settle(self) -> None:
        """Problems that reached the tolerance, or whose steps have become rounding, are done."""
        self.gradient_norm = inner(self.model.gradient, self.model.gradient).sqrt()
        smallest = torch.finfo(self.radius.dtype).eps * self.largest_radius
        for reason, reached in (
            (Stop.CONVERGED, self.gradient_norm <= self.tolerance),
            (Stop.STALLED, self.radius <= smallest),
        ):
            self.status = torch.where(self.active & reached, int(reason), self.status)
            self.active = self.active & ~reached

    def advance(
        self, number: int, evaluate: Callable[[Tensor], LocalModel], inner_limit: int, retraction: Retraction
    ) -> Iteration:
        """One outer iteration."""
        model, active = self.model, self.active
        # Superlinear in the end, but never beyond what the tolerance asks for.
        forcing = (self.gradient_norm / self.first_norm.clamp_min(self.tolerance)).clamp_max(_INNER_REDUCTION)
        residual_norm = (self.gradient_norm * forcing).clamp_min(0.1 * self.tolerance)
        step, residual, at_boundary, inner_iterations = truncated_conjugate_gradients(
            model.hessian, model.gradient, self.radius, active, residual_norm, inner_limit
        )
        promised = -0.5 * (inner(model.gradient, step) + inner(residual, step))
        trial = evaluate(retract(model.point, step, retraction))
        rounding = self._rounding()
        ratio = ((model.cost - trial.cost)[..., None, None] + rounding) / (promised + rounding)
        accepted = active & (ratio > _ACCEPT)
        factor = torch.where(
            ratio >= _SHRINK, torch.where((ratio > _GROW) & at_boundary, 2.0, 1.0), 0.25
        )  # NaN shrinks
        self.radius = torch.where(active, self.radius * factor, self.radius).clamp_max(self.largest_radius)
        self.iterations = self.iterations + active
        if bool(accepted.all()):
            self.model = trial
        elif bool(accepted.any()):
            self.model = evaluate(torch.where(accepted, trial.point, model.point))
        self._settle()
        return Iteration(
            number=number,
            point=self.model.point,
            cost=self.model.cost,
            gradient_norm=self.gradient_norm[..., 0, 0],
            step=distance(self.model.point, model.point),
            radius=self.radius[..., 0, 0],
            accepted=accepted[..., 0, 0],
            active=active[..., 0, 0],
            inner_iterations=inner_iterations,
        )

    def _rounding(self) -> Tensor:
        """What the cost cannot resolve: steps that promise less are trusted (Conn, Gould, Toint 2000, 17.4.2).

        The cost may be small as a difference of larger terms: ‖G‖‖Q‖ is their size.
        """
        reach = torch.linalg.matrix_norm(self.model.euclidean_gradient, keepdim=True) * self.largest_radius
        cost = self.model.cost[..., None, None].abs()
        return 100 * torch.finfo(reach.dtype).eps * torch.maximum(cost, reach)

    def solution(self, max_iterations: int) -> StiefelSolution:
        """The record of where everything stands."""
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
