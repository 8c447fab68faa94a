"""`neuralcollapse distance`: how far classifier and class means are from a simplex ETF, epoch by epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from neuralcollapse.lab.commands.runs import Outcome, add_runs, runs_of
from neuralcollapse.lab.settings import Settings

if TYPE_CHECKING:
    import pandas as pd

SUMMARY = "distances to the nearest simplex ETF over a run's measured epochs"
USAGE = "RUN [RUN ...] [--reference EPOCH] [--overwrite]"
DESCRIPTION = (
    "For each measured epoch and split of each run: the distance of the classifier and of the class means to their "
    "nearest simplex ETFs, of these to each other, and to those of a reference epoch. From the records in moments/ "
    "alone; added to metrics.csv as etf_... rows."
)
SECTIONS: tuple[type[Settings], ...] = ()


def add_arguments(parser: ArgumentParser) -> None:
    """Add what the command takes."""
    add_runs(parser)
    parser.add_argument("--reference", type=int, metavar="EPOCH", help="measured epoch to compare with; by default 1")
    parser.add_argument("--overwrite", action="store_true", help="compute again what is there already")


def run(settings: Namespace) -> int:
    """Compute, add to the tables, and say so."""
    import pandas as pd

    from neuralcollapse.lab.results.distances import distance_rows
    from neuralcollapse.lab.results.tables import add_rows, read_table

    outcome, reference = Outcome(), settings.get("reference") or 1
    tables = []
    for one in runs_of(settings.runs):
        there = read_table(one.metrics) if one.metrics.exists() else pd.DataFrame(columns=["epoch", "metric"])
        done = set(there[there["metric"] == "etf_means_reference"]["epoch"])
        if done >= {epoch for epoch, _ in one.measured()} and done and not settings.get("overwrite"):
            continue
        rows = outcome.sound(distance_rows(one, reference))
        add_rows(one.metrics, rows)
        outcome.written.append(one.metrics)
        tables.append(_last(one.path.name, pd.DataFrame(rows, columns=["epoch", "split", "metric", "value"])))
    if tables:
        print(pd.concat(tables).to_string(index=False, float_format="{:.4g}".format), end="\n\n")
    return outcome.report("nothing to do: the distances are there; --overwrite computes them again")


def _last(name: str, rows: pd.DataFrame) -> pd.DataFrame:
    """The distances at the last epoch, a row a split."""
    last = rows[rows["epoch"] == rows["epoch"].max()]
    table = last.pivot(index=["epoch", "split"], columns="metric", values="value").reset_index()
    table.insert(0, "run", name)
    return table
