"""Progress of training, shown as a bar in terminals and as lines otherwise, and the loggers of a run."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from lightning.fabric.loggers.logger import Logger
from lightning.fabric.loggers.tensorboard import TensorBoardLogger
from tqdm.auto import tqdm

from neuralcollapse.lab.config import RunConfig
from neuralcollapse.lab.process import global_rank
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.provenance import shown_settings

# Minimum number of seconds between two plain lines; the last epoch of a run always has a line.
_PLAIN_LINES = 10.0


class Progress:
    """Progress of runs that are trained one after another.

    Args:
        runs: Number of runs.
        shown: Whether to print anything.
    """

    def __init__(self, runs: int = 1, *, shown: bool = True) -> None:
        self.runs = runs
        self.plain = shown and not sys.stderr.isatty()
        self.bar = tqdm(
            disable=not shown or self.plain, unit="batch", unit_scale=True, smoothing=0.02, dynamic_ncols=True
        )
        self.name = ""
        self.position = 0
        self._epoch = ""
        self._last_line = time.monotonic()

    def next_run(self, name: str, position: int) -> Progress:
        """Switch to the run with a name, after the given number of runs; return this object."""
        self.name, self.position = name, position
        return self

    def count_runs(self, ended: int, last: str | None = None) -> None:
        """Count runs instead of batches: the given number of further runs has ended in other processes."""
        self.position += ended
        self.bar.unit, self.bar.unit_scale, self.bar.total = "run", False, self.runs
        self.bar.update(ended)
        if self.plain and last is not None:
            print(f"{last}: ended, {self.position} of {self.runs} runs", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close the bar, which stays visible."""
        self.bar.close()

    def begin(self, batches: int, done: int) -> None:
        """Begin or resume a run with the given number of batches, some of which are completed."""
        done += self.position * batches
        if not self.bar.total:
            self.bar.initial = done  # batches completed before this start are excluded from the time estimate
        self.bar.total, self.bar.n = self.runs * batches, done

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Show the epoch, counted from 1."""
        self._epoch = f"{self.name}, epoch {epoch}/{epochs}"
        self.bar.set_description(self._epoch, refresh=False)

    def end_batch(self, *, is_last: bool) -> None:
        """Count a batch; after the last batch of an epoch, show that measuring is in progress."""
        self.bar.update()
        if is_last:
            self.bar.set_description(f"{self._epoch}, measuring", refresh=False)

    def end_epoch(self, accuracy: float | None, *, is_last: bool) -> None:
        """Show the last measured test accuracy, if any."""
        shown = "" if accuracy is None else f"test accuracy {accuracy:.1%}"
        self.bar.set_postfix_str(shown, refresh=False)
        if self.plain and (is_last or time.monotonic() - self._last_line >= _PLAIN_LINES):
            self._last_line = time.monotonic()
            print(f"{self._epoch}{shown and f': {shown}'}", file=sys.stderr, flush=True)


def check_loggers(names: list[Any]) -> None:
    """Check that loggers can be used.

    Raises:
        ValueError: if a package is not installed, or W&B cannot be accessed.
    """
    for name in names:
        if find_spec(name) is None:
            raise ValueError(f"loggers can include {name} only if it is installed, but it is not: pip install {name}")
    if "wandb" in names and os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
        import wandb

        if not wandb.api.api_key:
            raise ValueError(
                "loggers can include wandb only after `wandb login`, or with WANDB_MODE=offline in the environment"
            )


@contextmanager
def open_loggers(config: RunConfig, folder: RunFolder) -> Iterator[list[Logger]]:
    """Open the loggers of a run on its first rank, which write to the folder of the run.

    The logger of W&B also sends data to its service, unless WANDB_MODE is offline.
    """
    loggers: list[Any] = []
    names = config.loggers if global_rank() == 0 else []
    if "tensorboard" in names:
        loggers.append(TensorBoardLogger(folder.path, name="tensorboard", version=""))
    if "wandb" in names:
        from lightning.pytorch.loggers import WandbLogger

        loggers.append(WandbLogger(project="neuralcollapse", name=folder.path.name, save_dir=folder.path))
    settings: Mapping[str, Any] = shown_settings(config.in_force(), folder.path)
    for logger in loggers:
        logger.log_hyperparams(dict(settings))
    try:
        yield loggers
    finally:
        for logger in loggers:
            logger.finalize("success")
            if "Wandb" in type(logger).__name__:  # otherwise it would also log the next run of this process
                logger.experiment.finish()
