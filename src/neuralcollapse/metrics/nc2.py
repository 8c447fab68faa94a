"""NC2, convergence to a simplex ETF, of the class means and of the classifier's rows.

Every function takes the rows X (K, d) of which it is the figure: the centred class means C for ``…_means``, the
classifier's weight W for ``…_weights``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from neuralcollapse._checks import check_exponent, check_samples, check_shapes
from neuralcollapse.metrics.pairs import PairTile, kernel_of_distances, pair_statistics
from neuralcollapse.metrics.scaling import rescaled, square_root, unit_deviations

_CANCELLATION = 1e-3  # below this the closed form has lost more than half of its digits
_TILE_ELEMENTS = 2**22


def nc2_etf(vectors: Tensor) -> Tensor:
    """‖XXᵀ/‖XXᵀ‖_F − T‖_F with T = (I − 11ᵀ/K)/√(K − 1); 0 at collapse, 2 at most; NaN of X = 0.

    Source: Zhu et al., NeurIPS 2021 (NC2).

    Args:
        vectors: X (K, d).

    Raises:
        ValueError: Another shape or type.

    Examples:
        >>> nc2_etf(torch.tensor([[1.0, 0], [-1, 0]]))
        tensor(0.)
    """
    check_shapes(vectors=(vectors, "K d"))
    return distance_to_simplex_gram(vectors, vectors)


def distance_to_simplex_gram(left: Tensor, right: Tensor) -> Tensor:
    """‖XYᵀ/‖XYᵀ‖_F − T‖_F for X, Y (K, d), without a matrix larger than (min(K, d), min(K, d)).

    From ‖XYᵀ‖_F² = ⟨XᵀX, YᵀY⟩ and ⟨XYᵀ, √(K−1) T⟩ = ⟨X, Y⟩ − (Xᵀ1)·(Yᵀ1)/K; where those cancel, or XYᵀ is the
    smaller matrix, from the difference itself, in tiles of rows.
    """
    num_classes, feature_dim = left.shape
    if num_classes < 2:
        return left.new_full((), torch.nan)
    left, right = rescaled(left), rescaled(right)
    if num_classes <= feature_dim:
        return _difference_to_simplex_gram(left, right, torch.linalg.matrix_norm(left @ right.T))
    norm = square_root(((left.T @ left) * (right.T @ right)).sum())
    aligned = (left * right).sum() - left.sum(dim=0) @ right.sum(dim=0) / num_classes
    squared = 2 - 2 * aligned / (norm * (num_classes - 1) ** 0.5)
    if squared < _CANCELLATION**2:
        return _difference_to_simplex_gram(left, right, norm)
    return squared.sqrt()


def _difference_to_simplex_gram(left: Tensor, right: Tensor, norm: Tensor) -> Tensor:
    num_classes = len(left)
    scale = (num_classes - 1) ** -0.5
    step = max(1, _TILE_ELEMENTS // num_classes)
    norms = []
    for start in range(0, num_classes, step):
        difference = left[start : start + step] @ right.T / norm + scale / num_classes
        difference.diagonal(offset=start).sub_(scale)
        norms.append(torch.linalg.matrix_norm(difference))  # whose gradient is 0 at 0
    return torch.linalg.vector_norm(torch.stack(norms))


def nc2_equinorm(vectors: Tensor) -> Tensor:
    """Standard deviation of the rows' norms over their mean; 0 at collapse; NaN of X = 0.

    Source: Papyan et al. 2020 (Fig. 2).

    Args:
        vectors: X (K, d).

    Raises:
        ValueError: Another shape or type.

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

    Args:
        centred_means: C (K, d).
        weight: W (K, d).

    Raises:
        ValueError: Another shape or type.

    Examples:
        >>> nc2_equinorm_difference(torch.eye(2), torch.eye(2))
        tensor(0.)
    """
    check_shapes(centred_means=(centred_means, "K d"), weight=(weight, "K d"))
    return (nc2_equinorm(centred_means) - nc2_equinorm(weight)).abs()


def nc2_equiangular(vectors: Tensor) -> Tensor:
    """Standard deviation of cos(x_k, x_l) over ordered pairs; 0 at collapse; NaN with a zero row.

    Source: Papyan et al. 2020 (Fig. 3).

    Args:
        vectors: X (K, d).

    Raises:
        ValueError: Another shape or type.

    Examples:
        >>> nc2_equiangular(torch.eye(3))
        tensor(0.)
    """
    check_shapes(vectors=(vectors, "K d"))
    return std_over_ordered_pairs(*pair_statistics(rescaled(vectors), {"cos": cosines})["cos"][1:])


def nc2_max_angle(vectors: Tensor) -> Tensor:
    """Mean over pairs of |cos(x_k, x_l) + 1/(K − 1)|; 0 at collapse; NaN with a zero row.

    Source: Papyan et al. 2020 (Fig. 4).

    Args:
        vectors: X (K, d).

    Raises:
        ValueError: Another shape or type.

    Examples:
        >>> nc2_max_angle(torch.eye(3))
        tensor(0.5000)
    """
    check_shapes(vectors=(vectors, "K d"))
    return pair_statistics(rescaled(vectors), {"angle": distance_to_max_angle})["angle"].mean


def nc2_hyperspherical(vectors: Tensor, kernel: str = "dist", *, exponent: float = 1.0) -> tuple[Tensor, Tensor]:
    """Mean and variance over pairs of a kernel of the distance r between unit rows; the variance is 0 at collapse.

    NaN with a zero row, and but for ``"dist"`` with two rows of the same direction, up to rounding.
    Source: Liu et al., ICLR 2023; Wu & Papyan, NeurIPS 2024 (GNC2).

    Args:
        vectors: X (K, d).
        kernel: ``"dist"`` or ``"distance"``: r^s; ``"log"``: −log r^s; ``"riesz"``: 1/r^s.
        exponent: s. The metrics of these names in `collapse_metrics` have s = 1.

    Returns:
        Mean and population variance over the pairs k < l.

    Raises:
        ValueError: Another kernel, shape or type, or an exponent that is not positive.

    Examples:
        >>> nc2_hyperspherical(torch.tensor([[1.0, 0], [-3, 0]]))
        (tensor(2.), tensor(0.))
    """
    check_shapes(vectors=(vectors, "K d"))
    check_exponent("exponent", exponent)
    functions = {"kernel": hyperspherical_kernel(kernel, exponent)}
    return pair_statistics(rescaled(vectors), functions)["kernel"][:2]


def hyperspherical_kernel(kernel: str, exponent: float = 1.0) -> Callable[[PairTile], Tensor]:
    """The function of a tile of pairs whose mean and variance are `nc2_hyperspherical`."""
    kernel = "dist" if kernel == "distance" else kernel
    if not isinstance(kernel, str) or kernel not in HYPERSPHERICAL_KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(HYPERSPHERICAL_KERNELS)}, got {kernel!r}")
    function = HYPERSPHERICAL_KERNELS[kernel]
    return lambda tile: function(tile, exponent)


def cos_margins(features: Tensor, targets: Tensor, weight: Tensor, center: Tensor) -> Tensor:
    """cos(h − m, w_y − w̄) − max over k ≠ y of cos(h − m, w_k − w̄) for each sample; K/(K − 1) at collapse.

    Sorted they are the margins' distribution, their mean is `nc2_cos_margin`. NaN of a sample at the centre, and of all
    samples if a row of the weight is the mean row: such a vector has no direction. Source: Zhou et al., NeurIPS 2022.

    Args:
        features: h (N, d).
        targets: (N,) classes in [0, K).
        weight: W (K, d).
        center: m (d,), the features' centre.

    Returns:
        (N,) in [−2, 2].

    Raises:
        ValueError: Another shape or type, or targets out of range.

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
        own = cosine.gather(1, labels[:, None])
        margins.append((own - cosine.scatter(1, labels[:, None], -torch.inf).amax(dim=1, keepdim=True)).squeeze(1))
    return torch.cat(margins)


def nc2_cos_margin(features: Tensor, targets: Tensor, weight: Tensor, center: Tensor) -> Tensor:
    """Mean over the samples of `cos_margins`; K/(K − 1) at collapse. Source: Zhou et al., NeurIPS 2022.

    Args:
        features: h (N, d).
        targets: (N,) classes in [0, K).
        weight: W (K, d).
        center: m (d,), the features' centre.

    Raises:
        ValueError: Another shape or type, or targets out of range.

    Examples:
        >>> rows = torch.tensor([[1.0, 0], [-1, 0]])
        >>> nc2_cos_margin(rows, torch.tensor([0, 1]), rows, center=torch.zeros(2))
        tensor(2.)
    """
    return cos_margins(features, targets, weight, center).mean()


def cosines(tile: PairTile) -> Tensor:
    """The function of a tile of pairs of which `nc2_equiangular` is the spread."""
    return tile.cosines


def distance_to_max_angle(tile: PairTile) -> Tensor:
    """The function of a tile of pairs of which `nc2_max_angle` is the mean."""
    return (tile.cosines + 1 / (len(tile.vectors) - 1)).abs()


def std_over_ordered_pairs(variance: Tensor, count: int) -> Tensor:
    """Unbiased standard deviation over all k ≠ l, from the population variance over the ``count`` pairs k < l."""
    return square_root(variance * (2 * count / (2 * count - 1)))


HYPERSPHERICAL_KERNELS: dict[str, Callable[[PairTile, float], Tensor]] = {
    "dist": lambda tile, exponent: kernel_of_distances(
        tile.unit_squared_distances, lambda squared: squared ** (exponent / 2), 0.0
    ),
    "log": lambda tile, exponent: kernel_of_distances(
        tile.unit_squared_distances, lambda squared: squared.log().mul(-exponent / 2), torch.nan
    ),
    "riesz": lambda tile, exponent: kernel_of_distances(
        tile.unit_squared_distances, lambda squared: squared ** (-exponent / 2), torch.nan
    ),
}
