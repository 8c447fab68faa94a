"""How far training is: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm.auto import tqdm

# Seconds between two plain lines, at least; the last epoch of a run always has one.
_PLAIN_LINES = 10.0


class Progress(Callback):
    """Says how far one run after another is.

    Args:
        runs: Runs in all.
        shown: Whether to say anything.
    """

    def __init__(self, runs: int = 1, *, shown: bool = True) -> None:
        self.runs = runs
        self.plain = shown and not sys.stderr.isatty()
        self.bar = tqdm(
            disable=not shown or self.plain, unit="batch", unit_scale=True, smoothing=0.02, dynamic_ncols=True
        )
        self.name = ""
        self.position = 0
        self._last_line = time.monotonic()

    def next_run(self, name: str, position: int) -> Progress:
        """Go on with the run of this name, which so many came before."""
        self.name, self.position = name, position
        return self

    def count_runs(self, ended: int, last: str | None = None) -> None:
        """Count runs, not batches: so many more have ended, trained by others."""
        self.position += ended
        self.bar.unit, self.bar.unit_scale, self.bar.total = "run", False, self.runs
        self.bar.update(ended)
        if self.plain and last is not None:
            print(f"{last}: ended, {self.position} of {self.runs} runs", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stand where the run begins, or goes on."""
        batches = int(trainer.estimated_stepping_batches)
        done = self.position * batches + trainer.global_step
        if not self.bar.total:
            self.bar.initial = done  # what was done before this start does not count for the estimate
        self.bar.total, self.bar.n = self.runs * batches, done

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_index: int) -> None:
        """Say which epoch it is."""
        if batch_index == 0:
            self._describe(trainer)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """One more; after the last one, what takes time is measuring."""
        self.bar.update()
        if trainer.is_last_batch:
            self._describe(trainer, ", measuring")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the last test accuracy measured."""
        accuracy = trainer.callback_metrics.get("test/accuracy")
        told = "" if accuracy is None else f"test accuracy {float(accuracy):.1%}"
        self.bar.set_postfix_str(told, refresh=False)
        last = trainer.current_epoch + 1 == trainer.max_epochs
        if self.plain and (last or time.monotonic() - self._last_line >= _PLAIN_LINES):
            self._last_line = time.monotonic()
            print(f"{self._place(trainer)}{told and f': {told}'}", file=sys.stderr, flush=True)

    def _describe(self, trainer: Trainer, doing: str = "") -> None:
        self.bar.set_description(f"{self._place(trainer)}{doing}", refresh=False)

    def _place(self, trainer: Trainer) -> str:
        return f"{self.name}, epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
