"""Measure, induce and guide neural collapse in PyTorch classifiers. Each name is looked up when it is used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuralcollapse.classifier import find_classifier
    from neuralcollapse.geometry import (
        nearest_simplex_etf,
        polar_factor,
        random_simplex_etf,
        simplex_basis,
        simplex_etf,
        softmax_code,
    )
    from neuralcollapse.heads import (
        ClassMeanClassifier,
        ClassMeans,
        FixedETFClassifier,
        LearnedClassifier,
        NearestETFClassifier,
        attach_head,
        collapse_radius,
        project_after_step,
    )
    from neuralcollapse.metrics import (
        ClassMoments,
        Measurement,
        NeuralCollapse,
        collapse_metrics,
        etf_distances,
        measure,
    )

__version__ = "0.1.0"

__all__ = [
    "ClassMeanClassifier",
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
    "softmax_code",
]


_PLACES = {
    "classifier": ("find_classifier",),
    "geometry": (
        "nearest_simplex_etf",
        "polar_factor",
        "random_simplex_etf",
        "simplex_basis",
        "simplex_etf",
        "softmax_code",
    ),
    "heads": (
        "ClassMeanClassifier",
        "ClassMeans",
        "FixedETFClassifier",
        "LearnedClassifier",
        "NearestETFClassifier",
        "attach_head",
        "collapse_radius",
        "project_after_step",
    ),
    "metrics": ("ClassMoments", "Measurement", "NeuralCollapse", "collapse_metrics", "etf_distances", "measure"),
}


def __getattr__(name: str) -> Any:
    for place, names in _PLACES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{place}"), name)
    if name in ("geometry", "heads", "losses", "metrics", "ufm", "lab"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
