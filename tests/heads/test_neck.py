"""A neck between the features of a model and its head."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from helpers import normal
from neuralcollapse import LearnedClassifier, NearestETFClassifier, attach_head, find_classifier, measure, softmax_code
from neuralcollapse.heads import FixedFrameClassifier

INPUTS, TARGETS = normal(20, 6, dtype=torch.float32), torch.arange(20) % 5


def net():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5))


NECKS = {
    "linear": lambda: "linear",
    "mlp": lambda: "mlp",
    "module": lambda: nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8)),
}


@pytest.mark.parametrize("name", NECKS)
@pytest.mark.parametrize("bias", ["centring", "none"])
def test_a_neck_is_trained_and_kept_by_to_inference(name, bias):
    model = attach_head(net(), NearestETFClassifier(8, 5, bias=bias), neck=NECKS[name]())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [parameter.clone() for parameter in model.neck.parameters()]
    cross_entropy(model(INPUTS, targets=TARGETS), TARGETS).backward()
    optimizer.step()
    assert any(not torch.equal(old, new) for old, new in zip(before, model.neck.parameters(), strict=True))
    model.eval()
    expected = model(INPUTS)
    assert torch.equal(expected, model.head(model.neck(model.model(INPUTS))))
    assert find_classifier(model, INPUTS)[1] is model.head
    plain = model.to_inference()
    assert not any("NearestETF" in type(module).__name__ for module in plain.modules())
    assert torch.allclose(plain(INPUTS), expected, atol=1e-6)
    batches = [(INPUTS, TARGETS)]
    assert measure(plain, batches, progress=False).weight.shape == (5, 8)


def test_a_neck_may_have_fewer_dimensions_than_an_etf_needs():
    code = softmax_code(5, 2)
    head = FixedFrameClassifier(2, 5, code, orientation="given", bias="none")
    model = attach_head(net(), head, neck="mlp")
    assert [tuple(module.weight.shape) for module in model.neck if isinstance(module, nn.Linear)] == [(12, 12), (2, 12)]
    assert model(INPUTS).shape == (20, 5)


def test_a_checkpoint_holds_the_neck():
    first, second = (attach_head(net(), LearnedClassifier(3, 5), neck="linear") for _ in range(2))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(INPUTS), second(INPUTS))
    assert {"neck.weight", "neck.bias"} <= first.state_dict().keys()
    without = attach_head(net(), LearnedClassifier(12, 5))
    assert not any("neck" in name for name in without.state_dict())


@pytest.mark.parametrize(
    ("neck", "message"),
    [
        ("conv", "neck must be 'linear', 'mlp', a module or None, got 'conv'"),
        (3, "neck must be 'linear', 'mlp', a module or None, got 3"),
        (nn.Linear(12, 7), r"neck must return features of shape \(N, 8\), .* Linear returned \(2, 7\) for N = 2"),
        (nn.Linear(11, 8), "neck must take the 12 features of the classifier, but Linear failed"),
        (nn.LSTM(12, 8), r"neck must return features of shape \(N, 8\), .* LSTM returned tuple"),
        (None, "head must take the 12 features .*, got in_features = 8; use a neck to change the number of features"),
    ],
    ids=["name", "number", "output", "input", "tuple", "none"],
)
def test_a_neck_that_does_not_fit_is_refused_and_changes_nothing(neck, message):
    model = net()
    expected = model(INPUTS)
    with pytest.raises(ValueError, match=f"^{message}"):
        attach_head(model, LearnedClassifier(8, 5), neck=neck)
    assert torch.equal(model(INPUTS), expected)
