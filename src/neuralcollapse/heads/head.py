"""Base classes of heads: feature normalisation, linear decision, inference form, and targets in training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from neuralcollapse._checks import (
    check_at_least,
    check_factory,
    check_floating,
    check_ignore_index,
    check_integers,
    is_number,
    values_readable,
)


class FeatureNorm(nn.Module):
    """Projection of features onto the sphere of radius τ, τ h/‖h‖; a zero vector is mapped to zero.

    The projection is accurate for vectors of any norm that their dtype can represent: squares of large or small
    components neither overflow nor underflow.

    Args:
        radius: τ > 0.

    Raises:
        ValueError: if the radius is not positive, or the input is not a floating-point tensor.

    Shape: (..., d) to (..., d), in the dtype of the input (fp16 and bf16 are computed in fp32).

    Examples:
        >>> FeatureNorm(5.0)(torch.tensor([[3.0, 4.0]]))
        tensor([[3., 4.]])
    """

    def __init__(self, radius: float) -> None:
        super().__init__()
        if not (is_number(radius) and radius > 0):
            raise ValueError(f"radius must be a positive number, got {radius!r}")
        self.radius = float(radius)

    def forward(self, features: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            check_floating("features", features)
        low_precision = features.dtype == torch.float16 or features.dtype == torch.bfloat16
        exact = features.float() if low_precision else features
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            projected = _project(exact, self.radius)[0]
        else:
            projected = _project_eagerly(exact, self.radius)
        return projected.to(features.dtype)

    def extra_repr(self) -> str:
        return f"radius={self.radius:g}"


def _project(vectors: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Return the projection τ h/‖h‖ and the factor τ/‖h‖."""
    factor = _into_ordinary_range(vectors.detach())
    ordinary = vectors * factor
    norm = torch.linalg.vector_norm(ordinary, dim=-1, keepdim=True)
    scale = radius / torch.where(norm > 0, norm, 1.0)
    return ordinary * scale, factor * scale


def _into_ordinary_range(vectors: Tensor) -> Tensor:
    """Return one power of two per vector, usually 1, that keeps squares of the scaled vector in range."""
    largest = torch.linalg.vector_norm(vectors, float("inf"), dim=-1, keepdim=True)
    # Exponents of two: a vector whose largest component is outside 2^±limit is scaled by 2^±shift.
    limit, shift = (400.0, 620.0) if vectors.dtype == torch.float64 else (50.0, 76.0)
    factor = torch.ones_like(largest)
    factor = factor.masked_fill((largest > 0) & (largest < 2.0**-limit), 2.0**shift)
    return factor.masked_fill(largest > 2.0**limit, 2.0**-shift)


def _project_eagerly(vectors: Tensor, radius: float) -> Tensor:
    """Return the projection of `_project`, with fewer passes over memory if values can be read."""
    if _is_tracing() or not values_readable(vectors):
        return _project(vectors, radius)[0]
    if vectors.requires_grad:
        projected: Tensor = _OnSphere.apply(vectors, radius)
        return projected
    return _project_by_values(vectors, radius)[0]


def _project_by_values(vectors: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Return the result of `_project`; on a CPU, without rescaling if all norms are in the ordinary range."""
    if vectors.device.type == "cpu":
        norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
        if bool(((norm > 2.0**-40) & (norm < 2.0**60)).all()):
            scale = radius / norm
            return vectors * scale, scale
    return _project(vectors, radius)


class _OnSphere(torch.autograd.Function):
    """Projection p = τ h/‖h‖, whose derivative maps g to τ/‖h‖ (g − p p·g/τ²).

    This implementation needs half as many passes over memory as automatic differentiation.
    """

    @staticmethod
    def forward(ctx, vectors: Tensor, radius: float) -> Tensor:  # type: ignore[no-untyped-def]
        projected, scale = _project_by_values(vectors, radius)
        ctx.save_for_backward(vectors, projected, scale)
        ctx.radius = radius
        return projected

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        vectors, projected, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative, because the saved tensors have no graph
            projected, scale = _project(vectors, ctx.radius)
        along = torch.linalg.vecdot(gradient, projected).unsqueeze(-1)
        return torch.addcmul(gradient, projected, along, value=-1 / ctx.radius**2) * scale, None


def collapse_radius(num_classes: int, probability: float = 0.99) -> float:
    """Feature norm τ for which the true class has a given probability at perfect collapse.

    τ = ((K−1)/K)·log((K−1)p/(1−p)), for unit weights in a simplex ETF and bias 0.

    Args:
        num_classes: K ≥ 2.
        probability: p, in (1/K, 1).

    Returns:
        τ.

    Raises:
        ValueError: if K < 2, or p is outside (1/K, 1).

    Examples:
        >>> [round(collapse_radius(num_classes), 1) for num_classes in (10, 100, 1000)]
        [6.1, 9.1, 11.5]
    """
    check_at_least("num_classes", num_classes, 2)
    if not (is_number(probability) and 1 / num_classes < probability < 1):
        raise ValueError(f"probability must lie in (1/num_classes, 1), got {probability!r}")
    return (num_classes - 1) / num_classes * math.log((num_classes - 1) * probability / (1 - probability))


class Head(nn.Module):
    """Base class of classifiers on top of a backbone: logits = weight · features(x) + bias.

    A subclass sets `weight` (K, d) and `bias` (K,) or None, as attributes or properties. If the weight must satisfy a
    constraint that code outside the head may violate, for example by averaging weights, `_valid_weight` restores the
    constraint whenever the weight is read.

    Args:
        in_features: d ≥ 1.
        num_classes: K ≥ 2.
        feature_norm: τ, the norm to which features are scaled; ``"auto"``: `collapse_radius`; None: features are not
            scaled.
        ignore_index: Target of samples that are left out, for heads that use targets.

    Raises:
        ValueError: if an argument is out of range, features have the wrong shape or dtype, or targets are not integers
            with the leading shape of the features.
    """

    weight: Tensor
    bias: Tensor | None
    _norm_follows_classes = False  # whether the feature norm is that of `collapse_radius`

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
        self._norm_follows_classes = isinstance(feature_norm, str)
        if isinstance(feature_norm, str) and feature_norm == "auto":
            feature_norm = collapse_radius(num_classes)
        elif feature_norm is not None and not (is_number(feature_norm) and feature_norm > 0):
            raise ValueError(f"feature_norm must be a positive number, 'auto' or None, got {feature_norm!r}")
        self.feature_norm = feature_norm
        self._norm = nn.Identity() if feature_norm is None else FeatureNorm(feature_norm)
        self._precision = torch.get_default_dtype()  # dtype of the features, as far as it is known

    def __getattr__(self, name: str) -> Any:
        value: Any = super().__getattr__(name)
        return self._valid_weight(value) if name == "weight" else value

    def grow(
        self, num_new: int, *, optimizer: Optimizer | None = None, generator: torch.Generator | None = None
    ) -> None:
        """Add classes after the present ones, in place: K becomes K + n.

        The state of the old classes, the dtype and the device do not change. With ``feature_norm="auto"``, the norm is
        adapted to the number of classes. The state of a grown head can be loaded into a head that was constructed with
        K + n classes or grown to K + n classes. Learned parameters become new objects: pass the optimiser, or create a
        new one.

        Args:
            num_new: n ≥ 1.
            optimizer: Optimiser of the head's parameters, in which they are replaced. In its state (momentum, second
                moments), the rows of the old classes do not change, and those of the new classes are zero. Not needed
                for a head without parameters.
            generator: Source of randomness for the new rows; by default a generator with seed 0.

        Raises:
            ValueError: if n < 1, an argument has the wrong type, the head cannot hold this number of classes, the
                optimiser does not hold the head's parameters, or its state cannot grow. The head is then left
                unchanged.
        """
        raise ValueError(f"{type(self).__name__} cannot grow: construct a head with more classes")

    def _set_num_classes(self, num_classes: int) -> None:
        """Set K, and the feature norm if it follows K."""
        self.num_classes = num_classes
        if self._norm_follows_classes:
            self.feature_norm = collapse_radius(num_classes)
            self._norm = FeatureNorm(self.feature_norm)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        weight = state_dict.get(f"{prefix}weight")
        if isinstance(weight, Tensor) and weight.ndim == 2 and len(weight) != self.num_classes:
            error_msgs.append(
                f"the state has {len(weight)} classes, but {type(self).__name__} has {self.num_classes}: construct "
                "the head with the same number of classes, or call grow() before loading"
            )

    def _valid_weight(self, weight: Tensor) -> Tensor:
        """Return the stored weight, after restoring its constraint if it is violated."""
        return weight

    def _stored_weight(self) -> Tensor:
        """Return the weight as stored, without restoring its constraint."""
        for store in (self.__dict__, self._parameters, self._buffers):
            if isinstance(weight := store.get("weight"), Tensor):
                return weight
        return self.weight

    def _store_weight(self, weight: Tensor) -> Tensor:
        """Assign a new tensor to the buffer of the weight, and return it."""
        if torch.compiler.is_compiling():
            self.weight = weight
        else:  # setting the attribute would first read the old value
            self._buffers["weight"] = weight
        return weight

    def train(self, mode: bool = True) -> Any:
        """Set the mode; evaluation mode restores the constraint of the weight."""
        super().train(mode)
        if not mode:
            getattr(self, "weight", None)  # reading it restores it
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        getattr(self, "weight", None)  # reading it restores it
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._precision = fn(torch.empty(0, dtype=self._precision)).dtype
        return self

    def features(self, inputs: Tensor) -> Tensor:
        """Return the tensor (..., d) that the weight multiplies: the inputs, scaled if a feature norm is set."""
        check_floating("features", inputs)
        if inputs.ndim < 1 or inputs.shape[-1] != self.in_features:
            raise ValueError(f"features must be of shape (..., {self.in_features}), got {tuple(inputs.shape)}")
        if not torch.compiler.is_compiling() and inputs.dtype != self._precision and not _under_autocast(inputs):
            self._precision = inputs.dtype
        return self._norm(inputs)

    def forward(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the logits (..., K) of features (..., d). Some heads need targets (...) in training mode."""
        return self.decide(*self.prepare(features, targets))

    def prepare(self, features: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the features, weight and bias of the logits, with their graph; a training-mode call updates the head.

        Args:
            features: (..., d).
            targets: (...) integers, for heads that use them.

        Returns:
            The tensor that the weight multiplies (..., d), the weight (K, d) and the bias (K,) or None. A loss of these
            tensors has all gradient paths of `forward`. In training mode, call either this method or `forward` for a
            batch, not both.
        """
        features = self.features(features)
        check_layout(targets, features)
        return features, self.weight, self.bias

    @staticmethod
    def decide(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the logits weight · features + bias, in the dtype of the features."""
        return functional.linear(features, weight.to(features.dtype), None if bias is None else bias.to(features.dtype))

    def to_inference(self, *, dtype: torch.dtype | None = None) -> nn.Module:
        """Return an equivalent plain module: nn.Linear, preceded by FeatureNorm if the head has a feature norm.

        Args:
            dtype: Dtype of the linear layer. By default that of the last features (outside of autocast), or the dtype
                to which the head was cast afterwards.

        Returns:
            A module whose only state is weight and bias. It can be exported, compiled into one graph, traced and
            scripted.

        Raises:
            ValueError: if the dtype is not floating.
        """
        check_factory(dtype, None)
        weight, bias = self.weight.detach(), self.bias
        dtype = dtype or self._precision
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
    """Base class of heads that are updated with the targets of each training batch."""

    _frozen = False
    _targets: Tensor | None = None

    def step_targets(self, targets: Tensor | None, features: Tensor) -> Tensor | None:
        """Return the targets (...) with which to update the head, or None if it must not be updated.

        The head is not updated in evaluation mode, if it is frozen, or in training mode without targets and without
        gradients, as in ``torch.optim.swa_utils.update_bn``.

        Args:
            targets: The argument of `forward`.
            features: (..., d).

        Raises:
            ValueError: if targets are needed and missing, if they are not integers with the leading shape of the
                features, or if they are given in evaluation mode for features that are being trained.
        """
        if self._frozen:
            return None
        targets = self._targets if targets is None else targets
        if targets is None and self.training and torch.is_grad_enabled():
            raise ValueError(
                "targets must be given in training mode: call head(features, targets), or use "
                "`with head.use_targets(targets):` around the model. `with head.frozen():` and evaluation mode need no "
                "targets and do not update the head"
            )
        check_layout(targets, features)
        if self.training:
            return targets
        if targets is not None and torch.is_grad_enabled() and features.requires_grad:
            raise ValueError(
                f"targets are given to {type(self).__name__} in evaluation mode with gradients enabled, in which the "
                "head would not be updated while the features are trained: call model.train() to train; to evaluate, "
                "use torch.no_grad() or `with head.frozen():`, or do not pass targets"
            )
        return None

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Return a context in which the head is not updated and, even in training mode, decides as in evaluation."""
        before, self._frozen = self._frozen, True
        try:
            yield
        finally:
            self._frozen = before

    @contextmanager
    def use_targets(self, targets: Tensor) -> Iterator[None]:
        """Return a context in which a forward without targets uses these targets, for loops that cannot pass them.

        Raises:
            ValueError: if the targets are not an integer tensor.
        """
        check_integers("targets", targets)
        before, self._targets = self._targets, targets
        try:
            yield
        finally:
            self._targets = before


def check_layout(targets: Tensor | None, features: Tensor) -> None:
    """Raise a `ValueError` unless targets are None, or integers of shape (...) for features (..., d)."""
    if targets is None:
        return
    check_integers("targets", targets)
    if targets.shape != features.shape[:-1]:
        raise ValueError(
            f"targets must be of shape {tuple(features.shape[:-1])}, one per feature vector of features of shape "
            f"{tuple(features.shape)}, got {tuple(targets.shape)}"
        )


def skips_nonfinite(features: Tensor) -> bool:
    """Return whether the training loop is expected to handle batches that are not finite, as a GradScaler does."""
    return features.dtype in (torch.float16, torch.bfloat16) or _under_autocast(features)


def readable(tensor: Tensor) -> bool:
    """Return whether Python can read the values of a stored tensor in the current context."""
    if not values_readable(tensor) or tensor.is_meta or _is_tracing():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _is_tracing() -> bool:
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined]


def _under_autocast(tensor: Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type)
