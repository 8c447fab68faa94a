"""Features, class means and classifier of a few classes on the simplex that they collapse to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from neuralcollapse.lab.figures.curves import COLORS
from neuralcollapse.lab.figures.page import Panel, Runs, literal, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from neuralcollapse.metrics import Measurement

_CLASSES = (0, 1, 2)
_MARKERS = ("o", "s", "^")


@dataclass(frozen=True)
class Projection:
    """Coordinates on the simplex of q + 1 classes; its vertices, at distance 1, are the same in every record.

    Attributes:
        features: (N, q), in units of the mean norm of the class means, centred at their mean.
        targets: (N,) their classes.
        means: (q + 1, q) the class means, likewise.
        weights: (q + 1, q) the classifier's rows, in units of their own mean norm.
        vertices: (q + 1, q).
    """

    features: Tensor
    targets: Tensor
    means: Tensor
    weights: Tensor
    vertices: Tensor


def project(record: Measurement, classes: Sequence[int]) -> Projection:
    """Project on the plane (three classes) or the space (four) of the simplex ETF nearest to the classes' means.

    Raises:
        ValueError: A class that the record does not have, or class means that are all equal.
    """
    import torch

    from neuralcollapse.geometry import nearest_simplex_etf

    count = len(record.moments.counts)
    if len(set(classes)) < 3 or not all(0 <= one < count for one in classes):
        raise ValueError(f"classes must be at least three different ones of 0 to {count - 1}, got {list(classes)}")
    chosen = torch.tensor(classes)
    means = record.moments.means.double()[chosen]
    centre = means.mean(0)
    vertices = simplex_vertices(len(classes))
    plane = vertices.mT @ nearest_simplex_etf(means) * (len(classes) - 1) / len(classes)  # orthonormal rows
    weights = record.weight.double()[chosen]
    weights = (weights - weights.mean(0)) @ plane.mT
    unit = (means - centre).norm(dim=1).mean()
    mine = torch.isin(record.sample_targets, chosen)
    return Projection(
        features=(record.sample_features[mine].double() - centre) @ plane.mT / unit,
        targets=record.sample_targets[mine],
        means=(means - centre) @ plane.mT / unit,
        weights=weights / weights.norm(dim=1).mean(),
        vertices=vertices,
    )


def simplex_vertices(count: int) -> Tensor:
    """(count, count − 1) where the classes stand at collapse, at distance 1 from their centre."""
    import torch

    from neuralcollapse.geometry import simplex_basis

    return math.sqrt(count / (count - 1)) * simplex_basis(count, dtype=torch.float64)


def feature_panels(runs: Runs) -> list[Panel]:
    """Features of three classes at the first, a middle and the last measured epoch, of the first run of each group."""
    panels = []
    for label in runs.groups:
        epochs = runs.epochs(label, "train")
        for epoch in sorted({epochs[0], epochs[(len(epochs) - 1) // 4], epochs[-1]}):
            draw = partial(_draw_features, runs=runs, label=label, epoch=epoch)
            panels.append(
                Panel(f"{runs.stems[label]}-epoch{epoch:04d}", literal(wrapped(f"{label}, epoch {epoch}")), draw)
            )
    return panels


def _draw_features(axes: Axes, *, runs: Runs, label: str, epoch: int) -> None:
    found = project(runs.record(label, "train", epoch), _CLASSES)
    for place, one in enumerate(_CLASSES):
        color = COLORS[place]
        mine = found.features[found.targets == one]
        axes.scatter(
            mine[:, 0],
            mine[:, 1],
            s=8,
            color=color,
            marker=_MARKERS[place],
            alpha=0.5,
            linewidths=0,
            label=f"class {one}",
        )
        axes.plot(*zip((0, 0), found.weights[place].tolist(), strict=True), color=color, linewidth=1.4)
        x, y = found.means[place].tolist()
        axes.scatter(x, y, s=45, color=color, marker=_MARKERS[place], edgecolors="black", zorder=3)
    triangle = found.vertices[[0, 1, 2, 0]]
    axes.plot(*triangle.T, color="0.4", linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
    axes.set(aspect="equal", xlim=(-1.6, 1.6), ylim=(-1.7, 1.2), xticks=[], yticks=[])
    axes.set_xlabel("lines: classifier; large: class means; dotted: simplex", fontsize=7)
