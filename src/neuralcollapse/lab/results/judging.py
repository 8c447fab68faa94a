"""Whether claims hold: paired differences over seeds, with Student's interval, from run folders alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from neuralcollapse.catalogue import METRICS
from neuralcollapse.lab.results.aggregation import first_crossing
from neuralcollapse.lab.studies import Claim, Value

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
_CONFIDENCE = 0.95
_MOST_SEEDS = 1000


@dataclass(frozen=True)
class Finished:
    """What is known of a run that is finished.

    Attributes:
        metrics: What was measured: columns epoch, split, metric, value.
        facts: Its environment.
    """

    metrics: pd.DataFrame
    facts: Mapping[str, Any]


Groups = Mapping[str, Mapping[int, Finished]]  # by name and seed


@dataclass(frozen=True)
class Judgement:
    """What a claim's runs say of it.

    Attributes:
        verdict: ``"holds"``, ``"does not hold"`` or ``"undecided"``.
        numbers: What it was decided by, in words, one comparison each.
    """

    verdict: str
    numbers: list[str]


def student_interval(values: pd.Series) -> tuple[float, float]:
    """Mean, and half of the width of Student's 95% interval (n − 1); NaN for one value.

    Examples:
        >>> import pandas as pd
        >>> mean, half = student_interval(pd.Series([1.0, 2.0, 3.0]))
        >>> round(mean, 3), round(half, 3)
        (2.0, 2.484)
    """
    half = math.nan if len(values) < 2 else _half_width(float(values.std()), len(values))
    return float(values.mean()), half


def _half_width(spread: float, seeds: int) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + _CONFIDENCE) / 2, seeds - 1) * spread / math.sqrt(seeds))


def judge(claim: Claim, groups: Groups) -> Judgement:
    """Judge a claim: it holds where each of its comparisons does, and not where one of them does not.

    A comparison is of the difference in each seed, or of the difference to the bound; where the catalogue draws the
    metric on a logarithmic scale, and for falls, of logarithms. It is decided where all of Student's 95% interval over
    seeds is on one side, and so undecided for one seed.

    Args:
        claim: With the names of runs in it.
        groups: The runs that are finished, by name and seed.

    Raises:
        ValueError: A metric that the claim is about was not measured.
    """
    values = {name: _values(claim.value, groups.get(name, {})) for name in (*claim.of, *claim.than)}
    found = [_compare(claim, name, other, values) for name in claim.of for other in (*claim.than,) or (None,)]
    verdicts = {verdict for verdict, _ in found}
    overall = FAILS if FAILS in verdicts else UNDECIDED if UNDECIDED in verdicts else HOLDS
    return Judgement(overall, [f"{words}: {verdict}" for verdict, words in found])


def describe(value: Value) -> str:
    """The number of a run that a claim is judged by, in words.

    Examples:
        >>> describe(Value(kind="epochs", of="accuracy", level=0.95))
        'epochs until train accuracy is 0.95'
    """
    metric = value.of if value.kind == "fact" else f"{value.split} {value.of}"
    return {
        "last": f"last {metric}",
        "mean": f"{metric}, mean over measured epochs",
        "epochs": f"epochs until {metric} is {value.level}",
        "fall": f"{metric} when train accuracy first is {value.level}, over its last value",
        "deviation": f"{metric}, deviation from the mean over seeds at equal epoch, mean over epochs",
        "fact": metric,
    }[value.kind]


@dataclass(frozen=True)
class _Values:
    """Of each seed the value, as it is compared; and the seeds in which it is only known to be more."""

    of_seed: pd.Series
    more: set[int]


def _values(value: Value, runs: Mapping[int, Finished]) -> _Values:
    if value.kind == "fact":
        return _Values(pd.Series({seed: _logarithm(float(run.facts[value.of])) for seed, run in runs.items()}), set())
    courses = {seed: _course(run.metrics, value.of, value.split) for seed, run in runs.items()}
    if value.kind == "deviation":
        table = pd.DataFrame(courses)
        return _Values(table.sub(table.mean(axis=1), axis=0).abs().mean(), set())
    one = {
        "last": lambda seed: courses[seed].iloc[-1],
        "mean": lambda seed: courses[seed].mean(),
        "epochs": lambda seed: first_crossing(courses[seed], value.of, value.level),
        "fall": lambda seed: _fall(courses[seed], _course(runs[seed].metrics, "accuracy", "train"), value.level),
    }[value.kind]
    found = pd.Series({seed: one(seed) for seed in courses}, dtype=float)
    more = set()
    if value.kind == "epochs":  # not reached: more than the last epoch
        more = set(found.index[found.isna()])
        found = found.fillna(pd.Series({seed: float(course.index[-1]) for seed, course in courses.items()}))
    return _Values(found.map(_logarithm) if _is_ratio(value) else found, more)


def _logarithm(number: float) -> float:
    return math.log10(number) if number > 0 else math.nan


def _course(table: pd.DataFrame, metric: str, split: str) -> pd.Series:
    chosen = table[(table["metric"] == metric) & (table["split"] == split)]
    if chosen.empty:
        raise ValueError(f"{metric} of the {split} split must be measured to judge a claim about it, and is not")
    return chosen.sort_values("epoch").set_index("epoch")["value"]


def _fall(course: pd.Series, accuracy: pd.Series, level: float) -> float:
    there = accuracy[accuracy >= level]
    return math.nan if there.empty else float(course[there.index[0]] / course.iloc[-1])


def _is_ratio(value: Value) -> bool:
    return value.kind in ("fall", "fact") or (
        value.kind in ("last", "mean") and value.of in METRICS and METRICS[value.of].scale == "log"
    )


def _compare(claim: Claim, name: str, other: str | None, values: Mapping[str, _Values]) -> tuple[str, str]:
    """The verdict on one comparison, and its numbers in words."""
    ratio, own = _is_ratio(claim.value), values[name]
    words = f"{name} {_over_seeds(own, ratio)}"
    compared, more = own.of_seed, set()
    if other is not None:
        compared, more = (own.of_seed - values[other].of_seed).dropna(), own.more & values[other].more
        words += f" against {other} {_over_seeds(values[other], ratio)}"
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
    """With how many seeds it would be decided, were mean and spread to stay."""
    mean, spread = float(compared.mean()), float(compared.std())
    distance = abs(abs(mean) - bound) if relation == "like" else abs(mean - bound)
    for seeds in range(len(compared) + 1, _MOST_SEEDS + 1):
        if _half_width(spread, seeds) < distance:
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
    """A claim and what was found, in plain values."""
    found: dict[str, Any] = {"claim": claim.text, "measure": describe(claim.value), "verdict": judgement.verdict}
    found |= {"numbers": judgement.numbers}
    return found if claim.published is None else found | {"published": claim.published}
