"""The unconstrained features model: what the theory of neural collapse is about, to compute with.

Torch alone is enough for the model and its closed forms; `minimize` and the Hessian's spectrum use scipy (the extra
``theory``), which is looked up when they are called.
"""

from neuralcollapse.ufm.descent import Descent, minimize
from neuralcollapse.ufm.hessian import HessianExtremes, hessian_extremes
from neuralcollapse.ufm.landscape import CriticalPoint, Escape, classify_critical_point, escape, known_optimum
from neuralcollapse.ufm.model import UnconstrainedFeatures
from neuralcollapse.ufm.optimum import GlobalOptimum, decay_strength, global_optimum
from neuralcollapse.ufm.saddles import origin_curvature, symmetric_saddle
from neuralcollapse.ufm.survey import Visit, loss_slice, survey
from neuralcollapse.ufm.training import Snapshot, measure_free_features, train_free_features

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
    "measure_free_features",
    "minimize",
    "origin_curvature",
    "survey",
    "symmetric_saddle",
    "train_free_features",
]
