"""What a run or a comparison found: its table, its summary and its figures, from its folder alone."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pandas as pd

from neuralcollapse.lab.figures.curves import draw_figures
from neuralcollapse.lab.figures.report import write_report
from neuralcollapse.lab.results.files import write_csv, write_whole
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.tables import aligned, baseline_table, gather, methods_of, results_table

_TO_BASELINE = (
    "Epochs until a method is at least as good on the test split as standard of the same seed is at its end (measured\n"
    "after epochs {epochs}): test accuracy, nc1_quotient, nc2_etf_means, nc3_duality. Test accuracy: mean over these\n"
    "epochs, the last, and points more than standard, paired by seed, with Student's 95% interval."
)


@dataclass(frozen=True)
class Summary:
    """What one run, or a comparison of several, found.

    Attributes:
        table: One row a method, as text; below it, how soon each is where standard ends.
        metrics: Columns method, seed, epoch, split, metric, value.
        written: The files written, most telling first.
    """

    table: str
    metrics: pd.DataFrame
    written: list[Path]


def summarise(folder: RunFolder, command: str) -> Summary:
    """Gather what the runs of a folder wrote, and write the folder's own table, summary, figures and report.

    Args:
        folder: Of one run, or of several.
        command: The command that runs it again.
    """
    runs = folder.run_folders()
    metrics, log = gather(runs, "metrics"), gather(runs, "training_log")
    if runs != [folder]:
        for gathered, path in ((metrics, folder.metrics), (log, folder.training_log)):
            write_csv(path, gathered)
    settings = [run.settings() for run in runs]
    tuned = folder.settings().get("lr") == "auto"
    beside: dict[str, dict[str, str]] = {}
    for method, one in zip(methods_of(runs), settings, strict=True):
        beside[method] = {"lr": f"{one['lr']:g}"} if tuned else {}
        if one.get("recipe"):
            beside[method]["recipe"] = one["recipe"]
    table = aligned(results_table(metrics, log, beside))
    to_baseline = baseline_table(metrics)
    if to_baseline is not None:
        table += f"\n\n{_TO_BASELINE.format(epochs=_listed_epochs(metrics))}\n\n{aligned(to_baseline)}"
    table = "\n".join([table, *_at_chance(runs, metrics)])
    made = folder.read_environment()
    title = f"{settings[0]['backbone']} on {made.get('data', settings[0]['data'])}"
    seeds = list(dict.fromkeys(one["seed"] for one in settings))
    figures = draw_figures(metrics, folder.figures, title, made.get("num_classes"))
    text = _summary(folder, title, command, table, figures, seeds)
    write_whole(folder.summary, lambda path: path.write_text(text, encoding="utf-8"))
    tables = [table for table in (folder.metrics, folder.training_log, folder.gradients) if table.exists()]
    return Summary(table, metrics, [folder.summary, *_report(folder, runs), *figures, *tables, folder.config])


def _report(folder: RunFolder, runs: list[RunFolder]) -> list[Path]:
    """The page, where the runs have records; it never ends a run."""
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
    """A line on each run that ended no better than by always naming the largest class."""
    last = metrics[(metrics["split"] == "train") & (metrics["metric"] == "accuracy")]
    last = last[last["epoch"] == last["epoch"].max()].set_index(["method", "seed"])["value"]
    lines = []
    for method, run in zip(methods_of(runs), runs, strict=True):
        seed, chance = run.settings()["seed"], run.read_environment().get("largest_class_share")
        found = last[last.index == (method, seed)]
        if chance is not None and len(found) == 1 and found.iloc[0] <= 1.05 * chance:
            lines.append(
                f"\n{method}, seed {seed}, ends at chance: {found.iloc[0]:.1%} of the training "
                f"images are right, and the largest class is {chance:.1%}. It diverged, or has learnt nothing yet."
            )
    return lines


def _summary(folder: RunFolder, title: str, command: str, table: str, figures: list[Path], seeds: list[int]) -> str:
    made = folder.read_environment()
    packages = ", ".join(f"{name} {number}" for name, number in made["packages"].items())
    pictures = "\n".join(f"![{figure.stem}]({figure.relative_to(folder.path)})" for figure in figures)
    over = f"seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    spread = f"Mean ± standard deviation over {over}. " if len(seeds) > 1 else f"Of {over}. "
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
