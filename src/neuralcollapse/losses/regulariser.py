"""Regularisers: losses of the output of a named layer, to add to the training loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from neuralcollapse._checks import check_integers, check_module, is_number


class Regulariser:
    """Weighted loss of the output of a layer, as returned by `regularise`.

    Attributes:
        layer: Name of the layer.
        loss: Function of features (N, d) and targets (N,).
        weight: Factor of the loss.
    """

    def __init__(self, model: nn.Module, layer: str, loss: Callable[[Tensor, Tensor], Tensor], weight: float) -> None:
        self.layer, self.loss, self.weight = layer, loss, weight
        self._output: Tensor | None = None
        self._handle = model.get_submodule(layer).register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise ValueError(f"layer {self.layer!r} must return a tensor, got {type(output).__name__}")
        if torch.is_grad_enabled():
            self._output = output

    def __call__(self, targets: Tensor) -> Tensor:
        """Return the weighted loss of the layer's last output with gradients; the output is then released.

        An output (N, T, d) is averaged over tokens, and (N, C, H, W) over positions, unless the shape of the targets is
        that of the output without the last dimension.

        Args:
            targets: (N,), or the shape of the output without its last dimension; integers.

        Raises:
            ValueError: if the layer has not run with gradients since the last call, its output does not fit the
                targets, or targets are not integers.
        """
        check_integers("targets", targets)
        output, self._output = self._output, None
        if output is None:
            raise ValueError(
                f"layer {self.layer!r} must have run with gradients before its regulariser is called, once per call"
            )
        if output.shape[:-1] != targets.shape and output.ndim > 2:
            output = output.mean(dim=1) if output.ndim == 3 else output.flatten(2).mean(dim=2)
        if output.shape[:-1] != targets.shape:
            raise ValueError(
                f"layer {self.layer!r} must return one feature vector per target, of shape {tuple(targets.shape)} and "
                f"d, got {tuple(output.shape)}"
            )
        return self.weight * self.loss(output, targets)

    def remove(self) -> None:
        """Remove the hook from the layer."""
        self._handle.remove()
        self._output = None


def regularise(
    model: nn.Module, layer: str, loss: Callable[[Tensor, Tensor], Tensor], weight: float = 1.0
) -> Regulariser:
    """Return a weighted loss of a layer's output, to add to the loss of each training step.

    The model is called as before. A hook stores the output of the layer until the regulariser is called with the
    targets. With `variability` and a negative weight, or with ``sign=-1``, the regulariser prevents collapse at the
    layer; with a positive weight, it promotes collapse.

    Args:
        model: Any module. If it is compiled, call this function before ``torch.compile``.
        layer: Dotted name of the layer in the model.
        loss: Function of features (N, d) and targets (N,), such as `variability`, `koleo`, `supcon`, or a
            ``functools.partial`` of one.
        weight: Finite factor of the loss, other than 0.

    Returns:
        A function of the targets; its method ``remove()`` removes the hook.

    Raises:
        ValueError: if the model is not a module or has no such layer, the loss cannot be called, or the weight is 0 or
            not finite.

    Examples:
        >>> from torch.nn.functional import cross_entropy
        >>> from neuralcollapse.losses import variability
        >>> model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> regulariser = regularise(model, "1", variability, weight=-0.1)  # less collapse behind the ReLU
        >>> inputs, targets = torch.randn(32, 20), torch.arange(32) % 10
        >>> loss = cross_entropy(model(inputs), targets) + regulariser(targets)
        >>> loss.backward()
    """
    check_module("model", model)
    names = [name for name, _ in model.named_modules() if name]
    if layer not in names:
        raise ValueError(
            f"layer must be the name of a module of the model, such as {', '.join(names[:3])}, got {layer!r}"
        )
    if not callable(loss):
        raise ValueError(f"loss must be a function of features and targets, got {type(loss).__name__}")
    if not is_number(weight) or weight == 0:
        raise ValueError(f"weight must be a finite number other than 0, got {weight!r}")
    return Regulariser(model, layer, loss, weight)
