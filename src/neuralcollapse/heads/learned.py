"""The learned linear classifier: the method `standard`."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from neuralcollapse._checks import check_bool, compute_dtype
from neuralcollapse.heads.head import Head, check_layout, readable


class LearnedClassifier(Head):
    """A linear classifier with a trained weight, on features of any norm or of a given one.

    With a ``feature_norm`` and ``unit_weight=True`` it is the method ``standard`` of Markou, Ajanthan, Gould
    (NeurIPS 2024): logits ⟨w_k, τ h/‖h‖⟩ + b_k with ‖w_k‖ = 1.

    With ``unit_weight=True`` the rows are scaled to unit norm after each ``step()`` of a ``torch.optim`` optimiser that
    holds the weight, also where the optimiser is wrapped or copied, and whenever the weight is read: by its name, in
    the state dict, or by a forward that is not a training step. Inside a step, where a line search or the ascent of
    SAM has moved the weight, it is taken as it is. A loop that writes into the parameters without any optimiser is
    followed from its second update on; `project_weight` after each update makes it exact from the first.

    Args:
        in_features: d.
        num_classes: K ≥ 2.
        bias: Whether to train a bias.
        feature_norm: τ, the norm that features are given; ``"auto"``: `collapse_radius`; ``None``: left as they are.
        unit_weight: Whether the rows of the weight have unit norm.
        ignore_index: Accepted as by the other heads; this one counts no targets.

    Shape: features (..., d) to logits (..., K).

    Raises:
        ValueError: if sizes are out of range, or an argument is of another kind.

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
        self._may_be_perturbed: bool | None = None  # from the first training forward of unit rows on, and once
        if unit_weight:
            self.project_weight()
        _follow_steps()
        _HEADS.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _follow_steps()
        _HEADS.add(self)

    def prepare(self, features: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `Head.prepare`; targets are not needed."""
        features = self.features(features)
        check_layout(targets, features)
        return features, self._weight_of_forward(), self.bias

    @torch.no_grad()
    def project_weight(self) -> None:
        """Scale the rows of the weight to unit norm, in place; a zero row stays zero."""
        weight = self._unmended()
        weight.div_(_excess(weight))

    def _mended(self, weight: Tensor) -> Tensor:
        if self.unit_weight and _is_off(weight) and self not in _STEPPING:
            self.project_weight()
        return weight

    def _weight_of_forward(self) -> Tensor:
        """The weight; in a training forward as it is, where it can be what an optimiser has perturbed inside its step.

        Of an optimiser whose steps are followed that is every training forward. Of others it is known only that a
        perturbation follows a forward of unit rows: there, rows that are off are taken as they are once.
        """
        if not (self.unit_weight and self.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return self.weight
        weight = self._unmended()
        if self in _FOLLOWED:
            return weight
        if not _is_off(weight):
            self._may_be_perturbed = self._may_be_perturbed is not False
        elif self._may_be_perturbed:
            self._may_be_perturbed = False
        else:
            return self.weight
        return weight


@torch.no_grad()
def _excess(weight: Tensor) -> Tensor:
    """Norms of the rows (K, 1), for the rows that are not of unit norm to rounding; 1 for those that are, or zero."""
    rows = weight.to(compute_dtype(weight.dtype))
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    rounding = torch.finfo(weight.dtype).eps / 2 + torch.finfo(rows.dtype).eps * (4 + math.sqrt(rows.shape[1]))
    return torch.where(((norms - 1).abs() > rounding) & (norms > 0), norms, 1.0)


def _is_off(weight: Tensor) -> bool:
    """Return whether rows of a parameter are not of unit norm, where that can be seen."""
    return isinstance(weight, nn.Parameter) and readable(weight) and bool((_excess(weight) != 1).any())


# All heads of this kind; those that an optimiser has stepped whose steps are followed; those in the middle of a step.
# Not in the heads, which are copied and pickled.
_HEADS: weakref.WeakSet[LearnedClassifier] = weakref.WeakSet()
_FOLLOWED: weakref.WeakSet[LearnedClassifier] = weakref.WeakSet()
_STEPPING: weakref.WeakSet[LearnedClassifier] = weakref.WeakSet()


@functools.cache
def _follow_steps() -> None:
    """Have torch call the two functions below around each step of any optimiser."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    for head in _held_by(optimizer):
        _FOLLOWED.add(head)
        _STEPPING.add(head)


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    for head in _held_by(optimizer):
        _STEPPING.discard(head)
        head.project_weight()


def _held_by(optimizer: Optimizer) -> Iterator[LearnedClassifier]:
    """The heads with unit rows whose weight is among the optimiser's parameters."""
    heads = [head for head in _HEADS if head.unit_weight]
    if heads:
        parameters = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        yield from (head for head in heads if id(head._parameters.get("weight")) in parameters)


def project_after_step(optimizer: Optimizer, head: LearnedClassifier) -> RemovableHandle:
    """Give the head's weight unit rows after each step of the optimiser.

    A head with ``unit_weight=True`` has this done by itself for every optimiser of ``torch.optim``; this names one.

    Args:
        optimizer: Any optimiser; its own state (momentum) is left alone.
        head: A `LearnedClassifier` with ``unit_weight=True``.

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        ValueError: if ``optimizer`` or ``head`` is of another kind.

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
