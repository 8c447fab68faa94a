"""Callback that measures neural collapse during training with the Trainer of lightning."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import nn

from neuralcollapse._checks import check_at_least, check_bool
from neuralcollapse.classifier import check_named, expected_classifier
from neuralcollapse.lab.results.files import write_csv
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.records import is_due
from neuralcollapse.lab.results.tables import COLUMNS, read_table
from neuralcollapse.metrics import Measurement, Provenance
from neuralcollapse.metrics.measure import check_split_options, measure_splits

__all__ = ["CollapseCallback"]

logger = logging.getLogger(__name__)
_RECORDS = "epoch*-*.safetensors"
_ADVICE = "choose another name, resume its training with ckpt_path, or pass overwrite=True"


class CollapseCallback(Callback):
    """Callback that measures a model on loaders after epochs of training, in evaluation mode and without targets.

    Metrics are logged as ``SPLIT/METRIC`` and written to a table. The table is part of the checkpoints, so that a run
    that is stopped and resumed ends with the same table. With several ranks, only the first rank measures, and its
    loaders must yield all samples. If the trainer uses a true half or double precision, batches are cast as in
    training; with mixed precision, the model is measured in the precision of its weights.

    Each `fit` that does not resume training begins a new table. If the callback is used again, its table is written
    next to the previous one, as ``NAME-2.csv`` and ``MOMENTS-2`` (or ``FOLDER-2``); files that the callback has not
    written are replaced only with ``overwrite``.

    Args:
        loaders: Loader of un-augmented data for each split, by name. If there is a split ``"train"``, it is measured
            first, and the others relative to its class means.
        every_n_epochs: Measure after every n epochs, and after the first epoch.
        first_epoch: First epoch of this progression: with 1 and ``every_n_epochs=5``, epochs 1, 6, 11, … are measured.
            By default ``every_n_epochs``: epochs 1, 5, 10, …
        last_epoch: Measure after the last epoch as well, regardless of whether ``max_epochs``, ``max_steps``,
            ``max_time`` or early stopping ends the training. After an interrupt or an error, nothing is measured.
        folder: Run folder in which measurements are recorded, which `plot`, `aggregate`, `distance` and `report` can
            read: the result of `neuralcollapse.lab.RunFolder.create`, or its path. If it does not exist, it is created
            with the name of the `LightningModule`.
        csv: File of the table (epoch, split, metric, value), if ``folder`` is not given.
        moments: Folder to which each `Measurement` is saved, as ``epoch0005-train.safetensors``, from which every
            metric can be recomputed, if ``folder`` is not given.
        model: Dotted name of the measured module in the `LightningModule`. By default it is the `LightningModule`
            itself if it defines ``forward``, else its only child with parameters (``self.model``, ``self.net``, …).
        classifier: The classifier, or its dotted name in the measured module, if several modules compute an output.
        overwrite: Replace existing tables and records when training begins.
        options: Further arguments of `neuralcollapse.measure`, such as ``layers`` or ``options=MeasureOptions(...)``.

    Attributes:
        rows: Values measured in this training, as (epoch, split, metric, value).
        measured: Name of the measured module, set when training begins; empty for the `LightningModule` itself.

    Raises:
        ValueError: if arguments are out of range; when training begins, if the measured module is ambiguous or missing
            or has no classifier, or if existing files would be replaced.

    Examples:
        >>> import torch
        >>> from lightning.pytorch import Trainer
        >>> batches = [(torch.randn(16, 4), torch.arange(16) % 2)]
        >>> callback = CollapseCallback({"train": batches}, every_n_epochs=5)
        >>> trainer = Trainer(max_epochs=10, callbacks=[callback], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        loaders: Mapping[str, Iterable[Any]],
        *,
        every_n_epochs: int = 1,
        first_epoch: int | None = None,
        last_epoch: bool = True,
        folder: RunFolder | str | Path | None = None,
        csv: str | Path | None = None,
        moments: str | Path | None = None,
        model: str | None = None,
        classifier: str | nn.Module | None = None,
        overwrite: bool = False,
        **options: Any,
    ) -> None:
        check_split_options(loaders, options)
        check_at_least("every_n_epochs", every_n_epochs, 1)
        if first_epoch is not None:
            check_at_least("first_epoch", first_epoch, 1)
        check_bool("last_epoch", last_epoch)
        check_bool("overwrite", overwrite)
        if model is not None and not isinstance(model, str):
            raise ValueError(f"model must be a dotted name in the LightningModule, got {type(model).__name__}")
        if classifier is not None:
            check_named(classifier)
        if folder is not None and (csv is not None or moments is not None):
            raise ValueError("folder must be given without csv and moments, which it contains")
        run = folder.path if isinstance(folder, RunFolder) else folder
        self._files = tuple(None if name is None else Path(name) for name in (run, csv, moments))
        self._set_files(self._files)
        self.rows: list[tuple[int, str, str, float]] = []
        self.loaders = dict(loaders)
        self.every_n_epochs = every_n_epochs
        self.first_epoch = first_epoch
        self.last_epoch = last_epoch
        self.model = model
        self.measured = ""
        self.classifier = classifier
        self.overwrite = overwrite
        self.options: dict[str, Any] = {"progress": False} | options
        self._has_written = False
        self._ended = self._measured = 0  # epochs

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Clear the rows of a previous training; those of a resumed training are in its checkpoint."""
        if stage == "fit" and not _has_trained(trainer):
            self.rows = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log which module will be measured, before training."""
        self.measured, model = measured_module(pl_module, self.model)
        classifier = expected_classifier(model, self.classifier)
        name = self.measured or "the LightningModule"
        logger.info("measuring %s (%s) and its classifier %s", name, type(model).__name__, classifier)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a table; if training is resumed, retain rows of the table for completed epochs."""
        self._ended = self._measured = 0
        if not _has_trained(trainer):
            if self._has_written and not self.overwrite:
                self._set_files(_free_names(self._files))
            self._clear_files(trainer)
            self._has_written = False
        if self.folder is not None and trainer.is_global_zero and not self.folder.config.exists():
            RunFolder.create(self.folder.path, name=type(pl_module).__name__)
        if trainer.is_global_zero and trainer.current_epoch and self.path is not None and self.path.exists():
            known = {tuple(row[:3]) for row in self.rows}
            table = read_table(self.path).itertuples(index=False, name=None)
            added = [row for row in table if row[0] <= trainer.current_epoch and row[:3] not in known]
            self.rows = sorted([*self.rows, *added], key=lambda row: row[0])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, log and write if the epoch is due."""
        self._ended = trainer.current_epoch + 1
        last = self.last_epoch and _is_last(trainer, self._ended)
        if trainer.is_global_zero and (last or is_due(self._ended, self.every_n_epochs, self.first_epoch)):
            pl_module.log_dict(self._record(trainer, pl_module, self._ended), rank_zero_only=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the last epoch if a callback that is called later ended the training after it."""
        if not self.last_epoch or not trainer.is_global_zero or self._measured == self._ended:
            return
        values = self._record(trainer, pl_module, self._ended)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        for experiment in trainer.loggers:
            experiment.log_metrics(values | {"epoch": self._ended - 1}, step=trainer.global_step - 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the rows, which are part of checkpoints."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows of a checkpoint."""
        self.rows = list(state_dict["rows"])

    def measure(self, pl_module: LightningModule, epoch: int) -> dict[str, Measurement]:
        """Measure every split."""
        model = pl_module.get_submodule(self.measured) if self.measured else pl_module
        precision = pl_module.trainer.precision_plugin
        loaders: dict[str, Any] = dict(self.loaders)
        if type(precision).convert_input is not Precision.convert_input:
            loaders = {split: _Converted(loader, precision) for split, loader in loaders.items()}
        with _called_in(model, precision):
            provenance = Provenance(epoch=epoch)
            return measure_splits(model, loaders, provenance, classifier=self.classifier, **self.options)

    def _record(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> dict[str, float]:
        """Measure, write the table and the records, and return the metrics by SPLIT/METRIC."""
        measurements = self.measure(pl_module, epoch)
        self._measured = epoch
        rows = [(epoch, split, *item) for split, one in measurements.items() for item in one.metrics.items()]
        self.rows += rows
        if self.folder is not None:
            self.folder.record_splits(epoch, measurements)
        elif self.moments is not None:
            for split, measurement in measurements.items():
                measurement.save(self.moments / f"epoch{epoch:04d}-{split}.safetensors")
        if self.path is not None and self.folder is None:
            write_csv(self.path, pd.DataFrame(self.rows, columns=COLUMNS))
        self._has_written = True
        return {f"{split}/{name}": value for _, split, name, value in rows}

    def _set_files(self, files: Sequence[Path | None]) -> None:
        folder, self.path, self.moments = files
        self.folder = None if folder is None else RunFolder(folder)
        if self.folder is not None:
            self.path, self.moments = self.folder.metrics, self.folder.moments

    def _clear_files(self, trainer: Trainer) -> None:
        """Remove an existing table and records if they may be replaced.

        Raises:
            ValueError: if they exist and may not be replaced.
        """
        records = [] if self.moments is None else list(self.moments.glob(_RECORDS))
        has_table = self.path is not None and self.path.exists()
        if not self.overwrite:
            if self.folder is not None and (has_table or records):
                raise ValueError(f"folder must be a run without measurements; {str(self.folder.path)!r} has: {_ADVICE}")
            if has_table:
                raise ValueError(f"csv must be a new file, but {str(self.path)!r} exists: {_ADVICE}")
            if records:
                raise ValueError(f"moments must be a folder without records, and {str(self.moments)!r} has: {_ADVICE}")
        elif trainer.is_global_zero:
            for file in records if self.folder is None else [*records, self.folder.metrics]:
                file.unlink(missing_ok=True)


class _Converted:
    """Loader whose batches are cast as the trainer casts training batches."""

    def __init__(self, loader: Iterable[Any], precision: Precision) -> None:
        self.loader = loader
        self.precision = precision

    def __iter__(self) -> Iterator[Any]:
        return map(self.precision.convert_input, self.loader)


@contextmanager
def _called_in(model: nn.Module, precision: Precision) -> Iterator[None]:
    """Run the forward of a model as in training but without autocast: new tensors have the dtype of the trainer."""
    if isinstance(precision, MixedPrecision):
        yield
        return
    contexts: list[AbstractContextManager[Any]] = []

    def enter(*_: Any) -> None:
        contexts.append(precision.forward_context())
        contexts[-1].__enter__()

    def leave(*_: Any) -> None:
        contexts.pop().__exit__(None, None, None)

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(enter).remove)
        stack.callback(model.register_forward_hook(leave, always_call=True).remove)
        yield


def _has_trained(trainer: Trainer) -> bool:
    """Return whether the trainer resumes a training."""
    return trainer.current_epoch > 0 or trainer.global_step > 0


def _is_last(trainer: Trainer, epoch: int) -> bool:
    """Return whether the trainer stops after this epoch, as far as it is known at the end of the epoch."""
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= epoch:
        return True
    if 0 <= trainer.max_steps <= trainer.global_step:
        return True
    early = epoch >= (trainer.min_epochs or 0) and trainer.global_step >= (trainer.min_steps or 0)
    return trainer.should_stop and early


def _free_names(files: Sequence[Path | None]) -> list[Path | None]:
    """Return the names of the next files, with the first number from 2 that is free for all of them."""
    for number in count(2):
        names = [path and path.with_name(f"{path.stem}-{number}{path.suffix}") for path in files]
        if not any(path is not None and path.exists() for path in names):
            break
    return names


def measured_module(pl_module: LightningModule, name: str | None = None) -> tuple[str, nn.Module]:
    """Return the name and the module of a `LightningModule` that is called with the inputs of a batch.

    Args:
        pl_module: The `LightningModule`.
        name: Dotted name of the module; None to find it.

    Raises:
        ValueError: if no module has this name; or, without a name, if the `LightningModule` has neither a ``forward``
            nor exactly one child with parameters.
    """
    if name is None and type(pl_module).forward is not LightningModule.forward:
        return "", pl_module
    trained = [child for child, module in pl_module.named_children() if any(True for _ in module.parameters())]
    if name is None and len(trained) != 1:
        raise ValueError(
            f"model must name what CollapseCallback is to measure in {type(pl_module).__name__}, which has no forward; "
            f"it could be {', '.join(map(repr, trained)) or 'nothing: no attribute of it has parameters'}"
        )
    name = trained[0] if name is None else name
    try:
        return name, pl_module.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"model must name a module of {type(pl_module).__name__}, got {name!r}; "
            f"it has {', '.join(map(repr, trained))}"
        ) from None
