"""Figures of runs: a metric against the epoch, one line for each method."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which the colour-blind can tell apart; line styles do without colour.
METHOD_STYLES = {"standard": ("#0072B2", "-"), "fixed": ("#D55E00", "--"), "implicit": ("#009E73", "-.")}
# File name: metric, label of its axis, kind of axis.
_FIGURES = {
    "accuracy.png": ("accuracy", "accuracy", "percent"),
    "nc1.png": ("nc1_quotient", "NC1: tr Σ_W / tr Σ_B", "log"),
    "nc2.png": ("nc2_etf_means", "NC2: distance of C Cᵀ to a simplex ETF", "linear"),
    "nc3.png": ("nc3_duality", "NC3: distance of W Cᵀ to a simplex ETF", "linear"),
    "nc4.png": ("nc4_ncc_mismatch", "NC4: nearest class mean disagrees", "percent"),
}


def draw_figures(metrics: pd.DataFrame, folder: Path, title: str) -> list[Path]:
    """Draw the figures of a run or a comparison.

    Args:
        metrics: Columns method, seed, epoch, split, metric, value.
        folder: Where to write them.
        title: What was trained on what.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seeds = metrics["seed"].nunique()
    title += f"; mean, and range of {seeds} seeds" if seeds > 1 else ""
    for name, (metric, label, kind) in _FIGURES.items():
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, split in zip(panels, ("train", "test"), strict=True):
            chosen = metrics[(metrics["metric"] == metric) & (metrics["split"] == split)]
            _draw_lines(axes, chosen)
            axes.set(title=f"{split} split", xlabel="epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.3, linewidth=0.5)
        if kind == "percent":
            panels[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        elif kind == "log":
            panels[0].set_yscale("log")
        panels[0].set_ylabel(label)
        panels[1].legend(frameon=False)
        figure.suptitle(title, fontsize=10)
        figure.savefig(folder / name, dpi=150)
    overview = folder / "all_metrics.png"
    _draw_all(metrics[metrics["split"] == "train"], overview, title)
    return [*(folder / name for name in _FIGURES), overview]


def _draw_all(metrics: pd.DataFrame, path: Path, title: str) -> None:
    """Every metric of the train split, a small panel each."""
    names = list(metrics["metric"].unique())
    columns = 5
    rows = -(-len(names) // columns)
    height = 2.1 * rows + 1.2
    figure = Figure(figsize=(3 * columns, height))
    # Margins by hand: matplotlib's layout engine takes seconds for so many panels.
    margins = {"left": 0.04, "right": 0.99, "bottom": 0.7 / height, "top": 1 - 0.8 / height, "wspace": 0.3}
    panels = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"hspace": 0.4, **margins}).flat
    for axes, name in zip(panels, names, strict=False):
        values = metrics[metrics["metric"] == name]
        _draw_lines(axes, values)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3, linewidth=0.5)
        low, high = values["value"].min(), values["value"].max()
        if 0 < low < high / 30:
            axes.set_yscale("log")
    for axes in list(figure.axes)[len(names) :]:
        axes.remove()
    figure.suptitle(f"{title}; train split, against the epoch", fontsize=10, y=1 - 0.3 / height, va="center")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=100)


def _draw_lines(axes: Axes, values: pd.DataFrame) -> None:
    """One line a method, the mean over seeds, with a band from the least to the greatest."""
    for method, group in values.groupby("method", sort=False):
        by_epoch = group.groupby("epoch")["value"].agg(["mean", "min", "max"])
        color, style = METHOD_STYLES[str(method)]
        marker = "o" if len(by_epoch) == 1 else None
        axes.plot(by_epoch.index, by_epoch["mean"], style, color=color, label=method, linewidth=1.6, marker=marker)
        axes.fill_between(by_epoch.index, by_epoch["min"], by_epoch["max"], color=color, alpha=0.18, linewidth=0)
