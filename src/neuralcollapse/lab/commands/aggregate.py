"""`neuralcollapse aggregate`: statistics over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from neuralcollapse.lab.commands import Command
from neuralcollapse.lab.commands.common import Outcome, add_runs, new_files, option, runs_of
from neuralcollapse.lab.settings import parse

if TYPE_CHECKING:
    import pandas as pd

_PRINTED = (".tex", ".md")
_OVER_SEEDS = "mean and standard deviation (n - 1) over seeds"


def _add_arguments(parser: ArgumentParser) -> None:
    add_runs(parser)
    parser.add_argument("--out", metavar="FILE", help="file to write: .csv or .parquet with every epoch, or "
                        ".tex (booktabs) or .md with the last epoch of each group")  # fmt: skip
    parser.add_argument("--reach", metavar="METRIC=LEVEL,...", help="levels, such as accuracy=0.99,nc3_duality=0.1")
    parser.add_argument(
        "--metrics", metavar="core|all|A,B", help="metrics of a .tex or .md file; by default core, about twelve"
    )
    parser.add_argument("--split", metavar="SPLIT", help="split of the levels of --reach; by default train")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")


def _run(settings: Namespace) -> int:
    levels = _levels(settings.get("reach"))
    out = Path(settings.get("out") or "")
    printed = out.suffix in _PRINTED
    if not printed and out.suffix not in (".csv", ".parquet"):
        raise ValueError(f"out must be a file ending in .csv, .parquet, .tex or .md, got {settings.get('out')!r}")
    metrics = option(settings, "metrics", list[str], ["core"])
    if settings.get("metrics") is not None and not printed:
        raise ValueError(f"metrics has an effect on .tex and .md only; a {out.suffix} file contains every metric")
    reach = out.with_name(f"{out.stem}-reach{out.suffix}")
    runs = runs_of(settings.runs)

    from neuralcollapse.lab.results.groups import gather_groups, group_runs
    from neuralcollapse.lab.results.printed import last_values, levels_reached
    from neuralcollapse.lab.results.statistics import epochs_to_levels, statistics_over_seeds

    outcome = Outcome()
    with new_files([out, reach] if levels else [out], overwrite=bool(settings.get("overwrite"))):
        groups = group_runs(runs)
        values = gather_groups(groups)
        epochs = epochs_to_levels(values, levels, option(settings, "split", default="train"))
        if printed:
            table = last_values(values, metrics[0] if metrics in (["core"], ["all"]) else metrics)
            _print(table, out, f"Metrics at the last epoch: {_OVER_SEEDS}.")
        else:
            _write(statistics_over_seeds(values), out)
        outcome.written.append(out)
        if levels:
            if printed:
                _print(
                    levels_reached(epochs), reach, "Epochs to a level: mean and standard deviation (n - 1) over seeds."
                )
            else:
                _write(epochs, reach)
            outcome.written.append(reach)
    for label, of_group in groups.items():
        print(f"{label}: {len(of_group)} {'run' if len(of_group) == 1 else 'runs'}")
    print()
    if levels:
        by_level = epochs.groupby(["group", "metric", "level"], sort=False)["epoch"]
        table = by_level.agg(["mean", "std", "min", "max", "count"])
        print("Epochs to a level, interpolated between measured epochs; count: seeds that reached it")
        print(table.to_string(float_format="{:.2f}".format), end="\n\n")
    return outcome.report()


def _levels(text: str | None) -> dict[str, float]:
    """Return the level of each metric from ``METRIC=LEVEL,...``."""
    levels = {}
    for item in filter(None, (text or "").split(",")):
        name, _, level = item.partition("=")
        try:
            levels[name.strip()] = parse("level", level, float)
        except ValueError:
            raise ValueError(f"reach must be METRIC=LEVEL, such as accuracy=0.99, got {item!r}") from None
    return levels


def _write(table: pd.DataFrame, path: Path) -> None:
    from neuralcollapse.lab.results.files import without_formulas, write_whole

    if path.suffix == ".parquet":
        write_whole(path, table.to_parquet)
    else:
        text = without_formulas(table)
        write_whole(path, lambda partial: text.to_csv(partial, index=False))


def _print(table: pd.DataFrame, path: Path, note: str) -> None:
    """Write a table of texts as LaTeX or Markdown."""
    from neuralcollapse.lab.results.files import write_whole
    from neuralcollapse.lab.results.printed import booktabs, markdown

    text = (booktabs if path.suffix == ".tex" else markdown)(table, note)
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


AGGREGATE = Command(
    "Find the runs that differ only in their seed, and write mean, standard deviation (n - 1), median, minimum and "
    "maximum over seeds, and the number of seeds, for each epoch, split and metric, including distances, and for the "
    "training metrics (split `training`). With --reach, also write the number of epochs that each run takes to reach a "
    "level of a metric, interpolated linearly between measured epochs. A .tex file (for LaTeX with booktabs) or .md "
    "file has one column per group, and one row per split and metric, at the last epoch of the group.",
    _add_arguments,
    _run,
)
