from __future__ import annotations

import math

import pytest
import torch

from helpers import generator
from neuralcollapse import nearest_simplex_etf
from neuralcollapse.heads import (
    FixedETFClassifier,
    LearnedClassifier,
    NearestETFClassifier,
)
from neuralcollapse.metrics import ClassMoments, collapse_metrics
from neuralcollapse.ufm import (
    UnconstrainedFeatures,
    global_optimum,
    measure_unconstrained_features,
    train_unconstrained_features,
)

HEADS = {
    "standard": lambda: LearnedClassifier(8, 4, bias=False, feature_norm=2.0, unit_weight=True),
    "fixed": lambda: FixedETFClassifier(8, 4, feature_norm=2.0),
    "implicit": lambda: NearestETFClassifier(8, 4, feature_norm=2.0, momentum=1.0),
}


@pytest.mark.parametrize("method", HEADS)
def test_every_method_trains_to_collapse(method):
    torch.manual_seed(0)
    model = UnconstrainedFeatures(4, 5, 8, HEADS[method](), generator=generator())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    seen = list(train_unconstrained_features(model, optimizer, 400, {0, 3, 400}))
    assert len(seen) == 401
    measured = [snapshot for snapshot in seen if snapshot is not None]
    assert [snapshot.iteration for snapshot in measured] == [0, 3, 400]
    seconds = [snapshot.seconds for snapshot in measured]
    assert seconds == sorted(seconds)
    assert seconds[0] == 0
    last = measured[-1].values
    least = math.log1p(3 * math.exp(-2 * 4 / 3))  # at an ETF of unit rows under features of norm 2
    assert least - 1e-6 < last["loss"] < least + 1e-3
    assert last["accuracy"] == 1
    for name in ("nc1_quotient", "nc2_etf_means", "nc2_etf_weights", "nc3_duality", "etf_means", "etf_weights"):
        assert last[name] < 0.05, name
        assert last[name] < measured[0].values[name] or measured[0].values[name] < 1e-6, name


def test_measurements_equal_the_library_metrics_in_evaluation_mode():
    model = UnconstrainedFeatures(4, 5, 8, HEADS["standard"](), generator=generator(), class_counts=[2, 9, 4, 5])
    measured = measure_unconstrained_features(model)
    assert model.training
    features, moments = model.head.features(model.features), ClassMoments(4, 8)
    moments.update(features, model.targets)
    metrics = collapse_metrics(moments, model.head.weight)
    for name in ("nc1_quotient", "nc2_etf_means", "nc2_etf_weights", "nc3_duality"):
        assert measured[name] == pytest.approx(metrics[name], rel=1e-6)
    logits, targets = model()
    assert measured["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-5)
    assert measured["accuracy"] == float((logits.argmax(1) == targets).double().mean())
    for name, vectors in (("etf_means", moments.means - features.double().mean(0)), ("etf_weights", model.head.weight)):
        etf, unit = nearest_simplex_etf(vectors.double()), vectors.double() / vectors.double().norm()
        assert measured[name] == pytest.approx((etf / etf.norm() - unit).square().sum().item(), rel=1e-9)


def test_sgd_with_decay_reaches_the_closed_form():
    decay = {"weight_decay": 0.01, "feature_decay": 0.01}
    torch.manual_seed(0)
    model = UnconstrainedFeatures(3, 2, 5, LearnedClassifier(5, 3), generator=generator(), **decay).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for _ in train_unconstrained_features(model, optimizer, 1000, ()):
        pass
    assert float(model.objective().detach()) == pytest.approx(global_optimum(3, 2, **decay).loss, rel=1e-8)


def test_a_diverging_run_is_an_error():
    model = UnconstrainedFeatures(3, 2, 5, LearnedClassifier(5, 3), loss="mse", generator=generator())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e6)
    with pytest.raises(ValueError, match="training diverged: the objective is not finite at iteration 60"):
        list(train_unconstrained_features(model, optimizer, 60, {60}))


def test_bad_input_is_rejected():
    model = UnconstrainedFeatures(3, 2, 5, LearnedClassifier(5, 3), generator=generator())
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        next(train_unconstrained_features(model, torch.optim.SGD(model.parameters(), lr=1.0), 0, ()))
