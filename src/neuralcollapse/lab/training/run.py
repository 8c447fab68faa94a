"""One training run: data, model, optimiser and schedule; then the loop that trains, logs, measures and saves."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from neuralcollapse._distributed import greatest_over_ranks
from neuralcollapse.lab.config import RunConfig, derived_seed
from neuralcollapse.lab.data.batches import EpochBatches, EvaluationBatches, batch_shape, evaluation_batches
from neuralcollapse.lab.data.images import ImageData
from neuralcollapse.lab.models.backbones import evaluation_layout
from neuralcollapse.lab.models.build import build_model
from neuralcollapse.lab.ranks import global_rank
from neuralcollapse.lab.results.files import write_csv
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.tables import COLUMNS, read_table
from neuralcollapse.lab.stopping import stop_requests
from neuralcollapse.lab.training.agd import AGD
from neuralcollapse.lab.training.checkpoint import PROVENANCE, CheckpointFiles
from neuralcollapse.lab.training.distributed import launched_fabric
from neuralcollapse.lab.training.objective import Diverged, FirstNonFinite, Objective
from neuralcollapse.lab.training.optimizers import TrainedModel, build_optimizer, build_schedule
from neuralcollapse.lab.training.progress import Progress, open_loggers
from neuralcollapse.metrics import ClassMoments, MeasureOptions, Provenance
from neuralcollapse.metrics.measure import measure_splits

# The scatter of each class, from which layers have a numerical rank, takes K d² numbers: kept up to this many bytes.
_CLASS_SCATTER_BYTES = 2**28


class Run:
    """A run that is ready to be trained: everything that its settings can refuse is built.

    Args:
        config: All settings.
        data: Data to train on.
        evaluation: Un-augmented batches of each split, to measure on; by default those of the data.

    Attributes:
        trained: The model, and the average of its weights if there is one.

    Raises:
        ValueError: if settings do not fit together, or do not fit the data.
    """

    def __init__(
        self, config: RunConfig, data: ImageData, evaluation: Mapping[str, EvaluationBatches] | None = None
    ) -> None:
        if len(data.train) < 2 * config.ranks:
            raise ValueError(f"devices must leave two training images to a rank, got {config.ranks} ranks for {data}")
        class_counts = data.train.labels.bincount(minlength=data.num_classes)
        present = int((class_counts > 0).sum())
        if (config.classes_per_batch or 0) > present:
            raise ValueError(
                f"classes_per_batch must be at most the number of classes with training images, which is {present}, "
                f"got {config.classes_per_batch}"
            )
        self.config, self.data, self.rank = config, data, 0
        self.evaluation = evaluation_batches(data, config) if evaluation is None else evaluation
        shape = batch_shape(data.image_shape, config)
        model = build_model(config, shape, data.num_classes, class_names=data.class_names, class_counts=class_counts)
        self.trained = TrainedModel(model, config.weight_average)
        self.optimizer = build_optimizer(config, model)
        self.accumulate = config.accumulate or 1
        self.steps_per_epoch = math.ceil(len(self.batches(1)) / self.accumulate)
        self.schedule = build_schedule(config, self.optimizer, self.steps_per_epoch)
        self.first_non_finite = FirstNonFinite(model)

    def batches(self, epoch: int, done: int = 0) -> EpochBatches:
        """Return this rank's batches of an epoch, counted from 1, without those that are done."""
        standardise, config = self.evaluation["train"].standardise, self.config
        return EpochBatches(self.data.train, standardise, config, config.seed, epoch - 1, done, self.rank, config.ranks)

    def train(self, folder: RunFolder, progress: Progress | None = None) -> None:
        """Train to the end, from the last checkpoint if there is one.

        Args:
            folder: Folder of the run, begun.
            progress: Where to show how far it is.

        Raises:
            Diverged: if a feature, the loss or a parameter is not finite.
            ValueError: if a checkpoint cannot be read or is of another model, or another rank is lost.
            KeyboardInterrupt: if Ctrl-C stopped it, after the step in progress was saved.
            Terminated: if SIGTERM stopped it, after the step in progress was saved.
        """
        config, device = self.config, self.data.train.labels.device
        self.folder, self.progress = folder, progress or Progress(shown=False)
        with (
            open_loggers(config, folder) if global_rank() == 0 else nullcontext([]) as loggers,
            stop_requests() as self.stop,
            launched_fabric(config, device, loggers) as self.fabric,
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        ):
            first, done = self._set_up()
            self.progress.begin(config.epochs * len(self.batches(1)), (first - 1) * len(self.batches(1)) + done)
            for epoch in range(first, config.epochs + 1):
                self._train_epoch(epoch, done)
                self._end_epoch(epoch)
                done = 0
            self.stop.answer()

    def _set_up(self) -> tuple[int, int]:
        """Wrap model and optimiser, and load the last checkpoint; return the first epoch and its batches done."""
        model, self.rank = self.trained.model, self.fabric.global_rank
        if self.config.sync_batchnorm:
            self.trained.model = model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.trained.to(self.fabric.device)
        self.objective = Objective(self.config, model)
        self.compute_loss, self.fabric_optimizer = self.fabric.setup(self.objective, self.optimizer)
        self.scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        self.trained.train()
        self.stop.waits = self.config.ranks > 1  # with several ranks, none stops alone
        self.files = CheckpointFiles(self.config, self.fingerprint)
        self.rows: dict[str, list[dict[str, Any]]] = {"training_log": [], "gradients": []}
        self.accuracy: float | None = None
        self.saved = time.monotonic()
        if not self.fabric.broadcast(self.folder.last_checkpoint.exists()):
            return 1, 0
        return self._resume(self.files.load(self.folder.last_checkpoint, resumed=self.trained))

    def _train_epoch(self, epoch: int, done: int) -> None:
        """Train on the batches of an epoch that are not done."""
        if not done:  # what the network draws, as dropout does, follows from seed, epoch and rank alone
            torch.manual_seed(derived_seed(self.config.seed, epoch - 1, 1) + self.fabric.global_rank)
            self.log = EpochLog(self.optimizer.param_groups[0].get("lr", math.nan))
        self.first_non_finite.begin_epoch()
        self.progress.begin_epoch(epoch, self.config.epochs)
        self.stop.waits = True
        batches = self.batches(epoch, done)
        for number, (images, targets) in enumerate(batches, start=done + 1):
            batch = Batch(epoch, number, images, targets, batches.sizes, self.accumulate)
            try:
                metrics = self._train_batch(batch)
            except ValueError as error:
                if "finite" not in str(error):
                    raise
                first = self.first_non_finite.find(scaled=self.scaler is not None)
                raise self._diverged(epoch, *(first or (number, "a feature"))) from error
            self.log.add(metrics, batch.samples, skips=self.scaler is not None)
            if isinstance(self.optimizer, AGD) and self.optimizer.eta is not None:
                self.log.add_eta(self.optimizer.eta)
            self.progress.end_batch(is_last=batch.is_last)
            if batch.is_step:
                self._save_and_stop_if_due(batch)

    def _train_batch(self, batch: Batch) -> dict[str, Tensor]:
        """Compute gradients, and take a step if enough batches are accumulated; return the training metrics."""
        results: list[dict[str, Tensor]] = []
        evaluate = partial(self._evaluate, batch, results)
        if self.config.optimizer == "lbfgs":
            self.fabric_optimizer.step(evaluate)
        else:
            evaluate()
            if batch.is_step and self.config.gradient_clip is not None:
                options = {"max_norm": self.config.gradient_clip, "error_if_nonfinite": False}
                self.fabric.clip_gradients(self.compute_loss, self.fabric_optimizer, **options)
            if batch.is_step:
                self.fabric_optimizer.step()
        if batch.is_step:
            self.first_non_finite.see_parameters(batch.number)
            self.trained.update_average(
                self.steps_per_epoch * (batch.epoch - 1) + (batch.number - 1) // self.accumulate
            )
            if self.schedule is not None:
                self.schedule.step()
        return results[0]

    def _evaluate(self, batch: Batch, results: list[dict[str, Tensor]]) -> Tensor:
        """Compute loss and gradients of a batch; L-BFGS does so at several points, of which the first is logged."""
        has_means = getattr(self.trained.model.head, "class_means", None) is not None
        self.objective.head_tensors = {} if has_means and batch.is_last and self.config.ranks == 1 else None
        with self.fabric.no_backward_sync(self.compute_loss, enabled=not batch.is_step):
            loss, metrics, features = self.compute_loss(batch.images, batch.targets, batch.samples)
            if not results:
                results.append(metrics)
                self.first_non_finite.see_loss(batch.number, metrics["batch_loss"], features)
            if batch.is_first:
                self.optimizer.zero_grad()
            self.fabric.backward(loss * batch.weight / self.accumulate)
        if batch.is_last and self.fabric.is_global_zero:
            self.gradients = gradient_rows(
                batch.epoch, self.objective, 1.0 if self.scaler is None else self.scaler.get_scale()
            )
        return loss.detach()

    def _save_and_stop_if_due(self, batch: Batch) -> None:
        """Save inside an epoch if that is due on any rank, and end if any was asked to."""
        is_late = time.monotonic() - self.saved > 60 * self.config.checkpoint_minutes
        due = self.stop.signal or int(is_late)
        if self.config.ranks > 1:
            due = int(greatest_over_ranks(torch.tensor(due, device=self.fabric.device)))
        if due and not batch.is_last:
            self._check_finite(batch.epoch)  # a run that has diverged is not resumed
            self._save(self.folder.last_checkpoint, batch.epoch, batch.number)
        if due > 1:
            self.stop.answer(due)

    def _end_epoch(self, epoch: int) -> None:
        """Log, measure and save."""
        self.stop.waits = self.config.ranks > 1
        values, row = self.log.end(epoch)
        self._check_finite(epoch)
        if self.fabric.is_global_zero:
            self.rows["training_log"].append(row)
            self.rows["gradients"] += self.gradients
            for name, rows in self.rows.items():
                write_csv(getattr(self.folder, name), pd.DataFrame(rows))
            if self.config.is_measured(epoch):
                values |= self._measure(epoch)
            self.fabric.log_dict(values | {"epoch": epoch - 1}, step=epoch * self.steps_per_epoch - 1)
        if self.config.is_kept(epoch):
            self._save(self.folder.checkpoint(epoch), epoch)
        self._save(self.folder.last_checkpoint, epoch)  # last: a run that is killed before it writes the other again
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
                f"training diverged in epoch {epoch}, after its last step: {error}; take a smaller learning rate"
            ) from error
        for split, measurement in measurements.items():
            self.folder.record(epoch, split, measurement)
        return {f"{split}/{name}": value for split, one in measurements.items() for name, value in one.metrics.items()}

    @property
    def measure_options(self) -> dict[str, Any]:
        """Arguments of `measure` for the model, during training and after it.

        Scatter products are taken in fp32, means and sums in fp64: at K = 10 in half the time of fp64 alone, with
        errors of about 1e-9 in metrics that are compared to three digits.
        """
        head: Any = self.trained.measured.head
        scatter = ClassMoments.required_bytes(*head.weight.shape, class_scatter=True) <= _CLASS_SCATTER_BYTES
        # The Gram of a frame does not depend on its rotation.
        code = head.weight.detach().clone() if self.config.class_attributes is not None else None
        return {"classifier": head, "options": MeasureOptions(class_scatter=scatter, dtype="mixed", code=code)}

    @cached_property
    def fingerprint(self) -> dict[str, dict[str, str]]:
        """Fingerprint of the data."""
        return self.data.fingerprint()

    def _check_finite(self, epoch: int) -> None:
        """Check that the epoch was finite so far on all ranks; waits for the device.

        Raises:
            Diverged: if a feature, a loss or a parameter is not; a batch that a gradient scaler skips does not count.
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
        """Save all that training resumes from, after an epoch or after a number of its batches."""
        state: dict[str, Any] = {}
        if batches is not None:
            accelerators = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
            state = {"log": self.log.state(), "generators": self._of_ranks([torch.get_rng_state(), *accelerators])}
        if self.fabric.is_global_zero:
            state |= {
                "state_dict": self.trained.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": None if self.schedule is None else self.schedule.state_dict(),
                "scaler": None if self.scaler is None else self.scaler.state_dict(),
                "tables": self.rows | {"metrics": _rows(self.folder.metrics)},
            }
            self.files.save(path, epoch=epoch, batches=batches, state=state)
        self.saved = time.monotonic()

    def _resume(self, checkpoint: dict[str, Any]) -> tuple[int, int]:
        """Restore what `_save` saved; return the epoch to train, and the number of its batches that are done."""
        self.trained.load_state_dict(checkpoint["state_dict"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for part, name in ((self.schedule, "schedule"), (self.scaler, "scaler")):
            if part is not None:
                part.load_state_dict(checkpoint[name])
        epoch, batches = checkpoint[PROVENANCE]["epoch"], checkpoint[PROVENANCE].get("batches", 0)
        metrics = checkpoint["tables"].pop("metrics")
        self.rows = checkpoint["tables"]
        if self.fabric.is_global_zero:
            _restore_metrics(self.folder.metrics, metrics)
        if not batches:
            return epoch + 1, 0
        self.log = EpochLog(**checkpoint["log"])
        generators = checkpoint["generators"]
        if len(generators) == self.config.ranks:
            of_cpu, *of_accelerators = generators[self.fabric.global_rank]
            torch.set_rng_state(of_cpu)
            torch.cuda.set_rng_state_all(of_accelerators[: torch.cuda.device_count()])
        return epoch, batches

    def _of_ranks(self, states: list[Tensor]) -> list[list[Tensor]]:
        """Return the states of the generators of all ranks."""
        gathered: list[Any] = [states] * self.config.ranks
        if self.config.ranks > 1:
            torch.distributed.all_gather_object(gathered, states)
        return gathered


@dataclass(frozen=True)
class Batch:
    """This rank's part of a batch, and its place in the epoch.

    Attributes:
        epoch: Epoch, counted from 1.
        number: Number of the batch in its epoch, counted from 1.
        images: (N, C, H, W).
        targets: (N,).
        sizes: Number of samples of each batch of the epoch, over all ranks.
        accumulate: Number of batches whose gradients a step takes together.
    """

    epoch: int
    number: int
    images: Tensor
    targets: Tensor
    sizes: list[int]
    accumulate: int

    @property
    def samples(self) -> int:
        """Number of samples over all ranks."""
        return self.sizes[self.number - 1]

    @property
    def weight(self) -> float:
        """Factor of the loss, whose mean over ``accumulate`` batches then weights all samples of a step alike."""
        first = self.number - 1 - (self.number - 1) % self.accumulate
        return self.accumulate * self.samples / sum(self.sizes[first : first + self.accumulate])

    @property
    def is_first(self) -> bool:
        """Whether it is the first of a step."""
        return (self.number - 1) % self.accumulate == 0

    @property
    def is_step(self) -> bool:
        """Whether a step follows."""
        return self.is_last or self.number % self.accumulate == 0

    @property
    def is_last(self) -> bool:
        """Whether it is the last of the epoch."""
        return self.number == len(self.sizes)


@dataclass
class EpochLog:
    """Training metrics of an epoch so far, as sums weighted by samples, and the time that it took.

    Attributes:
        lr: Learning rate at its beginning; NaN for AGD, which has none.
        samples: Number of samples; those of a batch that overflowed and was skipped do not count.
        sums: Sum of each metric.
        eta: Sum of the steps η of AGD.
        steps: Number of these.
        seconds: Time before training resumed inside the epoch.
    """

    lr: float
    samples: int | Tensor = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    eta: float | Tensor = 0.0
    steps: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._started = time.perf_counter() - self.seconds

    def add(self, metrics: dict[str, Tensor], samples: int | Tensor, *, skips: bool) -> None:
        """Add a batch; if steps that overflow are skipped, only where the loss is finite."""
        if skips:
            samples = samples * metrics["batch_loss"].isfinite()
            metrics = {name: torch.where(samples > 0, value, 0.0) for name, value in metrics.items()}
        self.samples += samples
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + samples * value

    def add_eta(self, eta: Tensor) -> None:
        """Add the step η that AGD took last."""
        self.eta += eta
        self.steps += 1

    def end(self, epoch: int) -> tuple[dict[str, float], dict[str, Any]]:
        """Return the metrics of the epoch, and its row of the training log; this waits for the device."""
        metrics = {name: float(total / self.samples) for name, total in self.sums.items()}
        row = {"epoch": epoch, "seconds": time.perf_counter() - self._started, **metrics}
        return metrics, row | ({"agd_eta": float(self.eta / self.steps)} if self.steps else {"lr": self.lr})

    def state(self) -> dict[str, Any]:
        """Return the fields, to save."""
        names = (one.name for one in fields(self))
        return {name: getattr(self, name) for name in names} | {"seconds": time.perf_counter() - self._started}


def gradient_rows(epoch: int, objective: Objective, scale: float) -> list[dict[str, Any]]:
    """Return the size of each gradient after an epoch's last batch: mean and largest magnitude, and norm.

    They are of the parameters; and of the features, class means, weight and bias that a head makes of a batch, where
    they are not parameters and training is of one rank. An optimiser that evaluates gradients at several points leaves
    the last ones, as does accumulation those of the head.
    """
    gradients = {name: parameter.grad for name, parameter in objective.model.named_parameters()}
    for name, tensor in (objective.head_tensors or {}).items():
        gradients[f"head.{name}"] = None if tensor.grad is None else tensor.grad.float()
    rows = []
    for name, gradient in gradients.items():
        if gradient is not None:
            size = (gradient / scale).abs()
            sizes = torch.stack([size.mean(), size.max(), torch.linalg.vector_norm(size)]).tolist()
            rows.append({"epoch": epoch, "parameter": name, **dict(zip(("mean", "max", "norm"), sizes, strict=True))})
    return rows


def _rows(path: Path) -> list[tuple[Any, ...]]:
    """Return the rows of the table of metrics; none where there is none."""
    return list(read_table(path)[COLUMNS].itertuples(index=False, name=None)) if path.exists() else []


def _restore_metrics(path: Path, rows: list[tuple[Any, ...]]) -> None:
    """Write the rows of a checkpoint that the table of metrics lacks."""
    kept = _rows(path)
    known = {row[:3] for row in kept}
    if missing := [row for row in rows if row[:3] not in known]:
        write_csv(path, pd.DataFrame(sorted([*kept, *missing], key=lambda row: row[0]), columns=COLUMNS))
