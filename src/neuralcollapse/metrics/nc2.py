"""NC2, convergence of class means and classifier rows to a simplex ETF, or to another frame with a given Gram matrix.

This module also contains NC0, the sum of the classifier rows, which vanishes for every simplex ETF. Metrics relative to
a Gram matrix first centre rows and code at their mean over classes, which does not change the decisions of the
classifier.

Common arguments, floating except for targets:

- ``vectors``: X (K, d), the centred class means C for metrics named ``…_means``, the weight W for ``…_weights``.
- ``weight``: W (K, d) of the classifier.
- ``centred_means``: C (K, d), class means minus their centre.
- ``code``: L (K, r) of a Gram matrix G = LLᵀ (`neuralcollapse.geometry.code_from_gram`).
- ``features``: h (N, d).
- ``targets``: (N,) classes in [0, K).
- ``center``: m (d,), the features' centre.

A metric returns a scalar, unless its docstring says otherwise. It raises ``ValueError`` if a shape or type is wrong,
and on a CPU also if targets are out of range.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from neuralcollapse._checks import check_exponent, check_samples, check_shapes
from neuralcollapse.geometry.softmax_code import one_vs_rest_margins, softmax_code
from neuralcollapse.metrics.pairs import PairTile, kernel_of_distances, pair_statistics
from neuralcollapse.metrics.scaling import rescaled, square_root, unit_deviations, unit_rows

_CANCELLATION = 1e-3  # below this value, the closed form loses more than half of its digits
_TILE_ELEMENTS = 2**22


def nc0_weight_sum(weight: Tensor) -> Tensor:
    """‖Σ_k w_k‖₂/‖W‖_F; 0 at collapse, √K at most; NaN if W = 0. Source: NC0 of arXiv 2602.16642, made scale-free.

    Arguments, result and errors: see `neuralcollapse.metrics.nc2`.

    Examples:
        >>> nc0_weight_sum(torch.tensor([[3.0, 0], [0, 4]]))
        tensor(1.)
    """
    check_shapes(weight=(weight, "K d"))
    weight = rescaled(weight)
    return torch.linalg.vector_norm(weight.sum(dim=0)) / torch.linalg.matrix_norm(weight)


def nc2_etf(vectors: Tensor) -> Tensor:
    """‖XXᵀ/‖XXᵀ‖_F − T‖_F with T = (I − 11ᵀ/K)/√(K − 1); 0 at collapse, 2 at most; NaN if X = 0.

    Source: Zhu et al., NeurIPS 2021 (NC2).

    Arguments, result and errors: see `neuralcollapse.metrics.nc2`.

    Examples:
        >>> nc2_etf(torch.tensor([[1.0, 0], [-1, 0]]))
        tensor(0.)
    """
    check_shapes(vectors=(vectors, "K d"))
    return distance_to_gram(vectors, vectors, SimplexGram(len(vectors)))


def nc2_gram(vectors: Tensor, code: Tensor) -> Tensor:
    """‖ΠXXᵀΠ/‖ΠXXᵀΠ‖_F − ΠGΠ/‖ΠGΠ‖_F‖_F, Π = I − 11ᵀ/K; 0 at collapse to a frame with Gram G = LLᵀ, √2 at most.

    The value is NaN if the rows of X, or those of L, are all equal.

    Source: `nc2_etf` (Zhu et al., NeurIPS 2021) with a given Gram matrix instead of that of a simplex ETF.

    Arguments, result and errors: see `neuralcollapse.metrics.nc2`.

    Examples:
        >>> rows = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])  # an orthoplex
        >>> bool(nc2_gram(3 * rows + 1, rows) < 1e-6), float(nc2_gram(torch.eye(4), rows)) > 0.1
        (True, True)
    """
    check_shapes(vectors=(vectors, "K d"), code=(code, "K r"))
    return distance_to_code_gram(vectors, vectors, code)


@dataclass(frozen=True)
class SimplexGram:
    """Gram matrix I − 11ᵀ/K of a simplex ETF with K rows, of Frobenius norm √(K − 1)."""

    num_classes: int

    @property
    def norm(self) -> float:
        """Frobenius norm √(K − 1)."""
        return (self.num_classes - 1) ** 0.5

    def inner_product(self, left: Tensor, right: Tensor) -> Tensor:
        """Return ⟨XYᵀ, G⟩ = ⟨X, Y⟩ − (Xᵀ1)·(Yᵀ1)/K."""
        return (left * right).sum() - left.sum(dim=0) @ right.sum(dim=0) / self.num_classes

    def subtract_from(self, product: Tensor, start: int) -> Tensor:
        """Return rows of a matrix, from row ``start`` on, minus those of G/‖G‖_F."""
        scale = (self.num_classes - 1) ** -0.5
        difference = product + scale / self.num_classes
        difference.diagonal(offset=start).sub_(scale)
        return difference


@dataclass(frozen=True)
class CodeGram:
    """Gram matrix LLᵀ of a code L (K, r)."""

    code: Tensor
    norm: Tensor

    def inner_product(self, left: Tensor, right: Tensor) -> Tensor:
        """Return ⟨XYᵀ, G⟩ = ⟨LᵀX, LᵀY⟩."""
        return ((self.code.T @ left) * (self.code.T @ right)).sum()

    def subtract_from(self, product: Tensor, start: int) -> Tensor:
        """Return rows of a matrix, from row ``start`` on, minus those of G/‖G‖_F."""
        return product - self.code[start : start + len(product)] @ self.code.T / self.norm


def distance_to_code_gram(left: Tensor, right: Tensor, code: Tensor) -> Tensor:
    """Return `distance_to_gram` of centred rows and a centred code."""
    if len(left) < 2:
        return left.new_full((), torch.nan)
    left, right, code = (_centred(rows) for rows in (left, right, code.to(left)))
    code = rescaled(code)
    return distance_to_gram(left, right, CodeGram(code, torch.linalg.matrix_norm(code.T @ code)))


def distance_to_gram(left: Tensor, right: Tensor, gram: SimplexGram | CodeGram) -> Tensor:
    """Return ‖XYᵀ/‖XYᵀ‖_F − G/‖G‖_F‖_F for X, Y (K, d), without a K × K matrix if K > d.

    The closed form uses ‖XYᵀ‖_F² = ⟨XᵀX, YᵀY⟩. If it suffers from cancellation, or if XYᵀ is the smaller matrix, the
    difference itself is computed, in tiles of rows.
    """
    num_classes, feature_dim = left.shape
    if num_classes < 2:
        return left.new_full((), torch.nan)
    left, right = rescaled(left), rescaled(right)
    if num_classes <= feature_dim:
        return _tiled_distance(left, right, gram, torch.linalg.matrix_norm(left @ right.T))
    norm = square_root(((left.T @ left) * (right.T @ right)).sum())
    squared = 2 - 2 * gram.inner_product(left, right) / (norm * gram.norm)
    if squared < _CANCELLATION**2:
        return _tiled_distance(left, right, gram, norm)
    return squared.sqrt()


def _tiled_distance(left: Tensor, right: Tensor, gram: SimplexGram | CodeGram, norm: Tensor) -> Tensor:
    step = max(1, _TILE_ELEMENTS // len(left))
    tiles = [
        torch.linalg.matrix_norm(gram.subtract_from(left[start : start + step] @ right.T / norm, start))
        for start in range(0, len(left), step)
    ]
    return torch.linalg.vector_norm(torch.stack(tiles))  # vector_norm has gradient 0 at 0


def _centred(rows: Tensor) -> Tensor:
    """Return rows minus their mean; zero if all rows are equal, up to rounding."""
    mean = rows.mean(dim=0)
    centred = rows - mean
    rounding = 4 * torch.finfo(rows.dtype).eps * torch.linalg.vector_norm(mean.detach())
    equal = torch.linalg.vector_norm(centred.detach(), dim=1).amax() <= rounding
    return torch.where(equal, 0, centred)


def nc2_equinorm(vectors: Tensor) -> Tensor:
    """Standard deviation of the norms of the rows, divided by their mean; 0 at collapse; NaN if X = 0.

    Source: Papyan et al. 2020 (Fig. 2).

    Arguments, result and errors: see `neuralcollapse.metrics.nc2`.

    Examples:
        >>> nc2_equinorm(torch.tensor([[1.0, 0], [0, -1]]))
        tensor(0.)
    """
    check_shapes(vectors=(vectors, "K d"))
    if len(vectors) < 2:
        return vectors.new_full((), torch.nan)
    norms = torch.linalg.vector_norm(rescaled(vectors), dim=1)
    return norms.std() / norms.mean()


def nc2_equinorm_difference(centred_means: Tensor, weight: Tensor) -> Tensor:
    """|equinorm of C − equinorm of W|; 0 at collapse. Source: Markou, Ajanthan & Gould, NeurIPS 2024.

    Arguments, result and errors: see `neuralcollapse.metrics.nc2`.

    Examples:
        >>> nc2_equinorm_difference(torch.eye(2), torch.eye(2))
        tensor(0.)
    """
    check_shapes(centred_means=(centred_means, "K d"), weight=(weight, "K d"))
    return (nc2_equinorm(centred_means) - nc2_equinorm(weight)).abs()


def nc2_equiangular(vectors: Tensor) -> Tensor:
    """Standard deviation of cos(x_k, x_l) over ordered pairs; 0 at collapse; NaN if a row is zero.

    Source: Papyan et al. 2020 (Fig. 3).

    Arguments, result and errors: see `neuralcollapse.metrics.nc2`.

    Examples:
        >>> nc2_equiangular(torch.eye(3))
        tensor(0.)
    """
    check_shapes(vectors=(vectors, "K d"))
    return pair_statistics(vectors, {"cos": cosines})["cos"].std


def nc2_max_angle(vectors: Tensor) -> Tensor:
    """Mean over pairs of |cos(x_k, x_l) + 1/(K − 1)|; 0 at collapse; NaN if a row is zero.

    Source: Papyan et al. 2020 (Fig. 4).

    Arguments, result and errors: see `neuralcollapse.metrics.nc2`.

    Examples:
        >>> nc2_max_angle(torch.eye(3))
        tensor(0.5000)
    """
    check_shapes(vectors=(vectors, "K d"))
    return pair_statistics(vectors, {"angle": distance_to_max_angle})["angle"].mean


def nc2_hyperspherical(vectors: Tensor, kernel: str = "dist", *, exponent: float = 1.0) -> tuple[Tensor, Tensor]:
    """Mean and variance over pairs of a kernel of the distance r between unit rows; the variance is 0 at collapse.

    Both are NaN if a row is zero and, for all kernels but ``"dist"``, if two rows have the same direction, up to
    rounding.
    Source: Liu et al., ICLR 2023; Wu & Papyan, NeurIPS 2024 (GNC2).

    Args:
        vectors: X (K, d).
        kernel: ``"dist"`` or ``"distance"``: r^s; ``"log"``: −log r^s; ``"riesz"``: 1/r^s.
        exponent: s. The metrics of `collapse_metrics` have s = 1.

    Returns:
        Mean and population variance over the pairs k < l.

    Raises:
        ValueError: if the kernel is unknown, the exponent is not positive, or the shape or type is wrong.

    Examples:
        >>> nc2_hyperspherical(torch.tensor([[1.0, 0], [-3, 0]]))
        (tensor(2.), tensor(0.))
    """
    check_shapes(vectors=(vectors, "K d"))
    check_exponent("exponent", exponent)
    kernel = "dist" if kernel == "distance" else kernel
    if not isinstance(kernel, str) or kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    return pair_statistics(vectors, {"kernel": partial(KERNELS[kernel], exponent=exponent)})["kernel"][:2]


def cos_margins(features: Tensor, targets: Tensor, weight: Tensor, center: Tensor) -> Tensor:
    """cos(h − m, w_y − w̄) − max over k ≠ y of cos(h − m, w_k − w̄) for each sample; K/(K − 1) at collapse.

    `nc2_cos_margin` is the mean of these margins. The margin of a sample at the centre is NaN, and so are all margins
    if a row of the weight equals the mean row, because the difference then has no direction.
    Source: Zhou et al., NeurIPS 2022.

    Args:
        features: h (N, d).
        targets: (N,) classes in [0, K).
        weight: W (K, d).
        center: m (d,), the features' centre.

    Returns:
        (N,) in [−2, 2].

    Raises:
        ValueError: if a shape or type is wrong, or targets are out of range.

    Examples:
        >>> weight = torch.tensor([[1.0, 0], [-1, 0]])
        >>> cos_margins(torch.tensor([[2.0, 1]]), torch.tensor([0]), weight, center=torch.tensor([0, 1.0]))
        tensor([2.])
    """
    targets = check_samples(features, targets, weight, center)
    if len(weight) < 2:
        return weight.new_full((len(features),), torch.nan)
    rows = unit_deviations(weight, weight.mean(dim=0))
    step = max(1, _TILE_ELEMENTS // len(weight))
    margins = []
    for block, labels in zip(features.split(step), targets.split(step), strict=True):
        cosine = unit_deviations(block, center).to(rows.dtype) @ rows.T
        of_target = cosine.gather(1, labels[:, None])
        greatest = cosine.scatter(1, labels[:, None], -torch.inf).amax(dim=1, keepdim=True)
        margins.append((of_target - greatest).squeeze(1))
    return torch.cat(margins)


def nc2_cos_margin(features: Tensor, targets: Tensor, weight: Tensor, center: Tensor) -> Tensor:
    """Mean of `cos_margins` over samples; K/(K − 1) at collapse. Source: Zhou et al., NeurIPS 2022.

    Arguments, result and errors: see `neuralcollapse.metrics.nc2`.

    Examples:
        >>> rows = torch.tensor([[1.0, 0], [-1, 0]])
        >>> nc2_cos_margin(rows, torch.tensor([0, 1]), rows, center=torch.zeros(2))
        tensor(2.)
    """
    return cos_margins(features, targets, weight, center).mean()


def cosines(tile: PairTile) -> Tensor:
    """Return the cosines of a tile of pairs; `nc2_equiangular` is their standard deviation."""
    return tile.cosines


def distance_to_max_angle(tile: PairTile) -> Tensor:
    """Return |cos + 1/(K − 1)| of a tile of pairs; `nc2_max_angle` is the mean."""
    return (tile.cosines + 1 / (len(tile.vectors) - 1)).abs()


def kernel_dist(tile: PairTile, exponent: float = 1.0) -> Tensor:
    """Return r^s of the distance r between the unit vectors of each pair of a tile."""
    return kernel_of_distances(tile.unit_squared_distances, lambda squared: squared ** (exponent / 2), 0.0)


def kernel_log(tile: PairTile, exponent: float = 1.0) -> Tensor:
    """Return −log r^s of the distance r between the unit vectors of each pair of a tile; NaN for r = 0."""
    return kernel_of_distances(tile.unit_squared_distances, lambda squared: squared.log().mul(-exponent / 2), torch.nan)


def kernel_riesz(tile: PairTile, exponent: float = 1.0) -> Tensor:
    """Return 1/r^s of the distance r between the unit vectors of each pair of a tile; NaN for r = 0."""
    return kernel_of_distances(tile.unit_squared_distances, lambda squared: squared ** (-exponent / 2), torch.nan)


KERNELS = {"dist": kernel_dist, "log": kernel_log, "riesz": kernel_riesz}


@torch.no_grad()
def nc2_one_vs_rest(vectors: Tensor) -> Tensor:
    """Smallest distance of a unit row to the hull of the others, relative to that of the softmax code; 1 at collapse.

    This is a metric of generalised neural collapse, for K > d + 1 classes, for which a simplex ETF does not exist. The
    smallest one-vs-rest distance min_k dist(x̂_k, conv{x̂_l : l ≠ k}), x̂ = x/‖x‖, grows to its greatest possible value,
    that of `softmax_code`. The metric is the ratio of the two. It may exceed 1 slightly if the softmax code is computed
    numerically (K > 2d > 4), and is NaN if a row is zero. It has no gradient. Both problems take O(K²d) work per
    iteration.

    Source: Jiang et al., ICML 2024 (GNC2, of the classifier), here as a share of the greatest value.

    Arguments, result and errors: see `neuralcollapse.metrics.nc2`.

    Examples:
        >>> square = torch.tensor([[2.0, 0], [0, 1], [-1, 0], [0, -3]])
        >>> round(float(nc2_one_vs_rest(square)), 4)
        1.0
    """
    check_shapes(vectors=(vectors, "K d"))
    if not (vectors.isfinite().all() and vectors.any(dim=1).all()):
        return vectors.new_full((), torch.nan)
    code = softmax_code(*vectors.shape, dtype=torch.float64)
    least = [one_vs_rest_margins(rows).min() for rows in (unit_rows(vectors.double().cpu()), code)]
    return (least[0] / least[1]).to(vectors)
