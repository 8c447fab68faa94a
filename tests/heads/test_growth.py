"""Growth of heads: the nearest grown frame, state that stays, admission of classes, and refusals."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from neuralcollapse import (
    ClassMeanClassifier,
    FixedETFClassifier,
    FixedFrameClassifier,
    LearnedClassifier,
    NearestETFClassifier,
    NearestFrameClassifier,
    attach_head,
    random_simplex_etf,
    softmax_code,
)
from neuralcollapse.geometry.codes import SimplexCode, principal_code, simplex_gram
from neuralcollapse.geometry.frames import extended_frame
from neuralcollapse.heads import LeadingDirections, TrustRegion
from neuralcollapse.heads.head import collapse_radius

DOUBLE = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(num_classes: int, dim: int = 12, seed: int = 0, size: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = seeded(seed)
    targets = torch.arange(size) % num_classes
    centres = 3 * torch.randn(num_classes, dim, generator=seeded(99))
    return centres[targets] + torch.randn(size, dim, generator=generator), targets


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.integers(1, 5), st.integers(0, 4), st.integers(0, 1000))
def test_no_simplex_etf_is_nearer_to_the_old_rows(old, new, spare, seed):
    num_classes, dim = old + new, old + new - 1 + spare
    rows = random_simplex_etf(old, dim, generator=seeded(seed), dtype=DOUBLE)
    grown = extended_frame(rows, SimplexCode(num_classes), seeded(seed))
    assert torch.allclose(grown @ grown.T, simplex_gram(num_classes, dtype=DOUBLE), atol=1e-10)
    least = float((grown[:old] - rows).square().sum())
    assert least == pytest.approx(2 * old * (1 - math.sqrt(num_classes * (old - 1) / ((num_classes - 1) * old))))
    for size in (1e-3, 0.1, 10.0):  # rotations of the solution, from close to it to anywhere
        skew = torch.randn(dim, dim, generator=seeded(seed + 1), dtype=DOUBLE)
        other = grown @ torch.linalg.matrix_exp(size * (skew - skew.T) / dim)
        assert float((other[:old] - rows).square().sum()) >= least - 1e-10


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(1, 4), st.integers(2, 4), st.integers(0, 1000))
def test_no_frame_of_a_code_is_nearer_to_any_old_rows(old, new, rank, seed):
    dim = rank + 2
    code = principal_code(torch.randn(old + new, rank, generator=seeded(seed), dtype=DOUBLE), dim)
    rows = torch.randn(old, dim, generator=seeded(seed + 1), dtype=DOUBLE)
    grown = extended_frame(rows, code)
    assert torch.allclose(grown @ grown.T, code @ code.T, atol=1e-9)
    least = float((grown[:old] - rows).square().sum())
    # The coordinates by ascent from random points, which no closed form enters.
    for start in range(5):
        point = torch.linalg.qr(torch.randn(dim, rank, generator=seeded(start), dtype=DOUBLE)).Q.T[: code.shape[1]]
        for _ in range(200):
            u, _, v = torch.linalg.svd(code[:old].mT @ rows + 3 * point, full_matrices=False)
            point = u @ v
        assert float(((code @ point)[:old] - rows).square().sum()) >= least - 1e-9


def heads_of(num_classes: int, dim: int = 12) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "learned": LearnedClassifier(dim, num_classes, feature_norm="auto", unit_weight=True),
        "learned, no bias": LearnedClassifier(dim, num_classes, bias=False),
        "fixed": FixedETFClassifier(dim, num_classes),
        "fixed, learned bias": FixedETFClassifier(dim, num_classes, bias="learned"),
        "nearest": NearestETFClassifier(dim, num_classes),
        "means": ClassMeanClassifier(dim, num_classes, momentum="cumulative"),
    }


def preassigned(seen: int) -> FixedETFClassifier:
    return FixedETFClassifier(12, 10, seen=seen, bias="learned")


KINDS = list(heads_of(4))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, num_classes: int, seed: int) -> float:
    features, targets = batch(num_classes, seed=seed)
    optimizer.zero_grad()
    loss = cross_entropy(model[1](model[0](features), targets), targets)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def saved(*parts: object) -> list[dict]:
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", [*KINDS, "preassigned"])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_training_resumes_to_the_bit_after_growth(name, kind):
    def model_of(num_classes: int) -> nn.Sequential:
        head = preassigned(num_classes) if name == "preassigned" else heads_of(num_classes)[name]
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(12, 12), head)

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        if kind == "sgd":
            return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return torch.optim.Adam(model.parameters(), lr=0.01, amsgrad=True)

    model = model_of(4)
    optimizer = optimizer_of(model)
    for seed in range(3):
        step(model, optimizer, 4, seed)
    old = copy.deepcopy(optimizer.state)
    shapes = [tuple(parameter.shape) for parameter in old]
    model[1].grow(2, optimizer=optimizer)
    for before, (parameter, state) in zip(old.values(), optimizer.state.items(), strict=True):
        for key, value in before.items():
            if isinstance(value, torch.Tensor) and value.ndim:
                assert torch.equal(state[key][: len(value)], value)
                assert not state[key][len(value) :].any()
                assert state[key].shape == parameter.shape
            else:
                assert state[key] == value
    if list(model[1].parameters()):
        assert [tuple(parameter.shape) for parameter in optimizer.state] != shapes
    step(model, optimizer, 6, 3)
    resumed = model_of(6)
    other = optimizer_of(resumed)
    for part, state in zip((resumed, other), saved(model, optimizer), strict=True):
        part.load_state_dict(state)
    for seed in range(4, 7):
        assert step(model, optimizer, 6, seed) == step(resumed, other, 6, seed)
    for one, two in zip(saved(model, optimizer), saved(resumed, other), strict=True):
        assert str(one) == str(two)
    for key, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key])


@pytest.mark.parametrize("name", KINDS)
def test_what_is_known_of_old_classes_stays(name):
    head = heads_of(4)[name]
    head(*batch(4))
    before = copy.deepcopy(head)
    head.grow(3)
    assert head.num_classes == 7 == len(head.weight)
    if head.feature_norm is not None:
        assert head.feature_norm == collapse_radius(7)
    if name in ("fixed", "fixed, learned bias", "nearest"):
        gram = head.weight @ head.weight.T
        assert torch.allclose(gram, simplex_gram(7), atol=1e-5)
        cosines = (head.weight[:4] * before.weight).sum(1)
        assert torch.allclose(cosines, torch.tensor(math.sqrt(7 * 3 / (6 * 4))), atol=1e-5)
    else:
        assert torch.equal(head.weight[:4], before.weight)
    if isinstance(head, LearnedClassifier | FixedETFClassifier) and before.state_dict().get("learned_bias") is not None:
        assert torch.equal(head.bias[:4], before.bias)
    if hasattr(head, "class_means"):
        assert torch.equal(head.class_means.centred_means[:4], before.class_means.centred_means)
        assert torch.equal(head.class_means.global_mean, before.class_means.global_mean)
        assert head.class_means.centred.seen[4:].tolist() == [0, 0, 0]
        assert head.class_means.batches == before.class_means.batches
    features, targets = batch(7)
    assert head(features, targets).shape == (40, 7)
    average = torch.optim.swa_utils.AveragedModel(before)
    average.module.grow(3)
    average.update_parameters(head)
    for one, two in zip(average.module.parameters(), head.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_learned_bias_grows_by_its_mean():
    head = LearnedClassifier(5, 3)
    with torch.no_grad():
        head.bias.copy_(torch.tensor([1.0, 2.0, 6.0]))
    head.grow(2)
    assert head.bias.tolist() == [1.0, 2.0, 6.0, 3.0, 3.0]


def test_rows_assigned_beforehand_do_not_move():
    whole, head = FixedETFClassifier(12, 10), FixedETFClassifier(12, 10, seen=6)
    assert head.num_classes == 6
    assert head.feature_norm == whole.feature_norm
    assert torch.equal(head.weight, whole.weight[:6])
    with pytest.raises(ValueError, match=r"targets must lie in \[0, 6\)|targets.*6"):
        head(torch.randn(2, 12), torch.tensor([0, 6]))
    head.grow(1)
    head.grow(3)
    assert torch.equal(head.weight, whole.weight)
    assert head.feature_norm == whole.feature_norm
    with pytest.raises(ValueError, match="at most 0"):
        head.grow(1)


@pytest.mark.parametrize("kind", [NearestETFClassifier, ClassMeanClassifier])
def test_admitted_classes_have_the_means_of_their_samples(kind):
    torch.manual_seed(0)
    head = kind(12, 4, momentum="cumulative")
    head(*batch(4))
    before = copy.deepcopy(head)
    samples = torch.randn(9, 12) + 4
    targets = torch.tensor([5, 4, 5, 4, 4, 5, 5, 4, 5])
    head.admit(samples, targets)
    assert head.num_classes == 6
    norm = head.feature_norm
    assert norm == collapse_radius(6)
    scaled = before.feature_norm * normalize(samples, dim=1)
    for k in (4, 5):
        chosen = [row for row, target in zip(scaled, targets.tolist(), strict=True) if target == k]
        expected = torch.stack(chosen).mean(0) - before.class_means.global_mean
        assert torch.allclose(head.class_means.centred_means[k], expected, atol=1e-5)
        if kind is ClassMeanClassifier:
            assert torch.allclose(head.weight[k], expected / expected.norm(), atol=1e-6)
    assert torch.equal(head.class_means.centred_means[:4], before.class_means.centred_means)
    assert head.class_means.centred.seen[4:].tolist() == [4, 5]
    if kind is NearestETFClassifier:
        assert torch.allclose(head.weight @ head.weight.T, simplex_gram(6), atol=1e-5)
    else:
        assert torch.equal(head.weight[:4], before.weight)
    with pytest.raises(ValueError, match="seen before: 5"):
        head.admit(samples[:1], torch.tensor([5]))


def test_an_empty_head_of_means_is_the_nearest_class_mean():
    features, targets = batch(5, size=100)
    head = ClassMeanClassifier(12, 2, feature_norm=3.0)
    head.admit(features, targets)
    sphere = 3.0 * features / features.norm(dim=1, keepdim=True)
    means = torch.stack([sphere[targets == k].mean(0) for k in range(5)]) - sphere.mean(0)
    cosines = torch.nn.functional.cosine_similarity((sphere - sphere.mean(0))[:, None], means[None], dim=2)
    assert torch.equal(head.eval()(features).argmax(1), cosines.argmax(1))


def test_more_classes_than_the_simplex_holds_need_a_code():
    head = NearestFrameClassifier(3, 4)
    head(*batch(4, dim=3))
    with pytest.raises(ValueError, match=r"K = d \+ 1 = 4 .*K = 5.*softmax_code\(5, 3\)"):
        head.grow(1)
    assert head.num_classes == 4
    code = softmax_code(6, 3)
    head.grow(2, code=code)
    centred = code - code.mean(0)
    assert torch.allclose(head.weight @ head.weight.T, centred @ centred.T, atol=1e-4)
    head(*batch(6, dim=3))
    assert torch.allclose(head.weight @ head.weight.T, centred @ centred.T, atol=1e-4)
    fresh = NearestFrameClassifier(3, 6, frame=code)
    fresh.load_state_dict(head.state_dict())
    assert torch.equal(fresh.weight, head.weight)
    fixed = FixedFrameClassifier(3, 4, softmax_code(4, 3))
    fixed.grow(2, code=code)
    assert torch.allclose(fixed.weight @ fixed.weight.T, centred @ centred.T, atol=1e-4)


REFUSED = [
    (lambda: LearnedClassifier(5, 3), {"num_new": 0}, "num_new must be"),
    (lambda: NearestETFClassifier(5, 3), {"num_new": 1.5}, "num_new"),
    (lambda: NearestETFClassifier(5, 6), {"num_new": 1}, r"K = d \+ 1 = 6"),
    (lambda: FixedETFClassifier(5, 6), {"num_new": 1}, r"K = d \+ 1 = 6"),
    (lambda: NearestETFClassifier(5, 3), {"num_new": 1, "code": torch.eye(4)}, "code must be None"),
    (lambda: FixedFrameClassifier(5, 3, torch.eye(3)), {"num_new": 1}, "code of all 4 classes"),
    (lambda: NearestFrameClassifier(5, 3, frame=torch.eye(3)), {"num_new": 1}, "code of all 4 classes"),
    (lambda: NearestFrameClassifier(5, 3, frame=torch.eye(3)), {"num_new": 1, "code": torch.eye(5)}, "K = 4"),
    (lambda: NearestFrameClassifier(5, 3, frame=LeadingDirections()), {"num_new": 1}, "LeadingDirections"),
    (lambda: NearestETFClassifier(5, 3, solver=TrustRegion()), {"num_new": 1}, "TrustRegion"),
    (lambda: NearestETFClassifier(5, 3, class_weights=torch.ones(3)), {"num_new": 1}, "class_weights"),
    (lambda: ClassMeanClassifier(5, 3, class_weights=torch.ones(3)), {"num_new": 1}, "class_weights"),
    (lambda: FixedETFClassifier(5, 4, seen=3), {"num_new": 2}, "at most 1"),
    (lambda: LearnedClassifier(5, 3), {"num_new": 1, "optimizer": "sgd"}, "optimizer must be"),
    (lambda: LearnedClassifier(5, 3), {"num_new": 1, "optimizer": torch.optim.SGD([torch.ones(1)])}, "must hold"),
]


@pytest.mark.parametrize(("make", "arguments", "message"), REFUSED)
def test_refused_growth_changes_nothing(make, arguments, message):
    head = make()
    before, num_classes = copy.deepcopy(head.state_dict()), head.num_classes
    with pytest.raises(ValueError, match=message):
        head.grow(**arguments)
    assert head.num_classes == num_classes
    assert head.state_dict().keys() == before.keys()
    for key, value in head.state_dict().items():
        assert torch.equal(value, before[key])


def test_an_optimizer_whose_state_cannot_grow_is_refused():
    head = LearnedClassifier(5, 3)
    optimizer = torch.optim.LBFGS(head.parameters())
    features, targets = batch(3, dim=5)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(head(features), targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(ValueError, match="LBFGS"):
        head.grow(1, optimizer=optimizer)
    assert head.num_classes == len(head.weight) == len(head.bias) == 3


@pytest.mark.parametrize(
    ("targets", "message"),
    [([0, 1], "seen before: 0, 1"), ([4, 6], "none of 5"), ([-1, 4], "at least 0"), ([4], "shape")],
)
def test_refused_admission_changes_nothing(targets, message):
    head = ClassMeanClassifier(12, 4)
    head(*batch(4))
    before = copy.deepcopy(head.state_dict())
    with pytest.raises(ValueError, match=message):
        head.admit(torch.randn(2, 12), torch.tensor(targets))
    for key, value in head.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_grown_state_is_refused_by_a_smaller_head():
    head = NearestETFClassifier(12, 4)
    head.grow(2)
    smaller = NearestETFClassifier(12, 4)
    with pytest.raises(RuntimeError, match=r"has 6 classes, but NearestETFClassifier has 4: construct .* grow\(\)"):
        smaller.load_state_dict(head.state_dict())
    smaller.grow(2)
    smaller.load_state_dict(head.state_dict())
    assert torch.equal(smaller.weight, head.weight)


def test_an_attached_head_grows_and_compiles():
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    attached = attach_head(model, NearestETFClassifier(12, 4))
    call = torch.compile(attached, backend="aot_eager")
    inputs = torch.randn(16, 8)
    assert call(inputs, targets=torch.arange(16) % 4).shape == (16, 4)
    attached.grow(2)
    assert attached.num_classes == 6
    plain = copy.deepcopy(attached)
    for _ in range(2):
        targets = torch.arange(16) % 6
        assert torch.allclose(call(inputs, targets=targets), plain(inputs, targets=targets), atol=1e-5)
    assert attached.to_inference()(inputs).shape == (16, 6)
    with pytest.raises(ValueError, match="must have grow"):
        attach_head(nn.Sequential(nn.Linear(8, 4)), nn.Linear(8, 4)).grow(1)


def test_gradients_through_a_grown_head():
    head = NearestETFClassifier(6, 3, momentum=1.0).double()
    head.grow(2)
    features, targets = batch(5, dim=6, size=10)
    features = features.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda features: copy.deepcopy(head)(features, targets).square().sum(), (features,), atol=1e-5
    )
