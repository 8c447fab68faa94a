"""Classifiers that follow the class means: the nearest frame, the nearest ETF (method `implicit`), the class means.

A `NearestFrameClassifier` has a frame (`Simplex`, a code, or `LeadingDirections`) and a solver (`ClosedForm` or
`TrustRegion`). Both are stateless: their state is in buffers of the head.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.optim import Optimizer

from neuralcollapse._checks import (
    check_at_least,
    check_bool,
    check_choice,
    check_etf_sizes,
    check_factory,
    check_features,
    check_floating,
    check_generator,
    check_integers,
    check_not_negative,
    compute_dtype,
    listed,
)
from neuralcollapse._distributed import greatest_over_ranks
from neuralcollapse.geometry import nearest_etf_diagnostics, polar_factor, random_simplex_etf, simplex_etf
from neuralcollapse.geometry.codes import (
    Code,
    SimplexCode,
    check_code_rank,
    check_constant_code,
    leading_code,
    principal_code,
)
from neuralcollapse.geometry.frames import check_weight_values, extended_frame, placed, solve_frame
from neuralcollapse.geometry.polar import METHODS, Method
from neuralcollapse.geometry.polar_iteration import ConvergenceCheck
from neuralcollapse.geometry.published import frame_to_etf, published_nearest_frame
from neuralcollapse.heads.growth import check_growth, check_room
from neuralcollapse.heads.head import LearnsFromTargets, readable, skips_nonfinite
from neuralcollapse.heads.moving_means import (
    DEFAULT_MOMENTUM,
    ClassMeans,
    KeepsFullPrecision,
    Momentum,
    check_batch_mean,
    class_sums,
    full_precision,
    sums_over_ranks,
)

logger = logging.getLogger(__name__)

# With the momentum, the best of the values compared on a validation split with K = 10 and K = 100; see docs/heads.md.
DEFAULT_PROXIMAL_WEIGHT = 0.5
# Proximal weight of the first solve if classes are missing in the batch, so that the means do not determine the frame.
FIRST_ANCHOR_WEIGHT = 1e-3
# Relative error up to which the norms of a frame's rows count as exact; fp32 solves are orthonormal to this accuracy.
_ROUNDING = 1e-5


class _Update(NamedTuple):
    """Class means after and before a training batch."""

    class_means: Tensor  # (K, d) moving and centred, with gradient
    batch_mean: Tensor  # (d,), with gradient
    finite: Tensor  # whether the batch is finite, of shape ()
    means_before: Tensor  # (K, d)
    seen_before: Tensor  # (K,) numbers of samples


class FollowsClassMeans(KeepsFullPrecision, LearnsFromTargets):
    """Base class of heads whose weight follows moving class means.

    A subclass registers the class weights (`_set_class_weights`) and its initial ``weight``, and implements `_step`.
    """

    _full_precision_buffers: tuple[str, ...] = ("class_weights",)
    weight: Tensor
    class_weights: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        feature_norm: float | Literal["auto"] | None,
        bias: Literal["centring", "none"],
        momentum: Momentum,
        ignore_index: int | None,
    ) -> None:
        super().__init__(in_features, num_classes, feature_norm, ignore_index)
        check_choice("bias", bias, ("centring", "none"))
        self.centring = bias == "centring"
        self.class_means = ClassMeans(num_classes, in_features, momentum=momentum, ignore_index=ignore_index)

    def _set_class_weights(self, class_weights: Tensor | None) -> None:
        """Register a copy of ω (K,) in at least fp32; raise unless it is constant, at least 0 and not all 0."""
        if class_weights is not None:
            check_floating("class_weights", class_weights)
            if class_weights.shape != (self.num_classes,):
                raise ValueError(
                    f"class_weights must be of shape ({self.num_classes},), got {tuple(class_weights.shape)}"
                )
            if class_weights.requires_grad:
                raise ValueError("class_weights must not require a gradient, since they are constants: detach them")
            check_weight_values(class_weights)
            device = torch.get_default_device()
            class_weights = class_weights.to(device, compute_dtype(class_weights.dtype), copy=True)
        self.register_buffer("class_weights", class_weights)

    def _keep(self, name: str, value: Tensor) -> None:
        """Register a buffer that stays in at least fp32, on the device of the class means."""
        self.register_buffer(name, value.to(self.class_means.global_mean.device, full_precision()))
        self._full_precision_buffers = (*self._full_precision_buffers, name)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """Bias −W·m̄ (K,) with the moving global mean m̄; None without centring."""
        if not self.centring:
            return None
        weight = self.weight
        return -(weight @ self._centre(self.class_means.global_mean.to(weight)))

    def prepare(self, features: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return features, weight and bias as `Head.prepare`; targets (...) are needed in training mode."""
        features = self.features(features)
        targets = self.step_targets(targets, features)
        if targets is None:
            return features, self.weight, self.bias
        skip_nonfinite = skips_nonfinite(features)
        with torch.autocast(features.device.type, enabled=False):  # means and solve stay in at least fp32
            flat = features.reshape(-1, self.in_features).to(compute_dtype(features.dtype))
            moving = self.class_means
            means_before, seen_before, batches = moving.centred_means, moving.centred.seen, moving.batches
            class_means, batch_mean = moving(flat, targets.reshape(-1), skip_nonfinite=skip_nonfinite)
            update = _Update(class_means, batch_mean, moving.batches > batches, means_before, seen_before)
            weight, centre = self._step(update)
            bias = -(weight @ centre) if self.centring else None
        return features, weight, bias

    @torch.no_grad()
    def grow(
        self, num_new: int, *, optimizer: Optimizer | None = None, generator: torch.Generator | None = None
    ) -> None:
        """Add classes as `Head.grow`; moving means and counts of the old classes do not change.

        Args:
            num_new: n ≥ 1.
            optimizer: Not needed, because the head has no parameters.
            generator: Source of randomness for the new rows; by default a generator with seed 0.

        Raises:
            ValueError: as for `Head.grow`; also with class weights, which are not defined for the new classes.
        """
        check_growth(num_new, optimizer, generator)
        self._grow(num_new, self._grown_weight(num_new, generator))

    def _grow(self, num_new: int, weight: Tensor) -> None:
        self._store_weight(weight)
        self.class_means.grow(num_new)
        self._set_num_classes(self.num_classes + num_new)

    def _grown_weight(self, num_new: int, generator: torch.Generator | None) -> Tensor:
        """Return the weight (K + n, d) without changing the head; raise if the head cannot grow."""
        raise NotImplementedError

    def _check_no_class_weights(self) -> None:
        if self.class_weights is not None:
            raise ValueError(
                "class_weights must be None in a head that grows, because new classes have no weight: construct a head "
                "with all classes"
            )

    @torch.no_grad()
    def admit(self, features: Tensor, targets: Tensor) -> None:
        """Add classes from a few of their samples, without training: their means become moving means.

        A class k that has no samples yet gets the centred mean M_k − m̄, with the mean M_k of its features (scaled to
        the feature norm) and the moving global mean m̄. If the head has not seen any sample, m̄ is the mean of the given
        features. The other means do not change. Then the weight is updated: the rows of a `ClassMeanClassifier` become
        the new unit means, so that it decides for the nearest class mean on the sphere; a frame becomes the one nearest
        to all means, with the previous frame as anchor. If targets are K or greater, the head grows by these classes.

        In training and in evaluation mode, sums and counts are added over the ranks of the default process group, so
        every rank must call this method. The result is the same on all ranks, and that of one process with all samples.

        Args:
            features: (N, d) floating, before scaling to the feature norm. With several ranks, each rank gives its own
                part of the samples, which may be empty (0, d).
            targets: (N,) integers, of classes that have no samples yet; every class from K to the greatest target must
                have a sample on some rank. Samples with target ``ignore_index`` are left out.

        Raises:
            ValueError: if shapes or types are wrong, there are no samples, values are not finite, targets are negative,
                a class has been seen before, a class to be added has no sample, or the head cannot grow. The head is
                then left unchanged. Except for shapes and types, the error is raised on every rank.

        Examples:
            >>> from neuralcollapse import ClassMeanClassifier
            >>> head = ClassMeanClassifier(2, 2)
            >>> points = torch.tensor([[1.0, 0.1], [-1.0, 0.0], [0.0, 1.0]])
            >>> head.admit(points[:2], torch.tensor([0, 1]))
            >>> head.admit(points[2:], torch.tensor([2]))
            >>> head.eval()(points).argmax(1)
            tensor([0, 1, 2])
        """
        sums, counts = self._sums_of_new_classes(features, targets)
        self._check_admits()
        if len(counts) > self.num_classes:
            self.grow(len(counts) - self.num_classes)
        moving = self.class_means
        if not bool(moving.overall.seen.any()):
            total = counts.sum().reshape(1)
            moving.overall(sums.sum(0, keepdim=True) / total, total)
        means = sums / counts.clamp_min(1).unsqueeze(-1) - moving.global_mean.to(sums)
        given = counts > 0
        moving.centred.mean = torch.where(given.unsqueeze(-1), means.to(moving.centred.mean), moving.centred.mean)
        moving.centred.seen = moving.centred.seen + counts
        self._store_weight(self._weight_of_means().to(self._stored_weight()))

    def _sums_of_new_classes(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return sums (K + n, d) and counts (K + n,) of the samples of all ranks; raise as `admit`.

        Only errors of shape or type are raised before ranks communicate, so that invalid values raise on every rank.
        """
        features = self.features(features).detach()
        check_features(features, self.in_features)
        check_integers("targets", targets, len(features))
        features, targets = features.to(compute_dtype(features.dtype)), targets.long()
        if self.ignore_index is not None:
            kept = targets != self.ignore_index
            features, targets = features[kept], targets[kept]
        num_classes = max(self.num_classes, _greatest_target(targets) + 1)
        sums, counts = sums_over_ranks(*class_sums(features, targets, num_classes, None))
        check_batch_mean("features", features, torch.isfinite(sums).all().cpu())
        counts = counts.long()
        if missing := [k for k in range(self.num_classes, num_classes) if not counts[k]]:
            raise ValueError(f"targets must have a sample of every class that is added, got none of {listed(missing)}")
        again = (counts[: self.num_classes] > 0) & (self.class_means.centred.seen > 0)
        if bool(again.any()):
            raise ValueError(
                f"targets must be classes that have no samples yet, got classes seen before: "
                f"{listed(again.nonzero().flatten().tolist())}"
            )
        return sums, counts

    def _check_admits(self) -> None:
        """Raise if the weight can be updated in training steps only."""

    def _weight_of_means(self) -> Tensor:
        """Return the weight for the present moving means of all classes."""
        raise NotImplementedError

    def _step(self, update: _Update) -> tuple[Tensor, Tensor]:
        """Update the stored weight; return the weight and the centre (d,) that are used for the batch."""
        raise NotImplementedError

    def _centre(self, global_mean: Tensor) -> Tensor:
        """Return the centre of the features in evaluation mode."""
        return global_mean

    def _store_if_finite(self, weight: Tensor, last: Tensor, finite: Tensor) -> None:
        """Store the new weight if the batch was finite.

        The stored tensor is a copy, because a graph may hold ``weight``, and restoring or broadcasting buffers writes
        into them.
        """
        self._store_weight(torch.where(finite, weight.detach().to(last.dtype), last))


class Frame:
    """Base class of the frames that the weight of a `NearestFrameClassifier` can be."""

    def first_weight(self, head: NearestFrameClassifier, generator: torch.Generator | None) -> Tensor:
        """Return the weight (K, d) before the first batch."""
        raise NotImplementedError

    def code(self, head: NearestFrameClassifier, class_means: Tensor) -> Code:
        """Return the code, in the dtype of the class means; the weight is its rotation nearest to these means."""
        raise NotImplementedError

    def is_broken(self, head: NearestFrameClassifier, weight: Tensor) -> bool:
        """Return whether the norms of its rows show that a weight is not a frame, for example an average of frames."""
        raise NotImplementedError

    def restored(self, head: NearestFrameClassifier, weight: Tensor) -> Tensor:
        """Return the frame nearest to a weight that is not a frame."""
        code = self.code(head, head.class_means.centred_means).to(weight)
        return solve_frame(weight, code, class_weights=head.class_weights)

    def diagnostics(
        self, head: NearestFrameClassifier, class_means: Tensor, weight: Tensor, last: Tensor, anchor_weight: float
    ) -> dict[str, float]:
        """Return measures of the quality of a weight as the solution for the class means."""
        return {"distance_to_anchor": float((weight - last).norm())}


@dataclass(frozen=True)
class Simplex(Frame):
    """Simplex ETF, for d ≥ K−1.

    Raises:
        ValueError: if d < K−1; raised when the head is constructed.

    Examples:
        >>> NearestFrameClassifier(16, 4, frame=Simplex()).weight.shape
        torch.Size([4, 16])
    """

    def first_weight(self, head: NearestFrameClassifier, generator: torch.Generator | None) -> Tensor:
        sizes, dtype = (head.num_classes, head.in_features), full_precision()
        check_etf_sizes(*sizes)
        if generator is None:
            return simplex_etf(*sizes, dtype=dtype)
        return random_simplex_etf(*sizes, generator=generator, dtype=dtype, device=generator.device)

    def code(self, head: NearestFrameClassifier, class_means: Tensor) -> Code:
        return SimplexCode(head.num_classes, head.proximal_weight)

    def is_broken(self, head: NearestFrameClassifier, weight: Tensor) -> bool:
        return _rows_are_off(weight, 1.0)

    def restored(self, head: NearestFrameClassifier, weight: Tensor) -> Tensor:
        return solve_frame(weight, SimplexCode(head.num_classes))

    def diagnostics(
        self, head: NearestFrameClassifier, class_means: Tensor, weight: Tensor, last: Tensor, anchor_weight: float
    ) -> dict[str, float]:
        options: dict[str, Any] = {"proximal_weight": anchor_weight, "class_weights": head.class_weights}
        return nearest_etf_diagnostics(class_means, weight, anchor=last, **options)


@dataclass(frozen=True)
class LeadingDirections(Frame):
    """Tight frame of the leading directions of the moving means (`code_of_means`), treated as constant in each step.

    Args:
        rank: r, from 1 to min(d, K−1); or ``"auto"``, the effective rank at each step, which causes a device sync on
            accelerators and cannot be compiled into one graph.

    Raises:
        ValueError: if the rank is out of range; raised when the head is constructed.
    """

    rank: int | Literal["auto"] = "auto"

    def first_weight(self, head: NearestFrameClassifier, generator: torch.Generator | None) -> Tensor:
        check_code_rank(self.rank, head.num_classes, head.in_features)
        if head.in_features < head.num_classes - 1:
            return _random_unit_rows(head.in_features, head.num_classes, generator)
        return Simplex().first_weight(head, generator)

    def code(self, head: NearestFrameClassifier, class_means: Tensor) -> Code:
        return Code(leading_code(class_means, self.rank))

    def is_broken(self, head: NearestFrameClassifier, weight: Tensor) -> bool:
        # Only the Frobenius norm of a tight frame is known. Before the first batch, the means have no directions.
        whole = (weight - weight.mean(0)).reshape(1, -1)
        return _rows_are_off(whole, math.sqrt(head.num_classes)) and bool(head.class_means.centred.seen.any())


class _GivenCode(Frame):
    """Frame of a given code, which the head stores in principal coordinates."""

    def __init__(self, code: Tensor) -> None:
        self._given: Tensor | None = code

    def first_weight(self, head: NearestFrameClassifier, generator: torch.Generator | None) -> Tensor:
        assert self._given is not None
        check_constant_code(self._given, head.num_classes)
        code = principal_code(self._given, head.in_features)
        self._given = None  # the code is now a buffer of the head
        head._keep("code", code)
        return placed(code, head.in_features, generator)

    def code(self, head: NearestFrameClassifier, class_means: Tensor) -> Code:
        return Code(head.code.to(class_means, copy=True))  # a copy, because the graph holds a reference to it

    def is_broken(self, head: NearestFrameClassifier, weight: Tensor) -> bool:
        # Class weights shift all rows of a frame by the same vector.
        return _rows_are_off(weight - weight.mean(0), torch.linalg.vector_norm(head.code.to(weight), dim=1))


@dataclass(frozen=True)
class ClosedForm:
    """Solver that computes the nearest frame in closed form, by a polar factor.

    Args:
        method: Method that computes the polar factor, as for `polar_factor`. On an accelerator, only the first solve
            waits for the device; ``svd_fallbacks`` of the head counts the solves that needed an SVD.

    Raises:
        ValueError: if the method is unknown.
    """

    method: Method = "auto"

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)

    def set_up(self, head: NearestFrameClassifier) -> None:
        """Check that the head's options fit, and register the buffers of the solver."""

    def solve(self, head: NearestFrameClassifier, class_means: Tensor, update: _Update) -> Tensor:
        """Return the frame nearest to the class means, and store it in the head."""
        last = head._stored_weight()
        anchor_weight = head._anchor_weight(update.seen_before)
        # Input checks are omitted, because ClassMeans has already checked the batch.
        frame = solve_frame(
            class_means,
            head.frame.code(head, class_means),
            None if head.proximal_weight == 0 else (last, anchor_weight),
            class_weights=head.class_weights,
            method=self.method,
            check=head._convergence,
        )
        if head._reports():
            values = head.frame.diagnostics(head, class_means.detach(), frame.detach(), last, float(anchor_weight))
            head._report(values, "closed form")
        head._store_if_finite(frame, last, update.finite)
        return frame

    def restored(self, head: NearestFrameClassifier, weight: Tensor) -> Tensor:
        """Return the frame nearest to an average of frames."""
        return head.frame.restored(head, weight)


@dataclass(frozen=True)
class TrustRegion:
    """Solver of the published simplex ETF problem by the published method, for comparison; causes device syncs.

    It calls `published_nearest_frame` with δ = 2γ/(K−1), for d ≥ K and without class weights. The head stores the last
    solution P in ``published_point``.

    Raises:
        ValueError: if d < K, class weights are given, or the frame is not `Simplex`; raised when the head is
            constructed.

    Examples:
        >>> head = NearestETFClassifier(16, 4, solver=TrustRegion())
        >>> head(torch.randn(8, 16), torch.arange(8) % 4).shape
        torch.Size([8, 4])
    """

    def set_up(self, head: NearestFrameClassifier) -> None:
        """Check that the head's options fit, and register the buffer of the last solution."""
        if not isinstance(head.frame, Simplex):
            raise ValueError(f"solver must be ClosedForm() with frame={head.frame!r}: TrustRegion() is for Simplex()")
        check_at_least("in_features", head.in_features, head.num_classes, "num_classes")
        if head.class_weights is not None:
            raise ValueError("class_weights must be None with solver=TrustRegion(), whose problem has no class weights")
        head._keep("published_point", torch.eye(head.num_classes, head.in_features))

    def solve(self, head: NearestFrameClassifier, class_means: Tensor, update: _Update) -> Tensor:
        """Return the ETF given by the published solution, and store both in the head."""
        last = head.weight
        if not bool(update.finite):
            return last.to(class_means)
        previous = None
        if bool(update.seen_before.any()):
            previous = _orthonormal(head.published_point).to(class_means)
        weight = 2 * head.proximal_weight / (head.num_classes - 1)
        solution = published_nearest_frame(class_means, previous, proximal_weight=weight)
        head.published_point = solution.point.detach().to(head.published_point.dtype, copy=True)
        etf = frame_to_etf(solution.point)
        if head._reports():
            values = {
                "objective": float(solution.cost),
                "gradient_norm": float(solution.gradient_norm),
                "iterations": float(solution.iterations),
                "distance_to_anchor": float((etf.detach() - last).norm()),
            }
            head._report(values, solution.reason)
        head._store_if_finite(etf, last, update.finite)
        return etf

    def restored(self, head: NearestFrameClassifier, weight: Tensor) -> Tensor:
        """Return the ETF of the orthonormal matrix nearest to an average of solutions."""
        head.published_point = _orthonormal(head.published_point)
        return frame_to_etf(head.published_point)


class NearestFrameClassifier(FollowsClassMeans):
    r"""Classifier whose weight is, at every training step, the frame nearest to the moving class means.

    In a training step with targets, the head updates its `ClassMeans` with the batch, solves for the nearest frame with
    the previous frame as anchor (the first solve has none), and returns logits with two gradients: the direct gradient
    and the gradient through the frame (a differentiable argmin). In evaluation mode, it is a linear classifier and
    changes nothing. If the weight is replaced by an average over several heads, the frame nearest to the average is
    restored when the weight is read.

    Training-mode logits depend on the labels of their batch: compare accuracies in evaluation mode only.

    Args:
        in_features: d, at least the rank of the frame.
        num_classes: K ≥ 2.
        frame: ``Simplex()``: the simplex ETF, d ≥ K−1; a code (K, r') or `Code`: the weight is the rotation of the code
            nearest to the class means, at the scale of the code (see `nearest_frame` and `code_from_gram`); or
            ``LeadingDirections(rank)``: the code of the leading directions of the moving means, for any d.
        solver: ``ClosedForm(method)``; or, with ``Simplex()`` only, ``TrustRegion()``, which solves the published
            problem by the published method, for comparison.
        feature_norm: τ, as for `Head`.
        bias: ``"centring"``: −W·m, where m is the global mean of the batch in training (with gradient) and a moving
            mean in evaluation; ``"none"``.
        proximal_weight: γ ≥ 0, weight of the proximal term towards the previous frame (see `nearest_frame`). For the
            ETF, the published δ corresponds to γ = δ(K−1)/2. With many classes and a small γ, the frame follows the
            labels of each batch, which reduces the accuracy (docs/heads.md).
        momentum: Weight α of a new batch in the class means, as for `ClassMeans`. The gradient through the frame scales
            with α: with ``"published"``, for which α decreases to 1e-4, it is practically zero.
        implicit_gradient: Whether to keep the gradient through the frame.
        ignore_index: Samples with this target are left out of the means.
        class_weights: (K,), ω ≥ 0 up to a common factor: weights of the classes in the distance between frame and means
            (see `nearest_frame`); equal by default.
        diagnostics: Whether each training step stores measures of the quality of its solution in ``last_solve``, which
            takes an SVD and a copy to the host: ``distance_to_anchor`` (Frobenius norm of the difference to the
            previous frame) and ``stopping_criterion`` in words; for the simplex ETF also ``objective``,
            ``gradient_norm`` and, in closed form, ``least_singular_value`` (see `nearest_etf_diagnostics`) or, with the
            trust region, ``iterations``.
        generator: If given, the first frame has a random orientation drawn from this generator, otherwise the canonical
            one. With ``LeadingDirections`` and d < K−1, the first weight has random unit rows, by default from a
            generator with seed 0.

    Shape: features (..., d) and targets (...) to logits (..., K).

    Raises:
        ValueError: if sizes or arguments are out of range, the code is invalid for `nearest_frame`, or frame and solver
            do not fit; in training mode, if targets are missing or outside [0, K); in evaluation mode, if targets are
            given for features that are being trained.

    Source: this project, based on Markou, Ajanthan, Gould, "Guiding Neural Collapse" (NeurIPS 2024).

    Examples:
        >>> from neuralcollapse.geometry import attribute_gram, code_from_gram
        >>> digits = torch.cartesian_prod(torch.arange(10), torch.arange(10))  # 100 classes of two digits
        >>> code = code_from_gram(attribute_gram(digits, torch.tensor([0.5, 0.5])), feature_dim=64)
        >>> head = NearestFrameClassifier(64, 100, frame=code)
        >>> features, targets = torch.randn(32, 64, requires_grad=True), torch.randint(100, (32,))
        >>> torch.nn.functional.cross_entropy(head(features, targets), targets).backward()
        >>> head.eval()(features).shape
        torch.Size([32, 100])
    """

    _kind_of_frame: type[Frame] = Frame  # frames that the class accepts
    code: Tensor  # principal coordinates of the code, if a code was given
    published_point: Tensor  # last solution of TrustRegion
    last_solve: dict[str, float | str] | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        frame: Frame | Code | Tensor = Simplex(),
        solver: ClosedForm | TrustRegion = ClosedForm(),
        feature_norm: float | Literal["auto"] | None = "auto",
        bias: Literal["centring", "none"] = "centring",
        proximal_weight: float = DEFAULT_PROXIMAL_WEIGHT,
        momentum: Momentum = DEFAULT_MOMENTUM,
        implicit_gradient: bool = True,
        ignore_index: int | None = None,
        class_weights: Tensor | None = None,
        diagnostics: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, feature_norm, bias, momentum, ignore_index)
        self._set_class_weights(class_weights)
        check_not_negative("proximal_weight", proximal_weight)
        check_bool("implicit_gradient", implicit_gradient)
        check_bool("diagnostics", diagnostics)
        check_generator(generator)
        self.proximal_weight = proximal_weight
        self.implicit_gradient = implicit_gradient
        self.diagnostics = diagnostics
        self.last_solve = None
        self._convergence = ConvergenceCheck()
        if isinstance(frame, Code) and not isinstance(frame, SimplexCode):
            frame = frame.vectors
        if isinstance(frame, Tensor):
            frame = _GivenCode(frame)
        if not isinstance(frame, Frame):
            raise ValueError(f"frame must be Simplex(), LeadingDirections() or a code (K, r), got {frame!r}")
        if not isinstance(frame, self._kind_of_frame):
            raise ValueError(
                f"frame must be {self._kind_of_frame.__name__}() for {type(self).__name__}, got {frame!r}: "
                "use NearestFrameClassifier for other frames"
            )
        if not isinstance(solver, ClosedForm | TrustRegion):
            raise ValueError(f"solver must be ClosedForm() or TrustRegion(), got {solver!r}")
        self.frame, self.solver = frame, solver
        self._keep("weight", frame.first_weight(self, generator))
        solver.set_up(self)

    @torch.no_grad()
    def grow(
        self,
        num_new: int,
        *,
        optimizer: Optimizer | None = None,
        generator: torch.Generator | None = None,
        code: Tensor | None = None,
    ) -> None:
        """Add classes as `Head.grow`: the weight becomes the frame of K + n classes nearest to the old rows.

        This frame is the anchor of the next step. Moving means and counts of the old classes do not change, and the new
        classes have no samples. Directions that the old rows do not determine are random.

        Args:
            num_new: n ≥ 1.
            optimizer: Not needed, because the head has no parameters.
            generator: Generator of the undetermined directions; by default a generator with seed 0.
            code: (K + n, r') floating, a code of old and new classes. A head with a given code requires it. A head with
                ``frame=Simplex()`` changes to the frame of the code if one is given, for example that of `softmax_code`
                if K + n > d + 1.

        Raises:
            ValueError: as for `Head.grow`; also with class weights or `TrustRegion`, or with `LeadingDirections`, whose
                frame is not defined before the new classes have samples; if a code is needed and missing, or invalid
                for `nearest_frame`.
        """
        check_growth(num_new, optimizer, generator)
        self._check_no_class_weights()
        if code is None:
            self._grow(num_new, self._grown_weight(num_new, generator))
            return
        if isinstance(self.frame, LeadingDirections) or not issubclass(_GivenCode, self._kind_of_frame):
            raise ValueError(f"code must be None for {type(self).__name__} with frame={self.frame!r}")
        check_constant_code(code, self.num_classes + num_new)
        principal = principal_code(code, self.in_features).to(self._stored_weight())
        weight = extended_frame(self.weight, principal, generator)
        if isinstance(self.frame, _GivenCode):
            self.code = principal
        else:
            self.frame = _GivenCode(code)
            self._keep("code", principal)
        self._grow(num_new, weight)

    def _grown_weight(self, num_new: int, generator: torch.Generator | None) -> Tensor:
        num_classes = self.num_classes + num_new
        if not isinstance(self.frame, Simplex):
            if isinstance(self.frame, _GivenCode):
                raise ValueError(
                    f"code must be a code of all {num_classes} classes, got None: the present code does not contain "
                    "new classes"
                )
            raise ValueError(
                "a head with LeadingDirections() cannot grow, because its frame needs class means, which new classes "
                "do not have: construct a head with all classes"
            )
        if isinstance(self.solver, TrustRegion):
            raise ValueError(
                "solver must be ClosedForm() in a head that grows: the problem of TrustRegion() has a fixed K"
            )
        otherwise = (
            "NearestFrameClassifier.grow accepts a code, such as softmax_code's"
            if isinstance(self, NearestETFClassifier)
            else f"give code=softmax_code({num_classes}, {self.in_features})"
        )
        check_room(num_classes, self.in_features, otherwise)
        return extended_frame(self.weight, SimplexCode(num_classes), generator)

    def _check_admits(self) -> None:
        if isinstance(self.solver, TrustRegion):
            raise ValueError("solver must be ClosedForm() to admit classes: TrustRegion() works in training steps only")

    def _weight_of_means(self) -> Tensor:
        means, weight = self.class_means.centred_means, self._stored_weight()
        proximal = (weight, max(self.proximal_weight, FIRST_ANCHOR_WEIGHT))
        return solve_frame(
            means, self.frame.code(self, means), proximal, class_weights=self.class_weights, method="spectral"
        )

    @property
    def svd_fallbacks(self) -> int:
        """Number of solves by matrix products that were repeated by an SVD; see `polar_factor`."""
        return self._convergence.fallbacks

    def _step(self, update: _Update) -> tuple[Tensor, Tensor]:
        class_means = update.class_means if self.implicit_gradient else update.class_means.detach()
        return self.solver.solve(self, class_means, update), update.batch_mean

    def _anchor_weight(self, seen_before: Tensor) -> Tensor | float:
        """Return γ; in the first solve 0 or, if classes are missing, a small weight that makes the solution unique.

        The result is a tensor, which avoids a device sync.
        """
        if self.proximal_weight == 0:
            return 0.0
        seen = self.class_means.centred.seen
        usual = self.class_means.global_mean.new_full((), self.proximal_weight)
        first = torch.where(seen.all(), 0.0, usual.clamp_max(FIRST_ANCHOR_WEIGHT))
        return torch.where(seen_before.any(), usual, first)

    def _valid_weight(self, weight: Tensor) -> Tensor:
        if not self.frame.is_broken(self, weight):
            return weight
        return self._store_weight(_in_full_precision(lambda weight: self.solver.restored(self, weight), weight))

    def _reports(self) -> bool:
        """Return whether diagnostics are stored or logged."""
        return not torch.compiler.is_compiling() and (self.diagnostics or logger.isEnabledFor(logging.DEBUG))

    def _report(self, values: dict[str, float], stopping_criterion: str) -> None:
        """Log measures of the quality of a solution, and store them if diagnostics are enabled."""
        logger.debug("nearest frame: %s", ", ".join(f"{name} {value:.3e}" for name, value in values.items()))
        if self.diagnostics:
            self.last_solve = values | {"stopping_criterion": stopping_criterion}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if isinstance(self.solver, TrustRegion) and f"{prefix}frame" in state_dict:  # name used by earlier versions
            state_dict[f"{prefix}published_point"] = state_dict.pop(f"{prefix}frame")
        super()._load_from_state_dict(state_dict, prefix, *args)


class NearestETFClassifier(NearestFrameClassifier):
    r"""Classifier whose weight is, at every training step, the simplex ETF nearest to the moving class means.

    This is `NearestFrameClassifier` with ``frame=Simplex()``, for d ≥ K−1, with the same options.

    Shape: features (..., d) and targets (...) to logits (..., K).

    Raises:
        ValueError: as for `NearestFrameClassifier`; also if another frame is given.

    Source: Markou, Ajanthan, Gould, "Guiding Neural Collapse" (NeurIPS 2024).

    Examples:
        >>> head = NearestETFClassifier(64, 10)
        >>> features, targets = torch.randn(32, 64, requires_grad=True), torch.randint(10, (32,))
        >>> torch.nn.functional.cross_entropy(head(features, targets), targets).backward()
        >>> head.eval()(features).shape
        torch.Size([32, 10])
    """

    _kind_of_frame = Simplex


class ClassMeanClassifier(FollowsClassMeans):
    r"""Classifier whose weight consists of the moving class means, centred and of unit norm, for any K and any d.

    In a training step with targets, the head updates its `ClassMeans` with the batch. In evaluation mode, it is a
    linear classifier and changes nothing. Classes that have not been seen have random unit rows. If the weight is
    replaced by an average over several heads, its rows are scaled to unit norm when it is read.

    Args:
        in_features: d.
        num_classes: K ≥ 2.
        means: Class means used for the logits of a training batch. ``"previous"``: the means before the batch, so that
            the logits do not depend on its labels; ``"current"``: the means updated with the batch;
            ``"differentiable"``: the updated means with their gradient.
        feature_norm: τ, as for `Head`.
        bias: ``"centring"``, for cross-entropy: −W·m, where m is the global mean of the batch in training (with
            gradient if the means have one) and a moving mean in evaluation; ``"none"``, for the losses on the sphere
            (`neuralcollapse.losses`).
        momentum: Weight α of a new batch in the class means, as for `ClassMeans`.
        ignore_index: Samples with this target are left out of the means.
        class_weights: (K,), ω ≥ 0 up to a common factor. If given, the means are centred at their ω-weighted mean over
            the classes seen so far instead of the mean of the samples; with ``bias="centring"``, the features are too.
        generator: Generator of the rows of classes that have not been seen; by default a generator with seed 0.

    Shape: features (..., d) and targets (...) to logits (..., K).

    Raises:
        ValueError: if sizes or arguments are out of range; in training mode, if targets are missing or outside [0, K);
            in evaluation mode, if targets are given for features that are being trained.

    Examples:
        >>> head = ClassMeanClassifier(64, 1000)
        >>> features, targets = torch.randn(32, 64, requires_grad=True), torch.randint(1000, (32,))
        >>> torch.nn.functional.cross_entropy(head(features, targets), targets).backward()
        >>> head.eval()(features).shape
        torch.Size([32, 1000])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        means: Literal["previous", "current", "differentiable"] = "previous",
        feature_norm: float | Literal["auto"] | None = "auto",
        bias: Literal["centring", "none"] = "centring",
        momentum: Momentum = DEFAULT_MOMENTUM,
        ignore_index: int | None = None,
        class_weights: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, feature_norm, bias, momentum, ignore_index)
        self._set_class_weights(class_weights)
        check_choice("means", means, ("previous", "current", "differentiable"))
        check_factory(None, None, generator)
        self.means = means
        self._keep("weight", _random_unit_rows(in_features, num_classes, generator))

    def _grown_weight(self, num_new: int, generator: torch.Generator | None) -> Tensor:
        self._check_no_class_weights()
        weight = self.weight
        return torch.cat([weight, _random_unit_rows(self.in_features, num_new, generator).to(weight)])

    def _weight_of_means(self) -> Tensor:
        means, seen = self.class_means.centred_means, self.class_means.centred.seen
        offset = self._offset(means, seen)
        return self._unit_rows(means if offset is None else means - offset, self._stored_weight())

    def _step(self, update: _Update) -> tuple[Tensor, Tensor]:
        class_means, batch_mean = update.class_means, update.batch_mean
        if self.means != "differentiable":
            class_means, batch_mean = class_means.detach(), batch_mean.detach()
        last, seen = self._stored_weight(), self.class_means.centred.seen
        offset = self._offset(class_means, seen)
        weight = self._unit_rows(class_means if offset is None else class_means - offset, last)
        self._store_if_finite(weight, last, update.finite)
        if self.means == "previous":
            weight, offset = last.to(batch_mean), self._offset(update.means_before, update.seen_before)
        return weight, batch_mean if offset is None else batch_mean + offset.to(batch_mean)

    def _centre(self, global_mean: Tensor) -> Tensor:
        offset = self._offset(self.class_means.centred_means, self.class_means.centred.seen)
        return global_mean if offset is None else global_mean + offset.to(global_mean)

    def _offset(self, class_means: Tensor, seen: Tensor) -> Tensor | None:
        """Return the ω-weighted mean (d,) of the centred means of the classes seen; None without class weights."""
        if self.class_weights is None:
            return None
        weights = self.class_weights.to(class_means) * (seen > 0)
        return weights @ class_means / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)

    def _unit_rows(self, class_means: Tensor, last: Tensor) -> Tensor:
        """Return the means scaled to unit norm; a class that has not been seen or has mean zero keeps its old row."""
        norms = torch.linalg.vector_norm(class_means, dim=1, keepdim=True)
        defined = (norms > 0) & (self.class_means.centred.seen > 0).unsqueeze(-1)
        return torch.where(defined, class_means / norms.where(defined, 1), last.to(class_means))

    def _valid_weight(self, weight: Tensor) -> Tensor:
        return self._store_weight(_in_full_precision(normalize, weight)) if _rows_are_off(weight, 1.0) else weight


def _greatest_target(targets: Tensor) -> int:
    """Return the greatest target of all ranks; raise on every rank unless all are at least 0 and there is one."""
    without_samples = torch.iinfo(torch.int64).min
    bounds = targets.new_full((2,), without_samples)
    if len(targets):
        bounds = torch.stack([-targets.min(), targets.max()])
    negative_least, greatest = greatest_over_ranks(bounds).tolist()
    if negative_least > 0 or greatest < 0:
        raise ValueError("targets must be at least 0, and there must be at least one sample")
    return greatest


def _random_unit_rows(in_features: int, num_classes: int, generator: torch.Generator | None) -> Tensor:
    """Return random unit rows (K, d), which are always the same if no generator is given."""
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    rows = torch.randn(num_classes, in_features, generator=generator, dtype=torch.float32, device=generator.device)
    return normalize(rows, dim=1)


def _rows_are_off(weight: Tensor, norms: Tensor | float) -> bool:
    """Return whether the norms of rows differ from the expected ones by more than the error of a solve, if readable.

    The mean of several vectors of equal norm has a smaller norm unless the vectors are all equal, which distinguishes
    an average of frames from a frame.
    """
    if not readable(weight):
        return False
    actual = torch.linalg.vector_norm(weight.detach(), dim=1)
    off = (actual / norms - 1).abs()
    return bool(((off > _ROUNDING) & torch.isfinite(actual)).any())


def _in_full_precision(restore: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """Return the restored weight, which can be used for training regardless of the mode in which it is read."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        return restore(weight.detach()).to(weight.dtype)


def _orthonormal(point: Tensor) -> Tensor:
    """Return the matrix or, if its rows are not orthonormal (as in an average), the nearest matrix whose rows are."""
    identity = torch.eye(len(point), dtype=point.dtype, device=point.device)
    return point if bool((point @ point.mT - identity).abs().max() < 1e-5) else polar_factor(point)
