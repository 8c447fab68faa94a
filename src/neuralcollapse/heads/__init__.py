"""Modules that end a backbone."""

from neuralcollapse.heads.attach import AttachedHead, attach_head
from neuralcollapse.heads.class_means import ClassMeans
from neuralcollapse.heads.fixed import FixedETFClassifier
from neuralcollapse.heads.head import FeatureNorm, Head, collapse_radius
from neuralcollapse.heads.learned import LearnedClassifier, project_after_step
from neuralcollapse.heads.means import ClassMeanClassifier
from neuralcollapse.heads.nearest import NearestETFClassifier

__all__ = [
    "AttachedHead",
    "ClassMeanClassifier",
    "ClassMeans",
    "FeatureNorm",
    "FixedETFClassifier",
    "Head",
    "LearnedClassifier",
    "NearestETFClassifier",
    "attach_head",
    "collapse_radius",
    "project_after_step",
]
