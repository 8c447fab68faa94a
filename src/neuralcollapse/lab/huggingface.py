"""Callback that measures neural collapse while `transformers.Trainer` trains a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from neuralcollapse._checks import check_at_least
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.records import is_due
from neuralcollapse.metrics import Provenance
from neuralcollapse.metrics.measure import check_split_options, measure_splits

__all__ = ["CollapseCallback"]


class CollapseCallback(TrainerCallback):
    """Callback that measures a model after epochs of training and records the measurements in a run folder.

    The first process measures the model, in evaluation mode and without passing labels to it. Training that resumes
    from a checkpoint continues the records of its folder.

    Args:
        loaders: Loader of un-augmented data for each split, by name, such as
            ``{"train": trainer.get_eval_dataloader(train_set)}``. If there is a split ``"train"``, it is measured
            first, and the others relative to its class means. Batches are mappings; ``"labels"`` are the targets.
        folder: Run folder from `neuralcollapse.lab.RunFolder.create`, or its path. If it does not exist, it is created
            with the name of the class of the model.
        every_n_epochs: Measure after every n epochs, and after the first and the last epoch.
        options: Further arguments of `neuralcollapse.measure`, such as ``classifier`` or ``unpack``.

    Raises:
        ValueError: if arguments are out of range; when training begins, if the folder contains measurements and
            training does not resume.

    Examples:
        >>> import torch
        >>> batches = [{"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.arange(4) % 2}]
        >>> callback = CollapseCallback({"train": batches}, getfixture("tmp_path") / "run", every_n_epochs=2)
    """

    def __init__(
        self,
        loaders: Mapping[str, Iterable[Any]],
        folder: RunFolder | str | Path,
        *,
        every_n_epochs: int = 1,
        **options: Any,
    ) -> None:
        check_split_options(loaders, options)
        check_at_least("every_n_epochs", every_n_epochs, 1)
        self.loaders = dict(loaders)
        self.folder = folder if isinstance(folder, RunFolder) else RunFolder(folder)
        self.every_n_epochs = every_n_epochs
        self.options: dict[str, Any] = {"progress": False, "unpack": _unpack} | options
        self._measured = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Create the folder, or check that it does not contain measurements of another training."""
        self._measured = 0
        if not state.is_world_process_zero:
            return
        if not self.folder.config.exists():
            RunFolder.create(self.folder.path, name=type(model).__name__)
        elif state.global_step == 0 and self.folder.metrics.exists():
            raise ValueError(
                f"folder must be a run without measurements, but {str(self.folder.path)!r} has some: choose another "
                "folder or resume its training with resume_from_checkpoint"
            )

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Measure if the epoch is due."""
        epoch = _epoch(state)
        if is_due(epoch, self.every_n_epochs):
            self._measure(model, epoch, state)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Measure the last epoch if it was not measured."""
        if (epoch := _epoch(state)) > self._measured:
            self._measure(model, epoch, state)

    def _measure(self, model: nn.Module | None, epoch: int, state: TrainerState) -> None:
        self._measured = epoch
        if model is not None and state.is_world_process_zero:
            measurements = measure_splits(model, self.loaders, Provenance(epoch=epoch), **self.options)
            self.folder.record_splits(epoch, measurements)


def _epoch(state: TrainerState) -> int:
    """Return the number of trained epochs; the last one may be incomplete."""
    return math.ceil((state.epoch or 0.0) - 1e-6)


def _unpack(batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    return {name: value for name, value in batch.items() if name != "labels"}, batch.get("labels")
