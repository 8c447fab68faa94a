"""`neuralcollapse distance`: how far classifier and class means are from a simplex ETF, epoch by epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from neuralcollapse.lab.commands.arguments import integer
from neuralcollapse.lab.commands.runs import Outcome, add_runs, runs_of
from neuralcollapse.lab.settings import Settings

if TYPE_CHECKING:
    import pandas as pd

    from neuralcollapse.lab.results.folder import RunFolder

SUMMARY = "distances to the nearest simplex ETF over a run's measured epochs"
USAGE = "RUN [RUN ...] [--reference EPOCH] [--overwrite]"
DESCRIPTION = (
    "For each measured epoch and split of each run: the distance of the classifier and of the class means to their "
    "nearest simplex ETFs, of these to each other, and to those of a reference epoch. From the records in moments/ "
    "alone; added to metrics.csv as etf_... rows, of which etf_reference_epoch names the reference epoch. Distances to "
    "another reference epoch replace those that are there."
)
SECTIONS: tuple[type[Settings], ...] = ()


def add_arguments(parser: ArgumentParser) -> None:
    """Add what the command takes."""
    add_runs(parser)
    parser.add_argument("--reference", type=integer, metavar="EPOCH", help="measured epoch to compare with; by default "
                        "that of the distances that are there, or the first")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="compute again what is there already")


def run(settings: Namespace) -> int:
    """Compute, add to the tables, and say so."""
    import pandas as pd

    from neuralcollapse.lab.results.locking import sole_writer

    outcome = Outcome()
    tables = []
    for one in runs_of(settings.runs):
        with sole_writer(one.path):
            added = _add_distances(one, settings.get("reference"), outcome, overwrite=bool(settings.get("overwrite")))
        if added is not None:
            tables.append(added)
    if tables:
        print(pd.concat(tables).to_string(index=False, float_format="{:.4g}".format), end="\n\n")
    return outcome.report("nothing to do: the distances are there; --overwrite computes them again")


def _add_distances(run: RunFolder, asked: int | None, outcome: Outcome, *, overwrite: bool) -> pd.DataFrame | None:
    """Compute a run's distances and add them to its table, where they are not there; those at the last epoch."""
    import pandas as pd

    from neuralcollapse.lab.results.tables import COLUMNS, TO_REFERENCE, add_rows, distance_rows, read_table

    there = read_table(run.metrics) if run.metrics.exists() else pd.DataFrame(columns=COLUMNS)
    first = min((epoch for epoch, _ in run.measured()), default=1)
    reference, replaced = _reference(there, asked, first)
    if not replaced and not overwrite and _complete(there, run):
        return None
    rows = outcome.sound(distance_rows(run, reference))
    if not rows:
        return None
    add_rows(run.metrics, rows, in_place_of=TO_REFERENCE if replaced else ())
    if replaced:
        print(f"{run.path.name}: distances to the ETFs of epoch {reference} replace those of epoch {replaced}")
    outcome.written.append(run.metrics)
    return _last(run.path.name, pd.DataFrame(rows, columns=COLUMNS))


def _reference(there: pd.DataFrame, asked: int | None, first: int) -> tuple[int, str]:
    """The reference epoch; and those of distances in the table that are to other epochs, in words."""
    from neuralcollapse.lab.results.tables import reference_epochs

    found = sorted(reference_epochs(there))
    reference = asked if asked is not None else found[0] if len(found) == 1 else first
    others = [epoch for epoch in found if epoch != reference]
    return reference, "" if reference in found and len(found) == 1 else " and ".join(map(str, others))


def _complete(there: pd.DataFrame, run: RunFolder) -> bool:
    """Return whether a table names the reference epoch of each record's distances."""
    from neuralcollapse.lab.results.tables import REFERENCE_EPOCH

    named = there[there["metric"] == REFERENCE_EPOCH]
    records = set(run.measured())
    return bool(records) and records <= set(zip(named["epoch"], named["split"], strict=True))


def _last(name: str, rows: pd.DataFrame) -> pd.DataFrame:
    """The distances at the last epoch, one row per split."""
    from neuralcollapse.lab.results.tables import REFERENCE_EPOCH

    last = rows[rows["epoch"] == rows["epoch"].max()]
    table = last.pivot(index=["epoch", "split"], columns="metric", values="value").reset_index()
    table.insert(0, "run", name)
    reference = table.pop(REFERENCE_EPOCH)
    table.insert(3, "reference_epoch", reference.astype(int))
    return table
