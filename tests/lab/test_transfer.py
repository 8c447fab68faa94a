"""The command `transfer`: accuracies on held-out classes and on other data, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import error_of
from neuralcollapse import features_of
from neuralcollapse.cli import main
from neuralcollapse.lab import RunConfig, RunFolder, train_runs
from neuralcollapse.lab.config import DataSettings
from neuralcollapse.lab.data.load import load_data
from neuralcollapse.lab.models.build import build_model
from neuralcollapse.lab.results.tables import read_table

SETTINGS = {"backbone": "mlp", "width": 24, "depth": 2, "method": "linear", "epochs": 2, "keep_at": [1]}
KNOWN = ["0", "1", "2", "3", "4"]
UNKNOWN = ["5", "6", "7", "8", "9"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "known"
    train_runs(RunConfig(**SETTINGS, hold_out_classes=UNKNOWN), folder, progress=False)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> RunFolder:
    return RunFolder(shutil.copytree(trained, tmp_path / "known"))


def accuracies(run: RunFolder, data: str, layer: str, epoch: int = 2) -> dict[str, float]:
    table = read_table(run.transfer).query("epoch == @epoch and data == @data and layer == @layer")
    return dict(zip(table["metric"], table["value"], strict=True))


def test_held_out_classes_are_probed_by_default(run, capsys):
    assert main(["transfer", str(run.path)]) == 0
    printed = capsys.readouterr().out
    config = RunConfig(**SETTINGS, hold_out_classes=UNKNOWN)
    known = load_data(config, progress=False)
    other = load_data(DataSettings(hold_out_classes=KNOWN), progress=False)
    model = build_model(config, known.image_shape, known.num_classes).eval()
    state = torch.load(run.last_checkpoint, weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()})
    extract = features_of(model)
    pixels = known.train.images.numpy() / 1.0

    def features(images: torch.Tensor) -> np.ndarray:
        inputs = torch.tensor((images.numpy() - pixels.mean()) / pixels.std(), dtype=torch.float32)
        with torch.no_grad():
            return extract(inputs).features.double().numpy()

    train, test = features(other.train.images), features(other.test.images)
    labels, targets = other.train.labels.numpy(), other.test.labels.numpy()
    solution = np.linalg.lstsq(np.c_[train, np.ones(len(train))], np.eye(5)[labels], rcond=None)[0]
    means = np.stack([train[labels == k].mean(axis=0) for k in range(5)])
    expected = {
        "linear_probe": float(((np.c_[test, np.ones(len(test))] @ solution).argmax(1) == targets).mean()),
        "nearest_class_mean": float((np.linalg.norm(test[:, None] - means, axis=2).argmin(1) == targets).mean()),
    }
    name = "digits without 0,1,2,3,4"
    assert accuracies(run, name, "features") == pytest.approx(expected, abs=0.5 / len(targets))
    assert f"on {name}" in printed
    assert f"{accuracies(run, name, 'features')['linear_probe']:.2%}" in printed
    assert len(read_table(run.transfer)) == 4  # one block besides the features
    assert len(list(run.figures.glob("transfer-*.png"))) == 1


def test_other_data_epochs_and_layers_add_rows(run, tmp_path):
    command = ["transfer", str(run.path), "--data", "digits", "--epochs", "all", "--out", str(tmp_path / "drawn")]
    assert main([*command, "--layers", "model.0.layers.1", "--ridge", "10"]) == 0
    table = read_table(run.transfer)
    assert set(table["epoch"]) == {1, 2}
    assert set(table["layer"]) == {"model.model.0.layers.1", "features"}
    assert accuracies(run, "digits", "features")["linear_probe"] > 0.3
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 2
    assert main([*command, "--layers", "features"]) == 0
    again = read_table(run.transfer)
    assert len(again) == len(table)  # rows of the same epoch, data and layer are replaced
    assert not again.equals(table)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ridge", "-1"], "ridge must be finite and at least 0, got -1"),
        (["--epochs", "7"], "epochs must have a checkpoint"),
        (["--layers", "model.9"], "layers must name modules of the model, got 'model.model.9'"),
        (["--train_samples", "100"], "data must be given with train_samples"),
        (["--data", "no-such-data"], "no-such-data"),
        (["--data", "features", "--data_options", "{}"], "data_options"),
    ],
)
def test_wrong_flags_are_refused_and_nothing_is_written(run, capsys, flags, message):
    assert message in error_of(capsys, "transfer", str(run.path), *flags)
    assert not run.transfer.exists()


def test_images_of_another_shape_are_refused(run, tmp_path, capsys):
    from PIL import Image

    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("a", "b"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(3):
                Image.fromarray(random.integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    images = ["--data", str(tmp_path / "images")]
    message = error_of(capsys, "transfer", str(run.path), *images)
    assert "data must have images of 1x8x8 like the run, got 3x9x9: --image_size 8 --channels 1" in message
    assert main(["transfer", str(run.path), *images, "--image_size", "8", "--channels", "1"]) == 0
    assert accuracies(run, "images", "features").keys() == {"linear_probe", "nearest_class_mean"}


def test_a_run_that_held_out_nothing_needs_data(tmp_path, capsys):
    train_runs(RunConfig(**SETTINGS | {"epochs": 1, "train_samples": 100}), tmp_path / "all", progress=False)
    assert "data must be given: the run held out no classes" in error_of(capsys, "transfer", str(tmp_path / "all"))
    assert main(["transfer", str(tmp_path / "all"), "--data", "digits", "--layers", "features"]) == 0
