"""Loggers beside the CSV files that every run writes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from neuralcollapse.lab.results.folder import RunFolder


def check_loggers(names: Sequence[str]) -> None:
    """See that these loggers can be used.

    Raises:
        ValueError: A package is not installed, or there is no access to W&B.
    """
    for name in names:
        if find_spec(name) is None:
            raise ValueError(f"loggers can name {name} where it is installed, and it is not: pip install {name}")
    if "wandb" in names and os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
        import wandb

        if not wandb.api.api_key:
            raise ValueError(
                "loggers can name wandb after `wandb login`, or with WANDB_MODE=offline in the environment"
            )


def build_loggers(names: Sequence[str], folder: RunFolder) -> list[Logger]:
    """Loggers of a run that write into its folder; W&B's also to its service, unless WANDB_MODE is offline.

    Args:
        names: ``"tensorboard"``, ``"wandb"``.
        folder: The run's.
    """
    makers = {
        "tensorboard": lambda: TensorBoardLogger(folder.path, name="tensorboard", version=""),
        "wandb": lambda: WandbLogger(project="neuralcollapse", name=folder.path.name, save_dir=folder.path),
    }
    return [makers[name]() for name in names]


def finish_loggers(loggers: Sequence[Logger]) -> None:
    """End what they log to: else W&B's would go on with the next run of this process."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
