"""Tolerances and small data shared by the tests."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

# Relative tolerance of a computation in the given dtype against an fp64 reference.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def simplex_gram(num_classes: int) -> Tensor:
    """The Gram matrix of a unit simplex ETF, from its definition."""
    gram = torch.full((num_classes, num_classes), -1 / (num_classes - 1), dtype=torch.float64)
    return gram.fill_diagonal_(1)


def slow_except(values: Iterable[Any], default: Container[Any]) -> list[Any]:
    """Parameters of a test of which only those in ``default`` run without ``-m slow``."""
    return [
        value
        if value in default
        else pytest.param(*(value if isinstance(value, tuple) else [value]), marks=pytest.mark.slow)
        for value in values
    ]


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the command ends with when the arguments are wrong."""
    from neuralcollapse.cli import main

    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().split("\n")
    line = lines[-1].split("\r")[-1]
    assert line.startswith("neuralcollapse: error: ")
    assert not any("Traceback" in line or "error" in line for line in lines[:-1])
    return line.removeprefix("neuralcollapse: error: ")


class CountedLoader:
    """Batches of which each pass is counted."""

    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.passes += 1
        return iter(self.batches)
