"""Memory of this machine, and refusals of what does not fit into it."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path


def available_memory() -> float:
    """Return the bytes that this process may still use: those that are free, or the limit of its container."""
    found = []
    with contextlib.suppress(OSError, StopIteration):  # not on every system
        lines = Path("/proc/meminfo").read_text().split("\n")
        found.append(next(int(line.split()[1]) * 2.0**10 for line in lines if line.startswith("MemAvailable")))
    with contextlib.suppress(OSError, ValueError):
        found.append(float(Path("/sys/fs/cgroup/memory.max").read_text()))  # "max" where there is no limit
    if not found and hasattr(os, "sysconf"):
        found.append(float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))
    return min(found, default=math.inf)


def check_memory(needed: float, what: str, advice: str = "") -> None:
    """Check that something fits into memory, before it is made.

    Args:
        needed: Its bytes.
        what: What takes them, for the message.
        advice: What to do, for the message.

    Raises:
        ValueError: if it does not fit.
    """
    there = available_memory()
    if needed > there:
        raise ValueError(
            f"{what} take {needed / 2**30:.4g} GiB, and there are {there / 2**30:.3g} GiB of memory{advice}"
        )
