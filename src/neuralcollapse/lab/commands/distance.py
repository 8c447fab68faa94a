"""`neuralcollapse distance`: distances of classifier and class means to simplex ETFs, for each epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from neuralcollapse.lab.commands import Command
from neuralcollapse.lab.commands.common import Outcome, add_runs, option, runs_of

if TYPE_CHECKING:
    import pandas as pd


def _add_arguments(parser: ArgumentParser) -> None:
    add_runs(parser)
    parser.add_argument("--reference", metavar="EPOCH", help="measured epoch to compare with; by default that of "
                        "existing distances, or the first epoch")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="compute existing distances again")


def _run(settings: Namespace) -> int:
    import pandas as pd

    from neuralcollapse.lab.results.distances import add_distances

    reference, overwrite = option(settings, "reference", int), bool(settings.get("overwrite"))
    outcome, tables = Outcome(), []
    for run in runs_of(settings.runs):
        distances = add_distances(run, reference, overwrite=overwrite)
        if distances is None:
            continue
        outcome.valid(distances.problems)
        if not len(distances.table):
            continue
        name = run.path.name
        if distances.replaced:
            replaced = " and ".join(map(str, distances.replaced))
            print(f"{name}: distances to the ETFs of epoch {distances.reference} replace those to epoch {replaced}")
        outcome.written.append(run.metrics)
        tables.append(_at_last_epoch(name, distances.table))
    if tables:
        print(pd.concat(tables).to_string(index=False, float_format="{:.4g}".format), end="\n\n")
    return outcome.report("nothing to do: the distances exist; --overwrite computes them again")


def _at_last_epoch(name: str, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the distances at the last epoch, one row per split."""
    from neuralcollapse.catalogue import REFERENCE_EPOCH

    last = rows[rows["epoch"] == rows["epoch"].max()]
    table = last.pivot(index=["epoch", "split"], columns="metric", values="value").reset_index()
    table.insert(0, "run", name)
    reference = table.pop(REFERENCE_EPOCH)
    table.insert(3, "reference_epoch", reference.astype(int))
    return table


DISTANCE = Command(
    "Compute, for each measured epoch and split of each run, the distances of the classifier and of the class means to "
    "their nearest simplex ETFs, between these ETFs, and to those of a reference epoch. The distances are computed "
    "from the records in moments/ alone and added to metrics.csv as etf_... rows; etf_reference_epoch is the reference "
    "epoch. Distances to another reference epoch are replaced.",
    _add_arguments,
    _run,
)
