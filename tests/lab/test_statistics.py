"""Statistics over seeds: epochs to a level, intervals, paired differences."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from neuralcollapse.lab.results.statistics import epochs_to_reach, paired_differences, student_interval


def course(values: list[float], metric: str) -> pd.Series:
    return pd.Series(values, index=[1, 2, 4, 8, 16], name=metric)


@pytest.mark.parametrize(
    ("values", "metric", "options", "expected"),
    [
        ([0.1, 0.5, 0.9, 0.7, 0.9], "accuracy", {}, 4),
        ([0.1, 0.5, 0.9, 0.7, 0.9], "accuracy", {"interpolate": True}, 3.5),
        ([0.1, 0.5, 0.9, 0.7, 0.9], "accuracy", {"sustained": True}, 16),
        ([0.9, 0.5, 0.9, 0.9, 0.9], "accuracy", {"interpolate": True}, 1),
        ([0.1, 0.5, 0.6, 0.7, 0.7], "accuracy", {}, math.nan),
        ([3.0, 2.0, 0.5, 0.9, 0.6], "nc1_quotient", {}, 4),
        ([3.0, 2.0, 0.5, 0.9, 0.6], "nc1_quotient", {"sustained": True}, 16),
        ([3.0, 2.0, 0.5, 0.6, 0.9], "nc1_quotient", {"sustained": True}, math.nan),
        ([3.0, 2.0, 0.5, 0.6, 0.7], "excess_loss", {"sustained": True}, 4),  # not in the catalogue: from above
        ([3.0, math.nan, 0.5, math.nan, 0.7], "excess_loss", {"sustained": True}, 16),
        ([math.nan] * 5, "accuracy", {"interpolate": True}, math.nan),
    ],
)
def test_epochs_to_a_level(values, metric, options, expected):
    level = 0.8 if metric == "accuracy" else 0.75
    assert epochs_to_reach(course(values, metric), level, **options) == pytest.approx(expected, nan_ok=True)


def test_differences_are_paired_by_seed():
    values, others = pd.Series({0: 1.0, 1: 2.0, 2: 5.0}), pd.Series({2: 1.0, 0: 0.5, 3: 9.0})
    assert paired_differences(values, others).to_dict() == {0: 0.5, 2: 4.0}
    mean, half = student_interval(paired_differences(values, others))
    assert (mean, half) == pytest.approx((2.25, 12.706 * 1.75), rel=1e-4)
    assert math.isnan(student_interval(values[:1])[1])
