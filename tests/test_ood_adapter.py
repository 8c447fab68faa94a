"""Detectors with the attributes of those of pytorch-ood, which needs torchvision and is not installed.

Each stand-in has the attributes of the detector of its name, as of version 0.4, and its score in fp64.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neuralcollapse import ood
from ood_reference import D, N, Reference, close, data, measured


class Mahalanobis:
    def __init__(self):
        self.mu = self.cov = self.precision = None

    def outlier_score(self, h):
        deviations = h[:, None] - self.mu.double()
        return ((deviations @ self.precision.double()) * deviations).sum(-1).amin(dim=1) / 2


class RMD(Mahalanobis):
    def __init__(self):
        super().__init__()
        self.background_mu = self.background_cov = self.background_precision = None

    def outlier_score(self, h):
        deviations = h - self.background_mu.double()
        background = ((deviations @ self.background_precision.double()) * deviations).sum(-1)
        return 2 * super().outlier_score(h) - background


class ViM:
    def __init__(self, w, b, n_dim=5):
        self.w, self.b, self.n_dim = w, b, n_dim
        self.u = -np.linalg.pinv(np.asarray(w)) @ np.asarray(b)
        self.principal_subspace = self.alpha = None

    def outlier_score(self, h):
        virtual = self.alpha * np.linalg.norm((h.numpy() - self.u) @ np.asarray(self.principal_subspace), axis=1)
        return torch.from_numpy(virtual - np.log(np.exp(h.numpy() @ np.asarray(self.w).T + np.asarray(self.b)).sum(1)))


class NECO:
    def __init__(self, standardize):
        self.standardize, self.d = standardize, 3
        self.feature_mean = self.feature_std = self.pca_mean = self.components = self.explained_variance = None

    def outlier_score(self, h):
        if self.standardize:
            h = (h - self.feature_mean.double()) / self.feature_std.double()
        projected = (h - self.pca_mean.double()) @ self.components[:, : self.d].double()
        return -projected.norm(dim=1) / h.norm(dim=1)


class NCI:
    def __init__(self):
        self.global_mean = None


class FDBD:
    def __init__(self):
        self.train_mean, self.prepared = None, False

    def _precompute_denom_matrix(self):
        self.prepared = True


@pytest.fixture(scope="module")
def setting():
    features, targets, weight, bias, others = data()
    return features, targets, weight, bias, others, measured(features, weight, bias, targets)


def test_mahalanobis_and_rmd(setting):
    features, targets, weight, bias, others, measurement = setting
    reference = Reference(features, targets, weight, bias)
    # Scatters in place of covariances divide the distances by N; the first score is half of the distance.
    scores = ood.to_pytorch_ood(measurement, Mahalanobis()).outlier_score(others)
    close(2 * N * scores, -reference.mahalanobis(others.numpy()), 1e-5)
    detector = ood.to_pytorch_ood(measurement, RMD())
    close(N * detector.outlier_score(others), -reference.relative_mahalanobis(others.numpy()), 1e-4)
    scatter = torch.from_numpy(N * reference.within).float()
    torch.testing.assert_close(detector.cov, scatter + 1e-6 * torch.eye(D), rtol=1e-6, atol=1e-6)
    assert detector.mu.dtype == torch.float32


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_vim(setting, kind):
    features, targets, weight, bias, others, measurement = setting
    detector = ood.to_pytorch_ood(measurement, ViM(kind(weight), kind(bias)))
    assert isinstance(detector.principal_subspace, type(detector.w))
    expected = -Reference(features, targets, weight, bias).vim(others.numpy(), dimension=5)
    close(detector.outlier_score(others), expected, 1e-5)
    assert ood.to_pytorch_ood(measurement, ViM(kind(weight), kind(bias), n_dim=512)).n_dim == D // 2


@pytest.mark.parametrize("standardize", [True, False])
def test_neco(setting, standardize):
    features, targets, weight, bias, others, measurement = setting
    detector = ood.to_pytorch_ood(measurement, NECO(standardize))
    scale = features.std(0, correction=0) if standardize else 1
    _, values, right = np.linalg.svd(((features - features.mean(0)) / scale).numpy(), full_matrices=False)
    np.testing.assert_allclose(detector.explained_variance.numpy(), values**2 / (N - 1), rtol=1e-5)
    if standardize:
        close(-detector.outlier_score(others), Reference(features, targets, weight, bias).neco(others.numpy()), 1e-5)
    else:
        projected = np.linalg.norm((others - features.mean(0)).numpy() @ right[:3].T, axis=1)
        close(-detector.outlier_score(others), projected / np.linalg.norm(others.numpy(), axis=1), 1e-5)


def test_means(setting):
    features, *_, measurement = setting
    torch.testing.assert_close(ood.to_pytorch_ood(measurement, NCI()).global_mean, features.mean(0).float())
    detector = ood.to_pytorch_ood(measurement, FDBD())
    torch.testing.assert_close(detector.train_mean, features.mean(0).float())
    assert detector.prepared


def test_bad_arguments(setting):
    features, targets, weight, bias, _, measurement = setting
    with pytest.raises(ValueError, match="detector must have one of the attributes mu, .*, got object"):
        ood.to_pytorch_ood(measurement, object())
    with pytest.raises(ValueError, match="measurement must be a Measurement, got Mahalanobis"):
        ood.to_pytorch_ood(Mahalanobis(), measurement)
    with pytest.raises(ValueError, match=r"detector.w must be of shape \(4, 12\), got \(2, 12\)"):
        ood.to_pytorch_ood(measurement, ViM(weight[:2], bias[:2]))
    absent = measured(features, weight, bias, targets.clamp(max=2))
    with pytest.raises(ValueError, match="samples of every class, got none of 3"):
        ood.to_pytorch_ood(absent, Mahalanobis())
