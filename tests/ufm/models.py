"""Models and settings shared by the tests of the unconstrained features model."""

from __future__ import annotations

import torch

from helpers import generator
from neuralcollapse.heads import LearnedClassifier
from neuralcollapse.ufm import UnconstrainedFeatures

# (K, n, d, λ_W, λ_H): d below, at and above K, one sample per class, equal and unequal decay, and two at the origin.
SETTINGS = [
    (2, 1, 1, 0.05, 0.05),
    (2, 5, 6, 0.02, 0.01),
    (3, 4, 2, 0.01, 0.02),
    (3, 2, 3, 0.01, 0.01),
    (4, 3, 3, 0.02, 0.005),
    (4, 3, 8, 0.005, 0.02),
    (5, 2, 4, 0.01, 0.03),
    (5, 6, 5, 0.01, 0.003),
    (6, 1, 12, 0.02, 0.02),
    (10, 2, 9, 0.01, 0.01),
    (10, 3, 10, 0.02, 0.005),
    (10, 4, 20, 0.005, 0.002),
    (4, 3, 6, 0.2, 0.2),
    (3, 2, 2, 0.4, 0.2),
]


def random_model(num_classes, samples_per_class, feature_dim, weight_decay, feature_decay, *, seed=0, **options):
    """A model in fp64 at a random start."""
    bias = options.pop("bias", True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = LearnedClassifier(feature_dim, num_classes, bias=bias)
    return UnconstrainedFeatures(
        num_classes,
        samples_per_class,
        feature_dim,
        head,
        weight_decay=weight_decay,
        feature_decay=feature_decay,
        generator=generator(seed),
        **options,
    ).double()
