"""Where to train."""

from __future__ import annotations

import torch


def resolve_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is an accelerator if there is one.

    Raises:
        ValueError: There is no such device.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available.get(name):
        there = ", ".join(kind for kind in available if available[kind])
        raise ValueError(f"device must be auto or one that is there ({there}), got {name!r}")
    return torch.device(name)


def check_precision(precision: str, device: torch.device) -> None:
    """See whether a device trains in that precision.

    Raises:
        ValueError: It does not.
    """
    known = {"cpu": ("32", "bf16-mixed"), "cuda": ("32", "16-mixed"), "mps": ("32",)}[device.type]
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        known += ("bf16-mixed",)
    if precision not in known:
        raise ValueError(f"precision must be one that device {device.type} has ({', '.join(known)}), got {precision!r}")
