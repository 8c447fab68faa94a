"""Measure the checkpoints of a run after the fact, as they would have been measured while it trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from neuralcollapse.lab.data.batches import EvaluationBatches
from neuralcollapse.lab.experiments import single_run
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.locking import check_free, sole_writer
from neuralcollapse.lab.results.tables import add_rows
from neuralcollapse.lab.training.checkpoints import PROVENANCE, WholeCheckpoints
from neuralcollapse.lab.training.collapse_callback import measure_splits
from neuralcollapse.lab.training.many_runs import Preparation
from neuralcollapse.metrics import Measurement


def measure_run(
    run: RunFolder,
    preparation: Preparation,
    *,
    every: int = 1,
    splits: Sequence[str] | None = None,
    layers: Sequence[str] = (),
    progress: bool = True,
) -> Iterator[Path | ValueError]:
    """Measure every saved checkpoint of a run that is not measured yet, and write tables and records.

    Args:
        run: Its folder.
        preparation: Of the data.
        every: Every so many of the saved checkpoints only, from the first on, and the last.
        splits: Which to measure; by default all.
        layers: Dotted names of modules of the model whose outputs are measured as well.
        progress: Show a progress bar.

    Yields:
        Each record written; or what was wrong with a checkpoint, which is left out.

    Raises:
        ValueError: The run has no checkpoints or no such split, or its data cannot be had.
    """
    check_free(run.path)
    checkpoints = sorted(run.checkpoints.glob("*.ckpt"), key=lambda path: (path == run.last_checkpoint, path.name))
    if not checkpoints:
        raise ValueError(f"run {str(run.path)!r} must have checkpoints to measure, and has none")
    module = preparation.module(single_run({}, run.settings()), run)
    wanted, loaders = select_splits(module.evaluation, splits)
    layers = [f"{module.measured}.{name}" for name in layers]
    chosen = [path for place, path in enumerate(checkpoints) if place % every == 0 or path == checkpoints[-1]]
    for path in tqdm(chosen, desc=run.path.name, unit="checkpoint", disable=None if progress else True):
        try:
            checkpoint = None if path != run.last_checkpoint else WholeCheckpoints().load_checkpoint(path)
            epoch = int(path.stem.removeprefix("epoch")) if checkpoint is None else int(checkpoint["epoch"]) + 1
            if all(_is_there(run.measurement(epoch, split), layers) for split in wanted):
                continue
            checkpoint = checkpoint or WholeCheckpoints().load_checkpoint(path)
            if "batches" in checkpoint.get(PROVENANCE, {}):
                raise ValueError(f"the run was stopped inside epoch {epoch}; --resume goes on with it")
            module.load_state_dict(checkpoint["state_dict"])
        except (ValueError, KeyError, RuntimeError) as error:
            yield ValueError(f"{str(path)!r} cannot be measured: {str(error).splitlines()[0]}")
            continue
        found = measure_splits(
            module,
            loaders,
            **module.measuring,
            layers=layers,
            epoch=epoch,
            progress=False,
        )
        with sole_writer(run.path):
            records = write_measurements(run, epoch, {split: found[split] for split in wanted})
        yield from records


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


def _is_there(path: Path, layers: Sequence[str]) -> bool:
    if not path.exists():
        return False
    return not layers or set(layers) <= set(Measurement.load(path).layers)
