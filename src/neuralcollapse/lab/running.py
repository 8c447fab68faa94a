"""Settings of how a run is carried out and what is kept of it; `config` says how they go with the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from neuralcollapse.lab import conditions as only
from neuralcollapse.lab.settings import Settings, setting


@dataclass(frozen=True, kw_only=True)
class Ranks(Settings):
    """Ranks."""

    devices: int = setting(1, at_least=1)
    """Processes on each machine, one a device; on a CPU, processes with a part of its cores. Every batch is split over
    them, with the gradient of the whole one."""
    num_nodes: int = setting(1, at_least=1)
    """Machines, each with as many."""
    sync_batchnorm: bool | None = setting(False, belongs_to=only.SEVERAL_RANKS)
    """Batch norm takes the statistics of the whole batch, and not of each process's part. Needs cuda."""

    @property
    def ranks(self) -> int:
        """Processes in all."""
        return self.devices * self.num_nodes


@dataclass(frozen=True, kw_only=True)
class Record(Settings):
    """Record."""

    measure_every: int = setting(1, at_least=1)
    """Measure collapse after every so many epochs, and after the first."""
    measure_from: int = setting(lambda values: values["measure_every"], at_least=1)
    """Where these steps begin: 1 of 5 is epochs 1, 6, 11, ... By default where the first step ends: 1, 5, 10, ..."""
    measure_last: bool | None = setting(True, belongs_to=only.SPARSE)
    """Measure after the last epoch as well, where the steps do not end there."""
    checkpoint_every: int | None = setting(at_least=1)
    """Keep a checkpoint of every so many epochs and of the first, beside the last."""
    checkpoint_from: int | None = setting(
        lambda values: values["checkpoint_every"], belongs_to=only.CHECKPOINTS, at_least=1
    )
    """Where these steps begin. By default where the first step ends."""
    checkpoint_epochs: list[int] = setting(lambda _: [])
    """Keep checkpoints of these epochs as well."""
    checkpoint_minutes: float = setting(10.0, above=0)
    """Inside a long epoch, save where training is after every so many minutes."""
    loggers: list[Literal["tensorboard", "wandb"]] = setting(lambda _: [])
    """Where to log to beside the CSV files."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_epochs("checkpoint_epochs", self.checkpoint_epochs)


def check_epochs(name: str, epochs: list[int]) -> None:
    """See whether they are epochs, counted from 1."""
    if any(epoch < 1 for epoch in epochs):
        raise ValueError(f"{name} must be epochs, counted from 1, got {epochs}")
