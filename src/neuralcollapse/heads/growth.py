"""Growth of tensors, parameters and optimiser states by one row per added class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neuralcollapse._checks import check_at_least, check_etf_sizes, check_generator


def check_growth(num_new: int, optimizer: object, generator: object) -> None:
    """Raise a `ValueError` unless the arguments of `Head.grow` have the right types and a class is added."""
    check_at_least("num_new", num_new, 1)
    check_generator(generator)
    inner = getattr(optimizer, "optimizer", optimizer)  # of a wrapper, as lightning's
    if optimizer is not None and not isinstance(inner, Optimizer):
        raise ValueError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")


def check_room(num_classes: int, in_features: int, otherwise: str) -> None:
    """Raise a `ValueError` unless a simplex ETF with the new number of classes exists in d dimensions."""
    try:
        check_etf_sizes(num_classes, in_features)
    except ValueError:
        raise ValueError(
            f"num_new must give at most K = d + 1 = {in_features + 1} classes, the maximum for a simplex ETF, got "
            f"K = {num_classes}: {otherwise}"
        ) from None


def padded(tensor: Tensor, num_new: int) -> Tensor:
    """Return a new tensor: the given one followed by ``num_new`` rows of zeros."""
    return torch.cat([tensor, tensor.new_zeros(num_new, *tensor.shape[1:])])


class ParameterGrowth:
    """Replacement of parameters by larger ones in a module and its optimiser; nothing changes before `apply` is called.

    Tensors of the optimiser's state that have the shape of the parameter (momentum, second moments) keep their rows and
    receive rows of zeros; step counters are unchanged.

    Args:
        optimizer: Optimiser that holds the parameters, or None.

    Raises:
        ValueError: if the optimiser does not hold a parameter, or its state contains tensors of another shape.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer: Optimizer | None = getattr(optimizer, "optimizer", optimizer)
        self._planned: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter, dict[str, Any]]] = []

    def plan(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Plan to replace the parameter ``module.name`` by one with the given value, which has more rows."""
        old = module._parameters[name]
        assert old is not None
        new = nn.Parameter(value.detach().to(old).clone(), requires_grad=old.requires_grad)
        self._planned.append((module, name, old, new, self._grown_state(name, old, len(new) - len(old))))

    def apply(self) -> None:
        """Replace the parameters."""
        for module, name, old, new, state in self._planned:
            module._parameters[name] = new
            if self._optimizer is None:
                continue
            for group in self._optimizer.param_groups:
                group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
            if self._optimizer.state.pop(old, None) is not None:
                self._optimizer.state[new] = state

    def _grown_state(self, name: str, old: nn.Parameter, num_new: int) -> dict[str, Any]:
        optimizer = self._optimizer
        if optimizer is None:
            return {}
        if not any(old is parameter for group in optimizer.param_groups for parameter in group["params"]):
            raise ValueError(
                f"optimizer must hold the parameter {name!r} of the head, but does not: pass the optimizer that "
                "trains the head, or pass None and create a new optimizer"
            )
        state = {}
        for key, value in optimizer.state.get(old, {}).items():
            if isinstance(value, Tensor) and value.shape == old.shape:
                value = padded(value, num_new)
            elif not (value is None or isinstance(value, bool | int | float) or _is_scalar(value)):
                raise ValueError(
                    f"optimizer must have a state of tensors with one row per class or of numbers, got {key!r} of "
                    f"{type(optimizer).__name__}: grow without optimizer, and create a new one"
                )
            state[key] = value
        return state


def _is_scalar(value: object) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1
