"""Figures of runs: metrics against the epoch, one line for each method."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogFormatterSciNotation,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
)

from neuralcollapse.catalogue import METRICS
from neuralcollapse.lab.figures.page import add_legend, draw_or_say_why, literal, without_latex, wrapped
from neuralcollapse.lab.results.distances import TO_REFERENCE, reference_epochs
from neuralcollapse.lab.results.files import write_whole

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which the colour-blind can tell apart, and grey; line styles and markers do without colour.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
_LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*", "h")
_PUBLISHED = ("standard", "fixed", "implicit")
# With more lines than this, each has a marker too, and the colours are no longer those of the published methods.
_FEW, _WITH_PUBLISHED = 3, 8
# File name and metric.
_FIGURES = {
    "accuracy.png": "accuracy",
    "nc1.png": "nc1_quotient",
    "nc2.png": "nc2_etf_means",
    "nc3.png": "nc3_duality",
    "nc4.png": "nc4_ncc_mismatch",
}
_COLUMNS = 5
# Values that differ by less than this share of their size are equal but for rounding.
_ROUNDING = 1e-5


@without_latex()
def draw_figures(metrics: pd.DataFrame, folder: Path, title: str, num_classes: int | None = None) -> list[Path]:
    """Draw the figures of a run or a comparison.

    Args:
        metrics: Columns method, seed, epoch, split, metric, value.
        folder: Where to write them.
        title: What was trained on what.
        num_classes: K, for values at collapse that depend on it.

    Returns:
        The files written.
    """
    seeds = metrics["seed"].nunique()
    title += f"; mean, and range of {seeds} seeds" if seeds > 1 else ""
    for file, name in _FIGURES.items():
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, split in zip(panels, ("train", "test"), strict=True):
            axes.set(title=f"{split} split", xlabel="epoch")
            of = metrics[metrics["split"] == split]
            draw_or_say_why(axes, partial(draw_metric, metrics=of, name=name, num_classes=num_classes))
        panels[0].set_ylabel(METRICS[name].label)
        add_legend(figure, panels)
        figure.suptitle(literal(wrapped(title, 9)), fontsize=10)
        write_whole(folder / file, partial(figure.savefig, format="png", dpi=150))
    overview = folder / "all_metrics.png"
    figure = draw_all(metrics[metrics["split"] == "train"], title, num_classes)
    write_whole(overview, partial(figure.savefig, format="png", dpi=100))
    return [*(folder / name for name in _FIGURES), overview]


def draw_metric(axes: Axes, metrics: pd.DataFrame, name: str, num_classes: int | None = None) -> None:
    """One line per method: the mean over seeds, with a band from the least to the greatest; and the value at collapse.

    Args:
        axes: Where to draw.
        metrics: Of one split: columns method, seed, epoch, metric, value.
        name: The metric, of the catalogue.
        num_classes: K.

    Raises:
        ValueError: There is nothing to draw.
    """
    styles = line_styles(list(metrics["method"].unique()))
    values = metrics[metrics["metric"] == name]
    if not np.isfinite(values["value"]).any():
        raise ValueError(f"no finite value of {name} was measured")
    for method, group in values.groupby("method", sort=False):
        draw_band(axes, group, label=literal(str(method)), **styles[str(method)])
    finish_axes(axes, values["value"], name, num_classes)


def draw_band(axes: Axes, values: pd.DataFrame, **style: Any) -> None:
    """The mean over seeds against the epoch, and a band from the least to the greatest."""
    by_epoch = values.groupby("epoch")["value"].agg(["mean", "min", "max"])
    style = {"linewidth": 1.6, "marker": None, "markersize": 4} | style
    if style["marker"] is None and len(by_epoch) == 1:
        style["marker"] = "o"
    if style["marker"] is not None:  # of lines that meet, at different epochs
        every = max(1, len(by_epoch) // 6)
        style["markevery"] = (MARKERS.index(style["marker"]) % every, every)
    axes.plot(by_epoch.index, by_epoch["mean"], **style)
    axes.fill_between(by_epoch.index, by_epoch["min"], by_epoch["max"], color=style["color"], alpha=0.18, linewidth=0)


def finish_axes(axes: Axes, values: pd.Series, name: str, num_classes: int | None) -> None:
    """Scale, ticks, grid, and a thin line at the value at collapse, as the catalogue has them of a metric."""
    _scale(axes, values, name)
    at_collapse = _at_collapse(name, num_classes)
    if at_collapse is not None and axes.get_yscale() == "linear":
        axes.axhline(at_collapse, color="0.4", linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
    first, last = axes.dataLim.intervalx
    axes.xaxis.set_major_locator(FixedLocator([first]) if first == last else MaxNLocator(4, integer=True))
    axes.grid(alpha=0.3, linewidth=0.5)


def metric_label(name: str, metrics: pd.DataFrame) -> str:
    """The label of a metric; of distances to a reference epoch with that epoch, which the table names."""
    label = METRICS[name].label
    if name not in TO_REFERENCE:
        return label
    words, space, formula = label.partition("  $")
    return f"{words}, epoch {', '.join(map(str, sorted(reference_epochs(metrics))))}{space}{formula}"


def style_numbers(labels: Sequence[str]) -> dict[str, int]:
    """Number of each label's style: those of the three published methods are always the same."""
    numbers = {name: place for place, name in enumerate(_PUBLISHED) if name in labels}
    start = len(_PUBLISHED) if numbers and len(labels) <= _WITH_PUBLISHED else 0
    free = (number for number in range(start, start + 2 * len(labels)) if number not in numbers.values())
    return {label: numbers[label] if label in numbers else next(free) for label in labels}


def line_styles(labels: Sequence[str], *, markers: bool | None = None) -> dict[str, dict[str, Any]]:
    """Colour, line and marker of each label; up to seven differ in each of them, up to twelve in line and marker.

    Args:
        labels: In their order.
        markers: Give each line markers; by default where there are more than three.
    """
    numbers = style_numbers(labels)
    marked = len(labels) > _FEW if markers is None else markers
    return {
        label: {
            "color": COLORS[number % len(COLORS)],
            "linestyle": _LINES[(number + number // len(COLORS)) % len(_LINES)],  # another one with the same colour
            "marker": MARKERS[number % len(MARKERS)] if marked else None,
        }
        for label, number in numbers.items()
    }


def _scale(axes: Axes, values: pd.Series, name: str) -> None:
    """The axis that the catalogue asks for; logarithmic only where all is positive and spread."""
    scale = METRICS[name].scale
    if scale == "percent":
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    if scale == "log" and values.min() > 0 and values.max() > 3 * values.min():
        axes.set_yscale("log")
        decades = values.max() > 200 * values.min()
        axes.yaxis.set_major_locator(LogLocator(numticks=5) if decades else LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(LogFormatterSciNotation() if decades else FuncFormatter(lambda x, _: f"{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif scale != "percent" and axes.get_yscale() == "linear":  # a panel shares its axis with one drawn before
        axes.yaxis.set_major_locator(MaxNLocator(5))
        size = max(abs(values.min()), abs(values.max()), _ROUNDING)
        if values.max() - values.min() < _ROUNDING * size or size == _ROUNDING:
            axes.set_ylim(values.mean() - 0.1 * size, values.mean() + 0.1 * size)
        axes.ticklabel_format(axis="y", useOffset=False)


def _at_collapse(name: str, num_classes: int | None) -> float | None:
    metric = METRICS[name]
    if num_classes is None and callable(metric.at_collapse):
        return None
    return metric.value_at_collapse(num_classes or 0)


@without_latex()
def draw_all(metrics: pd.DataFrame, title: str, num_classes: int | None) -> Figure:
    """Every metric, a small panel each, a block of rows for each group."""
    there = set(metrics["metric"])
    groups: dict[str, list[str]] = {}
    for name, metric in METRICS.items():
        if name in there:
            groups.setdefault(metric.group, []).append(name)
    rows = [(group, names[i : i + _COLUMNS]) for group, names in groups.items() for i in range(0, len(names), _COLUMNS)]
    height = 2.3 * len(rows) + 1
    width = 3.3 * _COLUMNS
    figure = Figure(figsize=(width, height))
    # Margins by hand: matplotlib's layout engine takes seconds for so many panels.
    margins = {"left": 0.06, "right": 0.99, "bottom": 0.7 / height, "top": 1 - 0.9 / height, "wspace": 0.3}
    panels = figure.subplots(len(rows), _COLUMNS, squeeze=False, gridspec_kw={"hspace": 0.62, **margins})
    for (_, names), line in zip(rows, panels, strict=True):
        for axes, name in zip(line, names, strict=False):
            axes.set_title(metric_label(name, metrics).replace("  $", "\n$"), fontsize=8)
            draw_or_say_why(axes, partial(draw_metric, metrics=metrics, name=name, num_classes=num_classes))
            axes.tick_params(labelsize=7, which="both")
        for axes in line[len(names) :]:
            axes.remove()
    legend = add_legend(figure, figure.axes, outside=False)
    height = figure.get_figheight()
    figure.subplots_adjust(bottom=(legend + 0.45) / height, top=1 - 0.9 / height)
    for number, ((group, _), line) in enumerate(zip(rows, panels, strict=True)):
        if number == 0 or rows[number - 1][0] != group:
            box = line[0].get_position()
            figure.text(0.012, (box.y0 + box.y1) / 2, group, fontsize=12, weight="bold", rotation=90, va="center")
    title = wrapped(f"{title}; train split, against the epoch", width)
    figure.suptitle(literal(title), fontsize=10, y=1 - 0.3 / height, va="center")
    return figure
