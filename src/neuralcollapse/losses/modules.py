"""The losses as modules that hold their settings."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from neuralcollapse._checks import check_ignore_index
from neuralcollapse.losses.functions import decoupled_cross_entropy, dot_regression, nonl, normface, ntce, two_way
from neuralcollapse.losses.scores import DEFAULT_TEMPERATURE, check_margin, check_temperature


class _AnyLoss(nn.Module):
    """A loss with its settings."""

    def __init__(self, *, ignore_index: int | None = None) -> None:
        super().__init__()
        check_ignore_index(ignore_index)
        self.settings: dict[str, Any] = {"ignore_index": ignore_index}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings.items() if value is not None)


class _Loss(_AnyLoss):
    def __init__(self, *, temperature: float = DEFAULT_TEMPERATURE, ignore_index: int | None = None) -> None:
        check_temperature(temperature)
        super().__init__(ignore_index=ignore_index)
        self.settings = {"temperature": temperature, **self.settings}


class _LossWithMargin(_Loss):
    def __init__(
        self,
        *,
        temperature: float = DEFAULT_TEMPERATURE,
        margin: float = math.inf,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(temperature=temperature, ignore_index=ignore_index)
        check_margin(margin)
        self.settings["margin"] = margin


class NormFaceLoss(_Loss):
    """`normface` as a module: ``forward(features, targets, weight)``."""

    def forward(self, features: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        return normface(features, targets, weight, **self.settings)


class NTCELoss(_Loss):
    """`ntce` as a module: ``forward(features, targets, weight)``."""

    def forward(self, features: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        return ntce(features, targets, weight, **self.settings)


class NONLLoss(_LossWithMargin):
    """`nonl` as a module: ``forward(features, targets, weight)``."""

    def __init__(
        self,
        *,
        temperature: float = DEFAULT_TEMPERATURE,
        margin: float = math.inf,
        bidirectional: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(temperature=temperature, margin=margin, ignore_index=ignore_index)
        self.settings["bidirectional"] = bidirectional

    def forward(self, features: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        return nonl(features, targets, weight, **self.settings)


class DecoupledCrossEntropyLoss(_LossWithMargin):
    """`decoupled_cross_entropy` as a module: ``forward(features, targets, weight)``."""

    def forward(self, features: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        return decoupled_cross_entropy(features, targets, weight, **self.settings)


class TwoWayLoss(_LossWithMargin):
    """`two_way` as a module: ``forward(features, targets, weight)``.

    Examples:
        >>> import torch
        >>> from neuralcollapse import LearnedClassifier
        >>> head, loss = LearnedClassifier(64, 10), TwoWayLoss(margin=3.0)
        >>> features, targets = torch.randn(32, 64, requires_grad=True), torch.randint(10, (32,))
        >>> loss(features, targets, head.weight).backward()
    """

    def forward(self, features: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        return two_way(features, targets, weight, **self.settings)


class DotRegressionLoss(_AnyLoss):
    """`dot_regression` as a module: ``forward(features, targets, weight, class_lengths=None)``."""

    def forward(self, features: Tensor, targets: Tensor, weight: Tensor, class_lengths: Tensor | None = None) -> Tensor:
        return dot_regression(features, targets, weight, class_lengths, **self.settings)
