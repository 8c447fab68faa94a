"""`neuralcollapse distance`: distances of classifier and class means to simplex ETFs, epoch by epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from neuralcollapse.lab.commands import Command
from neuralcollapse.lab.commands.common import Outcome, add_runs, option, runs_of

if TYPE_CHECKING:
    import pandas as pd

    from neuralcollapse.lab.results.folder import RunFolder


def _add_arguments(parser: ArgumentParser) -> None:
    add_runs(parser)
    parser.add_argument("--reference", metavar="EPOCH", help="measured epoch to compare with; by default that of "
                        "existing distances, or the first")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="compute existing distances again")


def _run(settings: Namespace) -> int:
    import pandas as pd

    from neuralcollapse.lab.results.locking import sole_writer

    reference, overwrite = option(settings, "reference", int), bool(settings.get("overwrite"))
    outcome, tables = Outcome(), []
    for run in runs_of(settings.runs):
        with sole_writer(run.path):
            table = _add_distances(run, reference, outcome, overwrite=overwrite)
        if table is not None:
            tables.append(table)
    if tables:
        print(pd.concat(tables).to_string(index=False, float_format="{:.4g}".format), end="\n\n")
    return outcome.report("nothing to do: the distances exist; --overwrite computes them again")


def _add_distances(run: RunFolder, asked: int | None, outcome: Outcome, *, overwrite: bool) -> pd.DataFrame | None:
    """Add the distances of a run to its table if they are missing; return those at the last epoch."""
    import pandas as pd

    from neuralcollapse.lab.results.tables import COLUMNS, TO_REFERENCE, add_rows, distance_rows, read_table

    table = read_table(run.metrics) if run.metrics.exists() else pd.DataFrame(columns=COLUMNS)
    first = min((epoch for epoch, _ in run.measured()), default=1)
    reference, replaced = _reference(table, asked, first)
    if not replaced and not overwrite and _is_complete(table, run):
        return None
    rows = outcome.valid(distance_rows(run, reference))
    if not rows:
        return None
    add_rows(run.metrics, rows, in_place_of=TO_REFERENCE if replaced else ())
    if replaced:
        print(f"{run.path.name}: distances to the ETFs of epoch {reference} replace those of epoch {replaced}")
    outcome.written.append(run.metrics)
    return _at_last_epoch(run.path.name, pd.DataFrame(rows, columns=COLUMNS))


def _reference(table: pd.DataFrame, asked: int | None, first: int) -> tuple[int, str]:
    """Return the reference epoch, and in words the other reference epochs of distances in the table."""
    from neuralcollapse.lab.results.tables import reference_epochs

    existing = sorted(reference_epochs(table))
    reference = asked if asked is not None else existing[0] if len(existing) == 1 else first
    others = [epoch for epoch in existing if epoch != reference]
    return reference, "" if existing == [reference] else " and ".join(map(str, others))


def _is_complete(table: pd.DataFrame, run: RunFolder) -> bool:
    """Return whether a table has the reference epoch of each record's distances."""
    from neuralcollapse.lab.results.tables import REFERENCE_EPOCH

    rows = table[table["metric"] == REFERENCE_EPOCH]
    records = set(run.measured())
    return bool(records) and records <= set(zip(rows["epoch"], rows["split"], strict=True))


def _at_last_epoch(name: str, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the distances at the last epoch, one row per split."""
    from neuralcollapse.lab.results.tables import REFERENCE_EPOCH

    last = rows[rows["epoch"] == rows["epoch"].max()]
    table = last.pivot(index=["epoch", "split"], columns="metric", values="value").reset_index()
    table.insert(0, "run", name)
    reference = table.pop(REFERENCE_EPOCH)
    table.insert(3, "reference_epoch", reference.astype(int))
    return table


DISTANCE = Command(
    "For each measured epoch and split of each run: the distance of the classifier and of the class means to their "
    "nearest simplex ETFs, of these to each other, and to those of a reference epoch. Computed from the records in "
    "moments/ alone; added to metrics.csv as etf_... rows, of which etf_reference_epoch is the reference epoch. "
    "Distances to another reference epoch are replaced.",
    _add_arguments,
    _run,
)
