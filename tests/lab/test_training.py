from __future__ import annotations

import pandas as pd
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from helpers import generator
from neuralcollapse import measure
from neuralcollapse.lab.backbones import build_backbone
from neuralcollapse.lab.batches import evaluation_batches
from neuralcollapse.lab.callback import CollapseCallback
from neuralcollapse.lab.config import METHODS, Data, Model, RunConfig
from neuralcollapse.lab.data import load_data
from neuralcollapse.lab.models import build_model, resolve_device
from neuralcollapse.lab.runs import RunFolder
from neuralcollapse.lab.training import quiet_lightning, rate_factor, train

SMALL = {"backbone": "mlp", "width": 24, "depth": 1, "train_samples": 200, "test_samples": 60, "epochs": 2}


@pytest.mark.parametrize("backbone", ["convnet", "mlp", "resnet18"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 33, 20)])
def test_backbones_give_features_of_the_dimension_they_say(backbone, shape):
    network = build_backbone(Model(backbone=backbone, width=8), shape)
    features = network(torch.randn(2, *shape))
    assert features.shape == (2, network.feature_dim)


@pytest.mark.parametrize(("stem", "smallest"), [("7x7", 1), ("3x3", 4)])
def test_resnet18_is_the_published_one(stem, smallest):
    network = build_backbone(Model(backbone="resnet18", stem=stem), (3, 32, 32))
    published = 11_176_512 if stem == "7x7" else 11_168_832  # 11,689,512 with the classifier of 512 × 1000 + 1000
    assert sum(parameter.numel() for parameter in network.parameters()) == published
    before_pooling = network.layers[:-2](torch.randn(2, 3, 32, 32))
    assert before_pooling.shape == (2, 512, smallest, smallest)


@pytest.mark.parametrize("backbone", ["convnet", "mlp", "resnet18"])
def test_every_method_starts_from_the_same_backbone_weights(backbone):
    models = [build_model(RunConfig(method=name, seed=3, backbone=backbone), (1, 8, 8), 10) for name in METHODS]
    states = [model.model.state_dict() for model in models]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[key], states[0][key]) for key in state)
    other = build_model(RunConfig(method="fixed", seed=4, backbone=backbone), (1, 8, 8), 10).model.state_dict()
    assert any(not torch.equal(other[key], states[0][key]) for key in other)


def test_building_a_model_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    build_model(RunConfig(), (1, 8, 8), 10)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [1, 1, 1, 1]), ("cosine", [1, 0.75, 0.25, 0]), ("step", [1, 0.1, 0.01, 0.01])],
)
def test_schedules(schedule, expected):
    found = [rate_factor(schedule, progress) for progress in (0, 1 / 3, 2 / 3, 1)]
    assert found == pytest.approx(expected)


def test_a_device_that_is_not_there_is_refused():
    missing = "cuda" if not torch.cuda.is_available() else "mps"
    with pytest.raises(ValueError, match=r"device must be auto or one that is there \(.*cpu\)"):
        resolve_device(missing)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_with_every_optimiser(method, tmp_path):
    data = load_data(Data(train_samples=200, test_samples=60))
    for optimizer, rate in (("sgd", 0.05), ("adamw", 3e-3)):
        settings = {"method": method, "optimizer": optimizer, "lr": rate, "epochs": 6, "batch_size": 20}
        config = RunConfig(**SMALL | settings)
        folder = RunFolder(tmp_path / optimizer)
        folder.open(config)
        train(config, data, evaluation_batches(data), folder)
        last = pd.read_csv(folder.metrics).query("epoch == 6 and split == 'train' and metric == 'accuracy'")
        assert last["value"].item() > 0.6


def test_standard_keeps_unit_rows_through_lightning(tmp_path):
    data = load_data(Data(train_samples=200, test_samples=60))
    config = RunConfig(**SMALL, method="standard")
    folder = RunFolder(tmp_path / "run")
    folder.open(config)
    train(config, data, evaluation_batches(data), folder)
    state = torch.load(folder.last_checkpoint, weights_only=True)["state_dict"]
    assert torch.allclose(state["model.head.weight"].norm(dim=1), torch.ones(10), atol=1e-6)


def test_checkpoints_of_epochs_are_kept_on_request(tmp_path):
    data = load_data(Data(train_samples=200, test_samples=60))
    config = RunConfig(**SMALL | {"epochs": 5}, checkpoint_every=2)
    folder = RunFolder(tmp_path / "run")
    folder.open(config)
    train(config, data, evaluation_batches(data), folder)
    assert {path.name for path in folder.checkpoints.iterdir()} == {"epoch0002.ckpt", "epoch0004.ckpt", "last.ckpt"}


class PlainTraining(LightningModule):
    """Somebody's own training, which knows nothing of this library."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))

    def forward(self, inputs):
        return self.network(inputs)

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def plain_batches(number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    random = generator(number)
    return [(torch.randn(30, 6, generator=random), torch.arange(30) % 3) for _ in range(number)]


def test_the_callback_measures_any_lightning_training(tmp_path):
    module, loaders = PlainTraining(), {"train": plain_batches(3), "test": plain_batches(2)}
    callback = CollapseCallback(loaders, every_n_epochs=2, csv=tmp_path / "metrics.csv")
    with quiet_lightning():
        trainer = Trainer(
            max_epochs=5,
            accelerator="cpu",
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(TensorDataset(torch.randn(90, 6), torch.arange(90) % 3), 30))
    table = pd.read_csv(tmp_path / "metrics.csv", converters={"value": float})
    assert list(table.columns) == ["epoch", "split", "metric", "value"]
    assert table["epoch"].unique().tolist() == [2, 4, 5]
    assert module.training
    expected = measure(module, loaders["test"], train_loader=loaders["train"], progress=False).metrics
    last = table.query("epoch == 5 and split == 'test'").set_index("metric")["value"].to_dict()
    assert last == expected
    assert float(trainer.callback_metrics["test/nc1_quotient"]) == pytest.approx(expected["nc1_quotient"])


def test_the_callback_checks_its_arguments():
    with pytest.raises(ValueError, match="loaders must name at least one split"):
        CollapseCallback({})
    with pytest.raises(ValueError, match="every_n_epochs must be at least 1, got 0"):
        CollapseCallback({"train": []}, every_n_epochs=0)
