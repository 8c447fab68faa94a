"""Class-incremental training: accuracy and collapse against the session, and the summary of its folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter

from neuralcollapse.lab.figures.panels import save_figures
from neuralcollapse.lab.figures.summary import made_by, write_summary
from neuralcollapse.lab.results.sessions import sessions_table
from neuralcollapse.lab.results.tables import read_table
from neuralcollapse.metrics.figures.curves import draw_range, line_styles
from neuralcollapse.metrics.figures.panels import Panel, draw_page, without_latex

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from neuralcollapse.lab.results.folder import RunFolder

_WORDS = (
    "After the last session, on the test split: accuracy of all classes, of old classes (of the first session) and\n"
    "of new classes (added since), harmonic mean of the two, and forgetting. The average accuracy is over all\n"
    "sessions. NC1 (`nc1_quotient`) is that of the training images. `sessions.csv` has the values after each session."
)


def session_panels(table: pd.DataFrame) -> list[Panel]:
    """Return panels of test accuracy of all, old and new classes, and of NC1 of old classes, against the session.

    Args:
        table: Columns `SESSION_COLUMNS`.
    """
    panels = [
        Panel(name, f"test accuracy, {words}", partial(_draw, table=table, split="test", classes=name))
        for name, words in (
            ("all", "all classes seen"),
            ("old", "classes of session 1"),
            ("new", "classes added since"),
        )
    ]
    nc1 = partial(_draw, table=table, split="train", classes="old", metric="nc1_quotient")
    return [*panels, Panel("nc1", "NC1 (nc1_quotient), classes of session 1", nc1)]


@without_latex()
def write_sessions_figure(table: pd.DataFrame, title: str, name: str, out: Path, formats: list[str]) -> list[Path]:
    """Draw the page of `session_panels`; return the files."""
    return save_figures({name: draw_page(title, session_panels(table), 4)}, out, formats)


def summarise_sessions(folder: RunFolder) -> tuple[str, list[Path]]:
    """Write the figure and the summary of a folder; return its table as text, and the written files."""
    table, settings = read_table(folder.sessions), folder.settings()
    shots = "all images" if settings.get("shots") is None else f"{settings['shots']} images of each added class"
    sizes = " + ".join(map(str, settings["sessions"]))
    title = f"{settings['backbone']} on {folder.read_environment().get('data')}; sessions of {sizes} classes, {shots}"
    seeds = table["seed"].nunique()
    over = f"Mean ± standard deviation over {seeds} seeds." if seeds > 1 else f"Seed {table['seed'].iloc[0]}."
    note = f"; mean, and range of {seeds} seeds" if seeds > 1 else ""
    figures = write_sessions_figure(table, title + note, "incremental", folder.figures, ["png"])
    text = sessions_table(table)
    again = f"`neuralcollapse incremental --config {folder.config.name} --out FOLDER` runs it again."
    write_summary(folder, title, [text, f"{over} {_WORDS}"], figures, f"{made_by(folder)}\n{again}")
    return text, [folder.summary, *figures, folder.sessions, folder.config]


def _draw(axes: Axes, *, table: pd.DataFrame, split: str, classes: str, metric: str = "accuracy") -> None:
    chosen = table[(table["split"] == split) & (table["classes"] == classes) & (table["metric"] == metric)]
    chosen = chosen[np.isfinite(chosen["value"])]
    if chosen.empty:
        raise ValueError(f"no finite {metric} of {classes} classes was measured")
    styles = line_styles(list(table["strategy"].unique()), markers=True)
    for strategy, values in chosen.groupby("strategy", sort=False):
        course = values.groupby("session")["value"].agg(["mean", "min", "max"])
        draw_range(axes, course.index, course["mean"], course["min"], course["max"], label=strategy, **styles[strategy])
    if metric == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    elif chosen["value"].min() > 0:
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("session", fontsize=8)
    axes.grid(alpha=0.3, linewidth=0.5)
