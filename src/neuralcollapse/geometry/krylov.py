"""Krylov solvers for equations in a Hessian that is given by its products with tangent vectors.

Leading dimensions are independent problems; norms, lengths and masks are (..., 1, 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from neuralcollapse.geometry.stiefel import inner

_STEPS_BETWEEN_READS = 8  # on accelerators, where reading a mask on the host causes a sync


def truncated_conjugate_gradients(
    hessian: Callable[[Tensor], Tensor],
    gradient: Tensor,
    radius: Tensor,
    active: Tensor,
    residual_norm: Tensor,
    max_iterations: int,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Minimise ⟨g, V⟩ + ½⟨V, Hess[V]⟩ over ‖V‖ ≤ Δ, up to a residual norm, the boundary or negative curvature.

    Problems that are finished or inactive take steps of length 0, so that the host needs to read a mask only to
    terminate the loop.

    Args:
        hessian: Hess, of tangent vectors (..., p, d).
        gradient: g, (..., p, d).
        radius: Δ, (..., 1, 1).
        active: (..., 1, 1) bool.
        residual_norm: ‖g + Hess[V]‖ at which to stop, (..., 1, 1).
        max_iterations: Maximum number of steps.

    Returns:
        V; the residual g + Hess[V]; whether V is at the boundary, (..., 1, 1); and the number of steps.
    """
    step, residual, direction = torch.zeros_like(gradient), gradient.clone(), -gradient
    square = inner(residual, residual)  # squared norm of the residual
    step_square, step_direction, direction_square = torch.zeros_like(square), torch.zeros_like(square), square
    running, at_boundary = active, torch.zeros_like(active)
    read_every = 1 if gradient.device.type == "cpu" else _STEPS_BETWEEN_READS
    count = 0
    for count in range(1, max_iterations + 1):
        product = hessian(direction)
        curvature = inner(direction, product)
        length = square / curvature
        next_square = step_square + length * (2 * step_direction + length * direction_square)
        leaves = running & ~((curvature > 0) & (next_square < radius.square()))
        to_boundary = (radius.square() - step_square).clamp_min(0)
        root = (step_direction.square() + direction_square * to_boundary).sqrt()
        length = torch.where(leaves, (root - step_direction) / direction_square, length)
        length = torch.where(running, length, 0)
        step = torch.addcmul(step, length, direction)
        residual = torch.addcmul(residual, length, product)
        at_boundary = at_boundary | leaves
        next_residual = inner(residual, residual)
        running = running & ~leaves & (next_residual > residual_norm.square())
        if count % read_every == 0 and not bool(running.any()):
            break
        ratio = torch.where(running, next_residual / square, 0)
        direction = torch.addcmul(-residual, ratio, direction)
        step_square = torch.where(running, next_square, step_square)
        step_direction = torch.where(running, ratio * (step_direction + length * direction_square), 0)
        direction_square = next_residual + ratio.square() * direction_square
        square = next_residual
    return step, residual, at_boundary, count


@dataclass(frozen=True)
class LeastNormSolution:
    """Minimal-norm solution of Hess[V] = b, or of the nearest equation that has a solution.

    Attributes:
        tangent: V, (..., p, d).
        residual: ‖b − Hess[V]‖/‖b‖, (..., 1, 1).
        converged: (..., 1, 1) bool, whether V is that solution.
        singular: (..., 1, 1) bool, whether b had a component outside the range of Hess, which was left out.
        indefinite: (..., 1, 1) bool, whether negative curvature was encountered.
        iterations: Number of steps of the problem that needed most.
    """

    tangent: Tensor
    residual: Tensor
    converged: Tensor
    singular: Tensor
    indefinite: Tensor
    iterations: int


def conjugate_residuals(
    hessian: Callable[[Tensor], Tensor], right: Tensor, null: Tensor, max_iterations: int
) -> LeastNormSolution:
    r"""Solve Hess[V] = b by conjugate residuals: conjugate gradients in the inner product of Hess.

    Conjugate gradients diverge if b has a component in the null space of Hess; with conjugate residuals, the residual r
    converges to this component. V then contains a multiple of it, and V − (⟨V, r⟩/⟨r, r⟩) r is the solution of minimal
    norm.

    Args:
        hessian: Hess, symmetric, of tangent vectors (..., p, d).
        right: b, (..., p, d), tangent.
        null: (..., 1, 1), eigenvalues of Hess that count as 0.
        max_iterations: Maximum number of steps.

    Returns:
        `LeastNormSolution`.

    Source: Stiefel (1955) for the method; Liu, Milzarek, Roosta, "Obtaining pseudo-inverse solutions with MINRES"
    (2023) for the lifting.
    """
    epsilon = torch.finfo(right.dtype).eps
    target = inner(right, right) * epsilon ** (4 / 3)
    solution, residual, direction = torch.zeros_like(right), right, right
    product = along = hessian(residual)  # Hess applied to the residual, and to the direction
    energy, square = inner(residual, product), inner(residual, residual)
    largest = torch.zeros_like(square)  # square of the largest eigenvalue, estimated from below
    singular, indefinite = torch.zeros_like(square, dtype=torch.bool), torch.zeros_like(square, dtype=torch.bool)
    running = square > 0
    read_every = 1 if right.device.type == "cpu" else _STEPS_BETWEEN_READS
    count = 0
    for count in range(max_iterations + 1):
        image, along_square = inner(product, product), inner(along, along)
        largest = torch.maximum(largest, image / torch.where(square > 0, square, 1))
        zero = torch.maximum(epsilon * largest, null.square())
        solved = square <= target
        singular = singular | (running & ~solved & (image <= zero * square))
        running = running & ~solved & ~singular
        if count == max_iterations or (count % read_every == 0 and not bool(running.any())):
            break
        indefinite = indefinite | (running & (energy < 0))
        length = torch.where(running, energy / along_square, 0)
        solution = torch.addcmul(solution, length, direction)
        residual = torch.addcmul(residual, -length, along)
        product = hessian(residual)
        next_energy = inner(residual, product)
        ratio = torch.where(running, next_energy / energy, 0)
        direction = torch.addcmul(residual, ratio, direction)
        along = torch.addcmul(product, ratio, along)
        energy, square = next_energy, inner(residual, residual)
    unreached = torch.where(singular, inner(solution, residual) / torch.where(square > 0, square, 1), 0)
    norm = inner(right, right)
    return LeastNormSolution(
        tangent=torch.addcmul(solution, -unreached, residual),
        residual=(square / torch.where(norm > 0, norm, 1)).sqrt(),
        converged=~running,
        singular=singular,
        indefinite=indefinite,
        iterations=count,
    )
