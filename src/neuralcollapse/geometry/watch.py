"""Looking whether solves on an accelerator went well, without waiting for them."""

from __future__ import annotations

import itertools
import logging
import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# max |H − I| up to which products have converged. In fp64 one more Newton–Schulz step squares it.
CONVERGED = 1e-6


class Watch:
    """Looks whether products converged, without waiting: at each solve, at what an earlier one left behind.

    The first solve is looked at at once, since unseen classes can leave it open. Every other one is looked at exactly
    `LAG` solves later, when an accelerator has long finished it; if it did not converge, that later solve takes an SVD,
    which is counted and logged. The lag is fixed so that all ranks decide the same.
    """

    LAG = 4
    AT_ONCE = -1  # a handle of its own: wait, look, and take an SVD in the same solve

    def __init__(self) -> None:
        self.fallbacks = 0
        self._solves = 0
        self._arriving: deque[tuple[Tensor, torch.Event | None]] = deque()
        self.handle = next(_handles)
        _watches[self.handle] = self

    def asks_for_svd(self) -> bool:
        """Whether the solve `LAG` ago did not converge."""
        if len(self._arriving) < self.LAG:
            return False
        error, event = self._arriving.popleft()
        if event is not None:
            event.synchronize()
        return not float(error) <= CONVERGED

    def note(self, error: Tensor) -> None:
        """Send a solve's error, a scalar on the device, on its way to the host."""
        event = None
        if error.device.type != "cpu":
            host = torch.empty((), dtype=error.dtype, pin_memory=True)
            error, event = host.copy_(error, non_blocking=True), torch.Event(error.device.type)
            event.record()
        self._arriving.append((error, event))

    def count(self) -> None:
        """Count a solve by SVD, and log the first, the second, the fourth and so on."""
        self.fallbacks += 1
        if self.fallbacks & (self.fallbacks - 1) == 0:
            logger.warning(
                "polar factor by SVD, since products did not converge: the matrix is close to singular "
                "(a greater proximal_weight helps); %d so far",
                self.fallbacks,
            )

    def is_first(self) -> bool:
        """Whether this is the first solve; counts it."""
        self._solves += 1
        return self._solves == 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        return Watch()

    def __reduce__(self) -> tuple[type[Watch], tuple[()]]:
        return Watch, ()


_handles = itertools.count(1)
_watches: weakref.WeakValueDictionary[int, Watch] = (
    weakref.WeakValueDictionary()
)  # what an operator can be told by a number


def watch_of(handle: int) -> Watch | None:
    """The watch of that handle, if there is one."""
    return _watches.get(handle)
