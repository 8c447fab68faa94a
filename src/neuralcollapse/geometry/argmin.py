"""Differentiable argmin over the Stiefel manifold: a declarative layer.

A declarative layer is defined by the problem that its output solves, not by the steps of a solver: the derivative of
the solution follows from the optimality condition, regardless of the solver.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from neuralcollapse._checks import check_finite, check_floating
from neuralcollapse.geometry.krylov import LeastNormSolution, conjugate_residuals
from neuralcollapse.geometry.stiefel import project
from neuralcollapse.geometry.trust_region import SecondOrderModel, StiefelSolution, minimize_on_stiefel

Parameters = Tensor | tuple[Tensor, ...] | list[Tensor]
ParametricCost = Callable[[Tensor, Any], Tensor]


@dataclass
class AdjointRecord:
    """Record of the adjoint solve, updated by each backward pass.

    Attributes:
        converged: (...) bool, whether the adjoint equation was solved; None before the first backward pass.
        singular: (...) bool, whether the Hessian is singular at the solution: the derivative is then that of minimal
            norm.
        residual: (...), relative to the tangent part of the upstream gradient.
        iterations: Number of Hessian–vector products for the problem that needed most.
        reason: Summary in words.
    """

    converged: Tensor | None = None
    singular: Tensor | None = None
    residual: Tensor | None = None
    iterations: int = 0
    reason: str = "no backward pass yet"

    def fill(self, solved: LeastNormSolution) -> None:
        """Store the result of one backward pass, and warn if the derivative is inexact or not unique."""
        self.converged, self.singular = solved.converged[..., 0, 0], solved.singular[..., 0, 0]
        self.residual, self.iterations = solved.residual[..., 0, 0], solved.iterations
        findings = []
        if not bool(self.converged.all()):
            findings.append(f"the adjoint equation is not solved after {self.iterations} steps")
        if bool(self.singular.any()):
            findings.append("the Hessian is singular at the solution: the gradient is that of minimal norm")
        if bool(solved.indefinite.any()):
            findings.append("the Hessian has negative curvature at the solution, which is not a minimum")
        self.reason = "; ".join(findings) or "adjoint equation solved"
        if findings:
            warnings.warn(f"argmin_on_stiefel: {self.reason}", RuntimeWarning, stacklevel=2)


@dataclass(frozen=True)
class ArgminSolution(StiefelSolution):
    """A `StiefelSolution` with a differentiable point, and the record of its derivative.

    Attributes:
        adjoint: `AdjointRecord`, updated by the backward pass.
    """

    adjoint: AdjointRecord = field(default_factory=AdjointRecord)


def argmin_on_stiefel(cost: ParametricCost, parameters: Parameters, initial: Tensor, **solver: Any) -> ArgminSolution:
    r"""Return the matrix with orthonormal rows that minimises a cost, differentiable in the cost's parameters.

    With Q(θ) a minimiser of f(·, θ), the optimality condition grad f(Q(θ), θ) = 0 gives Hess[dQ] = −proj(∂_θ∇f dθ).
    For an upstream gradient G of Q the backward pass solves the adjoint equation

        Hess[V] = proj(G)   on the tangent space,   and returns   ∂θ = −∂_θ⟨∇f(Q, θ), V⟩.

    This takes one Krylov solve with Hessian–vector products, and memory for a few matrices of the size of Q; the steps
    of the solver are not stored.

    Args:
        cost: Function of (point, parameters) that maps points (..., p, d) and ``parameters`` as given here to one value
            per problem, (...). It must be three times differentiable by torch. Tensors with respect to which it is
            differentiated must be passed in ``parameters``, not by closure.
        parameters: A tensor, or a tuple or list of tensors; only tensors that require a gradient receive one.
        initial: (..., p, d) of fp32 or fp64 with orthonormal rows, the start of the solver.
        **solver: Keyword arguments of `minimize_on_stiefel`.

    Returns:
        `ArgminSolution`; ``.point`` is differentiable once, the other fields are not differentiable. If the solution
        has not converged, or its derivative is not unique, a warning is issued, and the record contains the reason.

    Raises:
        ValueError: if `minimize_on_stiefel` raises it; if parameters are not finite floating-point tensors; or if the
            cost depends on a tensor that requires a gradient and is not among the parameters.

    Source: Gould, Hartley, Campbell, "Deep declarative networks" (2022), here on a manifold by its Riemannian Hessian.

    Examples:
        >>> target = torch.tensor([[3.0, 0.0, 4.0]], dtype=torch.float64, requires_grad=True)
        >>> start = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
        >>> point = argmin_on_stiefel(lambda point, target: -(target * point).sum((-2, -1)), target, start).point
        >>> point[0, 1].backward()  # a step across the target turns its direction by 1/5 of the step
        >>> target.grad
        tensor([[0.0000, 0.2000, 0.0000]], dtype=torch.float64)
    """
    tensors = [parameters] if isinstance(parameters, Tensor) else parameters
    if not isinstance(tensors, tuple | list):
        raise ValueError(f"parameters must be a tensor, or a tuple or list of tensors, got {type(parameters).__name__}")
    for index, tensor in enumerate(tensors):
        name = "parameters" if isinstance(parameters, Tensor) else f"parameters[{index}]"
        check_floating(name, tensor)
        check_finite(name, tensor)

    def pack(values: tuple[Tensor, ...] | list[Tensor]) -> Parameters:
        return values[0] if isinstance(parameters, Tensor) else type(tensors)(values)

    detached = pack([tensor.detach() for tensor in tensors])
    solution = minimize_on_stiefel(lambda point: cost(point, detached), initial, **solver)
    if cost(solution.point, detached).requires_grad:
        raise ValueError(
            "cost must not depend on a tensor that requires a gradient and is not among the parameters: "
            "pass it as a parameter, or detach it"
        )
    if not bool(solution.converged.all()):
        warnings.warn(f"argmin_on_stiefel: not converged: {solution.reason}", RuntimeWarning, stacklevel=2)
    record = AdjointRecord()
    attach: Callable[..., Tensor] = _Argmin.apply
    point = attach(lambda point, *values: cost(point, pack(values)), solution, record, solution.point, *tensors)
    return ArgminSolution(**(vars(solution) | {"point": point}), adjoint=record)


class _Argmin(torch.autograd.Function):
    """Identity on the solution, with the derivative of the argmin with respect to the parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        cost: Callable[..., Tensor],
        solution: StiefelSolution,
        record: AdjointRecord,
        point: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.cost, ctx.gradient_norm, ctx.record = cost, solution.gradient_norm, record
        ctx.save_for_backward(point, *parameters)
        return point.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        point, *parameters = ctx.saved_tensors
        wanted = ctx.needs_input_grad[4:]
        values = [tensor.detach().requires_grad_(needed) for tensor, needed in zip(parameters, wanted, strict=True)]
        model = SecondOrderModel(lambda variable: ctx.cost(variable, *values), point)
        # Null eigenvalues of the Hessian differ from 0 by about the distance of the point from a critical point.
        null = 10 * ctx.gradient_norm[..., None, None]
        rows, columns = point.shape[-2:]
        solved = conjugate_residuals(model.hessian, project(point, upstream), null, 2 * rows * columns)
        ctx.record.fill(solved)
        gradients = model.parameter_gradients(-solved.tangent, [v for v in values if v.requires_grad])
        return None, None, None, None, *(next(gradients) if needed else None for needed in wanted)
