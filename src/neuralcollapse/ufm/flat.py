"""The objective of a model as a function of one vector, which is how solvers of scipy see it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from neuralcollapse.heads.class_means import MovingMean
from neuralcollapse.ufm.model import UnconstrainedFeatures


class FlatObjective:
    """f of all trained parameters in one fp64 vector, in the order of ``model.parameters()``.

    Args:
        model: The model; a copy of it is used.

    Raises:
        ValueError: ``model`` is of another kind, or its head is in training mode and moves class means: its objective
            is then not a function of the parameters alone.
    """

    def __init__(self, model: UnconstrainedFeatures) -> None:
        if not isinstance(model, UnconstrainedFeatures):
            raise ValueError(f"model must be an UnconstrainedFeatures, got {type(model).__name__}")
        moving = any(isinstance(module, MovingMean) for module in model.head.modules())
        if model.head.training and moving:
            raise ValueError(
                f"model must have an objective of its parameters alone, and {type(model.head).__name__} moves class "
                "means in training mode: call model.eval(), which holds its classifier, or use another head"
            )
        self._objective = _Objective(copy.deepcopy(model).double())
        self._parameters = {
            name: parameter for name, parameter in self._objective.named_parameters() if parameter.requires_grad
        }
        self.size = sum(parameter.numel() for parameter in self._parameters.values())

    def point(self) -> Tensor:
        """Where the model is: (P,) fp64."""
        return torch.cat([parameter.detach().reshape(-1) for parameter in self._parameters.values()])

    def __call__(self, point: Tensor) -> Tensor:
        """F at a point (P,), differentiable as often as one likes."""
        pieces = _split(point, list(self._parameters.values()))
        value: Tensor = functional_call(self._objective, dict(zip(self._parameters, pieces, strict=True)), ())
        return value

    def value_and_gradient(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """F and its gradient (P,)."""
        point = point.detach().requires_grad_()
        value = self(point)
        (gradient,) = torch.autograd.grad(value, point)
        return value.detach(), gradient

    def hessian_product(self, point: Tensor) -> Callable[[Tensor], Tensor]:
        """V ↦ ∇²f v at a point.

        The gradient's graph is made once. The Hessian is symmetric, so its product from the left, which one backward
        pass gives, is its product.
        """
        pull_back: Callable[[Tensor], tuple[Tensor]] = torch.func.vjp(torch.func.grad(self), point)[1]
        return lambda vector: pull_back(vector)[0]


class _Objective(nn.Module):
    """A module that returns the objective, since a functional call is one of ``forward``."""

    def __init__(self, model: UnconstrainedFeatures) -> None:
        super().__init__()
        self.model = model

    def forward(self) -> Tensor:
        return self.model.objective()


@torch.no_grad()
def move_to(model: UnconstrainedFeatures, point: Tensor) -> None:
    """Set the trained parameters of a model from a vector (P,)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter, piece in zip(parameters, _split(point, parameters), strict=True):
        parameter.copy_(piece)


def _split(point: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The vector's pieces, each of the shape of its parameter."""
    pieces = torch.split(point, [parameter.numel() for parameter in parameters])
    return [piece.view_as(parameter) for piece, parameter in zip(pieces, parameters, strict=True)]
