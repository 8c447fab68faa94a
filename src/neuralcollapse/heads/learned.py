"""Learned linear classifier (the method `standard`)."""

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

from neuralcollapse._checks import check_bool, compute_dtype
from neuralcollapse.heads.growth import ParameterGrowth, check_growth
from neuralcollapse.heads.head import Head, check_layout, readable


class LearnedClassifier(Head):
    """Linear classifier with a trained weight, for features with or without a fixed norm.

    With a ``feature_norm`` and ``unit_weight=True``, it is the method ``standard`` of Markou, Ajanthan, Gould
    (NeurIPS 2024): logits ⟨w_k, τ h/‖h‖⟩ + b_k with ‖w_k‖ = 1.

    With ``unit_weight=True``, the rows are scaled to unit norm after each ``step()`` of a ``torch.optim`` optimiser
    that holds the weight, even if the optimiser is wrapped or copied, and whenever the weight is read: as an attribute,
    in the state dict, or by a forward that is not part of a training step. Inside a step, after a line search or the
    ascent of SAM has changed the weight, it is used unscaled. If a loop updates the parameters without an optimiser,
    the rows have unit norm from the second update on; call `project_weight` after each update to have unit norm from
    the first.

    Args:
        in_features: d.
        num_classes: K ≥ 2.
        bias: Whether to train a bias.
        feature_norm: τ, as for `Head`.
        unit_weight: Whether the rows of the weight have unit norm.

    Shape: features (..., d) to logits (..., K).

    Raises:
        ValueError: if sizes are out of range, or an argument has the wrong type.

    Examples:
        >>> LearnedClassifier(64, 10, feature_norm=5.0, unit_weight=True)(torch.randn(32, 64)).shape
        torch.Size([32, 10])
    """

    _in_step = False  # whether an optimiser that holds the weight is inside its step
    _steps_followed = False  # whether such an optimiser has ever begun a step
    _may_be_perturbed: bool | None = None  # see `_training_weight`

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = True,
        feature_norm: float | Literal["auto"] | None = None,
        unit_weight: bool = False,
    ) -> None:
        super().__init__(in_features, num_classes, feature_norm)
        check_bool("bias", bias)
        check_bool("unit_weight", unit_weight)
        self.unit_weight = unit_weight
        linear = nn.Linear(in_features, num_classes, bias=bias)
        self.weight = linear.weight
        self.bias = linear.bias
        if unit_weight:
            self.project_weight()
        _follow_steps_of(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"_in_step": False})
        _follow_steps_of(self)

    def prepare(self, features: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return features, weight and bias as `Head.prepare`; targets are not needed."""
        features = self.features(features)
        check_layout(targets, features)
        in_training = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        weight = self._training_weight() if self.unit_weight and in_training else self.weight
        return features, weight, self.bias

    @torch.no_grad()
    def grow(
        self, num_new: int, *, optimizer: Optimizer | None = None, generator: torch.Generator | None = None
    ) -> None:
        """Add classes as `Head.grow`; old rows and biases do not change.

        New rows are drawn as in ``nn.Linear``, uniformly from ±1/√d, and scaled to unit norm with ``unit_weight``. New
        biases are the mean of the old ones, so that the new classes are neither preferred nor penalised.
        """
        check_growth(num_new, optimizer, generator)
        weight = self.weight
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        rows = torch.rand(num_new, self.in_features, generator=generator, device=generator.device)
        rows = (2 * rows - 1) / math.sqrt(self.in_features)
        if self.unit_weight:
            rows = nn.functional.normalize(rows, dim=1)
        growth = ParameterGrowth(optimizer)
        growth.plan(self, "weight", torch.cat([weight, rows.to(weight)]))
        if self.bias is not None:
            growth.plan(self, "bias", torch.cat([self.bias, self.bias.mean().expand(num_new)]))
        growth.apply()
        self._set_num_classes(self.num_classes + num_new)

    @torch.no_grad()
    def project_weight(self) -> None:
        """Scale the rows of the weight to unit norm in place; zero rows stay zero."""
        weight = self._stored_weight()
        weight.div_(_excess(weight))

    def _valid_weight(self, weight: Tensor) -> Tensor:
        if self.unit_weight and _is_off(weight) and not self._in_step:
            self.project_weight()
        return weight

    def _training_weight(self) -> Tensor:
        """Return the weight of a training forward, unscaled if an optimiser may have perturbed it inside its step.

        With an optimiser whose steps are followed, every training forward uses the unscaled weight. Before the first
        such step, and in loops without an optimiser, a perturbation can only be recognised because it follows a forward
        with unit rows: rows of another norm are then used unscaled once.
        """
        weight = self._stored_weight()
        if self._steps_followed:
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
    """Return the norms of the rows (K, 1); exactly 1 for rows with unit norm up to rounding, and for zero rows."""
    rows = weight.to(compute_dtype(weight.dtype))
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    rounding = torch.finfo(weight.dtype).eps / 2 + torch.finfo(rows.dtype).eps * (4 + math.sqrt(rows.shape[1]))
    return torch.where(((norms - 1).abs() > rounding) & (norms > 0), norms, 1.0)


def _is_off(weight: Tensor) -> bool:
    """Return whether rows of a parameter do not have unit norm; False if its values cannot be read."""
    return isinstance(weight, nn.Parameter) and readable(weight) and bool((_excess(weight) != 1).any())


_HEADS: weakref.WeakSet[LearnedClassifier] = weakref.WeakSet()


def _follow_steps_of(head: LearnedClassifier) -> None:
    """Register the head for the hooks that run before and after each step of any ``torch.optim`` optimiser."""
    _HEADS.add(head)
    _register_hooks()


@functools.cache
def _register_hooks() -> None:
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    for head in _heads_of(optimizer):
        head._in_step = head._steps_followed = True


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    for head in _heads_of(optimizer):
        head._in_step = False
        head.project_weight()


def _heads_of(optimizer: Optimizer) -> Iterator[LearnedClassifier]:
    """Yield the heads with unit rows whose weight is a parameter of the optimiser."""
    heads = [head for head in _HEADS if head.unit_weight]
    if heads:
        parameters = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        yield from (head for head in heads if id(head._parameters.get("weight")) in parameters)
