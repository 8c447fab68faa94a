"""The global optimum of the unconstrained features model, in closed form.

For any d, (λ_W‖W‖² + λ_H‖H‖²)/2 ≥ μ ‖Z‖_* with Z = W Hᵀ (K, N) and μ = √(λ_W λ_H): a convex function of Z and b bounds
the objective from below. It is invariant under permutations of the classes and of the samples of a class, so that the
average of a minimiser over both is one as well: Z = a (I − 11ᵀ/K) ⊗ 1ᵀ_n, and one number a is left to find. That Z
has rank K−1, so that factors W, H which attain the bound exist for every d ≥ K−1. The strength of the decay enters
through s = K √(n λ_W λ_H) alone, and the optimum is the origin for s ≥ 1.
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
    """The global optimum of a balanced unconstrained features model, up to a rotation of the features.

    Attributes:
        loss: f at the optimum, decay included.
        weight_norm_squared: ‖W‖².
        feature_norm_squared: ‖H‖² = (λ_W/λ_H) ‖W‖².
        margin: z_y − z_k for k ≠ y, the same for every sample.
        frame: What the rows of W are, up to scale: a ``"simplex"`` ETF, an ``"orthogonal"`` frame, or all zero
            (``"origin"``).
        bias_value: What each b_k is (for cross-entropy any common value does, and this is 0).
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
        """W (K, d) fp64: the canonical frame, scaled."""
        return math.sqrt(self.weight_norm_squared / self.num_classes) * self._unit_frame()

    @property
    def features(self) -> Tensor:
        """H (Kn, d) fp64, in the order of the classes: each class's features are one vector, along its weight."""
        scale = math.sqrt(self.feature_norm_squared / (self.num_classes * self.samples_per_class))
        return (scale * self._unit_frame()).repeat_interleave(self.samples_per_class, 0)

    @property
    def bias(self) -> Tensor:
        """B (K,) fp64."""
        return torch.full((self.num_classes,), self.bias_value, dtype=torch.float64)

    def _unit_frame(self) -> Tensor:
        if self.frame == "orthogonal":
            return torch.eye(self.num_classes, self.feature_dim, dtype=torch.float64)
        return simplex_etf(self.num_classes, self.feature_dim, dtype=torch.float64)


def decay_strength(num_classes: int, samples_per_class: int, weight_decay: float, feature_decay: float) -> float:
    """S = K √(n λ_W λ_H): the optimum is the origin exactly where this is at least 1 (less the label smoothing).

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
    r"""The global optimum of the balanced model, for any K ≥ 2, n ≥ 1, d ≥ K−1 and positive decay.

    With s = K √(n λ_W λ_H) and label smoothing ε, z_y − z_k = a for every sample and k ≠ y, and
    ‖W‖² = √(n λ_H/λ_W) r a, where r is the rank:

    - cross-entropy: a simplex ETF, r = K−1, t = (s + ε)(K−1)/K, a = log((K−1)(1−t)/t) for s + ε < 1, else 0, and
      f = log(1 + (K−1) e^(−a)) + (s + ε) a (K−1)/K. A bias, decayed or not, changes nothing.
    - MSE (½ ‖z − e_y‖²): a = max(0, 1 − s), and each direction kept costs (s − s²/2)/K, or 1/(2K) for s ≥ 1. With a
      bias that is not decayed, a simplex ETF, r = K−1, b = 1/K. Without one, an orthogonal frame for d ≥ K, r = K; at
      d = K−1 one direction has to go, at the cost of 1/(2K): any truncation W Wᵀ ∝ I − uuᵀ, ‖u‖ = 1, is optimal,
      and the one returned has u ∝ 1, a simplex ETF.

    That it is the global optimum holds for every d ≥ K−1 (see the module). That every other critical point is a
    strict saddle is proven for d > K (Zhu et al. 2021; Zhou et al. 2022) and d = K (Shen & Gu, arXiv 2407.10702).

    Args:
        num_classes: K ≥ 2.
        samples_per_class: n ≥ 1.
        weight_decay: λ_W > 0.
        feature_decay: λ_H > 0.
        feature_dim: d ≥ K−1; K if not given.
        loss: ``"cross-entropy"`` or ``"mse"``.
        label_smoothing: ε in [0, 1), for cross-entropy.
        bias: Whether there is a bias (for MSE: one that is not decayed).

    Returns:
        The loss, the norms, and on demand W, H and b.

    Raises:
        ValueError: An argument out of range or of another kind.

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
    """The margin a that minimises log(1 + (K−1) e^(−a)) + (s + ε) a (K−1)/K over a ≥ 0, and the minimum."""
    others, slope = num_classes - 1, strength + label_smoothing
    missed = slope * others / num_classes  # t, the probability of all wrong classes at the optimum
    margin = math.log(others * (1 - missed) / missed) if slope < 1 else 0.0
    return margin, math.log1p(others * math.exp(-margin)) + missed * margin


def _squared_error(num_classes: int, rank: int, strength: float, bias: bool) -> tuple[float, float]:
    """The factor by which the kept directions of the labels are shrunk, and the minimum."""
    margin = max(0.0, 1 - strength)
    kept = strength - strength**2 / 2 if strength < 1 else 0.5
    lost = 0 if bias else num_classes - rank
    return margin, (rank * kept + lost / 2) / num_classes
