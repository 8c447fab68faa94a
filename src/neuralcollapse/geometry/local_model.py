"""A cost on the Stiefel manifold to second order at one point: value, Riemannian gradient, Hessian–vector products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from neuralcollapse.geometry.stiefel import project, symmetric

Cost = Callable[[Tensor], Tensor]
Gradient = Callable[[Tensor], Tensor]
Hessian = Callable[[Tensor, Tensor], Tensor]


class LocalModel:
    r"""What a second-order method asks of a cost f at Q, by automatic differentiation or from given derivatives.

    With the Euclidean gradient G = ∇f and S = ½(GQᵀ + QGᵀ),

        grad f = G − SQ,   Hess f[V] = proj(∇²f[V] − SV)   for a tangent V.

    Everything is computed when it is first asked for, so that the value alone costs one evaluation of f. Nothing
    larger than Q is formed: ∇²f[V] is the derivative of ⟨G, V⟩.

    Args:
        cost: f, of points (..., p, d) to values (...): one a problem, each of its own matrix alone.
        point: Q, (..., p, d).
        gradient: Euclidean gradient, of Q; automatic if not given.
        hessian: Euclidean Hessian–vector product, of (Q, V); automatic if not given.

    Source: Absil, Mahony, Trumpf, "An extrinsic look at the Riemannian Hessian" (2013).
    """

    def __init__(
        self, cost: Cost, point: Tensor, gradient: Gradient | None = None, hessian: Hessian | None = None
    ) -> None:
        self.point = point.detach()
        self._given_gradient, self._given_hessian = gradient, hessian
        with torch.enable_grad():
            self._variable = self.point.clone().requires_grad_()
            self._cost = cost(self._variable)
        _check_one_value_a_problem(self._cost, self.point)
        self.cost = self._cost.detach()

    @cached_property
    def _graph(self) -> Tensor:
        """The Euclidean gradient, with the graph that its own derivative needs."""
        if self._given_gradient is not None:
            with torch.enable_grad():
                gradient = self._given_gradient(self._variable)
            _check_shape("gradient", gradient, self.point)
            return gradient
        if not self._cost.requires_grad:
            raise ValueError("cost must depend on its point differentiably, got a value without a gradient")
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(
                self._cost.sum(), self._variable, create_graph=self._given_hessian is None, allow_unused=True
            )
        return torch.zeros_like(self.point) if gradient is None else gradient

    @cached_property
    def euclidean_gradient(self) -> Tensor:
        return self._graph.detach()

    @cached_property
    def _normal(self) -> Tensor:
        return symmetric(self.euclidean_gradient @ self.point.mT)

    @cached_property
    def gradient(self) -> Tensor:
        """The Riemannian gradient, (..., p, d)."""
        return self.euclidean_gradient - self._normal @ self.point

    def hessian(self, tangent: Tensor) -> Tensor:
        """The Riemannian Hessian applied to a tangent vector, (..., p, d)."""
        curved = self._normal @ tangent
        euclidean = self._euclidean_hessian(tangent)
        return project(self.point, -curved if euclidean is None else euclidean - curved)

    def _euclidean_hessian(self, tangent: Tensor) -> Tensor | None:
        """∇²f[V]; None where the gradient does not depend on the point."""
        if self._given_hessian is not None:
            product = self._given_hessian(self.point, tangent)
            _check_shape("hessian", product, self.point)
            return product
        if not self._graph.requires_grad:
            return None
        (product,) = torch.autograd.grad(self._graph, self._variable, tangent, retain_graph=True, allow_unused=True)
        return product

    def parameter_gradients(self, tangent: Tensor, parameters: Sequence[Tensor]) -> Iterator[Tensor]:
        """∂_θ⟨∇f(Q, θ), V⟩ for every tensor θ that the cost was made of: what a change of θ does to the gradient."""
        if not self._graph.requires_grad or not parameters:
            return (torch.zeros_like(parameter) for parameter in parameters)
        found = torch.autograd.grad(self._graph, parameters, tangent, retain_graph=True, allow_unused=True)
        return (
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(parameters, found, strict=True)
        )


def _check_one_value_a_problem(values: Tensor, point: Tensor) -> None:
    if not isinstance(values, Tensor) or values.shape != point.shape[:-2]:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"cost must return one value a problem, a tensor of shape {tuple(point.shape[:-2])} for points of shape "
            f"{tuple(point.shape)}, got {got}"
        )


def _check_shape(name: str, value: Tensor, point: Tensor) -> None:
    if not isinstance(value, Tensor) or value.shape != point.shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must return a tensor of the point's shape {tuple(point.shape)}, got {got}")
