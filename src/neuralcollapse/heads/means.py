"""The classifier that is the class means themselves."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from neuralcollapse._checks import check_choice, check_factory, compute_dtype
from neuralcollapse.heads.class_means import (
    DEFAULT_MOMENTUM,
    ClassMeans,
    KeepsFullPrecision,
    Momentum,
    check_class_weights,
    full_precision,
    mended,
    random_unit_rows,
    rows_are_off,
)
from neuralcollapse.heads.head import LearnsFromTargets, may_overflow
from neuralcollapse.heads.recompute import counts_once

Means = Literal["previous", "current", "differentiable"]


class ClassMeanClassifier(KeepsFullPrecision, LearnsFromTargets):
    r"""A classifier whose weight is the moving class means, centred and of unit norm: any K in any d.

    In training, with targets, it takes the batch into its `ClassMeans`; in evaluation it is a linear classifier and
    changes nothing. Classes that have not been seen have random unit rows. An average of several heads' weights is
    given unit rows when it is read.

    Args:
        in_features: d.
        num_classes: K ≥ 2.
        means: Which means the logits of a training batch are of. ``"previous"``: those of before the batch, so that
            they do not know its labels; ``"current"``: those with the batch in them; ``"differentiable"``: these, with
            their gradient.
        feature_norm: τ, the norm that features are given; ``"auto"``: `collapse_radius`; ``None``: left as they are.
        bias: ``"centring"``: −W·m with the global mean m of the batch in training (with gradient where the means have
            theirs), a moving mean in evaluation, for cross-entropy; ``"none"``, for the losses on the sphere
            (`neuralcollapse.losses`).
        momentum: The weight α of a new batch in the class means, as for `ClassMeans`.
        ignore_index: Features whose target is this count in no mean.
        class_weights: (K,), ω ≥ 0 up to a common factor. If given, the means are centred at their ω-weighted mean, of
            the classes seen so far, in place of the mean of the samples; with ``bias="centring"``, so are the features.
        generator: Source of the rows of classes not seen yet; by default one seeded with 0.

    Shape: features (..., d) and targets (...) to logits (..., K).

    Raises:
        ValueError: if sizes or arguments are out of range; in training mode, without targets, or with labels outside
            [0, K); in evaluation mode, with targets for features that are being trained.

    Examples:
        >>> head = ClassMeanClassifier(64, 1000)
        >>> features, targets = torch.randn(32, 64, requires_grad=True), torch.randint(1000, (32,))
        >>> torch.nn.functional.cross_entropy(head(features, targets), targets).backward()
        >>> head.eval()(features).shape
        torch.Size([32, 1000])
    """

    _full_precision_buffers = ("weight", "class_weights")
    weight: Tensor
    class_weights: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        means: Means = "previous",
        feature_norm: float | Literal["auto"] | None = "auto",
        bias: Literal["centring", "none"] = "centring",
        momentum: Momentum = DEFAULT_MOMENTUM,
        ignore_index: int | None = None,
        class_weights: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, feature_norm, ignore_index)
        check_choice("means", means, ("previous", "current", "differentiable"))
        check_choice("bias", bias, ("centring", "none"))
        check_factory(None, None, generator)
        self.means = means
        self.centring = bias == "centring"
        self.class_means = ClassMeans(num_classes, in_features, momentum=momentum, ignore_index=ignore_index)
        device = self.class_means.global_mean.device
        rows = random_unit_rows(in_features, num_classes, generator)
        self.register_buffer("weight", rows.to(device, full_precision()))
        self.register_buffer("class_weights", check_class_weights(class_weights, num_classes, device))

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """(K,), of the moving global mean; None without centring."""
        if not self.centring:
            return None
        weight, means = self.weight, self.class_means
        return _bias(weight, means.global_mean.to(weight), self._offset(means.centred_means))

    @counts_once
    def prepare(self, features: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `Head.prepare`; in training mode, targets (...) are needed (or ``with frozen()``)."""
        features = self.features(features)
        targets = self.step_targets(targets, features)
        if targets is None:
            return features, self.weight, self.bias
        overflowing = may_overflow(features)
        # Means stay in fp32 under autocast.
        with torch.autocast(features.device.type, enabled=False):
            flat = features.reshape(-1, self.in_features).to(compute_dtype(features.dtype))
            last, previous = self._unmended(), self.means == "previous"
            offset = self._offset(self.class_means.centred_means)
            batches = self.class_means.batches
            class_means, batch_mean = self.class_means(
                flat if self.means == "differentiable" else flat.detach(), targets.reshape(-1), overflowing=overflowing
            )
            finite = self.class_means.batches > batches
            offset_now = self._offset(class_means)
            weight = self._unit_rows(class_means if offset_now is None else class_means - offset_now, last)
            # A copy where the graph holds `weight`: what restores or broadcasts buffers writes into them.
            self._store(torch.where(finite, weight.detach().to(last.dtype), last))
            if previous:
                weight, offset_now = last.to(flat), offset
            bias = _bias(weight, batch_mean, offset_now) if self.centring else None
        return features, weight, bias

    def _offset(self, class_means: Tensor) -> Tensor | None:
        """The ω-weighted mean (d,) of the centred means of the classes seen; None without class weights."""
        if self.class_weights is None:
            return None
        weights = self.class_weights.to(class_means) * (self.class_means.centred.seen > 0)
        return weights @ class_means / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)

    def _unit_rows(self, class_means: Tensor, last: Tensor) -> Tensor:
        """The means scaled to unit norm; what has none, as a class not seen yet, keeps the row it has."""
        norms = torch.linalg.vector_norm(class_means, dim=1, keepdim=True)
        there = (norms > 0) & (self.class_means.centred.seen > 0).unsqueeze(-1)
        return torch.where(there, class_means / norms.where(there, 1), last.to(class_means))

    def _mended(self, weight: Tensor) -> Tensor:
        if not rows_are_off(weight, 1.0):
            return weight
        return self._store(mended(torch.nn.functional.normalize, weight))


def _bias(weight: Tensor, mean: Tensor, offset: Tensor | None) -> Tensor:
    return -(weight @ (mean if offset is None else mean + offset.to(mean)))
