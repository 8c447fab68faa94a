"""Features, class means and classifier of a few classes, projected onto the simplex to which they collapse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from neuralcollapse.metrics.figures.curves import COLORS, MARKERS
from neuralcollapse.metrics.figures.panels import Panel, literal, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from neuralcollapse.metrics import Measurement
    from neuralcollapse.metrics.figures.records import Shown

_CLASSES = (0, 1, 2)


@dataclass(frozen=True)
class Projection:
    """Coordinates in the q-dimensional space of the simplex of q + 1 classes, with the same vertices for all records.

    Attributes:
        features: (N, q) features, centred at the mean of the class means, in units of the mean norm of the class means.
        targets: (N,) classes of the features.
        means: (q + 1, q) class means, centred and scaled like the features.
        weights: (q + 1, q) centred rows of the classifier, in units of their mean norm; (0, q) without a classifier.
        vertices: (q + 1, q) vertices of the simplex, at distance 1 from the origin.
    """

    features: Tensor
    targets: Tensor
    means: Tensor
    weights: Tensor
    vertices: Tensor


def project(record: Measurement, classes: Sequence[int]) -> Projection:
    """Project onto the plane (three classes) or space (four classes) of the simplex ETF nearest to the class means.

    Args:
        record: The measurement.
        classes: Classes to project, at least three different ones.

    Raises:
        ValueError: if the record does not have a class, or the class means are all equal.
    """
    import torch

    from neuralcollapse.geometry import nearest_simplex_etf

    count = len(record.moments.counts)
    if len(set(classes)) < 3 or not all(0 <= number < count for number in classes):
        raise ValueError(f"classes must be at least three different ones of 0 to {count - 1}, got {list(classes)}")
    chosen = torch.tensor(classes)
    means = record.moments.means.double()[chosen]
    centre = means.mean(0)
    vertices = simplex_vertices(len(classes))
    plane = vertices.mT @ nearest_simplex_etf(means) * (len(classes) - 1) / len(classes)  # orthonormal rows
    weights = record.weight.double()[chosen if len(record.weight) else []]
    weights = (weights - weights.mean(0)) @ plane.mT
    unit = (means - centre).norm(dim=1).mean()
    of_classes = torch.isin(record.sample_targets, chosen)
    return Projection(
        features=(record.sample_features[of_classes].double() - centre) @ plane.mT / unit,
        targets=record.sample_targets[of_classes],
        means=(means - centre) @ plane.mT / unit,
        weights=weights / weights.norm(dim=1).mean(),
        vertices=vertices,
    )


def simplex_vertices(count: int) -> Tensor:
    """Return the positions (count, count − 1) of the classes at collapse, at distance 1 from their centre."""
    import torch

    from neuralcollapse.geometry import simplex_basis

    return math.sqrt(count / (count - 1)) * simplex_basis(count, dtype=torch.float64)


def feature_panels(runs: Shown) -> list[Panel]:
    """Return the features of three classes at the first, an early and the last epoch, for the first run of a group."""
    panels = []
    for label in runs.groups:
        epochs = runs.epochs(label, runs.split)
        for epoch in sorted({epochs[0], epochs[(len(epochs) - 1) // 4], epochs[-1]}):
            name, title = f"{runs.stems[label]}-epoch{epoch:04d}", literal(wrapped(f"{label}, epoch {epoch}"))
            panels.append(Panel(name, title, partial(_draw_features, runs=runs, label=label, epoch=epoch)))
    return panels


def _draw_features(axes: Axes, *, runs: Shown, label: str, epoch: int) -> None:
    projected = project(runs.record(label, runs.split, epoch), _CLASSES)
    for index, number in enumerate(_CLASSES):
        style: dict[str, Any] = {"color": COLORS[index], "marker": MARKERS[index]}
        x, y = projected.features[projected.targets == number].T
        axes.scatter(x, y, s=8, alpha=0.5, linewidths=0, label=f"class {number}", **style)
        if len(projected.weights):
            x, y = projected.weights[index].tolist()
            axes.plot((0, x), (0, y), color=COLORS[index], linewidth=1.4)
        x, y = projected.means[index].tolist()
        axes.scatter(x, y, s=45, edgecolors="black", zorder=3, **style)
    triangle = projected.vertices[[0, 1, 2, 0]]
    axes.plot(*triangle.T, color="0.4", linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
    axes.set(aspect="equal", xlim=(-1.6, 1.6), ylim=(-1.7, 1.2), xticks=[], yticks=[])
    axes.set_xlabel("lines: classifier; large: class means; dotted: simplex", fontsize=7)
