"""Statistics over seeds: runs that differ in nothing else, gathered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from neuralcollapse.lab.results.distances import reference_epochs
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.labels import labels_of
from neuralcollapse.lab.results.tables import COLUMNS, read_table, seed_of

# The columns of the training log that are aggregated as well, as metrics of the split "training".
TRAINING = "training"


def group_runs(runs: Sequence[RunFolder], always: Sequence[str] = ("name", "method")) -> dict[str, list[RunFolder]]:
    """Runs that differ in their seed alone, under a label that says in what the groups differ.

    Args:
        runs: Their folders.
        always: Settings that are in each label, whether the groups differ in them or not.

    Raises:
        ValueError: if a run is given twice, or another one has its seed and its settings.
    """
    settings = [run.settings() for run in runs]
    groups: dict[str, list[RunFolder]] = {}
    seen: dict[str, set[int | None]] = {}
    for run, one, label in zip(runs, settings, labels_of(settings, always), strict=True):
        seed = one.get("seed")
        if seed in seen.setdefault(label, set()):
            same = f"have seed {seed}" if seed is not None else "have no seed (`measure --checkpoint` takes --seed)"
            raise ValueError(f"runs must differ, and two of {label!r} {same}: {str(run.path)!r} is one")
        seen[label].add(seed)
        groups.setdefault(label, []).append(run)
    return groups


def gather_groups(groups: Mapping[str, Sequence[RunFolder]]) -> pd.DataFrame:
    """All values of all runs: columns group, seed, epoch, split, metric, value.

    What training itself saw (loss, alignment, accuracy of its batches, never compared) has the split ``"training"``.

    Raises:
        ValueError: if a run has no table, or the distances of the runs of a group are to different reference epochs.
    """
    tables = []
    for label, runs in groups.items():
        references: dict[int, RunFolder] = {}
        for run in runs:
            if not run.metrics.exists():
                raise ValueError(f"run {str(run.path)!r} must have a {run.metrics.name}, and has none: measure it")
            measured, trained = read_table(run.metrics), _training(run)
            # Not with an empty table, whose columns of no type would make epochs and values objects.
            table = pd.concat([measured, trained], ignore_index=True) if len(trained) else measured
            references |= dict.fromkeys(reference_epochs(table), run)
            if len(references) > 1:
                (first, one), (second, other) = references.items()
                raise ValueError(
                    f"distances of the runs of {label!r} must be to the same reference epoch, and are to {first} in "
                    f"{str(one.path)!r} and to {second} in {str(other.path)!r}: `neuralcollapse distance` with "
                    "--reference computes them again"
                )
            table.insert(0, "group", label)
            table.insert(1, "seed", seed_of(run))
            tables.append(table)
    return pd.concat(tables, ignore_index=True)


def statistics_over_seeds(values: pd.DataFrame) -> pd.DataFrame:
    """Mean, standard deviation (of n − 1), median, least and greatest value over seeds, and their number.

    Args:
        values: As `gather_groups` gives them.

    Returns:
        Columns group, epoch, split, metric, mean, std, median, min, max, seeds.
    """
    keys = ["group", "epoch", "split", "metric"]
    grouped = values.groupby(keys, sort=False)["value"]
    return (
        grouped.agg(["mean", "std", "median", "min", "max", "count"]).reset_index().rename(columns={"count": "seeds"})
    )


def epochs_to_reach(values: pd.DataFrame, levels: Mapping[str, float], split: str = "train") -> pd.DataFrame:
    """The epoch at which each run first reaches a level of a metric.

    Between two measured epochs it is interpolated linearly; a run that begins beyond the level has its first epoch, one
    that never reaches it has none (NaN).

    Args:
        values: As `gather_groups` gives them.
        levels: Metric to level. Reached from below or from above: whichever side the catalogue calls worse.
        split: Of the data.

    Returns:
        Columns group, seed, metric, level, epoch.

    Raises:
        ValueError: A metric that was not measured.
    """
    rows = []
    chosen = values[values["split"] == split]
    for metric, level in levels.items():
        measured = chosen[chosen["metric"] == metric]
        if measured.empty:
            there = ", ".join(sorted(chosen["metric"].unique()))
            raise ValueError(
                f"reach must name a metric that was measured on the {split} split ({there}), got {metric!r}"
            )
        for (group, seed), course in measured.groupby(["group", "seed"], sort=False, dropna=False):
            by_epoch = course.sort_values("epoch").set_index("epoch")["value"]
            rows.append((group, seed, metric, level, first_crossing(by_epoch, metric, level)))
    return pd.DataFrame(rows, columns=["group", "seed", "metric", "level", "epoch"])


def first_crossing(course: pd.Series, metric: str, level: float) -> float:
    """The epoch at which a metric first reaches a level, as `epochs_to_reach`.

    Args:
        course: Its values by epoch, in order.
        metric: Which.
        level: What is reached.
    """
    from neuralcollapse.catalogue import METRICS

    rising = METRICS[metric].better == "higher" if metric in METRICS else False
    epochs, values = course.index.to_numpy(float), course.to_numpy(float)
    beyond = values >= level if rising else values <= level
    if not beyond.any():
        return float("nan")
    first = int(beyond.argmax())
    if first == 0:
        return float(epochs[0])
    before, after = values[first - 1], values[first]
    return float(epochs[first - 1] + (epochs[first] - epochs[first - 1]) * (level - before) / (after - before))


def _training(run: RunFolder) -> pd.DataFrame:
    if not run.training_log.exists():
        return pd.DataFrame(columns=COLUMNS)
    log = read_table(run.training_log)
    tidy = log.melt("epoch", var_name="metric", value_name="value")
    tidy.insert(1, "split", TRAINING)
    return tidy
