"""Losses of features and class vectors: on the unit sphere at a temperature, and dot regression.

With unit features u_i = h_i/‖h_i‖, unit class vectors ŵ_k = w_k/‖w_k‖ and scores s_ik = u_i·ŵ_k/t, the row of a sample
compares it with the classes, and the column of a class compares its vector with the samples. `normface` and
`decoupled_cross_entropy` use rows, `ntce` and `nonl` columns, `bidirectional_nonl` and `two_way` both; none of them has
a bias.
`dot_regression` compares each feature with the vector of its own class only, and keeps the norms.

Common arguments, which are the outputs of `Head.prepare` without its bias, or those of an ``nn.Linear``:

- ``features``: h, floating, of shape (..., d).
- ``targets``: y, integers in [0, K) or ``ignore_index``, of shape (...).
- ``weight``: class vectors, floating, of shape (K, d) with K ≥ 2.
- ``temperature``: t > 0 (0.1 by default).
- ``margin``: m ≥ 0, subtracted from the positive score in the denominator, in units of s (1/t times a margin of
  cosines). By default ``math.inf``, which leaves the positive out of the denominator.
- ``ignore_index``: samples with this target are left out of every sum and mean.

Every loss returns a scalar, which is 0 if no sample counts. It raises ``ValueError`` if a setting is out of range or a
tensor has another shape or kind; on a CPU also if labels are out of range, or features or weight are not finite. On
accelerators values are not read, because that would wait for the device at every step. Losses are computed in at least
fp32, also under autocast and for low-precision input, and returned in the dtype of the computation.
``functools.partial(two_way, margin=3.0)`` holds settings for later calls.

Under ``torch.distributed`` the batch is that of all ranks of the default process group, however it is split: columns
are summed over the ranks, with gradient. Each rank returns its share of the loss times the number of ranks, so that
the mean over ranks is the loss of the whole batch, and the mean of the gradients, which DistributedDataParallel takes,
is its gradient.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from neuralcollapse._checks import (
    check_finite,
    check_floating,
    check_ignore_index,
    check_targets,
    compute_dtype,
    is_number,
    values_readable,
)
from neuralcollapse._distributed import greatest_over_ranks, number_of_ranks, sum_over_ranks

__all__ = ["bidirectional_nonl", "decoupled_cross_entropy", "dot_regression", "nonl", "normface", "ntce", "two_way"]


def normface(
    features: Tensor, targets: Tensor, weight: Tensor, *, temperature: float = 0.1, ignore_index: int | None = None
) -> Tensor:
    r"""Cross-entropy of cosines (NormFace): mean_i [ log Σ_k e^{s_ik} − s_{i,y_i} ].

    Arguments, result and errors: see `neuralcollapse.losses`.

    Source: Wang, Xiang, Cheng, Yuille, "NormFace" (ACM Multimedia 2017).

    Examples:
        >>> import torch
        >>> from neuralcollapse import simplex_etf
        >>> etf = simplex_etf(4)
        >>> round(float(normface(etf, torch.arange(4), etf)), 6)
        5e-06
    """
    scores = _Scores(features, targets, weight, temperature, ignore_index)
    return scores.mean(scores.among_classes(margin=0.0))


def decoupled_cross_entropy(
    features: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    temperature: float = 0.1,
    margin: float = math.inf,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Cross-entropy of cosines with a margin on the positive score.

    mean_i [ log(e^{s_{i,y_i}−m} + Σ_{k≠y_i} e^{s_ik}) − s_{i,y_i} ], which is CosFace's loss minus the constant m. At
    m = 0 it is `normface`; at m = ∞ the denominator has no positive.

    Arguments, result and errors: see `neuralcollapse.losses`.

    Source: Wang et al., "CosFace" (CVPR 2018); Yeh et al., "Decoupled contrastive learning" (ECCV 2022) for m = ∞.

    Examples:
        >>> import torch
        >>> from neuralcollapse import simplex_etf
        >>> etf = simplex_etf(4)
        >>> loss = decoupled_cross_entropy(etf, torch.arange(4), etf)  # log 3 − K/((K−1)t)
        >>> round(float(loss), 3)
        -12.235
    """
    scores = _Scores(features, targets, weight, temperature, ignore_index)
    _check_margin(margin)
    return scores.mean(scores.among_classes(margin))


def ntce(
    features: Tensor, targets: Tensor, weight: Tensor, *, temperature: float = 0.1, ignore_index: int | None = None
) -> Tensor:
    r"""Cross-entropy over the samples of the batch (NTCE): mean_i [ log Σ_j e^{s_{j,y_i}} − s_{i,y_i} ].

    The sum is over all samples j, including those of the same class: with n samples per class it is at least log n.

    Arguments, result and errors: see `neuralcollapse.losses`.

    Source: NTCE of Koromilas et al., "Neural Collapse by Design" (ICML 2026), arXiv 2605.20302.

    Examples:
        >>> import torch
        >>> from neuralcollapse import simplex_etf
        >>> etf = simplex_etf(4)
        >>> batch = etf.repeat(8, 1), torch.arange(4).repeat(8)
        >>> float(ntce(*batch, etf)) - math.log(8) < 1e-4
        True
    """
    scores = _Scores(features, targets, weight, temperature, ignore_index)
    return scores.mean(scores.among_all_samples())


def nonl(
    features: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    temperature: float = 0.1,
    margin: float = math.inf,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Cross-entropy of each sample against the samples of other classes, by the vector of its class (NONL).

    mean_i [ log(e^{s_{i,y_i}−m} + Σ_{j: y_j≠y_i} e^{s_{j,y_i}}) − s_{i,y_i} ]. The published loss has m = ∞. There, the
    sum of a batch of one class is empty: the logarithm is left out, and on a CPU a warning is given.

    Arguments, result and errors: see `neuralcollapse.losses`.

    Source: NONL of Koromilas et al., "Neural Collapse by Design" (ICML 2026), arXiv 2605.20302.

    Examples:
        >>> import torch
        >>> from neuralcollapse import simplex_etf
        >>> etf = simplex_etf(4)
        >>> round(float(nonl(etf, torch.arange(4), etf)), 3)
        -12.235
    """
    scores = _Scores(features, targets, weight, temperature, ignore_index)
    _check_margin(margin)
    return scores.mean(scores.among_samples_of_other_classes(margin))


def bidirectional_nonl(
    features: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    temperature: float = 0.1,
    margin: float = math.inf,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Cross-entropy of each sample against the samples of other classes and the vectors of other classes.

    mean_i [ log(e^{s_{i,y_i}−m} + Σ_{j: y_j≠y_i} e^{s_{j,y_i}} + Σ_{k≠y_i} e^{s_ik}) − s_{i,y_i} ]: `nonl` with the
    sample's row in the same logarithm, where `two_way` is the mean of two logarithms. A batch of one class has a term
    at m = ∞ too.

    Arguments, result and errors: see `neuralcollapse.losses`.

    Source: the released code of Koromilas et al., "Neural Collapse by Design" (ICML 2026), arXiv 2605.20302.

    Examples:
        >>> import torch
        >>> from neuralcollapse import simplex_etf
        >>> etf = simplex_etf(4)
        >>> round(float(bidirectional_nonl(etf, torch.arange(4), etf)), 3)  # twice the terms of `nonl`: log 2 more
        -11.542
    """
    scores = _Scores(features, targets, weight, temperature, ignore_index)
    _check_margin(margin)
    return scores.mean(scores.among_samples_of_other_classes(margin, and_classes=True))


def two_way(
    features: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    temperature: float = 0.1,
    margin: float = math.inf,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Mean of `decoupled_cross_entropy` and `nonl` with the same margin, which treats rows and columns alike.

    Arguments, result and errors: see `neuralcollapse.losses`.

    Examples:
        >>> import torch
        >>> from neuralcollapse import NearestETFClassifier
        >>> head = NearestETFClassifier(64, 10, bias="none")
        >>> features, targets = torch.randn(32, 64, requires_grad=True), torch.randint(10, (32,))
        >>> prepared, weight, _ = head.prepare(features, targets)
        >>> two_way(prepared, targets, weight, margin=3.0).backward()
    """
    scores = _Scores(features, targets, weight, temperature, ignore_index)
    _check_margin(margin)
    rows, columns = scores.among_classes(margin), scores.among_samples_of_other_classes(margin)
    return scores.mean(0.5 * (rows + columns))


def dot_regression(
    features: Tensor,
    targets: Tensor,
    weight: Tensor,
    class_lengths: Tensor | None = None,
    *,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Squared difference between each feature's product with the vector of its class and the product at cosine 1.

    mean_i (w_{y_i}ᵀh_i − √(E_W E_H))² / (2√(E_W E_H)), with E_H = ‖h_i‖² and E_W = ‖w_{y_i}‖². The minimum, 0, is at
    cosine 1, for any norms. Both norms are constants for the gradient, which in h_i is −(1 − cos) w_{y_i}: it pulls
    each feature to the vector of its class and does not push it away from the others. Class vectors therefore have to
    be separated already, as those of an ETF are; trained ones move together.

    Features of a head with a feature norm τ have E_H = τ². Without one, E_H is each feature's squared norm.

    With ``class_lengths`` (K,), positive, √E_W is given per class, and the rows of the weight give directions only.
    Yang et al. take √(n/n_k) for n_k samples of class k in the batch, n on average.

    Arguments, result and errors: see `neuralcollapse.losses`.

    Source: Yang et al., "Inducing neural collapse in imbalanced learning" (NeurIPS 2022), equation 8; norms without
    gradient as in the released code.

    Examples:
        >>> import torch
        >>> from neuralcollapse import simplex_etf
        >>> etf = simplex_etf(4)
        >>> bool(dot_regression(5 * etf, torch.arange(4), etf) < 1e-12)
        True
    """
    batch = _Batch(features, targets, weight, ignore_index)
    with torch.autocast(features.device.type, enabled=False):
        class_vectors = batch.weight
        if class_lengths is not None:
            _check_class_lengths(class_lengths, len(weight))
            class_vectors = _unit_rows(class_vectors) * class_lengths.detach().to(class_vectors)[:, None]
        positives = class_vectors[batch.targets]
        smallest = torch.finfo(positives.dtype).tiny  # a zero feature is pulled to its class vector as well
        radii, lengths = (_row_norms(rows.detach()).clamp_min(smallest) for rows in (batch.features, positives))
        cosines = (batch.features / radii * (positives / lengths)).sum(-1)
        return batch.mean(0.5 * (radii * lengths)[:, 0] * (cosines - 1).square())


class _Batch:
    """Checked features (N, d) and weight (K, d) in at least fp32, targets (N,), and which samples count."""

    def __init__(self, features: Tensor, targets: Tensor, weight: Tensor, ignore_index: int | None) -> None:
        check_ignore_index(ignore_index)
        features, targets = _flatten(features, targets, weight, ignore_index)
        self._inputs = {"features": features, "weight": weight}
        self.counted = torch.ones_like(targets, dtype=torch.bool) if ignore_index is None else targets != ignore_index
        self.targets = targets.long().where(self.counted, 0)
        dtype = compute_dtype(features.dtype)
        self.features, self.weight = features.to(dtype), weight.to(dtype)

    def mean(self, terms: Tensor) -> Tensor:
        """Return the mean of terms (N,) over the counted samples; of several ranks, a share times their number."""
        total, ranks = terms.where(self.counted, 0).sum(), number_of_ranks()
        count = sum_over_ranks(self.counted.sum().to(terms.dtype)).clamp_min(1)
        loss = total * (ranks / count)
        if loss.device.type == "cpu" and values_readable(loss) and not math.isfinite(loss.detach()):
            for name, tensor in self._inputs.items():
                check_finite(name, tensor)
        return loss


class _Scores(_Batch):
    """Scores s (N, K) of a batch, and the per-sample terms (N,) of the losses."""

    def __init__(
        self, features: Tensor, targets: Tensor, weight: Tensor, temperature: float, ignore_index: int | None
    ) -> None:
        if not (is_number(temperature) and temperature > 0):
            raise ValueError(f"temperature must be a positive number, got {temperature!r}")
        super().__init__(features, targets, weight, ignore_index)
        with torch.autocast(features.device.type, enabled=False):
            self.values = _unit_rows(self.features) @ _unit_rows(self.weight).T / temperature
            self.positives = self.values.gather(1, self.targets[:, None])[:, 0]  # s_{i,y_i}

    def among_classes(self, margin: float) -> Tensor:
        """Return log(e^{s_{i,y_i}−m} + Σ_{k≠y_i} e^{s_ik}) − s_{i,y_i}."""
        with_margin = self.values.scatter(1, self.targets[:, None], (self.positives - margin)[:, None])
        return with_margin.logsumexp(1) - self.positives

    def among_all_samples(self) -> Tensor:
        """Return log Σ_j e^{s_{j,y_i}} − s_{i,y_i}."""
        sums, _ = _log_sum_of_columns(self.values.masked_fill(~self.counted[:, None], -math.inf))
        return sums[self.targets] - self.positives

    def among_samples_of_other_classes(self, margin: float, *, and_classes: bool = False) -> Tensor:
        """Return log(e^{s_{i,y_i}−m} + Σ_{j: y_j≠y_i} e^{s_{j,y_i}}) − s_{i,y_i}.

        With ``and_classes``, Σ_{k≠y_i} e^{s_ik} is added inside the logarithm.
        """
        negatives = self.values.scatter(1, self.targets[:, None], -math.inf)
        sums, nonempty = _log_sum_of_columns(negatives.masked_fill(~self.counted[:, None], -math.inf))
        sums, nonempty = sums[self.targets], nonempty[self.targets]
        if and_classes:
            sums, nonempty = torch.logaddexp(sums, negatives.logsumexp(1)), torch.ones_like(nonempty)
        if margin < math.inf:
            return torch.logaddexp(self.positives - margin, sums) - self.positives
        empty = self.counted & ~nonempty
        if empty.device.type == "cpu" and values_readable(empty) and bool(empty.any()):
            warnings.warn(
                "a batch of one class has no samples of other classes: its logarithm is left out of the loss "
                "(use larger batches or a finite margin)",
                stacklevel=3,
            )
        return sums.where(nonempty, 0) - self.positives


def _log_sum_of_columns(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp of each column over all ranks (K,), and whether the column has a term.

    Where all scores are −∞, the result is −∞, with a gradient of 0.
    """
    rows = scores if len(scores) else scores.new_full((1, scores.shape[1]), -math.inf)
    greatest = greatest_over_ranks(rows.amax(0))
    nonempty = greatest != -math.inf  # NaN is passed on
    greatest = greatest.where(nonempty, 0)
    sums = sum_over_ranks((scores - greatest).exp().sum(0))
    return (greatest + sums.where(nonempty, 1).log()).where(nonempty, -math.inf), nonempty


def _row_norms(rows: Tensor) -> Tensor:
    """Return the norms of rows, (..., 1), exact also where squares overflow or vanish."""
    peaks = rows.detach().abs().amax(-1, keepdim=True)
    peaks = peaks.where(peaks > 0, 1)
    return peaks * torch.linalg.vector_norm(rows / peaks, dim=-1, keepdim=True)


def _unit_rows(rows: Tensor) -> Tensor:
    """Return rows scaled to norm 1; zero rows stay zero."""
    norms = _row_norms(rows)
    return rows / norms.where(norms > 0, 1)


def _flatten(features: Tensor, targets: Tensor, weight: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Return features as (N, d) and targets as (N,), checked together with the weight."""
    check_floating("weight", weight)
    if weight.ndim != 2 or weight.shape[0] < 2:
        raise ValueError(f"weight must be of shape (K, d) with K at least 2, got {tuple(weight.shape)}")
    check_floating("features", features)
    if features.ndim < 2 or features.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"features must be of shape (..., {weight.shape[1]}), as weight {tuple(weight.shape)} is, "
            f"got {tuple(features.shape)}"
        )
    if isinstance(targets, Tensor) and targets.shape != features.shape[:-1]:
        raise ValueError(f"targets must be of shape {tuple(features.shape[:-1])}, got {tuple(targets.shape)}")
    features, targets = features.flatten(0, -2), targets.flatten() if isinstance(targets, Tensor) else targets
    readable = features.device.type == "cpu"
    check_targets(targets, len(features), len(weight), values=readable, ignore_index=ignore_index)
    return features, targets


def _check_margin(margin: float) -> None:
    if not ((is_number(margin) and margin >= 0) or margin == math.inf):
        raise ValueError(f"margin must be at least 0 (math.inf included), got {margin!r}")


def _check_class_lengths(class_lengths: Tensor, num_classes: int) -> None:
    check_floating("class_lengths", class_lengths)
    if class_lengths.shape != (num_classes,):
        raise ValueError(f"class_lengths must be of shape ({num_classes},), got {tuple(class_lengths.shape)}")
    if class_lengths.device.type == "cpu" and values_readable(class_lengths):
        check_finite("class_lengths", class_lengths)
        if not bool((class_lengths > 0).all()):
            raise ValueError(f"class_lengths must be positive, got {float(class_lengths.min())}")
