"""Transfer of frozen features against a double pass in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from helpers import normal
from neuralcollapse import MeasureOptions
from neuralcollapse.metrics import transfer

N, CLASSES = 60, 5  # of other data; the model has three
TARGETS = torch.arange(N) % CLASSES
TRAIN = normal(N, 6, dtype=torch.float32) + normal(CLASSES, 6, seed=1, dtype=torch.float32)[TARGETS]
TEST = normal(N, 6, seed=2, dtype=torch.float32) + normal(CLASSES, 6, seed=1, dtype=torch.float32)[TARGETS]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Dropout(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3))


def loader(inputs: torch.Tensor, targets: torch.Tensor = TARGETS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(inputs.split(25), targets.split(25), strict=True))


def dense_accuracies(train: np.ndarray, test: np.ndarray) -> tuple[float, float]:
    labels = TARGETS.numpy()
    ones, one_hot = np.ones((N, 1)), np.eye(CLASSES)[labels]
    solution = np.linalg.lstsq(np.hstack([train, ones]), one_hot, rcond=None)[0]
    linear = (np.hstack([test, np.ones((len(test), 1))]) @ solution).argmax(axis=1)
    means = np.stack([train[labels == k].mean(axis=0) for k in range(CLASSES)])
    nearest = np.linalg.norm(test[:, None] - means, axis=2).argmin(axis=1)
    return float((linear == labels).mean()), float((nearest == labels).mean())


@pytest.mark.parametrize("layers", ["blocks", ["2"]])
def test_accuracies_are_those_of_dense_probes(layers):
    model = net().train()
    rows = transfer(model, loader(TRAIN), loader(TEST), CLASSES, layers=layers, progress=False)
    assert model.training
    assert [(row.layer, row.dimension) for row in rows] == [("2", 9), ("features", 7)]
    model.eval()
    for row, end in zip(rows, (2, 5), strict=True):
        with torch.no_grad():
            train, test = (model[:end](inputs).double().numpy() for inputs in (TRAIN, TEST))
        assert (row.linear_probe, row.nearest_class_mean) == pytest.approx(dense_accuracies(train, test), abs=1e-12)


def test_a_large_ridge_forgets_the_features():
    targets = torch.where(TARGETS == 4, 0, TARGETS)  # class 0 is the most frequent
    (row,) = transfer(net(), loader(TRAIN, targets), loader(TEST, targets), CLASSES, ridge=1e9, progress=False)
    assert row.linear_probe == pytest.approx(float((targets == 0).double().mean()))


def test_samples_that_are_ignored_or_of_classes_without_train_samples_are_left_out():
    kept = TARGETS != 2
    train, test = TARGETS.where(kept, torch.tensor(-1)), TARGETS.where(TARGETS != 3, torch.tensor(-1))
    options = MeasureOptions(ignore_index=-1)
    (row,) = transfer(net(), loader(TRAIN, train), loader(TEST, test), CLASSES, options=options, progress=False)
    chosen = kept & (TARGETS != 3)
    (other,) = transfer(
        net(), loader(TRAIN[kept], TARGETS[kept]), loader(TEST[chosen], TARGETS[chosen]), CLASSES, progress=False
    )
    assert row == other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"num_classes": 4}, r"targets must lie in \[0, 4\), got labels from 0 to 4"),
        ({"train": [(TRAIN, 0 * TARGETS)]}, "train must have samples of at least two classes, got 1"),
        ({"test": [(TEST, TARGETS + 1)]}, r"targets must lie in \[0, 5\), got labels from 1 to 5"),
        (
            {"train": loader(TRAIN, TARGETS % 2), "test": [(TEST, 0 * TARGETS + 3)]},
            "test must have at least one sample of a class",
        ),
        ({"test": []}, "test must yield at least one batch, got none"),
        ({"ridge": -1.0}, "ridge must be finite and at least 0"),
        ({"layers": "1"}, "layers must be a list of names, or 'blocks', got '1'"),
        ({"layers": ["7"]}, "layers must name modules of the model, got '7'"),
        ({"model": "net"}, "model must be a"),
        ({"train": [(TRAIN * torch.nan, TARGETS)]}, "finite"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    arguments = {"model": net(), "train": loader(TRAIN), "test": loader(TEST), "num_classes": CLASSES} | change
    with pytest.raises(ValueError, match=message):
        transfer(**arguments, progress=False)
