"""`CollapseCallback` on a LightningModule whose model is an attribute."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from helpers import normal
from neuralcollapse import NearestETFClassifier, attach_head, measure
from neuralcollapse.lab import CollapseCallback
from neuralcollapse.lab.training.one_run import quiet_lightning

BATCHES = [(normal(30, 6, seed=seed, dtype=torch.float32), torch.arange(30) % 3) for seed in range(3)]


class TrainsAnAttribute(LightningModule):
    """Calls its parts in its steps, and has no forward, as most do."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.accuracy = MulticlassAccuracy(3)

    def training_step(self, batch, _):
        images, labels = batch
        return torch.nn.functional.cross_entropy(next(iter(self.children()))(images, targets=labels), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit_once(module, callback, max_epochs=2):
    with quiet_lightning():
        trainer = Trainer(
            max_epochs=max_epochs,
            accelerator="cpu",
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(TensorDataset(*map(torch.cat, zip(*BATCHES, strict=True))), 30))
    return trainer


def attached_net():
    return attach_head(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), NearestETFClassifier(8, 3))


@pytest.mark.parametrize("name", ["model", "net"])
def test_the_callback_measures_the_attribute_that_is_the_model(name, caplog):
    module = TrainsAnAttribute(**{name: attached_net()})
    with caplog.at_level("INFO", "neuralcollapse"):
        trainer = fit_once(module, CollapseCallback({"train": BATCHES}))
    assert f"measuring {name} (AttachedHead) and its classifier 'head'" in caplog.text
    expected = measure(getattr(module, name), BATCHES, progress=False).metrics
    assert float(trainer.callback_metrics["train/nc1_quotient"]) == pytest.approx(expected["nc1_quotient"])


def test_the_callback_asks_which_of_several_attributes_is_the_model():
    module = TrainsAnAttribute(student=attached_net(), teacher=attached_net())
    with pytest.raises(ValueError, match="model must name what .* could be 'student', 'teacher'"):
        fit_once(module, CollapseCallback({"train": BATCHES}))
    with pytest.raises(
        ValueError, match="model must name a module of TrainsAnAttribute, got 'stduent'; it has 'student'"
    ):
        fit_once(module, CollapseCallback({"train": BATCHES}, model="stduent"))
    callback = CollapseCallback({"train": BATCHES}, model="student")
    fit_once(module, callback, max_epochs=1)
    assert callback.rows
