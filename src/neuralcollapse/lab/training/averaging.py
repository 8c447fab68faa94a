"""The average of a model's weights over its last steps, which is measured in place of the model."""

from __future__ import annotations

import torch
from torch import Tensor

from neuralcollapse.heads import AttachedHead, LearnedClassifier


@torch.no_grad()
def update_average(average: AttachedHead, model: AttachedHead, *, share: float, steps: int) -> None:
    """Move an average of the model's weights towards the model, in place.

    After step t every earlier step s has weight ∝ s^(1/share − 1): a share of 1 is the mean of all steps, a tenth is
    mostly of the last tenth. The running statistics of batch norm are averaged alike. Class means and a classifier
    that follows from them are the model's own, since the average of several frames is none; unit rows stay unit rows.

    Args:
        average: A copy of the model.
        model: After its step.
        share: In (0, 1].
        steps: How many were averaged before; with 0 the average becomes the model.

    Source: polynomial-decay averaging of Shamir and Zhang (ICML 2013), with η = 1/share − 1.
    """
    rate = 1 / (share * steps + 1)
    for own, current in zip(_averaged(average), _averaged(model), strict=True):
        own.lerp_(current, rate)
    for own, current in zip(average.head.buffers(), model.head.buffers(), strict=True):
        own.copy_(current)
    if isinstance(average.head, LearnedClassifier) and isinstance(model.head, LearnedClassifier):
        average.head.unit_weight = model.head.unit_weight
        if average.head.unit_weight:
            average.head.project_weight()


def _averaged(model: AttachedHead) -> list[Tensor]:
    tensors = [*model.parameters(), *model.model.buffers()]
    return [tensor for tensor in tensors if tensor.is_floating_point()]
