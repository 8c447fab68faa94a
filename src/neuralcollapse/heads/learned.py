"""The learned linear classifier: the method `standard`."""

from __future__ import annotations

import weakref
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from neuralcollapse._checks import check_bool
from neuralcollapse.heads.head import Head


class LearnedClassifier(Head):
    """A linear classifier with a trained weight, on features of any norm or of a given one.

    With a ``feature_norm`` and ``unit_weight=True``, and `project_after_step` on the optimiser, it is the method
    ``standard`` of Markou, Ajanthan, Gould (NeurIPS 2024): logits ⟨w_k, τ h/‖h‖⟩ + b_k with ‖w_k‖ = 1.

    Args:
        in_features: d.
        num_classes: K ≥ 2.
        bias: Whether to train a bias.
        feature_norm: τ, the norm that features are given; ``"auto"``: `collapse_radius`; ``None``: left as they are.
        unit_weight: Start with rows of unit norm. `project_after_step` keeps them so.
        ignore_index: Accepted as by the other heads; this one counts no targets.

    Shape: features (..., d) to logits (..., K).

    Raises:
        ValueError: Sizes out of range, or an argument of another kind.

    Examples:
        >>> LearnedClassifier(64, 10, feature_norm=5.0, unit_weight=True)(torch.randn(32, 64)).shape
        torch.Size([32, 10])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = True,
        feature_norm: float | Literal["auto"] | None = None,
        unit_weight: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, feature_norm, ignore_index)
        check_bool("bias", bias)
        check_bool("unit_weight", unit_weight)
        self.unit_weight = unit_weight
        linear = nn.Linear(in_features, num_classes, bias=bias)
        self.weight = linear.weight
        self.bias = linear.bias
        if unit_weight:
            self.project_weight()

    @torch.no_grad()
    def project_weight(self) -> None:
        """Scale the rows of the weight to unit norm, in place; a zero row stays zero."""
        norms = torch.linalg.vector_norm(self.weight, dim=1, keepdim=True)
        self.weight.div_(torch.where(norms > 0, norms, 1))


def project_after_step(optimizer: Optimizer, head: LearnedClassifier) -> RemovableHandle:
    """Give the head's weight unit rows after each step of the optimiser.

    Args:
        optimizer: Any optimiser; its own state (momentum) is left alone.
        head: A `LearnedClassifier` with ``unit_weight=True``.

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        ValueError: ``optimizer`` or ``head`` is of another kind.

    Examples:
        >>> head = LearnedClassifier(8, 3, unit_weight=True)
        >>> optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
        >>> _ = project_after_step(optimizer, head)
        >>> head(torch.randn(4, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> bool(torch.allclose(head.weight.norm(dim=1), torch.ones(3)))
        True
    """
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if not (isinstance(head, LearnedClassifier) and head.unit_weight):
        raise ValueError(f"head must be a LearnedClassifier with unit_weight=True, got {head!r}")
    reference = weakref.ref(head)  # the optimiser must not keep a discarded model alive

    def project(*_: Any) -> None:
        head = reference()
        if head is not None:
            head.project_weight()

    return optimizer.register_step_post_hook(project)
