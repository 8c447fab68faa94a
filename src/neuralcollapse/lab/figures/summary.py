"""Table, Markdown summary and figures of a run or a comparison, from its folder alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pandas as pd

from neuralcollapse.lab.figures.curves import draw_figures
from neuralcollapse.lab.figures.report import write_report
from neuralcollapse.lab.results.files import write_csv, write_whole
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.tables import (
    aligned,
    baseline_table,
    gather,
    group_table,
    methods_of,
    results_table,
)

_TO_BASELINE = (
    "Epochs until a method is at least as good on the test split as standard with the same seed is at the end\n"
    "(measured after epochs {epochs}): test accuracy, nc1_quotient, nc2_etf_means, nc3_duality. Test accuracy: mean\n"
    "over these epochs, last value, and difference to standard in points, paired by seed, with Student's 95% interval."
)
_GROUPS = (
    "Classes with many, a medium number of, and few training images: more than 100, 20 to 100, fewer than 20; thirds\n"
    "of the classes if one of these groups would be empty. NC1 is relative to the variability between all classes."
)
_EXPLANATION = (
    "Accuracies and collapse metrics are those of the last epoch, on the train split unless stated\n"
    "otherwise, measured in evaluation mode, without targets, on images without augmentation; `metrics.csv` has all\n"
    "metrics of each measured epoch. Seconds per epoch are those of training without measurements."
)


@dataclass(frozen=True)
class Summary:
    """Results of a run or a comparison.

    Attributes:
        table: One row per method, as text; below it, the groups of classes of imbalanced data, and the number of epochs
            in which each method reaches the final values of standard.
        metrics: Columns method, seed, epoch, split, metric, value.
        written: Written files, beginning with the most informative.
    """

    table: str
    metrics: pd.DataFrame
    written: list[Path]


def summarise(folder: RunFolder, command: str) -> Summary:
    """Write the tables, the summary, the figures and the report of a folder from the tables and records of its runs.

    Args:
        folder: Folder of one run, or of several.
        command: Command that wrote the folder, ``"train"`` or ``"compare"``.
    """
    runs = folder.run_folders()
    metrics, log = gather(runs, "metrics"), gather(runs, "training_log")
    if runs != [folder]:
        for gathered, path in ((metrics, folder.metrics), (log, folder.training_log)):
            write_csv(path, gathered)
    settings = [run.settings() for run in runs]
    tuned = folder.settings().get("lr") == "auto"
    further: dict[str, dict[str, str]] = {}
    for method, config in zip(methods_of(runs), settings, strict=True):
        further[method] = {"lr": f"{config['lr']:g}"} if tuned else {}
        if config.get("recipe"):
            further[method]["recipe"] = config["recipe"]
    table = aligned(results_table(metrics, log, further))
    of_groups = group_table(metrics)
    if of_groups is not None:
        table += f"\n\n{_GROUPS}\n\n{aligned(of_groups)}"
    to_baseline = baseline_table(metrics)
    if to_baseline is not None:
        table += f"\n\n{_TO_BASELINE.format(epochs=_listed_epochs(metrics))}\n\n{aligned(to_baseline)}"
    table = "\n".join([table, *_at_chance(runs, metrics)])
    environment = folder.read_environment()
    title = f"{settings[0]['backbone']} on {environment.get('data', settings[0]['data'])}"
    figures = draw_figures(metrics, folder.figures, title, environment.get("num_classes"))
    seeds = list(dict.fromkeys(config["seed"] for config in settings))
    listed = ", ".join(map(str, seeds))
    over = f"Mean ± standard deviation over seeds {listed}" if len(seeds) > 1 else f"Seed {listed}"
    again = f"`neuralcollapse {command} --config {folder.config.name} --out FOLDER` runs it again."
    write_summary(folder, title, [table, f"{over}. {_EXPLANATION}"], figures, f"{made_by(folder)}\n{again}")
    tables = [table for table in (folder.metrics, folder.training_log, folder.gradients) if table.exists()]
    return Summary(table, metrics, [folder.summary, *_report(folder, runs), *figures, *tables, folder.config])


def write_summary(
    folder: RunFolder, title: str, sections: Sequence[str], figures: Sequence[Path], footer: str = ""
) -> None:
    """Write the summary of a folder in Markdown.

    Args:
        folder: Folder to write to.
        title: Heading.
        sections: Tables and paragraphs, in Markdown.
        figures: Figures inside the folder, to show below the sections.
        footer: Last paragraph.
    """
    pictures = "\n".join(f"![{figure.stem}]({figure.relative_to(folder.path)})" for figure in figures)
    text = "\n\n".join(filter(None, [f"# {title}", *sections, pictures, footer])) + "\n"
    write_whole(folder.summary, lambda path: path.write_text(text, encoding="utf-8"))


def made_by(folder: RunFolder) -> str:
    """Return a paragraph of Markdown with the command, the versions and the machine with which a folder was written."""
    environment = folder.read_environment()
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    return (
        f"Made by `{environment['command']}` with neuralcollapse {environment['neuralcollapse']} ({packages})\n"
        f"on {environment['accelerator'] or environment['machine']}."
    )


def _report(folder: RunFolder, runs: list[RunFolder]) -> list[Path]:
    """Write the report; if runs have no records, print why it is missing."""
    try:
        write_report(runs, folder.report)
    except ValueError as error:
        print(f"neuralcollapse: no {folder.report.name}: {error}", file=sys.stderr)
        return []
    return [folder.report]


def _listed_epochs(metrics: pd.DataFrame) -> str:
    epochs = sorted(metrics["epoch"].unique())
    steps = {after - before for before, after in pairwise(epochs)}
    if len(epochs) > 6 and len(steps) == 1:
        return f"{epochs[0]}, {epochs[1]}, ..., {epochs[-1]}"
    return ", ".join(map(str, epochs))


def _at_chance(runs: list[RunFolder], metrics: pd.DataFrame) -> list[str]:
    """Return a line for each run whose final accuracy does not exceed that of always predicting the largest class."""
    last = metrics[(metrics["split"] == "train") & (metrics["metric"] == "accuracy")]
    last = last[last["epoch"] == last["epoch"].max()].set_index(["method", "seed"])["value"]
    lines = []
    for method, run in zip(methods_of(runs), runs, strict=True):
        seed, chance = run.settings()["seed"], run.read_environment().get("largest_class_share")
        accuracy = last[last.index == (method, seed)]
        if chance is not None and len(accuracy) == 1 and accuracy.iloc[0] <= 1.05 * chance:
            lines.append(
                f"\n{method}, seed {seed}, ends at chance: {accuracy.iloc[0]:.1%} of the training images are "
                f"correct, and the largest class has {chance:.1%}. It diverged, or has not learned anything yet."
            )
    return lines
