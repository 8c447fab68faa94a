"""Accuracy and NC1 of the classes with many, a medium number of, and few training images."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from neuralcollapse.lab.results.groups import RunGroups
from neuralcollapse.lab.results.tables import GROUPS, OF_GROUPS, last_epoch
from neuralcollapse.metrics.figures.curves import draw_bars, line_styles
from neuralcollapse.metrics.figures.panels import Panel, literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH = 0.7  # total width of the adjacent markers of one group of classes


def groups_of_classes(runs: RunGroups) -> list[Panel]:
    """Return a panel of the last test accuracies and one of the last train NC1, with all runs side by side."""
    return [
        Panel(metric, f"{split} {title}", partial(_draw, runs=runs, metric=metric, split=split))
        for (metric, split, _), title in zip(OF_GROUPS.values(), ("accuracy", "NC1"), strict=True)
    ]


def _draw(axes: Axes, *, runs: RunGroups, metric: str, split: str) -> None:
    """Draw the last values of each group of classes and of all classes: mean, minimum and maximum over seeds.

    Raises:
        ValueError: if no run has groups of classes.
    """
    last = last_epoch(runs.metrics)
    last = last[last["split"] == split]
    names = [f"{metric}_{group}" for group in GROUPS]
    names = [name for name in names if (last["metric"] == name).any()]
    if not names:
        raise ValueError("no groups of classes: they are measured in runs with the setting imbalance")
    labels = [*runs.groups]
    styles = line_styles(labels, markers=True)
    over_seeds = last.groupby(["method", "metric"])["value"].agg(["mean", "min", "max"])
    for position, label in enumerate(labels):
        shift = _WIDTH * ((position + 0.5) / len(labels) - 0.5)
        shown = [(place, (label, name)) for place, name in enumerate([*names, metric])]
        shown = [(place, key) for place, key in shown if key in over_seeds.index]
        rows = over_seeds.loc[[key for _, key in shown]]
        style = {**styles[label], "linestyle": "none"}
        draw_bars(axes, [place + shift for place, _ in shown], rows, label=literal(label), **style)
    axes.set_xticks(range(len(names) + 1), [*(name.rpartition("_")[2] for name in names), "all"])
    if metric != "accuracy":
        axes.set_yscale("log")
    axes.grid(axis="y", alpha=0.3, linewidth=0.5)
