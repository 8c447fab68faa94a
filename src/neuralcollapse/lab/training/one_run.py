"""One training run: a model, trained by lightning, measured after epochs."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from neuralcollapse._distributed import number_of_ranks, sum_over_ranks
from neuralcollapse.heads import Head
from neuralcollapse.lab.conditions import WITH_ATTRIBUTES
from neuralcollapse.lab.config import RunConfig
from neuralcollapse.lab.data.batches import EpochBatches, EvaluationBatches, batch_shape, evaluation_batches
from neuralcollapse.lab.data.images import ImageData
from neuralcollapse.lab.models.backbones import evaluation_layout
from neuralcollapse.lab.models.building import build_model
from neuralcollapse.lab.ranks import global_rank
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.provenance import shown_settings
from neuralcollapse.lab.seeds import derived_seed
from neuralcollapse.lab.stopping import on_sigterm
from neuralcollapse.lab.training.averaging import update_average
from neuralcollapse.lab.training.checkpoints import (
    PROVENANCE,
    Checkpointing,
    Owner,
    WholeCheckpoints,
    provenance,
    restore_generators,
)
from neuralcollapse.lab.training.devices import end_launched, lost_ranks
from neuralcollapse.lab.training.divergence import Diverged, FirstNonFinite
from neuralcollapse.lab.training.loggers import build_loggers, finish_loggers
from neuralcollapse.lab.training.logs import GradientLog, TrainingLog, keep_gradients
from neuralcollapse.lab.training.objective import batch_loss, penalty
from neuralcollapse.lab.training.optimizers import build_optimizer, build_schedule
from neuralcollapse.lightning import CollapseCallback
from neuralcollapse.metrics import ClassMoments, Measurement, MeasureOptions, alignment

# Each class's own scatter, from which layers have a numerical rank, takes K d² numbers: kept up to this many bytes.
_CLASS_SCATTER_BYTES = 2**28


class ClassifierTraining(LightningModule):
    """Training of a model that ends in a head.

    Args:
        config: All settings.
        data: What to train on.
        evaluation: The splits' un-augmented batches, to measure on; by default those of the data.

    Attributes:
        batch_figures: What the last batch gave in training mode: loss (with penalties), accuracy, top-5 accuracy and
            alignment, over all ranks. They are never compared: the head of the method `implicit` knows the labels of
            its batch.
        batch_samples: How many it had.
        head_tensors: If a dict, the features, weight and bias of the head in the last batch are added to it, and keep
            their gradients.

    Raises:
        ValueError: Settings that do not fit together, or do not fit the data.
    """

    def __init__(
        self, config: RunConfig, data: ImageData, evaluation: Mapping[str, EvaluationBatches] | None = None
    ) -> None:
        super().__init__()
        if len(data.train) < 2 * config.ranks:
            raise ValueError(f"devices must leave two training images to a rank, got {config.ranks} ranks for {data}")
        class_counts = data.train.labels.bincount(minlength=data.num_classes)
        present = int((class_counts > 0).sum())
        if (config.classes_per_batch or 0) > present:
            raise ValueError(
                f"classes_per_batch must be at most the number of classes with training images, which is {present}, "
                f"got {config.classes_per_batch}"
            )
        self.config = config
        self.data = data
        self.evaluation = evaluation_batches(data, config) if evaluation is None else evaluation
        shape = batch_shape(data.image_shape, config)
        self.model = build_model(
            config, shape, data.num_classes, class_names=data.class_names, class_counts=class_counts
        )
        # What is measured: with `weight_average` a copy of the model, of averaged weights.
        self.average = copy.deepcopy(self.model).requires_grad_(False) if config.weight_average else None
        self.batch_figures: dict[str, Tensor] = {}
        self._optimizer = build_optimizer(config, self.model)
        self._backbone = torch.compile(self.model.model.forward) if config.compile else self.model.model.forward
        self._sizes: list[int] = []
        self.batch_samples = 0
        self.head_tensors: dict[str, Tensor] | None = None
        self._seen = (-1, -1)
        self._first_non_finite = FirstNonFinite(self.model)
        self._resumed: dict[str, Any] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the model, or of its average, that is measured."""
        return self.get_submodule(self.measured)(images)

    @property
    def measured(self) -> str:
        """The name of the module that is measured."""
        return "model" if self.average is None else "average"

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take a step, then bring the average of the weights up to date."""
        super().optimizer_step(*args, **kwargs)
        self._first_non_finite.see_parameters(self._seen[1] + 1)
        if self.average is not None and self.config.weight_average is not None:
            update_average(self.average, self.model, share=self.config.weight_average, steps=self.global_step)

    def train_dataloader(self) -> EpochBatches:
        """The coming epoch's batches: lightning asks for them at every epoch."""
        batches = self._batches(self.current_epoch, self._resumed.get("batches", 0))
        self._sizes = batches.sizes
        return batches

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """The loss of one batch."""
        images, targets = batch
        try:
            features, weight, bias = self.head.prepare(self._backbone(images), targets)
        except ValueError as error:
            if "finite" not in str(error):
                raise
            found = self._first_non_finite.find(scaled=self.is_scaled)
            raise self._diverged(*(found or (batch_index + 1, "a feature"))) from error
        if self.head_tensors is not None:
            keep_gradients(self.head_tensors, features=features, weight=weight, bias=bias)
        logits, features = self.head.decide(features, weight, bias).float(), features.float()
        ranks, self.batch_samples = self.config.ranks, self._sizes[batch_index]
        share = ranks * len(targets) / self.batch_samples
        loss = batch_loss(self.config, logits, targets, features, weight, share)
        penalties = penalty(self.config, self.model, features, ranks)
        loss = loss if penalties is None else loss + penalties
        place = (self.current_epoch, batch_index)
        if place != self._seen:  # L-BFGS tries several points for a batch: the first counts
            self._seen = place
            self.batch_figures = self._figures(loss, logits, features, targets)
            self._first_non_finite.see_loss(batch_index + 1, self.batch_figures["batch_loss"], features)
        return loss * self._share_of_step(batch_index)

    def check_finite(self) -> None:
        """See whether training is still finite; waits for the device.

        Raises:
            Diverged: if a feature, a loss or a parameter of this epoch is not; a batch that a gradient scaler skips
                does not count.
        """
        found = self._first_non_finite.find(scaled=self.is_scaled, of_all_ranks=True)
        if found is not None:
            raise self._diverged(*found)

    @property
    def is_scaled(self) -> bool:
        """Whether losses are scaled, and steps that overflow skipped."""
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def _diverged(self, step: int, value: str) -> Diverged:
        setting = "gain" if self.config.optimizer == "agd" else "lr"
        return Diverged(
            f"{setting} must be smaller: training diverged in epoch {self.current_epoch + 1}, step {step}, where "
            f"{value} is not finite"
        )

    def on_train_epoch_start(self) -> None:
        """Make what the network draws, as dropout does, follow from the seed and the epoch alone."""
        torch.manual_seed(derived_seed(self.config.seed, self.current_epoch, 1) + self.global_rank)
        self._first_non_finite.begin_epoch()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep whose checkpoint it is, and where in the epoch."""
        checkpoint[PROVENANCE] = provenance(self.config, self.trainer, self.fingerprint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on where the checkpoint was written: inside an epoch, if it was written there."""
        self._resumed = checkpoint.get(PROVENANCE, {})

    def on_train_start(self) -> None:
        """Draw what the network would have drawn next inside an epoch."""
        if self.global_rank == 0:
            restore_generators(self._resumed)
        self._resumed = {}

    def configure_optimizers(self) -> Any:
        """The optimiser and its schedule, by the step."""
        schedule = build_schedule(
            self.config, self._optimizer, -(-len(self._batches(0)) // (self.config.accumulate or 1))
        )
        if schedule is None:
            return self._optimizer
        return {"optimizer": self._optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @cached_property
    def fingerprint(self) -> dict[str, dict[str, str]]:
        """The fingerprint of the data."""
        return self.data.fingerprint()

    @property
    def head(self) -> Head:
        """The model's head."""
        return self.model.head  # type: ignore[return-value]

    @property
    def measuring(self) -> dict[str, Any]:
        """Arguments of `measure` for its model, during training and after it.

        Scatter products are taken in fp32, means and sums in fp64: at K = 10 in half the time of fp64 alone, with
        errors of about 1e-9 in metrics that are compared to three digits.
        """
        head: Any = self.get_submodule(self.measured).head
        weight = head.weight
        scatter = ClassMoments.required_bytes(*weight.shape, class_scatter=True) <= _CLASS_SCATTER_BYTES
        # The Gram of a frame does not depend on its rotation.
        code = weight.detach().clone() if self.config.method in WITH_ATTRIBUTES else None
        return {"classifier": head, "options": MeasureOptions(class_scatter=scatter, dtype="mixed", code=code)}

    def _batches(self, epoch: int, done: int = 0) -> EpochBatches:
        standardise = self.evaluation["train"].standardise
        return EpochBatches(
            self.data.train,
            standardise,
            self.config,
            self.config.seed,
            epoch,
            done,
            self.global_rank,
            number_of_ranks(),
        )

    def _share_of_step(self, batch_index: int) -> float:
        """What a batch's loss is multiplied by, so that all samples of a step count alike.

        Lightning divides it by ``accumulate``, however many batches there are and of whatever size.
        """
        number = self.config.accumulate or 1
        first = batch_index - batch_index % number
        return number * self._sizes[batch_index] / sum(self._sizes[first : first + number])

    @torch.no_grad()
    def _figures(self, loss: Tensor, logits: Tensor, features: Tensor, targets: Tensor) -> dict[str, Tensor]:
        ranks, part = self.config.ranks, len(targets) / self.batch_samples
        centre = sum_over_ranks(part * features.mean(0))
        answers = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        figures = {
            "batch_loss": loss.detach() / ranks,
            "batch_accuracy": part * answers[:, 0].float().mean(),
            "batch_alignment": part * alignment(features, targets, self.head.weight, centre),
        }
        if logits.shape[1] > 5:
            figures["batch_accuracy_top5"] = part * answers.any(1).float().mean()
        return dict(zip(figures, sum_over_ranks(torch.stack(list(figures.values()))).unbind(), strict=True))


def train(module: ClassifierTraining, folder: RunFolder, *callbacks: Callback, resume: bool = True) -> None:
    """Train one run to its end, from its last checkpoint if there is one.

    Args:
        module: The model and what to train it on.
        folder: The run's, started.
        callbacks: Further callbacks of lightning.
        resume: Take its last checkpoint.

    Raises:
        Diverged: if a feature, the loss or a parameter is not finite.
        ValueError: if a checkpoint cannot be read or is of another model, or another rank is lost.
        KeyboardInterrupt: The user stopped it.
        Terminated: SIGTERM stopped it; where it was inside an epoch is saved.
    """
    config, last = module.config, folder.last_checkpoint
    loggers = build_loggers(config.loggers, folder) if global_rank() == 0 else []
    for logger in loggers:
        logger.log_hyperparams(shown_settings(config.in_force(), folder.path))
    device = module.data.train.labels.device
    checkpointing = Checkpointing(folder, config)
    # In scratch lightning leaves the checkpoint that it writes before it requeues; that of the folder is there before.
    with quiet_lightning(), on_sigterm(checkpointing.on_sigterm), TemporaryDirectory() as scratch:
        trainer = Trainer(
            accelerator=device.type,
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=DDPStrategy(broadcast_buffers=False) if config.ranks > 1 else "auto",
            sync_batchnorm=bool(config.sync_batchnorm),
            use_distributed_sampler=False,
            max_epochs=config.epochs,
            precision=cast(Any, config.precision if config.precision != "32" else "32-true"),
            gradient_clip_val=config.gradient_clip,
            accumulate_grad_batches=config.accumulate or 1,
            callbacks=[*_records(module, folder), *callbacks, checkpointing],
            plugins=[WholeCheckpoints(module.state_dict(), Owner(config, module.fingerprint))],
            reload_dataloaders_every_n_epochs=1,
            logger=loggers or False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=scratch,
        )
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                trainer.fit(module, ckpt_path=last if resume and last.exists() else None, weights_only=True)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise ValueError(f"compile must be off where torch.compile fails: {error}") from error
        except RuntimeError as error:
            told = lost_ranks(error) if config.ranks > 1 else None
            if told is None:
                raise
            raise ValueError(told) from error
        except SystemExit as exit:  # lightning's answer to Ctrl-C
            if isinstance(exit.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from exit
            raise
        finally:
            end_launched(trainer)
            finish_loggers(loggers)


class _RunMeasurements(CollapseCallback):
    """The measurements of a run, which ends where the features are not finite."""

    def measure(self, pl_module: LightningModule, epoch: int) -> dict[str, Measurement]:
        """Measure every split."""
        try:
            with evaluation_layout(pl_module):
                return super().measure(pl_module, epoch)
        except ValueError as error:
            if "finite" not in str(error):
                raise
            raise Diverged(
                f"training diverged in epoch {epoch}, after its last step: {error}; take a smaller learning rate"
            ) from error


def _records(module: ClassifierTraining, folder: RunFolder) -> list[Callback]:
    """What writes the run's tables."""
    collapse = _RunMeasurements(
        module.evaluation,
        every_n_epochs=module.config.measure_every,
        first_epoch=module.config.measure_from,
        last_epoch=module.config.measure_last is not False,
        csv=folder.metrics,
        moments=folder.moments,
        overwrite=True,  # of a run that was killed before its first checkpoint
        **module.measuring,
    )
    return [TrainingLog(folder.training_log), GradientLog(folder.gradients), collapse]


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
