"""What is measured: class moments, every published metric of them, and a model on a loader.

Importing it pulls in nothing: each name is looked up when it is asked for, torch with the first, torchmetrics with
`NeuralCollapse` alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuralcollapse.metrics.collapse import collapse_metrics, undefined_metrics
    from neuralcollapse.metrics.distances import etf_distances
    from neuralcollapse.metrics.features import effective_rank, feature_norm, rank_me
    from neuralcollapse.metrics.gram import nc2_gram, nc3_gram_duality
    from neuralcollapse.metrics.measurement import Measurement
    from neuralcollapse.metrics.measuring import measure
    from neuralcollapse.metrics.metric import NeuralCollapse
    from neuralcollapse.metrics.moments import ClassMoments
    from neuralcollapse.metrics.nc0 import nc0_weight_sum
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
    from neuralcollapse.metrics.per_class import ClassValues, class_values, pair_matrices
    from neuralcollapse.metrics.sphere import (
        class_alignment,
        instance_alignment,
        matrix_information,
        released_matrix_information,
    )
    from neuralcollapse.metrics.statistics import ClassStatistics, class_statistics, moments_about

_HOMES = {
    "collapse": ["collapse_metrics", "undefined_metrics"],
    "distances": ["etf_distances"],
    "features": ["effective_rank", "feature_norm", "rank_me"],
    "gram": ["nc2_gram", "nc3_gram_duality"],
    "measurement": ["Measurement"],
    "measuring": ["measure"],
    "metric": ["NeuralCollapse"],
    "moments": ["ClassMoments"],
    "nc0": ["nc0_weight_sum"],
    "nc1": ["nc1_cdnv", "nc1_numerical_rank", "nc1_pinv", "nc1_quotient", "nc1_vci"],
    "nc2": [
        "cos_margins",
        "nc2_cos_margin",
        "nc2_equiangular",
        "nc2_equinorm",
        "nc2_equinorm_difference",
        "nc2_etf",
        "nc2_hyperspherical",
        "nc2_max_angle",
    ],
    "nc3": ["alignment", "nc3_distance", "nc3_duality", "nc3_uniform", "nc3_uniform_cos"],
    "nc4": ["nc4_bias", "nc4_ncc_mismatch", "nearest_class_mean"],
    "nc5": ["nc5_ood"],
    "per_class": ["ClassValues", "class_values", "pair_matrices"],
    "sphere": ["class_alignment", "instance_alignment", "matrix_information", "released_matrix_information"],
    "statistics": ["ClassStatistics", "class_statistics", "moments_about"],
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "ClassMoments",
    "ClassStatistics",
    "ClassValues",
    "Measurement",
    "NeuralCollapse",
    "alignment",
    "class_alignment",
    "class_statistics",
    "class_values",
    "collapse_metrics",
    "cos_margins",
    "effective_rank",
    "etf_distances",
    "feature_norm",
    "instance_alignment",
    "matrix_information",
    "measure",
    "moments_about",
    "nc0_weight_sum",
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
    "nc2_gram",
    "nc2_hyperspherical",
    "nc2_max_angle",
    "nc3_distance",
    "nc3_duality",
    "nc3_gram_duality",
    "nc3_uniform",
    "nc3_uniform_cos",
    "nc4_bias",
    "nc4_ncc_mismatch",
    "nc5_ood",
    "nearest_class_mean",
    "pair_matrices",
    "rank_me",
    "released_matrix_information",
    "undefined_metrics",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
