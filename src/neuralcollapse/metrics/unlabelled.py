"""Measurement of features without labels: rank, norms, and spread over the sphere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from neuralcollapse._html import html_table
from neuralcollapse.catalogue import METRICS
from neuralcollapse.metrics.measurement import Provenance
from neuralcollapse.metrics.moments import ClassMoments
from neuralcollapse.metrics.rank import feature_norm, rank_me
from neuralcollapse.metrics.statistics import class_statistics
from neuralcollapse.metrics.undefined import NO_SAMPLE, grouped, warn_of_undefined

DRAWN = 2048  # number of samples drawn for the metrics over pairs
NO_LABELS = "needs labels, but none were given"
_OF_LABELS = tuple(name for name in METRICS if name not in ("feature_norm", "rank_me"))
_TEMPERATURE = 2


@dataclass(frozen=True, eq=False)
class UnlabelledMeasurement:
    """Result of `measure_features` without labels.

    With h the N features, u = h/‖h‖, and D a set of up to 2,048 random samples, which is the same for the same data:

    - ``feature_norm``: √(Σ‖h‖²/N); ``feature_norm_spread``: standard deviation of ‖h‖ (with divisor N) over its mean.
    - ``rank_me``: exp(−Σ p_i log p_i), p = σ/Σσ, of the singular values σ of the features (Garrido et al., ICML 2023);
      ``effective_rank_features``: the same of the features minus their mean (Roy & Vetterli, EUSIPCO 2007).
    - ``koleo``: −mean over i in D of log min_{j≠i} ‖u_i − u_j‖ (Sablayrolles et al., ICLR 2019). It depends on the
      number of samples: compare values with the same ``num_drawn``.
    - ``uniformity``: log of the mean over pairs i ≠ j in D of exp(−2‖u_i − u_j‖²); at least −4 up to a small term, and
      0 if all directions are the same (Wang & Isola, ICML 2020).

    Attributes:
        metrics: Dictionary from name to value, NaN for undefined metrics. Metrics that need labels are absent.
        undefined: Dictionary from name to reason, for each metric that is NaN and for each metric of the catalogue that
            is absent.
        num_samples: N.
        num_drawn: Number of samples used for ``koleo`` and ``uniformity``.
        mean: (d,) mean feature.
        covariance: (d, d) covariance, with divisor N.
        provenance: Origin of the measurement.
    """

    metrics: dict[str, float]
    undefined: dict[str, str]
    num_samples: int
    num_drawn: int
    mean: Tensor
    covariance: Tensor
    provenance: Provenance

    def __repr__(self) -> str:
        """Return the metrics and the reasons for undefined ones."""
        return self.summary()

    def summary(self) -> str:
        """Return the metrics, one per line, and the reasons for undefined ones."""
        caption, _, rows, notes = self._summary()
        return "\n".join([caption, *(f"  {name:34} {value:>10}" for name, value in rows), *notes])

    def _repr_html_(self) -> str:
        return html_table(*self._summary())

    def _summary(self) -> tuple[str, list[str], list[list[str]], list[str]]:
        absent = [name for name in self.undefined if name not in self.metrics]
        reasons = {name: reason for name, reason in self.undefined.items() if name in self.metrics}
        subject = f"Features of {self.provenance.model}" if self.provenance.model else "Features"
        rows = [[name, f"{value:.4g}"] for name, value in self.metrics.items()]
        notes = [*grouped(reasons), f"{len(absent)} metrics need labels: labels='predicted' uses the predicted classes"]
        return f"{subject}, {self.num_samples:,} samples, without labels", ["", "value"], rows, notes


@torch.no_grad()
def measure_unlabelled(
    blocks: Iterator[Tensor], num_samples: int, moments: ClassMoments, provenance: Provenance
) -> UnlabelledMeasurement:
    """Return the measurement of features that are given in blocks, with one warning about undefined metrics.

    Args:
        blocks: Features (..., d).
        num_samples: Number of samples in all blocks.
        moments: Empty moments of at least two classes; all features are added to the first class.
        provenance: Origin of the data.
    """
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(0))
    chosen = order[:DRAWN].sort().values
    drawn, start = [], 0
    norms = ClassMoments(2, 1, dtype=torch.float64, device=moments.device)
    for block in blocks:
        rows = block.flatten(0, -2)
        zeros = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        moments.update(rows, zeros)
        norms.update(torch.linalg.vector_norm(rows.double(), dim=1, keepdim=True), zeros)
        of_block = chosen[(chosen >= start) & (chosen < start + len(rows))] - start
        drawn.append(rows[of_block.to(rows.device)].double().cpu())
        start += len(rows)
    statistics = class_statistics(moments)
    features = torch.cat(drawn) if drawn else moments.means.new_empty(0, moments.feature_dim)
    mean = moments.means[:1].double().cpu()
    covariance = moments.within_class_scatter.double().cpu() / max(num_samples, 1)
    counts, variances = moments.counts[:1].cpu(), moments.within_class_trace[:1].double().cpu() / max(num_samples, 1)
    metrics = dict.fromkeys(("feature_norm", "feature_norm_spread", "rank_me", "effective_rank_features"), math.nan)
    if num_samples:
        metrics |= {
            "feature_norm": float(feature_norm(mean, variances, counts)),
            "feature_norm_spread": _spread(norms),
            "rank_me": float(rank_me(covariance, mean, counts)),
        }
        if not statistics.constant:
            metrics["effective_rank_features"] = float(rank_me(covariance, torch.zeros_like(mean), counts))
    distances = _distances(features)
    metrics |= {"koleo": _koleo(distances), "uniformity": _uniformity(distances)}
    undefined = _reasons(metrics, features, statistics.constant)
    warn_of_undefined(undefined, depth=6)
    return UnlabelledMeasurement(
        metrics={name: math.nan if name in undefined else value for name, value in metrics.items()},
        undefined=undefined | dict.fromkeys(_OF_LABELS, NO_LABELS),
        num_samples=num_samples,
        num_drawn=len(features),
        mean=mean[0],
        covariance=covariance,
        provenance=provenance,
    )


def _spread(norms: ClassMoments) -> float:
    """Return standard deviation (divisor N) over mean, from moments of one class and feature; NaN if the mean is 0."""
    mean = float(norms.means[0])
    return math.sqrt(float(norms.within_class_trace[0]) / int(norms.counts[0])) / mean if mean else math.nan


def _distances(features: Tensor) -> Tensor:
    """Return the distances (n, n) of unit features, with infinity on the diagonal."""
    units = features / torch.linalg.vector_norm(features, dim=1, keepdim=True)
    distances = torch.cdist(units, units, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.fill_diagonal_(math.inf)


def _koleo(distances: Tensor) -> float:
    return float(-distances.min(dim=1).values.log().mean()) if len(distances) > 1 else math.nan


def _uniformity(distances: Tensor) -> float:
    if len(distances) < 2:
        return math.nan
    exponents = -_TEMPERATURE * distances.square()
    return float(exponents.flatten().logsumexp(0)) - math.log(len(distances) * (len(distances) - 1))


def _reasons(metrics: Mapping[str, float], features: Tensor, constant: bool) -> dict[str, str]:
    """Return the reason for each metric without a finite value."""
    zero = int((~features.any(dim=1)).sum())
    same = "the features are the same for all samples, up to rounding"
    reasons = {
        "effective_rank_features": same,
        "koleo": "two features have the same direction",
        "uniformity": "there are fewer than two features",
    }
    if constant:
        reasons["koleo"] = same
    if zero:
        of_directions = f"{zero:,} of the drawn features are zero and have no direction"
        reasons |= {"koleo": of_directions, "uniformity": of_directions}
    elif len(features) == 1:
        reasons["koleo"] = "there are fewer than two features"
    if not len(features):
        reasons = dict.fromkeys(metrics, NO_SAMPLE.reason)
    return {
        name: reasons.get(name, "all features are zero") for name, value in metrics.items() if not math.isfinite(value)
    }
