"""The detector module: what it reads from a model, its dtype, copies and compilation, and its threshold."""

from __future__ import annotations

import copy
import gc
import io

import pytest
import torch
from torch import nn

from helpers import CountedLoader, normal
from neuralcollapse import NearestETFClassifier, attach_head, measure, ood

N, K, D = 60, 3, 8
INPUTS = normal(N, 6, dtype=torch.float32) + 2 * normal(K, 6, seed=1, dtype=torch.float32)[torch.arange(N) % K]
TARGETS = torch.arange(N) % K
OTHERS = 3 * normal(9, 6, seed=2, dtype=torch.float32)
WITHOUT_BANK = [name for name in ood.SCORES if name != "knn"]


def net(*first, last=None):
    torch.manual_seed(0)
    return nn.Sequential(*first, nn.Linear(6, D), nn.ReLU(), last or nn.Linear(D, K)).eval()


def record(model, inputs=INPUTS):
    return measure(model, list(zip(inputs.split(20), TARGETS.split(20), strict=True)), progress=False)


class Wrapped(nn.Module):
    """A model that takes keyword arguments and returns a mapping."""

    def __init__(self):
        super().__init__()
        self.encoder, self.drop, self.score = net()[:2], nn.Dropout(0.5), nn.Linear(D, K)

    def forward(self, pixels, scale=1.0):
        return {"logits": self.score(input=self.drop(self.encoder(scale * pixels)))}


class Convolution(nn.Module):
    """A classifier of positions whose logits are averaged."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv1d(1, D, 3), nn.Conv1d(D, K, 1)

    def forward(self, inputs):
        return self.last(self.first(inputs[:, None]).relu()).mean(dim=2)


@pytest.mark.parametrize("name", WITHOUT_BANK)
def test_the_scores_are_those_of_the_features(name):
    model = net()
    fitted = ood.fit_score(record(model), name)
    detector = ood.Detector(model, record(model), name)
    features = model[:2](OTHERS)
    torch.testing.assert_close(detector(OTHERS), fitted(features), rtol=1e-5, atol=1e-5)
    assert torch.equal(detector(OTHERS), detector.from_features(features))
    assert torch.equal(detector.features(OTHERS), features)
    assert detector(OTHERS[:0]).shape == (0,)


def test_the_features_of_a_head_are_what_its_weight_multiplies():
    model = attach_head(net(), NearestETFClassifier(D, K, feature_norm=2.0)).train()
    model(INPUTS, targets=TARGETS)
    detector = ood.Detector(model, record(model), "ncm")
    assert torch.allclose(detector.features(OTHERS).norm(dim=1), torch.tensor(2.0))


def test_keyword_arguments_mappings_and_dropout():
    model = Wrapped().train()
    detector = ood.Detector(model, record(model), "energy")
    assert not model.training
    expected = torch.logsumexp(model(2 * OTHERS)["logits"], dim=1)
    torch.testing.assert_close(detector(pixels=OTHERS, scale=2.0), expected)
    torch.testing.assert_close(detector(OTHERS, scale=2.0), expected)


def test_a_convolution_as_classifier():
    model = Convolution()
    detector = ood.Detector(model, record(model), "maxlogit")
    torch.testing.assert_close(detector(OTHERS), model(OTHERS).amax(dim=1))


def test_features_of_tokens_keep_their_positions():
    model = net()
    detector = ood.Detector(model, record(model), "ncm")
    tokens = OTHERS.view(3, 3, 6)
    torch.testing.assert_close(detector(tokens), detector(OTHERS).view(3, 3))


def test_the_model_behaves_as_before():
    model = net()
    before = model(OTHERS)
    detector = ood.Detector(model, record(model), "ncm")
    assert torch.equal(model(OTHERS), before)
    assert detector._recorder.features is None  # only calls of the detector are recorded
    detector(OTHERS)
    assert detector._recorder.features is None
    with pytest.raises(RuntimeError):
        detector(OTHERS[:, :2])
    model(OTHERS)
    assert detector._recorder.features is None
    del detector
    gc.collect()
    assert not model[2]._forward_pre_hooks


def test_copies_and_pickles_are_independent():
    detector = ood.Detector(net(), record(net()), "mahalanobis")
    file = io.BytesIO()
    torch.save(detector, file)
    file.seek(0)
    for other in (copy.deepcopy(detector), torch.load(file, weights_only=False)):
        assert torch.equal(other(OTHERS), detector(OTHERS))
        with torch.no_grad():
            other.model[0].weight.zero_()
        assert not torch.equal(other(OTHERS), detector(OTHERS))


@pytest.mark.parametrize("name", WITHOUT_BANK)
def test_the_state_has_all_that_was_fitted(name):
    detector = ood.Detector(net(), record(net()), name)
    other = ood.Detector(net(), record(net(), INPUTS + 1), name)
    assert name in ("msp", "maxlogit", "energy") or not torch.equal(other(OTHERS), detector(OTHERS))
    other.load_state_dict(detector.state_dict())
    assert torch.equal(other(OTHERS), detector(OTHERS))


def test_fitted_tensors_are_never_in_low_precision():
    model = net()
    detector = ood.Detector(model, record(model), "mahalanobis")
    features = model[:2](OTHERS)
    expected = detector.from_features(features)
    assert {buffer.dtype for buffer in detector.buffers()} == {torch.float32}
    detector.to(torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert {buffer.dtype for buffer in detector.buffers()} == {torch.float32}
    assert torch.equal(detector.from_features(features), expected)
    assert detector(OTHERS.bfloat16()).dtype == torch.float32
    detector.double()
    assert detector(OTHERS.double()).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(detector.float().from_features(features), expected)


def test_a_model_in_fp64_is_scored_in_fp64():
    model = net().double()
    measurement = record(model, INPUTS.double())
    scores = ood.Detector(model, measurement, "vim")(OTHERS.double())
    expected = ood.fit_score(measurement, "vim")(model[:2](OTHERS.double()))
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ood.SCORES)
def test_a_detector_compiles_to_one_graph(name):
    torch.compiler.reset()  # every score is a new graph of the same function
    model = net()
    options = {"bank": normal(60, D)} if name == "knn" else {}
    detector = ood.Detector(model, record(model), name, **options)
    compiled = torch.compile(detector, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(OTHERS), detector(OTHERS), rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_inputs():
    detector = ood.Detector(net(), record(net()), "energy")
    inputs = OTHERS.clone().requires_grad_()
    detector(inputs).sum().backward()
    assert inputs.grad.abs().sum() > 0


def test_size_of_the_state():
    """O(K d + d²) numbers, whatever the score."""
    for name in WITHOUT_BANK:
        detector = ood.Detector(net(), record(net()), name)
        assert sum(buffer.numel() for buffer in detector.buffers()) <= 2 * K * D + 2 * D * D + 2 * D + K + 1


@pytest.mark.parametrize("tpr", [0.05, 0.7, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_the_threshold_is_the_greatest_that_accepts_enough(tpr, ties):
    model = net()
    detector = ood.Detector(model, record(model), "energy")
    inputs = INPUTS[torch.arange(N) // 4] if ties else INPUTS
    loader = list(zip(inputs.split(7), TARGETS.split(7), strict=True))
    threshold = detector.threshold(loader, tpr, progress=False)
    scores = torch.cat([detector(batch) for batch, _ in loader])  # rounding depends on the size of a batch
    enough = [score for score in scores.tolist() if (scores >= score).float().mean() >= tpr - 1e-6]
    assert threshold == max(enough)
    assert detector.threshold([(part,) for part in inputs.split(7)], tpr, progress=False) == threshold
    assert detector.threshold(inputs.split(7), tpr, progress=False) == threshold


def test_auto_gives_its_reason():
    detector = ood.Detector(net(), record(net(), normal(N, 6, dtype=torch.float32)))
    assert detector.score == "relative_mahalanobis"
    assert "nc1_quotient" in detector.reason
    assert ood.Detector(net(), record(net()), "ncm").reason == ""
    assert "score='relative_mahalanobis'" in repr(detector)


def trained():
    model = net()
    with torch.no_grad():
        model[2].weight[0, 0] += 1e-4
    return model


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, inputs):
        return self.net(self.net(inputs)[:, :1] + inputs)


def test_the_model_must_be_in_the_measured_state():
    with pytest.raises(ValueError, match=r"no module of Sequential has the measured weight \(3, 8\).*'2' \(3, 8\)"):
        ood.Detector(trained(), record(net()), "ncm")
    ood.Detector(net().bfloat16(), record(net()), "ncm")  # the same weight, rounded
    twice = net(last=nn.Sequential(nn.Linear(D, K), nn.Linear(K, K, bias=False)))
    with torch.no_grad():
        twice[2][1].weight.copy_(torch.eye(K))
    assert ood.Detector(net(), record(net()), "ncm", classifier="2").score == "ncm"
    with pytest.raises(ValueError, match="no module"):
        ood.Detector(net(), record(net()), "ncm", classifier="0")


def test_a_shared_weight_has_to_be_named():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.one, self.other = net()[:2], nn.Linear(D, K), nn.Linear(D, K)
            self.other.load_state_dict(self.one.state_dict())

        def forward(self, inputs):
            return self.one(self.body(inputs))

    model = Two()
    measurement = measure(model, [(INPUTS, TARGETS)], classifier="one", progress=False)
    with pytest.raises(ValueError, match="several modules have the measured weight: 'one', 'other'"):
        ood.Detector(model, measurement, "ncm")
    assert ood.Detector(model, measurement, "ncm", classifier="one")(OTHERS).shape == (9,)
    with pytest.raises(ValueError, match="called it 0 times"):
        ood.Detector(model, measurement, "ncm", classifier="other")(OTHERS)


def test_bad_inputs():
    detector = ood.Detector(net(), record(net()), "ncm")
    with pytest.raises(ValueError, match=r"features must be of shape \(..., 8\), got \(2, 9\)"):
        detector.from_features(torch.ones(2, D + 1))
    with pytest.raises(ValueError, match="features must be a floating-point tensor"):
        detector.from_features(torch.ones(2, D, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"features must be of shape \(..., 8\), got \(8,\)"):
        detector.from_features(torch.ones(D))
    with pytest.raises(ValueError, match="model must be an nn.Module"):
        ood.Detector(len, record(net()), "ncm")
    for tpr in (0, 1.5, "all"):
        with pytest.raises(ValueError, match=r"tpr must be in \(0, 1\]"):
            detector.threshold([INPUTS], tpr)
    with pytest.raises(ValueError, match="at least one sample"):
        detector.threshold([], progress=False)
    with pytest.raises(ValueError, match="60 NaN of 60"):
        detector.threshold([INPUTS * torch.nan], progress=False)
    both = Twice()
    measurement = record(both.net)
    with pytest.raises(ValueError, match="called it 2 times"):
        ood.Detector(both, measurement, "ncm")(OTHERS)


@pytest.mark.parametrize("progress", [True, False])
def test_threshold_starts_the_loader_once(progress):
    loader = CountedLoader([(part,) for part in INPUTS.split(7)])
    ood.Detector(net(), record(net()), "energy").threshold(loader, progress=progress)
    assert loader.passes == 1
