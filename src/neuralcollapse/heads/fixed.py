"""Classifiers with a fixed weight: a frame of a code, or a simplex ETF (the method `fixed`)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neuralcollapse._checks import (
    check_at_least,
    check_choice,
    check_etf_sizes,
    check_factory,
    check_finite,
    check_floating,
    check_targets,
    compute_dtype,
)
from neuralcollapse.geometry import random_simplex_etf, simplex_etf
from neuralcollapse.geometry.codes import SimplexCode, check_constant_code, principal_code
from neuralcollapse.geometry.frames import extended_frame, placed
from neuralcollapse.geometry.simplex import check_simplex_etf
from neuralcollapse.heads.growth import ParameterGrowth, check_growth, check_room
from neuralcollapse.heads.head import Head, check_layout, readable, skips_nonfinite
from neuralcollapse.heads.moving_means import (
    DEFAULT_MOMENTUM,
    Momentum,
    MovingMean,
    check_batch_mean,
    sums_over_ranks,
)

Bias = Literal["centring", "learned", "none"]


class FixedFrameClassifier(Head):
    """Classifier with a fixed weight, a frame with a given Gram matrix.

    Args:
        in_features: d, at least the rank of the centred code.
        num_classes: K ≥ 2.
        code: (K, r') floating, one row per class; the weight is a rotation of the centred code, at its scale. See
            `code_from_gram` and, for many classes in few dimensions, `softmax_code`.
        feature_norm: τ, as for `Head`.
        bias: ``"centring"``: −W·m with the global mean m of the features, which in training is the mean of the batch
            over all ranks, without gradient, and in evaluation a moving mean; ``"learned"``; or ``"none"``.
        momentum: Weight of a new batch in the moving mean, as for `ClassMeans`.
        ignore_index: If targets are given, features with this target are left out of the mean.
        orientation: ``"random"``: Haar-uniform, and the same for every construction unless a ``generator`` is given;
            ``"canonical"``: the principal coordinates of the code, followed by zeros, which trains worse after a ReLU
            (see `FixedETFClassifier`); ``"given"``: the weight is the code (K, d) itself, neither centred nor rotated.
        generator: Source of randomness for ``orientation="random"``; by default a generator with seed 0.

    Shape: features (..., d) to logits (..., K).

    Raises:
        ValueError: if sizes are out of range, an argument has the wrong type, the code is invalid for `nearest_frame`,
            or with ``orientation="given"`` the code is not of shape (K, d).

    Source: Liang and Davis, HAFrame (ICCV 2023), for the frame of a class hierarchy.

    Examples:
        >>> from neuralcollapse.geometry import code_from_gram, tree_gram
        >>> gram = tree_gram(torch.tensor([4, 4, 5, 5, 6, 6, -1]), decay=3.0)
        >>> head = FixedFrameClassifier(64, 4, code_from_gram(gram, feature_dim=64)).eval()
        >>> head(torch.randn(32, 64)).shape
        torch.Size([32, 4])
    """

    weight: Tensor

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
        orientation: Literal["random", "canonical", "given"] = "random",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, feature_norm, ignore_index)
        check_choice("orientation", orientation, ("random", "canonical", "given"))
        check_factory(None, None, generator)
        if orientation == "given":
            _check_weight("code", code, num_classes, in_features)
            if readable(code):
                check_finite("code", code)
            weight = code.detach().clone()
        else:
            check_constant_code(code, num_classes)
            rotated = orientation == "random"
            principal = principal_code(code, in_features)
            weight = placed(principal, in_features, (generator or _seeded()) if rotated else None)
            weight = weight.to(torch.get_default_dtype())
        self.register_buffer("weight", weight)
        check_choice("bias", bias, ("centring", "learned", "none"))
        self.learned_bias = nn.Parameter(torch.zeros(num_classes)) if bias == "learned" else None
        self.global_mean = MovingMean(1, in_features, momentum) if bias == "centring" else None

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """Learned bias (K,), or −W·m̄ with the moving mean m̄, or None."""
        if self.global_mean is not None:
            return -(self.weight @ self.global_mean.mean[0].to(self.weight))
        return self.learned_bias

    @torch.no_grad()
    def grow(
        self,
        num_new: int,
        *,
        optimizer: Optimizer | None = None,
        generator: torch.Generator | None = None,
        code: Tensor | None = None,
    ) -> None:
        """Add classes as `Head.grow`: of the frames of a code of K + n classes, the weight is that nearest to old rows.

        Directions that the old rows do not determine are random. New learned biases are the mean of the old ones.

        Args:
            num_new: n ≥ 1.
            optimizer: As for `Head.grow`, for the learned bias.
            generator: Generator of the undetermined directions.
            code: (K + n, r') floating, one row per old or new class, as for the constructor.

        Raises:
            ValueError: as for `Head.grow`; also if the code is missing or invalid for `nearest_frame`.
        """
        check_growth(num_new, optimizer, generator)
        num_classes = self.num_classes + num_new
        if code is None:
            raise ValueError(
                f"code must be a code of all {num_classes} classes for {type(self).__name__}, got None: "
                "the present code does not contain the new classes"
            )
        check_constant_code(code, num_classes)
        self._replace_rows(extended_frame(self.weight, principal_code(code, self.in_features), generator), optimizer)

    def _replace_rows(self, weight: Tensor, optimizer: Optimizer | None) -> None:
        """Set a weight with more rows, and extend the biases accordingly."""
        num_new = len(weight) - self.num_classes
        if self.learned_bias is not None:
            growth = ParameterGrowth(optimizer)
            growth.plan(self, "learned_bias", torch.cat([self.learned_bias, self.learned_bias.mean().expand(num_new)]))
            growth.apply()
        self.weight = weight
        self._set_num_classes(len(weight))

    def prepare(self, features: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return features, weight and bias as `Head.prepare`; with centring, training uses the mean of the batch.

        A batch that is not finite leaves the moving mean unchanged. On a CPU in full precision it raises an error.
        """
        features = self.features(features)
        check_layout(targets, features)
        self._check_seen(targets)
        if not (self.training and self.global_mean is not None):
            return features, self.weight, self.bias
        skip_nonfinite = skips_nonfinite(features)
        with torch.autocast(features.device.type, enabled=False):
            flat = features.detach().reshape(-1, self.in_features).to(compute_dtype(features.dtype))
            count = flat.new_full((1,), flat.shape[0])
            if targets is not None and self.ignore_index is not None:
                counted = targets.reshape(-1, 1) != self.ignore_index
                flat, count = torch.where(counted, flat, 0), counted.sum(0).to(flat)
            sums, counts = sums_over_ranks(flat.sum(0, keepdim=True), count)
            batch_mean = sums / counts.clamp_min(1)
            if not skip_nonfinite:
                check_batch_mean("features", flat, torch.isfinite(batch_mean).all())
            self.global_mean(batch_mean, counts)
            bias = -(self.weight.to(batch_mean) @ batch_mean[0])
        return features, self.weight, bias

    def _check_seen(self, targets: Tensor | None) -> None:
        """Raise if targets contain classes without logits; only heads with such classes implement this check."""


class FixedETFClassifier(FixedFrameClassifier):
    """Classifier with a fixed weight, a simplex ETF.

    Args:
        in_features: d ≥ K−1.
        num_classes: K ≥ 2.
        seen: Number of classes that have logits, at least 2; by default all. The rows of the other classes are assigned
            in advance, and `grow` adds their logits (Yang et al., ICLR 2023). The feature norm is that of all K
            classes. After construction, the attribute ``num_classes`` is the number of logits, ``weight`` has the rows
            of these classes, and the other rows are in ``preassigned``.
        orientation: ``"random"``: Haar-uniform, and the same for every construction unless a ``generator`` is given;
            ``"canonical"``: one coordinate per class, as in the released code of both sources. After a ReLU this often
            does not train, because each class depends on a single unit, and the other units have no gradient. Or a
            tensor: the (K, d) ETF itself.
        generator: Source of randomness for ``orientation="random"``; by default a generator with seed 0.
        feature_norm: As for `FixedFrameClassifier`, like the following arguments.
        bias: ``"centring"``, ``"learned"`` or ``"none"``.
        momentum: Weight of a new batch in the moving mean.
        ignore_index: Target of features that are left out of the mean.

    Shape: features (..., d) to logits (..., K).

    Raises:
        ValueError: if sizes are out of range, or an argument has the wrong type; on a CPU also if targets contain
            classes that have an assigned row but no logits.

    Source: Zhu et al. (NeurIPS 2021), section 4 (with ``feature_norm=None, bias="learned"``); Markou, Ajanthan,
    Gould (NeurIPS 2024), the method ``fixed`` (with ``bias="centring"``); Yang et al., "Neural Collapse Inspired
    Feature-Classifier Alignment for Few-Shot Class Incremental Learning" (ICLR 2023), for rows assigned in advance.

    Examples:
        >>> incremental = FixedETFClassifier(128, 100, seen=60)
        >>> incremental.grow(10)
        >>> incremental.weight.shape, incremental.preassigned.shape
        (torch.Size([70, 128]), torch.Size([30, 128]))
        >>> head = FixedETFClassifier(64, 10).eval()
        >>> head(torch.randn(32, 64)).shape
        torch.Size([32, 10])
    """

    preassigned: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        seen: int | None = None,
        orientation: Literal["random", "canonical"] | Tensor = "random",
        generator: torch.Generator | None = None,
        feature_norm: float | Literal["auto"] | None = "auto",
        bias: Bias = "centring",
        momentum: Momentum = DEFAULT_MOMENTUM,
        ignore_index: int | None = None,
    ) -> None:
        check_at_least("in_features", in_features, 1)
        check_etf_sizes(num_classes, in_features)
        super().__init__(
            in_features,
            num_classes,
            _oriented_etf(orientation, num_classes, in_features, generator),
            feature_norm=feature_norm,
            bias=bias,
            momentum=momentum,
            ignore_index=ignore_index,
            orientation="given",
        )
        self.register_buffer("preassigned", None)
        if seen is None:
            return
        check_at_least("seen", seen, 2)
        if seen > num_classes:
            raise ValueError(f"seen must be at most num_classes = {num_classes}, got {seen}")
        rows = self.weight
        self.weight, self.preassigned = rows[:seen].clone(), rows[seen:].clone()
        self._norm_follows_classes = False
        self.num_classes = seen
        if self.learned_bias is not None:
            self.learned_bias = nn.Parameter(torch.zeros(seen))

    @torch.no_grad()
    def grow(
        self,
        num_new: int,
        *,
        optimizer: Optimizer | None = None,
        generator: torch.Generator | None = None,
        code: Tensor | None = None,
    ) -> None:
        """Add classes as `Head.grow`.

        If the head was constructed with ``seen``, the next preassigned rows receive logits, and the other rows do not
        change. Otherwise, the weight becomes the simplex ETF of K + n classes nearest to the old rows (see
        `FixedFrameClassifier.grow`), for K + n ≤ d + 1. New learned biases are the mean of the old ones.

        Args:
            num_new: n ≥ 1.
            optimizer: As for `Head.grow`, for the learned bias.
            generator: Generator of the undetermined directions; must be None with ``seen``.
            code: Must be None, because the code is the simplex.

        Raises:
            ValueError: as for `Head.grow`; also if more classes are added than there are rows.
        """
        check_growth(num_new, optimizer, generator)
        if code is not None:
            raise ValueError("code must be None for FixedETFClassifier: use FixedFrameClassifier for other codes")
        num_classes = self.num_classes + num_new
        if self.preassigned is None:
            check_room(
                num_classes, self.in_features, "FixedFrameClassifier.grow accepts a code, such as softmax_code's"
            )
            self._replace_rows(extended_frame(self.weight, SimplexCode(num_classes), generator), optimizer)
            return
        if generator is not None:
            raise ValueError("generator must be None for rows that were assigned in advance (seen)")
        if num_new > len(self.preassigned):
            raise ValueError(
                f"num_new must be at most {len(self.preassigned)}, the number of rows that were assigned in advance "
                f"and have no logits, got {num_new}"
            )
        self._replace_rows(torch.cat([self.weight, self.preassigned[:num_new]]), optimizer)
        self.preassigned = self.preassigned[num_new:].clone()

    def _check_seen(self, targets: Tensor | None) -> None:
        if targets is None or self.preassigned is None or targets.device.type != "cpu":
            return
        if torch.compiler.is_compiling() or not readable(targets):
            return
        targets = targets.reshape(-1)
        check_targets(targets, len(targets), self.num_classes, ignore_index=self.ignore_index)


def _oriented_etf(
    orientation: str | Tensor, num_classes: int, feature_dim: int, generator: torch.Generator | None
) -> Tensor:
    if isinstance(orientation, Tensor):
        _check_weight("orientation", orientation, num_classes, feature_dim)
        check_simplex_etf("orientation", orientation)
        return orientation
    if not isinstance(orientation, str) or orientation not in ("canonical", "random"):
        raise ValueError(f"orientation must be 'canonical', 'random' or a (K, d) tensor, got {orientation!r}")
    check_factory(None, None, generator)
    if orientation == "canonical":
        return simplex_etf(num_classes, feature_dim)
    if generator is not None:
        return random_simplex_etf(num_classes, feature_dim, generator=generator)
    # Computed on the CPU, so that the weight is the same on any device.
    etf = random_simplex_etf(num_classes, feature_dim, generator=_seeded(), device="cpu")
    return etf.to(torch.get_default_device())


def _check_weight(name: str, weight: Tensor, num_classes: int, feature_dim: int) -> None:
    """Raise a `ValueError` unless the weight is a floating-point tensor of shape (K, d)."""
    check_floating(name, weight)
    if weight.shape != (num_classes, feature_dim):
        raise ValueError(f"{name} must be of shape {(num_classes, feature_dim)}, got {tuple(weight.shape)}")


def _seeded() -> torch.Generator:
    """Return a generator with seed 0, so that the orientation is always the same."""
    return torch.Generator().manual_seed(0)
