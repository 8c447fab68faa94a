"""Which of a run's processes this one is, as torchrun, SLURM or lightning's launcher says in the environment."""

from __future__ import annotations

import os


def global_rank() -> int:
    """The rank; 0 where nobody says, as before lightning has started the others."""
    for name in ("RANK", "SLURM_PROCID"):
        if name in os.environ:
            return int(os.environ[name])
    return int(os.environ.get("LOCAL_RANK", 0)) + int(os.environ.get("NODE_RANK", 0))


def local_rank() -> int:
    """The rank among those of this machine."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))


def launched_ranks() -> int | None:
    """How many processes a launcher of torchrun or SLURM has started; None without one."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return None
