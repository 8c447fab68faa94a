"""Controlled collapse: NC1 of layers by group, and transfer and detection against NC1, at the last epoch."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pandas as pd

from neuralcollapse.lab.figures.detection import NC1, NC1_LABEL, label_axes, with_nc1
from neuralcollapse.lab.results.groups import RunGroups
from neuralcollapse.lab.results.tables import last_epoch
from neuralcollapse.metrics.figures.curves import draw_bars, draw_points, line_styles
from neuralcollapse.metrics.figures.panels import Panel, literal
from neuralcollapse.metrics.profile import FEATURES

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def control(runs: RunGroups) -> list[Panel]:
    """Return a panel of NC1 by group, one of the transfer accuracy and one per detection score against NC1."""
    rates = runs.detection
    pairs = dict.fromkeys(zip(rates["set"], rates["score"], strict=True))
    auroc = partial(_draw_auroc, runs=runs)
    return [
        Panel("nc1", "NC1 of layers", partial(_draw_layers, runs=runs)),
        Panel("transfer", "transfer: linear probe", partial(_draw_transfer, runs=runs)),
        *(
            Panel(f"{name}-{score}", literal(f"{name}: {score}"), partial(auroc, name=name, score=score))
            for name, score in pairs
        ),
    ]


def _draw_layers(axes: Axes, *, runs: RunGroups) -> None:
    """Draw NC1 of each measured layer at the last epoch for each group: mean, minimum and maximum over seeds."""
    rows = [
        {"group": label, "layer": layer, "value": values[NC1]}
        for label in runs.groups
        for record in runs.last_records(label, "train")
        for layer, values in [*record.layers.items(), (FEATURES, record.metrics)]
    ]
    table = pd.DataFrame(rows)
    styles = line_styles(list(table["layer"].unique()), markers=True)
    positions = {label: position for position, label in enumerate(runs.groups)}
    for layer, of_layer in table.groupby("layer", sort=False):
        over_seeds = of_layer.groupby("group", sort=False)["value"].agg(["mean", "min", "max"])
        at = [positions[str(label)] for label in over_seeds.index]
        draw_bars(axes, at, over_seeds, label=literal(str(layer)), markersize=4, **styles[str(layer)])
    axes.set_xticks(range(len(positions)), [literal(label) for label in positions], fontsize=7, rotation=45)
    axes.set_yscale("log")
    axes.set_ylabel(NC1_LABEL, fontsize=8, linespacing=1.5)
    axes.grid(alpha=0.3, linewidth=0.5)


def _draw_transfer(axes: Axes, *, runs: RunGroups) -> None:
    accuracies = runs.transfer
    chosen = accuracies[(accuracies["layer"] == FEATURES) & (accuracies["metric"] == "linear_probe")]
    if chosen.empty:
        raise ValueError("no transfer accuracies: run `neuralcollapse transfer`")
    _draw_against_nc1(axes, runs, chosen, "accuracy of the linear probe")


def _draw_auroc(axes: Axes, *, runs: RunGroups, name: str, score: str) -> None:
    rates = runs.detection
    chosen = rates[(rates["set"] == name) & (rates["score"] == score) & (rates["metric"] == "auroc")]
    _draw_against_nc1(axes, runs, chosen, "AUROC")


def _draw_against_nc1(axes: Axes, runs: RunGroups, values: pd.DataFrame, ylabel: str) -> None:
    """Draw the last value of each group against the NC1 of its epoch: mean, minimum and maximum over seeds of both."""
    points = with_nc1(runs, last_epoch(values))
    points = points[points["value_nc1"] > 0]
    if points.empty:
        raise ValueError(f"no finite value at an epoch with a positive {NC1}")
    draw_points(axes, points, "value_nc1", list(runs.groups))
    label_axes(axes, ylabel)
