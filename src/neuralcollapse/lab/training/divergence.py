"""Training that diverges: the first value that is not finite, found without waiting for the device at every step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from neuralcollapse._distributed import number_of_ranks

_NEVER = 2**62


class Diverged(ValueError):
    """A run has a value that is not finite."""


class FirstNonFinite:
    """The first value of an epoch that is not finite: of the features, the loss or a parameter.

    What is found stays on the device until `find` asks for it.

    Args:
        model: Whose parameters are looked at.
    """

    def __init__(self, model: nn.Module) -> None:
        named = dict(model.named_parameters())
        self._names = list(named)
        self._parameters: list[Tensor] = list(named.values())
        self._kinds = len(named) + 2
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Forget what was seen."""
        self._of_loss: Tensor | None = None
        self._of_parameters: Tensor | None = None
        self._finite: Tensor | None = None

    @torch.no_grad()
    def see_loss(self, step: int, loss: Tensor, features: Tensor) -> None:
        """Look at a batch.

        Args:
            step: Number of the batch in its epoch, counted from 1.
            loss: Of the batch, over all ranks.
            features: Of this rank's part.
        """
        # Squares, which metrics and penalties are made of, overflow long before the features.
        whole = features.detach().square().isfinite().all()
        finite = whole & loss.detach().isfinite()
        code = torch.where(finite, _NEVER, step * self._kinds + whole.long())
        self._of_loss = code if self._of_loss is None else torch.minimum(self._of_loss, code)
        self._finite = finite.long() if self._finite is None else self._finite + finite

    @torch.no_grad()
    def see_parameters(self, step: int) -> None:
        """Look at the parameters after a step."""
        largest = torch.stack(torch._foreach_norm(self._parameters, math.inf))
        finite = largest.isfinite()
        code = torch.where(finite.all(), _NEVER, step * self._kinds + 2 + (~finite).long().argmax())
        self._of_parameters = code if self._of_parameters is None else torch.minimum(self._of_parameters, code)

    def find(self, *, scaled: bool = False, of_all_ranks: bool = False) -> tuple[int, str] | None:
        """Return the step and the name of the first value that is not finite, or None; this waits for the device.

        Args:
            scaled: Whether a gradient scaler skips steps that overflow. Then batches without a finite loss count where
                no batch of the epoch has one.
            of_all_ranks: Whether to find the first one of all ranks, which must then all ask.
        """
        codes = [_NEVER if one is None else int(one) for one in (self._of_loss, self._of_parameters)]
        if scaled and self._finite is not None and int(self._finite) > 0:
            codes[0] = _NEVER
        first = min(codes)
        if of_all_ranks and number_of_ranks() > 1:
            shared = torch.tensor(first, device=self._parameters[0].device)
            torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MIN)
            first = int(shared)
        if first >= _NEVER:
            return None
        step, kind = divmod(first, self._kinds)
        names = ["the square of a feature", "the loss", *(f"the parameter {name}" for name in self._names)]
        return step, names[kind]
