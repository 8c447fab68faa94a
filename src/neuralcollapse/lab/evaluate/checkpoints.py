"""Measurement of the checkpoints of a run after training, with the same results as during training."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from neuralcollapse.lab.data.batches import EvaluationBatches
from neuralcollapse.lab.experiments import single_run
from neuralcollapse.lab.models.backbones import evaluation_layout
from neuralcollapse.lab.results.files import sole_writer
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.records import Records
from neuralcollapse.lab.results.tables import add_rows
from neuralcollapse.lab.training.checkpoint import PROVENANCE, CheckpointFiles
from neuralcollapse.lab.training.run import Run
from neuralcollapse.lab.training.runs import Preparation
from neuralcollapse.lab.untrusted import check_class_is_named
from neuralcollapse.metrics import Measurement, Provenance
from neuralcollapse.metrics.measure import Layers, measure_splits

logger = logging.getLogger(__name__)


def measure_run(
    run: RunFolder,
    preparation: Preparation,
    *,
    every: int = 1,
    splits: Sequence[str] | None = None,
    layers: Layers = (),
    probes: bool = False,
    backbone: str | None = None,
) -> Iterator[Path | ValueError]:
    """Measure the saved checkpoints of a run that are not measured yet, and write tables and records.

    The folder is locked for other processes until the iterator ends.

    Args:
        run: Folder of the run.
        preparation: Data, loaded once for several runs, and whether progress is shown.
        every: Measure every n-th of the saved checkpoints, from the first one on, and the last checkpoint.
        splits: Splits to measure; by default all.
        layers: Dotted names of modules of the model whose outputs are measured as well, or ``"blocks"``.
        probes: Include the errors of probes and the effective depth, as for `measure`.
        backbone: Class that may be imported if the settings of the run name it as their backbone.

    Yields:
        Each written record, or a ValueError for a skipped checkpoint.

    Raises:
        ValueError: if the run has no checkpoints or lacks a split, its data cannot be loaded or have changed, or its
            settings name a class other than ``backbone``.
    """
    with sole_writer(run.path):
        paths = checkpoint_files(run)
        prepared = saved_run(run, preparation, backbone)
        splits, loaders = select_splits(prepared.evaluation, splits)
        layers = prepared.trained.measured_layers(layers)
        records, files = Records(run), CheckpointFiles(prepared.config, prepared.fingerprint)
        chosen = [path for index, path in enumerate(paths) if index % every == 0 or path == paths[-1]]
        shown = None if preparation.progress else True
        for path in tqdm(chosen, desc=run.path.name, unit="checkpoint", disable=shown):
            try:
                # The name of the last checkpoint does not contain its epoch; others are not read if already measured.
                checkpoint = files.load(path) if path == run.last_checkpoint else None
                epoch = int(checkpoint[PROVENANCE]["epoch"] if checkpoint else path.stem.removeprefix("epoch"))
                if is_measured(records, epoch, splits, layers, probes=probes):
                    continue
                checkpoint = checkpoint or files.load(path)
                if "batches" in checkpoint[PROVENANCE]:
                    raise ValueError(f"the run was stopped within epoch {epoch}; resume it with --resume")
                prepared.trained.load_state_dict(checkpoint["state_dict"])
            except (ValueError, KeyError, RuntimeError) as error:
                yield ValueError(f"{str(path)!r} cannot be measured: {str(error).splitlines()[0]}")
                continue
            options = {**prepared.measure_options, "layers": layers, "probes": probes, "progress": False}
            with evaluation_layout(prepared.trained):
                measurements = measure_splits(prepared.trained, loaders, Provenance(epoch=epoch), **options)
            yield from write_measurements(run, epoch, {split: measurements[split] for split in splits})
            records = Records(run)


def checkpoint_files(run: RunFolder) -> list[Path]:
    """Return the files of the checkpoints of a run, the last one at the end.

    Raises:
        ValueError: if the run has no checkpoints.
    """
    paths = sorted(run.checkpoints.glob("*.ckpt"), key=lambda path: (path == run.last_checkpoint, path.name))
    if not paths:
        raise ValueError(f"run {str(run.path)!r} must have checkpoints to measure, but has none")
    return paths


def chosen_checkpoints(
    run: RunFolder, paths: Sequence[Path], files: CheckpointFiles, epochs: str | Sequence[int]
) -> dict[int, Path]:
    """Return the chosen checkpoints by epoch, in order.

    Raises:
        ValueError: if an epoch has no checkpoint, or the run was stopped within its first epoch.
    """
    numbers = {path: path.stem.removeprefix("epoch") for path in paths}
    checkpoints = {int(number): path for path, number in numbers.items() if number.isdecimal()}
    if run.last_checkpoint in paths:
        provenance = files.load(run.last_checkpoint)[PROVENANCE]
        if "batches" not in provenance:
            checkpoints[provenance["epoch"]] = run.last_checkpoint
        elif not checkpoints:
            raise ValueError(
                f"run {str(run.path)!r} must have a checkpoint of the end of an epoch, but was stopped within epoch "
                f"{provenance['epoch']}; resume it with --resume"
            )
    chosen = {"last": [max(checkpoints)], "all": sorted(checkpoints)}[epochs] if isinstance(epochs, str) else epochs
    if missing := [epoch for epoch in chosen if epoch not in checkpoints]:
        raise ValueError(
            f"epochs must have a checkpoint in {str(run.checkpoints)!r}, which has those of "
            f"{', '.join(map(str, sorted(checkpoints)))}, got {missing[0]}"
        )
    return {epoch: checkpoints[epoch] for epoch in sorted(set(chosen))}


def saved_run(run: RunFolder, preparation: Preparation, backbone: str | None) -> Run:
    """Return a run in its state before training, with its data.

    Args:
        run: Folder of the run.
        preparation: Data, loaded once for several runs.
        backbone: Class that may be imported if the settings of the run name it as their backbone.

    Raises:
        ValueError: if its data cannot be loaded or have changed, or its settings name a class other than ``backbone``.
    """
    settings = run.settings()
    check_class_is_named(settings, backbone, run.config)
    prepared = preparation.run(single_run({}, settings), run)
    run.check_data({"data_fingerprint": prepared.fingerprint})
    return prepared


@torch.no_grad()
def accuracy_with_flips(
    run: RunFolder, preparation: Preparation, *, backbone: str | None = None
) -> dict[str, tuple[float, float]]:
    """Return the accuracy of the last checkpoint without and with test-time flips, by split; not of the train split.

    With flips, the logits are averaged over each image and its mirror image (level 1 of Jordan, arXiv 2404.00498).

    Args:
        run: As for `measure_run`.
        preparation: As for `measure_run`.
        backbone: As for `measure_run`.

    Raises:
        ValueError: if the last checkpoint is missing, or as for `measure_run`.
    """
    if not run.last_checkpoint.exists():
        raise ValueError(f"run {str(run.path)!r} must have its last checkpoint, but has none")
    prepared = saved_run(run, preparation, backbone)
    checkpoint = CheckpointFiles(prepared.config, prepared.fingerprint).load(run.last_checkpoint)
    prepared.trained.load_state_dict(checkpoint["state_dict"])
    found = {}
    with evaluation_layout(prepared.trained.eval()):
        for split, batches in prepared.evaluation.items():
            if split == "train":
                continue
            correct, samples = torch.zeros(2, dtype=torch.int64), 0
            # An iterator, because tqdm.auto starts an iterable twice.
            shown = None if preparation.progress else True
            for images, targets in tqdm(iter(batches), total=len(batches), desc=split, disable=shown):
                plain = prepared.trained(images)
                for index, logits in enumerate((plain, plain + prepared.trained(images.flip(-1)))):
                    correct[index] += (logits.argmax(1) == targets).sum().cpu()
                samples += len(targets)
            found[split] = (float(correct[0]) / samples, float(correct[1]) / samples)
    return found


def is_measured(records: Records, epoch: int, splits: Sequence[str], layers: Layers, *, probes: bool = False) -> bool:
    """Return whether an epoch has valid records of these splits with these layers, and their rows are in the table.

    For ``"blocks"``, any layers are accepted. If a command was stopped, records may have no rows; they are measured
    again.
    """
    for split in splits:
        if not records.run.measurement(epoch, split).exists():
            return False
        try:
            record = records.load(epoch, split)
        except ValueError as error:
            logger.warning("measured again: %s", error)
            return False
        has_layers = bool(record.layers) if layers == "blocks" else set(layers) <= set(record.layers)
        has_probes = all("ncc_error" in values for values in (record.metrics, *record.layers.values()))
        if not (has_layers and (has_probes or not probes) and records.is_in_table(epoch, split, record)):
            return False
    return True


def select_splits(
    loaders: Mapping[str, EvaluationBatches], splits: Sequence[str] | None
) -> tuple[list[str], dict[str, EvaluationBatches]]:
    """Return the selected splits, by default all, and the loaders to measure them.

    The loaders include that of the train split, because other splits are measured against its class means.

    Raises:
        ValueError: if a split does not exist.
    """
    selected = list(loaders) if splits is None else list(splits)
    if unknown := [split for split in selected if split not in loaders]:
        raise ValueError(f"split must be of {', '.join(loaders)}, got {unknown[0]!r}")
    return selected, {split: loader for split, loader in loaders.items() if split in {"train", *selected}}


def write_measurements(folder: RunFolder, epoch: int, measurements: Mapping[str, Measurement]) -> list[Path]:
    """Write one record per split, and the metrics to the table of the folder; return the files of the records."""
    paths = [folder.measurement(epoch, split) for split in measurements]
    for path, measurement in zip(paths, measurements.values(), strict=True):
        measurement.save(path)
    rows = [
        (epoch, split, name, value)
        for split, values in folder.metric_values(measurements).items()
        for name, value in values.items()
    ]
    add_rows(folder.metrics, rows)
    return paths
