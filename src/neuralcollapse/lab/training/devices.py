"""Where to train."""

from __future__ import annotations

import os
import re
import subprocess
import time

import torch
from lightning.pytorch import Trainer

from neuralcollapse.lab.ranks import launched_ranks, local_rank
from neuralcollapse.lab.running import Ranks

_SECONDS_TO_END = 10.0


def resolve_device(name: str, ranks: int = 1) -> torch.device:
    """The device of that name, of several ranks this one's; ``auto`` is an accelerator if there is one.

    Raises:
        ValueError: There is no such device.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available.get(name):
        there = ", ".join(kind for kind in available if available[kind])
        raise ValueError(f"device must be auto or one that is there ({there}), got {name!r}")
    return torch.device(name, local_rank()) if name == "cuda" and ranks > 1 else torch.device(name)


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


def check_ranks(run: Ranks, device: torch.device) -> None:
    """See whether so many ranks can be had here.

    Raises:
        ValueError: They cannot.
    """
    launched = launched_ranks()
    if launched is not None and launched != run.ranks:
        raise ValueError(f"devices x num_nodes must be the {launched} ranks that were launched, got {run.ranks}")
    there = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device.type, run.devices)
    if run.devices > there:
        raise ValueError(f"devices must be at most the {there} of {device.type}, got {run.devices}")
    if run.sync_batchnorm and device.type != "cuda":
        raise ValueError(f"sync_batchnorm needs device cuda, of which torch synchronises batch norm, got {device.type}")


def lost_ranks(error: RuntimeError) -> str | None:
    """What an error says of other ranks that are not there, or not any more; None if it is of something else."""
    told = str(error)
    if "EADDRINUSE" in told:
        return f"MASTER_PORT must be a port that is free, and {os.environ.get('MASTER_PORT')} is taken"
    words = ("Connection", "connect", "timed out", "Timed out", "peer")
    if not isinstance(error, torch.distributed.DistError) and not any(word in told for word in words):
        return None
    reason = re.sub(r"^\[\S+\] ", "", told.partition(". ")[0])  # without the line of the C++ source
    return f"ranks: one of them is lost, or cannot be reached: {reason}"


def end_launched(trainer: Trainer) -> None:
    """Have the ranks end that lightning has started: by themselves, so that they say why; or killed after a while."""
    processes = getattr(trainer.strategy.launcher, "procs", [])
    waiting, processes[:] = list(processes), []  # lightning kills this process, too, soon after one of them has failed
    until = time.monotonic() + _SECONDS_TO_END
    for process in waiting:
        try:
            process.wait(max(0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
