"""Out-of-distribution scores fitted to a measurement, and the evaluation of their detection rates.

The functions of `neuralcollapse.ood.scores` are formulas; `fit_score` fits them to the record that `measure` returns.
"""

from neuralcollapse.ood.detector import Detector
from neuralcollapse.ood.evaluation import Evaluation, Row, aupr, auroc, evaluate, fpr_at_tpr
from neuralcollapse.ood.fit import SCORES, FittedScore, fit_score
from neuralcollapse.ood.pytorch_ood import to_pytorch_ood
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
    "Evaluation",
    "FittedScore",
    "Row",
    "aupr",
    "auroc",
    "energy",
    "evaluate",
    "fdbd",
    "fit_score",
    "fpr_at_tpr",
    "knn",
    "mahalanobis",
    "maxlogit",
    "msp",
    "nci",
    "ncm",
    "neco",
    "relative_mahalanobis",
    "residual",
    "to_pytorch_ood",
    "vim",
]
