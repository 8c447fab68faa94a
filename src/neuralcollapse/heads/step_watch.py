"""An optimiser that was made before a head was attached does not know the head."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn


class StepWatch:
    """Sees from the parameters alone whether the steps that change a model change its head; warns once if not."""

    def __init__(self) -> None:
        self._before: tuple[int, int] | None = None
        self._watching = True

    def look(self, model: nn.Module, head: nn.Module) -> None:
        """Look at every training forward, up to the one after the first step."""
        trained = [(name, parameter) for name, parameter in head.named_parameters() if parameter.requires_grad]
        if not self._watching or not trained:
            return
        now = _version(model.parameters()), _version(head.parameters())
        before, self._before = self._before or now, now
        if now[0] == before[0]:
            return
        self._watching = False
        if now[1] == before[1]:
            names = ", ".join(repr(name) for name, _ in trained)
            warnings.warn(
                f"the optimiser's step changed the model but not its head: {names} of {type(head).__name__} are not "
                "among the parameters that it was given. Make the optimiser after attach_head, from the attached "
                "model's parameters()",
                stacklevel=4,
            )


def _version(parameters: Iterable[nn.Parameter]) -> int:
    """Counts what is written into them: a step does, whoever takes it."""
    return sum(parameter._version for parameter in parameters if parameter.requires_grad)
