"""Measure, induce and guide neural collapse in PyTorch classifiers."""

from neuralcollapse.classifier import find_classifier
from neuralcollapse.geometry import nearest_simplex_etf, polar_factor, random_simplex_etf, simplex_basis, simplex_etf
from neuralcollapse.heads import (
    ClassMeans,
    FixedETFClassifier,
    LearnedClassifier,
    NearestETFClassifier,
    attach_head,
    collapse_radius,
    project_after_step,
)

__all__ = [
    "ClassMeans",
    "FixedETFClassifier",
    "LearnedClassifier",
    "NearestETFClassifier",
    "attach_head",
    "collapse_radius",
    "find_classifier",
    "nearest_simplex_etf",
    "polar_factor",
    "project_after_step",
    "random_simplex_etf",
    "simplex_basis",
    "simplex_etf",
]
