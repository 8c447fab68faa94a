"""The classifiers that are at every step the nearest frame to the class means; the ETF's is the method `implicit`."""

from __future__ import annotations

import logging
import math
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
from neuralcollapse.geometry import (
    nearest_etf_diagnostics,
    polar_factor,
    random_simplex_etf,
    simplex_etf,
)
from neuralcollapse.geometry.codes import (
    Code,
    SimplexCode,
    check_code,
    check_code_rank,
    leading_code,
    principal_code,
)
from neuralcollapse.geometry.frames import placed, solve_frame
from neuralcollapse.geometry.polar import METHODS, Method
from neuralcollapse.geometry.polar_iteration import ConvergenceCheck
from neuralcollapse.geometry.published import frame_to_etf, published_nearest_frame
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

logger = logging.getLogger(__name__)

Geometry = Literal["simplex", "means"]
# With the momentum, the best of those compared on a validation split at K = 10 and K = 100: docs/heads.md.
DEFAULT_PROXIMAL_WEIGHT = 0.5
# In the first solve, where classes are missing in the batch and the data do not decide the frame alone.
FIRST_ANCHOR_WEIGHT = 1e-3


class NearestFrameClassifier(KeepsFullPrecision, LearnsFromTargets):
    r"""A classifier whose weight is, at every training step, the frame of a geometry nearest to the class means.

    In training, with targets, it takes the batch into its `ClassMeans`, solves for the nearest frame with the last one
    as anchor (the first solve has none, since no data has spoken before), and returns logits that carry two gradients:
    the direct one, and the one through the frame (a differentiable argmin). In evaluation it is a linear classifier and
    changes nothing. An average of several heads' weights is replaced by the frame nearest to it when it is read.

    Training-mode logits know the labels of their batch: compare accuracies in evaluation mode only.

    Args:
        in_features: d, at least the rank of the geometry.
        num_classes: K ≥ 2.
        geometry: ``"simplex"``: the simplex ETF, d ≥ K−1; a code (K, r'), of which the weight is the nearest rotation
            (`nearest_frame`; see `code_from_gram`): its scale is the weight's; or ``"means"``: the code of the moving
            means' own leading directions (`code_of_means`), a constant of each step, for any d.
        rank: With ``"means"`` only: r, from 1 to min(d, K−1), or ``"auto"``, the effective rank of each step, which
            waits for an accelerator and does not compile whole. ``"auto"`` if not given.
        feature_norm: τ, the norm that features are given; ``"auto"``: `collapse_radius`; ``None``: left as they are.
        bias: ``"centring"``: −W·m with the global mean m of the batch in training (with gradient), a moving mean in
            evaluation; ``"none"``.
        proximal_weight: γ ≥ 0, how strongly the frame stays with the last one (see `nearest_frame`). With many classes
            a small γ lets it follow each batch's labels, and accuracy suffers (docs/heads.md).
        momentum: The weight α of a new batch in the class means, as for `ClassMeans`. The gradient through the
            frame scales with α: at ``"published"``, which falls to 1e-4, it is practically off.
        implicit_gradient: Whether the gradient through the frame is kept.
        ignore_index: Features whose target is this count in no mean.
        class_weights: (K,), ω ≥ 0 up to a common factor: how much each class counts in the distance from frame to means
            (see `nearest_frame`); equal if not given.
        method: How the polar factor is found, as for `polar_factor`. On accelerators nothing waits for the device but
            the first solve; `svd_fallbacks` counts the solves that needed an SVD.
        generator: If given, the first frame has a random orientation drawn from it; else the canonical one. With
            ``"means"`` and d < K−1 the first weight is random unit rows, of a generator seeded with 0 if none is given.

    Shape: features (..., d) and targets (...) to logits (..., K).

    Raises:
        ValueError: if sizes or arguments are out of range, `nearest_frame` refuses the code, or a rank is given without
            ``"means"``; in training mode, without targets, or with labels outside [0, K); in evaluation mode, with
            targets for features that are being trained.

    Source: this project, after Markou, Ajanthan, Gould, "Guiding Neural Collapse" (NeurIPS 2024).

    Examples:
        >>> from neuralcollapse.geometry import attribute_gram, code_from_gram
        >>> digits = torch.cartesian_prod(torch.arange(10), torch.arange(10))  # 100 classes of two digits
        >>> code = code_from_gram(attribute_gram(digits, torch.tensor([0.5, 0.5])), feature_dim=64)
        >>> head = NearestFrameClassifier(64, 100, geometry=code)
        >>> features, targets = torch.randn(32, 64, requires_grad=True), torch.randint(100, (32,))
        >>> torch.nn.functional.cross_entropy(head(features, targets), targets).backward()
        >>> head.eval()(features).shape
        torch.Size([32, 100])
    """

    _full_precision_buffers: tuple[str, ...] = ("weight", "class_weights")
    weight: Tensor
    class_weights: Tensor | None
    code: Tensor  # in principal coordinates, where a code was given

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        geometry: Geometry | Tensor = "simplex",
        rank: int | Literal["auto"] | None = None,
        feature_norm: float | Literal["auto"] | None = "auto",
        bias: Literal["centring", "none"] = "centring",
        proximal_weight: float = DEFAULT_PROXIMAL_WEIGHT,
        momentum: Momentum = DEFAULT_MOMENTUM,
        implicit_gradient: bool = True,
        ignore_index: int | None = None,
        class_weights: Tensor | None = None,
        method: Method = "auto",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, feature_norm, ignore_index)
        check_choice("bias", bias, ("centring", "none"))
        check_not_negative("proximal_weight", proximal_weight)
        check_bool("implicit_gradient", implicit_gradient)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        check_choice("method", method, METHODS)
        self.geometry = _named(geometry)
        if rank is not None and self.geometry != "means":
            raise ValueError(f"rank needs geometry='means', got rank = {rank!r} with another")
        self.rank: int | Literal["auto"] = "auto" if rank is None else rank
        check_code_rank(self.rank, num_classes, in_features)
        self.centring = bias == "centring"
        self.proximal_weight = proximal_weight
        self.implicit_gradient = implicit_gradient
        self.method = method
        self._convergence = ConvergenceCheck()
        self.class_means = ClassMeans(num_classes, in_features, momentum=momentum, ignore_index=ignore_index)
        device = self.class_means.global_mean.device
        if isinstance(geometry, Tensor):
            check_code(geometry, num_classes)
            code = principal_code(geometry, in_features)
            self.register_buffer("code", code.to(device, full_precision()))
            self._full_precision_buffers = (*self._full_precision_buffers, "code")
            start = placed(code, in_features, generator)
        elif geometry == "means" and in_features < num_classes - 1:
            start = random_unit_rows(in_features, num_classes, generator)
        else:
            start = _first_etf(in_features, num_classes, generator)
        self.register_buffer("weight", start.to(device, full_precision()))
        self.register_buffer("class_weights", check_class_weights(class_weights, num_classes, device))

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """(K,), of the moving global mean; None without centring."""
        if not self.centring:
            return None
        weight = self.weight
        return -(weight @ self.class_means.global_mean.to(weight))

    @property
    def svd_fallbacks(self) -> int:
        """How many solves by products gave way to an SVD; see `polar_factor`."""
        return self._convergence.fallbacks

    @counts_once
    def prepare(self, features: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `Head.prepare`; in training mode, targets (...) are needed (or ``with frozen()``)."""
        features = self.features(features)
        targets = self.step_targets(targets, features)
        if targets is None:
            return features, self.weight, self.bias
        overflowing = may_overflow(features)
        # Means and the solve stay in fp32 under autocast.
        with torch.autocast(features.device.type, enabled=False):
            flat, targets = features.reshape(-1, self.in_features), targets.reshape(-1)
            flat = flat.to(compute_dtype(features.dtype))
            seen, batches = self.class_means.centred.seen, self.class_means.batches
            class_means, batch_mean = self.class_means(flat, targets, overflowing=overflowing)
            finite = self.class_means.batches > batches
            frame = self._solve(class_means if self.implicit_gradient else class_means.detach(), seen, finite)
            bias = -(frame @ batch_mean) if self.centring else None
        return features, frame, bias

    def _solve(self, class_means: Tensor, seen_before: Tensor, finite: Tensor) -> Tensor:
        """The nearest frame, with its graph; where the batch is finite, the weight is its value from now on."""
        last = self._unmended()
        anchor_weight = self._anchor_weight(seen_before, self.class_means.centred.seen)
        frame = self._nearest(class_means, last, anchor_weight)
        if not torch.compiler.is_compiling():
            self._look_at(class_means, frame, last, anchor_weight)
        # A new tensor: what restores or broadcasts buffers writes into them, and the graph holds `frame`.
        self._store(torch.where(finite, frame.detach().to(last.dtype), last))
        return frame

    def _nearest(self, class_means: Tensor, last: Tensor, anchor_weight: Tensor | float) -> Tensor:
        # Unchecked: ClassMeans has checked the batch, before anything changed.
        return solve_frame(
            class_means,
            self._code(class_means),
            last,
            anchor_weight,
            class_weights=self.class_weights,
            method=self.method,
            check=self._convergence,
        )

    def _code(self, class_means: Tensor) -> Code:
        """The code that the weight is a frame of, in the dtype of the class means."""
        if self.geometry == "simplex":
            return SimplexCode(self.num_classes, self.proximal_weight)
        if self.geometry == "means":
            return Code(leading_code(class_means, self.rank))
        return Code(self.code.to(class_means, copy=True))  # a copy, for the same reason as that of the weight

    def _mended(self, weight: Tensor) -> Tensor:
        """The weight; where it is not a frame of the geometry, as an average of frames is not, the nearest frame."""
        if not rows_are_off(*self._comparable(weight)):
            return weight
        if self.geometry == "means" and not bool(self.class_means.centred.seen.any()):
            return weight  # what it was made with
        return self._store(mended(self._restored, weight))

    def _comparable(self, weight: Tensor) -> tuple[Tensor, Tensor | float]:
        """The weight as rows of norms that are known, and these norms."""
        if self.geometry == "simplex":
            return weight, 1.0
        centred = weight - weight.mean(0)  # class weights shift a frame's rows, all alike
        if self.geometry == "means":  # a tight frame: only the norm of the whole is known
            return centred.reshape(1, -1), math.sqrt(self.num_classes)
        return centred, torch.linalg.vector_norm(self.code.to(weight), dim=1)

    def _restored(self, weight: Tensor) -> Tensor:
        if self.geometry == "simplex":
            return solve_frame(weight, SimplexCode(self.num_classes))
        means = self.class_means.centred_means if self.geometry == "means" else weight
        return solve_frame(weight, self._code(means).to(weight), class_weights=self.class_weights)

    def _anchor_weight(self, seen_before: Tensor, seen: Tensor) -> Tensor | float:
        """γ, or in the first solve 0; there, if classes are missing, just enough to decide what they leave open.

        Tensors, so that nothing waits for an accelerator.
        """
        if self.proximal_weight == 0:
            return 0.0
        usual = self.class_means.global_mean.new_full((), self.proximal_weight)
        first = torch.where(seen.all(), 0.0, usual.clamp_max(FIRST_ANCHOR_WEIGHT))
        return torch.where(seen_before.any(), usual, first)

    def _look_at(self, class_means: Tensor, frame: Tensor, last: Tensor, anchor_weight: Tensor | float) -> None:
        """Log how good a solution is, if that is asked for."""
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("nearest frame: distance_to_anchor %.3e", float((frame.detach() - last).norm()))


class NearestETFClassifier(NearestFrameClassifier):
    r"""A classifier whose weight is, at every training step, the simplex ETF nearest to the moving class means.

    In training, with targets, it takes the batch into its `ClassMeans`, solves for the nearest ETF with the last
    one as anchor (the first solve has none, since no data has spoken
    before), and returns logits that carry two gradients: the direct one, and the one through the ETF
    (a differentiable argmin). In evaluation it is a linear classifier and changes nothing. An average of several heads'
    weights is replaced by the ETF nearest to it when it is read.

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
        class_weights: (K,), ω ≥ 0 up to a common factor: how much each class counts in the distance from ETF to means
            (see `nearest_simplex_etf`); equal if not given.
        diagnostics: Whether each training step leaves in ``last_solve`` how good its solution is, at the price of an
            SVD and a copy to the host: ``objective``, ``gradient_norm``, ``distance_to_anchor`` (Frobenius norm of the
            difference to the last ETF) and ``stopping_criterion`` in words; of the closed form also
            ``least_singular_value`` (see `nearest_etf_diagnostics`), of the trust region ``iterations``.
        method: How the closed form finds the nearest ETF, as for `polar_factor`. On accelerators nothing waits for
            the device but the first solve; `svd_fallbacks` counts the solves that needed an SVD.
        generator: If given, the first ETF has a random orientation drawn from it; else the canonical one.

    Shape: features (..., d) and targets (...) to logits (..., K).

    Raises:
        ValueError: if sizes or arguments are out of range; in training mode, without targets, or with labels outside
            [0, K); in evaluation mode, with targets for features that are being trained.

    Source: Markou, Ajanthan, Gould, "Guiding Neural Collapse" (NeurIPS 2024).

    Examples:
        >>> head = NearestETFClassifier(64, 10)
        >>> features, targets = torch.randn(32, 64, requires_grad=True), torch.randint(10, (32,))
        >>> torch.nn.functional.cross_entropy(head(features, targets), targets).backward()
        >>> head.eval()(features).shape
        torch.Size([32, 10])
    """

    frame: Tensor  # the published problem's P, with solver="trust-region"
    last_solve: dict[str, float | str] | None

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
        class_weights: Tensor | None = None,
        diagnostics: bool = False,
        method: Method = "auto",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            in_features,
            num_classes,
            feature_norm=feature_norm,
            bias=bias,
            proximal_weight=proximal_weight,
            momentum=momentum,
            implicit_gradient=implicit_gradient,
            ignore_index=ignore_index,
            class_weights=class_weights,
            method=method,
            generator=generator,
        )
        check_bool("diagnostics", diagnostics)
        self.diagnostics = diagnostics
        self.last_solve = None
        check_choice("solver", solver, ("closed-form", "trust-region"))
        self.solver = solver
        if solver == "trust-region":
            check_at_least("in_features", in_features, num_classes, "num_classes")
            if class_weights is not None:
                raise ValueError(
                    "class_weights must be None with solver='trust-region': the published problem has none"
                )
            self.register_buffer("frame", torch.eye(num_classes, in_features, dtype=full_precision()))

    def _solve(self, class_means: Tensor, seen_before: Tensor, finite: Tensor) -> Tensor:
        if self.solver == "closed-form":
            return super()._solve(class_means, seen_before, finite)
        last = self.weight
        if not bool(finite):
            return last.to(class_means)
        etf = self._solve_as_published(class_means, last, seen_before)
        self._store(etf.detach().to(last.dtype, copy=True))
        return etf

    def _solve_as_published(self, class_means: Tensor, last: Tensor, seen_before: Tensor) -> Tensor:
        previous = _orthonormal(self.frame).to(class_means) if bool(seen_before.any()) else None
        weight = 2 * self.proximal_weight / (self.num_classes - 1)
        solution = published_nearest_frame(class_means, previous, proximal_weight=weight)
        self.frame = solution.point.detach().to(self.frame.dtype, copy=True)
        etf = frame_to_etf(solution.point)
        if self.diagnostics:
            self.last_solve = {
                "objective": float(solution.cost),
                "gradient_norm": float(solution.gradient_norm),
                "iterations": float(solution.iterations),
                "distance_to_anchor": float((etf.detach() - last).norm()),
                "stopping_criterion": solution.reason,
            }
        return etf

    def _restored(self, weight: Tensor) -> Tensor:
        if self.solver == "closed-form":
            return super()._restored(weight)
        self.frame = _orthonormal(self.frame)
        return frame_to_etf(self.frame)

    def _look_at(self, class_means: Tensor, frame: Tensor, last: Tensor, anchor_weight: Tensor | float) -> None:
        logged = logger.isEnabledFor(logging.DEBUG)
        if not (logged or self.diagnostics):
            return
        found = nearest_etf_diagnostics(
            class_means.detach(),
            frame.detach(),
            anchor=last,
            proximal_weight=float(anchor_weight),
            class_weights=self.class_weights,
        )
        logger.debug("nearest ETF: %s", ", ".join(f"{name} {value:.3e}" for name, value in found.items()))
        if self.diagnostics:
            self.last_solve = found | {"stopping_criterion": "closed form"}


def _orthonormal(frame: Tensor) -> Tensor:
    """The frame, or where its rows are not orthonormal, as an average's are not, the nearest one whose rows are."""
    identity = torch.eye(len(frame), dtype=frame.dtype, device=frame.device)
    return frame if bool((frame @ frame.mT - identity).abs().max() < 1e-5) else polar_factor(frame)


def _named(geometry: object) -> str:
    """The geometry's name; a given code's is ``"code"``."""
    if isinstance(geometry, Tensor):
        return "code"
    if not isinstance(geometry, str) or geometry not in ("simplex", "means"):
        raise ValueError(f"geometry must be 'simplex', 'means' or a code (K, r), got {geometry!r}")
    return geometry


def _first_etf(in_features: int, num_classes: int, generator: torch.Generator | None) -> Tensor:
    check_etf_sizes(num_classes, in_features)
    if generator is None:
        return simplex_etf(num_classes, in_features, dtype=full_precision())
    return random_simplex_etf(
        num_classes, in_features, generator=generator, dtype=full_precision(), device=generator.device
    )
