"""Fits of detectors of the package pytorch-ood from a measurement, instead of from all training features."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from neuralcollapse.metrics.measurement import Measurement
from neuralcollapse.ood.fit import Record, fit_score

_RIDGE = 1e-6  # added to the diagonal of each scatter by pytorch-ood

AnyDetector = TypeVar("AnyDetector")


def to_pytorch_ood(measurement: Measurement, detector: AnyDetector) -> AnyDetector:
    """Set the attributes that ``fit`` of a pytorch-ood detector computes from training data, and return the detector.

    The detector is recognised by its attributes: ``mu`` and ``precision`` (Mahalanobis; with ``background_mu`` also
    RMD), ``principal_subspace`` (ViM, Residual), ``components`` (NECO), ``global_mean`` (NCI) and ``train_mean``
    (fDBD). As in pytorch-ood, covariances are scatters, which are not divided by N, with 1e-6 added to their diagonal.
    The package itself is not imported. Its scores are greater for out-of-distribution inputs.

    Args:
        measurement: Measurement of the training data.
        detector: The detector; it is changed in place. Its tensors are on the CPU until it is moved.

    Raises:
        ValueError: if the detector has none of these attributes, a class has no samples (Mahalanobis, RMD), or the
            weight of the detector has another shape, or as for `fit_score`.

    Examples:
        >>> import neuralcollapse as nc
        >>> class NCI:
        ...     global_mean = None
        >>> batch = torch.randn(30, 8), torch.arange(30) % 3
        >>> measurement = nc.measure(torch.nn.Linear(8, 3), [batch], progress=False)
        >>> to_pytorch_ood(measurement, NCI()).global_mean.shape
        torch.Size([8])
    """
    if not isinstance(measurement, Measurement):
        raise ValueError(f"measurement must be a Measurement, got {type(measurement).__name__}")
    for attribute, values in _FITS.items():
        if hasattr(detector, attribute):
            for name, value in values(Record.of(measurement), detector).items():
                setattr(detector, name, value.float() if isinstance(value, Tensor) else value)
            if callable(prepare := getattr(detector, "_precompute_denom_matrix", None)):
                prepare()
            return detector
    names = ", ".join(_FITS)
    raise ValueError(f"detector must have one of the attributes {names}, got {type(detector).__name__}")


def _gaussians(record: Record, detector: Any) -> dict[str, Any]:
    """Return class means and precision and, for RMD, those of a single Gaussian for all classes."""
    if absent := record.measurement.absent_classes:
        raise ValueError(f"pytorch-ood needs samples of every class, got none of {', '.join(map(str, absent))}")
    values = {"mu": record.classes.class_means, **_precision("", record, record.within)}
    if hasattr(detector, "background_mu"):
        values |= {"background_mu": record.classes.center, **_precision("background_", record, record.total)}
    return values


def _precision(prefix: str, record: Record, covariance: Tensor) -> dict[str, Tensor]:
    ridge = _RIDGE * torch.eye(len(covariance), dtype=torch.float64)
    scatter = covariance * record.classes.counts.sum() + ridge
    return {f"{prefix}cov": scatter, f"{prefix}precision": torch.linalg.inv(scatter)}


def _principal_subspace(record: Record, detector: Any) -> dict[str, Any]:
    """Return the complement of the principal space, and α; as arrays if the weight of the detector is an array."""
    measurement = record.measurement
    if tuple(detector.w.shape) != tuple(measurement.weight.shape):
        raise ValueError(
            f"detector.w must be of shape {tuple(measurement.weight.shape)}, got {tuple(detector.w.shape)}"
        )
    feature_dim = measurement.moments.feature_dim
    dimension = feature_dim // 2 if detector.n_dim > feature_dim else detector.n_dim
    fitted = fit_score(measurement, "vim", dimension=dimension).tensors
    basis: Any = fitted["basis"]
    basis = basis.float().numpy() if isinstance(detector.w, np.ndarray) else basis
    return {"n_dim": dimension, "principal_subspace": basis, "alpha": float(fitted["alpha"])}


def _principal_components(record: Record, detector: Any) -> dict[str, Any]:
    """Return all principal components, from which NECO takes the leading ones."""
    center, covariance = record.classes.center, record.total
    deviations = covariance.diagonal().clamp(min=0).sqrt()
    scale = torch.where(deviations > 1e-12, deviations, 1.0) if detector.standardize else torch.ones_like(center)
    eigenvalues, eigenvectors, _ = record.spectrum(covariance / torch.outer(scale, scale))
    samples = int(record.classes.counts.sum())
    return {
        "feature_mean": center if detector.standardize else None,
        "feature_std": scale if detector.standardize else None,
        "pca_mean": torch.zeros_like(center) if detector.standardize else center,
        "components": eigenvectors,
        "explained_variance": eigenvalues * samples / max(samples - 1, 1),
    }


_FITS = {
    "mu": _gaussians,
    "principal_subspace": _principal_subspace,
    "components": _principal_components,
    "global_mean": lambda record, detector: {"global_mean": record.classes.center},
    "train_mean": lambda record, detector: {"train_mean": record.classes.center},
}
