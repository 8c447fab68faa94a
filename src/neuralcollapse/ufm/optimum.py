"""Global optimum of the unconstrained features model, in closed form.

For any d, (λ_W‖W‖² + λ_H‖H‖²)/2 ≥ μ ‖Z‖_* with Z = W Hᵀ (K, N) and μ = √(λ_W λ_H), so the objective is bounded below by
a convex function of Z and b. This function is invariant under permutations of the classes and of the samples of a
class, so the average of a minimiser over both is also a minimiser: Z = a (I − 11ᵀ/K) ⊗ 1ᵀ_n, where only the number a
has to be determined. This Z has rank K−1, so factors W and H that attain the bound exist for every d ≥ K−1. The
solution depends on the decay only through the strength s = K √(n λ_W λ_H), and the optimum is the origin for s ≥ 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from neuralcollapse._checks import check_at_least, check_etf_sizes
from neuralcollapse.geometry import simplex_etf
from neuralcollapse.ufm.model import check_decay

Frame = Literal["simplex", "orthogonal", "origin"]


@dataclass(frozen=True)
class GlobalOptimum:
    """Global optimum of a balanced unconstrained features model, up to a rotation of the features.

    Attributes:
        loss: f at the optimum, decay included.
        weight_norm_squared: ‖W‖².
        feature_norm_squared: ‖H‖² = (λ_W/λ_H) ‖W‖².
        margin: z_y − z_k for k ≠ y, which is the same for every sample.
        frame: Rows of W up to scale: a ``"simplex"`` ETF, an ``"orthogonal"`` frame, or zero (``"origin"``).
        bias_value: Value of each b_k (0 for cross-entropy, for which any common value is optimal).
        num_classes: K.
        samples_per_class: n.
        feature_dim: d.
    """

    loss: float
    weight_norm_squared: float
    feature_norm_squared: float
    margin: float
    frame: Frame
    bias_value: float
    num_classes: int
    samples_per_class: int
    feature_dim: int

    @property
    def weight(self) -> Tensor:
        """Weight W (K, d) in fp64: the canonical frame, scaled."""
        return math.sqrt(self.weight_norm_squared / self.num_classes) * self._unit_frame()

    @property
    def features(self) -> Tensor:
        """Features H (Kn, d) in fp64, in the order of the classes; those of a class are equal, along its weight."""
        scale = math.sqrt(self.feature_norm_squared / (self.num_classes * self.samples_per_class))
        return (scale * self._unit_frame()).repeat_interleave(self.samples_per_class, 0)

    @property
    def bias(self) -> Tensor:
        """Bias b (K,) in fp64."""
        return torch.full((self.num_classes,), self.bias_value, dtype=torch.float64)

    def _unit_frame(self) -> Tensor:
        if self.frame == "orthogonal":
            return torch.eye(self.num_classes, self.feature_dim, dtype=torch.float64)
        return simplex_etf(self.num_classes, self.feature_dim, dtype=torch.float64)


def decay_strength(num_classes: int, samples_per_class: int, weight_decay: float, feature_decay: float) -> float:
    """Strength s = K √(n λ_W λ_H) of the decay: the optimum is the origin if and only if s + ε ≥ 1.

    The label smoothing ε is 0 for MSE.

    Args:
        num_classes: K.
        samples_per_class: n.
        weight_decay: λ_W.
        feature_decay: λ_H.

    Examples:
        >>> round(decay_strength(10, 4, 0.01, 0.01), 12)
        0.2
    """
    return num_classes * math.sqrt(samples_per_class * weight_decay * feature_decay)


def check_nontrivial_optimum(
    num_classes: int, samples_per_class: int, weight_decay: float, feature_decay: float
) -> None:
    """Raise if λ_W λ_H ≥ 1/(K²n): the origin is then the only critical point of the cross-entropy model."""
    if decay_strength(num_classes, samples_per_class, weight_decay, feature_decay) >= 1:
        raise ValueError(
            "weight_decay * feature_decay must be less than 1/(K²n) = "
            f"{1 / (num_classes**2 * samples_per_class):.3g}, got {weight_decay * feature_decay:.3g}: "
            "the origin is the only critical point"
        )


def global_optimum(
    num_classes: int,
    samples_per_class: int,
    weight_decay: float,
    feature_decay: float,
    *,
    feature_dim: int | None = None,
    loss: Literal["cross-entropy", "mse"] = "cross-entropy",
    label_smoothing: float = 0.0,
    bias: bool = True,
) -> GlobalOptimum:
    r"""Return the global optimum of the balanced model, for any K ≥ 2, n ≥ 1, d ≥ K−1 and positive decay.

    With s = K √(n λ_W λ_H) and label smoothing ε, z_y − z_k = a for every sample and k ≠ y, and
    ‖W‖² = √(n λ_H/λ_W) r a, where r is the rank:

    - cross-entropy: a simplex ETF, r = K−1, t = (s + ε)(K−1)/K, a = log((K−1)(1−t)/t) for s + ε < 1, else 0, and
      f = log(1 + (K−1) e^(−a)) + (s + ε) a (K−1)/K. A bias, decayed or not, does not change the optimum.
    - MSE (½ ‖z − e_y‖²): a = max(0, 1 − s), and each retained direction contributes (s − s²/2)/K to f, or 1/(2K) for
      s ≥ 1. With a bias that is not decayed: a simplex ETF, r = K−1, b = 1/K. Without a bias: an orthogonal frame for
      d ≥ K, r = K; for d = K−1, one direction must be dropped, which contributes 1/(2K). Any truncation
      W Wᵀ ∝ I − uuᵀ, ‖u‖ = 1, is then optimal; the returned one has u ∝ 1 and is a simplex ETF.

    The result is the global optimum for every d ≥ K−1 (see the module docstring). Every other critical point is a
    strict saddle: this is proven for d > K (Zhu et al. 2021; Zhou et al. 2022) and d = K (Shen & Gu, arXiv 2407.10702).

    Args:
        num_classes: K ≥ 2.
        samples_per_class: n ≥ 1.
        weight_decay: λ_W > 0.
        feature_decay: λ_H > 0.
        feature_dim: d ≥ K−1; K if not given.
        loss: ``"cross-entropy"`` or ``"mse"``.
        label_smoothing: ε in [0, 1), for cross-entropy.
        bias: Whether the model has a bias (for MSE, a bias that is not decayed).

    Returns:
        The loss and the norms; W, H and b are computed when the attributes are read.

    Raises:
        ValueError: if an argument is out of range or not a number, or the optimum of ``loss`` is not known.

    Source: Zhu et al. (NeurIPS 2021), Theorem 3.1, in closed form; Zhou et al. (ICML 2022) for MSE.

    Examples:
        >>> optimum = global_optimum(10, 4, weight_decay=0.01, feature_decay=0.01)
        >>> round(optimum.loss, 4), round(optimum.weight_norm_squared, 2), round(optimum.margin, 2)
        (0.8669, 66.84, 3.71)
        >>> global_optimum(10, 4, weight_decay=0.1, feature_decay=0.1).frame
        'origin'
    """
    feature_dim = num_classes if feature_dim is None else feature_dim
    check_etf_sizes(num_classes, feature_dim)
    check_at_least("samples_per_class", samples_per_class, 1)
    weight_decay = check_decay("weight_decay", weight_decay, positive=True)
    feature_decay = check_decay("feature_decay", feature_decay, positive=True)
    strength = decay_strength(num_classes, samples_per_class, weight_decay, feature_decay)
    rank, bias_value = num_classes - 1, 0.0
    if loss == "cross-entropy":
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing!r}")
        margin, value = _cross_entropy(num_classes, strength, label_smoothing)
    elif loss == "mse":
        if label_smoothing:
            raise ValueError(f"label_smoothing must be 0 with loss 'mse', got {label_smoothing!r}")
        if not bias and feature_dim >= num_classes:
            rank = num_classes
        margin, value = _squared_error(num_classes, rank, strength, bias)
        bias_value = 1 / num_classes if bias else 0.0
    else:
        raise ValueError(f"loss must be 'cross-entropy' or 'mse', of which the optimum is known, got {loss!r}")
    weight_norm_squared = math.sqrt(samples_per_class * feature_decay / weight_decay) * rank * margin
    return GlobalOptimum(
        loss=value,
        weight_norm_squared=weight_norm_squared,
        feature_norm_squared=weight_decay / feature_decay * weight_norm_squared,
        margin=margin,
        frame="origin" if margin == 0 else "orthogonal" if rank == num_classes else "simplex",
        bias_value=bias_value,
        num_classes=num_classes,
        samples_per_class=samples_per_class,
        feature_dim=feature_dim,
    )


def _cross_entropy(num_classes: int, strength: float, label_smoothing: float) -> tuple[float, float]:
    """Return the margin a that minimises log(1 + (K−1) e^(−a)) + (s + ε) a (K−1)/K over a ≥ 0, and the minimum."""
    others, slope = num_classes - 1, strength + label_smoothing
    missed = slope * others / num_classes  # t, the total probability of the wrong classes at the optimum
    margin = math.log(others * (1 - missed) / missed) if slope < 1 else 0.0
    return margin, math.log1p(others * math.exp(-margin)) + missed * margin


def _squared_error(num_classes: int, rank: int, strength: float, bias: bool) -> tuple[float, float]:
    """Return the factor by which the remaining directions of the labels are scaled, and the minimum."""
    margin = max(0.0, 1 - strength)
    cost = strength - strength**2 / 2 if strength < 1 else 0.5  # K times the contribution of a retained direction
    dropped = 0 if bias else num_classes - rank
    return margin, (rank * cost + dropped / 2) / num_classes
