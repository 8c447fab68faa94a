"""Bars of the gradients of the layers and of the head."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import pandas as pd

from neuralcollapse.metrics.figures.curves import COLORS
from neuralcollapse.metrics.figures.panels import Panel, literal, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from neuralcollapse.lab.results.groups import RunGroups

# Tensors of a head, in the order of their bars: tensors that it computes from a batch, and its parameters.
_OF_HEAD = {"head.features": "features", "head.class_means": "class means", "head.weight": "W", "head.bias": "b"}


def gradient_flow(runs: RunGroups) -> list[Panel]:
    """Return the mean and the largest gradient of each layer's weight and of the head, after the last epoch."""
    return [
        Panel(runs.stems[label], literal(wrapped(label)), partial(_draw_gradients, runs=runs, label=label))
        for label in runs.groups
    ]


def _draw_gradients(axes: Axes, *, runs: RunGroups, label: str) -> None:
    tables = runs.gradients(label)
    if not tables:
        raise ValueError("no gradients were written, because these runs were not trained by neuralcollapse")
    last = pd.concat([table[table["epoch"] == table["epoch"].max()] for table in tables])
    shown = last[~last["parameter"].str.endswith("bias") | last["parameter"].isin(_OF_HEAD)]
    sizes = shown.groupby("parameter", sort=False)[["mean", "max"]].mean()
    head = [name for name in _OF_HEAD if name in sizes.index]
    sizes = sizes.reindex([*(name for name in sizes.index if name not in head), *head])
    count = len(sizes) - len(head)
    wide = max(1.0, count / 12)  # width of the bars of the head, so that their names fit
    positions = [*range(count), *(count + wide * number for number in range(1, len(head) + 1))]
    shape: Any = {"x": positions, "width": [0.8] * count + [0.8 * wide] * len(head)}
    axes.bar(height=sizes["max"], color=COLORS[5], label="largest", **shape)
    axes.bar(height=sizes["mean"], color=COLORS[0], label="mean", hatch="//", edgecolor="white", linewidth=0, **shape)
    axes.set_yscale("log")
    ticks = [*range(0, count, max(1, count // 8)), *range(count, len(positions))]
    names = [*_without_shared_parts(sizes.index[:count]), *(_OF_HEAD[name] for name in head)]
    turned: Any = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks([positions[tick] for tick in ticks], [names[tick] for tick in ticks], **turned)
    axes.set_ylabel("magnitude of the gradient", fontsize=8)
    axes.tick_params(axis="x", labelsize=6)


def _without_shared_parts(names: Sequence[str]) -> list[str]:
    """Return dotted names without the parts with which all of them begin."""
    split = [name.removesuffix(".weight").split(".") for name in names]
    shared = len([*takewhile(lambda parts: len(set(parts)) == 1, zip(*split, strict=False))]) if len(names) > 1 else 0
    return [".".join(parts[shared:]) or name for parts, name in zip(split, names, strict=True)]
