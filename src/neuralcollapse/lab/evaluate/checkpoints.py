"""Measure the checkpoints of a run after the fact, as they would have been measured while it trained."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from neuralcollapse.lab.data.batches import EvaluationBatches
from neuralcollapse.lab.experiments import single_run
from neuralcollapse.lab.models.backbones import evaluation_layout
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.locking import sole_writer
from neuralcollapse.lab.results.records import Records
from neuralcollapse.lab.results.tables import add_rows
from neuralcollapse.lab.training.checkpoint import PROVENANCE, CheckpointFiles
from neuralcollapse.lab.training.runs import Preparation
from neuralcollapse.lab.untrusted import check_class_is_named
from neuralcollapse.metrics import Measurement, Provenance
from neuralcollapse.metrics.measure import measure_splits

logger = logging.getLogger(__name__)


def measure_run(
    run: RunFolder,
    preparation: Preparation,
    *,
    every: int = 1,
    splits: Sequence[str] | None = None,
    layers: Sequence[str] = (),
    backbone: str | None = None,
    progress: bool = True,
) -> Iterator[Path | ValueError]:
    """Measure every saved checkpoint of a run that is not measured yet, and write tables and records.

    Until the iterator ends, no other process may write the folder.

    Args:
        run: Its folder.
        preparation: Of the data.
        every: Every so many of the saved checkpoints only, from the first on, and the last.
        splits: Which to measure; by default all.
        layers: Dotted names of modules of the model whose outputs are measured as well.
        backbone: The class that the run's settings name as its backbone, where they name one and it may be imported.
        progress: Show a progress bar.

    Yields:
        Each record written; or what was wrong with a checkpoint, which is left out.

    Raises:
        ValueError: The run has no checkpoints or no such split, its data cannot be had or have changed, or its settings
            name a class that ``backbone`` does not.
    """
    with sole_writer(run.path):
        checkpoints = sorted(run.checkpoints.glob("*.ckpt"), key=lambda path: (path == run.last_checkpoint, path.name))
        if not checkpoints:
            raise ValueError(f"run {str(run.path)!r} must have checkpoints to measure, and has none")
        settings = run.settings()
        check_class_is_named(settings, backbone, run.config)
        prepared = preparation.run(single_run({}, settings), run)
        run.check_data({"data_fingerprint": prepared.fingerprint})
        wanted, loaders = select_splits(prepared.evaluation, splits)
        measured = "model" if prepared.trained.average is None else "average"
        layers = [f"{measured}.{name}" for name in layers]
        records, files = Records(run), CheckpointFiles(prepared.config, prepared.fingerprint)
        chosen = [path for place, path in enumerate(checkpoints) if place % every == 0 or path == checkpoints[-1]]
        for path in tqdm(chosen, desc=run.path.name, unit="checkpoint", disable=None if progress else True):
            try:
                checkpoint = None if path != run.last_checkpoint else files.load(path)
                epoch = (
                    int(path.stem.removeprefix("epoch")) if checkpoint is None else int(checkpoint[PROVENANCE]["epoch"])
                )
                if is_measured(records, epoch, wanted, layers):
                    continue
                checkpoint = checkpoint or files.load(path)
                if "batches" in checkpoint[PROVENANCE]:
                    raise ValueError(f"the run was stopped inside epoch {epoch}; --resume goes on with it")
                prepared.trained.load_state_dict(checkpoint["state_dict"])
            except (ValueError, KeyError, RuntimeError) as error:
                yield ValueError(f"{str(path)!r} cannot be measured: {str(error).splitlines()[0]}")
                continue
            options = {**prepared.measure_options, "layers": layers, "progress": False}
            with evaluation_layout(prepared.trained):
                found = measure_splits(prepared.trained, loaders, Provenance(epoch=epoch), **options)
            yield from write_measurements(run, epoch, {split: found[split] for split in wanted})
            records = Records(run)


def is_measured(records: Records, epoch: int, splits: Sequence[str], layers: Sequence[str]) -> bool:
    """Return whether records of an epoch are there, sound and with these layers, and in the run's table as well.

    A command that was stopped may have left records that are in no table: they are measured again.
    """
    for split in splits:
        if not records.run.measurement(epoch, split).exists():
            return False
        try:
            record = records.load(epoch, split)
        except ValueError as error:
            logger.warning("measured again: %s", error)
            return False
        if not set(layers) <= set(record.layers) or not records.is_in_table(epoch, split, record):
            return False
    return True


def select_splits(
    loaders: Mapping[str, EvaluationBatches], splits: Sequence[str] | None
) -> tuple[list[str], dict[str, EvaluationBatches]]:
    """The splits that are asked for, by default all; and their batches, with those of the train split.

    The class means of the train split are what the others are measured against.

    Raises:
        ValueError: There is no such split.
    """
    wanted = list(loaders) if splits is None else list(splits)
    if unknown := [split for split in wanted if split not in loaders]:
        raise ValueError(f"split must be of {', '.join(loaders)}, got {unknown[0]!r}")
    return wanted, {split: batches for split, batches in loaders.items() if split in {"train", *wanted}}


def write_measurements(folder: RunFolder, epoch: int, found: Mapping[str, Measurement]) -> list[Path]:
    """Write a record of each split, and its metrics into the folder's table; the records."""
    rows = [(epoch, split, name, value) for split, one in found.items() for name, value in one.metrics.items()]
    records = [folder.measurement(epoch, split) for split in found]
    for record, one in zip(records, found.values(), strict=True):
        one.save(record)
    add_rows(folder.metrics, rows)
    return records
