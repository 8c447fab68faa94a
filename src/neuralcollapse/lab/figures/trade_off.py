"""Test accuracy against collapse at the last epoch."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from neuralcollapse.catalogue import METRICS
from neuralcollapse.lab.results.groups import RunGroups
from neuralcollapse.lab.results.tables import last_epoch
from neuralcollapse.metrics.figures.curves import draw_points
from neuralcollapse.metrics.figures.panels import Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLLAPSE = ("nc1_quotient", "nc2_etf_means", "nc3_duality")


def trade_off(runs: RunGroups) -> list[Panel]:
    """Return a panel for each of NC1 to NC3 of the train split, with the test accuracy of each group of runs."""
    return [Panel(name, METRICS[name].label, partial(_draw, runs=runs, name=name)) for name in _COLLAPSE]


def _draw(axes: Axes, *, runs: RunGroups, name: str) -> None:
    """Draw the last test accuracy of each group against a metric of the train split: mean, minimum and maximum.

    Raises:
        ValueError: if no group has an accuracy and a positive value of the metric.
    """
    metrics = runs.metrics
    collapse, accuracy = (
        last_epoch(metrics[(metrics["metric"] == metric) & (metrics["split"] == split)])
        for metric, split in ((name, "train"), ("accuracy", "test"))
    )
    points = accuracy.merge(collapse, on=["method", "seed"], suffixes=("", "_collapse"))
    points = points[points["value_collapse"] > 0]
    if points.empty:
        raise ValueError(f"no run has a test accuracy and a positive {name}")
    draw_points(axes, points, "value_collapse", list(runs.groups))
    axes.set_xlabel(f"train {METRICS[name].label}", fontsize=8)
    axes.set_ylabel("test accuracy", fontsize=8)
    axes.grid(alpha=0.3, linewidth=0.5)
