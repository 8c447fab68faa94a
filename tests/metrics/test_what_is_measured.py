"""The module that `measure` finds computes the output of many small networks; other networks are refused."""

from __future__ import annotations

import warnings
from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune

from helpers import generator
from neuralcollapse import FixedETFClassifier, LearnedClassifier, NearestETFClassifier, attach_head, find_classifier
from neuralcollapse._running import call_model, evaluation_mode
from neuralcollapse.metrics import MeasureOptions, measure

K, D, WIDTH, SAMPLES = 4, 8, 12, 48
INPUTS, TARGETS = torch.randn(SAMPLES, 1, 6, generator=generator(0)), torch.arange(SAMPLES) % K


class Net(nn.Module):
    """A body with batch norm and dropout, further modules by name, and a forward of its own.

    Args:
        forward: From the model and the body's features to the output.
        **modules: What else the model has.
    """

    def __init__(self, forward, **modules):
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(1, 3, 1), nn.Flatten(), nn.BatchNorm1d(18), nn.Dropout(0.5))
        self.hidden = modules.pop("hidden", nn.Sequential(nn.ReLU(), nn.Flatten()))
        for name, module in modules.items():
            setattr(self, name, module)
        self.register_buffer("prior", 3 * torch.arange(float(K)))
        self.run = forward

    def forward(self, inputs):
        return self.run(self, self.hidden(self.body(inputs)))


def linear(inputs=WIDTH, outputs=K, **options):
    return nn.Linear(inputs, outputs, **options)


def first():
    """From the body's 18 features to WIDTH."""
    return nn.Linear(18, WIDTH)


def ended(end, **modules):
    """A model whose forward ends in ``end(model, h)`` for features h of WIDTH."""
    return Net(lambda model, h: end(model, functional.relu(model.first(h))), first=first(), **modules)


class OwnLinear(nn.Module):
    """A linear layer written by hand, without `features`."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(K, WIDTH)), nn.Parameter(torch.randn(K))

    def forward(self, inputs):
        return inputs @ self.weight.T + self.bias


class Normalising(OwnLinear):
    """A head that says what its weight multiplies."""

    def features(self, inputs):
        return 5 * functional.normalize(inputs, dim=-1)

    def forward(self, inputs):
        return super().forward(self.features(inputs))


class Cosine(nn.Linear):
    """An ``nn.Linear`` by its class, whose forward is another."""

    def forward(self, inputs):
        return 16 * functional.linear(functional.normalize(inputs), functional.normalize(self.weight))


class ArcFace(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(K, WIDTH))

    def forward(self, inputs):
        return 30 * functional.linear(functional.normalize(inputs), functional.normalize(self.weight))


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter beside it."""

    def __init__(self, scale):
        super().__init__()
        self.base_layer, self.a, self.b = linear(), nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, K, bias=False)
        self.b.weight.data.mul_(scale)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, inputs):
        return self.base_layer(inputs) + self.b(self.a(inputs))


Outputs = namedtuple("Outputs", "logits aux_logits")


@dataclass
class Answer:
    hidden: Tensor
    logits: Tensor


class Tagger(nn.Module):
    """An output for each of six tokens."""

    def __init__(self, pool=lambda logits: logits, tied=False):
        super().__init__()
        self.embedding, self.mix, self.pool = nn.Embedding(K if tied else 7, D), nn.Linear(D, D), pool
        self.lm_head = nn.Linear(D, K, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, inputs):
        tokens = (10 * inputs[:, 0]).long().remainder(self.embedding.num_embeddings)
        return self.pool(self.lm_head(self.mix(self.embedding(tokens)).relu()))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.decoder = nn.LSTM(1, WIDTH, batch_first=True), linear()

    def forward(self, inputs):
        return self.decoder(self.lstm(inputs.mT)[0][:, -1])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.classify = nn.Linear(1, D), nn.Linear(D, K)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, 16, batch_first=True), 1)

    def forward(self, inputs):
        return self.classify(self.encoder(self.embed(inputs.mT)).mean(dim=1))


class InPrecision(nn.Module):
    """A model in another dtype, which gives its logits in fp32."""

    def __init__(self, dtype):
        super().__init__()
        self.inner = ended(lambda model, h: model.out(h), out=linear()).to(dtype)

    def forward(self, inputs):
        return self.inner(inputs.to(self.inner.prior.dtype)).float()


class UnderAutocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = ended(lambda model, h: model.fc(h), fc=linear())

    def forward(self, inputs):
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.inner(inputs)
        return logits.float()


def hooked_input():
    model = ended(lambda model, h: model.fc(h), fc=linear())
    model.fc.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    return model


def hooked_output():
    model = ended(lambda model, h: model.fc(h), fc=linear())
    model.fc.register_forward_hook(lambda module, inputs, output: output + 3 * torch.arange(K))
    return model


def with_old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.utils.weight_norm(linear())
    layer.weight_g.data.mul_(2)  # as after load_state_dict: `weight` is made by the next forward
    return ended(lambda model, h: model.fc(h), fc=layer)


def with_spectral_norm():
    return ended(lambda model, h: model.fc(h), fc=nn.utils.spectral_norm(linear()))


def pruned():
    model = ended(lambda model, h: model.fc(h), fc=linear())
    prune.random_unstructured(model.fc, "weight", amount=0.5)
    model.fc.weight_orig.data.mul_(2)
    return model


def parametrised(register):
    return lambda: ended(lambda model, h: model.fc(h), fc=register(linear()))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def doubled(layer):
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(ended(lambda model, h: model.fc(h), fc=linear()), {nn.Linear})


def compiled(*parts):
    def make():
        model = ended(lambda model, h: model.out(h), fc=nn.Linear(WIDTH, WIDTH), out=linear())
        for part in parts:
            setattr(model, part, torch.compile(getattr(model, part), backend="eager"))
        model = model if parts else torch.compile(model, backend="eager")
        model.eval()(INPUTS)
        return model.train()

    return make


def compiled_in_place():
    model = ended(lambda model, h: model.out(h), out=linear())
    model.compile(backend="eager")
    model.eval()(INPUTS)
    return model.train()


def attached(head, **options):
    return lambda: attach_head(ended(lambda model, h: model.fc(h), fc=linear()), head(WIDTH, K, **options))


def lazy():
    model = ended(lambda model, h: model.out(h), out=nn.LazyLinear(K))
    model(INPUTS)
    return model


def twins():
    """Two heads of equal weights, as an average of the weights begins."""
    model = ended(lambda model, h: (model.ema(h), model.out(h))[1], ema=linear(), out=linear())
    model.ema.load_state_dict(model.out.state_dict())
    return model


def says_another():
    model = ended(lambda model, h: model.out(model.mid(h)), mid=nn.Linear(WIDTH, WIDTH), out=linear())
    model.get_classifier = lambda: model.mid
    return model


def changes_in_place(model, h):
    logits = model.fc(h)
    h.neg_()
    return logits


def zeroed(layer):
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


MEASURED = {  # network -> (how to make it, the classifier's name, where its logits are)
    "fc is hidden, out the last": (
        lambda: ended(lambda m, h: m.out(m.fc(h).relu()), fc=nn.Linear(WIDTH, WIDTH), out=linear()),
        "out",
    ),
    "fc1, fc2, fc3": (
        lambda: Net(
            lambda m, h: m.fc3(m.fc2(m.fc1(h).relu()).relu()), fc1=first(), fc2=nn.Linear(WIDTH, WIDTH), fc3=linear()
        ),
        "fc3",
    ),
    "head, cls": (
        lambda: ended(lambda m, h: m.cls(m.head(h).relu()), head=nn.Linear(WIDTH, WIDTH), cls=linear()),
        "cls",
    ),
    "classifier of K features": (
        lambda: ended(lambda m, h: m.last(m.classifier(h).relu()), classifier=linear(), last=nn.Linear(K, K)),
        "last",
    ),
    "defined the other way round": (
        lambda: ended(lambda m, h: m.b(m.a(h).relu()), b=linear(), a=nn.Linear(WIDTH, WIDTH)),
        "b",
    ),
    "a chain": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, WIDTH), nn.ReLU(), linear()), "3"),
    "a chain in a chain": (
        lambda: nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(6, WIDTH), nn.Dropout(), linear())),
        "1.2",
    ),
    "without bias": (lambda: ended(lambda m, h: m.fc(h), fc=linear(bias=False)), "fc"),
    "an auxiliary head that is called": (
        lambda: ended(lambda m, h: (m.classifier(h), m.new_head(h))[1], classifier=linear(), new_head=linear()),
        "new_head",
    ),
    "a second head that is not called": (
        lambda: ended(lambda m, h: m.second(h), classifier=linear(), second=linear()),
        "second",
    ),
    "a namedtuple with auxiliary logits": (
        lambda: ended(lambda m, h: Outputs(m.main(h), m.fc(h)), main=linear(), fc=linear()),
        "main",
        lambda out: out.logits,
    ),
    "a dictionary": (
        lambda: ended(lambda m, h: {"hidden": h, "logits": m.fc(h)}, fc=linear()),
        "fc",
        lambda out: out["logits"],
    ),
    "a dataclass": (lambda: ended(lambda m, h: Answer(h, m.fc(h)), fc=linear()), "fc", lambda out: out.logits),
    "an object": (
        lambda: ended(lambda m, h: SimpleNamespace(scores=m.fc(h), loss=None), fc=linear()),
        "fc",
        lambda out: out.scores,
    ),
    "features and logits": (lambda: ended(lambda m, h: (h, m.fc(h)), fc=linear()), "fc", lambda out: out[1]),
    "an embedding and logits of it": (
        lambda: ended(lambda m, h: (e := m.fc(h), m.out(e)), fc=nn.Linear(WIDTH, WIDTH), out=linear()),
        "out",
        lambda out: out[1],
    ),
    "logits in a list": (lambda: ended(lambda m, h: [[m.fc(h)], h], fc=linear()), "fc", lambda out: out[0][0]),
    "weight norm, stale": (with_old_weight_norm, "fc"),
    "weight norm as a parametrisation": (parametrised(parametrizations.weight_norm), "fc"),
    "spectral norm": (with_spectral_norm, "fc"),
    "spectral norm as a parametrisation": (parametrised(parametrizations.spectral_norm), "fc"),
    "orthogonal rows": (parametrised(parametrizations.orthogonal), "fc"),
    "a parametrisation of one's own": (parametrised(doubled), "fc"),
    "pruned": (pruned, "fc"),
    "dynamically quantised": (quantised, "fc"),
    "a convolution, then the mean over positions": (
        lambda: Net(lambda m, h: m.conv(h.view(-1, 6, 3, 1)).mean((2, 3)), conv=nn.Conv2d(6, K, 1)),
        "conv",
    ),
    "a convolution of pooled features": (
        lambda: ended(lambda m, h: m.conv(h[:, :, None, None]).flatten(1), conv=nn.Conv2d(WIDTH, K, 1)),
        "conv",
    ),
    "a convolution over time": (
        lambda: Net(lambda m, h: m.conv(h.view(-1, 6, 3)).mean(2), conv=nn.Conv1d(6, K, 1, bias=False)),
        "conv",
    ),
    "a mean over tokens after the classifier": (lambda: Tagger(lambda logits: logits.mean(dim=1)), "lm_head"),
    "a recurrent network": (Recurrent, "decoder"),
    "a transformer": (Encoder, "classify"),
    "data-parallel": (lambda: nn.DataParallel(ended(lambda m, h: m.out(h), out=linear())), "module.out"),
    "compiled, and run before": (compiled(), "_orig_mod.out"),
    "with a compiled classifier": (compiled("out"), "out._orig_mod"),
    "with compiled parts": (compiled("body", "fc"), "out"),
    "compiled in place": (compiled_in_place, "out"),
    "in bf16": (lambda: InPrecision(torch.bfloat16), "inner.out"),
    "in fp16": (lambda: InPrecision(torch.float16), "inner.out"),
    "in fp64": (lambda: InPrecision(torch.float64), "inner.out"),
    "under autocast": (UnderAutocast, "inner.fc"),
    "a linear layer written by hand": (lambda: ended(lambda m, h: m.mine(h), mine=OwnLinear()), "mine"),
    "a head that normalises": (lambda: ended(lambda m, h: m.head(h), head=Normalising()), "head"),
    "a nearest ETF": (attached(NearestETFClassifier), "head"),
    "a fixed ETF": (attached(FixedETFClassifier), "head"),
    "a learned head with unit rows": (attached(LearnedClassifier, unit_weight=True, feature_norm=3.0), "head"),
    "features changed in place afterwards": (lambda: ended(changes_in_place, fc=linear()), "fc"),
    "a hook on the input": (hooked_input, "fc"),
    "lazy, and run before": (lazy, "out"),
    "two heads of equal weights": (twins, "out"),
    "get_classifier() names another": (says_another, "out"),
    "an adapter that does nothing yet": (lambda: ended(lambda m, h: m.fc(h), fc=Adapted(0.0)), "fc"),
    "called by keyword": (lambda: ended(lambda m, h: m.fc(input=h), fc=linear()), "fc"),
    "one module under two names": (
        lambda: ended(lambda m, h: m.other(h), **dict.fromkeys(("fc", "other"), linear())),
        "fc",
    ),
    "an output of zeros": (lambda: ended(lambda m, h: m.out(h) * 1, out=zeroed(linear())), "out"),
}


def averaged(m, h):
    return (m.a(h) + m.b(h)) / 2


def divided_in_place(m, h):
    logits = m.fc(h)
    logits /= 2
    return logits


def two_logits(m, h):
    return m.main(h), m.aux(h)


def noisy():
    """A weight drawn anew by every forward."""
    model = ended(lambda m, h: m.fc(h), fc=linear())

    def draw(module, inputs):
        del module._parameters["weight"]
        module.weight = nn.Parameter(torch.randn(K, WIDTH))

    model.fc.register_forward_pre_hook(draw)
    return model


REFUSED = {  # network -> (how to make it, what the message says)
    "a prior": (
        lambda: ended(lambda m, h: m.fc(h) + m.prior, fc=linear()),
        r"'fc' with weight \(4, 12\) on features "
        r"\(48, 12\) differs by up to 9",
    ),
    "a small prior": (lambda: ended(lambda m, h: m.fc(h) + 1e-3 * m.prior, fc=linear()), "differs by up to 0.009"),
    "a temperature": (lambda: ended(lambda m, h: m.fc(h) / 1.5, fc=linear()), "'fc' .* differs by up to"),
    "a temperature, in place": (lambda: ended(divided_in_place, fc=linear()), "'fc' .* differs by up to"),
    "log_softmax": (lambda: ended(lambda m, h: m.fc(h).log_softmax(1), fc=linear()), "'fc' .* differs by up to"),
    "probabilities": (lambda: ended(lambda m, h: m.fc(h).softmax(1), fc=linear()), "'fc' .* differs by up to"),
    "a soft cap": (lambda: ended(lambda m, h: 3 * (m.fc(h) / 3).tanh(), fc=linear()), "'fc' .* differs by up to"),
    "a class masked out": (
        lambda: ended(lambda m, h: m.fc(h).index_fill(1, torch.tensor(0), -torch.inf), fc=linear()),
        "'fc' .* differs by up to inf",
    ),
    "rows of the model's own": (
        lambda: ended(
            lambda m, h: 9 * functional.normalize(m.embed(h)) @ m.rows.T,
            embed=nn.Linear(WIDTH, D),
            rows=nn.Parameter(torch.randn(K, D)),
        ),
        r"no module of Net computes its output \(48, 4\) .* 'embed' with weight \(8, 12\) on features \(48, 12\) gives "
        r"\(48, 8\)",
    ),
    "cosines": (lambda: ended(lambda m, h: m.fc(h), fc=Cosine(WIDTH, K)), "'fc' .* differs .* a method features"),
    "cosines of a layer of one's own": (lambda: ended(lambda m, h: m.arc(h), arc=ArcFace()), "'arc' .* differs"),
    "an adapter": (lambda: ended(lambda m, h: m.fc(h), fc=Adapted(1.0)), "'fc.base_layer' .* differs .* merge"),
    "a head called twice": (lambda: ended(lambda m, h: m.fc(h) + m.fc(h.flip(1)), fc=linear()), "'fc' was called 2"),
    "two heads averaged": (lambda: ended(averaged, a=linear(), b=linear()), "'[ab]' .* differs by up to"),
    "a squeezenet": (
        lambda: Net(lambda m, h: m.conv(h.view(-1, 6, 3, 1)).relu().mean((2, 3)), conv=nn.Conv2d(6, K, 1)),
        r"'conv' with weight \(4, 6\) on features \(48, 6\) differs",
    ),
    "the greatest over tokens": (lambda: Tagger(lambda logits: logits.amax(dim=1)), "'lm_head' .* differs"),
    "the first token, chosen last": (lambda: Tagger(lambda logits: logits[:, 0]), "'lm_head' .* differs"),
    "classes before tokens": (lambda: Tagger(lambda logits: logits.mT), "'lm_head' .* gives"),
    "two tensors that are logits": (
        lambda: ended(two_logits, main=linear(), aux=linear()),
        "several modules of Net .*'aux', 'main'",
    ),
    "logits without a layer": (
        lambda: ended(lambda m, h: h @ m.rows.T, rows=nn.Parameter(torch.randn(K, WIDTH))),
        "no module of Net",
    ),
    "no tensor": (lambda: ended(lambda m, h: {"classes": m.fc(h).argmax(1)}, fc=linear()), "model must return logits"),
    "a hook on the output": (hooked_output, "'fc' .* differs by up to 9"),
    "a weight drawn anew by every forward": (noisy, "'fc' computed .* the first batch, but not of a later one"),
    "TorchScript": (
        lambda: torch.jit.trace(nn.Sequential(nn.Flatten(), linear(6)).eval(), INPUTS),
        "got a TorchScript",
    ),
    "an fc that is not called": (lambda: ended(lambda m, h: h, fc=linear()), r"'first' with weight \(12, 18\)"),
}


def own_logits(model, inputs, read):
    with torch.no_grad(), evaluation_mode(model):
        return read(call_model(model, inputs, torch.device("cpu"))).detach()


@pytest.mark.parametrize("network", MEASURED)
def test_the_measured_module_computes_the_output_of_the_model(network):
    torch.manual_seed(1)
    make, name, *read = MEASURED[network]
    model, parts = make(), INPUTS.split(20)
    logits = torch.cat([own_logits(model, inputs, *read or [lambda output: output]) for inputs in parts])
    targets = TARGETS if logits.ndim == 2 else TARGETS[:, None].expand(logits.shape[:-1])
    assert find_classifier(model, INPUTS) == (name, model.get_submodule(name))
    measured = measure(model, zip(parts, targets.split(20), strict=True), progress=False)
    classes, answers, logits = targets.flatten(), logits.flatten(0, -2).argmax(1), logits.flatten(0, -2).double()
    assert measured.metrics["accuracy"] == pytest.approx(float((answers == classes).double().mean()))
    # Class means commute with what is affine: W M_k + b is the mean of the model's own output over class k.
    means = torch.stack([logits[classes == k].mean(dim=0) for k in range(K)])
    expected = measured.moments.means @ measured.weight.double().T
    expected = expected if measured.bias is None else expected + measured.bias.double()
    coarse = {"in bf16": 2e-2, "in fp16": 2e-3, "under autocast": 2e-2, "dynamically quantised": 5e-2}
    torch.testing.assert_close(expected, means, rtol=1e-5, atol=coarse.get(network, 1e-5))


def state_of(model):
    return {
        "tensors": {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        "random": torch.get_rng_state(),
    }


@pytest.mark.parametrize("network", REFUSED)
def test_a_model_that_cannot_be_measured_is_refused_and_left_unchanged(network):
    torch.manual_seed(1)
    make, message = REFUSED[network]
    model = make()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        measure(model, [(INPUTS, TARGETS)] * 2, progress=False)
    after = state_of(model)
    if network != "a weight drawn anew by every forward":
        assert all(torch.equal(tensor, before["tensors"][name]) for name, tensor in after["tensors"].items())
    assert after["modes"] == before["modes"]
    assert after["hooks"] == before["hooks"]
    assert torch.equal(after["random"], before["random"])


BATCHES = list(zip(INPUTS.split(16), TARGETS.split(16), strict=True))


def plain():
    torch.manual_seed(1)
    return ended(lambda m, h: m.out(m.fc(h).relu()), fc=nn.Linear(WIDTH, WIDTH), out=linear())


def on_later_calls(end):
    """A model that does something else from its third forward on."""
    torch.manual_seed(1)

    def forward(model, h):
        model.calls += 1
        return model.fc(h) if model.calls < 3 else end(model, h)

    model = ended(forward, fc=linear())
    model.calls = 0
    return model


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (lambda m, h: m.fc(h) + m.prior, "differs by up to 9"),
        (lambda m, h: m.fc(h) + 0 * m.fc(h), "was called 2 times per forward"),
        (lambda m, h: h[:, :K], "was not called per forward"),
        (lambda m, h: {"logits": m.fc(h)}, r"is not found at \[\] in a dict"),
    ],
)
@pytest.mark.parametrize("through", ["loader", "train", "ood"])
def test_later_batches_are_compared_too(end, message, through):
    model = on_later_calls(end)
    loaders = {"loader": BATCHES} if through == "loader" else {"loader": BATCHES[:2], through: BATCHES}
    with pytest.raises(
        ValueError, match=f"classifier 'fc' computed .* the first batch, but not of a later one: .*{message}"
    ):
        measure(model, progress=False, **loaders)
    assert not any(module._forward_hooks for module in model.modules())


def test_an_iterator_is_read_once():
    expected = measure(plain(), BATCHES, progress=False).metrics
    batches = iter(BATCHES)
    assert measure(plain(), batches, progress=False).metrics == expected
    assert next(batches, None) is None


@pytest.mark.parametrize("named", ["fc", "out"])
@pytest.mark.parametrize("by_module", [True, False])
@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_a_classifier_that_is_named_is_verified(named, by_module, wrap):
    inner = plain()
    model, classifier = wrap(inner), getattr(inner, named) if by_module else named
    if named == "out":
        measured = measure(model, BATCHES, classifier=classifier, layers=["fc"], progress=False)
        assert torch.equal(measured.weight, inner.out.weight)
        assert measured.provenance.model == "Net"
        return
    with pytest.raises(ValueError, match=r"classifier '\S*fc' of Net computes .*gives \(16, 12\).*output of '\S*out'"):
        measure(model, BATCHES, classifier=classifier, progress=False)


def test_several_outputs_are_measured_by_name():
    torch.manual_seed(1)
    model = ended(two_logits, main=linear(), aux=linear())
    for name in ("main", "aux"):
        measured = measure(model, BATCHES, classifier=name, progress=False)
        assert torch.equal(measured.weight, getattr(model, name).weight)
    with pytest.raises(ValueError, match="'first' computes the features that another module takes|'first' .* gives"):
        measure(model, BATCHES, classifier="first", progress=False)
    embedding = ended(lambda m, h: (e := m.fc(h), m.out(e)), fc=nn.Linear(WIDTH, WIDTH), out=linear())
    with pytest.raises(ValueError, match="'fc' computes the features that another module takes.* output of 'out'"):
        measure(embedding, BATCHES, classifier="fc", progress=False)


@pytest.mark.parametrize("change", [lambda x: x.relu_(), lambda x: x.neg_(), lambda x: x.mul_(0), functional.relu_])
def test_layers_and_features_that_are_changed_in_place(change):
    def forward(copies):
        def run(model, h):
            h = model.first(h)
            h = change(h.clone() if copies else h)
            logits = model.out(h)
            change(h)
            return logits

        return run

    measured = []
    for copies in (True, False):
        torch.manual_seed(1)
        model = Net(forward(copies), first=first(), out=linear())
        measured.append(measure(model, BATCHES, layers=["first", "body"], progress=False))
    assert measured[0].layers == measured[1].layers
    assert measured[0].metrics == measured[1].metrics


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16])
def test_labels_of_any_integers(dtype):
    options = MeasureOptions(ignore_index=3)
    expected = measure(plain(), BATCHES, train=BATCHES, layers=["fc"], options=options, progress=False)
    batches = [(inputs, targets.to(dtype)) for inputs, targets in BATCHES]
    found = measure(plain(), batches, train=batches, layers=["fc"], options=options, progress=False)
    assert found.metrics == expected.metrics
    assert found.layers == expected.layers
    assert found.provenance.labels == expected.provenance.labels


def test_compiled_models_stay_compiled():
    compilations = []

    def backend(graph, _):
        compilations.append(graph)
        return graph.forward

    inner = plain().eval()
    model = torch.compile(inner, backend=backend)
    with torch.no_grad():
        expected = model(INPUTS)
        measured = measure(model, [(INPUTS, TARGETS)], progress=False)
        assert torch.equal(model(INPUTS), expected)
    assert len(compilations) == 1
    assert measured.metrics == measure(inner, [(INPUTS, TARGETS)], progress=False).metrics


class Fails(nn.Module):
    """Counts, draws random numbers, and fails after its classifier."""

    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(6), nn.Dropout(0.5)), linear(6)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("queue", torch.zeros(4))

    def forward(self, inputs):
        self.calls += 1
        self.queue = self.queue + 1
        functional.dropout(inputs, training=True)
        raise KeyError(len(self.fc(self.body.train()(inputs))))


@pytest.mark.parametrize(
    "run",
    [
        lambda model: measure(model, BATCHES, progress=False),
        lambda model: find_classifier(model, INPUTS),
    ],
)
def test_an_error_in_the_forward_leaves_the_model_unchanged(run):
    torch.manual_seed(1)
    model = Fails()
    model.body[1].eval()
    before, queue = state_of(model), model.queue
    with pytest.raises(KeyError):
        run(model)
    after = state_of(model)
    assert all(torch.equal(tensor, before["tensors"][name]) for name, tensor in after["tensors"].items())
    assert model.queue is queue
    assert (after["modes"], after["hooks"]) == (before["modes"], before["hooks"])
    assert torch.equal(after["random"], before["random"])


def test_structure_decides_only_if_there_is_one_candidate():
    for network in ("fc is hidden, out the last", "fc1, fc2, fc3", "head, cls", "defined the other way round"):
        with pytest.raises(ValueError, match=r"several modules of Net could be .* find_classifier\(model, example\)"):
            find_classifier(MEASURED[network][0]())
    assert find_classifier(MEASURED["a chain in a chain"][0]())[0] == "1.2"


def test_an_example_may_be_positional_or_by_keyword():
    model = Tagger()
    for example in (INPUTS, (INPUTS,), [INPUTS], {"inputs": INPUTS}):
        assert find_classifier(model, example)[0] == "lm_head"


def test_recorded_inputs_of_the_first_forward_are_bounded(monkeypatch):
    monkeypatch.setattr("neuralcollapse.classifier._KEPT_BYTES", 1)
    assert find_classifier(plain(), INPUTS)[0] == "out"
    torch.manual_seed(1)
    model = ended(lambda m, h: (m.main(h), m.aux(h))[0], main=linear(), aux=linear())
    with pytest.raises(ValueError, match="'main' was not compared: .* was dropped to save memory"):
        measure(model, BATCHES, progress=False)
    assert torch.equal(measure(model, BATCHES, classifier="main", progress=False).weight, model.main.weight)
