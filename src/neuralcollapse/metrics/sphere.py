"""What losses on the sphere are compared by: how unit features and unit classifier rows align, and what they share.

u = h/‖h‖ and ŵ_k = w_k/‖w_k‖, neither of them centred.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from neuralcollapse._checks import check_targets
from neuralcollapse.metrics.doors import check_integers, check_shapes

_NO_ENTROPY = 1e-12  # below this an entropy is rounding error


def instance_alignment(features: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Mean over the samples of ‖u_i − ŵ_y‖²; 0 at collapse, 4 at most.

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
    _check(features, targets, weight)
    return (_unit(features.to(weight.dtype)) - _unit(weight)[targets]).square().sum(1).mean()


def class_alignment(features: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Mean over the classes present of ‖û_k − ŵ_k‖²; 0 at collapse, 4 at most.

    û_k is the mean of a class's u, scaled to unit norm.
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
    _check(features, targets, weight)
    sums, present = unit_class_sums(features, targets, weight)
    return alignment_of_sums(sums[present], weight[present])


def matrix_information(features: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """MIR and HDR of the features with the classifier rows of their labels, from entropies of N × N kernels.

    With K₁ = UUᵀ/N of the unit features, K₂ the same of the rows ŵ_y, and H the entropy of a kernel's eigenvalues,

        MIR = (H(K₁) + H(K₂) − H(N K₁∘K₂))/min(H(K₁), H(K₂)),   HDR = |H(K₁) − H(K₂)|/max(H(K₁), H(K₂)).

    At collapse of K balanced classes to a simplex ETF, MIR is 1/(K−1) + (K−2)log(K−2)/((K−1)log(K−1)) and HDR 0. Where
    the lesser entropy is 0, as at collapse of two classes, there is nothing to share and MIR is 0; HDR is 0 where both
    are. Costs the eigenvalues of a matrix of N or d·rank(W) rows, whichever is less: give a few thousand samples at
    most.

    Source: Song et al., "Unveiling the dynamics of information interplay" (ICML 2024, arXiv 2406.03999), there between
    class means and weights; of samples in Koromilas et al., ICML 2026 (arXiv 2605.20302).

    Args:
        features: h (N, d).
        targets: (N,) classes in [0, K).
        weight: W (K, d).

    Returns:
        MIR and HDR, each in [0, 1].

    Raises:
        ValueError: Another shape or type, no samples, or targets out of range.

    Examples:
        >>> from neuralcollapse import simplex_etf
        >>> targets = torch.arange(12) % 4
        >>> mir, hdr = matrix_information(simplex_etf(4)[targets], targets, simplex_etf(4))
        >>> round(float(mir), 4), float(hdr) < 1e-6
        (0.754, True)
    """
    _check(features, targets, weight)
    if not len(features):
        raise ValueError("features must hold a sample, got none")
    present, members = targets.unique(return_inverse=True)
    rows = _unit(weight[present].double())
    left, singular, _ = torch.linalg.svd(rows, full_matrices=False)
    kept = singular > max(rows.shape) * torch.finfo(rows.dtype).eps * singular[0]
    own = (left[:, kept] * singular[kept])[members]  # the rows of the labels, in coordinates of their span
    unit = _unit(features.double())
    if unit.shape[1] * own.shape[1] < len(unit):
        joint = _entropy((unit[:, :, None] * own[:, None, :]).flatten(1))
    else:
        joint = _kernel_entropy((unit @ unit.T) * (own @ own.T))
    return _ratios(_entropy(unit), _entropy(own), joint)


def released_matrix_information(features: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """MIR and HDR as Koromilas et al.'s code has them, to compare with their figures: noise at collapse.

    Of K × K kernels: that of the weight's unit rows, and that of û_k − ū/‖ū‖, of unit norm, with ū the mean of all u.
    At collapse ū is all but zero; scaled to norm 1 it is a direction of rounding error, which is then taken from every
    mean: HDR can be 0.2 on an exact ETF, where `matrix_information` has 0.

    Source: the code released with arXiv 2605.20302.

    Args:
        features: h (N, d).
        targets: (N,) classes in [0, K).
        weight: W (K, d).

    Returns:
        MIR and HDR, of the classes present.

    Raises:
        ValueError: Another shape or type, no samples, or targets out of range.

    Examples:
        >>> targets = torch.arange(6) % 3
        >>> mir, hdr = released_matrix_information(torch.eye(3)[targets], targets, torch.eye(3))
        >>> bool(hdr > 0.01)
        True
    """
    _check(features, targets, weight)
    if not len(features):
        raise ValueError("features must hold a sample, got none")
    sums, present = unit_class_sums(features, targets, weight)
    return released_information_of_sums(sums[present], weight[present])


def unit_class_sums(features: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sums (K, d) of each class's unit features, and which classes have one (K,)."""
    sums = torch.zeros_like(weight).index_add_(0, targets, _unit(features.to(weight.dtype)))
    return sums, torch.zeros(len(weight), dtype=torch.bool, device=weight.device).index_fill_(0, targets, True)


def alignment_of_sums(sums: Tensor, weight: Tensor) -> Tensor:
    """`class_alignment` of `unit_class_sums`."""
    return (_unit(sums) - _unit(weight)).square().sum(1).mean()


def released_information_of_sums(sums: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`released_matrix_information` of `unit_class_sums`."""
    rows = _unit(weight.double())
    means = _unit(_unit(sums.double()) - _unit(sums.double().sum(0, keepdim=True)))
    joint = _kernel_entropy((means @ means.T) * (rows @ rows.T))
    return _ratios(_entropy(means), _entropy(rows), joint)


def _check(features: Tensor, targets: Tensor, weight: Tensor) -> None:
    check_shapes(features=(features, "N d"), weight=(weight, "K d"))
    check_integers("targets", targets, len(features))
    check_targets(targets, len(features), len(weight), values=targets.device.type == "cpu")


def _unit(rows: Tensor) -> Tensor:
    return normalize(rows, dim=1, eps=torch.finfo(rows.dtype).tiny)


def _entropy(rows: Tensor) -> Tensor:
    """The entropy of the kernel XXᵀ/N, from the smaller of its two sides."""
    return _kernel_entropy(rows.T @ rows if rows.shape[1] < len(rows) else rows @ rows.T)


def _kernel_entropy(kernel: Tensor) -> Tensor:
    """−Σ λ log λ over the eigenvalues of a kernel scaled to trace 1; 0 of one that is 0."""
    eigenvalues = torch.linalg.eigvalsh(kernel / kernel.trace().clamp_min(torch.finfo(kernel.dtype).tiny))
    return torch.special.entr(eigenvalues.clamp_min(0)).sum()


def _ratios(first: Tensor, second: Tensor, joint: Tensor) -> tuple[Tensor, Tensor]:
    """MIR and HDR of the entropies."""
    less, more = torch.minimum(first, second), torch.maximum(first, second)
    mir = torch.where(less > _NO_ENTROPY, (first + second - joint) / less, 0)
    return mir, torch.where(more > _NO_ENTROPY, (more - less) / more, 0)
