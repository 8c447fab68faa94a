"""What the functions of a metric check at their doors."""

from __future__ import annotations

import torch
from torch import Tensor

from neuralcollapse._checks import check_at_least, check_finite, check_floating, check_targets


def check_shapes(**arguments: tuple[object, str]) -> None:
    """Raise unless each argument is a floating-point tensor of its shape, in which a letter stands for one size.

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


def check_code(code: object, num_classes: int) -> None:
    """Raise unless the argument is None or a finite code (K, r)."""
    if code is None:
        return
    check_floating("code", code)  # type: ignore[arg-type]
    assert isinstance(code, Tensor)
    if code.ndim != 2 or len(code) != num_classes:
        raise ValueError(f"code must be of shape (K, r) with K = {num_classes}, got {tuple(code.shape)}")
    check_finite("code", code)


def check_integers(name: str, tensor: object, length: int) -> None:
    """Raise unless the argument is an integer tensor (length,)."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor of integers, got {type(tensor).__name__}")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} must be integer class indices, got {tensor.dtype}")
    if tensor.shape != (length,):
        raise ValueError(f"{name} must be of shape ({length},), got {tuple(tensor.shape)}")


def check_samples(features: object, targets: object, weight: object, *center: object) -> Tensor:
    """Return the targets as int64; raise unless features (N, d), targets (N,) in [0, K), weight and centre (d,) fit."""
    centers = {"center": (center[0], "d")} if center else {}
    check_shapes(features=(features, "N d"), weight=(weight, "K d"), **centers)
    assert isinstance(features, Tensor)
    assert isinstance(weight, Tensor)
    check_integers("targets", targets, len(features))
    assert isinstance(targets, Tensor)
    targets = targets.long()  # as an index, uint8 would be taken for a mask
    # On an accelerator looking at values would wait for the device.
    check_targets(targets, len(features), len(weight), values=targets.device.type == "cpu")
    return targets


def check_exponent(name: str, value: object) -> None:
    """Raise unless the argument is a finite number greater than 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be greater than 0, got {value}")


def check_sample_bounds(min_samples: object, drop_classes_above: object) -> None:
    """Raise unless both are counts of samples, the second None or at least the first."""
    check_at_least("min_samples", min_samples, 0)  # type: ignore[arg-type]
    if drop_classes_above is not None:
        assert isinstance(min_samples, int)
        check_at_least("drop_classes_above", drop_classes_above, max(min_samples, 1), "min_samples")  # type: ignore[arg-type]


def check_device(device: object) -> None:
    """Raise unless the argument is None or names a device."""
    if device is None or isinstance(device, torch.device):
        return
    try:
        torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be a torch.device or the name of one, got {device!r}") from None
