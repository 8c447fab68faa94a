"""Results of class-incremental training: accuracies of old and new classes, forgetting, and their tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from neuralcollapse.lab.results.tables import aligned, spread

# Metrics of collapse that are recorded for all, old and new classes.
COLLAPSE = ("nc1_quotient", "nc2_etf_means", "nc3_duality")
# Heading of a column of the printed table: classes, metric, and format of its value after the last session.
_COLUMNS = {
    "average acc": ("all", "average_accuracy", "{:.1%}"),
    "last acc": ("all", "accuracy", "{:.1%}"),
    "old": ("old", "accuracy", "{:.1%}"),
    "new": ("new", "accuracy", "{:.1%}"),
    "harmonic": ("all", "harmonic_mean", "{:.1%}"),
    "forgetting": ("all", "forgetting", "{:.1%}"),
}
_OF_TRAIN = {"nc1 old": ("old", "nc1_quotient", "{:.2g}"), "nc1 new": ("new", "nc1_quotient", "{:.2g}")}


def of_session(number: int) -> str:
    """Return the name in the table of the classes of a session, counted from 1."""
    return f"session {number}"


def session_metrics(accuracies: Sequence[Sequence[float]], counts: Sequence[int]) -> dict[tuple[str, str], float]:
    """Return the results after the last of several sessions, by classes and metric.

    Let a_tj be the accuracy on the classes of session j after session t, with decisions among all classes seen, n_j the
    number of images of session j, and T the number of sessions so far:

    - ``accuracy`` of ``all`` classes: Σ_j n_j a_Tj/Σ_j n_j; of ``old`` classes, those of the first session: a_T1; of
      ``new`` classes: the same mean over j ≥ 2;
    - ``average_accuracy``: mean over t of the accuracy of all classes, including the first session;
    - ``harmonic_mean``: 2ab/(a + b) of the accuracies of old and new classes, 0 if both are 0;
    - ``forgetting``: mean over j < T of max_{t<T} a_tj − a_Tj.

    Results that need new classes are NaN after the first session.

    Args:
        accuracies: Accuracies a_tj of the sessions j ≤ t in row t.
        counts: n_j of each session.

    Returns:
        Values by (classes, metric), including ``("session j", "accuracy")`` of each session.

    Raises:
        ValueError: if row t does not have t values.

    Source: average accuracy of Rebuffi et al., iCaRL (CVPR 2017), who leave out the first session; forgetting of
    Chaudhry et al., Riemannian Walk (ECCV 2018); harmonic mean of Peng et al., ALICE (ECCV 2022).

    Examples:
        >>> results = session_metrics([[1.0], [0.75, 0.25]], counts=[300, 100])
        >>> results["all", "accuracy"], results["all", "forgetting"], results["all", "harmonic_mean"]
        (0.625, 0.25, 0.375)
    """
    if [len(row) for row in accuracies] != list(range(1, len(accuracies) + 1)) or len(counts) < len(accuracies):
        raise ValueError(f"accuracies must have one value more in each row, got rows of {[*map(len, accuracies)]}")

    def mean(row: Sequence[float], first: int = 0) -> float:
        sizes = counts[first : len(row)]
        return sum(n * a for n, a in zip(sizes, row[first:], strict=True)) / sum(sizes) if sizes else math.nan

    *earlier, last = accuracies
    old, new = last[0], mean(last, 1)
    lost = [max(row[j] for row in earlier[j:]) - last[j] for j in range(len(earlier))]
    return {
        ("all", "accuracy"): mean(last),
        ("old", "accuracy"): old,
        ("new", "accuracy"): new,
        ("all", "average_accuracy"): sum(map(mean, accuracies)) / len(accuracies),
        ("all", "harmonic_mean"): 0.0 if old == new == 0 else 2 * old * new / (old + new),
        ("all", "forgetting"): sum(lost) / len(lost) if lost else math.nan,
        **{(of_session(number), "accuracy"): accuracy for number, accuracy in enumerate(last, start=1)},
    }


def last_session(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the last session."""
    return table[table["session"] == table["session"].max()]


def sessions_table(table: pd.DataFrame) -> str:
    """Return one row per strategy after the last session, as aligned text: mean ± standard deviation over seeds.

    Args:
        table: Columns `SESSION_COLUMNS`.
    """
    last = last_session(table)
    rows = []
    for strategy, of_strategy in last.groupby("strategy", sort=False):
        row = {"strategy": strategy}
        rates = of_strategy["session_lr"].unique()
        row["session lr"] = ", ".join(f"{rate:g}" if rate else "–" for rate in rates)
        for split, columns in (("test", _COLUMNS), ("train", _OF_TRAIN)):
            for heading, (classes, metric, form) in columns.items():
                chosen = of_strategy[
                    (of_strategy["split"] == split)
                    & (of_strategy["classes"] == classes)
                    & (of_strategy["metric"] == metric)
                ]
                row[heading] = spread(chosen["value"], form) if chosen["value"].notna().any() else "–"
        rows.append(row)
    return aligned(pd.DataFrame(rows))
