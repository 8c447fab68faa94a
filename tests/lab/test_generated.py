"""Data drawn from a definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neuralcollapse.cli import main
from neuralcollapse.lab.config import DataSettings
from neuralcollapse.lab.data.generated import PUBLISHED
from neuralcollapse.lab.data.load import load_data
from neuralcollapse.lab.results.tables import read_table

CLUSTERS = {"num_classes": 4, "feature_dim": 30, "train_per_class": 50, "test_per_class": 20, "noise": 0.5, "seed": 1}


def test_mnist_1d_has_the_published_sizes_and_is_standardised():
    data = load_data(DataSettings(data="mnist-1d", data_options="published"), progress=False)
    assert (len(data.train), len(data.test), data.image_shape, data.num_classes) == (4000, 1000, (1, 1, 40), 10)
    every = torch.cat([data.train.images, data.test.images]).double()
    assert float(every.mean()) == pytest.approx(0, abs=1e-6)
    assert float(every.std(correction=0)) == pytest.approx(1, abs=1e-6)
    assert torch.cat([data.train.labels, data.test.labels]).bincount().tolist() == [500] * 10
    again = load_data(DataSettings(data="mnist-1d", data_options="published"), progress=False)
    assert torch.equal(again.train.images, data.train.images)


def test_without_its_noise_mnist_1d_is_its_curve():
    still = {"padding": [0, 0], "scale_coeff": 0, "max_translation": 1, "corr_noise_scale": 0, "iid_noise_scale": 0}
    settings = PUBLISHED | still | {"shear_scale": 0, "final_seq_length": 12, "num_samples": 100}
    data = load_data(DataSettings(data="mnist-1d", data_options=settings), progress=False)
    curves = data.train.images[data.train.labels == 0].flatten(1)
    zero = np.array([5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5])
    assert torch.allclose(curves, curves[:1].expand_as(curves))
    assert np.corrcoef(curves[0].numpy(), zero)[0, 1] == pytest.approx(1, abs=1e-6)


def test_features_lie_about_their_class_means():
    data = load_data(DataSettings(data="features", data_options=CLUSTERS), progress=False)
    assert (len(data.train), len(data.test), data.image_shape, data.num_classes) == (200, 80, (1, 1, 30), 4)
    samples = data.train.images.flatten(1).double()
    means = torch.stack([samples[data.train.labels == k].mean(0) for k in range(4)])
    assert torch.allclose(means.norm(dim=1), torch.ones(4, dtype=torch.float64), atol=0.1)
    spread = (samples - means[data.train.labels]).square().sum(1).mean()
    assert float(spread) == pytest.approx(0.25 * 49 / 50, rel=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "mnist-1d"}, "data_options must define how data mnist-1d is generated, but is not given"),
        (
            {"data": "mnist-1d", "data_options": {"seed": 1}},
            "data_options of mnist-1d must have .* or be 'published', got",
        ),
        (
            {"data": "features", "data_options": "published"},
            "data_options must be a mapping for data features, got 'published'",
        ),
        (
            {"data": "features", "data_options": CLUSTERS | {"noise": -1}},
            "data_options.noise must be a number of at least 0",
        ),
        (
            {"data": "mnist-1d", "data_options": PUBLISHED | {"padding": 36}},
            "padding must be a least and a greatest number",
        ),
        (
            {"data": "mnist-1d", "data_options": PUBLISHED | {"train_split": 2}},
            "train_split must be below 1, got 2",
        ),
        ({"data_options": "published"}, "data_options belongs to data other than digits; here data is digits"),
        ({"data": "mnist-1d", "image_size": 9}, "image_size belongs to data other than mnist-1d and features"),
    ],
)
def test_invalid_options_of_generators_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        load_data(DataSettings(**settings), progress=False)


def test_generated_data_are_trained_on(tmp_path):
    out = tmp_path / "out"
    flags = [
        "--data",
        "features",
        "--data_options",
        str(CLUSTERS),
        "--backbone",
        "mlp",
        "--width",
        "16",
        "--epochs",
        "8",
    ]
    assert main(["train", *flags, "--batch_size", "20", "--out", str(out)]) == 0
    table = read_table(out / "metrics.csv").query("epoch == 8 and split == 'train' and metric == 'accuracy'")
    assert table["value"].item() > 0.9
