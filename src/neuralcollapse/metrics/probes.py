"""Linear probe in closed form from class moments, errors of the probes of layers, and effective depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from neuralcollapse._checks import check_finite, check_not_negative, check_shapes
from neuralcollapse.metrics.moments import ClassMoments
from neuralcollapse.metrics.nc4 import nearest_class_mean
from neuralcollapse.metrics.samples import FeatureCache
from neuralcollapse.metrics.statistics import ClassStatistics, MeasureOptions, class_statistics
from neuralcollapse.metrics.undefined import Condition, MetricValues, conditions_of_moments, without_undefined

EPSILON = 0.01  # maximum error of a separated layer, for the effective depth


class LinearProbe(NamedTuple):
    """Linear classifier of features; the predicted class is that of the greatest entry of Wh + b.

    Attributes:
        weight: W (K, d) in fp64.
        bias: b (K,) in fp64.
    """

    weight: Tensor
    bias: Tensor

    def predict(self, features: Tensor) -> Tensor:
        """Return the predicted classes (N,).

        Args:
            features: h (N, d).

        Raises:
            ValueError: if the features have the wrong shape or type.
        """
        check_shapes(features=(features, "N d"), weight=(self.weight, "K d"))
        return torch.addmm(self.bias, features.to(self.weight), self.weight.T).argmax(dim=1)


@torch.no_grad()
def linear_probe(moments: ClassMoments, *, ridge: float = 0.0) -> LinearProbe:
    """Fit a linear probe: least squares on one-hot targets, with an intercept, in closed form.

    With π_k = n_k/N, the mean m of all samples, C = M − m and the total covariance Σ_T = S/N + Σ_k π_k C_kC_kᵀ,

        W = diag(π) C (Σ_T + λI)†,   b = π − Wm

    minimises (1/N) Σ‖Wh + b − e_y‖² + λ‖W‖_F², λ = ``ridge`` · tr(Σ_T)/d. The solution needs only the moments and no
    iterations. Without a ridge, the pseudo-inverse gives the solution of minimal norm: eigenvalues of Σ_T below
    d·eps·λ₁ count as 0, with the eps of the arithmetic of the moments. In fp64, directions whose standard deviation is
    less than about 1e-7 of the greatest one are therefore not used, although least squares on the features themselves
    would use them.

    The row of a class without samples is 0; it is never predicted, because the entries of Wh + b sum to 1.

    Args:
        moments: Moments of the features.
        ridge: Penalty of ‖W‖_F², in units of the mean variance of a feature, at least 0.

    Raises:
        ValueError: if ``moments`` is not `ClassMoments`, has no samples or is not finite, or ``ridge`` is negative.

    Source: linear probe of Alain & Bengio (ICLR workshop 2017), fitted here by ridge regression.

    Examples:
        >>> moments = ClassMoments(num_classes=2, feature_dim=1)
        >>> moments.update(torch.tensor([[-1.0], [-3], [1], [3]]), torch.tensor([0, 0, 1, 1]))
        >>> linear_probe(moments).weight
        tensor([[-0.2000],
                [ 0.2000]], dtype=torch.float64)
        >>> linear_probe(moments).predict(torch.tensor([[0.5], [-0.5]]))
        tensor([1, 0])
    """
    if not isinstance(moments, ClassMoments):
        raise ValueError(f"moments must be ClassMoments, got {type(moments).__name__}")
    check_not_negative("ridge", ridge)
    if not moments.counts.any():
        raise ValueError("moments must hold at least one sample, got none")
    if moments.device.type == "mps":  # MPS does not support fp64
        moments = moments.to("cpu")
    shares = moments.counts.double() / moments.counts.sum()
    means, within = moments.means.double(), moments.within_class_scatter.double() / moments.counts.sum()
    check_finite("the class means of moments", means)
    check_finite("the scatter of moments", within)
    center = shares @ means
    centred = means - center
    weighted = shares[:, None] * centred
    total = within + centred.T @ weighted
    size = len(total)
    # The scatter of "mixed" moments is summed in fp32.
    eps = torch.finfo(torch.float64 if moments.dtype == torch.float64 else torch.float32).eps
    total.diagonal().add_(ridge * total.trace() / size)
    weight = weighted @ torch.linalg.pinv(total, hermitian=True, rtol=size * eps)
    return LinearProbe(weight, shares - weight @ center)


@dataclass(frozen=True)
class FittedProbes:
    """Nearest class mean and linear probe of a train split, for the classes that are measured in it.

    Attributes:
        classes: (K',) indices of the measured classes.
        means: (K', d) means of the measured classes.
        probe: The linear probe.
        is_measured: (K,) whether each class is measured.
    """

    classes: Tensor
    means: Tensor
    probe: LinearProbe
    is_measured: Tensor

    @classmethod
    def of(cls, moments: ClassMoments, measured: ClassStatistics, ridge: float = 0.0) -> FittedProbes:
        """Return the probes computed from moments and from the statistics of their measured classes."""
        is_measured = torch.zeros(moments.num_classes, dtype=torch.bool, device=measured.classes.device)
        is_measured[measured.classes] = True
        return cls(measured.classes, measured.class_means, linear_probe(moments, ridge=ridge), is_measured)

    def misses(self, features: Tensor, targets: Tensor) -> Tensor:
        """Return the number of samples of measured classes, and the numbers that the two probes misclassify, (3,)."""
        targets = targets.to(self.classes.device)
        measured = self.is_measured[targets]
        features, targets = features.to(self.classes.device)[measured], targets[measured]
        if not len(targets):
            return torch.zeros(3, dtype=torch.int64, device=self.classes.device)
        answers = (self.classes[nearest_class_mean(features, self.means)], self.probe.predict(features))
        return torch.stack([measured.sum(), *((answer != targets).sum() for answer in answers)])


@torch.no_grad()
def probe_errors(cache: FeatureCache, reference: ClassMoments, options: MeasureOptions) -> MetricValues:
    """Return the errors of the nearest class mean (``ncc_error``) and of the linear probe (``probe_error``).

    Samples of classes that are not measured in the train split are left out, as for `nc4_ncc_mismatch`.

    Args:
        cache: Features of the samples, with their targets.
        reference: Moments of the train split, which determine the class means and the probe.
        options: Options of the measurement.
    """
    measured = class_statistics(reference, options)
    conditions = list(conditions_of_moments(reference, measured))
    finite = all(bool(torch.isfinite(part).all()) for part in (reference.means, reference.within_class_scatter))
    errors = [math.nan, math.nan]
    if len(measured.classes) >= 2 and finite:
        probes = FittedProbes.of(reference, measured)
        counts = torch.zeros(3, dtype=torch.int64, device=measured.classes.device)
        for batch in cache:
            counts += probes.misses(batch.features, batch.targets)
        errors = (counts[1:].double() / counts[0]).tolist()  # NaN without samples
        if not counts[0]:
            reason = "no sample of a class with a train mean was measured"
            conditions.append(Condition("no sample of a measured class", reason, False))
    return without_undefined(dict(zip(("ncc_error", "probe_error"), errors, strict=True)), conditions)


def effective_depth(errors: Sequence[float], epsilon: float = EPSILON) -> int:
    """Effective depth: number, from 1, of the first layer whose nearest class mean has an error of at most ε.

    If there is no such layer, it is the number of layers. The errors are those of the train split.

    Args:
        errors: Error of the nearest class mean in each layer, in [0, 1]; NaN counts as an error above ε.
        epsilon: ε, in [0, 1].

    Raises:
        ValueError: if ``errors`` is empty, or ``epsilon`` is out of range.

    Source: Galanti, Galanti & Ben-Shaul 2022 (arXiv 2202.09028).

    Examples:
        >>> effective_depth([0.4, 0.03, 0.008, 0.009])
        3
        >>> effective_depth([0.4, 0.03, 0.008, 0.009], epsilon=0.05)
        2
    """
    if not len(errors):
        raise ValueError("errors must have at least one value, got none")
    check_not_negative("epsilon", epsilon)
    if epsilon > 1:
        raise ValueError(f"epsilon must be in [0, 1], got {epsilon}")
    separated = (number for number, error in enumerate(errors, start=1) if error <= epsilon)
    return next(separated, len(errors))
