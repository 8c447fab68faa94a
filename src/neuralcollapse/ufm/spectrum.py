"""Extreme eigenvalues of the Hessian of a model's objective, from Hessian–vector products."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from neuralcollapse._checks import check_at_least, check_choice
from neuralcollapse.heads.moving_means import MovingMean
from neuralcollapse.ufm.model import UnconstrainedFeatures

# Up to DENSE_AUTO parameters the dense Hessian is faster; above DENSE_LARGEST (200 MB) it raises an error.
DENSE_AUTO, DENSE_LARGEST = 300, 5_000
Method = Literal["auto", "dense", "lanczos"]


@dataclass(frozen=True)
class HessianExtremes:
    """Least and greatest eigenpairs of the Hessian at a point, in fp64.

    Eigenvectors contain all P trained parameters, in the order of ``model.parameters()``
    (``torch.nn.utils.vector_to_parameters`` writes a vector to the model).

    Attributes:
        least: (count,) smallest eigenvalues in ascending order.
        least_directions: (count, P) unit eigenvectors of ``least``.
        greatest: (count,) greatest eigenvalues in ascending order.
        greatest_directions: (count, P) unit eigenvectors of ``greatest``.
        residual: Largest ‖∇²f v − λv‖ of all pairs; within this distance of each λ there is an exact eigenvalue.
        method: ``"dense"`` or ``"lanczos"``.
    """

    least: Tensor
    least_directions: Tensor
    greatest: Tensor
    greatest_directions: Tensor
    residual: float
    method: Literal["dense", "lanczos"]


def hessian_extremes(
    model: UnconstrainedFeatures,
    *,
    count: int = 1,
    method: Method = "auto",
    tolerance: float = 1e-12,
    generator: torch.Generator | None = None,
) -> HessianExtremes:
    """Compute the least and the greatest eigenvalues of ∇²f at the model's parameters, with their directions.

    The method is Lanczos iterations on Hessian–vector products, which do not need a P × P matrix; up to 300 parameters,
    the dense Hessian is used, because it is faster. The least eigenvalue is computed as an extreme eigenvalue of ∇²f
    shifted by the greatest one, because a relative tolerance is meaningless for an eigenvalue near 0. The direction of
    a multiple least eigenvalue is a random vector of its eigenspace, so that it does not share symmetries of the
    parameters. Lanczos may return a multiple eigenvalue fewer times than its multiplicity, unlike the dense Hessian.

    Args:
        model: Its head must be in evaluation mode, or of a kind that moves no class means.
        count: Number of eigenvalues at either end.
        method: ``"dense"`` (at most 5,000 parameters), ``"lanczos"``, or ``"auto"``.
        tolerance: Tolerance of the Lanczos iterations, relative to the greatest eigenvalue.
        generator: Source of the random start vector of Lanczos.

    Raises:
        ValueError: if the model's objective is not a function of its parameters alone, the model is too large for the
            dense Hessian, or ``count`` is not in [1, P).
        ImportError: if scipy is not installed (Lanczos only).
        RuntimeError: if Lanczos does not reach the tolerance.

    Examples:
        >>> from neuralcollapse.ufm import origin_curvature, symmetric_saddle
        >>> origin = symmetric_saddle(4, 1, 3, 0.01, 0.01)
        >>> abs(float(hessian_extremes(origin).least[0]) - origin_curvature(4, 3, 0.01, 0.01)) < 1e-12
        True
    """
    check_choice("method", method, ("auto", "dense", "lanczos"))
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must lie in (0, 1), got {tolerance}")
    objective = FlatObjective(model)
    size = objective.size
    check_at_least("count", count, 1)
    if count >= size:
        raise ValueError(f"count must be less than the number of parameters = {size}, got {count}")
    if method == "dense" and size > DENSE_LARGEST:
        raise ValueError(
            f"method 'dense' must have at most {DENSE_LARGEST} parameters, got {size} (a Hessian of "
            f"{8 * size**2 / 1e9:.1f} GB): use 'lanczos'"
        )
    product = objective.hessian_product(objective.point())
    start = torch.randn(size, generator=generator, dtype=torch.float64)
    dense = method == "dense" or (method == "auto" and size <= DENSE_AUTO)
    ends = _dense(product, start, count) if dense else _lanczos(product, start, count, tolerance)
    residual = max(
        float((product(vector) - value * vector).norm())
        for values, vectors in (ends[:2], ends[2:])
        for value, vector in zip(values, vectors, strict=True)
    )
    return HessianExtremes(*ends, residual=residual, method="dense" if dense else "lanczos")


_Ends = tuple[Tensor, Tensor, Tensor, Tensor]


def _dense(product: Callable[[Tensor], Tensor], start: Tensor, count: int) -> _Ends:
    hessian = torch.func.vmap(product)(torch.eye(len(start), dtype=start.dtype))
    values, columns = torch.linalg.eigh(0.5 * (hessian + hessian.mT))
    multiple = columns[:, values <= values[0] + 1e-10 * values.abs().max()]
    # The first column is a random vector of the eigenspace of the least eigenvalue; the others complete the basis.
    random = multiple @ (multiple.mT @ start)
    columns[:, : multiple.shape[1]] = torch.linalg.qr(torch.cat([random[:, None], multiple], 1)).Q[:, :-1]
    return values[:count], columns.mT[:count], values[-count:], columns.mT[-count:]


def _lanczos(product: Callable[[Tensor], Tensor], start: Tensor, count: int, tolerance: float) -> _Ends:
    greatest, greatest_directions = _largest(product, start, count, tolerance)
    shift = float(greatest[-1])
    shifted, directions = _largest(lambda vector: shift * vector - product(vector), start, count, tolerance)
    return shift - shifted.flip(0), directions.flip(0), greatest, greatest_directions


def _largest(product: Callable[[Tensor], Tensor], start: Tensor, count: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return the algebraically largest eigenvalues (count,), ascending, and their unit eigenvectors (count, P)."""
    linalg = scipy_module("sparse.linalg")
    size = len(start)

    def apply(vector: Any) -> Any:
        return product(torch.from_numpy(vector.reshape(-1).copy())).numpy()

    operator = linalg.LinearOperator((size, size), matvec=apply, dtype="float64")
    try:
        values, vectors = linalg.eigsh(
            operator,
            k=count,
            which="LA",
            v0=start.numpy(),
            tol=tolerance,
            ncv=min(size, max(40, 4 * count)),
            maxiter=1000,
        )
    except linalg.ArpackNoConvergence as error:
        raise RuntimeError(f"Lanczos did not reach tolerance {tolerance:g}: {error}") from error
    order = values.argsort()
    return torch.from_numpy(values[order]), torch.from_numpy(vectors[:, order].T.copy())


class FlatObjective:
    """Objective f of a model as a function of one fp64 vector of all trained parameters, as required by scipy.

    The order is that of ``model.parameters()``.

    Args:
        model: The model; a copy of it is used.

    Raises:
        ValueError: if ``model`` is not an `UnconstrainedFeatures`, or its head is in training mode and updates class
            means, so that the objective is not a function of the parameters alone.
    """

    def __init__(self, model: UnconstrainedFeatures) -> None:
        if not isinstance(model, UnconstrainedFeatures):
            raise ValueError(f"model must be an UnconstrainedFeatures, got {type(model).__name__}")
        moving = any(isinstance(module, MovingMean) for module in model.head.modules())
        if model.head.training and moving:
            raise ValueError(
                f"the objective must depend on the model's parameters alone, but {type(model.head).__name__} updates "
                "class means in training mode: call model.eval(), which fixes the classifier, or use another head"
            )
        self._objective = _Objective(copy.deepcopy(model).double())
        self._parameters = {
            name: parameter for name, parameter in self._objective.named_parameters() if parameter.requires_grad
        }
        self.size = sum(parameter.numel() for parameter in self._parameters.values())

    def point(self) -> Tensor:
        """Return the model's parameters as one vector (P,) in fp64."""
        return torch.cat([parameter.detach().reshape(-1) for parameter in self._parameters.values()])

    def __call__(self, point: Tensor) -> Tensor:
        """Value of f at a point (P,), differentiable to any order."""
        pieces = _split(point, list(self._parameters.values()))
        value: Tensor = functional_call(self._objective, dict(zip(self._parameters, pieces, strict=True)), ())
        return value

    def value_and_gradient(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Value of f and its gradient (P,)."""
        point = point.detach().requires_grad_()
        value = self(point)
        (gradient,) = torch.autograd.grad(value, point)
        return value.detach(), gradient

    def hessian_product(self, point: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the map from v to ∇²f v at a point.

        The graph of the gradient is built once. Because the Hessian is symmetric, its product with a vector from the
        left, which one backward pass computes, equals ∇²f v.
        """
        pull_back: Callable[[Tensor], tuple[Tensor]] = torch.func.vjp(torch.func.grad(self), point)[1]
        return lambda vector: pull_back(vector)[0]


class _Objective(nn.Module):
    """Module whose ``forward`` returns the objective, as required by functional calls."""

    def __init__(self, model: UnconstrainedFeatures) -> None:
        super().__init__()
        self.model = model

    def forward(self) -> Tensor:
        return self.model.objective()


@torch.no_grad()
def set_parameters(model: UnconstrainedFeatures, point: Tensor) -> None:
    """Set the trained parameters of a model from a vector (P,)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter, piece in zip(parameters, _split(point, parameters), strict=True):
        parameter.copy_(piece)


def _split(point: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts of a vector, each with the shape of its parameter."""
    pieces = torch.split(point, [parameter.numel() for parameter in parameters])
    return [piece.view_as(parameter) for piece, parameter in zip(pieces, parameters, strict=True)]


def scipy_module(name: str) -> Any:
    """Import a module of scipy on demand, because the model and its closed forms do not need it.

    Raises:
        ImportError: if scipy is not installed; the message says what to install.
    """
    try:
        return import_module(f"scipy.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "scipy":
            raise
        raise ImportError(
            "minimisation and the spectrum of the Hessian need scipy, which is not installed: "
            "pip install 'neuralcollapse[theory]' (or: pip install scipy)"
        ) from error
