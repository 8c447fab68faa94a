"""Classification losses: cross-entropy, losses on the unit sphere at a temperature, and distances to class vectors."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor
from torch.nn import functional

from neuralcollapse._checks import check_shapes, is_number, values_readable
from neuralcollapse._distributed import greatest_over_ranks, sum_over_ranks
from neuralcollapse.losses.batch import Batch, check_class_values, log_prior, row_norms, unit_rows


def cross_entropy(
    features: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    class_weights: Tensor | None = None,
    prior: Tensor | None = None,
    prior_scale: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Cross-entropy of the logits z_ik = w_kᵀh_i + b_k: mean_i [ log Σ_k e^{z_ik} − z_{i,y_i} ].

    With ``bias``, b (K,) is the third output of `Head.prepare`; without it, b is 0. With a prior, the logits are
    w_kᵀh_i + b_k + τ log π_k.
    With ``label_smoothing`` ε in [0, 1], z_{i,y_i} becomes (1−ε) z_{i,y_i} + ε/K Σ_k z_ik.

    Arguments, result and errors: see `neuralcollapse.losses`.

    Source: Menon et al., "Long-tail learning via logit adjustment" (ICLR 2021), equation 10; Ren et al., "Balanced
    meta-softmax for long-tailed visual recognition" (NeurIPS 2020).

    Examples:
        >>> import torch
        >>> from neuralcollapse import simplex_etf
        >>> etf, counts = simplex_etf(4), torch.tensor([500, 50, 50, 5])
        >>> targets = torch.arange(4)
        >>> float(cross_entropy(etf, targets, etf, prior=counts)) > float(cross_entropy(etf, targets, etf))
        True
    """
    batch = Batch(features, targets, weight, ignore_index, class_weights)
    if not (is_number(label_smoothing) and 0 <= label_smoothing <= 1):
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing!r}")
    if bias is not None:
        check_shapes(weight=(weight, "K d"), bias=(bias, "K"))
    with torch.autocast(features.device.type, enabled=False):
        logits = functional.linear(batch.features, batch.weight, None if bias is None else bias.to(batch.features))
        shift = log_prior(prior, prior_scale, logits, len(weight))
        logits = logits if shift is None else logits + shift
        terms = functional.cross_entropy(logits, batch.targets, reduction="none", label_smoothing=label_smoothing)
        return batch.mean(terms)


def normface(
    features: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    temperature: float = 0.1,
    class_weights: Tensor | None = None,
    prior: Tensor | None = None,
    prior_scale: float = 1.0,
    ignore_index: int | None = None,
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
    scores = _Scores(features, targets, weight, temperature, ignore_index, class_weights, prior, prior_scale)
    return scores.mean(scores.among_classes(margin=0.0))


def decoupled_cross_entropy(
    features: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    temperature: float = 0.1,
    margin: float = math.inf,
    class_weights: Tensor | None = None,
    prior: Tensor | None = None,
    prior_scale: float = 1.0,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Cross-entropy of cosines with a margin on the positive score.

    The loss is mean_i [ log(e^{s_{i,y_i}−m} + Σ_{k≠y_i} e^{s_ik}) − s_{i,y_i} ], which is the loss of CosFace minus the
    constant m. With m = 0 it equals `normface`; with m = ∞ the denominator does not contain the positive score.

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
    scores = _Scores(features, targets, weight, temperature, ignore_index, class_weights, prior, prior_scale)
    _check_margin(margin)
    return scores.mean(scores.among_classes(margin))


def ntce(
    features: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    temperature: float = 0.1,
    class_weights: Tensor | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Cross-entropy over the samples of the batch (NTCE): mean_i [ log Σ_j e^{s_{j,y_i}} − s_{i,y_i} ].

    The sum is over all samples j, including those of the same class: with n samples per class, the loss is at least
    log n.

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
    scores = _Scores(features, targets, weight, temperature, ignore_index, class_weights)
    return scores.mean(scores.among_all_samples())


def nonl(
    features: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    temperature: float = 0.1,
    margin: float = math.inf,
    class_weights: Tensor | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Cross-entropy of each sample against the samples of other classes, scored by the vector of its class (NONL).

    The loss is mean_i [ log(e^{s_{i,y_i}−m} + Σ_{j: y_j≠y_i} e^{s_{j,y_i}}) − s_{i,y_i} ]. The published loss has
    m = ∞. In that case, the sum is empty for a batch of one class: the logarithm is left out, and on a CPU a warning is
    given.

    Arguments, result and errors: see `neuralcollapse.losses`.

    Source: NONL of Koromilas et al., "Neural Collapse by Design" (ICML 2026), arXiv 2605.20302.

    Examples:
        >>> import torch
        >>> from neuralcollapse import simplex_etf
        >>> etf = simplex_etf(4)
        >>> round(float(nonl(etf, torch.arange(4), etf)), 3)
        -12.235
    """
    scores = _Scores(features, targets, weight, temperature, ignore_index, class_weights)
    _check_margin(margin)
    return scores.mean(scores.among_samples_of_other_classes(margin))


def bidirectional_nonl(
    features: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    temperature: float = 0.1,
    margin: float = math.inf,
    class_weights: Tensor | None = None,
    prior: Tensor | None = None,
    prior_scale: float = 1.0,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Cross-entropy of each sample against the samples of other classes and the vectors of other classes.

    The loss is mean_i [ log(e^{s_{i,y_i}−m} + Σ_{j: y_j≠y_i} e^{s_{j,y_i}} + Σ_{k≠y_i} e^{s_ik}) − s_{i,y_i} ]. It adds
    the row of the sample to the logarithm of `nonl`, whereas `two_way` is the mean of two logarithms. The logarithm is
    defined for batches of one class even with m = ∞.

    Arguments, result and errors: see `neuralcollapse.losses`.

    Source: released code of Koromilas et al., "Neural Collapse by Design" (ICML 2026), arXiv 2605.20302.

    Examples:
        >>> import torch
        >>> from neuralcollapse import simplex_etf
        >>> etf = simplex_etf(4)
        >>> round(float(bidirectional_nonl(etf, torch.arange(4), etf)), 3)  # `nonl` plus log 2: twice as many terms
        -11.542
    """
    scores = _Scores(features, targets, weight, temperature, ignore_index, class_weights, prior, prior_scale)
    _check_margin(margin)
    return scores.mean(scores.among_samples_of_other_classes(margin, and_classes=True))


def two_way(
    features: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    temperature: float = 0.1,
    margin: float = math.inf,
    class_weights: Tensor | None = None,
    prior: Tensor | None = None,
    prior_scale: float = 1.0,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Mean of `decoupled_cross_entropy` and `nonl` with the same margin, which treats rows and columns equally.

    Arguments, result and errors: see `neuralcollapse.losses`.

    Examples:
        >>> import torch
        >>> from neuralcollapse import NearestETFClassifier
        >>> head = NearestETFClassifier(64, 10, bias="none")
        >>> features, targets = torch.randn(32, 64, requires_grad=True), torch.randint(10, (32,))
        >>> prepared, weight, _ = head.prepare(features, targets)
        >>> two_way(prepared, targets, weight, margin=3.0).backward()
    """
    scores = _Scores(features, targets, weight, temperature, ignore_index, class_weights, prior, prior_scale)
    _check_margin(margin)
    rows, columns = scores.among_classes(margin), scores.among_samples_of_other_classes(margin)
    return scores.mean(0.5 * (rows + columns))


def dot_regression(
    features: Tensor,
    targets: Tensor,
    weight: Tensor,
    class_lengths: Tensor | None = None,
    *,
    class_weights: Tensor | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Squared difference between the product of each feature with its class vector and the product at cosine 1.

    The loss is mean_i (w_{y_i}ᵀh_i − √(E_W E_H))² / (2√(E_W E_H)), with E_H = ‖h_i‖² and E_W = ‖w_{y_i}‖². Its minimum,
    0, is at cosine 1, for any norms. The gradient treats both norms as constants; with respect to h_i it is
    −(1 − cos) w_{y_i}. It pulls each feature towards the vector of its class and does not push it away from the others.
    The class vectors must therefore be fixed and separated, like those of an ETF; trained class vectors would move
    towards each other.

    Features of a head with feature norm τ have E_H = τ². Without a feature norm, E_H is the squared norm of the
    feature.

    With ``class_lengths`` (K,), positive, √E_W is given per class, and only the directions of the rows of the weight
    are used. Yang et al. use √(n/n_k), where n_k is the number of samples of class k in the batch, and n its mean.

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
    batch = Batch(features, targets, weight, ignore_index, class_weights)
    with torch.autocast(features.device.type, enabled=False):
        class_vectors = batch.weight
        if class_lengths is not None:
            check_class_values("class_lengths", class_lengths, len(weight), positive=True)
            class_vectors = unit_rows(class_vectors) * class_lengths.detach().to(class_vectors)[:, None]
        positives = class_vectors[batch.targets]
        smallest = torch.finfo(positives.dtype).tiny  # zero features are pulled to their class vectors as well
        radii, lengths = (row_norms(rows.detach()).clamp_min(smallest) for rows in (batch.features, positives))
        cosines = (batch.features / radii * (positives / lengths)).sum(-1)
        return batch.mean(0.5 * (radii * lengths)[:, 0] * (cosines - 1).square())


def center_loss(
    features: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    radius: float | None = None,
    class_weights: Tensor | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Squared distance of each feature from the vector of its class: mean_i ½‖h_i − w_{y_i}‖².

    With the rows of a head as centres, the loss pulls features towards the row of their class and, if the rows are
    trained, the rows towards the features. Like `dot_regression`, it does not push classes apart.

    By default the centres are w_k.
    With ``radius`` ρ > 0, the centres are ρ w_k/‖w_k‖. For unit rows and features of norm τ, use ρ = τ.

    Arguments, result and errors: see `neuralcollapse.losses`.

    Source: Wen et al., "A discriminative feature learning approach for deep face recognition" (ECCV 2016), equation 2,
    divided by the number of samples; in that paper, the centres are moving class means.

    Examples:
        >>> import torch
        >>> from neuralcollapse import simplex_etf
        >>> etf = simplex_etf(4)
        >>> bool(center_loss(5 * etf, torch.arange(4), etf, radius=5.0) < 1e-9)
        True
    """
    batch = Batch(features, targets, weight, ignore_index, class_weights)
    if radius is not None and not (is_number(radius) and radius > 0):
        raise ValueError(f"radius must be a positive number or None, got {radius!r}")
    with torch.autocast(features.device.type, enabled=False):
        centers = batch.weight if radius is None else radius * unit_rows(batch.weight)
        return batch.mean(0.5 * (batch.features - centers[batch.targets]).square().sum(-1))


class _Scores(Batch):
    """Scores s (N, K) of a batch, and the per-sample terms (N,) of the losses."""

    def __init__(
        self,
        features: Tensor,
        targets: Tensor,
        weight: Tensor,
        temperature: float,
        ignore_index: int | None,
        class_weights: Tensor | None = None,
        prior: Tensor | None = None,
        prior_scale: float = 1.0,
    ) -> None:
        if not (is_number(temperature) and temperature > 0):
            raise ValueError(f"temperature must be a positive number, got {temperature!r}")
        super().__init__(features, targets, weight, ignore_index, class_weights)
        with torch.autocast(features.device.type, enabled=False):
            self.values = unit_rows(self.features) @ unit_rows(self.weight).T / temperature
            shift = log_prior(prior, prior_scale, self.values, len(weight))
            self.values = self.values if shift is None else self.values + shift
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
                "the batch has no samples of other classes: the logarithm is left out of the loss "
                "(use larger batches or a finite margin)",
                stacklevel=3,
            )
        return sums.where(nonempty, 0) - self.positives


def _log_sum_of_columns(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp of each column over all ranks (K,), and whether the column has any term.

    If all scores of a column are −∞, the result is −∞, with gradient 0.
    """
    rows = scores if len(scores) else scores.new_full((1, scores.shape[1]), -math.inf)
    greatest = greatest_over_ranks(rows.amax(0))
    nonempty = greatest != -math.inf  # NaN counts as nonempty, so that it propagates
    greatest = greatest.where(nonempty, 0)
    sums = sum_over_ranks((scores - greatest).exp().sum(0))
    return (greatest + sums.where(nonempty, 1).log()).where(nonempty, -math.inf), nonempty


def _check_margin(margin: float) -> None:
    if not ((is_number(margin) and margin >= 0) or margin == math.inf):
        raise ValueError(f"margin must be at least 0 (math.inf included), got {margin!r}")
