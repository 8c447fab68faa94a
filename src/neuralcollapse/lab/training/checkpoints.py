"""Checkpoints: what is saved, when, and how it is read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from neuralcollapse.lab.config import Record
from neuralcollapse.lab.results.files import write_whole
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.training.epochs import is_due


class Checkpointing(Callback):
    """Saves the last epoch, from which a run goes on, and those to keep. Comes after what has a state to save."""

    def __init__(self, folder: RunFolder, settings: Record) -> None:
        self.folder = folder
        self.settings = settings

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        epoch = trainer.current_epoch + 1
        settings, every = self.settings, self.settings.checkpoint_every
        due = every is not None and is_due(epoch, every, settings.checkpoint_from)
        if due or epoch in settings.checkpoint_epochs:
            trainer.save_checkpoint(self.folder.checkpoint(epoch))
        trainer.save_checkpoint(self.folder.last_checkpoint)  # last: a run that is killed here makes the other again


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
