"""Checkpoints: what is saved, when, and how it is read again."""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from neuralcollapse.lab.config import Record, RunConfig
from neuralcollapse.lab.results.files import write_whole
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.stopping import terminate
from neuralcollapse.lab.training.epochs import is_due

# Number of the format of checkpoints that is written. Those of 0 do not say whose they are.
FORMAT = 1
# Where a checkpoint says it.
PROVENANCE = "neuralcollapse"


class Checkpointing(Callback):
    """Saves where a run goes on from, and the epochs to keep. Comes after what has a state to save.

    A run goes on from the end of its last epoch; or from inside one, of which it saves where it is every
    ``checkpoint_minutes`` and when SIGTERM comes. In the last batch of an epoch, and while it is measured, SIGTERM
    leaves what was saved before.
    """

    def __init__(self, folder: RunFolder, settings: Record) -> None:
        self.folder = folder
        self.settings = settings
        self._saved = time.monotonic()
        self._in_batch = self._terminated = False

    def on_sigterm(self, *_: Any) -> None:
        """Stop: once the batch is trained on and saved, or at once where there is none."""
        self._terminated = True
        if not self._in_batch:
            terminate()

    def on_train_batch_start(self, *_: Any) -> None:
        """From here on the state is that of no batch."""
        self._in_batch = True

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Save inside an epoch, where it is time to."""
        self._in_batch = False
        late = time.monotonic() - self._saved > 60 * self.settings.checkpoint_minutes
        # Of the last batch, lightning would take the epoch's end as done too.
        if (late or self._terminated) and not trainer.is_last_batch:
            self._save_last(trainer)
        if self._terminated:
            terminate()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        epoch = trainer.current_epoch + 1
        settings, every = self.settings, self.settings.checkpoint_every
        due = every is not None and is_due(epoch, every, settings.checkpoint_from)
        if due or epoch in settings.checkpoint_epochs:
            trainer.save_checkpoint(self.folder.checkpoint(epoch))
        self._save_last(trainer)  # last: a run that is killed here makes the other again

    def _save_last(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.folder.last_checkpoint)
        self._saved = time.monotonic()


def provenance(config: RunConfig, trainer: Trainer) -> dict[str, Any]:
    """Whose checkpoint it is that is written now, and where it is in training.

    Returns:
        Format and package, config, seed and epoch (counted from 1); inside it ``batches``, the number of those trained
        on, and the states of the generators that the network draws from.
    """
    inside = trainer.fit_loop.epoch_progress.current
    found = {
        "format_version": FORMAT,
        "package_version": version("neuralcollapse"),
        "config": config.in_force(),
        "seed": config.seed,
        "epoch": trainer.current_epoch + 1,
    }
    if inside.processed < inside.started:
        found["batches"] = trainer.fit_loop.batch_idx + 1
        accelerators = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        found["generators"] = [torch.get_rng_state(), *accelerators]
    return found


def restore_generators(found: dict[str, Any]) -> None:
    """Set the states that `provenance` kept, if it kept some."""
    first, *others = found.get("generators", [None])
    if first is not None:
        torch.set_rng_state(first)
        torch.cuda.set_rng_state_all(others[: torch.cuda.device_count()])


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints of tensors and plain values, that replace the last one only when they are complete."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        write_whole(Path(path), lambda partial: torch.save(checkpoint, partial))

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        """Read a checkpoint; raises ValueError if it cannot be read."""
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # truncated files fail in many ways
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"checkpoint {str(path)!r} cannot be read ({reason}); delete it to start that run again"
            ) from error
