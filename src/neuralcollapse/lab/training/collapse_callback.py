"""Measure neural collapse during training: a lightning callback."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from neuralcollapse._checks import check_at_least, check_bool
from neuralcollapse.classifier import expected_classifier
from neuralcollapse.lab.models.backbones import evaluation_layout
from neuralcollapse.lab.results.tables import COLUMNS, read_table
from neuralcollapse.lab.training.epochs import is_due
from neuralcollapse.lab.training.logs import TableCallback
from neuralcollapse.metrics import Measurement, measure

logger = logging.getLogger(__name__)


class CollapseCallback(TableCallback):
    """Measures a model on loaders after epochs of training, in evaluation mode and without targets.

    What is measured is logged as ``SPLIT/METRIC`` and written to a table. The table is part of the checkpoints, so
    that a run that is stopped and resumed ends with the same one. Of several ranks the first one measures, by
    itself: its loaders are to give all samples.

    Args:
        loaders: Name of each split to its batches. Give un-augmented data. Where one is called ``"train"``, it is
            measured first, and the others against its class means.
        every_n_epochs: Measure after every so many epochs, and after the first.
        first_epoch: Where these steps begin: 1 of 5 is epochs 1, 6, 11, ... By default where the first step ends: 1, 5,
            10, ...
        last_epoch: Measure after the last epoch as well.
        csv: File to write: epoch, split, metric, value.
        moments: Folder to write each `Measurement` to, as ``epoch0005-train.safetensors``: from it every metric can be
            computed again.
        model: Dotted name of what is measured, in the `LightningModule`. By default the `LightningModule` itself if
            it has a ``forward`` of its own, else its only child with parameters (``self.model``, ``self.net``, …).
        classifier: The classifier, or its dotted name in what is measured, where several modules compute an output.
        options: What else `neuralcollapse.measure` takes.

    Attributes:
        rows: What was measured so far, as (epoch, split, metric, value).
        measured: Name of the module that is measured, known when training begins; empty for the `LightningModule`.

    Raises:
        ValueError: Arguments out of range; when training begins, no module or several that could be meant, or no
            classifier in it.

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
        csv: str | Path | None = None,
        moments: str | Path | None = None,
        model: str | None = None,
        classifier: str | nn.Module | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(loaders, Mapping) or not loaders:
            raise ValueError(f"loaders must name at least one split, as {{'train': loader}}, got {loaders!r}")
        for split, loader in loaders.items():
            if not isinstance(loader, Iterable):
                raise ValueError(f"loaders must be iterables of batches, got {type(loader).__name__} for {split!r}")
        check_at_least("every_n_epochs", every_n_epochs, 1)
        if first_epoch is not None:
            check_at_least("first_epoch", first_epoch, 1)
        check_bool("last_epoch", last_epoch)
        if model is not None and not isinstance(model, str):
            raise ValueError(f"model must be a dotted name in the LightningModule, got {type(model).__name__}")
        if classifier is not None and not isinstance(classifier, str | nn.Module):
            raise ValueError(f"classifier must be a module or its dotted name, got {type(classifier).__name__}")
        known = set(inspect.signature(measure).parameters) - {"model", "loader", "train_moments", "epoch", "split"}
        if unknown := options.keys() - known:
            raise ValueError(f"options must be arguments of measure, got {', '.join(sorted(unknown))}")
        super().__init__(None if csv is None else Path(csv), COLUMNS)
        self.moments = None if moments is None else Path(moments)
        self.loaders = dict(loaders)
        self.every_n_epochs = every_n_epochs
        self.first_epoch = first_epoch
        self.last_epoch = last_epoch
        self.model = model
        self.measured = ""
        self.classifier = classifier
        self.options: dict[str, Any] = {"progress": False} | options

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what will be measured, before anything is trained."""
        self.measured, model = measured_module(pl_module, self.model)
        classifier = expected_classifier(model, self.classifier)
        name = self.measured or "the LightningModule"
        logger.info("measuring %s (%s) and its classifier %s", name, type(model).__name__, classifier)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Of a run that goes on, keep what was added to its table since, of epochs that are over."""
        if self.path is None or not trainer.is_global_zero or not trainer.current_epoch or not self.path.exists():
            return
        known = {tuple(row[:3]) for row in self.rows}
        table = read_table(self.path).itertuples(index=False, name=None)
        added = [row for row in table if row[0] <= trainer.current_epoch and row[:3] not in known]
        self.rows = sorted([*self.rows, *added], key=lambda row: row[0])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, log and write."""
        epoch = trainer.current_epoch + 1
        last = self.last_epoch and epoch == trainer.max_epochs
        if not trainer.is_global_zero or not (last or is_due(epoch, self.every_n_epochs, self.first_epoch)):
            return
        model = pl_module.get_submodule(self.measured) if self.measured else pl_module
        found = measure_splits(model, self.loaders, classifier=self.classifier, epoch=epoch, **self.options)
        for split, measurement in found.items():
            if self.moments is not None and trainer.is_global_zero:
                measurement.save(self.moments / f"epoch{epoch:04d}-{split}.safetensors")
            self.rows += [(epoch, split, name, value) for name, value in measurement.metrics.items()]
            named = {f"{split}/{name}": value for name, value in measurement.metrics.items()}
            pl_module.log_dict(named, rank_zero_only=True)
        self.write(trainer)


def measured_module(pl_module: LightningModule, name: str | None = None) -> tuple[str, nn.Module]:
    """The module of a `LightningModule` that is called with a batch's inputs, and its name there.

    Args:
        pl_module: The `LightningModule`.
        name: Dotted name, where it is not to be found.

    Raises:
        ValueError: No such name; or none given, no ``forward`` and not one single child with parameters.
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


def measure_splits(model: nn.Module, loaders: Mapping[str, Iterable[Any]], **options: Any) -> dict[str, Measurement]:
    """Measure every split; the one called ``"train"`` first, and the others against its class means.

    Args:
        model: The model.
        loaders: Name of each split to its batches.
        options: What else `neuralcollapse.measure` takes.
    """
    train_moments, found = None, {}
    with evaluation_layout(model):
        for split in sorted(loaders, key=lambda split: split != "train"):
            found[split] = measure(model, loaders[split], train_moments=train_moments, split=split, **options)
            train_moments = found[split].moments if split == "train" else train_moments
    return found
