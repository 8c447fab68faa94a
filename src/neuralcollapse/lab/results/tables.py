"""Tables of runs: table of metrics of a run, gathered tables of several runs, and printed tables."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from neuralcollapse.lab.results.files import read_file, signature, write_csv
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.labels import label_of, tell_apart
from neuralcollapse.lab.results.statistics import epochs_to_reach, paired_differences, student_interval

Row = tuple[int, str, str, float]
COLUMNS = ["epoch", "split", "metric", "value"]
DETECTION_COLUMNS = ["epoch", "set", "score", "metric", "value"]
SESSION_COLUMNS = ["strategy", "seed", "session_lr", "session", "split", "classes", "metric", "value"]
TRANSFER_COLUMNS = ["epoch", "data", "layer", "metric", "value"]
GOAL = 0.99
# Columns that each table, by file name, always has.
_NEEDED = {
    "metrics.csv": COLUMNS,
    "training.csv": ["epoch"],
    "gradients.csv": ["epoch", "parameter"],
    "detection.csv": DETECTION_COLUMNS,
    "sessions.csv": SESSION_COLUMNS,
    "transfer.csv": TRANSFER_COLUMNS,
}
# Heading of each column of the results, with split, metric and format of its value at the last epoch.
_COLUMNS = {
    "train acc": ("train", "accuracy", "{:.2%}"),
    "validation acc": ("validation", "accuracy", "{:.2%}"),
    "test acc": ("test", "accuracy", "{:.2%}"),
    "nc1_quotient": ("train", "nc1_quotient", "{:.2g}"),
    "nc2_etf_means": ("train", "nc2_etf_means", "{:.3f}"),
    "nc3_duality": ("train", "nc3_duality", "{:.3f}"),
    "nc4_ncc_mismatch": ("train", "nc4_ncc_mismatch", "{:.2%}"),
}
# Heading and test metric of the columns with epochs to the last values of the baseline.
_GOALS = {"acc": "accuracy", "nc1": "nc1_quotient", "nc2": "nc2_etf_means", "nc3": "nc3_duality"}
# Heading of each column of the groups of classes, without the name of the group, with metric, split and format.
OF_GROUPS = {
    "test acc": ("accuracy", "test", "{:.2%}"),
    "train nc1": ("nc1_quotient", "train", "{:.2g}"),
}
GROUPS = ("many", "medium", "few")
_BASELINES = ("standard", "standard cross-entropy")


def read_table(path: Path) -> pd.DataFrame:
    """Return a table of a run folder, with every value exactly as written.

    Raises:
        ValueError: if the table is damaged.
        OSError: if the table cannot be read.
    """
    content = read_file(path)
    try:
        table = pd.read_csv(
            io.BytesIO(content),
            converters={"value": float, "session_lr": float},  # the default parser is not exact
            dtype={"set": str, "score": str, "data": str, "layer": str},
            na_filter=path.name not in ("detection.csv", "transfer.csv"),  # a set may be named null or NA
        )
    except ValueError as error:  # the errors of pandas have this type
        raise ValueError(f"{str(path)!r} must be a table, but is damaged: {' '.join(str(error).split())}") from error
    needed = _NEEDED.get(path.name, ())
    if missing := [name for name in needed if name not in table]:
        raise ValueError(f"{str(path)!r} is damaged: it must have a column {missing[0]!r}")
    if "epoch" in needed and not pd.api.types.is_integer_dtype(table["epoch"]) and len(table):
        raise ValueError(f"{str(path)!r} is damaged: its epochs must be whole numbers")
    return table


def add_rows(
    path: Path,
    rows: Sequence[tuple[Any, ...]],
    *,
    in_place_of: Collection[str] = (),
    columns: Sequence[str] = tuple(COLUMNS),
) -> None:
    """Add measured values to the table of a run, in order of epochs; existing values with the same keys are replaced.

    Args:
        path: The table.
        rows: Values of the columns.
        in_place_of: Metrics whose other rows are removed.
        columns: Columns of the table, including epoch and metric; the last column is the value.
    """
    table = pd.DataFrame(rows, columns=[*columns])
    if path.exists():
        earlier = read_table(path)
        table = pd.concat([earlier[~earlier["metric"].isin(in_place_of)], table])
    table = table.drop_duplicates([*columns[:-1]], keep="last").sort_values("epoch", kind="stable")
    write_csv(path, table)


class MetricRows:
    """Rows (epoch, split, metric, value) of the table of metrics of a run, in order of epochs.

    The rows are cached in memory, and the file is read again only if another process has changed it.

    Args:
        path: The table, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: tuple[tuple[int, int, int], list[Row]] | None = None  # signature of the file, rows

    def load(self) -> list[Row]:
        """Return the rows; an empty list if the file does not exist.

        Raises:
            ValueError: if the table is damaged.
            OSError: if the table cannot be read.
        """
        if not self.path.exists():
            return []
        now = signature(self.path)
        if self._known is None or self._known[0] != now:
            self._known = now, list(read_table(self.path)[COLUMNS].itertuples(index=False, name=None))
        return self._known[1]

    def replace(self, epoch: int, metrics: Mapping[str, Mapping[str, float]]) -> None:
        """Write the metrics of an epoch; earlier rows of the same epoch and splits are replaced.

        Args:
            epoch: Epoch of the metrics.
            metrics: Values by split and name.
        """
        others = [row for row in self.load() if row[0] != epoch or row[1] not in metrics]
        new = [
            (epoch, split, name, float(value)) for split, values in metrics.items() for name, value in values.items()
        ]
        self._write(others + new)

    def add_missing(self, rows: Sequence[Row]) -> None:
        """Write those of the given rows that the table does not contain."""
        present = self.load()
        known = {row[:3] for row in present}
        if missing := [row for row in rows if row[:3] not in known]:
            self._write([*present, *missing])

    def _write(self, rows: list[Row]) -> None:
        rows = sorted(rows, key=lambda row: row[0])
        write_csv(self.path, pd.DataFrame(rows, columns=COLUMNS))
        self._known = signature(self.path), rows


def gather(runs: Sequence[RunFolder], table: str) -> pd.DataFrame:
    """Return a table of several runs, with method and seed as first columns; runs without the table are skipped.

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
    """Return the seed with which a run was trained; NaN if it is unknown."""
    seed = run.settings().get("seed")
    return math.nan if seed is None else seed


def methods_of(runs: Sequence[RunFolder]) -> list[str]:
    """Return the method of each run, with other settings that distinguish it from the others, such as the loss."""
    return [label_of(telling) for telling in tell_apart([run.settings() for run in runs])]


def last_epoch(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the last measured epoch of each run."""
    return metrics[metrics["epoch"] == metrics.groupby(["method", "seed"], dropna=False)["epoch"].transform("max")]


def results_table(
    metrics: pd.DataFrame, log: pd.DataFrame, further: Mapping[str, Mapping[str, str]] | None = None
) -> pd.DataFrame:
    """Return one row per method, with mean ± standard deviation over seeds.

    Args:
        metrics: Measured values, gathered.
        log: Training logs, gathered.
        further: Additional cells of each method by heading, such as the recipe.
    """
    last = last_epoch(metrics)
    columns = {name: column for name, column in _COLUMNS.items() if column[0] in set(metrics["split"])}
    rows = []
    for method in metrics["method"].unique():
        row = {"method": method, **(further or {}).get(method, {})}
        row[f"epochs to {GOAL:.0%} train acc"] = _epochs_to_goal(metrics[metrics["method"] == method])
        for heading, (split, metric, form) in columns.items():
            chosen = last[(last["method"] == method) & (last["split"] == split) & (last["metric"] == metric)]
            row[heading] = spread(chosen["value"], form)
        if not log.empty:
            seconds = log[log["method"] == method].groupby("seed", dropna=False)["seconds"].mean()
            row["s/epoch"] = spread(seconds, "{:.2f}") if len(seconds) else ""
        rows.append(row)
    return pd.DataFrame(rows)


def baseline_table(metrics: pd.DataFrame, baseline: str | None = None) -> pd.DataFrame | None:
    """Return the number of epochs that each method takes to reach the last values of method standard with equal seed.

    The number is the first measured epoch at which the method is at least as good on the test split as standard is at
    the end. Further columns show the test accuracy: its mean over the measured epochs, the last value, and the paired
    difference of the last value to that of standard, with Student's 95% interval (n − 1).

    Args:
        metrics: Measured values, gathered.
        baseline: Label of standard among the methods; by default ``"standard"`` or ``"standard cross-entropy"``.

    Returns:
        One row per method: mean number of epochs over the seeds that reach the value, with the number of these seeds if
        not all do; accuracies as mean ± standard deviation over seeds. None without a comparison with standard.
    """
    test = metrics[metrics["split"] == "test"]
    if baseline is None:
        baseline = next((name for name in _BASELINES if name in set(test["method"])), None)
    if baseline is None or test["method"].nunique() < 2:
        return None
    goals = {name: _last_values(test[test["method"] == baseline], metric) for name, metric in _GOALS.items()}
    rows = []
    for method in test["method"].unique():
        of_method = test[test["method"] == method]
        row = {"method": method}
        for heading, metric in _GOALS.items():
            row[f"to {heading}"] = _epochs_to_baseline(of_method, metric, goals[heading])
        accuracies = of_method[of_method["metric"] == "accuracy"]
        last = _last_values(of_method, "accuracy")
        row["mean acc %"] = spread(100 * accuracies.groupby("seed", dropna=False)["value"].mean(), "{:.1f}")
        row["last acc %"] = spread(100 * last, "{:.1f}")
        row["- standard"] = "" if method == baseline else _interval(100 * paired_differences(last, goals["acc"]))
        rows.append(row)
    return pd.DataFrame(rows)


def group_table(metrics: pd.DataFrame) -> pd.DataFrame | None:
    """Return the last test accuracy and train NC1 of classes with many, a medium number of, and few training images.

    Args:
        metrics: Measured values, gathered.

    Returns:
        One row per method, with mean ± standard deviation over seeds; None if no run has the setting ``imbalance``.
    """
    last = last_epoch(metrics)
    values = dict(list(last.groupby(["method", "metric", "split"])["value"]))
    columns = {
        f"{heading}, {group}": (f"{metric}_{group}", split, form)
        for heading, (metric, split, form) in OF_GROUPS.items()
        for group in GROUPS
        if ((last["metric"] == f"{metric}_{group}") & (last["split"] == split)).any()
    }
    rows = []
    for method in metrics["method"].unique():
        cells = {heading: (method, metric, split) for heading, (metric, split, _) in columns.items()}
        if any(key in values for key in cells.values()):
            row = {
                heading: spread(values[key], columns[heading][2]) if key in values else "–"
                for heading, key in cells.items()
            }
            rows.append({"method": method, **row})
    return pd.DataFrame(rows) if rows else None


def aligned(table: pd.DataFrame) -> str:
    """Return a Markdown table whose columns are also aligned as plain text."""
    columns = [[str(name), *map(str, table[name])] for name in table]
    widths = [max(map(len, column)) for column in columns]
    rule = ["-" * width for width in widths]
    rows = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in zip(*columns, strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])


def spread(values: pd.Series, form: str) -> str:
    """Format mean ± standard deviation of the defined values, and their number if some are undefined."""
    defined = values.dropna()
    mean = form.format(defined.mean())
    text = mean if len(defined) < 2 else f"{mean} ± {form.format(defined.std())}"
    return f"{text} ({len(defined)} of {len(values)})" if 0 < len(defined) < len(values) else text


def _epochs_to_goal(metrics: pd.DataFrame) -> str:
    epochs = _epochs_of_seeds(metrics[metrics["split"] == "train"], "accuracy", GOAL)
    reached = epochs.dropna()
    if reached.empty:
        return "not reached"
    return spread(reached, "{:.1f}") + (
        "" if len(reached) == len(epochs) else f" ({len(reached)} of {len(epochs)} seeds)"
    )


def _epochs_to_baseline(metrics: pd.DataFrame, metric: str, levels: pd.Series) -> str:
    epochs = _epochs_of_seeds(metrics, metric, levels)
    reached = epochs.dropna()
    if reached.empty:
        return "never"
    return f"{reached.mean():.1f}" + ("" if len(reached) == len(epochs) else f" ({len(reached)}/{len(epochs)})")


def _epochs_of_seeds(metrics: pd.DataFrame, metric: str, levels: pd.Series | float) -> pd.Series:
    """Return the first measured epoch at which each seed reaches its level; NaN for seeds that do not reach it."""
    course = metrics[metrics["metric"] == metric]
    level = course["seed"].map(levels) if isinstance(levels, pd.Series) else levels
    epochs = {}
    for seed, of_seed in course.assign(level=level).groupby("seed", dropna=False):
        ordered = of_seed.sort_values("epoch").set_index("epoch")
        epochs[seed] = epochs_to_reach(ordered["value"].rename(metric), ordered["level"].iloc[0])
    return pd.Series(epochs, dtype=float)


def _last_values(metrics: pd.DataFrame, metric: str) -> pd.Series:
    """Return the last value of each seed."""
    of_metric = metrics[metrics["metric"] == metric].sort_values("epoch", kind="stable")
    return of_metric.groupby("seed", dropna=False)["value"].last()


def _interval(differences: pd.Series) -> str:
    """Return the mean difference and half the width of Student's 95% interval, in percentage points."""
    mean, half = student_interval(differences)
    return f"{mean:+.2f}" + ("" if math.isnan(half) else f" ± {half:.2f}")
