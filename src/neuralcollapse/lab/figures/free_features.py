"""The unconstrained features model under the methods: its table, and a figure for each size."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from neuralcollapse.lab.figures.curves import line_styles
from neuralcollapse.lab.figures.panels import without_latex
from neuralcollapse.lab.results.files import write_csv, write_whole
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.statistics import epochs_to_reach
from neuralcollapse.lab.results.tables import aligned

# Metric, and the label of its panel.
_PANELS = {
    "excess_loss": "loss above the least possible",
    "nc1_quotient": "NC1: tr Σ_W / tr Σ_B",
    "nc2_etf_means": "NC2: C Cᵀ to a simplex ETF",
    "nc3_duality": "NC3: W Cᵀ to a simplex ETF",
    "etf_means": "C to its nearest ETF, squared",
}
_FLOOR = 1e-7  # under which single precision has nothing to say
# Heading of a column of the table: metric and level.
_GOALS = {
    "loss +0.01": ("excess_loss", 0.01),
    "loss +0.001": ("excess_loss", 0.001),
    "NC1 0.01": ("nc1_quotient", 0.01),
    "NC2 0.1": ("nc2_etf_means", 0.1),
    "NC2 0.01": ("nc2_etf_means", 0.01),
    "NC3 0.01": ("nc3_duality", 0.01),
    "etf 0.001": ("etf_means", 0.001),
}


def free_features_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """The measured iteration from which on each goal is kept: the mean, least and greatest over seeds.

    Args:
        metrics: Columns classes, optimizer, method, seed, rate, iteration, metric, value.
    """
    rows = []
    for (classes, optimizer, method), group in metrics.groupby(["classes", "optimizer", "method"], sort=False):
        row = {"model": f"UFM-{classes}", "optimizer": optimizer, "method": method}
        row["rate"] = f"{group['rate'].iloc[0]:g}"
        for heading, (metric, level) in _GOALS.items():
            row[heading] = _iterations_to(group[group["metric"] == metric], level)
        last = group[group["iteration"] == group["iteration"].max()]
        row["last loss +"] = f"{last.loc[last['metric'] == 'excess_loss', 'value'].mean():.1e}"
        seconds = last[last["metric"] == "seconds"]
        row["ms/it"] = f"{1e3 * (seconds['value'] / seconds['iteration']).mean():.3g}"
        rows.append(row)
    return pd.DataFrame(rows)


@without_latex()
def draw_free_features(metrics: pd.DataFrame, folder: Path) -> list[Path]:
    """One figure a size, a row of panels an optimiser; lines are geometric means over seeds, bands their range.

    Args:
        metrics: As for `free_features_table`.
        folder: Where to write them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for classes, of_size in metrics.groupby("classes", sort=False):
        optimizers = list(of_size["optimizer"].unique())
        height = 3.1 * len(optimizers) + 0.9
        figure = Figure(figsize=(16, height))
        # Margins by hand: matplotlib's layout engine takes seconds for so many panels, as do minor ticks.
        margins = {"left": 0.04, "right": 0.99, "bottom": 0.5 / height, "top": 1 - 0.65 / height}
        panels = figure.subplots(
            len(optimizers), len(_PANELS), squeeze=False, sharex=True, gridspec_kw={"wspace": 0.2, **margins}
        )
        for row, optimizer in zip(panels, optimizers, strict=True):
            of_optimizer = of_size[of_size["optimizer"] == optimizer]
            for axes, (metric, label) in zip(row, _PANELS.items(), strict=True):
                _draw(axes, of_optimizer[of_optimizer["metric"] == metric])
                axes.set_title(f"{optimizer}: {label}", fontsize=9)
        for axes in panels[-1]:
            axes.set_xlabel("iteration")
        panels[0][0].legend(frameon=False, fontsize=8)
        seeds = of_size["seed"].nunique()
        over = f"geometric mean, and range of {seeds} seeds" if seeds > 1 else "one seed"
        figure.suptitle(f"UFM-{classes}; {over}", fontsize=10)
        path = folder / f"ufm{classes}.png"
        figure.savefig(path, dpi=110)
        written.append(path)
    return written


def _draw(axes: Axes, values: pd.DataFrame) -> None:
    styles = line_styles(list(values["method"].unique()))
    for method, group in values.groupby("method", sort=False):
        shown = group.assign(value=group["value"].clip(lower=_FLOOR))
        by_iteration = shown.groupby("iteration")["value"]
        middle = by_iteration.agg(lambda of_seeds: math.exp(sum(map(math.log, of_seeds)) / len(of_seeds)))
        style = styles[str(method)]
        band = {"color": style["color"], "alpha": 0.18, "linewidth": 0}
        axes.plot(middle.index, middle, label=method, linewidth=1.5, markersize=4, markevery=6, **style)
        axes.fill_between(middle.index, by_iteration.min(), by_iteration.max(), **band)
    axes.set(xscale="log", yscale="log")
    axes.minorticks_off()
    axes.grid(alpha=0.3, linewidth=0.5)


def _iterations_to(values: pd.DataFrame, level: float) -> str:
    iterations = [_kept_from(group, level) for _, group in values.groupby("seed")]
    reached = [int(iteration) for iteration in iterations if not math.isnan(iteration)]
    seeds = values["seed"].nunique()
    if not reached:
        return "–"
    low, high = min(reached), max(reached)
    spread = f"{sum(reached) / len(reached):.0f}" + (f" ({low}–{high})" if low < high else "")
    return spread + ("" if len(reached) == seeds else f", {len(reached)} of {seeds}")


def _kept_from(of_seed: pd.DataFrame, level: float) -> float:
    """The first measured iteration from which on the level is kept; NaN if there is none."""
    course = of_seed.sort_values("iteration").set_index("iteration")["value"]
    return epochs_to_reach(course.rename(of_seed["metric"].iloc[0]), level, sustained=True)


def report_free_features(
    folder: RunFolder, metrics: pd.DataFrame, tuning: pd.DataFrame, sizes: list[str]
) -> tuple[str, list[Path]]:
    """Write the tables, the summary and the figures; return the table and what was written, most telling first."""
    tuning_path = folder.path / "tuning.csv"
    for one, path in ((metrics, folder.metrics), (tuning, tuning_path)):
        write_csv(path, one)
    table = aligned(free_features_table(metrics))
    figures = draw_free_features(metrics, folder.figures)
    made = folder.read_environment()
    pictures = "\n".join(f"![{figure.stem}]({figure.relative_to(folder.path)})" for figure in figures)
    listed = "\n".join(f"- {size}" for size in sizes)
    text = f"""# Free features under the methods

{table}

The iteration from which on the loss stays within 0.01 and 0.001 of the least possible, and a measure of collapse at its
level: mean over {metrics["seed"].nunique()} seeds, and their range where they differ; – where no seed gets there.
Measured in evaluation mode, at iterations evenly spaced in their logarithm. A rate was chosen for each row from the
candidates in `tuning.csv`, on a seed that is not compared. Milliseconds an iteration are of training alone.

{listed}

{pictures}

Made by `{made["command"]}` with neuralcollapse {made["neuralcollapse"]} (torch {made["packages"]["torch"]})
on {made["accelerator"] or made["machine"]}.
"""
    write_whole(folder.summary, lambda path: path.write_text(text, encoding="utf-8"))
    return table, [folder.summary, *figures, folder.metrics, tuning_path, folder.config]
