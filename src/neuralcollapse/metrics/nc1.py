"""NC1, variability collapse: convergence of the features of each class to the class mean."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from neuralcollapse._checks import check_exponent, check_finite, check_integers, check_shapes
from neuralcollapse.metrics.pairs import PairTile, kernel_of_distances, pair_statistics
from neuralcollapse.metrics.scaling import power_of_two, rescaled, square_root


class BetweenClassSpectrum(NamedTuple):
    """Leading eigenpairs of Σ_B = CᵀC/K, at most K − 1, without those whose eigenvalue counts as zero.

    Attributes:
        eigenvalues: (r,) in descending order.
        eigenvectors: (d, r) columns.
        num_classes: K.
        unit: Power of two by which C was multiplied.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    num_classes: int
    unit: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, centred_means: Tensor) -> BetweenClassSpectrum:
        """Return the spectrum from the singular values of C (K, d), since CᵀC has the squared condition number.

        It has no gradient; `nc1_pinv` and `nc1_vci` have gradients in closed form.
        """
        num_classes, feature_dim = centred_means.shape
        unit = power_of_two(centred_means)
        centred_means = centred_means * unit
        # Only the right singular vectors are needed. For K > d, the smaller matrix R of C = QR has the same ones.
        matrix = torch.linalg.qr(centred_means, mode="r")[1] if num_classes > feature_dim else centred_means
        _, singular_values, right = torch.linalg.svd(matrix, full_matrices=False)
        eigenvalues = singular_values.square() / num_classes
        rank = min(num_classes - 1, int((eigenvalues > _zero_below(eigenvalues, feature_dim)).sum()))
        return cls(eigenvalues[:rank], right[:rank].T, num_classes, unit)


def nc1_pinv(
    within_class_covariance: Tensor, centred_means: Tensor, spectrum: BetweenClassSpectrum | None = None
) -> Tensor:
    """tr(Σ_W Σ_B†)/K, within-class relative to between-class variability; 0 at collapse; NaN if C = 0.

    Σ_B† is computed from the K − 1 leading eigenpairs of Σ_B; eigenvalues below d·eps·λ₁ count as 0. The gradient
    assumes that the rank does not change, and does not divide by differences of nonzero eigenvalues.
    Source: Papyan, Han & Donoho, PNAS 2020 (Fig. 6).

    Args:
        within_class_covariance: Σ_W (d, d).
        centred_means: C (K, d).
        spectrum: Spectrum of ``centred_means``, if it is known.

    Raises:
        ValueError: if a shape or type is wrong, or values are not finite.

    Examples:
        >>> nc1_pinv(torch.eye(2), torch.tensor([[1.0, 0], [-1, 0]]))
        tensor(0.5000)
    """
    within, means, spectrum = _checked(within_class_covariance, centred_means, spectrum)
    if not len(spectrum.eigenvalues):
        return _nan_of(within, means)
    value: Tensor = _PinvTrace.apply(within, means, spectrum)
    return value


def nc1_quotient(within_class_trace: Tensor, centred_means: Tensor) -> Tensor:
    """Ratio of traces tr Σ_W / tr Σ_B; 0 at collapse; NaN if C = 0. Source: Tirer, Huang & Niles-Weed, ICML 2023.

    Args:
        within_class_trace: tr Σ_W, a scalar.
        centred_means: C (K, d).

    Raises:
        ValueError: if a shape or type is wrong.

    Examples:
        >>> nc1_quotient(torch.tensor(2.0), torch.tensor([[1.0, 0], [-1, 0]]))
        tensor(2.)
    """
    check_shapes(centred_means=(centred_means, "K d"), within_class_trace=(within_class_trace, ""))
    factor = power_of_two(centred_means)
    between = (centred_means * factor).square().sum()
    return within_class_trace * factor * factor * len(centred_means) / torch.where(between > 0, between, torch.nan)


def nc1_cdnv(class_means: Tensor, within_class_variances: Tensor, *, power: float = 1.0) -> Tensor:
    """Class-distance normalised variance: mean over pairs of (v_k + v_l)/(2‖M_k − M_l‖^{2p}); 0 at collapse.

    The value is NaN if two classes have the same mean, up to rounding.
    Source: Galanti, György & Hutter, ICLR 2022 (p = 1).

    Args:
        class_means: (K, d), centred or not.
        within_class_variances: v (K,), mean squared distance of the samples of each class to the class mean.
        power: p.

    Raises:
        ValueError: if a shape or type is wrong, or the power is not positive.

    Examples:
        >>> nc1_cdnv(torch.tensor([[1.0, 0], [-1, 0]]), torch.tensor([1.0, 3.0]))
        tensor(0.5000)
    """
    check_shapes(class_means=(class_means, "K d"), within_class_variances=(within_class_variances, "K"))
    check_exponent("power", power)
    ratios = partial(cdnv, within_class_variances=within_class_variances, power=power)
    return pair_statistics(class_means, {"cdnv": ratios})["cdnv"].mean


def cdnv(tile: PairTile, within_class_variances: Tensor, power: float = 1.0) -> Tensor:
    """Return (v_k + v_l)/(2‖M_k − M_l‖^{2p}) of each pair of a tile of class means; `nc1_cdnv` is the mean."""
    scaled = within_class_variances * tile.unit ** (2 * power)
    variances = (scaled[tile.rows][:, None] + scaled[tile.columns]) / 2
    return kernel_of_distances(tile.squared_distances, lambda squared: variances / squared**power, torch.nan)


def nc1_vci(
    within_class_covariance: Tensor, centred_means: Tensor, spectrum: BetweenClassSpectrum | None = None
) -> Tensor:
    """Variability collapse index 1 − tr((Σ_W + Σ_B)† Σ_B)/r, r = min(d, K − 1); 0 at collapse, 1 at most.

    With Σ_B = VΛVᵀ it equals tr((S + Λ)⁻¹S)/r, S = (VᵀΣ_W†V)⁻¹, which is accurate in deep collapse. If the rank of Σ_B
    is less than r, each missing eigenpair adds 1/r. S is computed as the Schur complement A − B D†Bᵀ of Σ_W in the
    basis [V, V⊥]. The complement equals the inverse above if Σ_W is regular, and is its limit if Σ_W is singular:
    directions of V without within-class variation count as collapsed. The index is 0 if Σ_W = 0 and NaN if C = 0. The
    gradient assumes that the ranks do not change. Source: Xu & Liu, ICML 2023.

    Args:
        within_class_covariance: Σ_W (d, d).
        centred_means: C (K, d).
        spectrum: Spectrum of ``centred_means``, if it is known.

    Raises:
        ValueError: if a shape or type is wrong.

    Examples:
        >>> nc1_vci(torch.eye(2), torch.tensor([[1.0, 0], [-1, 0]]))
        tensor(0.5000)
    """
    within, means, spectrum = _checked(within_class_covariance, centred_means, spectrum)
    if not len(spectrum.eigenvalues):
        return _nan_of(within, means)
    value: Tensor = _CollapseIndex.apply(within, means, spectrum)
    return value


def nc1_numerical_rank(class_scatter: Tensor, class_means: Tensor, counts: Tensor) -> Tensor:
    """Mean over k of (‖H_k‖_*/‖H_k‖_F)², H_k (n_k, d) the features of class k; 1 at collapse.

    The singular values of H_k are the roots of the min(n_k, d) leading eigenvalues of H_kᵀH_k = S_k + n_k M_kM_kᵀ;
    singular values that count as 0 have no gradient. The value is NaN if all features of a class are zero.
    Source: Zhou et al., NeurIPS 2022.

    Args:
        class_scatter: (K, d, d) scatter S_k of each class.
        class_means: M (K, d), not centred.
        counts: n (K,).

    Raises:
        ValueError: if a shape or type is wrong.

    Examples:
        >>> nc1_numerical_rank(torch.zeros(2, 3, 3), torch.eye(2, 3), torch.tensor([5, 7]))
        tensor(1.)
    """
    check_shapes(class_means=(class_means, "K d"), class_scatter=(class_scatter, "K d d"))
    check_integers("counts", counts, len(class_means))
    ranks = []
    for scatter, mean, count in zip(class_scatter, class_means, counts.tolist(), strict=True):
        unit = power_of_two(mean, scatter.detach().diagonal().clamp(min=0).sqrt())
        second_moment = scatter * unit * unit + count * torch.outer(mean * unit, mean * unit)
        ranks.append(rank_of_gram(second_moment, min(count, len(mean)), len(mean)))
    return torch.stack(ranks).mean()


def rank_of_features(features: Tensor) -> Tensor:
    """Return (‖H‖_*/‖H‖_F)² of the features H (n, d) of a class; `nc1_numerical_rank` is the mean over classes.

    Examples:
        >>> rank_of_features(torch.eye(3, 5))
        tensor(3.)
    """
    count, feature_dim = features.shape
    rows = rescaled(features)
    return rank_of_gram(rows @ rows.T if count < feature_dim else rows.T @ rows, min(count, feature_dim), feature_dim)


def rank_of_gram(gram: Tensor, rank: int, feature_dim: int) -> Tensor:
    """Return (‖H‖_*/‖H‖_F)² from the ``rank`` leading eigenvalues of HᵀH or HHᵀ."""
    eigenvalues = torch.linalg.eigvalsh((gram + gram.mT) / 2).flip(0)[:rank]
    positive = eigenvalues.detach() > _zero_below(eigenvalues.detach(), feature_dim)
    eigenvalues = torch.where(positive, eigenvalues, 0)
    total = eigenvalues.sum()
    return square_root(eigenvalues).sum().square() / torch.where(total > 0, total, torch.nan)


def _zero_below(eigenvalues: Tensor, feature_dim: int) -> Tensor:
    """Return the bound d·eps·λ₁, below which an eigenvalue counts as zero."""
    return feature_dim * torch.finfo(eigenvalues.dtype).eps * eigenvalues.max().clamp(min=0)


def _checked(
    within: Tensor, means: Tensor, spectrum: BetweenClassSpectrum | None
) -> tuple[Tensor, Tensor, BetweenClassSpectrum]:
    """Return the symmetric part of Σ_W and C, both in the units of the spectrum, and the spectrum of C."""
    check_shapes(centred_means=(means, "K d"), within_class_covariance=(within, "d d"))
    check_finite("centred_means", means)
    check_finite("within_class_covariance", within)
    if spectrum is None:
        spectrum = BetweenClassSpectrum.of(means)
    within, means = within * spectrum.unit * spectrum.unit, means * spectrum.unit
    return (within + within.T) / 2, means, spectrum


def _nan_of(*tensors: Tensor) -> Tensor:
    """Return NaN, with the autograd graph of the tensors."""
    return torch.stack([tensor.sum() for tensor in tensors]).sum() * torch.nan


class _Between(NamedTuple):
    """Singular value decomposition C = U diag(σ) Vᵀ, with flags of the nonzero singular values."""

    left: Tensor
    values: Tensor
    right: Tensor
    nonzero: Tensor

    @classmethod
    def of(cls, means: Tensor, rank: int) -> _Between:
        left, values, right = torch.linalg.svd(means, full_matrices=False)
        return cls(left, values, right.T, torch.arange(len(values), device=means.device) < rank)

    def gradient(self, outer: Tensor, differences: Callable[[Tensor, Tensor], Tensor], outside: Tensor) -> Tensor:
        """Return the gradient in C of a function of φ(CᵀC), where φ is 0 for eigenvalues that count as 0.

        With G the gradient with respect to φ(CᵀC), it is 2C·V(Φ∘VᵀGV)Vᵀ. The entries of Φ are divided differences of φ
        (Daleckii & Krein): a polynomial in the inverses of λ_i and λ_j if both are nonzero, φ(λ_i)/(λ_i − λ_j) if only
        λ_i is nonzero, else 0.

        Args:
            outer: (r, d) rows v_iᵀG for the nonzero eigenvalues.
            differences: Φ as a function of nonzero eigenvalues (r, 1) and (1, r).
            outside: (r,) φ(λ_i)/λ_i, the entries of Φ for a direction in which C is zero.
        """
        count = int(self.nonzero.sum())
        eigenvalues = self.values.square()
        leading, others = eigenvalues[:count, None], eigenvalues[count:]
        inside = outer @ self.right
        gaps = leading - others
        gaps = torch.where(gaps > torch.finfo(gaps.dtype).eps * leading, gaps, torch.inf)  # 0 for equal eigenvalues
        mixed = (outside[:, None] * leading / gaps) * inside[:, count:]
        rows = torch.cat([differences(leading, leading.T) * inside[:, :count], mixed], dim=1) @ self.right.T
        rows = rows + outside[:, None] * (outer - inside @ self.right.T)
        of_others = mixed.T @ self.right[:, :count].T
        return 2 * self.left @ (self.values[:, None] * torch.cat([rows, of_others]))


class _PinvTrace(torch.autograd.Function):
    """Trace tr(Σ_W Σ_B†)/K = Σ_i v_iᵀΣ_W v_i/σ_i² over the nonzero singular values σ_i of C."""

    @staticmethod
    def forward(within: Tensor, means: Tensor, spectrum: BetweenClassSpectrum) -> Tensor:
        eigenvalues, eigenvectors, num_classes, _ = spectrum
        projected = (eigenvectors * (within @ eigenvectors)).sum(dim=0)
        return (projected / eigenvalues).sum() / num_classes

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        within, means, spectrum = inputs
        ctx.save_for_backward(within, means)
        ctx.rank = len(spectrum.eigenvalues)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        within, means = ctx.saved_tensors
        between = _Between.of(means, ctx.rank)
        leading = between.right[:, : ctx.rank]
        inverse = between.values[: ctx.rank].square().reciprocal()
        of_means = between.gradient(leading.T @ within, lambda a, b: -1 / (a * b), inverse.square())
        return gradient * (leading * inverse) @ leading.T, gradient * of_means, None


class _CollapseIndex(torch.autograd.Function):
    """Index tr((S + Λ)⁻¹S)/r plus 1/r for each missing eigenpair of Σ_B; see `nc1_vci`.

    With T = Σ_W + Σ_B, its gradient is T†Σ_BT†/r in Σ_W and −T†Σ_WT†/r in Σ_B. With X = T†V = (V − V⊥D†Bᵀ)(S + Λ)⁻¹,
    which is computed without cancellation, T†Σ_BT† = XΛXᵀ and, along V, VᵀT†Σ_WT† = (S(S + Λ)⁻¹)ᵀXᵀ.
    """

    @staticmethod
    def forward(within: Tensor, means: Tensor, spectrum: BetweenClassSpectrum) -> Tensor:
        eigenvalues, basis, num_classes, _ = spectrum
        feature_dim, basis_size = basis.shape
        rank = min(feature_dim, num_classes - 1)
        shorted, _ = _schur_complement(within, basis)
        uncollapsed = torch.linalg.solve(shorted + eigenvalues.diag(), shorted).trace()
        return (uncollapsed + (rank - basis_size)) / rank

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        within, means, spectrum = inputs
        ctx.save_for_backward(within, means)
        ctx.rank = len(spectrum.eigenvalues)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        within, means = ctx.saved_tensors
        num_classes, feature_dim = means.shape
        rank = min(feature_dim, num_classes - 1)
        between = _Between.of(means, ctx.rank)
        basis, eigenvalues = between.right[:, : ctx.rank], between.values[: ctx.rank].square() / num_classes
        shorted, reduced = _schur_complement(within, basis)
        inverse = torch.linalg.inv(shorted + eigenvalues.diag())
        columns = reduced @ inverse
        of_within = (columns * eigenvalues) @ columns.T / rank
        of_between = -(shorted @ inverse).T @ columns.T / rank
        ones = torch.ones_like(eigenvalues)
        of_means = between.gradient(of_between, lambda a, b: torch.ones_like(a * b), ones) / num_classes
        return gradient * of_within, gradient * of_means, None


def _schur_complement(within: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return S = A − B D†Bᵀ of Σ_W in the basis [V, V⊥], and V − V⊥D†Bᵀ = T†V(S + Λ)."""
    feature_dim, basis_size = basis.shape
    within_basis = within @ basis
    shorted = basis.T @ within_basis
    if basis_size == feature_dim:
        return shorted, basis
    complement = torch.linalg.qr(basis, mode="complete")[0][:, basis_size:]
    values, vectors = torch.linalg.eigh(complement.T @ within @ complement)
    positive = values > _zero_below(values, feature_dim)
    vectors, scale = vectors[:, positive], values[positive].sqrt()
    half = (complement.T @ within_basis).T @ vectors / scale
    return shorted - half @ half.T, basis - complement @ (vectors / scale) @ half.T
