"""Statistics over all pairs of classes, in tiles of bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from neuralcollapse.metrics.scaling import power_of_two, square_root

_TILE = 512  # rows and columns: 2 MB for each temporary in fp64
_CLOSE = 1e-6  # squared distances below this share of their terms are recomputed from the difference vectors


class PairStatistics(NamedTuple):
    """Mean and population variance over unordered pairs k < l, and the number of pairs; NaN without a pair."""

    mean: Tensor
    variance: Tensor
    pairs: int

    @property
    def std(self) -> Tensor:
        """Unbiased standard deviation over the ordered pairs k ≠ l."""
        return square_root(self.variance * (2 * self.pairs / (2 * self.pairs - 1)))


@dataclass(frozen=True)
class PairTile:
    """All pairs of a block of rows with a block of columns.

    Attributes:
        vectors: (K, d) vectors of all classes, multiplied by ``unit``.
        norms: (K,) norms of ``vectors``.
        rows: Block of rows, I classes.
        columns: Block of columns, J classes.
        resolution: Distance within which two vectors are considered equal; at least their rounding error.
        unit: Power of two that scales the vectors.
    """

    vectors: Tensor
    norms: Tensor
    rows: slice
    columns: slice
    resolution: Tensor | float = 0.0
    unit: Tensor | float = 1.0

    @classmethod
    def of_all(cls, vectors: Tensor, resolution: Tensor | float = 0.0) -> PairTile:
        """Return the tile of all pairs of vectors, in units that keep squares in the range of the dtype."""
        unit = power_of_two(vectors)
        vectors = vectors * unit
        norms = torch.linalg.vector_norm(vectors, dim=1)
        return cls(vectors, norms, slice(None), slice(None), resolution * unit, unit)

    @cached_property
    def inner_products(self) -> Tensor:
        """Inner products ⟨x_k, x_l⟩, (I, J)."""
        return self.vectors[self.rows] @ self.vectors[self.columns].T

    @cached_property
    def cosines(self) -> Tensor:
        """Cosines cos(x_k, x_l), (I, J); NaN for a zero vector."""
        inverse = self._lengths.reciprocal()
        return self.inner_products * inverse[self.rows, None] * inverse[self.columns]

    @cached_property
    def squared_distances(self) -> Tensor:
        """Squared distances ‖x_k − x_l‖², (I, J); 0 for vectors that are equal up to rounding."""
        squares = self.norms[self.rows, None].square() + self.norms[self.columns].square()
        return self._recompute_close(squares - 2 * self.inner_products, squares, torch.ones_like(self.norms))

    @cached_property
    def unit_squared_distances(self) -> Tensor:
        """Squared distances between x/‖x‖, (I, J); 0 for directions equal up to rounding, NaN for a zero vector."""
        return self._recompute_close(2 - 2 * self.cosines, torch.tensor(2.0), self._lengths)

    @property
    def _lengths(self) -> Tensor:
        return torch.where(self.norms > 0, self.norms, torch.nan)

    def _recompute_close(self, squared: Tensor, scale: Tensor, lengths: Tensor) -> Tensor:
        """Recompute the (few) distances that are small compared with the norms from the difference vectors."""
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
    """Return mean and variance over the pairs k < l of functions of a pair, in one pass over the pairs.

    Args:
        vectors: (K, d).
        functions: Functions by name; each maps a `PairTile` of (I, J) pairs to (I, J) values.
        resolution: As for `PairTile`.

    Examples:
        >>> statistics = pair_statistics(torch.eye(3), {"cos": lambda tile: tile.cosines})
        >>> statistics["cos"].mean, statistics["cos"].pairs
        (tensor(0.), 3)
    """
    whole = PairTile.of_all(vectors, resolution)
    blocks = [slice(start, start + _TILE) for start in range(0, len(vectors), _TILE) if len(vectors) > 1]
    none = vectors.new_full((), torch.nan)
    running = dict.fromkeys(functions, PairStatistics(none, none, 0))
    for index, rows in enumerate(blocks):
        for columns in blocks[index:]:
            tile = replace(whole, rows=rows, columns=columns)
            for name, function in functions.items():
                values = function(tile)
                if rows == columns:
                    values = values[torch.ones_like(values, dtype=torch.bool).triu(1)]
                if values.numel():
                    new = PairStatistics(values.mean(), values.var(correction=0), values.numel())
                    running[name] = _merge(running[name], new) if running[name].pairs else new
    return running


def kernel_of_distances(squared: Tensor, function: Callable[[Tensor], Tensor], at_zero: float) -> Tensor:
    """Apply a function to squared distances, with a given value and without gradient at distance 0."""
    positive = squared != 0  # NaN stays NaN
    return torch.where(positive, function(torch.where(positive, squared, 1)), at_zero)


def _merge(a: PairStatistics, b: PairStatistics) -> PairStatistics:
    pairs = a.pairs + b.pairs
    share = b.pairs / pairs
    mean = (1 - share) * a.mean + share * b.mean
    variance = (1 - share) * a.variance + share * b.variance + share * (1 - share) * (b.mean - a.mean).square()
    return PairStatistics(mean, variance, pairs)
