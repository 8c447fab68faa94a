"""Unconstrained features model (UFM), its global optimum, saddles and critical points.

The model and its closed forms need only torch; `minimize` and the spectrum of the Hessian use scipy (the extra
``theory``), which is imported when they are called.
"""

from neuralcollapse.ufm.critical_points import (
    CriticalPoint,
    Descent,
    Escape,
    classify_critical_point,
    escape,
    known_optimum,
    minimize,
)
from neuralcollapse.ufm.model import UnconstrainedFeatures
from neuralcollapse.ufm.optimum import GlobalOptimum, decay_strength, global_optimum
from neuralcollapse.ufm.saddles import origin_curvature, symmetric_saddle
from neuralcollapse.ufm.spectrum import HessianExtremes, hessian_extremes
from neuralcollapse.ufm.survey import Visit, loss_slice, survey
from neuralcollapse.ufm.training import Snapshot, measure_unconstrained_features, train_unconstrained_features

__all__ = [
    "CriticalPoint",
    "Descent",
    "Escape",
    "GlobalOptimum",
    "HessianExtremes",
    "Snapshot",
    "UnconstrainedFeatures",
    "Visit",
    "classify_critical_point",
    "decay_strength",
    "escape",
    "global_optimum",
    "hessian_extremes",
    "known_optimum",
    "loss_slice",
    "measure_unconstrained_features",
    "minimize",
    "origin_curvature",
    "survey",
    "symmetric_saddle",
    "train_unconstrained_features",
]
