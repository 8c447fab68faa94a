"""The figures of the three papers, from tables and records of runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.lines import Line2D

from neuralcollapse.catalogue import METRICS
from neuralcollapse.lab.figures.curves import draw_band, finish_axes, line_styles, metric_label
from neuralcollapse.lab.figures.page import Panel, Runs, legend_above, literal, wrapped
from neuralcollapse.lab.figures.records import margin_panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = Sequence[tuple[str, str, str]]  # metric, split, words
_SERIES_LINES: tuple[Any, ...] = ("-", "--", ":", "-.")
# What a head makes of a batch, and its own parameters, in the order of their bars.
_OF_HEAD = {"head.features": "features", "head.class_means": "class means", "head.weight": "W", "head.bias": "b"}


def papyan(runs: Runs) -> list[Panel]:
    """Figures 1 to 7 of Papyan, Han, Donoho (PNAS 2020)."""
    rows: list[tuple[str, str, Series]] = [
        ("1-accuracy", "1: accuracy", [("accuracy", "train", "train"), ("accuracy", "test", "test")]),
        ("2-equinorm", "2: equal norms", _pair("nc2_equinorm")),
        ("3-equiangular", "3: equal angles", _pair("nc2_equiangular")),
        ("4-max-angle", "4: maximal angle", _pair("nc2_max_angle")),
        ("5-duality", "5: classifier meets means", [("nc3_distance", "train", "")]),
        ("6-within-class", "6: within-class variation", [("nc1_pinv", "train", "")]),
        ("7-nearest-mean", "7: nearest class mean", [("nc4_ncc_mismatch", s, s) for s in ("train", "test")]),
    ]
    draw = partial(draw_series, runs=runs, by_marker=True)
    return [Panel(name, title, partial(draw, series=series)) for name, title, series in rows]


def zhu(runs: Runs) -> list[Panel]:
    """NC1 to NC4 and accuracies as in Figures 3 and 6 of Zhu et al. (NeurIPS 2021)."""
    rows: list[tuple[str, str, Series]] = [
        ("nc1", "NC1", [("nc1_pinv", "train", "")]),
        ("nc2", "NC2", [("nc2_etf_weights", "train", "")]),
        ("nc3", "NC3", [("nc3_duality", "train", "")]),
        ("nc4", "NC4", [("nc4_bias", "train", "")]),
        ("train-accuracy", "train accuracy", [("accuracy", "train", "")]),
        ("test-accuracy", "test accuracy", [("accuracy", "test", "")]),
    ]
    return [Panel(name, title, partial(draw_series, runs=runs, series=series)) for name, title, series in rows]


def markou(runs: Runs) -> list[Panel]:
    """Accuracy, NC, ETF distances and margins of the methods, as Markou, Ajanthan, Gould (NeurIPS 2024) show them."""
    names = ["nc1_pinv", "nc1_vci", "nc2_etf_means", "nc2_equinorm_difference", "nc3_duality", "alignment"]
    names += ["nc4_ncc_mismatch", "nc2_cos_margin"]
    distances = ["etf_weights", "etf_means", "etf_between", "etf_weights_reference", "etf_means_reference"]
    rows: list[tuple[str, str, Series]] = [
        (f"{split}-accuracy", f"{split} accuracy", [("accuracy", split, "")]) for split in ("train", "test")
    ]
    rows += [
        (name, metric_label(name, runs.metrics).split("  $")[0], [(name, "train", "")]) for name in (*names, *distances)
    ]
    panels = [Panel(name, title, partial(draw_series, runs=runs, series=series)) for name, title, series in rows]
    return panels + margin_panels(runs)


def gradient_flow(runs: Runs) -> list[Panel]:
    """Mean and largest gradient of each layer's weight and of the head's tensors at the end of the last epoch."""
    return [
        Panel(runs.stems[label], literal(wrapped(label)), partial(_draw_gradients, runs=runs, label=label))
        for label in runs.groups
    ]


def draw_series(axes: Axes, *, runs: Runs, series: Series, by_marker: bool = False) -> None:
    """Draw metrics of all groups.

    Args:
        axes: Where to draw.
        runs: Whose.
        series: One metric, of which each group has a line style; or several, of which each metric has one and each
            group a marker.
        by_marker: Tell groups apart by markers for one metric too, as in panels of several.

    Raises:
        ValueError: if there is nothing to draw.
    """
    table, drawn = runs.metrics, []
    by_marker = by_marker or len(series) > 1
    styles = line_styles(list(runs.groups), markers=by_marker or None)
    for (name, split, _), line in zip(series, _SERIES_LINES, strict=False):
        values = table[(table["metric"] == name) & (table["split"] == split)]
        for label, group in values.groupby("method", sort=False):
            style = styles[str(label)] | ({"linestyle": line} if by_marker else {})
            draw_band(axes, group, label=literal(str(label)), **style)
        drawn.append(values["value"])
    name, split, _ = series[0]
    found = pd.concat(drawn)
    if found.empty:
        command = "distance" if name.startswith("etf_") else "measure"
        raise ValueError(f"{name} was not measured on the {split} split: run `neuralcollapse {command}` on the runs")
    finish_axes(axes, found, name, runs.num_classes)
    axes.set_xlabel("epoch", fontsize=8)
    label = METRICS[name].label.replace("  $", "\n$") if len(series) == 1 else ""
    axes.set_ylabel(label, fontsize=8, linespacing=1.5)
    if len(series) > 1:
        lines = [Line2D([], [], color="0.3", linestyle=line) for _, line in zip(series, _SERIES_LINES, strict=False)]
        legend_above(axes, lines, [words for *_, words in series])


def _pair(name: str) -> Series:
    return [(f"{name}_{of}", "train", of) for of in ("means", "weights")]


def _draw_gradients(axes: Axes, *, runs: Runs, label: str) -> None:
    tables = runs.gradients(label)
    if not tables:
        raise ValueError("no gradients were written: these runs were not trained here")
    last = pd.concat([table[table["epoch"] == table["epoch"].max()] for table in tables])
    shown = last[~last["parameter"].str.endswith("bias") | last["parameter"].isin(_OF_HEAD)]
    sizes = shown.groupby("parameter", sort=False)[["mean", "max"]].mean()
    head = [name for name in _OF_HEAD if name in sizes.index]
    sizes = sizes.reindex([*(name for name in sizes.index if name not in head), *head])
    layers = len(sizes) - len(head)
    wide = max(1.0, layers / 12)  # so that the names of the head's bars have room
    places = [*range(layers), *(layers + wide * place for place in range(1, len(head) + 1))]
    shape: Any = {"x": places, "width": [0.8] * layers + [0.8 * wide] * len(head)}
    axes.bar(height=sizes["max"], color="#56B4E9", label="largest", **shape)
    axes.bar(height=sizes["mean"], color="#0072B2", label="mean", hatch="//", edgecolor="white", linewidth=0, **shape)
    axes.set_yscale("log")
    ticks = [*range(0, layers, max(1, layers // 8)), *range(layers, len(places))]
    names = [*_without_shared_parts(sizes.index[:layers]), *(_OF_HEAD[name] for name in head)]
    axes.set_xticks(
        [places[tick] for tick in ticks],
        [names[tick] for tick in ticks],
        rotation=60,
        ha="right",
        rotation_mode="anchor",
    )
    axes.set_ylabel("magnitude of the gradient", fontsize=8)
    axes.tick_params(axis="x", labelsize=6)


def _without_shared_parts(names: Sequence[str]) -> list[str]:
    """Dotted names without what all of them begin with."""
    split = [name.removesuffix(".weight").split(".") for name in names]
    shared = (
        len(list(takewhile(lambda parts: len(set(parts)) == 1, zip(*split, strict=False)))) if len(names) > 1 else 0
    )
    return [".".join(parts[shared:]) or name for parts, name in zip(split, names, strict=True)]
