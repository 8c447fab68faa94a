"""Table, figures and summary of the methods compared on the unconstrained features model (UFM)."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from neuralcollapse.lab.figures.summary import made_by, write_summary
from neuralcollapse.lab.results.files import write_csv, write_whole
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.statistics import epochs_to_reach
from neuralcollapse.lab.results.tables import aligned
from neuralcollapse.metrics.figures.curves import draw_range, line_styles
from neuralcollapse.metrics.figures.panels import without_latex

# Metric, and the title of its panel.
_PANELS = {
    "excess_loss": "loss above the minimum",
    "nc1_quotient": "NC1: tr Σ_W / tr Σ_B",
    "nc2_etf_means": "NC2: C Cᵀ to a simplex ETF",
    "nc3_duality": "NC3: W Cᵀ to a simplex ETF",
    "etf_means": "C to its nearest ETF, squared",
}
_FLOOR = 1e-7  # smaller values are rounding errors of single precision
# Heading of each column of the table, with metric and level.
_GOALS = {
    "loss +0.01": ("excess_loss", 0.01),
    "loss +0.001": ("excess_loss", 0.001),
    "NC1 0.01": ("nc1_quotient", 0.01),
    "NC2 0.1": ("nc2_etf_means", 0.1),
    "NC2 0.01": ("nc2_etf_means", 0.01),
    "NC3 0.01": ("nc3_duality", 0.01),
    "etf 0.001": ("etf_means", 0.001),
}


def ufm_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return the measured iteration from which on each level is maintained: mean and range over seeds.

    Args:
        metrics: Columns classes, optimizer, method, seed, rate, iteration, metric, value.
    """
    rows = []
    for (classes, optimizer, method), group in metrics.groupby(["classes", "optimizer", "method"], sort=False):
        row = {"model": f"UFM-{classes}", "optimizer": optimizer, "method": method}
        row["rate"] = f"{group['rate'].iloc[0]:g}"
        for heading, (metric, level) in _GOALS.items():
            row[heading] = _iterations_to(group[group["metric"] == metric], metric, level)
        last = group[group["iteration"] == group["iteration"].max()]
        row["last loss +"] = f"{last.loc[last['metric'] == 'excess_loss', 'value'].mean():.1e}"
        seconds = last[last["metric"] == "seconds"]
        row["ms/it"] = f"{1e3 * (seconds['value'] / seconds['iteration']).mean():.3g}"
        rows.append(row)
    return pd.DataFrame(rows)


@without_latex()
def draw_ufm(metrics: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw one figure per size, with a row of panels per optimiser: geometric means over seeds, and their range.

    Args:
        metrics: As for `ufm_table`.
        folder: Folder to write to.

    Returns:
        The files written.
    """
    written = []
    for classes, of_size in metrics.groupby("classes", sort=False):
        optimizers = list(of_size["optimizer"].unique())
        height = 3.1 * len(optimizers) + 0.9
        figure = Figure(figsize=(16, height))
        # Explicit margins and no minor ticks, because the layout engine of matplotlib takes seconds for these panels.
        margins = {"left": 0.04, "right": 0.99, "bottom": 0.5 / height, "top": 1 - 0.65 / height}
        panels = figure.subplots(
            len(optimizers), len(_PANELS), squeeze=False, sharex=True, gridspec_kw={"wspace": 0.2, **margins}
        )
        for row, optimizer in zip(panels, optimizers, strict=True):
            of_optimizer = of_size[of_size["optimizer"] == optimizer]
            for axes, (metric, title) in zip(row, _PANELS.items(), strict=True):
                _draw_panel(axes, of_optimizer[of_optimizer["metric"] == metric])
                axes.set_title(f"{optimizer}: {title}", fontsize=9)
        for axes in panels[-1]:
            axes.set_xlabel("iteration")
        panels[0][0].legend(frameon=False, fontsize=8)
        seeds = of_size["seed"].nunique()
        over = f"geometric mean, and range of {seeds} seeds" if seeds > 1 else "one seed"
        figure.suptitle(f"UFM-{classes}; {over}", fontsize=10)
        written.append(folder / f"ufm{classes}.png")
        write_whole(written[-1], partial(figure.savefig, format="png", dpi=110))
    return written


def write_ufm(
    folder: RunFolder, metrics: pd.DataFrame, tuning: pd.DataFrame, sizes: list[str]
) -> tuple[str, list[Path]]:
    """Write the tables, the figures and the summary of a comparison.

    Args:
        folder: Folder to write to.
        metrics: As for `ufm_table`.
        tuning: Columns classes, optimizer, method, rate, excess_loss, chosen.
        sizes: Description of each size.

    Returns:
        The table as text, and the written files, beginning with the most informative.
    """
    tuning_path = folder.path / "tuning.csv"
    write_csv(folder.metrics, metrics)
    write_csv(tuning_path, tuning)
    table = aligned(ufm_table(metrics))
    figures = draw_ufm(metrics, folder.figures)
    explanation = (
        "Iterations from which on the loss stays within 0.01 and 0.001 of the minimum, and collapse metrics stay at "
        f"their\nlevels: mean over {metrics['seed'].nunique()} seeds, and range if they differ; – if no "
        "seed reaches the level. Measured in evaluation mode, at\nlogarithmically spaced iterations. The rate of "
        "each row was chosen from the candidates in `tuning.csv`, with a\nseed that is not compared. Milliseconds per "
        "iteration are those of training alone."
    )
    listed = "\n".join(f"- {size}" for size in sizes)
    title = "The unconstrained features model, trained with each method"
    write_summary(folder, title, [table, explanation, listed], figures, made_by(folder))
    return table, [folder.summary, *figures, folder.metrics, tuning_path, folder.config]


def _draw_panel(axes: Axes, values: pd.DataFrame) -> None:
    styles = line_styles(list(values["method"].unique()))
    for method, group in values.groupby("method", sort=False):
        by_iteration = group.assign(value=group["value"].clip(lower=_FLOOR)).groupby("iteration")["value"]
        middle = by_iteration.agg(lambda of_seeds: math.exp(sum(map(math.log, of_seeds)) / len(of_seeds)))
        style = styles[str(method)] | {"label": method, "markevery": 6}
        draw_range(axes, middle.index, middle, by_iteration.min(), by_iteration.max(), **style)
    axes.set(xscale="log", yscale="log")
    axes.minorticks_off()
    axes.grid(alpha=0.3, linewidth=0.5)


def _iterations_to(values: pd.DataFrame, metric: str, level: float) -> str:
    """Return the mean over seeds of the iteration from which on a level is maintained, with range and number."""
    courses = [group.set_index("iteration")["value"].sort_index() for _, group in values.groupby("seed")]
    iterations = pd.Series([epochs_to_reach(course.rename(metric), level, sustained=True) for course in courses])
    reached = iterations.dropna()
    if reached.empty:
        return "–"
    low, high = reached.min(), reached.max()
    spread = f"{reached.mean():.0f}" + (f" ({low:.0f}–{high:.0f})" if low < high else "")
    return spread + ("" if len(reached) == len(courses) else f", {len(reached)} of {len(courses)}")
