"""The library's results, compared with values recorded before it was restructured (see `frozen.py`)."""

from __future__ import annotations

import pytest
import torch

import frozen
from helpers import slow_except

# Sums may be reordered: relative to the largest magnitude of each value.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
# Two epochs amplify rounding, which differs between processors.
RUNS = 1e-3
# The metrics of an exact ETF in fp32 are rounding error, which changes with the order of operations.
ROUNDING = 1e-7


@pytest.fixture(scope="module")
def stored() -> dict[str, torch.Tensor]:
    return frozen.stored_values()


@pytest.mark.parametrize("group", slow_except(frozen.GROUPS, set(frozen.GROUPS) - {"trainings"}))
def test_results_are_those_recorded(group, stored):
    computed = frozen.compute(group)
    expected = {name for name in stored if name.startswith(f"{group}/")}
    assert expected == computed.keys()
    for name in sorted(expected):
        of_run = group in ("runs", "trainings")
        tolerance = RUNS if of_run else TOLERANCE[stored[name].dtype]
        if of_run and float((computed[name] - stored[name]).abs().max()) <= ROUNDING:
            continue
        assert frozen.difference(computed[name], stored[name]) <= tolerance, name
