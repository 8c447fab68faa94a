"""`measure` on models and loaders of several kinds."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from helpers import generator
from metrics.brute_force import dense_metrics, dense_sample_metrics, dense_sphere_metrics
from neuralcollapse.heads import FixedETFClassifier, NearestETFClassifier, attach_head
from neuralcollapse.metrics import MeasureOptions, measure

K, D = 4, 8


def make_loader(seed: int = 0, samples: int = 60, batch_size: int = 16) -> DataLoader:
    inputs = torch.randn(samples, 6, generator=generator(seed))
    return DataLoader(TensorDataset(inputs, torch.arange(samples) % K), batch_size=batch_size)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, D), nn.BatchNorm1d(D), nn.ReLU(), nn.Dropout(0.5), nn.Linear(D, K))


def features_and_targets(model: nn.Module, loader: DataLoader) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = (torch.cat(parts) for parts in zip(*loader, strict=True))
    mode = model.training
    with torch.no_grad():
        features = model.eval()[:-1](inputs)
    model.train(mode)
    return features, targets


@pytest.mark.parametrize("cache_bytes", [2**31, 600])
def test_all_metrics_of_a_model_on_a_loader(model, cache_bytes):
    loader, ood_loader = make_loader(), [torch.randn(10, 6, generator=generator(3))]
    options = MeasureOptions(class_scatter=True, information=True, cache_bytes=cache_bytes)
    measurement = measure(model, loader, ood=ood_loader, options=options, progress=False)
    features, targets = features_and_targets(model, loader)
    weight, bias = model[-1].weight.detach(), model[-1].bias.detach()
    with torch.no_grad():
        ood_mean = model.eval()[:-1](ood_loader[0]).double().mean(0)
    means = torch.stack([features.double()[targets == k].mean(0) for k in range(K)])
    expected = dense_metrics(features, targets, K, weight, bias, "samples", ood_mean)
    expected |= dense_sample_metrics(features, targets, weight, bias, means, features.double().mean(0))
    expected |= dense_sphere_metrics(features, targets, weight)
    expected["accuracy"] = float((model[-1](features).argmax(1) == targets).double().mean())
    expected["nc4_ncc_mismatch_class_mean"] = float(measurement.ncc_mismatch.mean())
    assert measurement.metrics == pytest.approx(expected, rel=1e-8, abs=1e-12)
    assert torch.equal(measurement.cos_margins, measurement.cos_margins.sort().values)
    assert measurement.cos_margins.mean() == pytest.approx(measurement.metrics["nc2_cos_margin"])
    assert measurement.moments.counts.tolist() == [15] * K
    assert (15 * measurement.ncc_mismatch).sum() == pytest.approx(60 * measurement.metrics["nc4_ncc_mismatch"])


def test_features_beyond_the_limit_go_to_a_file_that_is_removed(model, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = []

    def spy(batch):
        seen.append(sum(file.stat().st_size for file in Path(tmp_path).iterdir()))
        return batch

    measure(model, make_loader(), options=MeasureOptions(cache_bytes=600), unpack=spy, progress=False)
    assert max(seen) > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_hooks_are_restored(model, fails):
    model.train()
    model[1].eval()
    loader = [(torch.full((4, 6), torch.nan), torch.arange(4))] if fails else make_loader()
    if fails:
        with pytest.raises(ValueError, match="features of batch 0 must be finite"):
            measure(model, loader, layers=["0"], progress=False)
    else:
        measure(model, loader, layers=["0"], progress=False)
    assert [module.training for module in model] == [True, False, True, True, True]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_model_runs_once_without_changing(model):
    model.train()
    runs = []
    model[0].register_forward_hook(lambda *_: runs.append(1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure(model, make_loader(), progress=False)
    assert len(runs) == len(make_loader())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_test_split_with_the_means_of_the_train_split(model):
    train, test = make_loader(0), make_loader(1)
    measurement = measure(model, test, train=train, progress=False)
    train_features, train_targets = features_and_targets(model, train)
    means = torch.stack([train_features.double()[train_targets == k].mean(0) for k in range(K)])
    expected = dense_sample_metrics(
        *features_and_targets(model, test),
        model[-1].weight.detach(),
        model[-1].bias.detach(),
        means,
        train_features.double().mean(0),
    )
    assert {name: measurement.metrics[name] for name in expected} == pytest.approx(expected, rel=1e-8)
    assert measurement.metrics["nc1_pinv"] == measure(model, test, progress=False).metrics["nc1_pinv"]
    torch.testing.assert_close(measurement.train_moments.means, means)


def test_layers_are_measured_as_well(model):
    measurement = measure(model, make_loader(), layers=["0", "2"], progress=False)
    assert list(measurement.layers) == ["0", "2"]
    # Dropout is the identity in evaluation mode: layer 2 gives the classifier's own features.
    assert measurement.layers["2"] == {name: measurement.metrics[name] for name in measurement.layers["2"]}
    assert measurement.layers["0"]["nc1_pinv"] != measurement.layers["2"]["nc1_pinv"]


@pytest.mark.parametrize(
    ("pooling", "expected_dim"), [("mean", 5), ("flatten", 5 * 16), (lambda output: output.amax((2, 3)), 5)]
)
def test_feature_maps_are_pooled_or_flattened(pooling, expected_dim):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 5, 1), nn.Flatten(), nn.Linear(5 * 16, K))
    images = torch.randn(20, 1, 4, 4)
    loader = [(images, torch.arange(20) % K)]
    options = MeasureOptions(layer_pooling=pooling)
    measurement = measure(model, loader, layers=["0"], options=options, progress=False)
    output = model[0](images).detach()
    pooled = (
        {5: output.mean((2, 3)), 80: output.flatten(1)}[expected_dim] if isinstance(pooling, str) else pooling(output)
    )
    expected = measure(
        nn.Sequential(nn.Identity(), nn.Linear(expected_dim, K)), [(pooled, torch.arange(20) % K)], progress=False
    )
    for name, value in measurement.layers["0"].items():
        assert value == pytest.approx(expected.metrics[name], rel=1e-6, nan_ok=True), name
    # The mean of a map of one channel is a line in all five: pairs of classes have the same direction.
    assert ("nc2_hyperspherical_log_mean" in measurement.layers_undefined.get("0", {})) == (pooling == "mean")


def test_dictionaries_are_unpacked():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, D)
            self.classifier = nn.Linear(D, K)

        def forward(self, tokens, mask):
            return {"logits": self.classifier(self.embedding(tokens) * mask[..., None])}

    torch.manual_seed(0)
    tokens = torch.randint(11, (10, 7))
    labels = torch.randint(K, (10, 7))
    labels[:, ::3] = -100
    batches = [{"tokens": tokens, "mask": torch.ones(10, 7), "labels": labels}]
    measurement = measure(
        Tagger(),
        batches,
        unpack=lambda batch: ({"tokens": batch["tokens"], "mask": batch["mask"]}, batch["labels"]),
        layers=["embedding"],
        options=MeasureOptions(ignore_index=-100),
        progress=False,
    )
    kept = labels.flatten() >= 0
    assert measurement.moments.counts.tolist() == labels.flatten()[kept].bincount(minlength=K).tolist()
    assert len(measurement.cos_margins) == int(kept.sum())
    assert measurement.layers["embedding"]["nc1_pinv"] == pytest.approx(measurement.metrics["nc1_pinv"])


def test_head_that_normalises_is_measured_after_normalising():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(K, D)), None

        def features(self, inputs):
            return 5 * nn.functional.normalize(inputs, dim=-1)

        def forward(self, inputs):
            return self.features(inputs) @ self.weight.T

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, D), Head())
    measurement = measure(model, make_loader(), progress=False)
    inputs = torch.cat([inputs for inputs, _ in make_loader()])
    features = model[1].features(model[0](inputs)).detach()
    targets = torch.arange(60) % K
    means = torch.stack([features[targets == k].double().mean(0) for k in range(K)])
    torch.testing.assert_close(measurement.moments.means, means)
    assert measurement.metrics["nc4_bias"] == pytest.approx(
        float((model[1].weight.detach().double() @ means.mean(0)).norm())
    )


@pytest.mark.parametrize("head_class", [NearestETFClassifier, FixedETFClassifier])
def test_models_with_an_attached_head(head_class):
    torch.manual_seed(0)
    model = attach_head(nn.Sequential(nn.Linear(6, D), nn.ReLU(), nn.Linear(D, K)), head_class(D, K))
    measurement = measure(model, make_loader(), progress=False)
    assert measurement.metrics["nc2_etf_weights"] < 1e-6
    assert measurement.metrics["nc4_ncc_mismatch"] > 0
    assert model.training


def test_top5_accuracy_of_many_classes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), nn.Linear(6, 12))
    inputs, targets = torch.randn(240, 6), torch.arange(240) % 12
    metrics = measure(model, [(inputs, targets)], progress=False).metrics
    ranked = model(inputs).topk(5).indices
    assert metrics["accuracy_top5"] == pytest.approx(float((ranked == targets[:, None]).any(1).float().mean()))
    assert metrics["accuracy_top5"] > metrics["accuracy"]


def test_without_metrics_of_single_samples_no_features_are_cached(model):
    options = MeasureOptions(per_sample=False, pairwise=False)
    measurement = measure(model, make_loader(), options=options, progress=False)
    assert not {"alignment", "nc2_cos_margin", "nc4_ncc_mismatch", "nc1_cdnv"} & measurement.metrics.keys()
    assert "accuracy" in measurement.metrics
    assert len(measurement.cos_margins) == 0


class Uncalled(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.classifier = nn.Linear(6, D), nn.Linear(D, K)

    def forward(self, inputs):
        return self.body(inputs)


@pytest.mark.parametrize(
    ("make_model", "options", "message"),
    [
        (None, {"loader": []}, "loader must yield at least one batch, got none"),
        (None, {"train": []}, "train must yield at least one batch, got none"),
        (None, {"ood": []}, "ood must yield at least one batch, got none"),
        (None, {"loader": [torch.zeros(3, 6)]}, "loader must yield .input, target. pairs, got no target"),
        (None, {"loader": [{"x": torch.zeros(3, 6)}]}, "loader must yield .input, target. pairs, got dict"),
        (None, {"loader": [(torch.zeros(3, 6), torch.tensor([0, 1, 9]))]}, r"targets must lie in \[0, 4\)"),
        (None, {"classifier": "fc"}, "classifier must name a module of the model, got 'fc'"),
        (None, {"loader": 3}, "loader must be an iterable of batches, got int"),
        (None, {"loader": torch.zeros(3, 6)}, "loader must be an iterable of batches, got Tensor"),
        (None, {"layers": "0"}, "layers must be a list of names, or 'blocks', got '0'"),
        (None, {"classifier": 4}, "classifier must be a module or its dotted name, got int"),
        (None, {"unpack": "pair"}, "unpack must be a function of a batch, or 'next_token', got 'pair'"),
        (None, {"device": "gpu"}, "device must name a torch device, got 'gpu'"),
        (lambda: "model.pt", {}, "model must be an nn.Module, got str"),
        (None, {"train": 3}, "train must be an iterable of batches, a Measurement or ClassMoments, got int"),
        (None, {"layers": ["stem"]}, "layers must name modules of the model, got 'stem'"),
        (lambda: nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()), {}, "model .Sequential. must end in a classifier"),
        (Uncalled, {"classifier": "classifier"}, "'classifier' must be called by the model's forward"),
    ],
)
def test_bad_input(model, make_model, options, message):
    model = make_model() if make_model else model
    with pytest.raises(ValueError, match=message):
        measure(model, options.pop("loader", make_loader()), progress=False, **options)
