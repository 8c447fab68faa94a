"""Alignment of single features with the classifier rows of their classes, and the information that both share.

`alignment` centres features and rows. The other metrics are functions of u = h/‖h‖ and ŵ_k = w_k/‖w_k‖ without a
centre, and serve to compare losses on the sphere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from neuralcollapse._checks import check_finite, check_samples
from neuralcollapse.metrics.scaling import unit_deviations, unit_rows

_NO_ENTROPY = 1e-12  # below this an entropy is rounding error


def alignment(features: Tensor, targets: Tensor, weight: Tensor, center: Tensor) -> Tensor:
    """Mean over samples of cos(h − m, w_y − w̄); 1 at collapse. Source: Markou, Ajanthan & Gould, NeurIPS 2024.

    The value is NaN if a sample is at the centre or the row of its class equals the mean row, because the difference
    then has no direction.

    Args:
        features: h (N, d).
        targets: (N,) classes in [0, K).
        weight: W (K, d).
        center: m (d,), the features' centre.

    Raises:
        ValueError: if a shape or type is wrong, or targets are out of range.

    Examples:
        >>> weight = torch.tensor([[1.0, 0], [-1, 0]])
        >>> alignment(torch.tensor([[2.0, 1]]), torch.tensor([0]), weight, center=torch.tensor([0, 1.0]))
        tensor(1.)
    """
    return sample_alignments(features, targets, weight, center).mean()


def sample_alignments(features: Tensor, targets: Tensor, weight: Tensor, center: Tensor) -> Tensor:
    """Return cos(h − m, w_y − w̄) of each sample (N,); `alignment` is their mean."""
    targets = check_samples(features, targets, weight, center)
    rows = unit_deviations(weight, weight.mean(dim=0))
    return (unit_deviations(features, center).to(rows.dtype) * rows[targets]).sum(dim=1)


def instance_alignment(features: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Mean over samples of ‖u_i − ŵ_y‖²; 0 at collapse, 4 at most; NaN if a feature or row is zero.

    Source: Koromilas et al., ICML 2026 (arXiv 2605.20302).

    Args:
        features: h (N, d).
        targets: (N,) classes in [0, K).
        weight: W (K, d).

    Raises:
        ValueError: if a shape or type is wrong, or targets are out of range.

    Examples:
        >>> instance_alignment(torch.tensor([[2.0, 0], [0, 3]]), torch.tensor([0, 0]), torch.eye(2))
        tensor(1.)
    """
    return sample_distances(features, targets, weight).mean()


def sample_distances(features: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Return ‖u_i − ŵ_y‖² of each sample (N,); `instance_alignment` is their mean."""
    targets = check_samples(features, targets, weight)
    return (unit_rows(features.to(weight.dtype)) - unit_rows(weight)[targets]).square().sum(dim=1)


def class_alignment(features: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Mean over the present classes of ‖û_k − ŵ_k‖²; 0 at collapse, 4 at most.

    Here û_k is the mean of the unit features u of class k, scaled to unit norm. The value is NaN if a feature, mean or
    row is zero. Source: Koromilas et al., ICML 2026 (arXiv 2605.20302).

    Args:
        features: h (N, d).
        targets: (N,) classes in [0, K).
        weight: W (K, d).

    Raises:
        ValueError: if a shape or type is wrong, or targets are out of range.

    Examples:
        >>> features = torch.tensor([[2.0, 1], [2, -1], [0, -3]])
        >>> class_alignment(features, torch.tensor([0, 0, 1]), torch.eye(2))
        tensor(2.)
    """
    targets = check_samples(features, targets, weight)
    present = targets.unique()
    return alignment_of_sums(unit_class_sums(features, targets, weight)[present], weight[present])


def matrix_information(features: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """MIR and HDR of the features with the classifier rows of their labels, from entropies of N × N kernels.

    With K₁ = UUᵀ/N for the unit features U, K₂ the corresponding kernel of the rows ŵ_y, and H the entropy of the
    eigenvalues of a kernel,

        MIR = (H(K₁) + H(K₂) − H(N K₁∘K₂))/min(H(K₁), H(K₂)),   HDR = |H(K₁) − H(K₂)|/max(H(K₁), H(K₂)).

    At collapse of K balanced classes to a simplex ETF, MIR is 1/(K−1) + (K−2)log(K−2)/((K−1)log(K−1)) and HDR is 0.
    MIR is NaN if the smaller entropy is 0, as for features with a single direction or an ETF of two classes; HDR is NaN
    if both entropies are 0; both are NaN if a feature or row is zero. Eigenvalues below N·eps count as 0 and have no
    gradient. The function computes the eigenvalues of a matrix with min(N, d·rank(W)) rows: pass at most a few thousand
    samples.

    Source: Song et al., "Unveiling the dynamics of information interplay" (ICML 2024, arXiv 2406.03999), for class
    means and weights; Koromilas et al., ICML 2026 (arXiv 2605.20302), for samples and weights.

    Args:
        features: h (N, d).
        targets: (N,) classes in [0, K).
        weight: W (K, d).

    Returns:
        MIR and HDR, each in [0, 1].

    Raises:
        ValueError: if an argument has the wrong shape or type or is not finite, if there are no samples, or if targets
            are out of range.

    Examples:
        >>> from neuralcollapse import simplex_etf
        >>> targets = torch.arange(12) % 4
        >>> mir, hdr = matrix_information(simplex_etf(4)[targets], targets, simplex_etf(4))
        >>> round(float(mir), 4), float(hdr) < 1e-6
        (0.754, True)
    """
    entropies = kernel_entropies(features, targets, weight)
    return mutual_information_ratio(entropies), entropy_difference_ratio(entropies)


class KernelEntropies(NamedTuple):
    """Entropies of K₁, of K₂ and of their entrywise product; see `matrix_information`."""

    features: Tensor
    rows: Tensor
    joint: Tensor


def kernel_entropies(features: Tensor, targets: Tensor, weight: Tensor) -> KernelEntropies:
    """Return the entropies of `matrix_information`; NaN if a feature or row is zero."""
    targets = check_samples(features, targets, weight)
    if not len(features):
        raise ValueError("features must hold at least one sample, got none")
    check_finite("features", features)
    check_finite("weight", weight)
    unit, rows = unit_rows(features.double()), unit_rows(weight.double())
    present, members = targets.unique(return_inverse=True)
    if not (torch.isfinite(unit).all() and torch.isfinite(rows[present]).all()):
        nan = (unit.sum() + rows.sum()) * torch.nan  # with their autograd graph
        return KernelEntropies(nan, nan, nan)
    # Coordinates of the classifier rows within their span; to first order, the rows do not leave it.
    _, singular, right = torch.linalg.svd(rows[present].detach(), full_matrices=False)
    nonzero = singular > max(len(present), rows.shape[1]) * torch.finfo(rows.dtype).eps * singular[0]
    label_rows = (rows[present] @ right[nonzero].T)[members]
    if unit.shape[1] * label_rows.shape[1] < len(unit):
        joint = _entropy((unit[:, :, None] * label_rows[:, None, :]).flatten(1))
    else:
        joint = _kernel_entropy((unit @ unit.T) * (label_rows @ label_rows.T))
    return KernelEntropies(_entropy(unit), _entropy(label_rows), joint)


def mutual_information_ratio(entropies: KernelEntropies) -> Tensor:
    """Return MIR of `matrix_information`; NaN if the smaller entropy is 0."""
    first, second, joint = entropies
    least = torch.minimum(first, second)
    return (first + second - joint) / torch.where(least > _NO_ENTROPY, least, torch.nan)


def entropy_difference_ratio(entropies: KernelEntropies) -> Tensor:
    """Return HDR of `matrix_information`; NaN if both entropies are 0."""
    first, second, _ = entropies
    least, greatest = torch.minimum(first, second), torch.maximum(first, second)
    return (greatest - least) / torch.where(greatest > _NO_ENTROPY, greatest, torch.nan)


def unit_class_sums(features: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Return the sums (K, d) of the unit features of each class."""
    return torch.zeros_like(weight).index_add_(0, targets, unit_rows(features.to(weight.dtype)))


def alignment_of_sums(sums: Tensor, weight: Tensor) -> Tensor:
    """Return `class_alignment` from `unit_class_sums`."""
    return (unit_rows(sums) - unit_rows(weight)).square().sum(1).mean()


def _entropy(rows: Tensor) -> Tensor:
    """Return the entropy of the kernel XXᵀ/N, computed from the smaller of XXᵀ and XᵀX."""
    return _kernel_entropy(rows.T @ rows if rows.shape[1] < len(rows) else rows @ rows.T)


def _kernel_entropy(kernel: Tensor) -> Tensor:
    """Return −Σ λ log λ over the eigenvalues λ of a kernel scaled to trace 1."""
    eigenvalues = torch.linalg.eigvalsh(kernel / kernel.trace())
    positive = eigenvalues.detach() > len(kernel) * torch.finfo(kernel.dtype).eps
    return torch.where(positive, torch.special.entr(torch.where(positive, eigenvalues, 1)), 0).sum()
