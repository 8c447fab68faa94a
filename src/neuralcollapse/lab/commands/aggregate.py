"""`neuralcollapse aggregate`: statistics over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from neuralcollapse.lab.commands.runs import Outcome, add_runs, new_files, runs_of
from neuralcollapse.lab.parsing import parse
from neuralcollapse.lab.settings import Settings

if TYPE_CHECKING:
    import pandas as pd

SUMMARY = "mean, std, median, min and max over seeds, of runs that differ in nothing else"
USAGE = "RUN [RUN ...] --out FILE.csv|FILE.parquet [--reach METRIC=LEVEL,...] [--split SPLIT] [--overwrite]"
DESCRIPTION = (
    "Find the runs that differ only in their seed, and write mean, standard deviation (n - 1), median, least and "
    "greatest value over seeds, and the number of seeds: for each epoch, split and metric, distances included, and of "
    "what training itself saw (split `training`). With --reach, also the epochs that each run took to a level of a "
    "metric, interpolated linearly between measured epochs."
)
SECTIONS: tuple[type[Settings], ...] = ()


def add_arguments(parser: ArgumentParser) -> None:
    """Add what the command takes."""
    add_runs(parser)
    parser.add_argument("--out", type=str, metavar="FILE", help="file to write, ending in .csv or .parquet")
    parser.add_argument("--reach", type=str, metavar="METRIC=LEVEL,...", help="such as accuracy=0.99,nc3_duality=0.1")
    parser.add_argument("--split", type=str, metavar="SPLIT", help="of which --reach speaks; by default train")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")


def run(settings: Namespace) -> int:
    """Gather, write, and say so."""
    levels = _levels(settings.get("reach"))
    out = Path(settings.get("out") or "")
    if out.suffix not in (".csv", ".parquet"):
        raise ValueError(f"out must be a file ending in .csv or .parquet, got {settings.get('out')!r}")
    reach = out.with_name(f"{out.stem}-reach{out.suffix}")
    files = [out, reach] if levels else [out]
    runs = runs_of(settings.runs)

    from neuralcollapse.lab.results.groups import gather_groups, group_runs
    from neuralcollapse.lab.results.statistics import epochs_to_levels, statistics_over_seeds

    outcome = Outcome()
    with new_files(files, overwrite=bool(settings.get("overwrite"))):
        groups = group_runs(runs)
        values = gather_groups(groups)
        epochs = epochs_to_levels(values, levels, settings.get("split") or "train")
        _write(statistics_over_seeds(values), out, outcome)
        if levels:
            _write(epochs, reach, outcome)
    print("\n".join(f"{label}: {len(found)} runs" for label, found in groups.items()), end="\n\n")
    if levels:
        table = epochs.groupby(["group", "metric", "level"], sort=False)["epoch"].agg(
            ["mean", "std", "min", "max", "count"]
        )
        print("Epochs to a level, interpolated between measured epochs; count: seeds that reached it")
        print(table.to_string(float_format="{:.2f}".format), end="\n\n")
    return outcome.report("")


def _levels(text: str | None) -> dict[str, float]:
    levels = {}
    for item in filter(None, (text or "").split(",")):
        name, _, level = item.partition("=")
        try:
            levels[name.strip()] = parse("level", level, float)
        except ValueError:
            raise ValueError(f"reach must be METRIC=LEVEL, such as accuracy=0.99, got {item!r}") from None
    return levels


def _write(table: pd.DataFrame, path: Path, outcome: Outcome) -> None:
    from neuralcollapse.lab.results.files import without_formulas, write_whole

    if path.suffix == ".parquet":
        write_whole(path, table.to_parquet)
    else:
        text = without_formulas(table)
        write_whole(path, lambda partial: text.to_csv(partial, index=False))
    outcome.written.append(path)
