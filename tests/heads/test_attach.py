from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from helpers import normal
from neuralcollapse import FixedETFClassifier, LearnedClassifier, NearestETFClassifier, attach_head, find_classifier


class Net(nn.Module):
    """A small model with a conventional name, and an option for what it does after its classifier."""

    def __init__(self, after=None):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.ReLU())
        self.fc = nn.Linear(12, 5)
        self.after = after

    def forward(self, inputs, scale: float = 1.0):
        logits = self.fc(scale * self.body(inputs))
        return logits if self.after is None else self.after(logits)


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor


INPUTS, TARGETS = normal(16, 6, dtype=torch.float32), torch.arange(16) % 5


@pytest.mark.parametrize("kind", [LearnedClassifier, FixedETFClassifier, NearestETFClassifier])
def test_head_is_trained_in_the_classifiers_place(kind):
    model = attach_head(Net(), kind(12, 5))
    assert isinstance(model.model.fc, nn.Identity)
    cross_entropy(model(INPUTS, targets=TARGETS), TARGETS).backward()
    assert model.model.body[0].weight.grad.abs().sum() > 0
    model.eval()
    assert torch.equal(model(INPUTS), model.head(model.model.body(INPUTS)))
    assert torch.equal(model(INPUTS, scale=2.0), model.head(2 * model.model.body(INPUTS)))
    assert find_classifier(model) == ("head", model.head)


@pytest.mark.parametrize("kind", [LearnedClassifier, FixedETFClassifier, NearestETFClassifier])
def test_inference_form_in_the_model_decides_the_same_on_raw_inputs(kind):
    model = attach_head(Net(), kind(12, 5, feature_norm=5.0))
    for _ in range(3):
        model(INPUTS, targets=TARGETS)
    expected = model.eval()(INPUTS)
    plain = model.to_inference()
    assert isinstance(plain, Net)
    assert torch.allclose(plain(INPUTS), expected, atol=1e-6)
    assert torch.allclose(torch.export.export(plain, (INPUTS,)).module()(INPUTS), expected, atol=1e-6)
    assert torch.allclose(torch.compile(plain, fullgraph=True, backend="aot_eager")(INPUTS), expected, atol=1e-6)


def test_inference_form_can_take_the_heads_place_too():
    model = attach_head(Net(), NearestETFClassifier(12, 5))
    model(INPUTS, targets=TARGETS)
    expected = model.eval()(INPUTS)
    model.head = model.head.to_inference()
    assert torch.allclose(model(INPUTS), expected, atol=1e-6)


def test_a_sequential_ends_in_its_last_child():
    model = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5)))
    assert find_classifier(model)[0] == "1.2"
    attached = attach_head(model, FixedETFClassifier(12, 5))
    assert attached(INPUTS, targets=TARGETS).shape == (16, 5)


def test_a_classifier_alone_is_a_model():
    assert attach_head(nn.Linear(6, 5), NearestETFClassifier(6, 5))(INPUTS, targets=TARGETS).shape == (16, 5)


@pytest.mark.parametrize(
    ("wrap", "output"),
    [
        (lambda logits: Output(logits, logits + 1), "logits"),
        (lambda logits: {"logits": logits, "hidden": logits + 1}, "logits"),
        (lambda logits: (logits + 1, logits), 1),
        (lambda logits: [[logits]], lambda returned: returned[0][0]),
    ],
)
def test_output_picks_the_logits(wrap, output):
    assert attach_head(Net(wrap), FixedETFClassifier(12, 5), output=output)(INPUTS).shape == (16, 5)
    with pytest.raises(ValueError, match="output must say where the logits are"):
        attach_head(Net(wrap), FixedETFClassifier(12, 5))(INPUTS)


@pytest.mark.parametrize("after", [lambda logits: logits.softmax(1), lambda logits: logits[:, :3], torch.clone])
def test_a_model_that_does_something_after_its_classifier_is_refused(after):
    model = attach_head(Net(after), FixedETFClassifier(12, 5))
    with pytest.raises(ValueError, match="classifier 'fc' must be the last thing that the model does"):
        model(INPUTS)


def test_a_wrong_module_is_refused_at_the_first_call():
    model = Net()
    model.unused = nn.Linear(12, 5)
    with pytest.raises(ValueError, match="classifier 'unused' must be called by the model's forward"):
        attach_head(model, FixedETFClassifier(12, 5), classifier="unused")(INPUTS)


def test_unclear_models_are_asked_about():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 5)

        def forward(self, inputs):
            return self.second(self.first(inputs).relu())

    with pytest.raises(ValueError, match="several modules of Several could be its classifier: 'first', 'second'"):
        find_classifier(Several())
    model = Several()
    assert attach_head(model, FixedETFClassifier(12, 5), classifier=model.second)(INPUTS).shape == (16, 5)
    with pytest.raises(ValueError, match=r"must end in a classifier .* found none"):
        find_classifier(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
    with pytest.raises(ValueError, match="found none"):
        find_classifier(nn.Sequential(nn.Linear(6, 5), nn.Softmax(1)))
    with pytest.raises(ValueError, match=r"classifier must name a module of the model, got 'fcc'; .* 'fc'"):
        attach_head(Net(), FixedETFClassifier(12, 5), classifier="fcc")
    with pytest.raises(ValueError, match="classifier 'body' must be an nn.Linear"):
        attach_head(Net(), FixedETFClassifier(12, 5), classifier="body")
    with pytest.raises(ValueError, match="must be a module of the model; it is not in it"):
        attach_head(Net(), FixedETFClassifier(12, 5), classifier=nn.Linear(12, 5))
    with pytest.raises(
        ValueError, match=r"head must take the 12 features that classifier 'fc' takes, got in_features = 9"
    ):
        attach_head(Net(), FixedETFClassifier(9, 5))


def test_conventional_names_and_nesting():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(6, 16)
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
            self.classifier = nn.Linear(16, 5)

    assert find_classifier(Encoder())[0] == "classifier"
    wrapped = nn.Module()
    wrapped.inner = Encoder()
    assert find_classifier(wrapped)[0] == "inner.classifier"


def test_padded_tokens_of_an_attached_model_count_nowhere():
    """(B, T, d) features with targets −100 at the padding: means, ETF and logits are those of the real tokens alone."""
    heads = [NearestETFClassifier(12, 5, ignore_index=ignored) for ignored in (-100, None)]
    torch.manual_seed(0)
    whole = attach_head(Net(), heads[0])
    torch.manual_seed(0)
    alone = attach_head(Net(), heads[1])
    tokens, targets = normal(4, 7, 6, dtype=torch.float32), torch.arange(28).reshape(4, 7) % 5
    real = torch.arange(7) < torch.tensor([7, 5, 3, 1]).unsqueeze(1)
    tokens, targets = torch.where(real.unsqueeze(-1), tokens, 1e3), torch.where(real, targets, -100)

    logits, expected = whole(tokens, targets=targets), alone(tokens[real], targets=targets[real])
    assert logits.shape == (4, 7, 5)
    assert torch.allclose(logits[real], expected, atol=1e-5)
    for name, value in heads[1].state_dict().items():
        assert torch.allclose(heads[0].state_dict()[name], value, atol=1e-5), name

    cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100).backward()
    cross_entropy(expected, targets[real]).backward()
    gradient, wanted = (model.model.body[0].weight.grad for model in (whole, alone))
    assert wanted.abs().max() > 1e-3
    assert torch.allclose(gradient, wanted, atol=1e-5)
