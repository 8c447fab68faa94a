"""The numbers behind the page's figures: courses of metrics, cosines of classes, classes as they collapse."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from neuralcollapse.catalogue import METRICS
from neuralcollapse.lab.figures.curves import metric_label
from neuralcollapse.lab.figures.features import project, simplex_vertices
from neuralcollapse.lab.figures.published import class_cosines
from neuralcollapse.lab.results.groups import RunGroups

if TYPE_CHECKING:
    import pandas as pd

    from neuralcollapse.metrics import Measurement

SPLITS = ("train", "validation", "test")
# What keeps the page small. A frame is an epoch of the animation.
MAX_FRAMES, MAX_SAMPLES, MAX_MATRIX, MAX_GROUPS = 60, 300, 150, 6
_MAX_MOVING, _MAX_OF_COURSES = 250_000, 300_000  # numbers
_MAX_EPOCHS, _MIN_EPOCHS, _MIN_SAMPLES = 250, 20, 30
_MAX_REACH = 3.0  # of the pictured plane, in mean norms of the class means; early features lie far beyond


def shown_groups(runs: RunGroups) -> list[str]:
    """The groups whose records are shown."""
    return list(islice(runs.groups, MAX_GROUPS))


def courses(metrics: pd.DataFrame) -> dict[str, dict[str, dict[str, Any]]]:
    """Of each split, metric and group: epochs, and the mean, least and greatest value over seeds.

    Args:
        metrics: Columns method, seed, epoch, split, metric, value.
    """
    known = metrics[metrics["split"].isin(SPLITS) & metrics["metric"].isin(METRICS)].sort_values("epoch", kind="stable")
    keys = ["split", "metric", "method"]
    over_seeds = known.groupby([*keys, "epoch"], sort=False)["value"].agg(["mean", "min", "max"]).reset_index()
    seeds = known.groupby("method")["seed"].nunique()
    several = set(seeds[seeds > 1].index)
    groups = over_seeds.groupby(keys, sort=False)
    limit = min(_MAX_EPOCHS, max(_MIN_EPOCHS, _MAX_OF_COURSES // (4 * max(len(groups), 1))))
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for (split, metric, method), course in ((map(str, key), course) for key, course in groups):
        kept = course.iloc[thinned(range(len(course)), limit)]
        numbers = {"epochs": kept["epoch"].tolist(), "mean": _significant(kept["mean"])}
        if method in several:
            numbers |= {"least": _significant(kept["min"]), "greatest": _significant(kept["max"])}
        found.setdefault(split, {}).setdefault(metric, {})[method] = numbers
    return {split: found[split] for split in SPLITS if split in found}


def described(metrics: pd.DataFrame, num_classes: int) -> dict[str, dict[str, Any]]:
    """The catalogue's entries of the metrics in a table, in its order; labels without their mathematics."""
    there = set(metrics["metric"])
    return {
        name: {
            "label": metric_label(name, metrics).partition("  $")[0],
            "formula": metric.formula,
            "scale": metric.scale,
            "atCollapse": metric.value_at_collapse(num_classes),
        }
        for name, metric in METRICS.items()
        if name in there
    }


def cosine_matrices(runs: RunGroups) -> dict[str, Any]:
    """Cosines of the first classes' means and weights, in the last record of the first run of each group shown."""
    matrices: dict[str, Any] = {}
    for label in shown_groups(runs):
        record = runs.record(label, "train", runs.epochs(label, "train")[-1])
        for of in ("means", "weights"):
            found = class_cosines(record, of, MAX_MATRIX)
            matrices.setdefault(label, {})[of] = [_significant(row, 3) for row in found]
    num_classes = _num_classes(runs)
    ideal = -1 / (num_classes - 1)
    values = chain.from_iterable(row for of_group in matrices.values() for one in of_group.values() for row in one)
    spread = max((abs(value - ideal) for value in values if value is not None), default=0.0)
    return {"classes": num_classes, "ideal": ideal, "spread": max(spread, 0.02), "matrices": matrices}


def motion(runs: RunGroups, classes: Sequence[int] | None = None) -> dict[str, Any] | None:
    """Class means, classifier rows and some features on the simplex of a few classes, at each measured epoch.

    Args:
        runs: The first run of each group is shown.
        classes: Three or four; by default the first three that have samples.

    Returns:
        None where there are only two classes, and so no plane.

    Raises:
        ValueError: A run without records, or classes that are not there.
    """
    labels = shown_groups(runs)
    own = {label: runs.epochs(label, "train") for label in labels}
    chosen = _chosen(runs.record(labels[0], "train", own[labels[0]][-1]), classes)
    if chosen is None:
        return None
    epochs = thinned(sorted({epoch for of_group in own.values() for epoch in of_group}), MAX_FRAMES)
    dimensions = len(chosen) - 1
    samples = _MAX_MOVING // (len(epochs) * len(labels) * dimensions)
    each = min(MAX_SAMPLES, max(_MIN_SAMPLES, samples)) // len(chosen)
    frames: dict[str, list[dict[str, Any]]] = {}
    for label in labels:
        at: dict[int, dict[str, Any]] = {}
        frames[label] = []
        for epoch in epochs:
            # One that was not measured at this epoch stands as it was, and one that ended before stays.
            mine = max((one for one in own[label] if one <= epoch), default=own[label][0])
            if mine not in at:
                at[mine] = _frame(runs.record(label, "train", mine), chosen, each) | {"epoch": mine}
            frames[label].append(at[mine])
    return {
        "classes": chosen,
        "epochs": epochs,
        "thinned": len({epoch for of_group in own.values() for epoch in of_group}) > len(epochs),
        "samples": each,
        "vertices": _places(simplex_vertices(len(chosen))),
        "reach": _reach(chain.from_iterable(frames.values())),
        "frames": frames,
    }


def thinned(epochs: Sequence[int], limit: int) -> list[int]:
    """At most so many of them, evenly spaced, the first and the last among them.

    Examples:
        >>> thinned(range(1, 101), 4)
        [1, 34, 67, 100]
    """
    if len(epochs) <= limit:
        return list(epochs)
    return [epochs[round(place * (len(epochs) - 1) / (limit - 1))] for place in range(limit)]


def _num_classes(runs: RunGroups) -> int:
    label = next(iter(runs.groups))
    return runs.num_classes or len(runs.record(label, "train", runs.epochs(label, "train")[-1]).moments.counts)


def _chosen(record: Measurement, classes: Sequence[int] | None) -> list[int] | None:
    counts = record.moments.counts.tolist()
    there = [one for one, samples in enumerate(counts) if samples]
    if classes is None:
        return there[:3] if len(there) > 2 else None
    if len(set(classes)) != len(classes) or len(classes) not in (3, 4) or not set(classes) <= set(there):
        absent = "" if len(there) == len(counts) else " that have samples"
        raise ValueError(
            f"classes must be three or four different ones of 0 to {len(counts) - 1}{absent}, got {list(classes)}"
        )
    return list(classes)


def _frame(record: Measurement, classes: Sequence[int], each: int) -> dict[str, Any]:
    try:
        found = project(record, classes)
    except ValueError:  # class means that are all equal: no simplex is the nearest
        nowhere: list[list[float | None]] = [[None] * len(classes)] * (len(classes) - 1)
        places = {"features": [nowhere] * len(classes), "means": nowhere, "weights": nowhere}
    else:
        features = [_places(found.features[found.targets == one][:each]) for one in classes]
        places = {"features": features, "means": _places(found.means), "weights": _places(found.weights)}
    return {
        **places,
        "accuracy": _significant([record.metrics.get("accuracy", math.nan)])[0],
        "nc1": _significant([record.metrics.get("nc1_quotient", math.nan)])[0],
    }


def _places(rows: Any) -> list[list[float | None]]:
    """Coordinates (q, N), as plotly takes them, to a thousandth."""
    return [[round(value, 3) if math.isfinite(value) else None for value in axis] for axis in rows.T.tolist()]


def _reach(frames: Iterable[dict[str, Any]]) -> float:
    """Half the width of the plane to show: of all but the furthest samples, and of all simplexes."""
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
    """Rounded; None, as JSON has it, where there is no number."""
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values]
