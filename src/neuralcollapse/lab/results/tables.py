"""Tables of runs: what they measured gathered in one, and the table that is printed."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import pandas as pd

from neuralcollapse.lab.experiments import label_of, tell_apart
from neuralcollapse.lab.results.files import read_file, write_csv
from neuralcollapse.lab.results.folder import RunFolder

COLUMNS = ["epoch", "split", "metric", "value"]
# Columns that a table of this name always has.
_NEEDED = {"metrics.csv": COLUMNS, "training.csv": ["epoch"], "gradients.csv": ["epoch", "parameter"]}
GOAL = 0.99
# Heading of a column of the table: split, metric, format. All of the last epoch.
_COLUMNS = {
    "train acc": ("train", "accuracy", "{:.2%}"),
    "validation acc": ("validation", "accuracy", "{:.2%}"),
    "test acc": ("test", "accuracy", "{:.2%}"),
    "nc1_quotient": ("train", "nc1_quotient", "{:.2g}"),
    "nc2_etf_means": ("train", "nc2_etf_means", "{:.3f}"),
    "nc3_duality": ("train", "nc3_duality", "{:.3f}"),
    "nc4_ncc_mismatch": ("train", "nc4_ncc_mismatch", "{:.2%}"),
}


def gather(runs: Sequence[RunFolder], table: str) -> pd.DataFrame:
    """Return one table of several runs, with the method and the seed in front; a run without that table is skipped.

    Args:
        runs: Folders of the runs.
        table: Attribute of `RunFolder`: ``"metrics"``, ``"training_log"`` or ``"gradients"``.
    """
    tables = []
    for run, method in zip(runs, methods_of(runs), strict=True):
        path: Path = getattr(run, table)
        if path.exists():
            values = read_table(path)
            values.insert(0, "method", method)
            values.insert(1, "seed", seed_of(run))
            tables.append(values)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def seed_of(run: RunFolder) -> float:
    """The seed that a run was trained with; NaN where that is not known."""
    seed = run.settings().get("seed")
    return math.nan if seed is None else seed


def methods_of(runs: Sequence[RunFolder]) -> list[str]:
    """The method of each run, and what else tells it from the others, such as its loss."""
    return [label_of(telling) for telling in tell_apart([run.settings() for run in runs])]


def read_table(path: Path) -> pd.DataFrame:
    """A table of a run's folder, with every value as it was written.

    Raises:
        ValueError: if it is damaged.
    """
    content = read_file(path)
    try:
        table = pd.read_csv(io.BytesIO(content), converters={"value": float})  # the default parser is not exact
    except ValueError as error:  # pandas' own errors are of this kind
        raise ValueError(f"{str(path)!r} must be a table, and is damaged: {' '.join(str(error).split())}") from error
    needed = _NEEDED.get(path.name, ())
    if missing := [name for name in needed if name not in table]:
        raise ValueError(f"{str(path)!r} is damaged: it must have a column {missing[0]!r}")
    if "epoch" in needed and not pd.api.types.is_integer_dtype(table["epoch"]) and len(table):
        raise ValueError(f"{str(path)!r} is damaged: its epochs must be whole numbers")
    return table


def add_rows(path: Path, rows: Sequence[tuple[int, str, str, float]], *, in_place_of: Collection[str] = ()) -> None:
    """Add measured values to a run's table, in order of epochs; they replace those of the same name.

    Args:
        path: The table.
        rows: Epoch, split, metric, value.
        in_place_of: Metrics whose other rows are removed.
    """
    added = pd.DataFrame(rows, columns=COLUMNS)
    table = added
    if path.exists():
        kept = read_table(path)
        table = pd.concat([kept[~kept["metric"].isin(in_place_of)], added])
    table = table.drop_duplicates(COLUMNS[:3], keep="last").sort_values("epoch", kind="stable")
    write_csv(path, table)


def replace_rows(path: Path, epoch: int, split: str, metrics: Mapping[str, float]) -> None:
    """Write the metrics of an epoch and a split to a run's table, in order of epochs, in place of their earlier rows.

    Args:
        path: The table; created if it does not exist.
        epoch: Epoch of the metrics.
        split: Split of the metrics.
        metrics: Name to value.
    """
    table = pd.DataFrame([(epoch, split, name, value) for name, value in metrics.items()], columns=COLUMNS)
    if path.exists():
        earlier = read_table(path)
        others = earlier[(earlier["epoch"] != epoch) | (earlier["split"] != split)]
        if len(others):  # columns of an empty table have no type
            table = pd.concat([others, table]).sort_values("epoch", kind="stable")
    write_csv(path, table)


def results_table(
    metrics: pd.DataFrame, log: pd.DataFrame, beside: Mapping[str, Mapping[str, str]] | None = None
) -> pd.DataFrame:
    """One row a method; mean ± standard deviation over seeds.

    Args:
        metrics: What was measured, gathered.
        log: What training itself saw, gathered.
        beside: What stands beside each method, by heading, such as its recipe.
    """
    last = last_epoch(metrics)
    columns = {name: column for name, column in _COLUMNS.items() if column[0] in set(metrics["split"])}
    rows = []
    for method in metrics["method"].unique():
        row = {"method": method, **(beside or {}).get(method, {})}
        row[f"epochs to {GOAL:.0%} train acc"] = _epochs_to_goal(metrics[metrics["method"] == method])
        for heading, (split, metric, form) in columns.items():
            chosen = last[(last["method"] == method) & (last["split"] == split) & (last["metric"] == metric)]
            row[heading] = spread(chosen["value"], form)
        if not log.empty:
            seconds = log[log["method"] == method].groupby("seed", dropna=False)["seconds"].mean()
            row["s/epoch"] = spread(seconds, "{:.2f}") if len(seconds) else ""
        rows.append(row)
    return pd.DataFrame(rows)


def last_epoch(metrics: pd.DataFrame) -> pd.DataFrame:
    """Of each run what was measured last."""
    return metrics[metrics["epoch"] == metrics.groupby(["method", "seed"], dropna=False)["epoch"].transform("max")]


def aligned(table: pd.DataFrame) -> str:
    """A Markdown table whose columns line up in a terminal, too."""
    columns = [[str(name), *map(str, table[name])] for name in table]
    widths = [max(map(len, column)) for column in columns]
    rule = ["-" * width for width in widths]
    rows = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in zip(*columns, strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])


def _epochs_to_goal(metrics: pd.DataFrame) -> str:
    accuracy = metrics[(metrics["split"] == "train") & (metrics["metric"] == "accuracy")]
    reached = accuracy[accuracy["value"] >= GOAL].groupby("seed", dropna=False)["epoch"].min()
    seeds = accuracy["seed"].nunique(dropna=False)
    if reached.empty:
        return "not reached"
    return spread(reached, "{:.1f}") + ("" if len(reached) == seeds else f" ({len(reached)} of {seeds} seeds)")


def spread(values: pd.Series, form: str) -> str:
    """Mean ± standard deviation, in a format; of those that are defined, and of how many where some are not."""
    defined = values.dropna()
    mean = form.format(defined.mean())
    shown = mean if len(defined) < 2 else f"{mean} ± {form.format(defined.std())}"
    return f"{shown} ({len(defined)} of {len(values)})" if 0 < len(defined) < len(values) else shown
