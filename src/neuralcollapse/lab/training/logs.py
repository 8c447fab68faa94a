"""What a run writes while it trains: its log, its gradients, its checkpoints, a progress bar."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from tqdm.auto import tqdm

from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.training.agd import AGD
from neuralcollapse.lab.training.collapse_callback import TableCallback


class TrainingLog(TableCallback):
    """What training itself saw in each epoch, and how long it took without measuring."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._started = 0.0
        self._rate = 0.0
        self._etas: list[torch.Tensor] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()
        self._etas = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_index: int) -> None:
        """Keep the learning rate that the epoch begins with; AGD has none."""
        if batch_index == 0:
            self._rate = trainer.optimizers[0].param_groups[0].get("lr", math.nan)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Keep AGD's step."""
        optimizer = trainer.optimizers[0]
        if isinstance(optimizer, AGD) and optimizer.eta is not None:
            self._etas.append(optimizer.eta)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock, and write; a loss that is not finite ends the run."""
        epoch = trainer.current_epoch + 1
        figures = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("batch_")}
        seconds = time.perf_counter() - self._started  # after the figures, which wait for the accelerator
        if not math.isfinite(figures["batch_loss"]):
            setting = "gain" if self._etas else "lr"
            raise ValueError(f"{setting} must be smaller: training diverged in epoch {epoch}, its loss is not finite")
        if self._etas:
            figures["agd_eta"] = float(torch.stack(self._etas).mean())
        else:
            figures["lr"] = self._rate
        self.rows.append({"epoch": epoch, "seconds": seconds} | figures)
        self.write(trainer)


class GradientLog(TableCallback):
    """Size of each parameter's gradient at the last batch of each epoch: mean and largest magnitude, and norm."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at the gradients; an optimiser that evaluates them more often leaves the last ones."""
        if not trainer.is_last_batch:
            return
        epoch = trainer.current_epoch + 1
        self.rows = [row for row in self.rows if row["epoch"] < epoch]
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is not None:
                size = parameter.grad.abs()
                figures = torch.stack([size.mean(), size.max(), torch.linalg.vector_norm(size)]).tolist()
                row = dict(zip(("mean", "max", "norm"), figures, strict=True))
                self.rows.append({"epoch": epoch, "parameter": name.removeprefix("model.")} | row)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write."""
        self.write(trainer)


class Checkpointing(Callback):
    """Saves the last epoch, from which a run goes on, and those to keep. Comes after what has a state to save."""

    def __init__(self, folder: RunFolder, keep_every: int | None, keep: Sequence[int]) -> None:
        self.folder = folder
        self.keep_every = keep_every
        self.keep = set(keep)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        epoch = trainer.current_epoch + 1
        if epoch in self.keep or (self.keep_every is not None and epoch % self.keep_every == 0):
            trainer.save_checkpoint(self.folder.checkpoint(epoch))
        trainer.save_checkpoint(self.folder.last_checkpoint)  # last: a run that is killed here makes the other again


class ProgressBar(Callback):
    """Moves a bar that counts the batches of one run after another.

    Args:
        bar: The bar.
        name: What is said of this run.
        position: Runs that came before it.
        runs: Runs in all.
    """

    def __init__(self, bar: tqdm, name: str, position: int = 0, runs: int = 1) -> None:
        self.bar = bar
        self.name = name
        self.position = position
        self.runs = runs

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
        if (accuracy := trainer.callback_metrics.get("test/accuracy")) is not None:
            self.bar.set_postfix_str(f"test accuracy {float(accuracy):.1%}")

    def _describe(self, trainer: Trainer, doing: str = "") -> None:
        self.bar.set_description(f"{self.name}, epoch {trainer.current_epoch + 1}/{trainer.max_epochs}{doing}")


def progress_bar(*, shown: bool) -> tqdm:
    """The bar that a `ProgressBar` moves."""
    return tqdm(disable=not shown, unit="batch", unit_scale=True, smoothing=0.02, dynamic_ncols=True)
