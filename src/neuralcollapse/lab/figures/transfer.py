"""Transfer of frozen features: accuracy of the probes by depth."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from neuralcollapse.lab.figures.panels import save_figures
from neuralcollapse.metrics.figures.panels import literal, without_latex

if TYPE_CHECKING:
    from neuralcollapse.metrics import TransferredLayer


@without_latex()
def write_transfer(layers: Sequence[TransferredLayer], title: str, stem: str, out: Path) -> list[Path]:
    """Draw the accuracies of both probes by depth; return the file.

    Args:
        layers: Accuracies of each layer.
        title: Title of the figure.
        stem: Stem of the file name.
        out: Folder to write to.
    """
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    depth = range(1, len(layers) + 1)
    axes.plot(depth, [row.linear_probe for row in layers], marker="o", markersize=4, label="linear probe")
    nearest = [row.nearest_class_mean for row in layers]
    axes.plot(depth, nearest, marker="s", markersize=4, linestyle="--", label="nearest class mean")
    axes.set_title(literal(title), fontsize=9)
    axes.set_xlabel("layer, the classifier's features last", fontsize=8)
    axes.set_ylabel("test accuracy", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, linewidth=0.5)
    return save_figures({re.sub(r"[^\w.=+,-]+", "-", f"transfer-{stem}"): figure}, out, ["png"])
