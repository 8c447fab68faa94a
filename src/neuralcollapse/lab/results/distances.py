"""Distances of classifier and class means to their nearest simplex ETFs, from the records of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from neuralcollapse.catalogue import REFERENCE_EPOCH, TO_REFERENCE, reference_epochs
from neuralcollapse.lab.results.files import sole_writer
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.records import Records
from neuralcollapse.lab.results.tables import COLUMNS, Row, add_rows, read_table


@dataclass(frozen=True)
class Distances:
    """Computed distances of a run.

    Attributes:
        table: Columns epoch, split, metric, value; empty if no record could be read.
        reference: Reference epoch.
        replaced: Other reference epochs, whose distances in the table of the run were replaced.
        problems: Errors of skipped records.
    """

    table: pd.DataFrame
    reference: int
    replaced: list[int]
    problems: list[ValueError]


def add_distances(run: RunFolder, reference: int | None = None, *, overwrite: bool = False) -> Distances | None:
    """Compute the distances of a run and add them to its table; return None if the table already contains them.

    Args:
        run: Folder of the run.
        reference: Reference epoch; by default that of existing distances, or else the first epoch.
        overwrite: Compute existing distances again.

    Raises:
        ValueError: if the run has no records, or none for the reference epoch, or if another process writes to the
            folder.
        OSError: if the table cannot be written.
    """
    with sole_writer(run.path):
        table = read_table(run.metrics) if run.metrics.exists() else pd.DataFrame(columns=COLUMNS)
        existing = sorted(reference_epochs(table))
        if reference is None:
            first = min((epoch for epoch, _ in run.measured()), default=1)
            reference = existing[0] if len(existing) == 1 else first
        replaced = [epoch for epoch in existing if epoch != reference]
        if not replaced and not overwrite and _is_complete(table, run):
            return None
        found = list(distance_rows(run, reference))
        rows = [row for row in found if not isinstance(row, ValueError)]
        if rows:
            add_rows(run.metrics, rows, in_place_of=TO_REFERENCE if replaced else ())
    problems = [error for error in found if isinstance(error, ValueError)]
    return Distances(pd.DataFrame(rows, columns=COLUMNS), reference, replaced, problems)


def _is_complete(table: pd.DataFrame, run: RunFolder) -> bool:
    """Return whether a table has the reference epoch of the distances of each record."""
    rows = table[table["metric"] == REFERENCE_EPOCH]
    records = set(run.measured())
    return bool(records) and records <= set(zip(rows["epoch"], rows["split"], strict=True))


def distance_rows(run: RunFolder, reference: int = 1) -> Iterator[Row | ValueError]:
    """Yield the distances of classifier and class means to their nearest simplex ETFs, from the records of a run.

    Args:
        run: Folder of the run.
        reference: Epoch with whose ETFs (of weights and means) those of each epoch are compared.

    Yields:
        (epoch, split, metric, value), with the reference epoch as the value of `REFERENCE_EPOCH`; or the error of a
        record that cannot be read, which is skipped.

    Raises:
        ValueError: if the run has no records, or none for the reference epoch.
    """
    from neuralcollapse.metrics import etf_distances  # loads torch, which is not needed to read tables

    measured, records = run.measured(), Records(run)
    if not measured:
        raise ValueError(f"run {str(run.path)!r} must have records in {run.moments.name}/, but has none: measure it")
    splits_of_reference = {split for epoch, split in measured if epoch == reference}
    for split in dict.fromkeys(split for _, split in measured):
        epochs = [epoch for epoch, other in measured if other == split]
        if split not in splits_of_reference:
            raise ValueError(
                f"reference must be a measured epoch of {str(run.path)!r}, whose {split} split has "
                f"{', '.join(map(str, epochs))}; got {reference}"
            )
        first = records.load(reference, split)
        for epoch in epochs:
            try:
                record = records.load(epoch, split)
            except (ValueError, OSError) as error:
                yield ValueError(str(error))
                continue
            distances = etf_distances(
                record.weight.double(),
                record.moments.means,
                class_counts=record.moments.counts,
                reference_weight=first.weight.double(),
                reference_means=first.moments.means,
            )
            yield from ((epoch, split, name, value) for name, value in distances.items())
            yield epoch, split, REFERENCE_EPOCH, float(reference)
