"""Features without labels, and with those that the classifier predicts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from helpers import error_of, normal
from neuralcollapse import losses
from neuralcollapse.catalogue import METRICS
from neuralcollapse.cli import main
from neuralcollapse.metrics import effective_rank, measure_features
from neuralcollapse.metrics import features as module

N, D, K = 300, 9, 4
FEATURES = (normal(N, D, seed=1) * torch.linspace(0.2, 2, D) + normal(D, seed=2)).float()


def measured(*arguments, **options):
    return measure_features(*arguments, progress=False, **options)


@pytest.mark.parametrize("source", ["tensor", "file", "maps"])
def test_values_are_those_of_dense_formulas(source, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 40 * D)
    np.save(tmp_path / "x.npy", FEATURES.numpy())
    maps = FEATURES.view(3, 10, 10, D).movedim(-1, 1)
    measurement = measured({"tensor": FEATURES, "file": tmp_path / "x.npy", "maps": maps}[source])
    h = FEATURES.double().numpy()
    norms = np.linalg.norm(h, axis=1)
    u = h / norms[:, None]
    squares = ((u[:, None] - u[None]) ** 2).sum(-1)
    others = ~np.eye(N, dtype=bool)
    expected = {
        "feature_norm": np.sqrt((norms**2).mean()),
        "feature_norm_spread": norms.std() / norms.mean(),
        "rank_me": float(effective_rank(torch.from_numpy(h))),
        "effective_rank_features": float(effective_rank(torch.from_numpy(h - h.mean(0)))),
        "koleo": float(losses.koleo(torch.from_numpy(h))),
        "uniformity": np.log(np.exp(-2 * squares[others]).mean()),
    }
    assert measurement.metrics == pytest.approx(expected, rel=1e-6)
    assert (measurement.num_samples, measurement.num_drawn) == (N, N)
    np.testing.assert_allclose(measurement.covariance.numpy(), np.cov(h.T, bias=True), rtol=1e-8, atol=1e-12)


def test_uniformity_of_known_points():
    square = torch.tensor([[1.0, 0], [0, 2], [-3, 0], [0, -1]])  # distances² 2, 2 and 4 to the others
    assert measured(square).metrics["uniformity"] == pytest.approx(math.log((2 * math.exp(-4) + math.exp(-8)) / 3))
    assert measured(torch.ones(5, 3)).metrics["uniformity"] == 0


def test_metrics_over_pairs_are_of_the_same_drawn_samples(monkeypatch):
    from neuralcollapse.metrics import unlabelled

    whole = measured(FEATURES)
    monkeypatch.setattr(unlabelled, "DRAWN", 50)
    drawn = measured(FEATURES)
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 7 * D)
    assert measured(FEATURES).metrics == pytest.approx(drawn.metrics, rel=1e-9)
    assert drawn.num_drawn == 50
    assert drawn.metrics["koleo"] < whole.metrics["koleo"]  # fewer samples are farther apart
    assert abs(drawn.metrics["uniformity"] - whole.metrics["uniformity"]) < 0.3


def test_metrics_of_labels_are_absent_with_a_reason():
    measurement = measured(FEATURES)
    absent = set(METRICS) - set(measurement.metrics)
    assert set(METRICS) & set(measurement.metrics) == {"feature_norm", "rank_me"}
    assert {measurement.undefined[name] for name in absent} == {"needs labels, but none were given"}
    assert set(measurement.undefined) == absent
    assert "nc1_pinv" not in str(measurement)
    assert f"{len(absent)} metrics need labels" in str(measurement)
    assert "<td" in measurement._repr_html_()


@pytest.mark.parametrize(
    ("features", "reasons"),
    [
        (torch.zeros(4, 3), {"rank_me": "all features are zero", "koleo": "4 of the drawn features are zero"}),
        (torch.ones(4, 3) * 0.1, {"effective_rank_features": "the same for all", "koleo": "the same for all"}),
        (torch.tensor([[1.0, 0], [2, 0], [0, 1]]), {"koleo": "two features have the same direction"}),
        (torch.ones(1, 3), {"koleo": "fewer than two features", "uniformity": "fewer than two features"}),
        (torch.ones(0, 3), {"feature_norm": "no sample", "uniformity": "no sample"}),
    ],
)
def test_undefined_metrics_are_nan_with_a_reason(features, reasons):
    with pytest.warns(UserWarning, match="undefined metrics"):
        measurement = measured(features)
    for name, reason in reasons.items():
        assert math.isnan(measurement.metrics[name])
        assert reason in measurement.undefined[name]
    assert all(name in measurement.undefined for name, value in measurement.metrics.items() if math.isnan(value))


def test_small_spread_of_large_norms_is_exact():
    norms = 1e6 + torch.tensor([-1.0, 1, -1, 1], dtype=torch.float64)
    features = norms[:, None] * torch.eye(4, dtype=torch.float64)
    assert measured(features).metrics["feature_norm_spread"] == pytest.approx(1e-6, rel=1e-9)


def test_predicted_labels_are_those_of_the_classifier(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 40 * D)
    weight, bias = normal(K, D, seed=3).float(), normal(K, seed=4).float()
    labels = (FEATURES @ weight.T + bias).argmax(1)
    expected, measurement = measured(FEATURES, labels, weight, bias), measured(FEATURES, "predicted", weight, bias)
    names = set(expected.metrics) - {"accuracy"}
    assert set(measurement.metrics) == names
    assert {name: measurement.metrics[name] for name in names} == {name: expected.metrics[name] for name in names}
    assert measurement.undefined["accuracy"] == "the labels are the predictions of the classifier"
    assert measurement.class_accuracy.isnan().all()
    assert measurement.provenance.labels == expected.provenance.labels


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((None, normal(K, D, seed=3)), {}, "labels must be given with weight; labels='predicted'"),
        ((None,), {"num_classes": 3}, "labels must be given with num_classes"),
        ((None,), {"ood": FEATURES}, "labels must be given with ood"),
        (("predicted",), {}, "weight must be given with labels='predicted'"),
        (("predictd",), {}, "labels must be a file of .npy"),
    ],
)
def test_what_needs_labels_is_refused_without_them(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        measured(FEATURES, *arguments, **options)


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        measured(torch.full((4, 3), torch.nan))


def test_the_command_prints_them(tmp_path, capsys):
    np.save(tmp_path / "x.npy", FEATURES.numpy())
    np.save(tmp_path / "w.npy", normal(K, D, seed=3).float().numpy())
    files = ["--features", str(tmp_path / "x.npy")]
    assert main(["measure", *files]) == 0
    assert f"uniformity {measured(FEATURES).metrics['uniformity']:>34.4g}".split() == next(
        line.split() for line in capsys.readouterr().out.split("\n") if "uniformity" in line
    )
    assert main(["measure", *files, "--labels", "predicted", "--weight", str(tmp_path / "w.npy")]) == 0
    assert "nc3_duality" in capsys.readouterr().out
    assert "out has no effect on features without labels" in error_of(capsys, "measure", *files, "--out", "new")
