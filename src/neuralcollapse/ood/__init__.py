"""Out-of-distribution scores fitted to one measurement, and how well they detect.

The functions of `neuralcollapse.ood.scores` are formulas; `fit_score` fits them to the record that `measure` returns.
"""

from neuralcollapse.ood.detector import Detector
from neuralcollapse.ood.fit import SCORES, FittedScore, fit_score
from neuralcollapse.ood.scores import (
    energy,
    fdbd,
    knn,
    mahalanobis,
    maxlogit,
    msp,
    nci,
    ncm,
    neco,
    relative_mahalanobis,
    residual,
    vim,
)

__all__ = [
    "SCORES",
    "Detector",
    "FittedScore",
    "energy",
    "fdbd",
    "fit_score",
    "knn",
    "mahalanobis",
    "maxlogit",
    "msp",
    "nci",
    "ncm",
    "neco",
    "relative_mahalanobis",
    "residual",
    "vim",
]
