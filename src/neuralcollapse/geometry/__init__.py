"""Pure functions on tensors: what a simplex ETF is, and the nearest one.

Class vectors are rows, ``(..., K, d)``.
"""

from neuralcollapse.geometry.nearest import nearest_etf_diagnostics, nearest_simplex_etf
from neuralcollapse.geometry.polar import polar_factor
from neuralcollapse.geometry.simplex import random_simplex_etf, simplex_basis, simplex_etf

__all__ = [
    "nearest_etf_diagnostics",
    "nearest_simplex_etf",
    "polar_factor",
    "random_simplex_etf",
    "simplex_basis",
    "simplex_etf",
]
