"""Modules that end a backbone."""

from neuralcollapse.heads.attach import AttachedHead, attach_head
from neuralcollapse.heads.class_means import ClassMeans
from neuralcollapse.heads.fixed import FixedETFClassifier, FixedFrameClassifier
from neuralcollapse.heads.head import FeatureNorm, Head, collapse_radius
from neuralcollapse.heads.learned import LearnedClassifier
from neuralcollapse.heads.means import ClassMeanClassifier
from neuralcollapse.heads.nearest import NearestETFClassifier, NearestFrameClassifier

__all__ = [
    "AttachedHead",
    "ClassMeanClassifier",
    "ClassMeans",
    "FeatureNorm",
    "FixedETFClassifier",
    "FixedFrameClassifier",
    "Head",
    "LearnedClassifier",
    "NearestETFClassifier",
    "NearestFrameClassifier",
    "attach_head",
    "collapse_radius",
]
