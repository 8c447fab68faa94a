"""What losses on the sphere are compared by: how unit features and unit classifier rows align, and what they share.

u = h/‖h‖ and ŵ_k = w_k/‖w_k‖, neither of them centred.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuralcollapse._checks import check_finite, check_samples
from neuralcollapse.metrics.scaling import unit_rows

_NO_ENTROPY = 1e-12  # below this an entropy is rounding error


def instance_alignment(features: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Mean over the samples of ‖u_i − ŵ_y‖²; 0 at collapse, 4 at most; NaN with a zero feature or row.

    Source: Koromilas et al., ICML 2026 (arXiv 2605.20302).

    Args:
        features: h (N, d).
        targets: (N,) classes in [0, K).
        weight: W (K, d).

    Raises:
        ValueError: Another shape or type, or targets out of range.

    Examples:
        >>> instance_alignment(torch.tensor([[2.0, 0], [0, 3]]), torch.tensor([0, 0]), torch.eye(2))
        tensor(1.)
    """
    targets = check_samples(features, targets, weight)
    return (unit_rows(features.to(weight.dtype)) - unit_rows(weight)[targets]).square().sum(1).mean()


def class_alignment(features: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Mean over the classes present of ‖û_k − ŵ_k‖²; 0 at collapse, 4 at most.

    û_k is the mean of a class's u, scaled to unit norm. NaN with a zero feature, mean or row.
    Source: Koromilas et al., ICML 2026 (arXiv 2605.20302).

    Args:
        features: h (N, d).
        targets: (N,) classes in [0, K).
        weight: W (K, d).

    Raises:
        ValueError: Another shape or type, or targets out of range.

    Examples:
        >>> features = torch.tensor([[2.0, 1], [2, -1], [0, -3]])
        >>> class_alignment(features, torch.tensor([0, 0, 1]), torch.eye(2))
        tensor(2.)
    """
    targets = check_samples(features, targets, weight)
    sums, present = unit_class_sums(features, targets, weight)
    return alignment_of_sums(sums[present], weight[present])


def matrix_information(features: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """MIR and HDR of the features with the classifier rows of their labels, from entropies of N × N kernels.

    With K₁ = UUᵀ/N of the unit features, K₂ the same of the rows ŵ_y, and H the entropy of a kernel's eigenvalues,

        MIR = (H(K₁) + H(K₂) − H(N K₁∘K₂))/min(H(K₁), H(K₂)),   HDR = |H(K₁) − H(K₂)|/max(H(K₁), H(K₂)).

    At collapse of K balanced classes to a simplex ETF, MIR is 1/(K−1) + (K−2)log(K−2)/((K−1)log(K−1)) and HDR 0. Where
    the lesser entropy is 0, as for features of one direction, or with an ETF of two classes, MIR is NaN; HDR is NaN
    where both are; and both with a zero feature or row. Eigenvalues under N·eps count as 0 and have no gradient. Costs
    the eigenvalues of a matrix of N or d·rank(W) rows, whichever is less: give a few thousand samples at most.

    Source: Song et al., "Unveiling the dynamics of information interplay" (ICML 2024, arXiv 2406.03999), there between
    class means and weights; of samples in Koromilas et al., ICML 2026 (arXiv 2605.20302).

    Args:
        features: h (N, d).
        targets: (N,) classes in [0, K).
        weight: W (K, d).

    Returns:
        MIR and HDR, each in [0, 1].

    Raises:
        ValueError: if an argument has another shape or type, or is not finite, there are no samples, or targets are
            out of range.

    Examples:
        >>> from neuralcollapse import simplex_etf
        >>> targets = torch.arange(12) % 4
        >>> mir, hdr = matrix_information(simplex_etf(4)[targets], targets, simplex_etf(4))
        >>> round(float(mir), 4), float(hdr) < 1e-6
        (0.754, True)
    """
    targets = _check_some(features, targets, weight)
    unit, rows = unit_rows(features.double()), unit_rows(weight.double())
    present, members = targets.unique(return_inverse=True)
    if not _all_finite(unit, rows[present]):
        return _undefined(unit, rows)
    # The rows of the labels, in coordinates of their span: to first order they do not leave it.
    _, singular, right = torch.linalg.svd(rows[present].detach(), full_matrices=False)
    kept = singular > max(len(present), rows.shape[1]) * torch.finfo(rows.dtype).eps * singular[0]
    own = (rows[present] @ right[kept].T)[members]
    if unit.shape[1] * own.shape[1] < len(unit):
        joint = _entropy((unit[:, :, None] * own[:, None, :]).flatten(1))
    else:
        joint = _kernel_entropy((unit @ unit.T) * (own @ own.T))
    return _ratios(_entropy(unit), _entropy(own), joint)


def released_matrix_information(features: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """MIR and HDR as Koromilas et al.'s code has them, to compare with their figures: noise at collapse.

    Of K × K kernels: that of the weight's unit rows, and that of û_k − ū/‖ū‖, of unit norm, with ū the mean of all u.
    At collapse ū is all but zero; scaled to norm 1 it is a direction of rounding error, which is then taken from every
    mean: HDR can be 0.2 on an exact ETF, where `matrix_information` has 0. NaN where a zero vector has no direction, or
    there is no entropy.

    Source: the code released with arXiv 2605.20302.

    Args:
        features: h (N, d).
        targets: (N,) classes in [0, K).
        weight: W (K, d).

    Returns:
        MIR and HDR, of the classes present.

    Raises:
        ValueError: if an argument has another shape or type, or is not finite, there are no samples, or targets are
            out of range.

    Examples:
        >>> targets = torch.arange(6) % 3
        >>> mir, hdr = released_matrix_information(torch.eye(3)[targets], targets, torch.eye(3))
        >>> bool(hdr > 0.01)
        True
    """
    targets = _check_some(features, targets, weight)
    sums, present = unit_class_sums(features, targets, weight)
    return released_information_of_sums(sums[present], weight[present])


def unit_class_sums(features: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sums (K, d) of each class's unit features, and which classes have one (K,)."""
    sums = torch.zeros_like(weight).index_add_(0, targets, unit_rows(features.to(weight.dtype)))
    return sums, torch.zeros(len(weight), dtype=torch.bool, device=weight.device).index_fill_(0, targets, True)


def alignment_of_sums(sums: Tensor, weight: Tensor) -> Tensor:
    """`class_alignment` of `unit_class_sums`."""
    return (unit_rows(sums) - unit_rows(weight)).square().sum(1).mean()


def released_information_of_sums(sums: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`released_matrix_information` of `unit_class_sums`."""
    rows = unit_rows(weight.double())
    means = unit_rows(unit_rows(sums.double()) - unit_rows(sums.double().sum(0, keepdim=True)))
    if not _all_finite(means, rows):
        return _undefined(means, rows)
    joint = _kernel_entropy((means @ means.T) * (rows @ rows.T))
    return _ratios(_entropy(means), _entropy(rows), joint)


def _check_some(features: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    targets = check_samples(features, targets, weight)
    if not len(features):
        raise ValueError("features must hold a sample, got none")
    check_finite("features", features)
    check_finite("weight", weight)
    return targets


def _all_finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _undefined(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Return NaN for MIR and for HDR, with the graph that the tensors have."""
    nan = torch.stack([tensor.sum() for tensor in tensors]).sum() * torch.nan
    return nan, nan.clone()


def _entropy(rows: Tensor) -> Tensor:
    """The entropy of the kernel XXᵀ/N, from the smaller of its two sides."""
    return _kernel_entropy(rows.T @ rows if rows.shape[1] < len(rows) else rows @ rows.T)


def _kernel_entropy(kernel: Tensor) -> Tensor:
    """−Σ λ log λ over the eigenvalues of a kernel scaled to trace 1."""
    eigenvalues = torch.linalg.eigvalsh(kernel / kernel.trace())
    kept = eigenvalues.detach() > len(kernel) * torch.finfo(kernel.dtype).eps
    return torch.where(kept, torch.special.entr(torch.where(kept, eigenvalues, 1)), 0).sum()


def _ratios(first: Tensor, second: Tensor, joint: Tensor) -> tuple[Tensor, Tensor]:
    """MIR and HDR of the entropies."""
    less, more = torch.minimum(first, second), torch.maximum(first, second)
    mir = (first + second - joint) / torch.where(less > _NO_ENTROPY, less, torch.nan)
    return mir, (more - less) / torch.where(more > _NO_ENTROPY, more, torch.nan)
