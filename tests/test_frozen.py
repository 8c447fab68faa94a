"""The library's results, compared with values recorded before it was restructured (see `frozen.py`)."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import frozen

# Sums may be reordered: relative to the largest magnitude of each value.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
# Two epochs amplify rounding, which differs between processors.
RUNS = 1e-3


@pytest.fixture(scope="module")
def stored() -> dict[str, torch.Tensor]:
    return load_file(frozen.PATH)


@pytest.mark.parametrize("group", frozen.GROUPS)
def test_results_are_those_recorded(group, stored):
    computed = frozen.compute(group)
    expected = {name for name in stored if name.startswith(f"{group}/")}
    assert expected == computed.keys()
    for name in sorted(expected):
        tolerance = RUNS if group == "runs" else TOLERANCE[stored[name].dtype]
        assert frozen.difference(computed[name], stored[name]) <= tolerance, name
