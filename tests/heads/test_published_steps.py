"""The head's steps against the published problem, solved by pymanopt on the same features."""

from __future__ import annotations

import math

import numpy as np
import pymanopt
import pytest
import torch
from pymanopt.manifolds import Stiefel
from pymanopt.optimizers import TrustRegions
from torch.nn.functional import normalize

from helpers import normal
from neuralcollapse import NearestETFClassifier


def published_frame(moving_means, last, delta):
    """The published problem over (d, K) matrices P with orthonormal columns, by pymanopt's trust region:

    ‖Ĉ − PΠ/√(K−1)‖²_F + (δ/2) ‖P − P_last‖²_F, started at P_last.
    """
    target = (moving_means - moving_means.mean(0)).T.numpy()
    target = target / np.linalg.norm(target)
    dimension, count = target.shape
    scale = 1 / math.sqrt(count - 1)
    manifold = Stiefel(dimension, count)

    def centre(matrix):
        return matrix - matrix.mean(1, keepdims=True)

    @pymanopt.function.numpy(manifold)
    def cost(point):
        return float(((target - scale * centre(point)) ** 2).sum() + delta / 2 * ((point - last) ** 2).sum())

    @pymanopt.function.numpy(manifold)
    def gradient(point):
        return -2 * scale * centre(target - scale * centre(point)) + delta * (point - last)

    @pymanopt.function.numpy(manifold)
    def hessian(_point, tangent):
        return 2 * scale**2 * centre(tangent) + delta * tangent

    posed = pymanopt.Problem(manifold, cost, euclidean_gradient=gradient, euclidean_hessian=hessian)
    solver = TrustRegions(max_iterations=200, min_gradient_norm=1e-9, min_step_size=0.0, verbosity=0)
    return solver.run(posed, initial_point=last).point


def steps_apart(num_classes, feature_dim, delta, steps=5):
    """‖ΔE‖_F of each step: the head's ETF, and E = √(K/(K−1)) P Π of the published problem with its own last P."""
    head = NearestETFClassifier(
        feature_dim,
        num_classes,
        feature_norm=5.0,
        momentum="published",
        proximal_weight=delta * (num_classes - 1) / 2,
    ).double()
    targets = torch.arange(4 * num_classes) % num_classes
    signal = normal(num_classes, feature_dim, seed=99)
    frame, moving, distances = np.eye(feature_dim, num_classes), None, []
    for step in range(1, steps + 1):
        features = signal[targets] + normal(len(targets), feature_dim, seed=step) + 0.3
        head(features, targets)
        on_sphere = 5.0 * normalize(features)
        means = torch.stack([on_sphere[targets == k].mean(0) for k in range(num_classes)]) - on_sphere.mean(0)
        weight = 2 / (step + 1)
        moving = means if moving is None else (1 - weight) * moving + weight * means
        frame = published_frame(moving, frame, delta if step > 1 else 0.0)
        etf = math.sqrt(num_classes / (num_classes - 1)) * (frame - frame.mean(1, keepdims=True)).T
        distances.append(float((head.weight - torch.from_numpy(etf)).norm()))
    return distances


@pytest.mark.parametrize(("num_classes", "feature_dim"), [(10, 64), pytest.param(100, 512, marks=pytest.mark.slow)])
def test_five_steps_are_those_of_the_published_problem(num_classes, feature_dim):
    """The first to the solver's accuracy; later ones O(δ) apart: only the published P has a column along 1."""
    apart = steps_apart(num_classes, feature_dim, delta=1e-3)
    assert apart[0] <= 1e-5
    assert max(apart) <= 2e-3 * math.sqrt(num_classes)
    closer = steps_apart(num_classes, feature_dim, delta=1e-4)
    assert 5 < max(apart[1:]) / max(closer[1:]) < 20
