"""`NeuralCollapse` in torchmetrics, lightning and torch.distributed."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from helpers import generator
from neuralcollapse.heads import ClassMeanClassifier, FixedETFClassifier, LearnedClassifier, NearestETFClassifier
from neuralcollapse.metrics import ClassMoments, MeasureOptions, NeuralCollapse, collapse_metrics

FEATURES = torch.randn(120, 8, generator=generator(1)) + 2
TARGETS = torch.arange(120) % 4


@pytest.fixture
def classifier() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 4)


def expected(classifier: nn.Linear | None = None, features=FEATURES, targets=TARGETS) -> dict[str, float]:
    moments = ClassMoments(4, 8)
    moments.update(features, targets)
    return collapse_metrics(moments, *((classifier.weight, classifier.bias) if classifier else ()))


def as_floats(values: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def updated(metric: NeuralCollapse, start: int = 0, end: int = 120) -> NeuralCollapse:
    for first in range(start, end, 25):
        batch = slice(first, min(first + 25, end))
        metric.update(FEATURES[batch], TARGETS[batch])
    return metric


def test_compute_is_collapse_metrics(classifier):
    metric = updated(NeuralCollapse(4, 8, classifier))
    assert as_floats(metric.compute()) == pytest.approx(expected(classifier), rel=1e-10)
    metric.reset()
    assert not metric.means.any()
    assert as_floats(updated(metric).compute()) == pytest.approx(expected(classifier), rel=1e-10)


def test_forward_gives_the_batch_and_accumulates(classifier):
    metric = NeuralCollapse(4, 8, classifier)
    for first in range(0, 120, 40):
        batch = slice(first, first + 40)
        values = metric(FEATURES[batch], TARGETS[batch])
        assert as_floats(values) == pytest.approx(expected(classifier, FEATURES[batch], TARGETS[batch]), rel=1e-10)
    assert as_floats(metric.compute()) == pytest.approx(expected(classifier), rel=1e-10)


def test_classifier_is_held_by_reference(classifier):
    metric = NeuralCollapse(4, 8, classifier)
    assert not list(metric.parameters())
    assert not list(metric.children())
    assert not metric.state_dict()
    updated(metric)
    for other in (metric.clone(), copy.deepcopy(metric)):
        with torch.no_grad():
            classifier.weight += 1
        assert as_floats(other.compute()) == pytest.approx(expected(classifier), rel=1e-10)


def test_clone_accumulates_on_its_own(classifier):
    metric = updated(NeuralCollapse(4, 8, classifier), 0, 60)
    clone = updated(metric.clone(), 60, 120)
    assert as_floats(clone.compute()) == pytest.approx(expected(classifier), rel=1e-10)
    assert int(metric.counts.sum()) == 60


def test_persistent_states_and_pickles(classifier):
    metric = updated(NeuralCollapse(4, 8, classifier))
    metric.persistent(True)
    other = NeuralCollapse(4, 8, classifier)
    other.persistent(True)
    other.load_state_dict(metric.state_dict())
    assert torch.equal(other.means, metric.means)
    assert as_floats(pickle.loads(pickle.dumps(metric)).compute()) == pytest.approx(expected(classifier), rel=1e-10)


def test_merge_state_takes_a_metric_or_a_dictionary(classifier):
    first, second = updated(NeuralCollapse(4, 8, classifier), 0, 50), updated(NeuralCollapse(4, 8), 50, 120)
    first.merge_state(second)
    assert as_floats(first.compute()) == pytest.approx(expected(classifier), rel=1e-10)
    third = updated(NeuralCollapse(4, 8, classifier), 0, 50)
    third.merge_state(second.metric_state)
    assert as_floats(third.compute()) == pytest.approx(expected(classifier), rel=1e-10)
    with pytest.raises(ValueError, match="other must have K, d"):
        first.merge_state(NeuralCollapse(5, 8))


def test_collection_beside_an_accuracy(classifier):
    collection = MetricCollection({"collapse": NeuralCollapse(4, 8, classifier), "top1": MulticlassAccuracy(4)})
    for batch, labels in zip(FEATURES.split(40), TARGETS.split(40), strict=True):
        collection.update(features=batch, preds=classifier(batch), target=labels)
    values = as_floats(collection.compute())
    assert {name: values.pop(name) for name in expected(classifier)} == pytest.approx(expected(classifier), rel=1e-10)
    assert values.keys() == {"top1"}


def test_double_and_half_leave_the_states_alone(classifier):
    metric = NeuralCollapse(4, 8, classifier).half().float()
    assert metric.means.dtype == torch.float64
    assert nn.Sequential(metric).half()[0].means.dtype == torch.float64


@pytest.mark.filterwarnings("ignore")
def test_lightning_logs_the_metrics_of_each_epoch(tmp_path):
    """Two epochs of compute, log_dict and reset: the values of each epoch are those of a new measurement."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(8, 8)
            self.classifier = nn.Linear(8, 4)
            self.collapse = NeuralCollapse(4, 8, self.classifier)
            self.logged = []

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.classifier(self.body(batch[0])), batch[1])

        def validation_step(self, batch, _):
            self.collapse.update(self.body(batch[0]), batch[1])

        def on_validation_epoch_end(self):
            self.log_dict(self.collapse.compute())
            self.collapse.reset()

        def on_train_epoch_end(self):  # after the validation
            fresh = expected(self.classifier, self.body(FEATURES).detach())
            self.logged.append((as_floats(self.trainer.callback_metrics), fresh))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    module = Module()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(FEATURES, TARGETS), batch_size=40)
    trainer = lightning.Trainer(
        max_epochs=2,
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(module, loader, loader)
    assert len(module.logged) == 2
    for logged, fresh in module.logged:
        assert logged == pytest.approx(fresh, rel=1e-6)
    first, second = (logged["nc1_quotient"] for logged, _ in module.logged)
    assert first != pytest.approx(second, rel=1e-3)


RANK = """
import os, sys, torch
import torch.distributed as dist
from torch import nn
from neuralcollapse.metrics import NeuralCollapse

folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
features, targets = torch.load(f"{folder}/data.pt", weights_only=True)
classifier = nn.Linear(8, 4)
classifier.load_state_dict(torch.load(f"{folder}/classifier.pt", weights_only=True))
metric = NeuralCollapse(4, 8, classifier)
half = slice(0, 50) if rank == 0 else slice(50, 120)
for batch, labels in zip(features[half].split(13), targets[half].split(13)):
    metric.update(batch, labels)
values = metric.compute()
assert int(metric.counts.sum()) == half.stop - half.start, "synchronising must not change a rank's own state"
torch.save(values, f"{folder}/rank{rank}.pt")
dist.destroy_process_group()
"""


def test_states_of_two_ranks_are_merged(classifier):
    ranks = [updated(NeuralCollapse(4, 8, classifier), 0, 50), updated(NeuralCollapse(4, 8, classifier), 50, 120)]

    def gather(tensor, group=None):
        name = next(name for name, state in ranks[0].metric_state.items() if state is tensor)
        return [rank.metric_state[name] for rank in ranks]

    ranks[0].dist_sync_fn, ranks[0].distributed_available_fn = gather, lambda: True
    assert as_floats(ranks[0].compute()) == pytest.approx(expected(classifier), rel=1e-10)
    assert int(ranks[0].counts.sum()) == 50


@pytest.mark.slow
def test_two_gloo_processes_give_the_single_process_result(tmp_path, classifier):
    torch.save((FEATURES, TARGETS), tmp_path / "data.pt")
    torch.save(classifier.state_dict(), tmp_path / "classifier.pt")
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank)], cwd=Path.cwd(), env=environment) for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    for rank in range(2):
        values = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert as_floats(values) == pytest.approx(expected(classifier), rel=1e-10)


@pytest.mark.parametrize(
    ("classifier", "message"),
    [
        (nn.ReLU(), "classifier of the metric must be an nn.Linear or have weight"),
        (nn.Linear(8, 5), r"classifier must have a weight of shape \(4, 8\), got \(5, 8\)"),
    ],
)
def test_bad_classifier(classifier, message):
    with pytest.raises(ValueError, match=message):
        NeuralCollapse(4, 8, classifier)


def test_bad_batch_is_named():
    metric = updated(NeuralCollapse(4, 8), 0, 50)
    with pytest.raises(ValueError, match="features of batch 2 must be finite"):
        metric.update(torch.full((3, 8), torch.nan), torch.arange(3))


def test_importing_metrics_leaves_torchmetrics_out():
    code = "import sys, neuralcollapse.metrics; print([m for m in ('torchmetrics', 'lightning') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_plots(classifier):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    metric = updated(NeuralCollapse(4, 8, classifier))
    figure, axes = metric.plot()
    assert figure is not None
    assert len(axes.get_lines()) == len(expected(classifier))
    metric.plot([metric.compute()] * 3, ax=axes)
    pyplot.close("all")


def test_a_code_adds_the_metrics_relative_to_its_gram(classifier):
    code = torch.randn(4, 2, generator=generator(4))
    options = MeasureOptions(code=code)
    values = as_floats(updated(NeuralCollapse(4, 8, classifier, options=options)).compute())
    moments = ClassMoments(4, 8)
    moments.update(FEATURES, TARGETS)
    wanted = collapse_metrics(moments, classifier.weight, classifier.bias, options=options)
    assert values == pytest.approx(wanted, rel=1e-10)
    assert {"nc2_gram_means", "nc2_gram_weights", "nc3_gram_duality"} <= values.keys()
    with pytest.raises(ValueError, match=r"code must be of shape \(K, r\)"):
        NeuralCollapse(4, 8, classifier, options=MeasureOptions(code=code[:3]))


def test_compute_follows_the_classifier(classifier):
    metric = updated(NeuralCollapse(4, 8, classifier))
    for step in range(3):
        assert as_floats(metric.compute()) == pytest.approx(expected(classifier), rel=1e-10)
        with torch.no_grad():
            classifier.weight += torch.randn(4, 8, generator=generator(step))
            classifier.bias.zero_()


@pytest.mark.parametrize(
    "reparametrise",
    [
        nn.utils.weight_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.spectral_norm,
        lambda layer: nn.utils.prune.random_unstructured(layer, "weight", 0.3),
    ],
    ids=["weight_norm by a hook", "weight_norm", "spectral_norm by a hook", "pruned"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_compute_takes_a_weight_that_is_made_of_other_parameters(classifier, reparametrise):
    layer = reparametrise(classifier)
    metric = updated(NeuralCollapse(4, 8, layer))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2).add_(0.1)
    values = as_floats(metric.compute())
    with torch.no_grad():
        layer.eval()(FEATURES)  # which makes the weight that the values are to be of
    assert values == pytest.approx(expected(layer), rel=1e-6)


BATCHES = {
    "one class": (FEATURES[:5], TARGETS[:5] * 0),
    "one sample": (FEATURES[:1], TARGETS[:1]),
    "nothing": (FEATURES[:0], TARGETS[:0]),
    "ignored": (FEATURES[:5], TARGETS[:5] * 0 - 1),
    "one per class": (FEATURES[:4], TARGETS[:4]),
    "constant": (FEATURES[:8] * 0 + 1, TARGETS[:8]),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.filterwarnings("ignore:undefined metrics")
def test_forward_on_any_batch_keeps_earlier_samples(classifier, batch):
    features, targets = BATCHES[batch]
    metric = updated(NeuralCollapse(4, 8, classifier, options=MeasureOptions(ignore_index=-1)))
    values = metric(features, targets)
    assert values["nc1_quotient"].isnan()
    kept = targets >= 0
    seen = torch.cat([FEATURES, features[kept]]), torch.cat([TARGETS, targets[kept]])
    assert as_floats(metric.compute()) == pytest.approx(expected(classifier, *seen), rel=1e-10)


REFUSED = {
    "NaN": (FEATURES[:4] * torch.nan, TARGETS[:4]),
    "label": (FEATURES[:4], TARGETS[:4] + 4),
    "shape": (FEATURES[:4, :5], TARGETS[:4]),
    "dtype": (FEATURES[:4], TARGETS[:4].float()),
    "None": (None, TARGETS[:4]),
}


@pytest.mark.parametrize("batch", REFUSED)
@pytest.mark.parametrize("method", ["update", "forward"])
@pytest.mark.parametrize("on_step", [False, True])
def test_a_refused_batch_changes_nothing(classifier, batch, method, on_step):
    metric = updated(NeuralCollapse(4, 8, classifier, dist_sync_on_step=on_step))
    before = {name: tensor.clone() for name, tensor in metric.metric_state.items()}
    for _ in range(2):
        with pytest.raises(ValueError, match="features|targets"):
            getattr(metric, method)(*REFUSED[batch])
        assert all(torch.equal(tensor, before[name]) for name, tensor in metric.metric_state.items())
        assert metric.update_count == 5
    assert as_floats(metric.compute()) == pytest.approx(expected(classifier), rel=1e-10)
    metric(FEATURES[:40], TARGETS[:40])
    assert int(metric.counts.sum()) == 160


def test_forward_that_cannot_compute_changes_nothing(classifier):
    """Of 40 samples each class has ten: a bound that the batch does not meet is an error of the batch alone."""
    metric = updated(NeuralCollapse(4, 8, classifier, options=MeasureOptions(min_samples=15)))
    with pytest.raises(ValueError, match="at least 2 classes of min_samples = 15"):
        metric(FEATURES[:40], TARGETS[:40])
    assert int(metric.counts.sum()) == 120
    assert as_floats(metric.compute()) == pytest.approx(expected(classifier), rel=1e-10)


@pytest.mark.parametrize("mixed", [False, True])
def test_set_dtype_changes_means_and_scatters_alone(classifier, mixed):
    options = MeasureOptions(dtype="mixed" if mixed else torch.float64)
    metric = NeuralCollapse(4, 8, classifier, options=options)
    metric.update(FEATURES[:60], TARGETS[:60])
    assert metric.set_dtype(torch.float32) is metric
    assert metric.means.dtype == metric.within_class_scatter.dtype == torch.float32
    assert metric.counts.dtype == torch.int64
    metric.update(FEATURES[60:], TARGETS[60:])
    assert as_floats(metric.compute()) == pytest.approx(expected(classifier), rel=1e-4)
    metric.reset()
    assert metric.counts.dtype == torch.int64
    assert metric.means.dtype == torch.float32
    metric.set_dtype(torch.float64)
    assert as_floats(updated(metric).compute()) == pytest.approx(expected(classifier), rel=1e-6)
    with pytest.raises(ValueError, match="dst_type must be torch.float32 or torch.float64, got torch.float16"):
        metric.set_dtype(torch.float16)
    assert metric.means.dtype == torch.float64


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.half(),
        lambda module: module.to(torch.bfloat16),
        lambda module: module.to("cpu", torch.float16),
        lambda module: module.double(),
        lambda module: module.bfloat16().float(),
    ],
)
def test_changing_the_dtype_of_a_model_does_not_change_its_metric(classifier, change):
    model = nn.ModuleDict({"metric": updated(NeuralCollapse(4, 8, classifier), 0, 60), "layer": nn.Linear(2, 2)})
    metric = change(model)["metric"]
    assert {tensor.dtype for tensor in metric.metric_state.values()} == {torch.float64, torch.int64}
    updated(metric, 60, 120)
    assert as_floats(metric.compute()) == pytest.approx(expected(classifier), rel=1e-10)


def test_the_default_dtype_does_not_matter(classifier):
    wanted = expected(classifier)
    torch.set_default_dtype(torch.float64)
    try:
        metric = updated(NeuralCollapse(4, 8, classifier))
        assert as_floats(metric.compute()) == pytest.approx(wanted, rel=1e-10)
    finally:
        torch.set_default_dtype(torch.float32)


def test_small_integer_labels(classifier):
    for dtype in (torch.uint8, torch.int8, torch.int16):
        metric = NeuralCollapse(4, 8, classifier)
        metric.update(FEATURES, TARGETS.to(dtype))
        assert as_floats(metric.compute()) == pytest.approx(expected(classifier), rel=1e-10)


class Normalising(nn.Module):
    """A user's own cosine classifier."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 8)), None

    def features(self, inputs):
        return nn.functional.normalize(inputs, dim=-1)


HEADS = {
    "fixed": lambda: FixedETFClassifier(8, 4),
    "nearest": lambda: NearestETFClassifier(8, 4, feature_norm=3.0),
    "learned": lambda: LearnedClassifier(8, 4, feature_norm="auto"),
    "class means": lambda: ClassMeanClassifier(8, 4),
    "own": Normalising,
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_raw_features_for_a_head_that_normalises_are_refused(head, dtype):
    torch.manual_seed(0)
    head = HEADS[head]()
    raw = FEATURES.to(dtype)
    metric = NeuralCollapse(4, 8, head)
    with pytest.raises(ValueError, match=rf"weight of {type(head).__name__}.* normalises .*classifier.features"):
        metric.update(raw, TARGETS)
    normalised = head.features(raw).detach()
    metric.update(normalised, TARGETS)
    metric.update(normalised.float(), TARGETS)
    metric.update(torch.zeros(2, 8, dtype=dtype), TARGETS[:2])  # a zero vector stays zero
    assert int(metric.counts.sum()) == 242
    unchecked = NeuralCollapse(4, 8, head, check_values=False)
    unchecked.update(raw, TARGETS)


def test_features_of_a_head_without_a_norm_and_of_a_learned_neck_are_taken():
    class Neck(Normalising):
        def __init__(self, in_features):
            super().__init__()
            self.neck = nn.Sequential(nn.Linear(in_features, 8), nn.BatchNorm1d(8), nn.ReLU())

        def features(self, inputs):
            return self.neck(inputs)

    torch.manual_seed(0)
    for head in (LearnedClassifier(8, 4), FixedETFClassifier(8, 4, feature_norm=None), Neck(8), Neck(5)):
        state = {name: tensor.clone() for name, tensor in head.state_dict().items()}
        mode = head.training
        NeuralCollapse(4, 8, head).update(FEATURES, TARGETS)
        assert head.training == mode
        assert all(torch.equal(tensor, state[name]) for name, tensor in head.state_dict().items())


def test_a_rank_has_its_own_states_back_when_computing_fails(classifier):
    """As if two ranks had gathered theirs; class 3 has no sample, which min_samples=0 refuses."""
    metric = NeuralCollapse(
        4,
        8,
        classifier,
        options=MeasureOptions(min_samples=0),
        dist_sync_fn=lambda tensor, group: [tensor, tensor],
        distributed_available_fn=lambda: True,
    )
    metric.update(FEATURES, TARGETS % 3)
    with pytest.raises(ValueError, match="every class must have a sample, got none of class 3"):
        metric.compute()
    assert int(metric.counts.sum()) == 120
    metric.update(FEATURES, TARGETS)
    doubled = torch.cat([FEATURES] * 4), torch.cat([TARGETS % 3, TARGETS] * 2)
    assert as_floats(metric.compute()) == pytest.approx(expected(classifier, *doubled), rel=1e-10)
    assert int(metric.counts.sum()) == 240
