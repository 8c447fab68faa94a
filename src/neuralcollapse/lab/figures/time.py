"""Accuracy and collapse against the time of the training steps."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from neuralcollapse.catalogue import METRICS
from neuralcollapse.lab.results.groups import TRAINING, RunGroups
from neuralcollapse.metrics.figures.curves import draw_metric
from neuralcollapse.metrics.figures.panels import Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN = (("accuracy", "test"), ("nc1_quotient", "train"), ("nc2_etf_means", "train"), ("nc3_duality", "train"))


def against_time(runs: RunGroups) -> list[Panel]:
    """Return a panel per metric: test accuracy and NC1 to NC3 of the train split against minutes of training."""
    return [
        Panel(name, f"{split}: {METRICS[name].label}", partial(_draw, runs=runs, name=name, split=split))
        for name, split in _SHOWN
    ]


def _draw(axes: Axes, *, runs: RunGroups, name: str, split: str) -> None:
    """Draw a metric; the position of an epoch is the time of all training steps up to its end, averaged over seeds.

    Raises:
        ValueError: if no finite value was measured, or the training logs have no seconds.
    """
    metrics = runs.metrics
    seconds = metrics[(metrics["split"] == TRAINING) & (metrics["metric"] == "seconds")].sort_values("epoch")
    if seconds.empty:
        raise ValueError("no training times: these runs were not trained by neuralcollapse")
    minutes = seconds.assign(minutes=seconds.groupby(["method", "seed"])["value"].cumsum() / 60)
    of_epoch = minutes.groupby(["method", "epoch"])["minutes"].mean().reset_index()
    values = metrics[metrics["split"] == split].merge(of_epoch, on=["method", "epoch"])
    draw_metric(axes, values.assign(epoch=values["minutes"]), name, runs.num_classes)
    axes.set_xlabel("minutes of training", fontsize=8)
