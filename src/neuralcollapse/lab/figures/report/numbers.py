"""Data of the figures of the page: metrics over epochs, cosines between classes, and the animation of collapse."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from neuralcollapse.catalogue import METRICS
from neuralcollapse.lab.results.groups import RunGroups
from neuralcollapse.metrics.figures.curves import metric_label
from neuralcollapse.metrics.figures.features import project, simplex_vertices
from neuralcollapse.metrics.figures.published import class_cosines

if TYPE_CHECKING:
    import pandas as pd

    from neuralcollapse.metrics import Measurement

SPLITS = ("train", "validation", "test")
# Limits of the size of the page. A frame is one epoch of the animation.
MAX_FRAMES, MAX_SAMPLES, MAX_MATRIX, MAX_GROUPS = 60, 300, 150, 6
_MAX_MOVING, _MAX_OF_COURSES = 250_000, 300_000  # maximum count of numbers in all frames, and in all curves
_MAX_EPOCHS, _MIN_EPOCHS, _MIN_SAMPLES = 250, 20, 30
_MAX_REACH = 3.0  # half the width of the shown plane, in mean norms of the class means; early features are far outside


def shown_groups(runs: RunGroups) -> list[str]:
    """Return the labels of the first groups, whose records are shown."""
    return list(islice(runs.groups, MAX_GROUPS))


def courses(metrics: pd.DataFrame) -> dict[str, dict[str, dict[str, Any]]]:
    """Return epochs, and means, minima and maxima over seeds, by split, metric and group.

    Args:
        metrics: Columns method, seed, epoch, split, metric, value.
    """
    known = metrics[metrics["split"].isin(SPLITS) & metrics["metric"].isin(METRICS)].sort_values("epoch", kind="stable")
    keys = ["split", "metric", "method"]
    over_seeds = known.groupby([*keys, "epoch"], sort=False)["value"].agg(["mean", "min", "max"]).reset_index()
    seeds = known.groupby("method")["seed"].nunique()
    groups = over_seeds.groupby(keys, sort=False)
    limit = min(_MAX_EPOCHS, max(_MIN_EPOCHS, _MAX_OF_COURSES // (4 * max(len(groups), 1))))
    by_split: dict[str, dict[str, dict[str, Any]]] = {split: {} for split in SPLITS}
    for (split, metric, method), of_group in ((map(str, key), group) for key, group in groups):
        shown = of_group.iloc[thinned(range(len(of_group)), limit)]
        course = {"epochs": shown["epoch"].tolist(), "mean": _significant(shown["mean"])}
        if seeds[method] > 1:
            course |= {"least": _significant(shown["min"]), "greatest": _significant(shown["max"])}
        by_split[split].setdefault(metric, {})[method] = course
    return {split: of_split for split, of_split in by_split.items() if of_split}


def described(metrics: pd.DataFrame, num_classes: int) -> dict[str, dict[str, Any]]:
    """Return the catalogue entries of the metrics in a table, in their order, with labels without formulas."""
    measured = set(metrics["metric"])
    return {
        name: {
            "label": metric_label(name, metrics).partition("  $")[0],
            "formula": metric.formula,
            "scale": metric.scale,
            "atCollapse": metric.value_at_collapse(num_classes),
        }
        for name, metric in METRICS.items()
        if name in measured
    }


def cosine_matrices(runs: RunGroups) -> dict[str, Any]:
    """Return the cosines between the means and between the weights of the first classes.

    They are those of the last record of the first run of each shown group.
    """
    matrices: dict[str, dict[str, list[list[float | None]]]] = {}
    for label in shown_groups(runs):
        record = runs.record(label, "train", runs.epochs(label, "train")[-1])
        matrices[label] = {
            of: [_significant(row, 3) for row in class_cosines(record, of, MAX_MATRIX)] for of in ("means", "weights")
        }
    num_classes = _num_classes(runs)
    ideal = -1 / (num_classes - 1)
    values = chain.from_iterable(row for of_group in matrices.values() for rows in of_group.values() for row in rows)
    spread = max((abs(value - ideal) for value in values if value is not None), default=0.0)
    return {"classes": num_classes, "ideal": ideal, "spread": max(spread, 0.02), "matrices": matrices}


def motion(runs: RunGroups, classes: Sequence[int] | None = None) -> dict[str, Any] | None:
    """Return class means, classifier rows and some features on the simplex of a few classes at each measured epoch.

    Args:
        runs: Runs; the first run of each group is shown.
        classes: Three or four classes; by default the first three that have samples.

    Returns:
        The data of the animation; None if there are only two classes, which do not span a plane.

    Raises:
        ValueError: if a run has no records, or a class is not in the records.
    """
    labels = shown_groups(runs)
    recorded = {label: runs.epochs(label, "train") for label in labels}
    chosen = _chosen(runs.record(labels[0], "train", recorded[labels[0]][-1]), classes)
    if chosen is None:
        return None
    measured = sorted({epoch for epochs in recorded.values() for epoch in epochs})
    epochs = thinned(measured, MAX_FRAMES)
    samples = _MAX_MOVING // (len(epochs) * len(labels) * (len(chosen) - 1))
    each = min(MAX_SAMPLES, max(_MIN_SAMPLES, samples)) // len(chosen)
    frames: dict[str, list[dict[str, Any]]] = {}
    for label in labels:
        of_epoch: dict[int, dict[str, Any]] = {}
        frames[label] = []
        for epoch in epochs:
            # If a run was not measured at this epoch or ended earlier, its previous record is shown.
            last = max((number for number in recorded[label] if number <= epoch), default=recorded[label][0])
            if last not in of_epoch:
                of_epoch[last] = _frame(runs.record(label, "train", last), chosen, each) | {"epoch": last}
            frames[label].append(of_epoch[last])
    return {
        "classes": chosen,
        "epochs": epochs,
        "thinned": len(measured) > len(epochs),
        "samples": each,
        "vertices": _coordinates(simplex_vertices(len(chosen))),
        "reach": _reach(chain.from_iterable(frames.values())),
        "frames": frames,
    }


def thinned(epochs: Sequence[int], limit: int) -> list[int]:
    """Return at most the given number of evenly spaced epochs, including the first and the last.

    Examples:
        >>> thinned(range(1, 101), 4)
        [1, 34, 67, 100]
    """
    if len(epochs) <= limit:
        return list(epochs)
    return [epochs[round(index * (len(epochs) - 1) / (limit - 1))] for index in range(limit)]


def _num_classes(runs: RunGroups) -> int:
    label = next(iter(runs.groups))
    return runs.num_classes or len(runs.record(label, "train", runs.epochs(label, "train")[-1]).moments.counts)


def _chosen(record: Measurement, classes: Sequence[int] | None) -> list[int] | None:
    counts = record.moments.counts.tolist()
    with_samples = [number for number, samples in enumerate(counts) if samples]
    if classes is None:
        return with_samples[:3] if len(with_samples) > 2 else None
    if len(set(classes)) != len(classes) or len(classes) not in (3, 4) or not set(classes) <= set(with_samples):
        only = "" if len(with_samples) == len(counts) else " that have samples"
        raise ValueError(
            f"classes must be three or four different ones of 0 to {len(counts) - 1}{only}, got {list(classes)}"
        )
    return list(classes)


def _frame(record: Measurement, classes: Sequence[int], each: int) -> dict[str, Any]:
    try:
        projected = project(record, classes)
    except ValueError:  # if the class means are all equal, there is no nearest simplex
        undefined: list[list[float | None]] = [[None] * len(classes)] * (len(classes) - 1)
        coordinates = {"features": [undefined] * len(classes), "means": undefined, "weights": undefined}
    else:
        features = [projected.features[projected.targets == number][:each] for number in classes]
        coordinates = {
            "features": [*map(_coordinates, features)],
            "means": _coordinates(projected.means),
            "weights": _coordinates(projected.weights),
        }
    accuracy, nc1 = (record.metrics.get(name, math.nan) for name in ("accuracy", "nc1_quotient"))
    return coordinates | dict(zip(("accuracy", "nc1"), _significant([accuracy, nc1]), strict=True))


def _coordinates(rows: Any) -> list[list[float | None]]:
    """Return coordinates (q, N), the layout of plotly, rounded to a thousandth."""
    return [[round(value, 3) if math.isfinite(value) else None for value in axis] for axis in rows.T.tolist()]


def _reach(frames: Iterable[dict[str, Any]]) -> float:
    """Return half the width of the shown plane, which contains the simplexes and 98% of the coordinates of samples."""
    sizes = sorted(
        abs(value)
        for frame in frames
        for of_class in frame["features"]
        for axis in of_class
        for value in axis
        if value is not None
    )
    return min(max(1.25, sizes[int(0.98 * (len(sizes) - 1))] if sizes else 0.0), _MAX_REACH)


def _significant(values: Iterable[float], digits: int = 5) -> list[float | None]:
    """Return values rounded to significant digits, with None (null in JSON) for values that are not finite."""
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values]
