"""Tolerances and small data shared by the tests."""

from __future__ import annotations

import os
from pathlib import Path

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


def data_folder(name: str) -> Path:
    """The folder of a real data set, or a skip that says why."""
    root = Path(os.environ.get("NEURALCOLLAPSE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (root / name).is_dir():
        pytest.skip(f"no folder {name!r} in NEURALCOLLAPSE_DATA or ../shared/data")
    return root / name
