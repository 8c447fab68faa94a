"""Measure, induce and guide neural collapse in PyTorch classifiers."""

from typing import TYPE_CHECKING, Any

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
from neuralcollapse.metrics import ClassMoments, Measurement, collapse_metrics, etf_distances, measure

if TYPE_CHECKING:
    from neuralcollapse.metrics import NeuralCollapse

__version__ = "0.1.0"

__all__ = [
    "ClassMeans",
    "ClassMoments",
    "FixedETFClassifier",
    "LearnedClassifier",
    "Measurement",
    "NearestETFClassifier",
    "NeuralCollapse",
    "attach_head",
    "collapse_metrics",
    "collapse_radius",
    "etf_distances",
    "find_classifier",
    "measure",
    "nearest_simplex_etf",
    "polar_factor",
    "project_after_step",
    "random_simplex_etf",
    "simplex_basis",
    "simplex_etf",
]


def __getattr__(name: str) -> Any:
    if name == "NeuralCollapse":  # torchmetrics takes seconds to import
        from neuralcollapse.metrics import NeuralCollapse

        return NeuralCollapse
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
