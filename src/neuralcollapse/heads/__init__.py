"""Classification heads: modules that compute the logits from the features of a backbone."""

from neuralcollapse.heads.attach import AttachedHead, attach_head
from neuralcollapse.heads.fixed import FixedETFClassifier, FixedFrameClassifier
from neuralcollapse.heads.head import FeatureNorm, Head, collapse_radius
from neuralcollapse.heads.learned import LearnedClassifier
from neuralcollapse.heads.moving_means import ClassMeans
from neuralcollapse.heads.nearest import (
    ClassMeanClassifier,
    ClosedForm,
    LeadingDirections,
    NearestETFClassifier,
    NearestFrameClassifier,
    Simplex,
    TrustRegion,
)

__all__ = [
    "AttachedHead",
    "ClassMeanClassifier",
    "ClassMeans",
    "ClosedForm",
    "FeatureNorm",
    "FixedETFClassifier",
    "FixedFrameClassifier",
    "Head",
    "LeadingDirections",
    "LearnedClassifier",
    "NearestETFClassifier",
    "NearestFrameClassifier",
    "Simplex",
    "TrustRegion",
    "attach_head",
    "collapse_radius",
]
