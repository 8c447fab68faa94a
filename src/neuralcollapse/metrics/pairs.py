"""Statistics over all pairs of classes, in tiles of bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

_TILE = 512  # classes on a side: 2 MB for each temporary in fp64
_CLOSE = 1e-6  # squared distances below this share of their terms are recomputed from the difference


class PairStatistics(NamedTuple):
    """Mean and population variance over unordered pairs, and how many pairs there are; NaN of no pair."""

    mean: Tensor
    variance: Tensor
    pairs: int


@dataclass(frozen=True)
class PairTile:
    """All pairs of a block of rows with a block of columns.

    Attributes:
        vectors: (K, d) all of them.
        norms: (K,) their norms.
        rows: The block of rows, I classes.
        columns: The block of columns, J classes.
        resolution: The distance within which two vectors are the same; at least that of their own rounding.
    """

    vectors: Tensor
    norms: Tensor
    rows: slice
    columns: slice
    resolution: Tensor | float = 0.0

    @cached_property
    def inner_products(self) -> Tensor:
        """⟨x_k, x_l⟩, (I, J)."""
        return self.vectors[self.rows] @ self.vectors[self.columns].T

    @cached_property
    def cosines(self) -> Tensor:
        """cos(x_k, x_l), (I, J); NaN with a zero vector."""
        inverse = self._lengths.reciprocal()
        return self.inner_products * inverse[self.rows, None] * inverse[self.columns]

    @cached_property
    def squared_distances(self) -> Tensor:
        """‖x_k − x_l‖², (I, J); 0 of vectors that are the same up to rounding."""
        squares = self.norms[self.rows, None].square() + self.norms[self.columns].square()
        return self._recompute_close(squares - 2 * self.inner_products, squares, torch.ones_like(self.norms))

    @cached_property
    def unit_squared_distances(self) -> Tensor:
        """‖x_k/‖x_k‖ − x_l/‖x_l‖‖², (I, J); 0 of directions that are the same up to rounding, NaN with a zero row."""
        return self._recompute_close(2 - 2 * self.cosines, torch.tensor(2.0), self._lengths)

    @property
    def _lengths(self) -> Tensor:
        return torch.where(self.norms > 0, self.norms, torch.nan)

    def _recompute_close(self, squared: Tensor, scale: Tensor, lengths: Tensor) -> Tensor:
        """Replace what cancellation spoilt: the (few) pairs that are close compared with their norms."""
        rounding = (2 * torch.finfo(lengths.dtype).eps * self.norms.detach()).clamp(
            min=self.resolution
        ) / lengths.detach()
        for pairs in (squared < _CLOSE * scale).nonzero().split(_TILE):
            row, column = pairs.T
            left = self.vectors[self.rows][row] / lengths[self.rows][row, None]
            right = self.vectors[self.columns][column] / lengths[self.columns][column, None]
            exact = (left - right).square().sum(dim=1)
            same = exact.detach() <= (rounding[self.rows][row] + rounding[self.columns][column]).square()
            squared[row, column] = exact.masked_fill(same, 0)
        return squared


def pair_statistics(
    vectors: Tensor, functions: Mapping[str, Callable[[PairTile], Tensor]], *, resolution: Tensor | float = 0.0
) -> dict[str, PairStatistics]:
    """Mean and variance over the pairs k < l of functions of a pair, in one pass over the pairs.

    Args:
        vectors: (K, d).
        functions: By name; each maps a `PairTile` of (I, J) pairs to their (I, J) values.
        resolution: As for `PairTile`.

    Examples:
        >>> statistics = pair_statistics(torch.eye(3), {"cos": lambda tile: tile.cosines})
        >>> statistics["cos"].mean, statistics["cos"].pairs
        (tensor(0.), 3)
    """
    norms = torch.linalg.vector_norm(vectors, dim=1)
    blocks = [slice(start, start + _TILE) for start in range(0, len(vectors), _TILE) if len(vectors) > 1]
    none = vectors.new_full((), torch.nan)
    running = dict.fromkeys(functions, PairStatistics(none, none, 0))
    for index, rows in enumerate(blocks):
        for columns in blocks[index:]:
            tile = PairTile(vectors, norms, rows, columns, resolution)
            for name, function in functions.items():
                values = function(tile)
                if rows == columns:
                    values = values[torch.ones_like(values, dtype=torch.bool).triu(1)]
                if values.numel():
                    new = PairStatistics(values.mean(), values.var(correction=0), values.numel())
                    running[name] = _merge(running[name], new) if running[name].pairs else new
    return running


def kernel_of_distances(squared: Tensor, function: Callable[[Tensor], Tensor], at_zero: float) -> Tensor:
    """Return a function of squared distances, with its value at distance 0, where it has no gradient."""
    positive = squared != 0  # NaN stays NaN
    return torch.where(positive, function(torch.where(positive, squared, 1)), at_zero)


def _merge(a: PairStatistics, b: PairStatistics) -> PairStatistics:
    pairs = a.pairs + b.pairs
    share = b.pairs / pairs
    mean = (1 - share) * a.mean + share * b.mean
    variance = (1 - share) * a.variance + share * b.variance + share * (1 - share) * (b.mean - a.mean).square()
    return PairStatistics(mean, variance, pairs)
