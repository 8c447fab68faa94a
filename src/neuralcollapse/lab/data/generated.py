"""Synthetic data: MNIST-1D, and Gaussian features around random class means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from neuralcollapse.lab.config import DataSettings
from neuralcollapse.lab.data.images import ArrayImages
from neuralcollapse.lab.data.selection import Samples
from neuralcollapse.lab.data.sources import Source

# Curve of each digit, and settings, of Greydanus and Kobak, "Scaling down deep learning with MNIST-1D" (ICML 2024).
_DIGITS = (
    (5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5),
    (5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5),
    (5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5),
    (5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5),
    (5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5),
    (5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5),
    (5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5),
    (5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5),
)
PUBLISHED: dict[str, Any] = {
    "num_samples": 5000,
    "train_split": 0.8,
    "padding": [36, 60],
    "scale_coeff": 0.4,
    "max_translation": 48,
    "corr_noise_scale": 0.25,
    "iid_noise_scale": 0.02,
    "shear_scale": 0.75,
    "final_seq_length": 40,
    "seed": 42,
}
_FEATURE_SETTINGS = ("num_classes", "feature_dim", "train_per_class", "test_per_class", "noise", "seed")


def generated(config: DataSettings) -> Source:
    """Return the data set that ``data_options`` describe.

    Raises:
        ValueError: if an option is missing, unknown or not a number.
    """
    if config.data == "mnist-1d":
        settings = PUBLISHED if config.data_options == "published" else _check(config, tuple(PUBLISHED))
        return mnist_1d(settings)
    return gaussian_features(_check(config, _FEATURE_SETTINGS))


def mnist_1d(settings: Mapping[str, Any]) -> Source:
    """Return ten curves padded, stretched, scaled, shifted and sheared, with correlated and white noise, standardised.

    The definition is the published one; random numbers, and hence single samples, differ.
    """
    random = np.random.default_rng(settings["seed"])
    curves = np.array(_DIGITS)
    curves = (curves - curves.mean(1, keepdims=True)) / curves.std(1, keepdims=True)
    curves = (curves - curves[:, :1]) / 6
    labels = np.repeat(np.arange(10), settings["num_samples"] // 10)
    samples = np.stack([_sample(curves[label], settings, random) for label in labels])
    samples = (samples - samples.mean()) / samples.std()
    order = random.permutation(len(labels))
    return _source(samples[order], labels[order], int(len(labels) * settings["train_split"]), "mnist-1d")


def gaussian_features(settings: Mapping[str, Any]) -> Source:
    """Return samples m_k + noise·z/√d around random unit class means m_k, with z standard normal in d dimensions."""
    classes, dim, train, test = (int(settings[name]) for name in _FEATURE_SETTINGS[:4])
    random = np.random.default_rng(settings["seed"])
    means = random.standard_normal((classes, dim))
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    labels = np.concatenate([np.repeat(np.arange(classes), number) for number in (train, test)])
    samples = means[labels] + settings["noise"] * random.standard_normal((len(labels), dim)) / np.sqrt(dim)
    return _source(samples, labels, classes * train, "features")


def _sample(curve: np.ndarray, settings: Mapping[str, Any], random: np.random.Generator) -> np.ndarray:
    from scipy.ndimage import gaussian_filter1d

    low, high = settings["padding"]
    padded = np.concatenate([curve + 1e-8, np.zeros(low + int(random.random() * (high - low + 1)))])
    signal = _stretched(padded, len(curve) + high) * (1 + settings["scale_coeff"] * (random.random() - 0.5))
    signal = np.roll(signal, random.integers(settings["max_translation"]))
    correlated = gaussian_filter1d(settings["corr_noise_scale"] * random.standard_normal(len(signal)), 2)
    signal = np.where(signal != 0, signal, correlated)
    signal = signal + settings["iid_noise_scale"] * random.standard_normal(len(signal))
    signal = signal - settings["shear_scale"] * (random.random() - 0.5) * np.linspace(-0.5, 0.5, len(signal))
    return _stretched(signal, settings["final_seq_length"])


def _stretched(signal: np.ndarray, length: int) -> np.ndarray:
    return np.interp(np.linspace(0, 1, length), np.linspace(0, 1, len(signal)), signal)


def _source(values: np.ndarray, labels: np.ndarray, train: int, name: str) -> Source:
    images = ArrayImages(list(values.astype(np.float32)[:, None, :, None]), name)
    samples = Samples(images, torch.arange(len(labels))[:, None], torch.from_numpy(labels).long())
    first, second = (samples.take(rows) for rows in samples.rows.flatten().tensor_split([train]))
    return Source(first, second, int(labels.max()) + 1)


def _check(config: DataSettings, names: tuple[str, ...]) -> dict[str, Any]:
    given = config.data_options
    if not isinstance(given, dict) or set(given) != set(names):
        instead = ", or be 'published'" if config.data == "mnist-1d" else ""
        raise ValueError(f"data_options of {config.data} must have {', '.join(names)}{instead}, got {given}")
    for name, value in given.items():
        numbers = value if isinstance(value, list) else [value]
        if isinstance(value, bool) or not all(isinstance(number, int | float) and number >= 0 for number in numbers):
            raise ValueError(f"data_options.{name} must be a number of at least 0, got {value!r}")
    low_high = given.get("padding", [0, 0])
    if not isinstance(low_high, list) or len(low_high) != 2 or low_high[0] > low_high[1]:
        raise ValueError(f"data_options.padding must be a least and a greatest number, got {low_high!r}")
    if not given.get("train_split", 0.5) < 1:
        raise ValueError(f"data_options.train_split must be below 1, got {given['train_split']}")
    return dict(given)
