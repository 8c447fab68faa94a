"""Metrics against the epoch, one line per method; the palette and the line styles of all figures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogFormatterSciNotation,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
)

from neuralcollapse.catalogue import METRICS, TO_REFERENCE, reference_epochs
from neuralcollapse.metrics.figures.panels import (
    Page,
    add_legend,
    draw_or_write_reason,
    literal,
    without_latex,
    wrapped,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from neuralcollapse.metrics.figures.records import Shown

# Palette of Okabe and Ito, which colour-blind readers can distinguish, with grey; and a lighter one for dark pages.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
COLORS_ON_DARK = ("#4da3e0", "#f08c4a", "#35c999", "#e59ac7", "#f2b134", "#a9dcf7", "#e8ebee", "#9aa3ad")
# Line styles and markers also distinguish lines without colour.
_LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*", "h")
# Labels of the published methods, which have the same style in every figure.
RESERVED = ("standard", "fixed", "implicit")
# With more than `_FEW` lines, each line also has a marker; with more than `_WITH_PUBLISHED`, the colours of the
# published methods are no longer reserved for them.
_FEW, _WITH_PUBLISHED = 3, 8
_COLUMNS = 5
# An axis is logarithmic if its values span more than this factor.
_LOG_SPAN = 3
# Values that differ by less than this share of their size are equal up to rounding.
_ROUNDING = 1e-5


def draw_metric(axes: Axes, metrics: pd.DataFrame, name: str, num_classes: int | None = None) -> None:
    """Draw a metric as one line per method (mean over seeds, with a band of their range), and its value at collapse.

    Args:
        axes: Axes to draw on.
        metrics: Values of one split: columns method, seed, epoch, metric, value.
        name: Name of the metric in the catalogue.
        num_classes: K.

    Raises:
        ValueError: if no finite value of the metric was measured.
    """
    styles = line_styles(list(metrics["method"].unique()))
    values = metrics[metrics["metric"] == name]
    if not np.isfinite(values["value"]).any():
        raise ValueError(f"no finite value of {name} was measured")
    for method, group in values.groupby("method", sort=False):
        draw_band(axes, group, label=literal(str(method)), **styles[str(method)])
    finish_axes(axes, values["value"], name, num_classes)


def draw_band(axes: Axes, values: pd.DataFrame, **style: Any) -> None:
    """Draw the mean over seeds against the epoch, and a band from the smallest to the greatest value.

    Args:
        axes: Axes to draw on.
        values: Columns seed, epoch, value.
        **style: Style of the line, as `line_styles` returns it, and its label.
    """
    by_epoch = values.groupby("epoch")["value"].agg(["mean", "min", "max"])
    if style.get("marker") is None and len(by_epoch) == 1:
        style["marker"] = "o"
    if style.get("marker") is not None:  # at different epochs for different lines, because lines may coincide
        every = max(1, len(by_epoch) // 6)
        style["markevery"] = (MARKERS.index(style["marker"]) % every, every)
    draw_range(axes, by_epoch.index, *(by_epoch[name] for name in ("mean", "min", "max")), **style)


def draw_range(axes: Axes, positions: Any, middle: Any, least: Any, greatest: Any, **style: Any) -> None:
    """Draw a line, and a band of the same colour between two other lines.

    Args:
        axes: Axes to draw on.
        positions: Horizontal positions (n,).
        middle: Values of the line (n,).
        least: Lower edge of the band (n,).
        greatest: Upper edge of the band (n,).
        **style: Style of the line.
    """
    axes.plot(positions, middle, **({"linewidth": 1.6, "markersize": 4} | style))
    axes.fill_between(positions, least, greatest, color=style["color"], alpha=0.18, linewidth=0)


def draw_bars(axes: Axes, positions: Any, values: pd.DataFrame, **style: Any) -> None:
    """Draw means as markers with bars from the minimum to the maximum.

    Args:
        axes: Axes to draw on.
        positions: Horizontal positions (n,); or a table like ``values``, for horizontal bars as well.
        values: One row per marker (n), with the columns mean, min and max.
        **style: Style of the markers, as `line_styles` returns it, and their label.
    """
    bars: dict[str, Any] = {"yerr": [values["mean"] - values["min"], values["max"] - values["mean"]]}
    if hasattr(positions, "columns"):
        bars["xerr"] = [positions["mean"] - positions["min"], positions["max"] - positions["mean"]]
        positions = positions["mean"]
    axes.errorbar(positions, values["mean"], **bars, **({"markersize": 5, "elinewidth": 1} | style))


def finish_axes(axes: Axes, values: pd.Series, name: str, num_classes: int | None) -> None:
    """Set scale, ticks and grid of a metric from the catalogue, and draw a thin line at its value at collapse."""
    _scale(axes, values, name)
    at_collapse = _at_collapse(name, num_classes)
    if at_collapse is not None and axes.get_yscale() == "linear":
        axes.axhline(at_collapse, color="0.4", linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
    first, last = axes.dataLim.intervalx
    axes.xaxis.set_major_locator(FixedLocator([first]) if first == last else MaxNLocator(4, integer=True))
    axes.grid(alpha=0.3, linewidth=0.5)


def metric_label(name: str, metrics: pd.DataFrame) -> str:
    """Return the label of a metric; for distances to a reference epoch, with the epoch found in the table."""
    label = METRICS[name].label
    if name not in TO_REFERENCE:
        return label
    words, space, formula = label.partition("  $")
    return f"{words}, epoch {', '.join(map(str, sorted(reference_epochs(metrics))))}{space}{formula}"


def style_numbers(labels: Sequence[str]) -> dict[str, int]:
    """Return the number of each label's style; the published methods always have the same numbers."""
    numbers = {name: number for number, name in enumerate(RESERVED) if name in labels}
    start = len(RESERVED) if numbers and len(labels) <= _WITH_PUBLISHED else 0
    free = (number for number in range(start, start + 2 * len(labels)) if number not in numbers.values())
    return {label: numbers[label] if label in numbers else next(free) for label in labels}


def draw_points(axes: Axes, points: pd.DataFrame, x: str, labels: Sequence[str]) -> None:
    """Draw one marker per method: mean, minimum and maximum over seeds of both values.

    The horizontal axis is logarithmic if its values span a factor of more than 3.

    Args:
        axes: Axes to draw on.
        points: Columns method and value, and the horizontal values, which are positive.
        x: Name of the column of the horizontal values.
        labels: All methods of the figure, which determine the styles.
    """
    styles, groups = line_styles(list(labels), markers=True), points.groupby("method", sort=False)
    of_x, of_values = (groups[name].agg(["mean", "min", "max"]) for name in (x, "value"))
    for label in of_values.index:
        style = {**styles[str(label)], "linestyle": "none"}
        draw_bars(axes, of_x.loc[[label]], of_values.loc[[label]], label=literal(str(label)), **style)
    set_log_scale(axes, "x", points[x])


def line_styles(labels: Sequence[str], *, markers: bool | None = None) -> dict[str, dict[str, Any]]:
    """Return colour, line style and marker of each label.

    Up to seven labels differ in all three properties, and up to twelve in line style and marker together.

    Args:
        labels: Labels in their order.
        markers: Whether lines have markers; by default if there are more than three labels.
    """
    numbers = style_numbers(labels)
    marked = len(labels) > _FEW if markers is None else markers
    return {
        label: {
            "color": COLORS[number % len(COLORS)],
            "linestyle": _LINES[(number + number // len(COLORS)) % len(_LINES)],  # differs where the colour repeats
            "marker": MARKERS[number % len(MARKERS)] if marked else None,
        }
        for label, number in numbers.items()
    }


def _scale(axes: Axes, values: pd.Series, name: str) -> None:
    """Set the scale from the catalogue; a logarithmic one only for positive values that span more than `_LOG_SPAN`."""
    scale = METRICS[name].scale
    if scale == "percent":
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    if scale == "log" and set_log_scale(axes, "y", values):
        return
    if scale != "percent" and axes.get_yscale() == "linear":  # the axis may be shared with an earlier panel
        axes.yaxis.set_major_locator(MaxNLocator(5))
        size = max(abs(values.min()), abs(values.max()), _ROUNDING)
        if values.max() - values.min() < _ROUNDING * size or size == _ROUNDING:
            axes.set_ylim(values.mean() - 0.1 * size, values.mean() + 0.1 * size)
        axes.ticklabel_format(axis="y", useOffset=False)


def set_log_scale(axes: Axes, direction: Literal["x", "y"], values: pd.Series) -> bool:
    """Make an axis logarithmic if its values are positive and span a factor of more than 3; return whether it is.

    The labels are 1, 2 and 5 of each decade, or powers of ten if the values span a factor of more than 200.
    """
    if not (values.min() > 0 and values.max() > _LOG_SPAN * values.min()):  # also if all values are NaN
        return False
    axes.set(**{f"{direction}scale": "log"})
    axis = {"x": axes.xaxis, "y": axes.yaxis}[direction]
    decades = values.max() > 200 * values.min()
    axis.set_major_locator(LogLocator(numticks=5) if decades else LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(LogFormatterSciNotation() if decades else FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())
    return True


def _at_collapse(name: str, num_classes: int | None) -> float | None:
    metric = METRICS[name]
    if num_classes is None and callable(metric.at_collapse):
        return None
    return metric.value_at_collapse(num_classes or 0)


def overview(runs: Shown, title: str) -> Page:
    """Draw every metric of one split."""
    return draw_all(runs.metrics[runs.metrics["split"] == runs.split], title, runs.num_classes, runs.split)


@without_latex()
def draw_all(metrics: pd.DataFrame, title: str, num_classes: int | None, split: str = "train") -> Page:
    """Draw every metric of one split in a small panel, in a block of rows per group of metrics.

    Args:
        metrics: Columns method, seed, epoch, metric, value.
        title: Model and data.
        num_classes: K.
        split: Name of the split, for the title.
    """
    measured = set(metrics["metric"])
    groups: dict[str, list[str]] = {}
    for name, metric in METRICS.items():
        if name in measured:
            groups.setdefault(metric.group, []).append(name)
    rows = [(group, names[i : i + _COLUMNS]) for group, names in groups.items() for i in range(0, len(names), _COLUMNS)]
    height = 2.3 * len(rows) + 1
    width = 3.3 * _COLUMNS
    figure = Page(figsize=(width, height))
    # The margins are set explicitly, because matplotlib's layout engine takes seconds for this number of panels.
    margins = {"left": 0.06, "right": 0.99, "bottom": 0.7 / height, "top": 1 - 0.9 / height, "wspace": 0.3}
    panels = figure.subplots(len(rows), _COLUMNS, squeeze=False, gridspec_kw={"hspace": 0.62, **margins})
    for (_, names), line in zip(rows, panels, strict=True):
        for axes, name in zip(line, names, strict=False):
            axes.set_title(metric_label(name, metrics).replace("  $", "\n$"), fontsize=8)
            draw_or_write_reason(axes, partial(draw_metric, metrics=metrics, name=name, num_classes=num_classes))
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
    title = wrapped(f"{title}; {split} split, against the epoch", width)
    figure.suptitle(literal(title), fontsize=10, y=1 - 0.3 / height, va="center")
    return figure
