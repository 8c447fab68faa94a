"""Controlled collapse: NC1 of layers by group, and transfer and detection against NC1, at the last epoch."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from neuralcollapse.catalogue import METRICS
from neuralcollapse.lab.results.groups import RunGroups
from neuralcollapse.lab.results.tables import last_epoch
from neuralcollapse.metrics.figures.curves import line_styles
from neuralcollapse.metrics.figures.panels import Panel, literal
from neuralcollapse.metrics.profile import FEATURES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NC1 = "nc1_quotient"
_LABEL = METRICS[_NC1].label.replace("  $", "\n$")  # words and formula on two lines


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
        {"group": label, "layer": layer, "value": values[_NC1]}
        for label in runs.groups
        for record in runs.last_records(label, "train")
        for layer, values in [*record.layers.items(), (FEATURES, record.metrics)]
    ]
    table = pd.DataFrame(rows)
    styles = line_styles(list(table["layer"].unique()), markers=True)
    positions = {label: position for position, label in enumerate(runs.groups)}
    for layer, of_layer in table.groupby("layer", sort=False):
        over_seeds = of_layer.groupby("group", sort=False)["value"].agg(["mean", "min", "max"])
        axes.errorbar(
            [positions[str(label)] for label in over_seeds.index],
            over_seeds["mean"],
            yerr=[over_seeds["mean"] - over_seeds["min"], over_seeds["max"] - over_seeds["mean"]],
            label=literal(str(layer)),
            markersize=4,
            elinewidth=1,
            **styles[str(layer)],
        )
    axes.set_xticks(range(len(positions)), [literal(label) for label in positions], fontsize=7, rotation=45)
    axes.set_yscale("log")
    axes.set_ylabel(_LABEL, fontsize=8, linespacing=1.5)
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
    """Draw the last value of each group against its last NC1, both with mean, minimum and maximum over seeds."""
    metrics, keys = last_epoch(runs.metrics), ["method", "seed"]
    collapse = metrics[(metrics["split"] == "train") & (metrics["metric"] == _NC1)][[*keys, "value"]]
    points = last_epoch(values).merge(collapse, on=keys, suffixes=("", "_nc1"))
    points = points[np.isfinite(points["value"]) & (points["value_nc1"] > 0)]
    if points.empty:
        raise ValueError(f"no finite value at an epoch with a positive {_NC1}")
    over_seeds = points.groupby("method", sort=False)[["value_nc1", "value"]].agg(["mean", "min", "max"])
    styles = line_styles(list(runs.groups), markers=True)
    for label, row in over_seeds.iterrows():
        x, y = row["value_nc1"], row["value"]
        axes.errorbar(
            x["mean"],
            y["mean"],
            xerr=[[x["mean"] - x["min"]], [x["max"] - x["mean"]]],
            yerr=[[y["mean"] - y["min"]], [y["max"] - y["mean"]]],
            label=literal(str(label)),
            markersize=5,
            elinewidth=1,
            **{**styles[str(label)], "linestyle": "none"},
        )
    axes.set_xscale("log")
    axes.invert_xaxis()  # collapse to the right
    axes.set_xlabel(_LABEL, fontsize=8, linespacing=1.5)
    axes.set_ylabel(ylabel, fontsize=8)
    axes.grid(alpha=0.3, linewidth=0.5)
