"""What the public functions check at their doors."""

from __future__ import annotations

import torch
from torch import Tensor


def values_readable(tensor: Tensor) -> bool:
    """Whether Python can branch on the tensor's values: not while compiling, nor under vmap or grad transforms."""
    return not torch.compiler.is_compiling() and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def check_at_least(name: str, value: int, minimum: int, meaning: str = "") -> None:
    """Raise unless ``value`` is an integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {f'{meaning} = ' if meaning else ''}{minimum}, got {value}")


def check_etf_sizes(num_classes: int, feature_dim: int) -> None:
    """Raise unless a simplex ETF of ``num_classes`` vectors exists in ``feature_dim`` dimensions."""
    check_at_least("num_classes", num_classes, 2)
    check_at_least("feature_dim", feature_dim, num_classes - 1, "num_classes - 1")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` is a real floating-point tensor."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name} must be a floating-point tensor, got {got}")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise unless every entry is finite. Copies one bit from device to host; skipped where values cannot be read."""
    if values_readable(tensor) and not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")


def check_features(features: Tensor, feature_dim: int) -> None:
    """Raise unless ``features`` is floating, of shape (N, feature_dim)."""
    check_floating("features", features)
    if features.ndim != 2 or features.shape[1] != feature_dim:
        raise ValueError(f"features must be of shape (N, {feature_dim}), got {tuple(features.shape)}")


def check_targets(targets: Tensor, num_samples: int, num_classes: int, *, values: bool = True) -> None:
    """Raise unless ``targets`` is (num_samples,) integers, in [0, num_classes) where ``values`` are to be checked."""
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be integer class indices, got {targets.dtype}")
    if targets.shape != (num_samples,):
        raise ValueError(f"targets must be of shape ({num_samples},), got {tuple(targets.shape)}")
    if values and num_samples and values_readable(targets):
        low, high = (int(bound) for bound in torch.aminmax(targets))
        if low < 0 or high >= num_classes:
            raise ValueError(f"targets must lie in [0, {num_classes}), got labels from {low} to {high}")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: fp32 for lower precisions, else the dtype itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
