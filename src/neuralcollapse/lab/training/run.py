"""Training run: data, model, optimiser and schedule, and the loop that trains, logs, measures and saves."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from neuralcollapse._distributed import greatest_over_ranks
from neuralcollapse.heads import AttachedHead
from neuralcollapse.lab.config import RunConfig, derived_seed
from neuralcollapse.lab.data.batches import (
    EpochBatches,
    EvaluationBatches,
    batch_shape,
    evaluation_batches,
    some_images,
)
from neuralcollapse.lab.data.images import ImageData
from neuralcollapse.lab.models.backbones import FastConvNet, evaluation_layout
from neuralcollapse.lab.models.build import build_model
from neuralcollapse.lab.process import stop_requests
from neuralcollapse.lab.results.files import write_csv
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.training.checkpoint import PROVENANCE, CheckpointFiles, generator_states, set_generator_states
from neuralcollapse.lab.training.distributed import launched_fabric
from neuralcollapse.lab.training.objective import Diverged, EpochLog, FirstNonFinite, Objective, OwnLoss, gradient_sizes
from neuralcollapse.lab.training.optimizers import TrainedModel, build_optimizer, build_schedule
from neuralcollapse.lab.training.progress import Progress, open_loggers
from neuralcollapse.metrics import ClassMoments, MeasureOptions, Provenance
from neuralcollapse.metrics.measure import measure_splits

# Maximum number of bytes for the scatter of each class, K d² numbers, from which the numerical rank of layers follows.
_CLASS_SCATTER_BYTES = 2**28
# Number of training images whose patches are whitened, as in Jordan (2024).
_WHITENED_IMAGES = 5000


class Run:
    """Run that is ready to be trained: everything that may fail because of invalid settings is built.

    Args:
        config: All settings.
        data: Data to train on.
        evaluation: Un-augmented batches of each split for measurements; by default those of the data.
        model: Model to train further; by default a new model.

    Attributes:
        trained: The model, and the average of its weights if there is one.

    Raises:
        ValueError: if settings do not fit each other or the data.
    """

    def __init__(
        self,
        config: RunConfig,
        data: ImageData,
        evaluation: Mapping[str, EvaluationBatches] | None = None,
        model: AttachedHead | None = None,
    ) -> None:
        class_counts = data.train.labels.bincount(minlength=data.num_classes)
        self.class_counts = class_counts
        present = int((class_counts > 0).sum())
        if len(data.train) < 2 * config.ranks:
            raise ValueError(f"devices must leave two training images per rank, got {config.ranks} ranks for {data}")
        if (config.classes_per_batch or 0) > present:
            raise ValueError(
                f"classes_per_batch must be at most the number of classes with training images, which is {present}, "
                f"got {config.classes_per_batch}"
            )
        self.config, self.data, self.rank = config, data, 0
        self.evaluation = evaluation_batches(data, config) if evaluation is None else evaluation
        model = new_model(config, data, self.evaluation["train"]) if model is None else model
        self.trained = TrainedModel(model, config.weight_average)
        self.optimizer = build_optimizer(config, model)
        self.accumulate = config.accumulate or 1
        self.steps_per_epoch = math.ceil(len(self.batches(1)) / self.accumulate)
        self.schedule = build_schedule(config, self.optimizer, self.steps_per_epoch)
        self.first_non_finite = FirstNonFinite(model)

    @cached_property
    def fingerprint(self) -> dict[str, dict[str, str]]:
        """Fingerprint of the data."""
        return self.data.fingerprint()

    def check_loss(self) -> None:
        """Check a loss by dotted path, which is imported for training but not for measurements.

        Raises:
            ValueError: if the loss cannot be used.
        """
        if "." in self.config.loss:
            OwnLoss(self.config, *self.trained.model.head.weight.shape)  # type: ignore[misc]

    def batches(self, epoch: int, done: int = 0) -> EpochBatches:
        """Return the batches of an epoch, counted from 1, on this rank, without completed batches."""
        config, standardise = self.config, self.evaluation["train"].standardise
        return EpochBatches(self.data.train, standardise, config, config.seed, epoch - 1, done, self.rank, config.ranks)

    def train(self, folder: RunFolder, progress: Progress | None = None) -> None:
        """Train to the end, starting from the last checkpoint if there is one.

        Args:
            folder: Folder of the run, for which `RunFolder.begin` was called.
            progress: Display of the progress.

        Raises:
            Diverged: if a feature, the loss or a parameter is not finite.
            ValueError: if a checkpoint cannot be read or has another model, or another rank is lost.
            KeyboardInterrupt: if Ctrl-C stopped training, after the step in progress was saved.
            Terminated: if SIGTERM stopped training, after the step in progress was saved.
        """
        config, device, per_epoch = self.config, self.data.train.labels.device, len(self.batches(1))
        self.folder, self.progress = folder, progress or Progress(shown=False)
        self.files = CheckpointFiles(config, self.fingerprint)
        with (
            open_loggers(config, folder) as loggers,
            stop_requests() as self.stop,
            launched_fabric(config, device, loggers) as self.fabric,
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        ):
            first, done = self._set_up()
            self.progress.begin(config.epochs * per_epoch, (first - 1) * per_epoch + done)
            for epoch in range(first, config.epochs + 1):
                self._train_epoch(epoch, done)
                self._end_epoch(epoch)
                done = 0
            self.stop.answer()

    def _set_up(self) -> tuple[int, int]:
        """Wrap model and optimiser, and load the last checkpoint; return the first epoch and its completed batches."""
        self.rank = self.fabric.global_rank
        if self.config.sync_batchnorm:
            self.trained.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.trained.model)
        self.trained.to(self.fabric.device).train()
        self.objective = Objective(self.config, self.trained.model, self.class_counts)
        self.compute_loss, self.fabric_optimizer = self.fabric.setup(self.objective, self.optimizer)
        self.scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        self.stop.waits = self.config.ranks > 1  # with several ranks, all stop together
        self.rows: dict[str, list[dict[str, Any]]] = {"training_log": [], "gradients": []}
        self.accuracy: float | None = None
        self.saved = time.monotonic()
        return self._resume() if self.fabric.broadcast(self.folder.last_checkpoint.exists()) else (1, 0)

    def _train_epoch(self, epoch: int, done: int) -> None:
        """Train on the remaining batches of an epoch."""
        if not done:  # random choices of the network, such as dropout, depend on seed, epoch and rank alone
            torch.manual_seed(derived_seed(self.config.seed, epoch - 1, 1) + self.rank)
            self.log = EpochLog(self.optimizer.param_groups[0].get("lr", math.nan))
        self.first_non_finite.begin_epoch()
        self.progress.begin_epoch(epoch, self.config.epochs)
        self.stop.waits = True
        batches = self.batches(epoch, done)
        sizes = batches.sizes
        for number, batch in enumerate(batches, start=done + 1):
            is_last = number == len(sizes)
            is_step = is_last or number % self.accumulate == 0
            try:
                metrics = self._compute_gradients(number, batch, sizes, is_step=is_step)
            except ValueError as error:
                if "finite" not in str(error):
                    raise
                first = self.first_non_finite.find(scaled=self.scaler is not None)
                raise self._diverged(epoch, *(first or (number, "a feature"))) from error
            if is_step:
                self._step(epoch, number)
            self.log.add(metrics, sizes[number - 1], self.optimizer, skips=self.scaler is not None)
            self.progress.end_batch(is_last=is_last)
            if is_step:
                self._save_and_stop_if_due(epoch, number, is_last=is_last)

    def _compute_gradients(
        self, number: int, batch: tuple[Tensor, Tensor], sizes: list[int], *, is_step: bool
    ) -> dict[str, Tensor]:
        """Add the gradients of a batch to those of its step; return the training metrics of the batch.

        L-BFGS takes its step here and computes gradients at several points of a line search; the first one is logged.
        """
        first = (number - 1) // self.accumulate * self.accumulate  # index of the first batch of the step
        # All samples of a step have the same weight, even in a short group at the end of an epoch.
        weight = self.accumulate * sizes[number - 1] / sum(sizes[first : first + self.accumulate])
        self.objective.keeps_head_tensors = number == len(sizes) and self.config.ranks == 1
        evaluations: list[dict[str, Tensor]] = []

        def evaluate() -> Tensor:
            with self.fabric.no_backward_sync(self.compute_loss, enabled=not is_step):
                loss, metrics, features = self.compute_loss(*batch, sizes[number - 1])
                if not evaluations:
                    self.first_non_finite.see_loss(number, metrics["batch_loss"], features)
                evaluations.append(metrics)
                if number == first + 1:
                    self.optimizer.zero_grad()
                self.fabric.backward(loss * weight / self.accumulate)
            if number == len(sizes):
                self.gradients = gradient_sizes(self.objective, 1.0 if self.scaler is None else self.scaler.get_scale())
            return loss.detach()

        if self.config.optimizer == "lbfgs":
            self.fabric_optimizer.step(evaluate)
        else:
            evaluate()
        return evaluations[0]

    def _step(self, epoch: int, number: int) -> None:
        """Clip the gradients, and take the steps of optimiser, average and schedule after a batch."""
        if self.config.gradient_clip is not None:
            self.fabric.clip_gradients(
                self.compute_loss, self.fabric_optimizer, max_norm=self.config.gradient_clip, error_if_nonfinite=False
            )
        if self.config.optimizer != "lbfgs":
            self.fabric_optimizer.step()
        self.first_non_finite.see_parameters(number)
        self.trained.update_average((epoch - 1) * self.steps_per_epoch + (number - 1) // self.accumulate)
        if self.schedule is not None:
            self.schedule.step()

    def _save_and_stop_if_due(self, epoch: int, number: int, *, is_last: bool) -> None:
        """Save within an epoch if this is due on any rank, and end if any rank was asked to stop."""
        due = self.stop.signal or int(time.monotonic() - self.saved > 60 * self.config.checkpoint_minutes)
        if self.config.ranks > 1:
            due = int(greatest_over_ranks(torch.tensor(due, device=self.fabric.device)))
        if due and not is_last:
            self._check_finite(epoch)  # a run that has diverged is not resumed
            self._save(self.folder.last_checkpoint, epoch, number)
        if due > 1:
            self.stop.answer(due)

    def _end_epoch(self, epoch: int) -> None:
        """Log, measure and save."""
        self.stop.waits = self.config.ranks > 1
        values, row = self.log.end()
        self._check_finite(epoch)
        if self.fabric.is_global_zero:
            self.rows["training_log"].append({"epoch": epoch, **row})
            self.rows["gradients"] += [{"epoch": epoch, **sizes} for sizes in self.gradients]
            for name, rows in self.rows.items():
                write_csv(getattr(self.folder, name), pd.DataFrame(rows))
            if self.config.is_measured(epoch):
                values |= self._measure(epoch)
            self.fabric.log_dict(values | {"epoch": epoch - 1}, step=epoch * self.steps_per_epoch - 1)
        if self.config.is_kept(epoch):
            self._save(self.folder.checkpoint(epoch), epoch)
        self._save(
            self.folder.last_checkpoint, epoch
        )  # saved last, so that a run killed before repeats the epoch's end
        self.accuracy = values.get("test/accuracy", self.accuracy)
        self.progress.end_epoch(self.accuracy, is_last=epoch == self.config.epochs)

    def _measure(self, epoch: int) -> dict[str, float]:
        """Measure every split and record it in the folder; return the metrics by SPLIT/METRIC."""
        try:
            with evaluation_layout(self.trained):
                options = {**self.measure_options, "progress": False}
                measurements = measure_splits(self.trained, self.evaluation, Provenance(epoch=epoch), **options)
        except ValueError as error:
            if "finite" not in str(error):
                raise
            raise Diverged(
                f"training diverged in epoch {epoch}, after its last step: {error}; use a smaller learning rate"
            ) from error
        self.folder.record_splits(epoch, measurements)
        return {f"{split}/{name}": value for split, one in measurements.items() for name, value in one.metrics.items()}

    @property
    def measure_options(self) -> dict[str, Any]:
        """Arguments of `measure` for the model, during training and after it.

        Scatter products are taken in fp32, means and sums in fp64: at K = 10 in half the time of fp64 alone, with
        errors of about 1e-9 in metrics that are compared to three digits.
        """
        head: Any = self.trained.measured.head
        scatter = ClassMoments.required_bytes(*head.weight.shape, class_scatter=True) <= _CLASS_SCATTER_BYTES
        # The Gram matrix of a frame does not depend on its rotation.
        is_code = self.config.class_attributes is not None or self.config.code == "seli"
        code = head.weight.detach().clone() if is_code else None
        return {"classifier": head, "options": MeasureOptions(class_scatter=scatter, dtype="mixed", code=code)}

    def _check_finite(self, epoch: int) -> None:
        """Check that all values of the epoch so far are finite on all ranks; this causes a device sync.

        Raises:
            Diverged: if a feature, a loss or a parameter is not finite, except in batches that a gradient scaler skips.
        """
        first = self.first_non_finite.find(scaled=self.scaler is not None, of_all_ranks=True)
        if first is not None:
            raise self._diverged(epoch, *first)

    def _diverged(self, epoch: int, step: int, value: str) -> Diverged:
        setting = "optimizer_options.gain" if self.config.optimizer == "agd" else "lr"
        return Diverged(
            f"{setting} must be smaller: training diverged in epoch {epoch}, step {step}, where {value} is not finite"
        )

    def _save(self, path: Path, epoch: int, batches: int | None = None) -> None:
        """Save the state from which training resumes, after an epoch or after a number of its batches."""
        state: dict[str, Any] = {}
        if batches is not None:
            state = {"log": self.log.state(), "generators": generator_states(self.config.ranks)}
        if self.fabric.is_global_zero:
            state |= {
                "state_dict": self.trained.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": None if self.schedule is None else self.schedule.state_dict(),
                "scaler": None if self.scaler is None else self.scaler.state_dict(),
                "tables": self.rows | {"metrics": self.folder.metric_rows.load()},
            }
            self.files.save(path, epoch=epoch, batches=batches, state=state)
        self.saved = time.monotonic()

    def _resume(self) -> tuple[int, int]:
        """Restore the state saved by `_save`; return the epoch to train, and the number of its completed batches."""
        checkpoint = self.files.load(self.folder.last_checkpoint, resumed=self.trained)
        self.trained.load_state_dict(checkpoint["state_dict"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(checkpoint["schedule"])
        if self.scaler is not None:
            self.scaler.load_state_dict(checkpoint["scaler"])
        metrics = checkpoint["tables"].pop("metrics")
        self.rows = checkpoint["tables"]
        if self.fabric.is_global_zero:
            self.folder.metric_rows.add_missing(metrics)
        epoch, batches = checkpoint[PROVENANCE]["epoch"], checkpoint[PROVENANCE].get("batches")
        if batches is None:
            return epoch + 1, 0
        self.log = EpochLog(**checkpoint["log"])
        set_generator_states(checkpoint["generators"], self.rank)
        return epoch, batches


def new_model(
    config: RunConfig, data: ImageData, training_images: EvaluationBatches, *, assigned: int | None = None
) -> AttachedHead:
    """Return the model of a run before training, with a whitened first layer if the backbone has one.

    Args:
        config: All settings.
        data: Data to train on.
        training_images: Un-augmented batches of the train split.
        assigned: As for `build_model`.

    Raises:
        ValueError: as for `build_model`.
    """
    model = build_model(
        config,
        batch_shape(data.image_shape, config),
        data.num_classes,
        class_names=data.class_names,
        class_counts=data.train.labels.bincount(minlength=data.num_classes),
        assigned=assigned,
    )
    for backbone in model.modules():
        if isinstance(backbone, FastConvNet):
            backbone.whiten(some_images(training_images, _WHITENED_IMAGES))
    return model
