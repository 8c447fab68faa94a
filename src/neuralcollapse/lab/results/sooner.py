"""How soon each method is where the method `standard` ends."""

from __future__ import annotations

import math

import pandas as pd

from neuralcollapse.lab.results.judging import student_interval
from neuralcollapse.lab.results.tables import spread

# Heading and metric, all of the test split.
_GOALS = {"acc": "accuracy", "nc1": "nc1_quotient", "nc2": "nc2_etf_means", "nc3": "nc3_duality"}
_BASELINES = ("standard", "standard cross-entropy")


def sooner_table(metrics: pd.DataFrame, baseline: str | None = None) -> pd.DataFrame | None:
    """The first measured epoch at which each method is at least as good as standard of the same seed is at its end.

    Beside it the test accuracy: its mean over the measured epochs, the last one, and the last one's difference to
    standard's, paired by seed, with Student's 95% interval (n − 1).

    Args:
        metrics: What was measured, gathered.
        baseline: The name of standard among the methods; by default ``"standard"`` or ``"standard cross-entropy"``.

    Returns:
        One row a method: mean epochs over the seeds that are there, and how many of them if not all; of accuracies mean
        ± standard deviation over seeds. None where nothing is compared with standard.
    """
    test = metrics[metrics["split"] == "test"]
    if baseline is None:
        baseline = next((name for name in _BASELINES if name in set(test["method"])), None)
    if baseline is None or test["method"].nunique() < 2:
        return None
    goals = {name: _final(test[test["method"] == baseline], metric) for name, metric in _GOALS.items()}
    rows = []
    for method in test["method"].unique():
        own = test[test["method"] == method]
        row = {"method": method}
        for heading, metric in _GOALS.items():
            row[f"to {heading}"] = _epochs(own[own["metric"] == metric], metric, goals[heading])
        accuracies = own[own["metric"] == "accuracy"]
        final = _final(own, "accuracy")
        row["mean acc %"] = spread(100 * accuracies.groupby("seed", dropna=False)["value"].mean(), "{:.1f}")
        row["last acc %"] = spread(100 * final, "{:.1f}")
        row["- standard"] = "" if method == baseline else _interval(100 * (final - goals["acc"]).dropna())
        rows.append(row)
    return pd.DataFrame(rows)


def _final(metrics: pd.DataFrame, metric: str) -> pd.Series:
    """The last value of each seed."""
    of_metric = metrics[metrics["metric"] == metric].sort_values("epoch", kind="stable")
    return of_metric.groupby("seed", dropna=False)["value"].last()


def _epochs(course: pd.DataFrame, metric: str, goals: pd.Series) -> str:
    """The first epoch of each seed that is as good as its goal, over seeds."""
    from neuralcollapse.catalogue import METRICS

    goal = course["seed"].map(goals)
    there = course["value"] >= goal if METRICS[metric].better == "higher" else course["value"] <= goal
    reached = course[there].groupby("seed", dropna=False)["epoch"].min()
    seeds = course["seed"].nunique(dropna=False)
    if reached.empty:
        return "never"
    return f"{reached.mean():.1f}" + ("" if len(reached) == seeds else f" ({len(reached)}/{seeds})")


def _interval(differences: pd.Series) -> str:
    """Mean difference and half of Student's 95% interval, in points."""
    mean, half = student_interval(differences)
    return f"{mean:+.2f}" + ("" if math.isnan(half) else f" ± {half:.2f}")
