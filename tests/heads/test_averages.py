"""Averages of weights: an average of frames becomes a frame, and an average of unit rows has unit rows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, update_bn

from helpers import generator, normal, simplex_gram
from neuralcollapse import (
    ClassMeanClassifier,
    FixedETFClassifier,
    FixedFrameClassifier,
    LearnedClassifier,
    NearestETFClassifier,
    NearestFrameClassifier,
    attach_head,
    nearest_frame,
    nearest_simplex_etf,
    softmax_code,
)
from neuralcollapse.heads import LeadingDirections, TrustRegion

CODE = normal(4, 3, seed=5)
WEIGHTS = torch.tensor([1.0, 2, 3, 4])
HEADS = {
    "nearest": lambda: NearestETFClassifier(12, 4, momentum=0.5),
    "nearest, class weights": lambda: NearestETFClassifier(12, 4, class_weights=WEIGHTS),
    "as published": lambda: NearestETFClassifier(12, 4, solver=TrustRegion()),
    "simplex": lambda: NearestFrameClassifier(12, 4),
    "code": lambda: NearestFrameClassifier(12, 4, frame=CODE),
    "code, class weights": lambda: NearestFrameClassifier(12, 4, frame=CODE, class_weights=WEIGHTS),
    "means": lambda: NearestFrameClassifier(12, 4, frame=LeadingDirections()),
    "means of rank 2, class weights": lambda: NearestFrameClassifier(
        12, 4, frame=LeadingDirections(2), class_weights=WEIGHTS
    ),
    "class means": lambda: ClassMeanClassifier(12, 4, momentum=0.5),
    "fixed": lambda: FixedETFClassifier(12, 4),
    "fixed frame": lambda: FixedFrameClassifier(12, 4, CODE),
    "softmax code": lambda: FixedFrameClassifier(2, 4, softmax_code(4, 2), orientation="given"),
    "learned": lambda: LearnedClassifier(12, 4, unit_weight=True),
}
AVERAGES = {
    "equal, buffers": {"use_buffers": True},
    "exponential": {"multi_avg_fn": get_ema_multi_avg_fn(0.6)},
    "exponential of each, buffers": {"avg_fn": get_ema_avg_fn(0.6), "use_buffers": True},
}


def batch(step, size=24):
    """Class means that turn from step to step, so that frames of different steps differ."""
    signal = normal(4, 8, seed=step % 3)
    targets = torch.arange(size) % 4
    return (signal[targets] + 0.3 * normal(size, 8, seed=step)).float(), targets


def attached(make):
    torch.manual_seed(0)
    head = make()
    network = nn.Sequential(nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, head.in_features))
    return attach_head(network.append(nn.Linear(head.in_features, 4)), head)


def trained(model, average=None, start=0, steps=6):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(start, start + steps):
        features, targets = batch(step)
        optimizer.zero_grad()
        cross_entropy(model(features, targets=targets), targets).backward()
        optimizer.step()
        if average is not None:
            average.update_parameters(model)
    return model


def satisfies_its_definition(head):
    """Return whether the stored weight fulfils the definition of the head, in fp64."""
    weight = (dict(head.named_buffers()) | dict(head.named_parameters()))["weight"].detach().double()
    gram, norms = weight @ weight.T, weight.norm(dim=1)
    if isinstance(head, ClassMeanClassifier | LearnedClassifier) or head.in_features == 2:
        return torch.allclose(norms, torch.ones(4).double(), atol=1e-5)
    if type(head) is FixedFrameClassifier or getattr(head, "code", None) is not None:
        code = CODE - CODE.mean(0)
        centred = weight - weight.mean(0)
        return torch.allclose(centred @ centred.T, code @ code.T, atol=2e-5)
    if isinstance(getattr(head, "frame", None), LeadingDirections):
        singular = torch.linalg.svdvals(weight - weight.mean(0))
        rank = 2 if head.frame.rank == 2 else int((singular > 1e-3).sum())
        return torch.allclose(singular[:rank], torch.tensor((4 / rank) ** 0.5).double(), atol=1e-5)
    return torch.allclose(gram, simplex_gram(4), atol=1e-5)


@pytest.mark.parametrize("options", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
def test_an_average_is_restored_to_a_classifier_of_the_same_kind(make, options):
    model = attached(make)
    average = AveragedModel(model, **options)
    trained(model, average)
    inputs = batch(20)[0]
    logits = average.eval()(inputs)
    head = average.module.head
    assert satisfies_its_definition(head)
    assert torch.allclose(logits, head(average.module.model(inputs)), atol=1e-6)
    again = attached(make).eval()
    again.load_state_dict(average.module.state_dict())
    assert torch.equal(again(inputs), logits)
    assert torch.allclose(copy.deepcopy(average.module).to_inference()(inputs), logits, atol=1e-5)
    assert satisfies_its_definition(model.head)
    trained(average.module.train(), start=6, steps=2)  # it can be trained on
    assert satisfies_its_definition(average.module.eval().head)


def test_an_average_of_frames_is_replaced_by_the_frame_nearest_to_it():
    frames = {}
    for name in ("nearest", "code", "class means"):
        heads = [HEADS[name]().double() for _ in range(2)]
        for seed, head in enumerate(heads):
            head(normal(20, 12, seed=seed), torch.arange(20) % 4)
        mean = (heads[0].weight + heads[1].weight) / 2
        with torch.no_grad():
            heads[0].weight.copy_(mean)
        frames[name] = mean, heads[0].weight
    assert torch.allclose(frames["nearest"][1], nearest_simplex_etf(frames["nearest"][0]), atol=1e-12)
    assert torch.allclose(frames["code"][1], nearest_frame(frames["code"][0], CODE), atol=1e-6)
    assert torch.allclose(frames["class means"][1], normalize(frames["class means"][0]), atol=1e-12)


@pytest.mark.parametrize("name", ["nearest", "as published", "means", "class means", "code, class weights"])
def test_a_weight_that_is_a_frame_is_unchanged(name):
    head = HEADS[name]()
    for seed in range(5):
        head(normal(24, 12, seed=seed).float(), torch.arange(24) % 4)
        stored = head.get_buffer("weight")
        assert head.weight is stored
    with torch.inference_mode():  # what is put in an average's place can be trained with
        stored.mul_(0.9)
        assert not torch.equal(head.weight, stored)
    features = normal(24, 12, seed=9).float().requires_grad_()
    head(features, torch.arange(24) % 4).sum().backward()
    assert features.grad.isfinite().all()


def test_a_weight_that_is_not_finite_is_not_replaced():
    head = NearestETFClassifier(12, 4)
    head.weight.fill_(torch.nan)
    assert head.weight.isnan().all()


def test_an_average_is_restored_when_it_is_compiled():
    model = attached(HEADS["nearest"])
    average = AveragedModel(model, use_buffers=True)
    trained(model, average)
    compiled = torch.compile(copy.deepcopy(average).eval(), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(batch(20)[0]), average.eval()(batch(20)[0]), atol=1e-5)


@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
def test_update_bn_recomputes_the_statistics_of_batch_norm(make):
    """`update_bn` runs the model in training mode, without gradients and without targets."""
    model = attached(make)
    average = AveragedModel(model)
    trained(model, average)
    before = copy.deepcopy(average.module.head.state_dict())
    loader = [batch(step, size=30) for step in range(20, 23)]
    update_bn(loader, average)
    body = average.module.model
    inputs = torch.cat([features for features, _ in loader])
    expected = torch.stack([body[0](features).mean(0) for features, _ in loader]).mean(0)
    assert torch.allclose(body[1].running_mean, expected, atol=1e-5)
    if not isinstance(average.module.head, FixedETFClassifier | FixedFrameClassifier):  # they need no targets
        assert all(torch.equal(before[name], value) for name, value in average.module.head.state_dict().items())
    assert average.eval()(inputs).isfinite().all()


def test_training_without_targets_raises():
    model = attached(HEADS["nearest"])
    with pytest.raises(ValueError, match="targets must be given in training mode"):
        model(batch(0)[0])
    with torch.no_grad():
        logits = model.head(normal(6, 12).float())
    assert torch.equal(logits, model.eval().head(normal(6, 12).float()))


@pytest.mark.parametrize(
    "make", [HEADS[name] for name in ("nearest", "as published", "means", "class means", "learned")]
)
def test_lightnings_averages_during_and_after_training(make):
    import lightning
    from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.kinds = attached(make), []

        def training_step(self, given, _):
            return cross_entropy(self.model(given[0], targets=given[1]), given[1])

        def validation_step(self, given, _):
            self.model(given[0])
            self.kinds.append(satisfies_its_definition(self.model.head))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.5)

    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*batch(0, size=64)), batch_size=16, shuffle=True, generator=generator()
    )
    for averaging in (WeightAveraging(), EMAWeightAveraging(decay=0.7)):
        module = Module()
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
        trainer = lightning.Trainer(callbacks=[averaging], accelerator="cpu", max_epochs=3, **quiet)
        trainer.fit(module, data, data)
        assert all(module.kinds)
        weight = module.model.head.weight
        assert satisfies_its_definition(module.model.head)
        assert torch.allclose(weight.norm(dim=1).square().mean(), torch.ones(()), atol=1e-4)
