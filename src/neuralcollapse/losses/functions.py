"""The losses as functions of features, targets and a weight."""

from __future__ import annotations

import math

from torch import Tensor

from neuralcollapse.losses.scores import DEFAULT_TEMPERATURE, Scores, check_margin


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
    ignore_index: int | None = None,
) -> Tensor:
    r"""Each sample against the batch's samples of other classes, for the vector of its class.

    mean_i [ log(e^{s_{i,y_i}−m} + Σ_{j: y_j≠y_i} e^{s_{j,y_i}}) − s_{i,y_i} ]. In the published loss m = ∞: the
    positive is not in the denominator. There, a batch of one class has nothing to sum over: the logarithm is left out,
    and on a CPU a warning says so.

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

    Source: NONL of Koromilas et al., "Neural Collapse by Design" (ICML 2026), arXiv 2605.20302.

    Examples:
        >>> import torch
        >>> from neuralcollapse import simplex_etf
        >>> etf = simplex_etf(4)
        >>> round(float(nonl(etf, torch.arange(4), etf)), 3)
        -12.235
    """
    scores = Scores(features, targets, weight, temperature, ignore_index)
    check_margin(margin)
    return scores.mean(scores.among_samples_of_other_classes(margin))


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
