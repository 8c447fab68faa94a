"""What is measured: class moments, every published metric of them, and a model on a loader.

Importing it pulls in torch and no more: `NeuralCollapse` is looked up when asked for, since torchmetrics takes
seconds to import.
"""

from typing import TYPE_CHECKING, Any

from neuralcollapse.metrics.distances import etf_distances
from neuralcollapse.metrics.collapse import collapse_metrics
from neuralcollapse.metrics.measuring import Measurement, measure
from neuralcollapse.metrics.moments import ClassMoments
from neuralcollapse.metrics.nc1 import nc1_cdnv, nc1_numerical_rank, nc1_pinv, nc1_quotient, nc1_vci
from neuralcollapse.metrics.nc2 import (
    cos_margins,
    nc2_cos_margin,
    nc2_equiangular,
    nc2_equinorm,
    nc2_equinorm_difference,
    nc2_etf,
    nc2_hyperspherical,
    nc2_max_angle,
)
from neuralcollapse.metrics.nc3 import alignment, nc3_distance, nc3_duality, nc3_uniform, nc3_uniform_cos
from neuralcollapse.metrics.nc4 import nc4_bias, nc4_ncc_mismatch, nearest_class_mean
from neuralcollapse.metrics.nc5 import nc5_ood
from neuralcollapse.metrics.statistics import ClassStatistics, class_statistics

if TYPE_CHECKING:
    from neuralcollapse.metrics.metric import NeuralCollapse

__all__ = [
    "ClassMoments",
    "ClassStatistics",
    "Measurement",
    "NeuralCollapse",
    "alignment",
    "class_statistics",
    "collapse_metrics",
    "cos_margins",
    "etf_distances",
    "measure",
    "nc1_cdnv",
    "nc1_numerical_rank",
    "nc1_pinv",
    "nc1_quotient",
    "nc1_vci",
    "nc2_cos_margin",
    "nc2_equiangular",
    "nc2_equinorm",
    "nc2_equinorm_difference",
    "nc2_etf",
    "nc2_hyperspherical",
    "nc2_max_angle",
    "nc3_distance",
    "nc3_duality",
    "nc3_uniform",
    "nc3_uniform_cos",
    "nc4_bias",
    "nc4_ncc_mismatch",
    "nc5_ood",
    "nearest_class_mean",
]


def __getattr__(name: str) -> Any:
    if name == "NeuralCollapse":
        from neuralcollapse.metrics.metric import NeuralCollapse

        return NeuralCollapse
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
