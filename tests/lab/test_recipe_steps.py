"""Every recipe takes two optimiser steps with its real model, image size, loss and schedule."""

from __future__ import annotations

import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from neuralcollapse.lab.config import RunConfig
from neuralcollapse.lab.data.load import load_data
from neuralcollapse.lab.recipes import load_recipe, recipe_names
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.training.run import Run

# Of the data sets that are not at hand: height and width of an image, and classes.
STAND_INS = {"cifar100": (32, 100), "stl10": (96, 10), "imagenet": (256, 1000)}


def recipe(name: str) -> dict:
    return load_recipe(name).settings


def representatives() -> list:
    """All recipes, those slow that share backbone, optimiser, head and dimension with one before."""
    seen, chosen = set(), []
    for name in recipe_names():
        settings = recipe(name)
        kind = tuple(
            settings.get(key) for key in ("backbone", "optimizer", "method", "feature_norm", "stem", "feature_decay")
        )
        chosen.append(pytest.param(name, marks=[pytest.mark.slow] if kind in seen or "resnet50" in name else []))
        seen.add(kind)
    return chosen


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of grey images of the real sizes, one of each class."""
    folders = {}
    for name, (size, classes) in STAND_INS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=classes)})
        images = [np.full((size, size, 3), shade % 256, dtype=np.uint8) for shade in range(classes)]
        table = datasets.Dataset.from_dict({"image": images, "label": range(classes)}, features=features)
        for split in ("train", "test"):
            table.to_parquet(folders[name] / f"{split}.parquet")
    return folders


class EpochEnded(Exception):
    """The first epoch has ended."""


def end_training(*_: object) -> None:
    raise EpochEnded


@pytest.mark.parametrize("name", representatives())
def test_a_recipe_takes_two_steps(name, request, tmp_path):
    settings = recipe(name)
    if settings["data"] in STAND_INS:
        folder = request.getfixturevalue("stand_ins")[settings["data"]]
    else:
        folder = request.getfixturevalue("real_data") / settings["data"]
    short = {"data": str(folder), "batch_size": 4, "train_samples": 8, "test_samples": 4}
    short["leave_out"] = ["absent-classes"]
    if settings["optimizer"] == "lbfgs":
        short["optimizer_options"] = {"history": 10, "iterations": 2}
    config = RunConfig(**settings | short)
    data = load_data(config, progress=False)
    prepared = Run(config, data)
    model, folder = prepared.trained.model, RunFolder(tmp_path / "run")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folder.start(config.in_force())
    with pytest.MonkeyPatch.context() as patch:  # an epoch of two steps
        patch.setattr(Run, "_end_epoch", end_training)
        with pytest.raises(EpochEnded):
            prepared.train(folder)
    metrics, _ = prepared.log.end()
    assert math.isfinite(metrics["batch_loss"])
    after = model.state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    for key, parameter in model.model.named_parameters():
        # L-BFGS's first steps are too small for a scale of 1 in fp32, and the whitening is fixed.
        if parameter.requires_grad and parameter.ndim > 1:
            assert not torch.equal(after[f"model.{key}"], before[f"model.{key}"]), key
    assert torch.equal(after["head.weight"], before["head.weight"]) == (config.method == "fixed")
