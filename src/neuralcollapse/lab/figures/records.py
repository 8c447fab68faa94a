"""Figures of single records: cosine margins, layers and classes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.ticker import MaxNLocator

from neuralcollapse.catalogue import METRICS
from neuralcollapse.lab.figures.curves import finish_axes, line_styles
from neuralcollapse.lab.figures.page import Panel, Runs, legend_above, literal, wrapped
from neuralcollapse.lab.memory import check_memory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from neuralcollapse.metrics import Measurement

_OF_LAYERS = ("nc1_quotient", "nc1_cdnv", "nc2_etf_means", "nc2_equiangular_means")


def margin_panels(runs: Runs) -> list[Panel]:
    """The sorted cosine margins of all samples at the last epoch, of either split."""
    return [
        Panel(f"margins-{split}", f"cosine margins, {split}", partial(_draw_margins, runs=runs, split=split))
        for split in ("train", "test")
    ]


def layer_panels(runs: Runs) -> list[Panel]:
    """Collapse of every layer that was measured, against its depth, at the last epoch."""
    return [
        Panel(name, METRICS[name].label.replace("  $", "\n$"), partial(_draw_layers, runs=runs, name=name))
        for name in _OF_LAYERS
    ]


def class_panels(runs: Runs) -> list[Panel]:
    """Norms, within-class variances and cosines of every class at the last epoch, of the first run of each group."""
    panels = []
    for label in runs.groups:
        name = runs.stems[label]
        rows: list[tuple[str, str, Callable[..., None]]] = [
            ("norms", "norms", _draw_norms),
            ("variances", "within-class variance", _draw_variances),
            ("means", "cosines of means", partial(_draw_cosines, of="means")),
            ("weights", "cosines of weights", partial(_draw_cosines, of="weights")),
        ]
        panels += [
            Panel(f"{name}-{what}", literal(wrapped(f"{label}: {words}")), partial(draw, runs=runs, label=label))
            for what, words, draw in rows
        ]
    return panels


def _draw_margins(axes: Axes, *, runs: Runs, split: str) -> None:
    styles = line_styles(list(runs.groups))
    values: list[Any] = []
    for label in runs.groups:
        margins = [record.cos_margins.numpy() for record in runs.last_records(label, split)]
        margins = [one[np.isfinite(one)] for one in margins if np.isfinite(one).any()]
        if not margins:
            continue
        share = np.linspace(0, 1, 400)
        at_share = np.stack([np.quantile(one, share) for one in margins])
        style = styles[label] | {"linewidth": 1.6, "markersize": 4, "markevery": len(share) // 6}
        axes.plot(100 * share, at_share.mean(0), label=literal(label), **style)
        band = {"color": style["color"], "alpha": 0.18, "linewidth": 0}
        axes.fill_between(100 * share, at_share.min(0), at_share.max(0), **band)
        values += margins
    if not values:
        raise ValueError(f"no cosine margin of the {split} split is defined")
    if runs.num_classes:
        collapsed = runs.num_classes / (runs.num_classes - 1)
        axes.axhline(collapsed, color="0.4", linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
    axes.set_xlabel("share of samples below, in %", fontsize=8)
    axes.set_ylabel("cosine margin", fontsize=8)
    axes.grid(alpha=0.3, linewidth=0.5)


def _draw_layers(axes: Axes, *, runs: Runs, name: str) -> None:
    import pandas as pd

    styles, drawn = line_styles(list(runs.groups), markers=True), []
    for label in runs.groups:
        records = [record for record in runs.last_records(label, "train") if record.layers]
        if not records:
            continue
        courses = np.array(
            [[*(values[name] for values in record.layers.values()), record.metrics[name]] for record in records]
        )
        depth = range(1, courses.shape[1] + 1)
        axes.plot(depth, courses.mean(0), label=literal(label), markersize=4, **styles[label])
        band = {"color": styles[label]["color"], "alpha": 0.18, "linewidth": 0}
        axes.fill_between(depth, courses.min(0), courses.max(0), **band)
        drawn.append(courses)
    if not drawn:
        raise ValueError("no layers were measured: run `neuralcollapse measure --layers A,B` on the runs")
    finish_axes(axes, pd.Series(np.concatenate(drawn).ravel()), name, runs.num_classes)
    axes.set_xlabel("layer, the classifier's features last", fontsize=8)


def cosines(record: Measurement, of: Literal["means", "weights"], most: int | None = None) -> np.ndarray:
    """Return the cosines (K, K) between centred class means or classifier rows; NaN on the diagonal.

    Args:
        record: The measurement.
        of: Vectors to compare; cosines of the mean of a class without samples are NaN.
        most: Number of the first classes that are compared; by default all.

    Raises:
        ValueError: if they do not fit into memory.
    """
    from neuralcollapse.metrics import class_statistics

    size = min(record.num_classes, most or record.num_classes)
    check_memory(2 * 8 * size**2, f"cosines of {size} classes")
    rows = record.weight.double()[:size]
    if of == "means":
        statistics = class_statistics(record.moments)
        means = rows.new_full(record.weight.shape, float("nan"))
        means[statistics.classes] = statistics.centred_means
        rows = means[:size]
    unit = rows / rows.norm(dim=1, keepdim=True)
    matrix: np.ndarray = (unit @ unit.T).numpy()
    np.fill_diagonal(matrix, np.nan)
    return matrix


def _values_of_classes(record: Measurement) -> Any:
    from neuralcollapse.metrics import class_values

    return class_values(record.moments, record.weight)


def _draw_norms(axes: Axes, *, runs: Runs, label: str) -> None:
    values = _values_of_classes(runs.last_records(label, "train")[0])
    means, weights = values.mean_norms, values.weight_norms
    style: dict[str, Any] = {"markersize": 3, "linewidth": 0.8}
    lines = axes.plot(values.classes, means / means.mean(), "o-", color="#0072B2", **style)
    lines += axes.plot(values.classes, weights / weights.mean(), "s--", color="#D55E00", **style)
    legend_above(axes, lines, ["centred means", "weights"])
    axes.set_ylabel("norm / mean norm", fontsize=8)
    axes.set_xlabel("class", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(alpha=0.3, linewidth=0.5)


def _draw_variances(axes: Axes, *, runs: Runs, label: str) -> None:
    values = _values_of_classes(runs.last_records(label, "train")[0])
    axes.bar(values.classes, values.within_class_variances, color="#0072B2")
    axes.set_ylabel("mean squared distance to the mean", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("class", fontsize=8)


def _draw_cosines(axes: Axes, *, runs: Runs, label: str, of: Literal["means", "weights"]) -> None:
    found = cosines(runs.last_records(label, "train")[0], of)
    ideal = -1 / (len(found) - 1)
    spread = max(float(np.nanmax(np.abs(found - ideal))), 0.02)
    picture = axes.imshow(found, cmap="cividis", vmin=ideal - spread, vmax=ideal + spread)
    bar = axes.figure.colorbar(picture, ax=axes, shrink=0.85)
    bar.ax.axhline(ideal, color="white", linewidth=1.5)
    bar.ax.tick_params(labelsize=7)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel(f"class; the line at {ideal:.2f} is an ETF's", fontsize=8)
