"""What a run or a comparison found: its table, its tidy metrics, its summary and figures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from neuralcollapse.lab.config import CompareConfig, RunConfig
from neuralcollapse.lab.figures.curves import draw_figures
from neuralcollapse.lab.results.folder import RunFolder, read_settings, write_whole

GOAL = 0.99
# Heading of a column of the table: split, metric, format. All of the last epoch.
_COLUMNS = {
    "train acc": ("train", "accuracy", "{:.2%}"),
    "test acc": ("test", "accuracy", "{:.2%}"),
    "nc1_quotient": ("train", "nc1_quotient", "{:.2g}"),
    "nc2_etf_means": ("train", "nc2_etf_means", "{:.3f}"),
    "nc3_duality": ("train", "nc3_duality", "{:.3f}"),
    "nc4_ncc_mismatch": ("train", "nc4_ncc_mismatch", "{:.2%}"),
}


@dataclass(frozen=True)
class Report:
    """What one run, or a comparison of several, found.

    Attributes:
        table: One row a method, as text.
        metrics: Columns method, seed, epoch, split, metric, value.
        written: The files written, most telling first.
    """

    table: str
    metrics: pd.DataFrame
    written: list[Path]


def report_comparison(config: CompareConfig, folder: RunFolder, title: str) -> Report:
    """Gather what the runs of a comparison wrote, and write the comparison's own files."""
    runs = {(method, seed): folder.run(method, seed) for method in config.method_names for seed in range(config.seeds)}
    metrics = _gather({run: files.metrics for run, files in runs.items()})
    log = _gather({run: files.training_log for run, files in runs.items()})
    for table, path in ((metrics, folder.metrics), (log, folder.training_log)):
        write_whole(path, partial(table.to_csv, index=False, na_rep="nan"))
    return _report(folder, title, "compare", metrics, log)


def report_run(config: RunConfig, folder: RunFolder, title: str) -> Report:
    """Read what a run wrote, and write its summary and figures."""
    run = (config.method, config.seed)
    return _report(folder, title, "train", _gather({run: folder.metrics}), _gather({run: folder.training_log}))


def _report(folder: RunFolder, title: str, command: str, metrics: pd.DataFrame, log: pd.DataFrame) -> Report:
    text = _aligned(_table(metrics, log, list(metrics["method"].unique())))
    figures = draw_figures(metrics, folder.figures, title)
    summary = _summary(folder, title, command, text, figures, seeds=metrics["seed"].nunique())
    write_whole(folder.summary, lambda path: path.write_text(summary))
    tables = [table for table in (folder.metrics, folder.training_log, folder.gradients) if table.exists()]
    return Report(text, metrics, [folder.summary, *figures, *tables, folder.config])


def _gather(files: dict[tuple[str, int], Path]) -> pd.DataFrame:
    """The tables of several runs in one, with the method and the seed in front."""
    tables = []
    for (method, seed), file in files.items():
        table = pd.read_csv(file, converters={"value": float})  # the default parser is not exact
        table.insert(0, "method", method)
        table.insert(1, "seed", seed)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _table(metrics: pd.DataFrame, log: pd.DataFrame, methods: list[str]) -> pd.DataFrame:
    """One row a method; mean ± standard deviation over seeds."""
    last = metrics[metrics["epoch"] == metrics["epoch"].max()]
    rows = []
    for method in methods:
        row = {
            "method": method,
            f"epochs to {GOAL:.0%} train acc": _epochs_to_goal(metrics[metrics["method"] == method]),
        }
        for heading, (split, metric, form) in _COLUMNS.items():
            chosen = last[(last["method"] == method) & (last["split"] == split) & (last["metric"] == metric)]
            row[heading] = _spread(chosen["value"], form)
        seconds = log[log["method"] == method].groupby("seed")["seconds"].mean()
        rows.append(row | {"s/epoch": _spread(seconds, "{:.2f}")})
    return pd.DataFrame(rows)


def _epochs_to_goal(metrics: pd.DataFrame) -> str:
    accuracy = metrics[(metrics["split"] == "train") & (metrics["metric"] == "accuracy")]
    reached = accuracy[accuracy["value"] >= GOAL].groupby("seed")["epoch"].min()
    seeds = accuracy["seed"].nunique()
    if reached.empty:
        return "not reached"
    return _spread(reached, "{:.1f}") + ("" if len(reached) == seeds else f" ({len(reached)} of {seeds} seeds)")


def _spread(values: pd.Series, form: str) -> str:
    mean = form.format(values.mean())
    return mean if len(values) < 2 else f"{mean} ± {form.format(values.std())}"


def _aligned(table: pd.DataFrame) -> str:
    """A Markdown table whose columns line up in a terminal, too."""
    columns = [[str(name), *map(str, table[name])] for name in table]
    widths = [max(map(len, column)) for column in columns]
    rule = ["-" * width for width in widths]
    rows = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in zip(*columns, strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])


def _summary(folder: RunFolder, title: str, command: str, table: str, figures: list[Path], *, seeds: int) -> str:
    made = read_settings(folder.config)["environment"]
    packages = ", ".join(f"{name} {number}" for name, number in made["packages"].items())
    pictures = "\n".join(f"![{figure.stem}]({figure.relative_to(folder.path)})" for figure in figures)
    spread = "Mean ± standard deviation over seeds. " if seeds > 1 else ""
    return f"""# {title}

{table}

{spread}Accuracies and collapse metrics are those of the last epoch, on the train split
unless said otherwise, taken in evaluation mode, without targets, on images without augmentation; `metrics.csv` has all
of them for each epoch measured. Seconds an epoch are of training alone, without measuring.

{pictures}

Made by `{made["command"]}` with neuralcollapse {made["neuralcollapse"]} ({packages})
on {made["accelerator"] or made["machine"]}.
`neuralcollapse {command} --config {folder.config.name} --out FOLDER` runs it again.
"""
