from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from helpers import normal
from neuralcollapse import (
    ClassMeanClassifier,
    FixedETFClassifier,
    LearnedClassifier,
    NearestETFClassifier,
    attach_head,
    find_classifier,
)


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


def test_a_head_attached_to_a_bare_classifier():
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
    with pytest.raises(ValueError, match="output must locate the logits"):
        attach_head(Net(wrap), FixedETFClassifier(12, 5))(INPUTS)


@pytest.mark.parametrize("after", [lambda logits: logits.softmax(1), lambda logits: logits[:, :3], torch.clone])
def test_a_model_that_does_something_after_its_classifier_is_refused(after):
    model = attach_head(Net(after), FixedETFClassifier(12, 5))
    with pytest.raises(ValueError, match="classifier 'fc' must be the last operation of the model"):
        model(INPUTS)


def test_a_wrong_module_is_refused_at_the_first_call():
    model = Net()
    model.unused = nn.Linear(12, 5)
    with pytest.raises(ValueError, match="classifier 'unused' must be called by the model's forward"):
        attach_head(model, FixedETFClassifier(12, 5), classifier="unused")(INPUTS)


def test_ambiguous_models_are_refused():
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
    with pytest.raises(ValueError, match="must be a module of the model, but is not"):
        attach_head(Net(), FixedETFClassifier(12, 5), classifier=nn.Linear(12, 5))
    with pytest.raises(
        ValueError, match=r"head must take the 12 features that classifier 'fc' takes, got in_features = 9"
    ):
        attach_head(Net(), FixedETFClassifier(9, 5))


def test_the_number_of_features_decides_between_classifiers_and_names_do_not():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(6, 16)
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
            self.classifier = nn.Linear(16, 5)

        def forward(self, tokens):
            return self.classifier(self.encoder(self.embed(tokens)).mean(dim=1))

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Encoder()

        def forward(self, tokens):
            return self.inner(tokens)

    tokens = normal(4, 3, 6, dtype=torch.float32)
    for model, name in ((Encoder(), "classifier"), (Wrapper(), "inner.classifier")):
        with pytest.raises(
            ValueError, match=r"embed', .*classifier'\. Name it with .* find_classifier\(model, example\)"
        ):
            find_classifier(model)
        assert find_classifier(model, tokens)[0] == name
    assert attach_head(Encoder(), NearestETFClassifier(16, 5))(tokens, targets=TARGETS[:4]).shape == (4, 5)


def test_padded_tokens_of_an_attached_model_are_left_out():
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


class Pooled(nn.Module):
    """timm's ClassifierHead: pooling, dropout, fc, and nothing after it."""

    def __init__(self):
        super().__init__()
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.0)
        self.fc = nn.Linear(12, 5)
        self.flatten = nn.Identity()

    def forward(self, inputs):
        return self.flatten(self.fc(self.drop(self.global_pool(inputs).flatten(1))))


class LookAlike(nn.Module):
    """The structure of a torchvision or timm model: stages whose blocks hold linear layers, and an end by its name."""

    def __init__(self, name, end, says=None):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3)
        block = nn.Module()
        block.norm, block.mlp = (
            nn.BatchNorm2d(12),
            nn.Sequential(OrderedDict(fc1=nn.Linear(12, 24), fc2=nn.Linear(24, 12))),
        )
        self.stages = nn.Sequential(block)
        self.end = name
        setattr(self, name, end)
        if says is not None:
            self.get_classifier = lambda: self.get_submodule(says)

    def forward(self, inputs):
        hidden = self.stages[0].norm(self.stem(inputs))
        hidden = hidden + self.stages[0].mlp(hidden.movedim(1, -1)).movedim(-1, 1)
        end = getattr(self, self.end)
        return end(hidden if isinstance(end, Pooled) else hidden.mean((2, 3)))


def hidden_layers(last):
    return nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Dropout(0.0), last)


LOOK_ALIKES = {  # name in torchvision or timm -> where its classifier is, and a model of that structure
    "resnet": ("fc", lambda: LookAlike("fc", nn.Linear(12, 5))),
    "swin": ("head", lambda: LookAlike("head", nn.Linear(12, 5))),
    "vit": ("heads.head", lambda: LookAlike("heads", nn.Sequential(OrderedDict(head=nn.Linear(12, 5))))),
    "densenet": ("classifier", lambda: LookAlike("classifier", nn.Linear(12, 5))),
    "vgg": ("classifier.3", lambda: LookAlike("classifier", hidden_layers(nn.Linear(12, 5)))),
    "efficientnet": ("classifier.1", lambda: LookAlike("classifier", nn.Sequential(nn.Dropout(0.0), nn.Linear(12, 5)))),
    "maxvit": ("classifier.3", lambda: LookAlike("classifier", hidden_layers(nn.Linear(12, 5, bias=False)))),
    "timm convnext": ("head.fc", lambda: LookAlike("head", Pooled(), says="head.fc")),
    "timm, unsaid": ("head.fc", lambda: LookAlike("head", Pooled())),
    "timm, by another name": ("last", lambda: LookAlike("last", nn.Linear(12, 5), says="last")),
}


@pytest.mark.parametrize(("place", "make"), LOOK_ALIKES.values(), ids=LOOK_ALIKES)
def test_structures_of_torchvision_and_timm(place, make):
    images, targets = normal(10, 3, 6, 6, dtype=torch.float32), torch.arange(10) % 3
    model = make()
    assert find_classifier(model, images)[0] == place
    attached = attach_head(model, NearestETFClassifier(12, 3))
    assert f"classifier={place!r}, 5 classes before, 3 now" in repr(attached)
    assert (attached.replaced_num_classes, attached.num_classes) == (5, 3)
    cross_entropy(attached(images, targets=targets), targets).backward()
    assert model.stem.weight.grad.abs().sum() > 0
    expected = attached.eval()(images)
    plain = attached.to_inference()
    assert plain is model
    assert torch.allclose(plain(images), expected, atol=1e-6)


def test_a_model_whose_get_classifier_is_an_identity_has_no_classifier():
    model = LookAlike("head", nn.Identity(), says="head")
    with pytest.raises(ValueError, match=r"must end in a classifier; its get_classifier\(\) is an nn.Identity"):
        attach_head(model, NearestETFClassifier(12, 3))


@pytest.mark.parametrize(
    ("after", "output", "message"),
    [
        (torch.clone, None, "another operation follows it"),
        (None, "logits", "which has no 'logits'"),
        (lambda logits: (logits,), 3, "which has no 3"),
        (lambda logits: {"logits": logits}, None, "output must locate the logits"),
        (None, lambda returned: returned.missing, "has no attribute 'missing'"),
    ],
)
def test_a_refusal_at_the_first_call_gives_the_classifier_back(after, output, message):
    model = Net(after)
    classifier, expected = model.fc, model(INPUTS)
    attached = attach_head(model, NearestETFClassifier(12, 5), output=output)
    with pytest.raises((ValueError, AttributeError), match=message):
        attached(INPUTS, targets=TARGETS)
    assert model.fc is classifier
    assert not attached.head.class_means.overall.batches
    again = model(INPUTS)
    assert torch.equal(again, expected) if isinstance(expected, Tensor) else type(again) is type(expected)
    with pytest.raises(ValueError, match="the model has its classifier back: attach again"):
        attached(INPUTS, targets=TARGETS)


def test_a_refusal_changes_nothing():
    model = Net()
    before = dict(model.named_modules())
    for head, options, message in [
        (FixedETFClassifier(9, 5), {}, "head must take the 12 features"),
        (FixedETFClassifier(12, 5), {"classifier": "fcc"}, "classifier must name a module"),
        (FixedETFClassifier(12, 5), {"classifier": "body"}, "classifier 'body' must be an nn.Linear"),
        (FixedETFClassifier(12, 5), {"output": 1.5}, "output must be a name, an index or a function"),
    ]:
        with pytest.raises(ValueError, match=message):
            attach_head(model, head, **options)
        assert dict(model.named_modules()) == before


def test_a_lazy_classifier_is_refused_until_it_knows_its_features():
    model = nn.Sequential(nn.Linear(6, 12), nn.LazyLinear(5))
    for options in ({}, {"classifier": "1"}, {"classifier": model[1]}):
        with pytest.raises(ValueError, match="classifier '1' must know its number of features, got a LazyLinear"):
            attach_head(model, NearestETFClassifier(12, 5), **options)
    model(INPUTS)
    assert attach_head(model, NearestETFClassifier(12, 5))(INPUTS, targets=TARGETS).shape == (16, 5)


def test_labels_replace_targets():
    model = attach_head(Net(), NearestETFClassifier(12, 5))
    output = model(INPUTS, labels=TARGETS)
    assert output.keys() == {"loss", "logits"}
    assert torch.equal(output["loss"], cross_entropy(output["logits"], TARGETS))
    with pytest.raises(ValueError, match="targets and labels must not both be given"):
        model(INPUTS, targets=TARGETS, labels=TARGETS)
    with pytest.raises(ValueError, match="labels must be integer class indices"):
        model(INPUTS, labels=TARGETS.float())


@pytest.mark.parametrize("kind", [NearestETFClassifier, ClassMeanClassifier, LearnedClassifier])
def test_an_averaged_attached_model_has_the_buffers_of_the_model(kind):
    model = attach_head(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)), kind(8, 4))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(5):
        features, targets = normal(20, 12, seed=step), torch.arange(20) % 4
        cross_entropy(model(features.float(), targets=targets), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    assert not torch.equal(average.module.model[0].weight, model.model[0].weight)
    own = dict(model.head.named_buffers())
    assert all(torch.equal(buffer, own[name]) for name, buffer in average.module.head.named_buffers())
    assert average.eval()(features.float()).shape == (20, 4)


class Follows(nn.Module):
    """A model in training mode, with batch norm and dropout, and something after its classifier."""

    def __init__(self, after):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(0.5))
        self.fc = nn.Linear(12, 5)
        self.register_buffer("prior", torch.arange(5.0))
        self.after = after

    def forward(self, inputs):
        return self.after(self, self.body(inputs))


def scaled_in_place(model, h):
    logits = model.fc(h)
    logits *= 2
    return logits


FOLLOWS = {
    "a prior": lambda m, h: m.fc(h) - m.prior,
    "log_softmax": lambda m, h: m.fc(h).log_softmax(1),
    "in place": scaled_in_place,
    "a choice": lambda m, h: m.fc(h)[:, :5],
    "its weight": lambda m, h: m.fc(h) / m.fc.weight.norm(),
    "called twice": lambda m, h: (m.fc(h), m.fc(h.flip(1)))[1],
    "features alone": lambda m, h: (m.fc(h), h)[1],
    "an error in the model": lambda m, h: {5: m.fc(h)}[m.fc(h).shape[1]],
}
FAILS = ("a prior", "its weight", "an error in the model")  # without the classifier


def everything(model):
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: (module, module.training) for name, module in model.named_modules()},
        {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        torch.get_rng_state().tolist(),
    )


@pytest.mark.parametrize("run", ["eager", "no gradients", "compiled", "compiled, with graph breaks"])
@pytest.mark.parametrize("follows", FOLLOWS)
def test_a_model_that_continues_after_its_classifier_is_refused_and_unchanged(follows, run):
    after = FOLLOWS[follows]
    torch._dynamo.reset()
    model = Follows(after if "breaks" not in run else lambda m, h: (torch._dynamo.graph_break(), after(m, h))[1])
    tensors, *before = everything(model)
    attached = attach_head(model, NearestETFClassifier(12, 5))
    call = torch.compile(attached, backend="eager") if "compiled" in run else attached
    with torch.set_grad_enabled(run != "no gradients"):
        with pytest.raises(ValueError, match="classifier 'fc' must be (the last operation of|called once)") as caught:
            call(INPUTS, targets=TARGETS)
        fails = follows in FAILS or (follows == "in place" and run != "no gradients")
        assert (caught.value.__cause__ is not None) is fails
        now, *after_refusal = everything(model)
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in now.items())
        assert after_refusal == before
        assert not attached.head.class_means.overall.batches
        with pytest.raises(ValueError, match="attach again. The reason was: "):
            call(INPUTS, targets=TARGETS)


@pytest.mark.parametrize("follows", FOLLOWS)
def test_a_model_that_continues_after_its_classifier_is_refused_in_one_graph(follows):
    """Tracing raises an error of torch; a later call that is not compiled names the reason."""
    torch._dynamo.reset()
    model = Follows(FOLLOWS[follows])
    tensors, *_ = everything(model)
    attached = attach_head(model, FixedETFClassifier(12, 5))
    with pytest.raises((RuntimeError, KeyError)):
        torch.compile(attached, backend="eager", fullgraph=True)(INPUTS)
    with pytest.raises(ValueError, match="attach_head failed|classifier 'fc' must be"):
        attached(INPUTS)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        NearestETFClassifier,
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in (LearnedClassifier, FixedETFClassifier)),
    ],
)
def test_a_compiled_attached_model_gives_the_same_logits(kind, first, fullgraph):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    outputs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = attach_head(Net(), kind(12, 5))
        if compiled and first:
            model(INPUTS, targets=TARGETS)
        call = torch.compile(model, backend=backend, fullgraph=fullgraph) if compiled else model
        for _ in range(3 - (compiled and first)):
            logits = call(INPUTS, targets=TARGETS)
        traced = len(graphs)
        call(INPUTS, targets=TARGETS)
        assert len(graphs) == traced
        outputs.append(logits)
    torch.testing.assert_close(outputs[0], outputs[1])
    assert graphs
    if fullgraph:
        assert len(graphs) == 1


@pytest.mark.parametrize("kind", [LearnedClassifier, NearestETFClassifier])
def test_a_model_that_was_compiled_before(kind):
    torch.manual_seed(0)
    plain = Net()
    expected = attach_head(copy.deepcopy(plain), kind(12, 5))(INPUTS, targets=TARGETS)
    model = torch.compile(plain, backend="eager")
    model(INPUTS)
    attached = attach_head(model, kind(12, 5))
    for _ in range(2):
        logits = attached(INPUTS, targets=TARGETS)
    if kind is NearestETFClassifier:
        torch.testing.assert_close(logits, expected)
    assert logits.shape == expected.shape


def test_wrong_arguments_at_the_first_call_raise_the_models_own_error_and_can_be_corrected():
    torch.manual_seed(0)
    model = Follows(lambda m, h: m.fc(h))
    tensors, *_ = everything(model)
    attached = attach_head(model, NearestETFClassifier(12, 5))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        attached(INPUTS[:, :4], targets=TARGETS)
    with pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):
        attached(INPUTS, mask=None, targets=TARGETS)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert attached(INPUTS, targets=TARGETS).shape == (16, 5)


def test_the_heads_features_decide_between_candidates():
    model = nn.ModuleDict({"fc": nn.Linear(6, 12), "out": nn.Linear(12, 5)})
    assert "classifier='out'" in repr(attach_head(model, NearestETFClassifier(12, 5)))
    model = nn.ModuleDict({"fc": nn.Linear(12, 12), "out": nn.Linear(12, 5)})
    with pytest.raises(ValueError, match="'fc', 'out'. Name it with classifier="):
        attach_head(model, NearestETFClassifier(12, 5))


def test_the_signature_of_an_attached_model_is_the_models_own():
    model = attach_head(Net(), NearestETFClassifier(12, 5))
    names = ["inputs", "scale", "targets", "labels", "num_items_in_batch", "kwargs"]
    assert list(inspect.signature(model.forward).parameters) == names
    assert list(inspect.signature(type(model).forward).parameters)[:3] == ["self", "args", "targets"]
    again = copy.deepcopy(model)
    again.model.body[0].weight.data.zero_()
    assert not torch.equal(again.eval()(INPUTS), model.eval()(INPUTS))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("kind", [NearestETFClassifier, ClassMeanClassifier])
@pytest.mark.parametrize("name", ["targets", "labels"])
def test_targets_of_any_integer_dtype(kind, dtype, name):
    outputs = []
    for targets in (TARGETS, TARGETS.to(dtype)):
        torch.manual_seed(0)
        model = attach_head(Net(), kind(12, 5, ignore_index=2))
        for _ in range(2):
            output = model(INPUTS, **{name: targets})
        outputs.append(torch.cat([output["logits"].flatten(), output["loss"][None]]) if name == "labels" else output)
    assert torch.equal(*outputs)
