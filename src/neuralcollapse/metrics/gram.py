"""NC2 and NC3 relative to a prescribed Gram matrix: how far a classifier is from a frame that need be no simplex ETF.

The Gram is given by a code L (K, r), G = LLᵀ (`neuralcollapse.geometry.code_from_gram`). Class means, weights and code
are centred at the mean of the classes first, which changes no decision; at the simplex they are `nc2_etf` and
`nc3_duality` of centred rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuralcollapse._checks import check_shapes
from neuralcollapse.metrics.scaling import rescaled, square_root

_CANCELLATION = 1e-3  # below this the closed form has lost more than half of its digits
_TILE_ELEMENTS = 2**22


def nc2_gram(vectors: Tensor, code: Tensor) -> Tensor:
    """‖ΠXXᵀΠ/‖ΠXXᵀΠ‖_F − ΠGΠ/‖ΠGΠ‖_F‖_F, Π = I − 11ᵀ/K; 0 at collapse to a frame of the Gram G = LLᵀ, √2 at most.

    NaN where the rows of X, or those of L, are all equal.

    Source: `nc2_etf` (Zhu et al., NeurIPS 2021) of another Gram than the simplex's.

    Args:
        vectors: X (K, d): class means or classifier rows.
        code: L (K, r).

    Raises:
        ValueError: Another shape or type.

    Examples:
        >>> rows = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])  # an orthoplex
        >>> bool(nc2_gram(3 * rows + 1, rows) < 1e-6), float(nc2_gram(torch.eye(4), rows)) > 0.1
        (True, True)
    """
    check_shapes(vectors=(vectors, "K d"), code=(code, "K r"))
    return _distance_to_gram(vectors, vectors, code)


def nc3_gram_duality(weight: Tensor, class_means: Tensor, code: Tensor) -> Tensor:
    """‖ΠWMᵀΠ/‖ΠWMᵀΠ‖_F − ΠGΠ/‖ΠGΠ‖_F‖_F; 0 at collapse to a frame of the Gram G = LLᵀ, 2 at most.

    NaN where the product of W and M is 0, or the rows of L are all equal.

    Source: `nc3_duality` (Zhu et al., NeurIPS 2021) of another Gram than the simplex's.

    Args:
        weight: W (K, d).
        class_means: M (K, d), about any centre.
        code: L (K, r).

    Raises:
        ValueError: Another shape or type.

    Examples:
        >>> rows = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
        >>> nc3_gram_duality(2 * rows, rows, rows), nc3_gram_duality(-rows, rows, rows)
        (tensor(0.), tensor(2.))
    """
    check_shapes(weight=(weight, "K d"), class_means=(class_means, "K d"), code=(code, "K r"))
    return _distance_to_gram(weight, class_means, code)


def _distance_to_gram(left: Tensor, right: Tensor, code: Tensor) -> Tensor:
    """‖XYᵀ/‖XYᵀ‖_F − LLᵀ/‖LLᵀ‖_F‖_F of centred rows, without a matrix of K² where K > d.

    From ‖XYᵀ‖_F² = ⟨XᵀX, YᵀY⟩ and ⟨XYᵀ, LLᵀ⟩ = ⟨LᵀX, LᵀY⟩; where those cancel, or XYᵀ is the smaller matrix, from the
    difference itself, in tiles of rows.
    """
    num_classes, feature_dim = left.shape
    if num_classes < 2:
        return left.new_full((), torch.nan)
    left, right, code = (rescaled(_centred(rows)) for rows in (left, right, code.to(left)))
    own = torch.linalg.matrix_norm(code.T @ code)
    if num_classes <= feature_dim:
        return _difference_to_gram(left, right, code, torch.linalg.matrix_norm(left @ right.T), own)
    norm = square_root(((left.T @ left) * (right.T @ right)).sum())
    squared = 2 - 2 * ((code.T @ left) * (code.T @ right)).sum() / (norm * own)
    if squared < _CANCELLATION**2:
        return _difference_to_gram(left, right, code, norm, own)
    return squared.sqrt()


def _difference_to_gram(left: Tensor, right: Tensor, code: Tensor, norm: Tensor, own: Tensor) -> Tensor:
    step = max(1, _TILE_ELEMENTS // len(left))
    norms = []
    for start in range(0, len(left), step):
        rows = slice(start, start + step)
        norms.append(torch.linalg.matrix_norm(left[rows] @ right.T / norm - code[rows] @ code.T / own))
    return torch.linalg.vector_norm(torch.stack(norms))  # whose gradient is 0 at 0


def _centred(rows: Tensor) -> Tensor:
    """Return the rows less their mean; zero where they are all equal, up to rounding."""
    mean = rows.mean(dim=0)
    centred = rows - mean
    rounding = 4 * torch.finfo(rows.dtype).eps * torch.linalg.vector_norm(mean.detach())
    equal = torch.linalg.vector_norm(centred.detach(), dim=1).amax() <= rounding
    return torch.where(equal, 0, centred)
