"""Input validation of the library: shapes, kinds, ranges, finiteness and memory, and lists of values in messages."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


def values_readable(tensor: Tensor) -> bool:
    """Return whether Python can branch on the values of a tensor, which is not possible in compile, vmap or grad."""
    return not torch.compiler.is_compiling() and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def check_at_least(name: str, value: int, minimum: int, meaning: str = "") -> None:
    """Raise unless ``value`` is an integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {f'{meaning} = ' if meaning else ''}{minimum}, got {value}")


def is_number(value: object) -> TypeGuard[float]:
    """Return whether ``value`` is a finite real number (booleans are rejected)."""
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
    """Raise unless ``value`` is one of the choices."""
    if not (isinstance(value, str) and value in choices):
        names = [repr(choice) for choice in choices]
        raise ValueError(f"{name} must be {', '.join(names[:-1])} or {names[-1]}, got {value!r}")


def check_module(name: str, module: nn.Module) -> None:
    """Raise unless ``module`` is an nn.Module."""
    if not isinstance(module, nn.Module):
        raise ValueError(f"{name} must be an nn.Module, got {_type_name(module)}")


def check_device(device: object) -> None:
    """Raise unless the argument is None or names a device."""
    if device is None or isinstance(device, torch.device):
        return
    try:
        torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        raise ValueError(f"device must name a torch device, got {device!r}") from None


def check_generator(generator: object) -> None:
    """Raise unless the argument is None or a torch.Generator."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator must be a torch.Generator, got {_type_name(generator)}")


def check_factory(
    dtype: torch.dtype | None, device: torch.device | str | int | None, generator: torch.Generator | None = None
) -> None:
    """Raise unless dtype, device and generator can be used together to create a floating-point tensor."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    check_device(device)
    if generator is None:
        return
    check_generator(generator)
    target = torch.get_default_device() if device is None else torch.device(device)
    if generator.device.type != target.type:
        raise ValueError(f"generator must be on the device {target.type!r}, got one on {generator.device.type!r}")


def check_etf_sizes(num_classes: int, feature_dim: int) -> None:
    """Raise unless a simplex ETF of ``num_classes`` vectors exists in ``feature_dim`` dimensions."""
    check_at_least("num_classes", num_classes, 2)
    check_at_least("feature_dim", feature_dim, num_classes - 1, "num_classes - 1")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` is a real floating-point tensor."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor, got {_type_name(tensor)}")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise unless every entry is finite. Copies one bit from device to host; skipped if values are unreadable."""
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
    """Raise unless ``targets`` is (num_samples,) integers and, if ``values``, each in [0, num_classes).

    Targets equal to ``ignore_index`` are not checked.
    """
    check_integers("targets", targets, num_samples)
    if not (values and num_samples and values_readable(targets)):
        return
    targets = targets.long()  # in uint8, -100 would equal 156
    if ignore_index is not None:
        targets = targets[targets != ignore_index]
    if targets.numel():
        low, high = (int(bound) for bound in torch.aminmax(targets))
        if low < 0 or high >= num_classes:
            raise ValueError(f"targets must lie in [0, {num_classes}), got labels from {low} to {high}")


def check_integers(name: str, tensor: object, length: int | None = None) -> None:
    """Raise unless the argument is a tensor of an integer dtype, of shape (length,) if a length is given."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in _INTEGERS:
        raise ValueError(f"{name} must be integer class indices, got {_type_name(tensor)}")
    if length is not None and tensor.shape != (length,):
        raise ValueError(f"{name} must be of shape ({length},), got {tuple(tensor.shape)}")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in: fp32 for lower precisions, else the dtype itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def check_shapes(**arguments: tuple[object, str]) -> None:
    """Raise unless each argument is a floating-point tensor of the given shape, where equal letters are equal sizes.

    Examples:
        >>> check_shapes(weight=(torch.eye(2), "K d"), bias=(torch.zeros(3), "K"))
        Traceback (most recent call last):
        ValueError: bias must be of shape (K,) = (2,), got (3,)
    """
    sizes: dict[str, int] = {}
    for name, (tensor, letters) in arguments.items():
        check_floating(name, tensor)  # type: ignore[arg-type]
        assert isinstance(tensor, Tensor)
        got, wanted = tuple(tensor.shape), letters.split()
        expected = tuple(sizes.get(letter, -1) for letter in wanted)
        if len(got) != len(wanted) or any(e not in (-1, g) for e, g in zip(expected, got, strict=True)):
            known = "" if -1 in expected or not wanted else f" = {expected}"
            shape = f"({wanted[0]},)" if len(wanted) == 1 else f"({', '.join(wanted)})"
            raise ValueError(f"{name} must be of shape {shape}{known}, got {got}")
        sizes |= dict(zip(wanted, got, strict=True))


def check_code(code: Tensor, num_classes: int) -> None:
    """Raise unless the argument is a finite code (K, r) of K classes."""
    check_floating("code", code)
    if code.ndim != 2 or len(code) != num_classes:
        raise ValueError(f"code must be of shape (K, r) with K = {num_classes}, got {tuple(code.shape)}")
    check_finite("code", code)


def check_samples(features: object, targets: object, weight: object, *center: object) -> Tensor:
    """Return the targets as int64; raise unless features (N, d), targets (N,) in [0, K), weight and centre (d,) fit."""
    centers = {"center": (center[0], "d")} if center else {}
    check_shapes(features=(features, "N d"), weight=(weight, "K d"), **centers)
    assert isinstance(features, Tensor)
    assert isinstance(weight, Tensor)
    check_integers("targets", targets, len(features))
    assert isinstance(targets, Tensor)
    targets = targets.long()  # a uint8 index is a mask
    # On an accelerator, reading values would cause a device sync.
    check_targets(targets, len(features), len(weight), values=targets.device.type == "cpu")
    return targets


def check_exponent(name: str, value: object) -> None:
    """Raise unless the argument is a finite number greater than 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be greater than 0, got {value}")


def listed(values: Sequence[object], most: int = 10) -> str:
    """Return the first values as text, and an ellipsis for the others.

    Examples:
        >>> listed([3, 5, 8], most=2)
        '3, 5, …'
    """
    return ", ".join(map(str, values[:most])) + (", …" if len(values) > most else "")


def _type_name(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def available_memory() -> float:
    """Return the number of bytes that this process can still use: free memory, or the limit of its container."""
    limits = []
    with contextlib.suppress(OSError, StopIteration):  # not on every system
        lines = Path("/proc/meminfo").read_text().split("\n")
        limits.append(next(int(line.split()[1]) * 2.0**10 for line in lines if line.startswith("MemAvailable")))
    with contextlib.suppress(OSError, ValueError):
        limits.append(float(Path("/sys/fs/cgroup/memory.max").read_text()))  # "max" if the memory is not limited
    if not limits and hasattr(os, "sysconf"):
        limits.append(float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
    return min(limits, default=math.inf)


def check_memory(needed: float, what: str, advice: str = "") -> None:
    """Check that arrays fit into memory before they are allocated.

    Args:
        needed: Required number of bytes.
        what: Description of the arrays, for the message.
        advice: Advice to the user, for the message.

    Raises:
        ValueError: if they do not fit.
    """
    available = available_memory()
    if needed > available:
        raise ValueError(
            f"{what} take {needed / 2**30:.4g} GiB, but only {available / 2**30:.3g} GiB of memory are free{advice}"
        )
