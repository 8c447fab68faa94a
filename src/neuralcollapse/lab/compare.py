"""Train every method with every seed: the command ``neuralcollapse compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm.auto import tqdm

from neuralcollapse.lab.batches import evaluation_batches
from neuralcollapse.lab.config import CompareConfig
from neuralcollapse.lab.data import load_data
from neuralcollapse.lab.models import build_model, resolve_device
from neuralcollapse.lab.report import Comparison, report
from neuralcollapse.lab.runs import RunFolder
from neuralcollapse.lab.training import train


def compare(
    config: CompareConfig, out: Path, *, resume: bool = False, overwrite: bool = False, progress: bool = True
) -> Comparison:
    """Train every method with every seed, from the same weights and the same batches for each seed.

    Args:
        config: All settings.
        out: The folder to write.
        resume: Go on with what the folder holds.
        overwrite: Delete what the folder holds.
        progress: Show progress bars.

    Raises:
        ValueError: Settings, data or a folder that cannot be used.
        KeyboardInterrupt: The user stopped it; it can be resumed.
    """
    folder = RunFolder(out)
    folder.check(config, resume=resume, overwrite=overwrite)
    data = load_data(config, progress=progress).to(resolve_device(config.device))
    for method in config.method_names:  # what does not fit together fails here, before anything is written
        build_model(config.run(method, 0), data.image_shape, data.num_classes)
    folder.open(config, resume=resume, overwrite=overwrite)

    evaluation = evaluation_batches(data)
    runs = [(method, seed) for seed in range(config.seeds) for method in config.method_names]
    with tqdm(disable=not progress, unit="batch", unit_scale=True, smoothing=0.02, dynamic_ncols=True) as bar:
        for position, (method, seed) in enumerate(runs):
            run_config, run_folder = config.run(method, seed), folder.run(method, seed)
            run_folder.open(run_config, resume=True)
            shown = _Progress(bar, f"{method} seed {seed}", position, len(runs))
            try:
                train(run_config, data, evaluation, run_folder, shown)
            except ValueError as error:
                raise ValueError(f"{method} seed {seed}: {error}") from error
    return report(config, folder, f"{config.backbone} on {data}")


class _Progress(Callback):
    """Moves a bar that counts the batches of all runs."""

    def __init__(self, bar: tqdm, name: str, position: int, runs: int) -> None:
        self.bar = bar
        self.name = name
        self.position = position
        self.runs = runs

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stand where the run begins, or goes on."""
        batches = int(trainer.estimated_stepping_batches)
        done = self.position * batches + trainer.global_step
        if not self.bar.total:
            self.bar.initial = done  # what was done before this start does not count for the estimate
        self.bar.total, self.bar.n = self.runs * batches, done

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_index: int) -> None:
        """Say which epoch it is."""
        if batch_index == 0:
            self.bar.set_description(f"{self.name}, epoch {trainer.current_epoch + 1}/{trainer.max_epochs}")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """One more."""
        self.bar.update()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the test accuracy just measured."""
        accuracy = float(trainer.callback_metrics["test/accuracy"])
        self.bar.set_postfix_str(f"test accuracy {accuracy:.1%}")
