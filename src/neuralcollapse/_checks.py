"""What the public functions check at their doors."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn


def values_readable(tensor: Tensor) -> bool:
    """Whether Python can branch on the tensor's values: not while compiling, nor under vmap or grad transforms."""
    return not torch.compiler.is_compiling() and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def check_at_least(name: str, value: int, minimum: int, meaning: str = "") -> None:
    """Raise unless ``value`` is an integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {f'{meaning} = ' if meaning else ''}{minimum}, got {value}")


def is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a finite real number (a bool is none)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_not_negative(name: str, value: float) -> None:
    """Raise unless ``value`` is a finite number of at least 0."""
    if not (is_number(value) and value >= 0):
        raise ValueError(f"{name} must be finite and at least 0, got {value!r}")


def check_ignore_index(ignore_index: int | None) -> None:
    """Raise unless it is an integer or None."""
    if ignore_index is not None and (isinstance(ignore_index, bool) or not isinstance(ignore_index, int)):
        raise ValueError(f"ignore_index must be an integer or None, got {ignore_index!r}")


def check_bool(name: str, value: bool) -> None:
    """Raise unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of the names."""
    if not (isinstance(value, str) and value in choices):
        names = [repr(choice) for choice in choices]
        raise ValueError(f"{name} must be {', '.join(names[:-1])} or {names[-1]}, got {value!r}")


def check_module(name: str, module: nn.Module) -> None:
    """Raise unless ``module`` is an nn.Module."""
    if not isinstance(module, nn.Module):
        raise ValueError(f"{name} must be an nn.Module, got {_kind(module)}")


def check_factory(
    dtype: torch.dtype | None, device: torch.device | str | int | None, generator: torch.Generator | None = None
) -> None:
    """Raise unless a floating-point tensor can be asked for in this dtype, on this device, from this generator."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    if device is not None:
        try:
            device = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"device must name a torch device, got {device!r}") from error
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise ValueError(f"generator must be a torch.Generator, got {_kind(generator)}")
    place = torch.get_default_device() if device is None else torch.device(device)
    if generator.device.type != place.type:
        raise ValueError(f"generator must be on the device {place.type!r}, got one on {generator.device.type!r}")


def check_etf_sizes(num_classes: int, feature_dim: int) -> None:
    """Raise unless a simplex ETF of ``num_classes`` vectors exists in ``feature_dim`` dimensions."""
    check_at_least("num_classes", num_classes, 2)
    check_at_least("feature_dim", feature_dim, num_classes - 1, "num_classes - 1")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` is a real floating-point tensor."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor, got {_kind(tensor)}")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise unless every entry is finite. Copies one bit from device to host; skipped where values cannot be read."""
    if values_readable(tensor) and not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")


def check_features(features: Tensor, feature_dim: int) -> None:
    """Raise unless ``features`` is floating, of shape (N, feature_dim)."""
    check_floating("features", features)
    if features.ndim != 2 or features.shape[1] != feature_dim:
        raise ValueError(f"features must be of shape (N, {feature_dim}), got {tuple(features.shape)}")


def check_targets(
    targets: Tensor, num_samples: int, num_classes: int, *, values: bool = True, ignore_index: int | None = None
) -> None:
    """Raise unless ``targets`` is (num_samples,) integers, in [0, num_classes) where ``values`` are to be checked.

    Targets equal to ``ignore_index`` may be anything else.
    """
    check_integral("targets", targets)
    if targets.shape != (num_samples,):
        raise ValueError(f"targets must be of shape ({num_samples},), got {tuple(targets.shape)}")
    if not (values and num_samples and values_readable(targets)):
        return
    targets = targets.long()  # compared as they are, labels of uint8 would take -100 for 156
    if ignore_index is not None:
        targets = targets[targets != ignore_index]
    if targets.numel():
        low, high = (int(bound) for bound in torch.aminmax(targets))
        if low < 0 or high >= num_classes:
            raise ValueError(f"targets must lie in [0, {num_classes}), got labels from {low} to {high}")


def check_integral(name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` holds class indices: a tensor of an integer dtype."""
    if (
        not isinstance(tensor, Tensor)
        or tensor.is_floating_point()
        or tensor.is_complex()
        or tensor.dtype == torch.bool
    ):
        raise ValueError(f"{name} must be integer class indices, got {_kind(tensor)}")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: fp32 for lower precisions, else the dtype itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
