"""Out-of-distribution scores in NumPy from all training features, each written from its paper."""

from __future__ import annotations

import numpy as np
import torch
from numpy.linalg import eigh, norm, pinv
from torch import Tensor, nn

from helpers import normal
from neuralcollapse import Measurement, MeasureOptions, measure

N, D = 120, 12


def data(num_classes=4, dtype=torch.float64, absent=False):
    """Training features, their targets, weight, bias, and other features; if asked, without the last class."""
    targets = torch.arange(N) % (num_classes - absent)
    features = (normal(N, D, seed=1) + 2 * normal(num_classes, D, seed=2)[targets] + 0.5).to(dtype)
    weight, bias = 0.3 * normal(num_classes, D, seed=3).to(dtype), 0.3 * normal(num_classes, seed=4).to(dtype)
    others = torch.cat([features[:20], 3 * normal(30, D, seed=5).to(dtype)])
    return features, targets, weight, bias, others


def close(scores, expected, tolerance):
    """Assert that scores are equal to expected ones, relative to the greatest of these."""
    assert scores.shape == expected.shape
    np.testing.assert_allclose(scores.double().numpy(), expected, rtol=0, atol=tolerance * np.abs(expected).max())


def linear_model(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A model whose features are its inputs."""
    model = nn.Linear(weight.shape[1], len(weight), bias=bias is not None).to(weight.dtype)
    with torch.no_grad():
        model.weight.copy_(weight)
        if bias is not None:
            model.bias.copy_(bias)
    return model


def measured(features, weight, bias, targets, batch=17, **options) -> Measurement:
    batches = list(zip(features.split(batch), targets.split(batch), strict=True))
    return measure(linear_model(weight, bias), batches, progress=False, options=MeasureOptions(**options))


class Reference:
    """The scores, fitted to training features (N, d) and their targets in fp64."""

    def __init__(self, features: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.features, self.weight = features.double().numpy(), weight.double().numpy()
        self.bias = np.zeros(len(weight)) if bias is None else bias.double().numpy()
        self.targets = targets.numpy()
        self.means = np.stack([self.features[self.targets == label].mean(0) for label in np.unique(self.targets)])
        index = np.searchsorted(np.unique(self.targets), self.targets)
        self.mean = self.features.mean(0)
        self.within = self._covariance(self.features - self.means[index])
        self.total = self._covariance(self.features - self.mean)

    @staticmethod
    def _covariance(deviations):
        return deviations.T @ deviations / len(deviations)

    @staticmethod
    def _pseudoinverse(matrix):
        values, vectors = eigh(matrix)
        kept = values > len(matrix) * np.finfo(float).eps * values.max()
        return (vectors[:, kept] / values[kept]) @ vectors[:, kept].T

    def logits(self, h):
        return h @ self.weight.T + self.bias

    def msp(self, h):
        exponentials = np.exp(self.logits(h))
        return (exponentials / exponentials.sum(1, keepdims=True)).max(1)

    def maxlogit(self, h):
        return self.logits(h).max(1)

    def energy(self, h, temperature=1.0):
        return temperature * np.log(np.exp(self.logits(h) / temperature).sum(1))

    def _distances(self, h):
        precision = self._pseudoinverse(self.within)
        return np.stack([np.einsum("ni,ij,nj->n", h - mean, precision, h - mean) for mean in self.means], axis=1)

    def mahalanobis(self, h):
        return -self._distances(h).min(1)

    def relative_mahalanobis(self, h):
        deviations = h - self.mean
        background = np.einsum("ni,ij,nj->n", deviations, self._pseudoinverse(self.total), deviations)
        return -(self._distances(h) - background[:, None]).min(1)

    def _residual_norms(self, h, dimension):
        origin = -pinv(self.weight) @ self.bias
        _, vectors = eigh(self._covariance(self.features - origin))
        complement = vectors[:, : len(vectors) - dimension]  # eigh is ascending
        return norm((h - origin) @ complement, axis=1)

    def residual(self, h, dimension=None):
        return -self._residual_norms(h, h.shape[1] // 2 if dimension is None else dimension)

    def vim(self, h, dimension=None, greatest=None):
        """With ``greatest``, the greatest logits of the training samples as the model returned them."""
        dimension = h.shape[1] // 2 if dimension is None else dimension
        greatest = self.maxlogit(self.features) if greatest is None else greatest
        alpha = greatest.sum() / self._residual_norms(self.features, dimension).sum()
        virtual = alpha * self._residual_norms(h, dimension)
        return -np.log(np.exp(virtual) / np.exp(self.logits(h)).sum(1))  # −log of the odds of the virtual logit

    def neco(self, h, standardise=True, times_max_logit=False, dimension=None):
        train = self.features
        if standardise:
            deviation = train.std(0)
            deviation[deviation == 0] = 1
            train, h = (train - self.mean) / deviation, (h - self.mean) / deviation
        _, values, right = np.linalg.svd(train - train.mean(0), full_matrices=False)
        if dimension is None:
            dimension = len(self.means) - 1
        elif isinstance(dimension, float):
            dimension = int(np.argmax(np.cumsum(values**2) / (values**2).sum() >= dimension)) + 1
        share = norm(h @ right[:dimension].T, axis=1) / norm(h, axis=1)
        if not times_max_logit:
            return share
        raw = h * deviation + self.mean if standardise else h
        return share * self.maxlogit(raw)

    def nci(self, h, alpha=1e-4):
        rows, deviations = self.weight[self.logits(h).argmax(1)], h - self.mean
        return (rows * deviations).sum(1) / norm(deviations, axis=1) + alpha * np.abs(h).sum(1)

    def fdbd(self, h):
        scores = []
        for feature, logits in zip(h, self.logits(h), strict=True):
            k = logits.argmax()
            others = [label for label in range(len(logits)) if label != k]
            distances = [(logits[k] - logits[j]) / norm(self.weight[k] - self.weight[j]) for j in others]
            scores.append(np.mean(distances) / norm(feature - self.mean))
        return np.array(scores)

    def ncm(self, h):
        return -norm(h[:, None] - self.means, axis=2).min(1)

    def knn(self, h, k=50):
        bank, rows = (x / norm(x, axis=1, keepdims=True) for x in (self.features, h))
        return -np.sort(norm(rows[:, None] - bank, axis=2), axis=1)[:, k - 1]
