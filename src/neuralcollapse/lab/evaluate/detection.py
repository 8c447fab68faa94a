"""Detection of inputs of unknown classes with the checkpoints of a run, recorded in its folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm.auto import tqdm

from neuralcollapse.classifier import classifier_with
from neuralcollapse.lab.data.unknown import unknown_sets
from neuralcollapse.lab.evaluate.checkpoints import (
    checkpoint_files,
    chosen_checkpoints,
    saved_run,
    write_measurements,
)
from neuralcollapse.lab.models.backbones import evaluation_layout
from neuralcollapse.lab.results.files import sole_writer
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.records import Records
from neuralcollapse.lab.results.tables import DETECTION_COLUMNS, add_rows
from neuralcollapse.lab.training.checkpoint import CheckpointFiles
from neuralcollapse.lab.training.run import Run
from neuralcollapse.lab.training.runs import Preparation
from neuralcollapse.metrics import Measurement, Provenance
from neuralcollapse.metrics.measure import measure_splits
from neuralcollapse.ood import Evaluation, Row, evaluate

# Rates of a row, which are the metrics of the table.
RATES = tuple(name for name in Row._fields if name not in ("set", "score", "reason"))


@dataclass(frozen=True)
class Detection:
    """Detection at one epoch of a run.

    Attributes:
        epoch: Number of trained epochs.
        evaluation: Rates and scores of each set.
        measured_because: Reason for which the train split was measured again; empty if its record was used.
        written: Written files.
    """

    epoch: int
    evaluation: Evaluation
    measured_because: str
    written: list[Path]


def detect_run(
    run: RunFolder,
    preparation: Preparation,
    sets: Mapping[str, Path | None],
    *,
    scores: Literal["all"] | Sequence[str] = "all",
    epochs: Literal["last", "all"] | Sequence[int] = "last",
    backbone: str | None = None,
) -> Iterator[Detection]:
    """Evaluate scores on checkpoints of a run, and add their rates to ``detection.csv``.

    Scores are fitted to the record of the train split in the folder. If the record is missing or damaged, belongs to
    another classifier, or lacks values that a score needs, the train split is measured again and recorded. The folder
    is locked for other processes until the iterator ends.

    Args:
        run: Folder of the run.
        preparation: Data, loaded once for several runs, and whether progress is shown.
        sets: Sets of unknown inputs, as for `unknown_sets`.
        scores: Names of scores, or all.
        epochs: Epochs with a checkpoint: the last one, all or some.
        backbone: Class that may be imported if the settings of the run name it as their backbone.

    Yields:
        One detection per epoch.

    Raises:
        ValueError: if the run lacks a checkpoint, its data or a set cannot be loaded, or its settings name a class
            other than ``backbone``.
    """
    with sole_writer(run.path):
        paths, prepared = checkpoint_files(run), saved_run(run, preparation, backbone)
        files = CheckpointFiles(prepared.config, prepared.fingerprint)
        chosen = chosen_checkpoints(run, paths, files, epochs)
        test, head = prepared.evaluation["test"], prepared.trained.measured.head
        loaders = unknown_sets(sets, prepared.data, test, prepared.config, progress=preparation.progress)
        bar = tqdm(
            chosen.items(), desc=run.path.name, unit="checkpoint", disable=None if preparation.progress else True
        )
        for epoch, path in bar:
            prepared.trained.load_state_dict(files.load(path)["state_dict"])
            with evaluation_layout(prepared.trained):
                record = _train_record(run, prepared, epoch, scores)
                reason, written = "", list[Path]()
                if isinstance(record, str):
                    reason, record = record, _measure(prepared, epoch)
                    written = write_measurements(run, epoch, {"train": record})
                evaluation = evaluate(
                    prepared.trained, record, test, loaders, scores, classifier=head, progress=preparation.progress
                )
            rows = [(epoch, row.set, row.score, rate, getattr(row, rate)) for row in evaluation.rows for rate in RATES]
            add_rows(run.detection, rows, columns=DETECTION_COLUMNS)
            yield Detection(epoch, evaluation, reason, [run.detection, *written])


def _train_record(run: RunFolder, prepared: Run, epoch: int, scores: str | Sequence[str]) -> Measurement | str:
    """Return the record of the train split or, if the scores cannot be fitted to it, the reason."""
    if not run.measurement(epoch, "train").exists():
        return "its record is missing"
    try:
        record = Records(run).load(epoch, "train")
        classifier_with(prepared.trained, record.weight, record.bias, prepared.trained.measured.head)
    except ValueError as error:
        return str(error)
    if (scores == "all" or "vim" in scores) and not record.residual_norms.numel():
        return "its record is of an earlier version and lacks what vim needs"
    return record


def _measure(prepared: Run, epoch: int) -> Measurement:
    options = {**prepared.measure_options, "progress": False}
    loaders = {"train": prepared.evaluation["train"]}
    return measure_splits(prepared.trained, loaders, Provenance(epoch=epoch), **options)["train"]
