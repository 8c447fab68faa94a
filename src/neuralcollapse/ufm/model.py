"""Unconstrained features model: the features are trained parameters, without a network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from neuralcollapse._checks import check_at_least, check_finite, check_floating
from neuralcollapse.heads import Head

Loss = Literal["cross-entropy", "mse", "focal"]
LOSSES: tuple[Loss, ...] = ("cross-entropy", "mse", "focal")


class UnconstrainedFeatures(nn.Module):
    r"""Trained features with a head: a classifier whose backbone can map samples to arbitrary features.

    With N = Kn samples, the features H (N, d) are parameters like those of the head, and the objective is

        f = (1/N) Σ_i loss(W h_i + b, y_i) + (λ_W/2) ‖W‖² + (λ_H/2) ‖H‖² + (λ_b/2) ‖b‖²

    where the decay applies to the parameters (H before any normalisation by the head), and the λ_W term is absent for a
    head without a trained weight. The loss of logits z with label y is

    - ``"cross-entropy"``: −Σ_k q_k log p_k, p = softmax(z), q = (1−ε) e_y + ε/K with the label smoothing ε;
    - ``"mse"``: ½ ‖z − e_y‖²;
    - ``"focal"``: −(1 − p_y)^γ log p_y, with the focusing parameter γ.

    Args:
        num_classes: K ≥ 2.
        samples_per_class: n ≥ 1.
        feature_dim: d ≥ 1. (Functions of closed forms check that d ≥ K−1.)
        head: A `Head` with K classes in d dimensions, used in its current mode (training or evaluation).
        class_counts: K class sizes that sum to N, instead of n per class.
        loss: ``"cross-entropy"``, ``"mse"`` or ``"focal"``, see above.
        label_smoothing: ε in [0, 1), for cross-entropy.
        focusing: γ ≥ 0, for the focal loss; by default 2.
        weight_decay: λ_W ≥ 0.
        feature_decay: λ_H ≥ 0.
        bias_decay: λ_b ≥ 0.
        generator: Generator of the initial features, whose entries are independent and normal with variance 1/d.

    Attributes:
        features: H (N, d), in the order of the classes.
        targets: y (N,), the labels.
        head: The head.

    Raises:
        ValueError: if sizes are out of range or do not match those of the head, class sizes do not sum to N, or an
            argument has the wrong type.

    Source: Mixon, Parshall, Pi (2020); Zhu et al., "A Geometric Analysis of Neural Collapse with Unconstrained
    Features" (NeurIPS 2021); Zhou et al. for other losses (ICML 2022: MSE; NeurIPS 2022: focal, label smoothing).

    Examples:
        >>> from neuralcollapse.heads import LearnedClassifier
        >>> from neuralcollapse.ufm import UnconstrainedFeatures
        >>> model = UnconstrainedFeatures(4, 3, 8, LearnedClassifier(8, 4), weight_decay=5e-3, feature_decay=5e-3)
        >>> logits, targets = model()
        >>> logits.shape, targets.tolist()
        (torch.Size([12, 4]), [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    """

    targets: Tensor

    def __init__(
        self,
        num_classes: int,
        samples_per_class: int,
        feature_dim: int,
        head: Head,
        *,
        class_counts: Sequence[int] | None = None,
        loss: Loss = "cross-entropy",
        label_smoothing: float = 0.0,
        focusing: float | None = None,
        weight_decay: float = 0.0,
        feature_decay: float = 0.0,
        bias_decay: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_at_least("num_classes", num_classes, 2)
        check_at_least("samples_per_class", samples_per_class, 1)
        check_at_least("feature_dim", feature_dim, 1)
        if not isinstance(head, Head) or (head.num_classes, head.in_features) != (num_classes, feature_dim):
            raise ValueError(f"head must be a Head of {num_classes} classes in {feature_dim} dimensions, got {head!r}")
        counts = _class_counts(class_counts, num_classes, samples_per_class)
        self.num_classes = num_classes
        self.samples_per_class = samples_per_class
        self.feature_dim = feature_dim
        self.balanced = len(set(counts)) == 1
        self.loss = _known_loss(loss)
        self.label_smoothing = _smoothing(label_smoothing, loss)
        self.focusing = _focusing(focusing, loss)
        self.weight_decay = check_decay("weight_decay", weight_decay)
        self.feature_decay = check_decay("feature_decay", feature_decay)
        self.bias_decay = check_decay("bias_decay", bias_decay)
        device = None if generator is None else generator.device
        start = torch.randn(num_classes * samples_per_class, feature_dim, generator=generator, device=device)
        self.features = nn.Parameter(start / math.sqrt(feature_dim))
        self.head = head
        labels = torch.arange(num_classes, device=device).repeat_interleave(torch.tensor(counts, device=device))
        self.register_buffer("targets", labels)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the logits (N, K) of the features, and the labels (N,)."""
        return self.head(self.features, self.targets if self.training else None), self.targets

    def risk(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of logits (N, K) with labels (N,), without the decay."""
        if self.loss == "mse":
            return 0.5 * (logits - functional.one_hot(targets, self.num_classes)).square().sum(1).mean()
        log_probabilities = logits.log_softmax(1)
        log_true = log_probabilities.gather(1, targets[:, None])[:, 0]
        if self.loss == "focal":
            return -((-torch.expm1(log_true)).pow(self.focusing) * log_true).mean()
        smoothed = (1 - self.label_smoothing) * log_true + self.label_smoothing * log_probabilities.mean(1)
        return -smoothed.mean()

    def decay(self) -> Tensor:
        """Sum of the three decay terms."""
        total = self.feature_decay * self.features.square().sum()
        for parameter in self.head.parameters():
            rate = self.weight_decay if parameter.ndim > 1 else self.bias_decay
            if rate > 0:
                total = total + rate * parameter.square().sum()
        return 0.5 * total

    def objective(self) -> Tensor:
        """Objective f, a scalar with autograd graph."""
        return self.risk(*self()) + self.decay()

    @torch.no_grad()
    def place(self, weight: Tensor, features: Tensor, bias: Tensor | None = None) -> None:
        """Set the parameters.

        Args:
            weight: W (K, d), for a head with a trained weight.
            features: H (N, d).
            bias: b (K,); by default 0.

        Raises:
            ValueError: if shapes do not match, values are not finite, or the weight of the head is not trained; the
                model is then left unchanged.
        """
        if not isinstance(self.head.weight, nn.Parameter):
            raise ValueError(f"head must have a trained weight, but that of {type(self.head).__name__} is not trained")
        trained_bias = self.head.bias
        if bias is None:
            bias = weight.new_zeros(self.num_classes)
        elif not isinstance(trained_bias, nn.Parameter):
            raise ValueError("bias must be None, because the head has no trained bias")
        given = {"weight": (weight, self.head.weight), "features": (features, self.features)}
        if isinstance(trained_bias, nn.Parameter):
            given["bias"] = (bias, trained_bias)
        for name, (values, parameter) in given.items():
            check_floating(name, values)
            if values.shape != parameter.shape:
                raise ValueError(f"{name} must be of shape {tuple(parameter.shape)}, got {tuple(values.shape)}")
            check_finite(name, values)
        for values, parameter in given.values():
            parameter.copy_(values)

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, samples={len(self.targets)}, feature_dim={self.feature_dim}, "
            f"loss={self.loss}, weight_decay={self.weight_decay:g}, feature_decay={self.feature_decay:g}"
        )


def check_decay(name: str, decay: float, *, positive: bool = False) -> float:
    """Return the decay as a float; raise unless it is finite and at least 0, or greater than 0 if ``positive``."""
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0, got {decay!r}")
    if positive and decay == 0:
        raise ValueError(f"{name} must be greater than 0, got {decay!r}")
    return float(decay)


def _class_counts(class_counts: Sequence[int] | None, num_classes: int, samples_per_class: int) -> list[int]:
    if class_counts is None:
        return [samples_per_class] * num_classes
    counts = class_counts.tolist() if isinstance(class_counts, Tensor) else list(class_counts)
    if len(counts) != num_classes:
        raise ValueError(f"class_counts must be num_classes = {num_classes} sizes, got {len(counts)}")
    for index, count in enumerate(counts):
        check_at_least(f"class_counts[{index}]", count, 1)
    if sum(counts) != num_classes * samples_per_class:
        raise ValueError(
            f"class_counts must sum to num_classes * samples_per_class = {num_classes * samples_per_class}, "
            f"got {sum(counts)}"
        )
    return counts


def _known_loss(loss: Loss) -> Loss:
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(map(repr, LOSSES))}, got {loss!r}")
    return loss


def _smoothing(label_smoothing: float, loss: Loss) -> float:
    if not isinstance(label_smoothing, int | float) or not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing!r}")
    if label_smoothing and loss != "cross-entropy":
        raise ValueError(f"label_smoothing must be 0 with loss {loss!r}, got {label_smoothing!r}")
    return float(label_smoothing)


def _focusing(focusing: float | None, loss: Loss) -> float:
    if focusing is None:
        return 2.0
    if loss != "focal":
        raise ValueError(f"focusing must not be given with loss {loss!r}, got {focusing!r}")
    if not isinstance(focusing, int | float) or not 0 <= focusing < math.inf:
        raise ValueError(f"focusing must be a finite number of at least 0, got {focusing!r}")
    return float(focusing)
