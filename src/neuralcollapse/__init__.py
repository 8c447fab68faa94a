"""Measure, induce and guide neural collapse in PyTorch classifiers. Each name is looked up when it is used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuralcollapse.classifier import find_classifier
    from neuralcollapse.geometry import (
        attribute_gram,
        code_from_gram,
        code_of_means,
        distance_gram,
        embedding_gram,
        nearest_frame,
        nearest_simplex_etf,
        polar_factor,
        random_simplex_etf,
        seli_code,
        simplex_basis,
        simplex_etf,
        simplex_gram,
        softmax_code,
        tree_gram,
    )
    from neuralcollapse.heads import (
        ClassMeanClassifier,
        ClassMeans,
        FixedETFClassifier,
        FixedFrameClassifier,
        LearnedClassifier,
        NearestETFClassifier,
        NearestFrameClassifier,
        attach_head,
        collapse_radius,
    )
    from neuralcollapse.metrics import (
        ClassMoments,
        Measurement,
        NeuralCollapse,
        collapse_metrics,
        etf_distances,
        measure,
    )

from neuralcollapse._version import __version__ as __version__

__all__ = [
    "ClassMeanClassifier",
    "ClassMeans",
    "ClassMoments",
    "FixedETFClassifier",
    "FixedFrameClassifier",
    "LearnedClassifier",
    "Measurement",
    "NearestETFClassifier",
    "NearestFrameClassifier",
    "NeuralCollapse",
    "attach_head",
    "attribute_gram",
    "code_from_gram",
    "code_of_means",
    "collapse_metrics",
    "collapse_radius",
    "distance_gram",
    "embedding_gram",
    "etf_distances",
    "find_classifier",
    "measure",
    "nearest_frame",
    "nearest_simplex_etf",
    "polar_factor",
    "random_simplex_etf",
    "seli_code",
    "simplex_basis",
    "simplex_etf",
    "simplex_gram",
    "softmax_code",
    "tree_gram",
]


_PLACES = {
    "classifier": ("find_classifier",),
    "geometry": (
        "attribute_gram",
        "code_from_gram",
        "code_of_means",
        "distance_gram",
        "embedding_gram",
        "nearest_frame",
        "nearest_simplex_etf",
        "polar_factor",
        "random_simplex_etf",
        "seli_code",
        "simplex_basis",
        "simplex_etf",
        "simplex_gram",
        "softmax_code",
        "tree_gram",
    ),
    "heads": (
        "ClassMeanClassifier",
        "ClassMeans",
        "FixedETFClassifier",
        "FixedFrameClassifier",
        "LearnedClassifier",
        "NearestETFClassifier",
        "NearestFrameClassifier",
        "attach_head",
        "collapse_radius",
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
