"""What a run writes while it trains: tables of what happened in each epoch."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from neuralcollapse.lab.results.files import write_csv
from neuralcollapse.lab.training.agd import AGD


class TableCallback(Callback):
    """Rows gathered during training, written to a CSV file and kept in checkpoints, so that a resumed run goes on.

    Args:
        path: The file; None for none.

    Attributes:
        rows: What was gathered so far.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: list[Any] = []

    def write(self, trainer: Trainer) -> None:
        """Write all rows so far."""
        if self.path is not None and trainer.is_global_zero:
            write_csv(self.path, pd.DataFrame(self.rows))

    def state_dict(self) -> dict[str, Any]:
        """The rows."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the rows of a checkpoint."""
        self.rows = list(state_dict["rows"])


class TrainingLog(TableCallback):
    """What training itself saw in each epoch, and how long it took without measuring."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._started = 0.0
        self._epoch: dict[str, Any] = {}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()
        self._epoch = {"rate": math.nan, "samples": 0, "sums": {}, "eta": 0.0, "steps": 0}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_index: int) -> None:
        """Keep the learning rate that the epoch begins with; AGD has none."""
        if batch_index == 0:
            self._epoch["rate"] = trainer.optimizers[0].param_groups[0].get("lr", math.nan)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        """Add what the batch gave, weighted by its samples, and keep AGD's step."""
        module: Any = pl_module
        samples, sums, figures = module.batch_samples, self._epoch["sums"], module.batch_figures
        if module.is_scaled:  # a batch that overflowed is skipped, and counts for nothing
            samples = samples * figures["batch_loss"].isfinite()
            figures = {name: torch.where(samples > 0, value, 0.0) for name, value in figures.items()}
        self._epoch["samples"] += samples
        for name, value in figures.items():
            sums[name] = sums.get(name, 0) + samples * value
        optimizer = trainer.optimizers[0]
        if isinstance(optimizer, AGD) and optimizer.eta is not None:
            self._epoch["eta"] += optimizer.eta
            self._epoch["steps"] += 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock, and write, unless training has diverged."""
        epoch = trainer.current_epoch + 1
        steps = self._epoch["steps"]
        figures = {name: float(total / self._epoch["samples"]) for name, total in self._epoch["sums"].items()}
        seconds = time.perf_counter() - self._started  # after the figures, which wait for the accelerator
        module: Any = pl_module
        module.check_finite()
        pl_module.log_dict(figures)
        if steps:
            figures["agd_eta"] = float(self._epoch["eta"] / steps)
        else:
            figures["lr"] = self._epoch["rate"]
        self.rows.append({"epoch": epoch, "seconds": seconds} | figures)
        self.write(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The rows, and the epoch so far."""
        return super().state_dict() | {"epoch": self._epoch, "seconds": time.perf_counter() - self._started}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on inside the epoch of a checkpoint."""
        super().load_state_dict(state_dict)
        self._epoch = state_dict.get("epoch", {})
        self._started = time.perf_counter() - state_dict.get("seconds", 0.0)


class GradientLog(TableCallback):
    """Size of each gradient at the last batch of each epoch: mean and largest magnitude, and norm.

    Of the parameters; and of the features, class means, weight and bias that a head makes of a batch, where they are
    not parameters and training is of one rank. An optimiser that evaluates gradients more often leaves the last ones,
    as does accumulation those of the head.
    """

    def __init__(self, path: Path | None) -> None:
        super().__init__(path)
        self._hook: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_index: int) -> None:
        """Have the head's tensors kept in an epoch's last batch."""
        module: Any = pl_module
        class_means = getattr(module.head, "class_means", None)
        if not trainer.is_last_batch or class_means is None or trainer.world_size > 1:
            return
        kept: dict[str, Tensor] = {}
        module.head_tensors = kept
        self._hook = class_means.register_forward_hook(lambda _, __, means: keep_gradients(kept, class_means=means[0]))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at the gradients."""
        if not trainer.is_last_batch:
            return
        epoch = trainer.current_epoch + 1
        self.rows = [row for row in self.rows if row["epoch"] < epoch]
        gradients = {name.removeprefix("model."): one.grad for name, one in pl_module.named_parameters()}
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()  # the parameters' gradients are divided by it already
        module: Any = pl_module
        for name, tensor in (module.head_tensors or {}).items():
            if tensor.grad is not None:
                gradients[f"head.{name}"] = tensor.grad.float() / scale
        for name, gradient in gradients.items():
            if gradient is not None:
                size = gradient.abs()
                figures = torch.stack([size.mean(), size.max(), torch.linalg.vector_norm(size)]).tolist()
                row = dict(zip(("mean", "max", "norm"), figures, strict=True))
                self.rows.append({"epoch": epoch, "parameter": name} | row)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        """Let go of the head's tensors."""
        module: Any = pl_module
        module.head_tensors = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write."""
        self.write(trainer)


def keep_gradients(kept: dict[str, Tensor], **tensors: Tensor | None) -> None:
    """Add tensors to those kept, where they will have a gradient that is not a parameter's."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and not tensor.is_leaf:
            tensor.retain_grad()
            kept[name] = tensor
