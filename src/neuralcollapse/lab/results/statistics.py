"""Statistics over seeds: mean and spread, Student's interval, paired differences, and epochs to a level."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from neuralcollapse.catalogue import METRICS

if TYPE_CHECKING:
    import pandas as pd

_CONFIDENCE = 0.95


def statistics_over_seeds(values: pd.DataFrame) -> pd.DataFrame:
    """Return mean, standard deviation (n − 1), median, minimum and maximum over seeds, and the number of seeds.

    Args:
        values: Table of `groups.gather_groups`.

    Returns:
        Columns group, epoch, split, metric, mean, std, median, min, max, seeds.
    """
    grouped = values.groupby(["group", "epoch", "split", "metric"], sort=False)["value"]
    columns = grouped.agg(["mean", "std", "median", "min", "max", "count"])
    return columns.reset_index().rename(columns={"count": "seeds"})


def student_interval(values: pd.Series) -> tuple[float, float]:
    """Return the mean, and half the width of Student's 95% interval (n − 1), which is NaN for one value.

    Examples:
        >>> import pandas as pd
        >>> mean, half = student_interval(pd.Series([1.0, 2.0, 3.0]))
        >>> round(mean, 3), round(half, 3)
        (2.0, 2.484)
    """
    half = math.nan if len(values) < 2 else half_width(float(values.std()), len(values))
    return float(values.mean()), half


def rounded(number: float) -> float:
    """Return a number rounded to four significant digits, as records of studies store it."""
    return float(f"{number:.4g}")


def half_width(std: float, seeds: int) -> float:
    """Return half the width of Student's 95% interval of values with a standard deviation (n − 1)."""
    from scipy.stats import t

    return float(t.ppf((1 + _CONFIDENCE) / 2, seeds - 1) * std / math.sqrt(seeds))


def paired_differences(values: pd.Series, others: pd.Series) -> pd.Series:
    """Return the difference for each seed with a value in both; the index is the seed."""
    return (values - others).dropna()


def epochs_to_reach(course: pd.Series, level: float, *, interpolate: bool = False, sustained: bool = False) -> float:
    """Return the epoch at which a metric reaches a level; NaN if it never does.

    The level is reached from below if higher values of the metric are better according to the catalogue, else from
    above. Undefined values do not reach a level.

    Args:
        course: Values by epoch, in order of epochs, named after the metric.
        level: The level.
        interpolate: Interpolate linearly between the last measured epoch before the level is reached and the first
            measured epoch after it; otherwise the result is a measured epoch. If the first value is already beyond the
            level, the result is the first epoch.
        sustained: Return the first measured epoch from which on all values reach the level, instead of the first epoch
            that reaches it.

    Examples:
        >>> import pandas as pd
        >>> course = pd.Series([0.2, 0.6, 0.4, 0.8], index=[1, 3, 5, 7], name="accuracy")
        >>> [epochs_to_reach(course, 0.5), epochs_to_reach(course, 0.5, interpolate=True)]
        [3.0, 2.5]
        >>> epochs_to_reach(course, 0.5, sustained=True)
        7.0
    """
    rising = course.name in METRICS and METRICS[str(course.name)].better == "higher"
    epochs, values = course.index.to_numpy(float), course.to_numpy(float)
    reached = values >= level if rising else values <= level
    if sustained:
        reached = reached[::-1].cumprod()[::-1].astype(bool)
    if not reached.any():
        return math.nan
    first = int(reached.argmax())
    if first == 0 or not interpolate:
        return float(epochs[first])
    before, after = values[first - 1], values[first]
    return float(epochs[first - 1] + (epochs[first] - epochs[first - 1]) * (level - before) / (after - before))


def epochs_to_levels(values: pd.DataFrame, levels: Mapping[str, float], split: str = "train") -> pd.DataFrame:
    """Return the epoch at which each run first reaches a level of each metric, interpolated, as `epochs_to_reach`.

    Args:
        values: Table of `groups.gather_groups`.
        levels: Level of each metric.
        split: Split of the data.

    Returns:
        Columns group, seed, metric, level, epoch.

    Raises:
        ValueError: if a metric was not measured.
    """
    import pandas as pd

    rows = []
    chosen = values[values["split"] == split]
    for metric, level in levels.items():
        measured = chosen[chosen["metric"] == metric]
        if measured.empty:
            metrics = ", ".join(sorted(chosen["metric"].unique()))
            raise ValueError(
                f"reach must name a metric that was measured on the {split} split ({metrics}), got {metric!r}"
            )
        for (group, seed), run in measured.groupby(["group", "seed"], sort=False, dropna=False):
            course = run.sort_values("epoch").set_index("epoch")["value"].rename(metric)
            rows.append((group, seed, metric, level, epochs_to_reach(course, level, interpolate=True)))
    return pd.DataFrame(rows, columns=["group", "seed", "metric", "level", "epoch"])
