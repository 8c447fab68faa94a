"""Seeds that follow from several numbers."""

from __future__ import annotations

import numpy as np


def derived_seed(*numbers: int) -> int:
    """A seed that follows from these numbers alone; other numbers give one that has nothing to do with it."""
    (state,) = np.random.SeedSequence(list(numbers)).generate_state(1)
    return int(state)
