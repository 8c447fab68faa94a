"""Automatic gradient descent: training without a learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class AGD(Optimizer):
    r"""Automatic gradient descent, whose step size follows from the gradients and the shapes of the layers.

    For the L weights W_l, of shape fan-out × fan-in (× kernel), with ``s_l = sqrt(fan_out / fan_in)`` divided by
    the square root of the number of kernel positions, and ‖∇_l‖ the Frobenius norm over the first two dimensions at
    each kernel position::

        G = (1/L) Σ_l s_l Σ‖∇_l‖,   η = log((1 + sqrt(1 + 4G))/2),   W_l ← W_l − gain (η/L) s_l ∇_l/‖∇_l‖

    Weights must be initialised by `orthogonal_start`. The method does not define steps for vectors, such as biases and
    the scale of batch norm.

    Args:
        parameters: Weights of at least two dimensions, or (name, weight) pairs, whose names are used in errors.
        gain: Factor of every step.

    Attributes:
        eta: η of the last step, a tensor on the device of the weights; None before the first step.

    Raises:
        ValueError: if a parameter is a vector or a number, or ``gain`` is not positive.

    Source: Bernstein, Mingard, Huang, Azizan, Yue, "Automatic gradient descent: deep learning without
    hyperparameters" (2023); formula as in Markou, Ajanthan, Gould (NeurIPS 2024).

    Examples:
        >>> layer = nn.Linear(8, 3, bias=False)
        >>> orthogonal_start(layer)
        >>> optimizer = AGD(layer.named_parameters())
        >>> layer(torch.ones(4, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> bool(optimizer.eta > 0)
        True
    """

    def __init__(self, parameters: Iterable[Tensor] | Iterable[tuple[str, Tensor]], gain: float = 10.0) -> None:
        if not 0 < gain < math.inf:
            raise ValueError(f"gain must be positive and finite, got {gain}")
        super().__init__(parameters, {"gain": gain})
        for group in self.param_groups:
            names = group.get("param_names", ["a parameter"] * len(group["params"]))
            vectors = [name for name, weight in zip(names, group["params"], strict=True) if weight.ndim < 2]
            if vectors:
                raise ValueError(
                    f"agd has no rule for biases and other vectors, but {len(vectors)} parameters are vectors "
                    f"({vectors[0]}, ...): train without biases, and with batch norm without scale and shift"
                )
        self.eta: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; weights without a gradient do not change."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        weights = [(weight, group["gain"]) for group in self.param_groups for weight in group["params"]]
        number = len(weights)
        moved = [(weight, weight.grad, gain) for weight, gain in weights if weight.grad is not None]
        if not moved:
            return loss
        norms = [torch.linalg.matrix_norm(gradient, dim=(0, 1), keepdim=True) for _, gradient, _ in moved]
        summary = sum(_scale(moved[i][0]) * norms[i].sum() for i in range(len(moved))) / number
        self.eta = torch.log(0.5 * (1 + torch.sqrt(1 + 4 * summary)))
        for (weight, gradient, gain), norm in zip(moved, norms, strict=True):
            direction = gradient / torch.where(norm > 0, norm, 1)
            weight.sub_(direction.mul_(self.eta * (gain * _scale(weight) / number)))
        return loss


@torch.no_grad()
def orthogonal_start(module: nn.Module) -> None:
    """Initialise the weights of a module for AGD: orthogonal at each kernel position, scaled by s_l.

    The weights are drawn from the global generator. Parameters with fewer than two dimensions do not change.
    """
    for weight in module.parameters():
        if weight.ndim < 2:
            continue
        flat = weight.new_empty(math.prod(weight.shape[2:]), *weight.shape[:2])
        for position in flat:
            nn.init.orthogonal_(position)
        weight.copy_(flat.movedim(0, -1).reshape(weight.shape) * _scale(weight))


def _scale(weight: Tensor) -> float:
    """Return s_l, the initial singular values of a weight with this shape."""
    fan_out, fan_in = weight.shape[:2]
    return math.sqrt(fan_out / fan_in / math.prod(weight.shape[2:]))
