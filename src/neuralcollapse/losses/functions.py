"""The losses as functions of features, targets and a weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neuralcollapse._checks import check_finite, check_floating, values_readable
from neuralcollapse.losses.scores import DEFAULT_TEMPERATURE, Batch, Scores, check_margin, row_norms, unit_rows


def normface(
    features: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    temperature: float = DEFAULT_TEMPERATURE,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Cross-entropy of cosines (NormFace): mean_i [ log Σ_k e^{s_ik} − s_{i,y_i} ].

    Args:
        features: h (..., d).
        targets: y (...), integers in [0, K) or ``ignore_index``.
        weight: (K, d).
        temperature: t > 0.
        ignore_index: Samples with this target count nowhere.

    Returns:
        A scalar; 0 where no sample counts.

    Raises:
        ValueError: A temperature that is not positive, or tensors of other shapes or kinds; on a CPU also labels out of
            range, and features or a weight that are not finite.

    Source: Wang, Xiang, Cheng, Yuille, "NormFace" (ACM Multimedia 2017).

    Examples:
        >>> import torch
        >>> from neuralcollapse import simplex_etf
        >>> etf = simplex_etf(4)
        >>> round(float(normface(etf, torch.arange(4), etf)), 6)
        5e-06
    """
    return decoupled_cross_entropy(
        features, targets, weight, temperature=temperature, margin=0.0, ignore_index=ignore_index
    )


def decoupled_cross_entropy(
    features: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    temperature: float = DEFAULT_TEMPERATURE,
    margin: float = math.inf,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Cross-entropy of cosines, the positive held back by a margin.

    mean_i [ log(e^{s_{i,y_i}−m} + Σ_{k≠y_i} e^{s_ik}) − s_{i,y_i} ], CosFace's loss less the constant m. At m = 0 it is
    `normface`; at m = ∞ the positive has left the denominator.

    Args:
        features: h (..., d).
        targets: y (...), integers in [0, K) or ``ignore_index``.
        weight: (K, d).
        temperature: t > 0.
        margin: m ≥ 0, ``math.inf`` included, in units of s: 1/t times a margin of cosines.
        ignore_index: Samples with this target count nowhere.

    Returns:
        A scalar; 0 where no sample counts.

    Raises:
        ValueError: As `normface`; or a margin that is negative.

    Source: Wang et al., "CosFace" (CVPR 2018); Yeh et al., "Decoupled contrastive learning" (ECCV 2022) for m = ∞.

    Examples:
        >>> import torch
        >>> from neuralcollapse import simplex_etf
        >>> etf = simplex_etf(4)
        >>> loss = decoupled_cross_entropy(etf, torch.arange(4), etf)  # log 3 − K/((K−1)t)
        >>> round(float(loss), 3)
        -12.235
    """
    scores = Scores(features, targets, weight, temperature, ignore_index)
    check_margin(margin)
    return scores.mean(scores.among_classes(margin))


def ntce(
    features: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    temperature: float = DEFAULT_TEMPERATURE,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Cross-entropy over the samples of the batch: mean_i [ log Σ_j e^{s_{j,y_i}} − s_{i,y_i} ].

    The sum is over all samples j, those of the same class included: with n of each class it is at least log n.

    Args:
        features: h (..., d).
        targets: y (...), integers in [0, K) or ``ignore_index``.
        weight: (K, d).
        temperature: t > 0.
        ignore_index: Samples with this target count nowhere.

    Returns:
        A scalar; 0 where no sample counts.

    Raises:
        ValueError: As `normface`.

    Source: NTCE of Koromilas et al., "Neural Collapse by Design" (ICML 2026), arXiv 2605.20302.

    Examples:
        >>> import torch
        >>> from neuralcollapse import simplex_etf
        >>> etf = simplex_etf(4)
        >>> batch = etf.repeat(8, 1), torch.arange(4).repeat(8)
        >>> float(ntce(*batch, etf)) - math.log(8) < 1e-4
        True
    """
    scores = Scores(features, targets, weight, temperature, ignore_index)
    return scores.mean(scores.among_all_samples())


def nonl(
    features: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    temperature: float = DEFAULT_TEMPERATURE,
    margin: float = math.inf,
    bidirectional: bool = False,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Each sample against the batch's samples of other classes, for the vector of its class.

    mean_i [ log(e^{s_{i,y_i}−m} + Σ_{j: y_j≠y_i} e^{s_{j,y_i}}) − s_{i,y_i} ]. In the published loss m = ∞: the
    positive is not in the denominator. There, a batch of one class has nothing to sum over: the logarithm is left out,
    and on a CPU a warning says so.

    With ``bidirectional`` the sum has the sample's scores with the other class vectors as well, Σ_{k≠y_i} e^{s_ik}: one
    logarithm of rows and columns together, where `two_way` is the mean of two.

    Args:
        features: h (..., d).
        targets: y (...), integers in [0, K) or ``ignore_index``.
        weight: (K, d).
        temperature: t > 0.
        margin: m ≥ 0, ``math.inf`` included, in units of s.
        bidirectional: Compare with the other class vectors too.
        ignore_index: Samples with this target count nowhere.

    Returns:
        A scalar; 0 where no sample counts.

    Raises:
        ValueError: As `normface`; or a margin that is negative.

    Source: NONL of Koromilas et al., "Neural Collapse by Design" (ICML 2026), arXiv 2605.20302; ``bidirectional`` as in
    the released code.

    Examples:
        >>> import torch
        >>> from neuralcollapse import simplex_etf
        >>> etf = simplex_etf(4)
        >>> round(float(nonl(etf, torch.arange(4), etf)), 3)
        -12.235
    """
    scores = Scores(features, targets, weight, temperature, ignore_index)
    check_margin(margin)
    return scores.mean(scores.among_samples_of_other_classes(margin, and_classes=bidirectional))


def two_way(
    features: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    temperature: float = DEFAULT_TEMPERATURE,
    margin: float = math.inf,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Half `decoupled_cross_entropy` and half `nonl`, of one margin: rows and columns alike.

    Args:
        features: h (..., d).
        targets: y (...), integers in [0, K) or ``ignore_index``.
        weight: (K, d).
        temperature: t > 0.
        margin: m ≥ 0, ``math.inf`` included, in units of s.
        ignore_index: Samples with this target count nowhere.

    Returns:
        A scalar; 0 where no sample counts.

    Raises:
        ValueError: As `normface`; or a margin that is negative.

    Examples:
        >>> import torch
        >>> from neuralcollapse import NearestETFClassifier
        >>> head = NearestETFClassifier(64, 10, bias="none")
        >>> features, targets = torch.randn(32, 64, requires_grad=True), torch.randint(10, (32,))
        >>> prepared, weight, _ = head.prepare(features, targets)
        >>> two_way(prepared, targets, weight, margin=3.0).backward()
    """
    scores = Scores(features, targets, weight, temperature, ignore_index)
    check_margin(margin)
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
    r"""Squared distance of each feature's product with the vector of its class from its greatest value.

    mean_i (w_{y_i}ᵀh_i − √(E_W E_H))² / (2√(E_W E_H)), with E_H = ‖h_i‖² and E_W = ‖w_{y_i}‖². The minimum, 0, is at
    cosine 1, for any norms. Both are constants for the gradient, which is −(1 − cos) w_{y_i} in h_i: it pulls each
    feature to the vector of its class and does not push it from the others. So the class vectors have to be apart by
    themselves, as those of an ETF are; vectors that are trained move together.

    Features of a head with a feature norm τ have E_H = τ². Without one, E_H is each feature's own squared norm.

    Args:
        features: h (..., d).
        targets: y (...), integers in [0, K) or ``ignore_index``.
        weight: (K, d).
        class_lengths: (K,), positive: √E_W of each class, in place of the norms of the rows, whose directions alone
            count then. Yang et al. take √(n/n_k) for n_k samples of class k in the batch, n on the average.
        ignore_index: Samples with this target count nowhere.

    Returns:
        A scalar; 0 where no sample counts.

    Raises:
        ValueError: If tensors are of other shapes or kinds, or ``class_lengths`` are not positive; on a CPU also if
            labels are out of range, or features or a weight are not finite.

    Source: Yang et al., "Inducing neural collapse in imbalanced learning" (NeurIPS 2022), equation 8; norms without
    gradient as in the released code.

    Examples:
        >>> import torch
        >>> from neuralcollapse import simplex_etf
        >>> etf = simplex_etf(4)
        >>> bool(dot_regression(5 * etf, torch.arange(4), etf) < 1e-12)
        True
    """
    batch = Batch(features, targets, weight, ignore_index)
    with torch.autocast(features.device.type, enabled=False):
        if class_lengths is None:
            class_vectors = batch.weight
        else:
            _check_class_lengths(class_lengths, len(weight))
            class_vectors = unit_rows(batch.weight) * class_lengths.detach().to(batch.weight)[:, None]
        own = class_vectors[batch.targets]
        smallest = torch.finfo(own.dtype).tiny  # a zero feature is pulled to its class vector as well
        radii, lengths = (row_norms(rows.detach()).clamp_min(smallest) for rows in (batch.features, own))
        cosines = (batch.features / radii * (own / lengths)).sum(-1)
        return batch.mean(0.5 * (radii * lengths)[:, 0] * (cosines - 1).square())


def _check_class_lengths(class_lengths: Tensor, num_classes: int) -> None:
    check_floating("class_lengths", class_lengths)
    if class_lengths.shape != (num_classes,):
        raise ValueError(f"class_lengths must be of shape ({num_classes},), got {tuple(class_lengths.shape)}")
    if class_lengths.device.type == "cpu" and values_readable(class_lengths):
        check_finite("class_lengths", class_lengths)
        if not bool((class_lengths > 0).all()):
            raise ValueError(f"class_lengths must be positive, got {float(class_lengths.min())}")
