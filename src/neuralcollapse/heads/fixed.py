"""The classifiers whose weight is given from the start; that of a simplex ETF is the method `fixed`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from neuralcollapse._checks import (
    check_at_least,
    check_choice,
    check_etf_sizes,
    check_factory,
    check_floating,
    compute_dtype,
)
from neuralcollapse.geometry import random_simplex_etf, simplex_etf, softmax_code
from neuralcollapse.geometry.codes import check_code, principal_code
from neuralcollapse.geometry.frames import placed
from neuralcollapse.geometry.simplex import check_simplex_etf
from neuralcollapse.heads.class_means import (
    DEFAULT_MOMENTUM,
    Momentum,
    MovingMean,
    check_batch_mean,
    sums_over_ranks,
)
from neuralcollapse.heads.head import Head, check_layout, may_overflow
from neuralcollapse.heads.recompute import is_recomputing

Bias = Literal["centring", "learned", "none"]


class FixedWeight(Head):
    """A classifier whose weight (K, d) is given and not trained; its bias centres the features, is learned, or none."""

    weight: Tensor

    def __init__(
        self,
        weight: Tensor,
        feature_norm: float | Literal["auto"] | None,
        bias: Bias,
        momentum: Momentum,
        ignore_index: int | None,
    ) -> None:
        num_classes, in_features = weight.shape
        super().__init__(in_features, num_classes, feature_norm, ignore_index)
        self.register_buffer("weight", weight)
        check_choice("bias", bias, ("centring", "learned", "none"))
        self.learned_bias = nn.Parameter(torch.zeros(num_classes)) if bias == "learned" else None
        self.global_mean = MovingMean(1, in_features, momentum) if bias == "centring" else None

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """(K,) or None; with centring, of the moving mean."""
        if self.global_mean is not None:
            return -(self.weight @ self.global_mean.mean[0].to(self.weight))
        return self.learned_bias

    def prepare(self, features: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `Head.prepare`; the weight is fixed, the bias in training mode that of the batch.

        A batch that is not finite leaves the moving mean as it is. On a CPU and in full precision it raises.
        """
        features = self.features(features)
        check_layout(targets, features)
        if not (self.training and self.global_mean is not None):
            return features, self.weight, self.bias
        overflowing = may_overflow(features)
        with torch.autocast(features.device.type, enabled=False):
            flat = features.detach().reshape(-1, self.in_features).to(compute_dtype(features.dtype))
            count = flat.new_full((1,), flat.shape[0])
            if targets is not None and self.ignore_index is not None:
                counted = targets.reshape(-1, 1) != self.ignore_index
                flat, count = torch.where(counted, flat, 0), counted.sum(0).to(flat)
            sums, counts = sums_over_ranks(flat.sum(0, keepdim=True), count)
            batch_mean = sums / counts.clamp_min(1)
            if not overflowing:
                check_batch_mean("features", flat, torch.isfinite(batch_mean).all())
            if not is_recomputing():
                self.global_mean(batch_mean, counts)
            bias = -(self.weight.to(batch_mean) @ batch_mean[0])
        return features, self.weight, bias


class FixedETFClassifier(FixedWeight):
    """A classifier whose weight is a simplex ETF and is not trained.

    Args:
        in_features: d ≥ K−1; any with ``orientation="softmax-code"``.
        num_classes: K ≥ 2.
        orientation: ``"random"``, Haar-uniform and the same each time unless a ``generator`` is given;
            ``"canonical"``, one coordinate per class, as in the released codes of both sources: behind a ReLU it often
            does not train, because each class depends on one unit, and the other units have no gradient; the (K, d) ETF
            itself; or ``"softmax-code"``, which takes the ETF's place where K > d+1 (`softmax_code`, which takes some
            time there; one that is known in closed form is rotated at random).
        feature_norm: τ, the norm that features are given; ``"auto"``: `collapse_radius`; ``None``: left as they are.
        bias: ``"centring"``: −W·m with the global mean m of the features, of the (whole, distributed) batch and
            without gradient in training, a moving mean in evaluation; ``"learned"``; ``"none"``.
        momentum: The weight of a new batch in that moving mean, as for `ClassMeans`.
        ignore_index: Where targets are given, features whose target is this do not count in that mean.
        generator: Source of randomness for ``orientation="random"`` and ``"softmax-code"``; a generator with seed 0
            if not given.

    Shape: features (..., d) to logits (..., K).

    Raises:
        ValueError: Sizes out of range, or an argument of another kind.

    Source: Zhu et al. (NeurIPS 2021), section 4 (with ``feature_norm=None, bias="learned"``); Markou, Ajanthan,
    Gould (NeurIPS 2024), the method ``fixed`` (with ``bias="centring"``).

    Examples:
        >>> head = FixedETFClassifier(64, 10).eval()
        >>> head(torch.randn(32, 64)).shape
        torch.Size([32, 10])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        orientation: Literal["random", "canonical", "softmax-code"] | Tensor = "random",
        feature_norm: float | Literal["auto"] | None = "auto",
        bias: Bias = "centring",
        momentum: Momentum = DEFAULT_MOMENTUM,
        ignore_index: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_at_least("in_features", in_features, 1)
        if not (isinstance(orientation, str) and orientation == "softmax-code"):
            check_etf_sizes(num_classes, in_features)
        weight = _oriented(orientation, num_classes, in_features, generator)
        super().__init__(weight, feature_norm, bias, momentum, ignore_index)


class FixedFrameClassifier(FixedWeight):
    """A classifier whose weight is a frame of a prescribed Gram and is not trained.

    Args:
        in_features: d, at least the rank of the centred code.
        num_classes: K ≥ 2.
        code: (K, r') floating, a row a class, of which the weight is a rotation; it is centred first, and its scale is
            the weight's. See `code_from_gram`.
        feature_norm: τ, the norm that features are given; ``"auto"``: `collapse_radius`; ``None``: left as they are.
        bias: As for `FixedETFClassifier`.
        momentum: As for `FixedETFClassifier`.
        ignore_index: As for `FixedETFClassifier`.
        orientation: ``"random"``, Haar-uniform, or ``"canonical"``: the code's principal coordinates come first and
            zeros after them, which trains worse behind a ReLU, as for `FixedETFClassifier`.
        generator: Source of randomness for ``orientation="random"``; a generator with seed 0 if not given.

    Shape: features (..., d) to logits (..., K).

    Raises:
        ValueError: Sizes out of range, an argument of another kind, or a code that `nearest_frame` refuses.

    Source: Liang and Davis, HAFrame (ICCV 2023), for a hierarchy's frame.

    Examples:
        >>> from neuralcollapse.geometry import code_from_gram, tree_gram
        >>> gram = tree_gram(torch.tensor([4, 4, 5, 5, 6, 6, -1]), decay=3.0)
        >>> head = FixedFrameClassifier(64, 4, code_from_gram(gram, feature_dim=64)).eval()
        >>> head(torch.randn(32, 64)).shape
        torch.Size([32, 4])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        code: Tensor,
        *,
        feature_norm: float | Literal["auto"] | None = "auto",
        bias: Bias = "centring",
        momentum: Momentum = DEFAULT_MOMENTUM,
        ignore_index: int | None = None,
        orientation: Literal["random", "canonical"] = "random",
        generator: torch.Generator | None = None,
    ) -> None:
        check_at_least("in_features", in_features, 1)
        check_at_least("num_classes", num_classes, 2)
        check_code(code, num_classes)
        check_choice("orientation", orientation, ("random", "canonical"))
        check_factory(None, None, generator)
        principal = principal_code(code, in_features)
        if orientation == "canonical":
            weight = placed(principal, in_features)
        else:
            weight = placed(principal, in_features, generator or _seeded())
        super().__init__(weight.to(torch.get_default_dtype()), feature_norm, bias, momentum, ignore_index)


def _oriented(
    orientation: str | Tensor, num_classes: int, feature_dim: int, generator: torch.Generator | None
) -> Tensor:
    if isinstance(orientation, Tensor):
        check_floating("orientation", orientation)
        if orientation.shape != (num_classes, feature_dim):
            raise ValueError(
                f"orientation must be of shape {(num_classes, feature_dim)}, got {tuple(orientation.shape)}"
            )
        check_simplex_etf("orientation", orientation)
        return orientation.detach().clone()
    if not isinstance(orientation, str) or orientation not in ("canonical", "random", "softmax-code"):
        raise ValueError(
            f"orientation must be 'canonical', 'random', 'softmax-code' or a (K, d) tensor, got {orientation!r}"
        )
    check_factory(None, None, generator)
    if orientation == "canonical":
        return simplex_etf(num_classes, feature_dim)
    if orientation == "random" or num_classes <= feature_dim + 1:
        if generator is not None:
            return random_simplex_etf(num_classes, feature_dim, generator=generator)
        # On the CPU, so that it is the same on any device.
        etf = random_simplex_etf(num_classes, feature_dim, generator=_seeded(), device="cpu")
        return etf.to(torch.get_default_device())
    code = softmax_code(num_classes, feature_dim, generator=generator)
    if num_classes > 2 * feature_dim:
        return code
    return placed(code, feature_dim, generator or _seeded())  # the orthoplex has its vectors on the axes


def _seeded() -> torch.Generator:
    """The generator of an orientation that is the same each time."""
    return torch.Generator().manual_seed(0)
