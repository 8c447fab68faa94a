"""Simplex ETFs, frames with given Gram matrices, and the frames nearest to class means, as functions of tensors.

Class vectors are rows, ``(..., K, d)``.
"""

from neuralcollapse.geometry import stiefel
from neuralcollapse.geometry.argmin import argmin_on_stiefel
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
from neuralcollapse.geometry.frames import nearest_etf_diagnostics, nearest_frame, nearest_simplex_etf
from neuralcollapse.geometry.polar import polar_factor
from neuralcollapse.geometry.simplex import random_simplex_etf, simplex_basis, simplex_etf
from neuralcollapse.geometry.softmax_code import softmax_code
from neuralcollapse.geometry.trust_region import minimize_on_stiefel

__all__ = [
    "Code",
    "SimplexCode",
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
