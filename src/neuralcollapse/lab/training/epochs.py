"""After which epochs something is done that is not done after all of them."""

from __future__ import annotations


def is_due(epoch: int, every: int, first: int | None = None) -> bool:
    """Whether an epoch, counted from 1, is the first of all or one of first, first + every, first + 2·every, ...

    Args:
        epoch: The epoch.
        every: The step.
        first: Where the steps begin; by default where the first one ends.

    Examples:
        >>> [epoch for epoch in range(1, 21) if is_due(epoch, 5)]
        [1, 5, 10, 15, 20]
        >>> [epoch for epoch in range(1, 21) if is_due(epoch, 5, first=1)]
        [1, 6, 11, 16]
    """
    first = every if first is None else first
    return epoch == 1 or (epoch >= first and (epoch - first) % every == 0)
