"""The classifier that is at every step the simplex ETF nearest to the class means: the method `implicit`."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor

from neuralcollapse._checks import (
    check_at_least,
    check_bool,
    check_choice,
    check_etf_sizes,
    check_not_negative,
    compute_dtype,
)
from neuralcollapse.geometry import nearest_etf_diagnostics, random_simplex_etf, simplex_etf
from neuralcollapse.geometry.nearest import solve
from neuralcollapse.geometry.polar import METHODS, Method
from neuralcollapse.geometry.published import frame_to_etf, published_nearest_frame
from neuralcollapse.geometry.watch import Watch
from neuralcollapse.heads.class_means import DEFAULT_MOMENTUM, ClassMeans, KeepsFullPrecision, Momentum
from neuralcollapse.heads.head import LearnsFromTargets

logger = logging.getLogger(__name__)

# With the momentum, the best of those compared on a validation split at K = 10 and K = 100: docs/heads.md.
DEFAULT_PROXIMAL_WEIGHT = 0.5
# In the first solve, where classes are missing in the batch and the data do not decide the ETF alone.
FIRST_ANCHOR_WEIGHT = 1e-3


class NearestETFClassifier(KeepsFullPrecision, LearnsFromTargets):
    r"""A classifier whose weight is, at every training step, the simplex ETF nearest to the moving class means.

    In training, with targets, it takes the batch into its `ClassMeans`, solves for the nearest ETF with the last
    one as anchor (the first solve has none, since no data has spoken
    before), and returns logits that carry two gradients: the direct one, and the one through the ETF
    (a differentiable argmin). In evaluation it is a linear classifier and changes nothing.

    Training-mode logits know the labels of their batch: compare accuracies in evaluation mode only.

    Args:
        in_features: d ≥ K−1.
        num_classes: K ≥ 2.
        feature_norm: τ, the norm that features are given; ``"auto"``: `collapse_radius`; ``None``: left as they are.
        bias: ``"centring"``: −E·m with the global mean m of the batch in training (with gradient), a moving mean in
            evaluation; ``"none"``.
        proximal_weight: γ ≥ 0, how strongly the ETF stays with the last one (see `nearest_simplex_etf`). The
            published δ is γ = δ(K−1)/2. With many classes a small γ lets the ETF follow each batch's labels, and
            accuracy suffers (docs/heads.md).
        momentum: The weight α of a new batch in the class means, as for `ClassMeans`. The gradient through the
            ETF scales with α: at ``"published"``, which falls to 1e-4, it is practically off.
        implicit_gradient: Whether the gradient through the ETF is kept.
        ignore_index: Features whose target is this count in no mean.
        solver: ``"closed-form"``; or ``"trust-region"``, the published problem solved as published, for comparison
            (`published_nearest_frame`, at δ = 2γ/(K−1); d ≥ K; it waits for the device).
        method: How the closed form finds the nearest ETF, as for `polar_factor`. On accelerators nothing waits for
            the device but the first solve; `svd_fallbacks` counts the solves that needed an SVD.
        generator: If given, the first ETF has a random orientation drawn from it; else the canonical one.

    Shape: features (..., d) and targets (...) to logits (..., K).

    Raises:
        ValueError: Sizes or arguments out of range; in training mode, no targets, or labels outside [0, K).

    Source: Markou, Ajanthan, Gould, "Guiding Neural Collapse" (NeurIPS 2024).

    Example:
        >>> head = NearestETFClassifier(64, 10)
        >>> features, targets = torch.randn(32, 64, requires_grad=True), torch.randint(10, (32,))
        >>> torch.nn.functional.cross_entropy(head(features, targets), targets).backward()
        >>> head.eval()(features).shape
        torch.Size([32, 10])
    """

    _full_precision_buffer = "weight"
    weight: Tensor
    frame: Tensor  # the published problem's P, with solver="trust-region"

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        feature_norm: float | Literal["auto"] | None = "auto",
        bias: Literal["centring", "none"] = "centring",
        proximal_weight: float = DEFAULT_PROXIMAL_WEIGHT,
        momentum: Momentum = DEFAULT_MOMENTUM,
        implicit_gradient: bool = True,
        ignore_index: int | None = None,
        solver: Literal["closed-form", "trust-region"] = "closed-form",
        method: Method = "auto",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, feature_norm, ignore_index)
        check_etf_sizes(num_classes, in_features)
        check_choice("bias", bias, ("centring", "none"))
        check_not_negative("proximal_weight", proximal_weight)
        check_bool("implicit_gradient", implicit_gradient)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        check_choice("method", method, METHODS)
        check_choice("solver", solver, ("closed-form", "trust-region"))
        self.centring = bias == "centring"
        self.proximal_weight = proximal_weight
        self.implicit_gradient = implicit_gradient
        self.method = method
        self.solver = solver
        self._watch = Watch()
        self.class_means = ClassMeans(num_classes, in_features, momentum=momentum, ignore_index=ignore_index)
        start = (
            simplex_etf(num_classes, in_features, dtype=torch.float32)
            if generator is None
            else random_simplex_etf(
                num_classes, in_features, generator=generator, dtype=torch.float32, device=generator.device
            ).to(self.class_means.global_mean.device)
        )
        self.register_buffer("weight", start)
        if solver == "trust-region":
            check_at_least("in_features", in_features, num_classes, "num_classes")
            self.register_buffer("frame", torch.eye(num_classes, in_features, dtype=torch.float32))

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """(K,), of the moving global mean; None without centring."""
        return -(self.weight @ self.class_means.global_mean.to(self.weight)) if self.centring else None

    @property
    def svd_fallbacks(self) -> int:
        """How many solves by products gave way to an SVD; see `polar_factor`."""
        return self._watch.fallbacks

    def prepare(self, features: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `Head.prepare`; in training mode, targets (...) are needed (or ``with frozen()``)."""
        features = self.features(features)
        targets = self.step_targets(targets)
        if targets is None:
            return features, self.weight, self.bias
        # Means and the solve stay in fp32 under autocast.
        with torch.autocast(features.device.type, enabled=False):
            flat = features.reshape(-1, self.in_features).to(compute_dtype(features.dtype))
            seen = self.class_means.centred.seen
            class_means, batch_mean = self.class_means(flat, targets.reshape(-1))
            etf = self._solve(class_means if self.implicit_gradient else class_means.detach(), seen)
            bias = -(etf @ batch_mean) if self.centring else None
        return features, etf, bias

    def _solve(self, class_means: Tensor, seen_before: Tensor) -> Tensor:
        """The nearest ETF, with its graph; the weight is its value from now on."""
        if self.solver == "trust-region":
            etf = self._solve_as_published(class_means, seen_before)
            self.weight = etf.detach().to(self.weight.dtype, copy=True)
            return etf
        anchor_weight = self._anchor_weight(seen_before, self.class_means.centred.seen)
        # Unchecked: ClassMeans has looked at the batch, before anything changed.
        etf = solve(
            class_means,
            self.weight,
            anchor_weight,
            method=self.method,
            watch=self._watch.handle,
            greatest_weight=self.proximal_weight,
        )
        if not torch.compiler.is_compiling() and logger.isEnabledFor(logging.DEBUG):
            self._log_solution(class_means, etf, float(anchor_weight))
        # A copy: what restores or broadcasts buffers writes into them, and the graph holds `etf`.
        self.weight = etf.detach().to(self.weight.dtype, copy=True)
        return etf

    def _solve_as_published(self, class_means: Tensor, seen_before: Tensor) -> Tensor:
        last = self.frame.to(class_means) if bool(seen_before.any()) else None
        weight = 2 * self.proximal_weight / (self.num_classes - 1)
        frame = published_nearest_frame(class_means, last, proximal_weight=weight).point
        self.frame = frame.detach().to(self.frame.dtype, copy=True)
        return frame_to_etf(frame)

    def _anchor_weight(self, seen_before: Tensor, seen: Tensor) -> Tensor | float:
        """γ, or in the first solve 0; there, if classes are missing, just enough to decide what they leave open.

        Tensors, so that nothing waits for an accelerator.
        """
        if self.proximal_weight == 0:
            return 0.0
        usual = self.class_means.global_mean.new_full((), self.proximal_weight)
        first = torch.where(seen.all(), 0.0, usual.clamp_max(FIRST_ANCHOR_WEIGHT))
        return torch.where(seen_before.any(), usual, first)

    def _log_solution(self, class_means: Tensor, etf: Tensor, anchor_weight: float) -> None:
        diagnostics = nearest_etf_diagnostics(class_means, etf, anchor=self.weight, proximal_weight=anchor_weight)
        logger.debug("nearest ETF: %s", ", ".join(f"{name} {value:.3e}" for name, value in diagnostics.items()))
