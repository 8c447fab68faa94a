"""Pure functions on tensors: what a simplex ETF or a frame of a prescribed Gram is, and the nearest one.

Class vectors are rows, ``(..., K, d)``.
"""

from neuralcollapse.geometry import stiefel
from neuralcollapse.geometry.codes import (
    Code,
    SimplexCode,
    attribute_gram,
    code_from_gram,
    code_of_means,
    distance_gram,
    embedding_gram,
    seli_code,
    simplex_gram,
    tree_gram,
)
from neuralcollapse.geometry.declarative import ArgminSolution, argmin_on_stiefel
from neuralcollapse.geometry.frames import nearest_etf_diagnostics, nearest_frame, nearest_simplex_etf
from neuralcollapse.geometry.polar import polar_factor
from neuralcollapse.geometry.simplex import random_simplex_etf, simplex_basis, simplex_etf
from neuralcollapse.geometry.softmax_code import anneal_code, one_vs_rest_margins, softmax_code
from neuralcollapse.geometry.solution import Iteration, StiefelSolution, Stop
from neuralcollapse.geometry.trust_region import minimize_on_stiefel

__all__ = [
    "ArgminSolution",
    "Code",
    "Iteration",
    "SimplexCode",
    "StiefelSolution",
    "Stop",
    "anneal_code",
    "argmin_on_stiefel",
    "attribute_gram",
    "code_from_gram",
    "code_of_means",
    "distance_gram",
    "embedding_gram",
    "minimize_on_stiefel",
    "nearest_etf_diagnostics",
    "nearest_frame",
    "nearest_simplex_etf",
    "one_vs_rest_margins",
    "polar_factor",
    "random_simplex_etf",
    "seli_code",
    "simplex_basis",
    "simplex_etf",
    "simplex_gram",
    "softmax_code",
    "stiefel",
    "tree_gram",
]
