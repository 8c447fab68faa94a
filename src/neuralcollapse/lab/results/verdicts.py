"""Verdicts on claims, by paired differences over seeds with Student's interval, from run folders alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from neuralcollapse.catalogue import METRICS
from neuralcollapse.lab.results.statistics import (
    epochs_to_reach,
    half_width,
    paired_differences,
    rounded,
    student_interval,
)

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["last", "mean", "change", "epochs", "share", "fall", "deviation", "correlation", "fact"]
Relation = Literal["below", "above", "like", "at least", "at most"]
HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
_MOST_SEEDS = 1000


@dataclass(frozen=True, kw_only=True)
class Value:
    """Number that is computed from a run.

    Attributes:
        kind: ``"last"``, the last measured value of a metric; ``"mean"``, its mean over the measured epochs;
            ``"change"``, its last minus its first value; ``"epochs"``, the number of epochs until it reaches ``level``;
            ``"share"``, the share of all epochs until it reaches the last value of ``level_of`` with the same seed;
            ``"fall"``, its value at the first measured epoch with train accuracy ``level``, divided by its last value;
            ``"deviation"``, its absolute deviation from the mean over seeds at the same epoch, averaged over epochs;
            ``"correlation"``, Spearman's rank correlation over the measured epochs with the train ``nc1_quotient``; or
            ``"fact"``, a value from the environment of the run, such as the number of parameters.
        of: Name of the metric or the fact.
        split: Split of the data.
        level: Level to reach.
        level_of: Run whose last value is the level.
    """

    kind: Kind
    of: str
    split: str = "train"
    level: float = math.nan
    level_of: str | None = None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Claim about runs of a study, with the number that decides it.

    Attributes:
        text: The claim in words.
        value: Number of each run by which the claim is judged.
        of: Runs to which the claim refers.
        relation: ``"below"`` or ``"above"`` each of ``than``, by more than ``bound`` if it is given; ``"like"`` each
            of them, within ``bound``; or ``"at least"`` or ``"at most"`` ``bound``.
        than: Runs with the same seed to compare with.
        than_value: Number of the runs in ``than``, in the same units; by default ``value``.
        bound: Bound in the units of the value; a factor for falls, facts and metrics that the catalogue draws on a
            logarithmic scale.
        published: Number in the paper, if it is given there.
    """

    text: str
    value: Value
    of: list[str]
    relation: Relation
    than: list[str]
    bound: float | None = None
    published: str | None = None
    than_value: Value | None = None


@dataclass(frozen=True)
class Finished:
    """Finished run.

    Attributes:
        metrics: Measured values: columns epoch, split, metric, value.
        facts: Environment of the run.
    """

    metrics: pd.DataFrame
    facts: Mapping[str, Any]


Groups = Mapping[str, Mapping[int, Finished]]  # by name and seed


@dataclass(frozen=True)
class Judgement:
    """Verdict on a claim.

    Attributes:
        verdict: ``"holds"``, ``"does not hold"`` or ``"undecided"``.
        numbers: One sentence per comparison, with the decisive numbers.
    """

    verdict: str
    numbers: list[str]


def judge(claim: Claim, groups: Groups) -> Judgement:
    """Judge a claim: it holds if all of its comparisons hold, and does not hold if one of them does not.

    A comparison tests the difference for each seed, or the difference to the bound. For falls, and for metrics that the
    catalogue draws on a logarithmic scale, it tests differences of logarithms. It is decided if Student's 95% interval
    over seeds is completely on one side; a comparison with a single seed is undecided.

    Args:
        claim: The claim, with the names of its runs.
        groups: Finished runs, by name and seed.

    Raises:
        ValueError: if a metric of the claim was not measured.
    """
    values = {name: _values(claim.value, name, groups) for name in claim.of}
    others: dict[str | None, _Values | None] = {None: None}
    if claim.than:
        others = {name: _values(claim.than_value or claim.value, name, groups) for name in claim.than}
    comparisons = [
        _compare(claim, name, of_name, other, of_other)
        for name, of_name in values.items()
        for other, of_other in others.items()
    ]
    verdicts = {verdict for verdict, _ in comparisons}
    overall = FAILS if FAILS in verdicts else UNDECIDED if UNDECIDED in verdicts else HOLDS
    return Judgement(overall, [f"{words}: {verdict}" for verdict, words in comparisons])


def against_reference(
    name: str, reference: str, quantities: Mapping[str, str], groups: Groups
) -> dict[str, list[float | None]]:
    """Return the last test accuracy relative to a reference, and the epochs until the values of the reference.

    Args:
        name: Name of the compared runs.
        reference: Name of the runs with which they are compared, seed by seed.
        quantities: Split of each metric by its name.
        groups: Finished runs, by name and seed.

    Returns:
        ``difference``: the mean over seeds of the difference in the last test accuracy, and half the width of Student's
        95% interval. ``share_METRIC``: the mean share of all epochs until the metric has the last value of the
        reference, over the seeds that reach it (None if none does), and the number of these seeds.
    """
    last = Value(kind="last", of="accuracy", split="test")
    compared = paired_differences(*(_values(last, one, groups).of_seed for one in (name, reference)))
    row: dict[str, list[float | None]] = {"difference": [rounded(number) for number in student_interval(compared)]}
    for metric, split in quantities.items():
        share = _values(Value(kind="share", of=metric, split=split, level_of=reference), name, groups)
        reached = share.of_seed.drop(index=[*share.more])
        row[f"share_{metric}"] = [rounded(reached.mean()) if len(reached) else None, len(reached)]
    return row


def describe(value: Value) -> str:
    """Return a description of the number by which a claim is judged.

    Examples:
        >>> describe(Value(kind="epochs", of="accuracy", level=0.95))
        'epochs until train accuracy is 0.95'
    """
    metric = value.of if value.kind == "fact" else f"{value.split} {value.of}"
    return {
        "last": f"last {metric}",
        "mean": f"{metric}, mean over measured epochs",
        "change": f"last minus first {metric}",
        "epochs": f"epochs until {metric} is {value.level}",
        "share": f"share of the epochs until {metric} is the last of {value.level_of}",
        "fall": f"{metric} when train accuracy first is {value.level}, over its last value",
        "correlation": f"rank correlation of {metric} with train nc1_quotient over measured epochs",
        "deviation": f"{metric}, deviation from the mean over seeds at equal epoch, mean over epochs",
        "fact": metric,
    }[value.kind]


@dataclass(frozen=True)
class _Values:
    """Compared value of each seed, and the seeds for which it is only a lower bound."""

    of_seed: pd.Series
    more: set[int]


def _values(value: Value, name: str, groups: Groups) -> _Values:
    """Return the value of each run with a name."""
    import pandas as pd

    runs = groups.get(name, {})
    if value.kind == "fact":
        return _Values(pd.Series({seed: _logarithm(float(run.facts[value.of])) for seed, run in runs.items()}), set())
    courses = {seed: _course(run.metrics, value.of, value.split) for seed, run in runs.items()}
    if value.kind == "deviation":
        table = pd.DataFrame(courses)
        return _Values(table.sub(table.mean(axis=1), axis=0).abs().mean(), set())
    levels = dict.fromkeys(courses, value.level)
    if value.level_of is not None:
        references = groups.get(value.level_of, {})
        courses = {seed: course for seed, course in courses.items() if seed in references}
        levels = {seed: _course(references[seed].metrics, value.of, value.split).iloc[-1] for seed in courses}
    number = {
        "last": lambda seed: courses[seed].iloc[-1],
        "mean": lambda seed: courses[seed].mean(),
        "change": lambda seed: courses[seed].iloc[-1] - courses[seed].iloc[0],
        "epochs": lambda seed: epochs_to_reach(courses[seed], levels[seed], interpolate=True),
        "share": lambda seed: epochs_to_reach(courses[seed], levels[seed], interpolate=True) / courses[seed].index[-1],
        "fall": lambda seed: _fall(courses[seed], _course(runs[seed].metrics, "accuracy", "train"), value.level),
        "correlation": lambda seed: _correlation(courses[seed], _course(runs[seed].metrics, "nc1_quotient", "train")),
    }[value.kind]
    of_seed = pd.Series({seed: number(seed) for seed in courses}, dtype=float)
    more = set()
    if value.kind in ("epochs", "share"):  # if the level is not reached, the number exceeds that of the last epoch
        more = set(of_seed.index[of_seed.isna()])
        ends = {seed: 1.0 if value.kind == "share" else float(course.index[-1]) for seed, course in courses.items()}
        of_seed = of_seed.fillna(pd.Series(ends, dtype=float))
    return _Values(of_seed.map(_logarithm) if _is_ratio(value) else of_seed, more)


def _logarithm(number: float) -> float:
    return math.log10(number) if number > 0 else math.nan


def _course(table: pd.DataFrame, metric: str, split: str) -> pd.Series:
    chosen = table[(table["metric"] == metric) & (table["split"] == split)]
    if chosen.empty:
        raise ValueError(f"{metric} of the {split} split must be measured to judge a claim about it, but is not")
    return chosen.sort_values("epoch").set_index("epoch")["value"].rename(metric)


def _fall(course: pd.Series, accuracy: pd.Series, level: float) -> float:
    epoch = epochs_to_reach(accuracy, level)
    return math.nan if math.isnan(epoch) else float(course[int(epoch)] / course.iloc[-1])


def _correlation(course: pd.Series, collapse: pd.Series) -> float:
    """Return Spearman's rank correlation over epochs at which both are finite; NaN if one of them is constant."""
    both = course.to_frame("value").join(collapse.rename("collapse"), how="inner").dropna()
    ranks = both.rank()
    return float(ranks["value"].corr(ranks["collapse"]))


def _is_ratio(value: Value) -> bool:
    return value.kind in ("fall", "fact") or (
        value.kind in ("last", "mean") and value.of in METRICS and METRICS[value.of].scale == "log"
    )


def _compare(claim: Claim, name: str, of_name: _Values, other: str | None, of_other: _Values | None) -> tuple[str, str]:
    """Return the verdict on one comparison, and its numbers in words."""
    ratio = _is_ratio(claim.value)
    words = f"{name} {_over_seeds(of_name, ratio)}"
    compared, more = of_name.of_seed, set()
    if of_other is not None:
        compared = paired_differences(of_name.of_seed, of_other.of_seed)
        more = of_name.more & of_other.more
        words += f" against {other} {_over_seeds(of_other, ratio)}"
    if compared.empty:
        return UNDECIDED, f"{words}, with no run of the same seed that is finished"
    if not compared.map(math.isfinite).all():
        lacking = int((~compared.map(math.isfinite)).sum())
        return (
            UNDECIDED,
            f"{words}; {lacking} of {len(compared)} seeds have none: the level was not reached, or it is 0",
        )
    if more:
        return UNDECIDED, f"{words}, which neither reaches in a seed: more epochs would tell"
    mean, half = student_interval(compared)
    if math.isnan(half):
        return UNDECIDED, f"{words}, one seed: at least one more would tell"
    what = "" if other is None else "ratio " if ratio else "difference "
    shown = [_shown(number, ratio) for number in (mean, mean - half, mean + half)]
    words = f"{name} " if other is None else f"{words}, {what}"
    words += f"{shown[0]} [{shown[1]}, {shown[2]}] over {len(compared)} seeds"
    bound = 0.0
    if claim.bound is not None:
        words += f", claimed {claim.relation} {claim.bound:g}".replace("like", "within")
        bound = math.log10(claim.bound) if ratio else claim.bound
    verdict = _decide(claim.relation, mean, half, bound)
    if verdict == UNDECIDED:
        words += f"; {_what_it_takes(compared, claim.relation, bound)}"
    return verdict, words


def _decide(relation: str, mean: float, half: float, bound: float) -> str:
    if relation == "like":
        holds, fails = abs(mean) + half <= bound, abs(mean) - half > bound
    else:
        beyond = bound - mean if relation in ("below", "at most") else mean - bound
        holds, fails = beyond > half, beyond < -half
    return HOLDS if holds else FAILS if fails else UNDECIDED


def _what_it_takes(compared: pd.Series, relation: str, bound: float) -> str:
    """Return a sentence about the number of seeds that would decide, for the same mean and spread."""
    mean, spread = float(compared.mean()), float(compared.std())
    distance = abs(abs(mean) - bound) if relation == "like" else abs(mean - bound)
    for seeds in range(len(compared) + 1, _MOST_SEEDS + 1):
        if half_width(spread, seeds) < distance:
            return f"about {seeds} seeds would decide, were mean and spread to stay"
    return f"not even {_MOST_SEEDS} seeds would decide, were mean and spread to stay"


def _over_seeds(values: _Values, ratio: bool) -> str:
    if values.of_seed.empty:
        return "(no run)"
    mean = _shown(float(values.of_seed.mean()), ratio)
    return f"at least {mean}" if values.more else mean


def _shown(number: float, ratio: bool) -> str:
    return f"{10**number if ratio else number:.3g}"


def verdict_record(claim: Claim, judgement: Judgement) -> dict[str, Any]:
    """Return a claim and its verdict as plain values."""
    measure = describe(claim.value)
    if claim.than_value is not None:
        measure += f", against {describe(claim.than_value)}"
    record: dict[str, Any] = {"claim": claim.text, "measure": measure, "verdict": judgement.verdict}
    record |= {"numbers": judgement.numbers}
    return record if claim.published is None else record | {"published": claim.published}
