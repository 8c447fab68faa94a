"""What every command that trains does first: see that all fits together, then open the folder."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch

from neuralcollapse.lab.config import CompareConfig, RunConfig
from neuralcollapse.lab.data.batches import EvaluationBatches, evaluation_batches
from neuralcollapse.lab.data.loading import load_data
from neuralcollapse.lab.data.splits import ImageData
from neuralcollapse.lab.results.folder import RunFolder, write_whole
from neuralcollapse.lab.training.devices import resolve_device
from neuralcollapse.lab.training.loggers import check_loggers
from neuralcollapse.lab.training.one_run import check_model


def prepare(
    config: RunConfig | CompareConfig,
    models: Sequence[RunConfig],
    folder: RunFolder,
    *,
    resume: bool,
    overwrite: bool,
    progress: bool,
) -> tuple[ImageData, dict[str, EvaluationBatches]]:
    """Load the data, check all settings against them, and only then open the folder.

    Args:
        config: What the folder is to hold.
        models: Settings of each kind of model that is to be trained.
        folder: Where to write.
        resume: Go on with what the folder holds.
        overwrite: Delete what the folder holds.
        progress: Show a progress bar.

    Returns:
        The data on the training device, with the labels that the folder keeps if they are not the data set's own,
        and the splits' batches to measure on.

    Raises:
        ValueError: Settings, data or a folder that cannot be used; nothing was written.
    """
    folder.check(config, resume=resume, overwrite=overwrite)
    check_loggers(config.logger_names)
    data = load_data(config, progress=progress).to(resolve_device(config.device))
    if data.relabelled and resume and folder.train_labels.exists():
        data = _with_kept_labels(data, folder)
    for model in models:
        check_model(model, data)
    evaluation = evaluation_batches(data, config)
    folder.open(config, resume=resume, overwrite=overwrite)
    if data.relabelled and not folder.train_labels.exists():
        labels = pd.DataFrame({"label": data.train.labels.cpu().numpy()})
        write_whole(folder.train_labels, lambda path: labels.to_csv(path, index_label="image"))
    return data, evaluation


def _with_kept_labels(data: ImageData, folder: RunFolder) -> ImageData:
    try:
        labels = torch.tensor(pd.read_csv(folder.train_labels)["label"].tolist())
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(folder.train_labels)!r} must hold the labels trained on: {error}") from error
    return data.with_train_labels(labels)
