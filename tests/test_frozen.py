"""The library's results, compared with values recorded before it was restructured (see `frozen.py`)."""

from __future__ import annotations

import pytest
import torch

import frozen
from helpers import slow_except

# Sums may be reordered: relative to the largest magnitude of each value.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
# Products of the means square their condition number, with which rounding grows.
PRODUCTS = 1e-9
# Two epochs amplify rounding, which differs between processors.
RUNS = 1e-3
# The metrics of an exact ETF are rounding error, which changes with the order of operations and the processor.
ROUNDING = 1e-7
OF_ETF = ("moments/collapsed-", "moments/two-classes-", "runs/", "trainings/")


@pytest.fixture(scope="module")
def stored() -> dict[str, torch.Tensor]:
    return frozen.stored_values()


@pytest.mark.parametrize("group", slow_except(frozen.GROUPS, set(frozen.GROUPS) - {"trainings"}))
def test_results_are_those_recorded(group, stored):
    computed = frozen.compute(group)
    expected = {name for name in stored if name.startswith(f"{group}/")}
    assert expected == computed.keys()
    errors = {name: frozen.difference(computed[name], stored[name]) for name in sorted(expected)}
    too_large = {
        name: error
        for name, error in errors.items()
        if error > tolerance(name, stored[name])
        and not (name.startswith(OF_ETF) and float((computed[name] - stored[name]).abs().max()) <= ROUNDING)
    }
    assert not too_large


def tolerance(name: str, value: torch.Tensor) -> float:
    if name.startswith(("runs/", "trainings/")):
        return RUNS
    return PRODUCTS if "-products" in name and value.dtype == torch.float64 else TOLERANCE[value.dtype]
