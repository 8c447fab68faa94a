"""One training run: a model, trained by lightning, measured after each epoch."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional

from neuralcollapse.heads import AttachedHead, LearnedClassifier, project_after_step
from neuralcollapse.lab.batches import EpochBatches, EvaluationBatches
from neuralcollapse.lab.callback import CollapseCallback
from neuralcollapse.lab.config import Optimisation, RunConfig
from neuralcollapse.lab.models import build_model
from neuralcollapse.lab.runs import RunFolder, WholeCheckpoints, write_whole
from neuralcollapse.lab.splits import ImageData, Split
from neuralcollapse.metrics import ClassMoments

# The numerical rank needs each class's own scatter, K d² numbers: it is measured where they take no more than this.
_CLASS_SCATTER_BYTES = 2**28


def build_optimizer(config: Optimisation, model: AttachedHead) -> torch.optim.Optimizer:
    """The optimiser of all parameters; it keeps the rows of a unit weight at unit norm."""
    parameters = model.parameters()
    rates: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    optimizer: torch.optim.Optimizer
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, momentum=config.momentum, **rates)
    else:
        optimizer = torch.optim.AdamW(parameters, **rates)
    if isinstance(model.head, LearnedClassifier):
        project_after_step(optimizer, model.head)
    return optimizer


def rate_factor(schedule: str, progress: float) -> float:
    """What the learning rate is multiplied by when the share ``progress`` of training is done."""
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "step":
        return 0.1 ** sum(progress >= milestone for milestone in (1 / 3, 2 / 3))
    return 1.0


class ClassifierTraining(LightningModule):
    """Cross-entropy training of a model that ends in a head.

    ``batch_loss`` and ``batch_accuracy`` are of training batches in training mode. They are never compared: the
    head of the method `implicit` knows the labels of its batch.
    """

    def __init__(self, config: RunConfig, model: AttachedHead, split: Split, evaluation: EvaluationBatches) -> None:
        super().__init__()
        self.config = config
        self.model = model
        self.split = split
        self.standardise = evaluation.standardise

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.model(images)

    def train_dataloader(self) -> EpochBatches:
        """The coming epoch's batches: lightning asks for them at every epoch."""
        return self._batches(self.current_epoch)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """The loss of one batch."""
        images, targets = batch
        logits = self.model(images, targets=targets)
        loss = functional.cross_entropy(logits, targets)
        accuracy = (logits.detach().argmax(1) == targets).float().mean()
        self.log_dict({"batch_loss": loss.detach(), "batch_accuracy": accuracy}, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        """The optimiser and its schedule, by the step."""
        optimizer = build_optimizer(self.config, self.model)
        steps = self.config.epochs * len(self._batches(0))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: rate_factor(self.config.schedule, step / steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _batches(self, epoch: int) -> EpochBatches:
        return EpochBatches(self.split, self.standardise, self.config, self.config.seed, epoch)


class TrainingLog(Callback):
    """Writes what training itself saw in each epoch, and how long it took without measuring."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.rows: list[dict[str, float]] = []
        self._started = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop it, and write; a loss that is not finite ends the run."""
        epoch = trainer.current_epoch + 1
        figures = {name: float(trainer.callback_metrics[name]) for name in ("batch_loss", "batch_accuracy")}
        seconds = time.perf_counter() - self._started  # after the figures, which wait for the accelerator
        if not math.isfinite(figures["batch_loss"]):
            raise ValueError(f"lr must be smaller: training diverged in epoch {epoch}, its loss is not finite")
        self.rows.append({"epoch": epoch, "seconds": seconds} | figures)
        table = pd.DataFrame(self.rows)
        write_whole(self.folder.training_log, lambda path: table.to_csv(path, index=False))

    def state_dict(self) -> dict[str, Any]:
        """The rows."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the rows of a checkpoint."""
        self.rows = list(state_dict["rows"])


class Checkpointing(Callback):
    """Saves the last epoch, from which a run goes on, and those to keep. Comes after what has a state to save."""

    def __init__(self, folder: RunFolder, keep_every: int | None) -> None:
        self.folder = folder
        self.keep_every = keep_every

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        epoch = trainer.current_epoch + 1
        trainer.save_checkpoint(self.folder.last_checkpoint)
        if self.keep_every is not None and epoch % self.keep_every == 0:
            trainer.save_checkpoint(self.folder.checkpoint(epoch))


def train(
    config: RunConfig,
    data: ImageData,
    evaluation: Mapping[str, EvaluationBatches],
    folder: RunFolder,
    *callbacks: Callback,
) -> None:
    """Train one run to its end, from its last checkpoint if there is one.

    Args:
        config: All settings.
        data: On the device to train on.
        evaluation: What to measure on after each epoch, with a split called ``"train"``.
        folder: The run's, opened.
        callbacks: Further callbacks of lightning.

    Raises:
        ValueError: Settings that do not fit the data, or a checkpoint that cannot be read.
        KeyboardInterrupt: The user stopped it.
    """
    model = build_model(config, data.image_shape, data.num_classes)
    module = ClassifierTraining(config, model, data.train, evaluation["train"])
    weight: Any = model.head.weight
    scatter = ClassMoments.required_bytes(*weight.shape, class_scatter=True) <= _CLASS_SCATTER_BYTES
    collapse = CollapseCallback(evaluation, csv=folder.metrics, classifier=model.head, class_scatter=scatter)
    device = data.train.images.device
    with quiet_lightning():
        trainer = Trainer(
            accelerator=device.type,
            devices=1,
            max_epochs=config.epochs,
            callbacks=[TrainingLog(folder), collapse, *callbacks, Checkpointing(folder, config.checkpoint_every)],
            plugins=[WholeCheckpoints()],
            reload_dataloaders_every_n_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder.path,
        )
        last = folder.last_checkpoint
        try:
            trainer.fit(module, ckpt_path=last if last.exists() else None, weights_only=True)
        except SystemExit as exit:  # lightning's answer to Ctrl-C
            if isinstance(exit.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from exit
            raise


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without lightning's tips and its advice on data loaders; errors are shown."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
