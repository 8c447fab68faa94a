"""`features_of`: features and logits of one forward, with gradients, whatever the model returns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers import normal
from neuralcollapse import NearestETFClassifier, attach_head, features_of, measure

N, K, D = 12, 3, 8
INPUTS = normal(N, 6, dtype=torch.float32)
TARGETS = torch.arange(N) % K


def net(*between: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, D), nn.ReLU(), *between, nn.Linear(D, K))


class Encoder(nn.Module):
    """A model with keyword arguments that returns a mapping."""

    def __init__(self):
        super().__init__()
        self.body, self.score, self.calls = net()[:2], nn.Linear(D, K), 0

    def forward(self, pixels, scale=1.0):
        self.calls += 1
        hidden = self.body(scale * pixels)
        return {"hidden": hidden, "logits": self.score(input=hidden)}


def test_they_are_those_of_the_forward_with_gradients():
    model = net().train()
    inputs = INPUTS.clone().requires_grad_()
    features, logits = features_of(model)(inputs)
    torch.testing.assert_close(features, model[:2](inputs), rtol=0, atol=0)
    torch.testing.assert_close(logits, model(inputs), rtol=0, atol=0)
    (expected,) = torch.autograd.grad(model[:2](inputs).square().sum(), inputs)
    (gradient,) = torch.autograd.grad(features.square().sum(), inputs, retain_graph=True)
    torch.testing.assert_close(gradient, expected)
    logits.sum().backward()
    assert model[2].weight.grad is not None
    assert model.training
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_features_times_weight_are_the_logits_that_measure_compares():
    model = Encoder().eval()
    extract = features_of(model)
    features, logits = extract(pixels=INPUTS, scale=2.0)
    torch.testing.assert_close(logits, features @ model.score.weight.T + model.score.bias)
    assert model.calls == 2  # the first call finds the classifier before
    extract(INPUTS)
    assert model.calls == 3
    measured = measure(model, [(INPUTS, TARGETS)], progress=False)
    means = torch.stack([extract(INPUTS).features[k == TARGETS].mean(dim=0) for k in range(K)])
    torch.testing.assert_close(measured.moments.means, means.double(), rtol=1e-5, atol=1e-6)


def test_the_mode_is_kept_and_finding_does_not_train_batch_norm():
    model = net(nn.BatchNorm1d(D)).train()
    extract = features_of(model)
    extract(INPUTS)
    assert model[2].num_batches_tracked == 1  # the second forward of the call, in training mode
    features, _ = extract(INPUTS)
    assert model[2].num_batches_tracked == 2
    torch.testing.assert_close(features.mean(dim=0), torch.zeros(D), rtol=0, atol=1e-5)


def test_the_features_of_a_head_are_what_its_weight_multiplies():
    model = attach_head(net(), NearestETFClassifier(D, K, feature_norm=2.0)).eval()
    features, logits = features_of(model)(INPUTS)
    torch.testing.assert_close(features.norm(dim=1), torch.full((N,), 2.0))
    torch.testing.assert_close(logits, model(INPUTS))


def test_tokens_keep_their_positions():
    features, logits = features_of(net())(INPUTS.view(3, 4, 6))
    assert features.shape == (3, 4, D)
    assert logits.shape == (3, 4, K)


def test_a_convolution_that_is_averaged_has_averaged_features():
    first, last = nn.Conv1d(1, D, 3), nn.Conv1d(D, K, 1)
    model = nn.Sequential(nn.Unflatten(1, (1, 6)), first, nn.ReLU(), last, nn.AdaptiveAvgPool1d(1), nn.Flatten())
    features, logits = features_of(model)(INPUTS)
    torch.testing.assert_close(features, first(INPUTS[:, None]).relu().mean(dim=2))
    torch.testing.assert_close(logits, features @ last.weight[:, :, 0].T + last.bias)


def test_what_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="model must be a module|model must be an nn"):
        features_of("model")
    with pytest.raises(ValueError, match="must end in a classifier"):
        features_of(nn.ReLU())
    with pytest.raises(ValueError, match="classifier must name a module of the model, got 'head'"):
        features_of(net(), "head")
    extract = features_of(nn.Sequential(net(), nn.Softmax(dim=1)))
    with pytest.raises(ValueError, match="no module of Sequential computes its output"):
        extract(INPUTS)
    model = Encoder()
    extract = features_of(model)
    extract(INPUTS)
    model.forward = lambda inputs: model.body(inputs)
    with pytest.raises(ValueError, match="classifier 'score' must be called once per forward, but was called 0 times"):
        extract(INPUTS)
    model.forward = lambda inputs: {"scores": model.score(model.body(inputs))}
    with pytest.raises(ValueError, match=r"model must return logits at \['logits'\] as in the first call, got a dict"):
        extract(INPUTS)
