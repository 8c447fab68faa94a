"""What every head has: features on a sphere, a linear decision, an inference form."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from neuralcollapse._checks import (
    check_at_least,
    check_factory,
    check_floating,
    check_ignore_index,
    check_integral,
    compute_dtype,
    is_number,
    values_readable,
)


class FeatureNorm(nn.Module):
    """Projects features on the sphere of a given radius, τ h/‖h‖; a zero vector stays zero.

    Args:
        radius: τ > 0.

    Raises:
        ValueError: Another radius, or an input that is no floating-point tensor.

    Shape: (..., d) to (..., d), in the dtype of the input (fp16 and bf16 are computed in fp32).

    Examples:
        >>> FeatureNorm(5.0)(torch.tensor([[3.0, 4.0]]))
        tensor([[3., 4.]])
    """

    def __init__(self, radius: float) -> None:
        super().__init__()
        if not (is_number(radius) and radius > 0):
            raise ValueError(f"radius must be a positive number, got {radius!r}")
        self.radius = radius

    def forward(self, features: Tensor) -> Tensor:
        check_floating("features", features)
        exact = features.to(compute_dtype(features.dtype))
        if exact.requires_grad and values_readable(exact):
            return _OnSphere.apply(exact, self.radius).to(features.dtype)
        return (exact * _scale(exact, self.radius)).to(features.dtype)

    def extra_repr(self) -> str:
        return f"radius={self.radius:g}"


def _scale(vectors: Tensor, radius: float) -> Tensor:
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return radius / torch.where(norm > 0, norm, 1)


class _OnSphere(torch.autograd.Function):
    """p = τ h/‖h‖, with half of automatic differentiation's passes over memory: of g it is τ/‖h‖ (g − p p·g/τ²)."""

    @staticmethod
    def forward(ctx, vectors: Tensor, radius: float) -> Tensor:  # type: ignore[no-untyped-def]
        scale = _scale(vectors, radius)
        projected = vectors * scale
        ctx.save_for_backward(vectors, projected, scale)
        ctx.radius = radius
        return projected

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        vectors, projected, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again: what was saved has no graph
            scale = _scale(vectors, ctx.radius)
            projected = vectors * scale
        along = torch.linalg.vecdot(gradient, projected).unsqueeze(-1)
        return torch.addcmul(gradient, projected, along, value=-1 / ctx.radius**2) * scale, None


def collapse_radius(num_classes: int, probability: float = 0.99) -> float:
    """The feature norm τ at which perfect collapse gives the true class the stated probability.

    τ = ((K−1)/K)·log((K−1)p/(1−p)), for unit weights in a simplex ETF and bias 0.

    Args:
        num_classes: K ≥ 2.
        probability: p, in (1/K, 1).

    Returns:
        τ.

    Raises:
        ValueError: K < 2, or p outside (1/K, 1).

    Examples:
        >>> [round(collapse_radius(num_classes), 1) for num_classes in (10, 100, 1000)]
        [6.1, 9.1, 11.5]
    """
    check_at_least("num_classes", num_classes, 2)
    if not (is_number(probability) and 1 / num_classes < probability < 1):
        raise ValueError(f"probability must lie in (1/num_classes, 1), got {probability!r}")
    return (num_classes - 1) / num_classes * math.log((num_classes - 1) * probability / (1 - probability))


class Head(nn.Module):
    """A classifier that ends a backbone: logits = weight · features(x) + bias.

    A subclass sets `weight` (K, d) and `bias` (K,) or None, as attributes or properties.

    Args:
        in_features: d ≥ 1.
        num_classes: K ≥ 2.
        feature_norm: Radius of the sphere on which features are projected; ``"auto"``: `collapse_radius`; None: they
            are taken as they are.
        ignore_index: Label of samples that do not count, for the heads that take targets.

    Raises:
        ValueError: An argument is out of range, or features are of another shape or kind.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        feature_norm: float | Literal["auto"] | None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        check_ignore_index(ignore_index)
        self.ignore_index = ignore_index
        check_at_least("in_features", in_features, 1)
        check_at_least("num_classes", num_classes, 2)
        self.in_features = in_features
        self.num_classes = num_classes
        if isinstance(feature_norm, str) and feature_norm == "auto":
            feature_norm = collapse_radius(num_classes)
        elif feature_norm is not None and not (is_number(feature_norm) and feature_norm > 0):
            raise ValueError(f"feature_norm must be a positive number, 'auto' or None, got {feature_norm!r}")
        self.feature_norm = feature_norm
        self._norm = nn.Identity() if feature_norm is None else FeatureNorm(feature_norm)

    def features(self, inputs: Tensor) -> Tensor:
        """The tensor that the weight multiplies: the inputs (..., d), on the sphere where the head normalises."""
        check_floating("features", inputs)
        if inputs.ndim < 1 or inputs.shape[-1] != self.in_features:
            raise ValueError(f"features must be of shape (..., {self.in_features}), got {tuple(inputs.shape)}")
        return self._norm(inputs)

    def forward(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (..., K) of features (..., d). Targets are accepted and not needed."""
        return self.decide(*self.prepare(features, targets))

    def prepare(self, features: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the logits are made of, with its graph; in training mode it is a step, as `forward` is.

        Args:
            features: (..., d).
            targets: (...) integers, for the heads that need them.

        Returns:
            The tensor that the weight multiplies (..., d), the weight (K, d) and the bias (K,) or None. A loss of
            these reaches every gradient path that `forward` has.
        """
        return self.features(features), self.weight, self.bias

    @staticmethod
    def decide(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The linear decision, in the dtype of the features."""
        return functional.linear(features, weight.to(features.dtype), None if bias is None else bias.to(features.dtype))

    def to_inference(self, *, dtype: torch.dtype | None = None) -> nn.Module:
        """The same decision as plain modules: FeatureNorm then nn.Linear, or nn.Linear alone where there is no norm.

        Args:
            dtype: Dtype of the linear layer; the weight's own if not given (heads that hold an ETF keep it in
                fp32 in a model of lower precision: give that precision here).

        Returns:
            A module without state of its own beyond weight and bias. It can be exported and compiled whole.

        Raises:
            ValueError: A dtype that is not floating.
        """
        check_factory(dtype, None)
        weight, bias = self.weight.detach(), self.bias
        dtype = dtype or weight.dtype
        linear = nn.utils.skip_init(
            nn.Linear, self.in_features, self.num_classes, bias=bias is not None, dtype=dtype, device=weight.device
        )
        with torch.no_grad():
            linear.weight.copy_(weight)
            if bias is not None:
                linear.bias.copy_(bias)
        return linear if self.feature_norm is None else nn.Sequential(FeatureNorm(self.feature_norm), linear)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_classes={self.num_classes}, feature_norm={self.feature_norm}"


class LearnsFromTargets(Head):
    """A head that takes the targets of each training batch in."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        feature_norm: float | Literal["auto"] | None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, feature_norm, ignore_index)
        self._frozen = False
        self._targets: Tensor | None = None

    def step_targets(self, targets: Tensor | None) -> Tensor | None:
        """The targets (...) to learn from; None where there is nothing to learn: in evaluation mode, or when frozen.

        Raises:
            ValueError: No targets where they are needed, or other than a tensor of integers.
        """
        if not self.training or self._frozen:
            return None
        targets = self._targets if targets is None else targets
        if targets is None:
            raise ValueError(
                "targets must be given in training mode: head(features, targets), or `with head.use_targets(targets):` "
                "around the model; `with head.frozen():` (or evaluation mode) needs none and updates nothing"
            )
        check_integral("targets", targets)
        return targets

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within it, training mode needs no targets, updates nothing, and decides as in evaluation mode."""
        before, self._frozen = self._frozen, True
        try:
            yield
        finally:
            self._frozen = before

    @contextmanager
    def use_targets(self, targets: Tensor) -> Iterator[None]:
        """Within it, forward takes these targets where it is given none: for loops that cannot pass them.

        Raises:
            ValueError: Targets that are no tensor of integers.
        """
        check_integral("targets", targets)
        before, self._targets = self._targets, targets
        try:
            yield
        finally:
            self._targets = before
