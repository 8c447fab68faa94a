"""NC1, variability collapse: the features of a class shrink to their mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from neuralcollapse.metrics.doors import check_exponent, check_integers, check_shapes
from neuralcollapse.metrics.pairs import PairTile, pair_statistics


class BetweenClassSpectrum(NamedTuple):
    """Eigenpairs of Σ_B = CᵀC/K: the at most K − 1 leading ones, without those that count as zero.

    Attributes:
        eigenvalues: (r,) in descending order.
        eigenvectors: (d, r) columns.
        num_classes: K.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    num_classes: int

    @classmethod
    def of(cls, centred_means: Tensor) -> BetweenClassSpectrum:
        """The spectrum, from the singular values of C (K, d): forming CᵀC would square its condition number."""
        num_classes, feature_dim = centred_means.shape
        # Only the right singular vectors are needed, and R of C = QR has those of C: for K > d it is the smaller one.
        matrix = torch.linalg.qr(centred_means, mode="r")[1] if num_classes > feature_dim else centred_means
        _, singular_values, right = torch.linalg.svd(matrix, full_matrices=False)
        eigenvalues = singular_values.square() / num_classes
        rank = min(num_classes - 1, int((eigenvalues > _zero_below(eigenvalues, feature_dim)).sum()))
        return cls(eigenvalues[:rank], right[:rank].T, num_classes)


def nc1_pinv(
    within_class_covariance: Tensor, centred_means: Tensor, *, spectrum: BetweenClassSpectrum | None = None
) -> Tensor:
    """tr(Σ_W Σ_B†)/K, within-class variability measured against that between classes; 0 at collapse.

    Σ_B† is taken from the K − 1 leading eigenpairs of Σ_B; eigenvalues under d·eps·λ₁ count as 0.
    Source: Papyan, Han & Donoho, PNAS 2020 (Fig. 6).

    Args:
        within_class_covariance: Σ_W (d, d).
        centred_means: C (K, d).
        spectrum: That of ``centred_means``, when it is known already.

    Raises:
        ValueError: Another shape or type.

    Examples:
        >>> nc1_pinv(torch.eye(2), torch.tensor([[1.0, 0], [-1, 0]]))
        tensor(0.5000)
    """
    check_shapes(centred_means=(centred_means, "K d"), within_class_covariance=(within_class_covariance, "d d"))
    eigenvalues, eigenvectors, num_classes = spectrum or BetweenClassSpectrum.of(centred_means)
    projected = (eigenvectors * (within_class_covariance @ eigenvectors)).sum(dim=0)
    return (projected / eigenvalues).sum() / num_classes


def nc1_quotient(within_class_trace: Tensor, centred_means: Tensor) -> Tensor:
    """Ratio of traces tr Σ_W / tr Σ_B; 0 at collapse. Source: Tirer, Huang & Niles-Weed, ICML 2023.

    Args:
        within_class_trace: tr Σ_W, a scalar.
        centred_means: C (K, d).

    Raises:
        ValueError: Another shape or type.

    Examples:
        >>> nc1_quotient(torch.tensor(2.0), torch.tensor([[1.0, 0], [-1, 0]]))
        tensor(2.)
    """
    check_shapes(centred_means=(centred_means, "K d"), within_class_trace=(within_class_trace, ""))
    return within_class_trace * len(centred_means) / centred_means.square().sum()


def nc1_cdnv(class_means: Tensor, within_class_variances: Tensor, *, power: float = 1.0) -> Tensor:
    """Class-distance normalised variance: mean over pairs of (v_k + v_l)/(2‖M_k − M_l‖^{2p}); 0 at collapse.

    Source: Galanti, György & Hutter, ICLR 2022 (p = 1).

    Args:
        class_means: (K, d), centred or not.
        within_class_variances: v (K,), each class's mean squared distance to its mean.
        power: p.

    Raises:
        ValueError: Another shape or type, or a power that is not positive.

    Examples:
        >>> nc1_cdnv(torch.tensor([[1.0, 0], [-1, 0]]), torch.tensor([1.0, 3.0]))
        tensor(0.5000)
    """
    check_shapes(class_means=(class_means, "K d"), within_class_variances=(within_class_variances, "K"))
    check_exponent("power", power)
    ratio = cdnv_of_pairs(within_class_variances, power)
    return pair_statistics(class_means, {"cdnv": ratio})["cdnv"].mean


def cdnv_of_pairs(within_class_variances: Tensor, power: float = 1.0) -> Callable[[PairTile], Tensor]:
    """The function of a tile of pairs whose mean is `nc1_cdnv`."""

    def ratio(tile: PairTile) -> Tensor:
        left, right = within_class_variances[tile.rows], within_class_variances[tile.columns]
        return (left[:, None] + right) / (2 * tile.squared_distances**power)

    return ratio


def nc1_vci(
    within_class_covariance: Tensor, centred_means: Tensor, *, spectrum: BetweenClassSpectrum | None = None
) -> Tensor:
    """Variability collapse index 1 − tr((Σ_W + Σ_B)† Σ_B)/r, r = min(d, K − 1); 0 at collapse, 1 at most.

    With Σ_B = VΛVᵀ it equals tr((S + Λ)⁻¹S)/r, where S = (VᵀΣ_W†V)⁻¹, which loses nothing in deep collapse; each
    pair that Σ_B lacks to rank r adds 1/r. S is computed as the Schur complement A − B D†Bᵀ of Σ_W in the basis
    [V, V⊥], which is that inverse where Σ_W is regular, and its limit where Σ_W is singular: directions of V in
    which the features do not vary within classes count as collapsed. At Σ_W = 0 the index is 0.
    Source: Xu & Liu, ICML 2023.

    Args:
        within_class_covariance: Σ_W (d, d).
        centred_means: C (K, d).
        spectrum: That of ``centred_means``, when it is known already.

    Raises:
        ValueError: Another shape or type.

    Examples:
        >>> nc1_vci(torch.eye(2), torch.tensor([[1.0, 0], [-1, 0]]))
        tensor(0.5000)
    """
    check_shapes(centred_means=(centred_means, "K d"), within_class_covariance=(within_class_covariance, "d d"))
    eigenvalues, basis, num_classes = spectrum or BetweenClassSpectrum.of(centred_means)
    feature_dim, found = basis.shape
    rank = min(feature_dim, num_classes - 1)
    complement = torch.linalg.qr(basis, mode="complete")[0][:, found:]
    within_basis = within_class_covariance @ basis
    shorted = basis.T @ within_basis
    if found < feature_dim:
        values, vectors = torch.linalg.eigh(complement.T @ within_class_covariance @ complement)
        kept = values > _zero_below(values, feature_dim)
        half = (complement.T @ within_basis).T @ vectors[:, kept] / values[kept].sqrt()
        shorted = shorted - half @ half.T
    uncollapsed = torch.linalg.solve(shorted + eigenvalues.diag(), shorted).trace()
    return (uncollapsed + (rank - found)) / rank


def nc1_numerical_rank(class_scatter: Tensor, class_means: Tensor, counts: Tensor) -> Tensor:
    """Mean over k of (‖H_k‖_*/‖H_k‖_F)², H_k (n_k, d) the features of class k; 1 at collapse.

    The singular values of H_k are the roots of the min(n_k, d) leading eigenvalues of
    H_kᵀH_k = S_k + n_k M_kM_kᵀ. Source: Zhou et al., NeurIPS 2022.

    Args:
        class_scatter: (K, d, d) each class's S_k.
        class_means: M (K, d), not centred.
        counts: n (K,).

    Raises:
        ValueError: Another shape or type.

    Examples:
        >>> nc1_numerical_rank(torch.zeros(2, 3, 3), torch.eye(2, 3), torch.tensor([5, 7]))
        tensor(1.)
    """
    check_shapes(class_means=(class_means, "K d"), class_scatter=(class_scatter, "K d d"))
    check_integers("counts", counts, len(class_means))
    feature_dim = class_means.shape[1]
    ranks = []
    for scatter, mean, count in zip(class_scatter, class_means, counts.tolist(), strict=True):
        eigenvalues = torch.linalg.eigvalsh(scatter + count * torch.outer(mean, mean)).flip(0)[
            : min(count, feature_dim)
        ]
        eigenvalues = eigenvalues.where(eigenvalues > _zero_below(eigenvalues, feature_dim), 0)
        ranks.append(eigenvalues.sqrt().sum().square() / eigenvalues.sum())
    return torch.stack(ranks).mean()


def _zero_below(eigenvalues: Tensor, feature_dim: int) -> Tensor:
    """The bound under which an eigenvalue counts as zero, d·eps·λ₁."""
    return feature_dim * torch.finfo(eigenvalues.dtype).eps * eigenvalues.max().clamp(min=0)
