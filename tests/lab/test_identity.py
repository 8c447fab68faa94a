"""What is resumed, measured or drawn is what it says it is: this run, this epoch, this split, the same data."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from helpers import error_of
from neuralcollapse.cli import main
from neuralcollapse.lab import RunConfig, RunFolder, train_runs
from neuralcollapse.lab.results.tables import read_table

SMALL = {"backbone": "mlp", "width": 12, "depth": 1, "batch_size": 20, "schedule": "constant", "keep_at": 1}


def write_images(folder: Path) -> None:
    draw = np.random.default_rng(0)
    for split, number in (("train", 20), ("test", 10)):
        for name in "ab":
            (folder / split / name).mkdir(parents=True)
            for place in range(number):
                pixels = draw.integers(256, size=(6, 6), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{name}{place:02}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set and runs on it: one, and others that differ from it in one thing each."""
    folder = tmp_path_factory.mktemp("runs")
    write_images(folder / "data")
    for name, own in RUNS.items():
        settings = SMALL | {"data": str(folder / "data"), "width": 12, "epochs": 2} | own
        train_runs(RunConfig(**settings), folder / name, progress=False)
    return folder


RUNS: dict[str, dict[str, object]] = {
    "run": {},
    "seed": {"seed": 1},
    "lr": {"lr": 0.01},
    "loss": {"loss": "normface"},
    "method": {"method": "fixed"},
    "label_noise": {"label_noise": 0.3},
    "weight_average": {"weight_average": 0.5},
    "epochs": {"epochs": 3},
}


@pytest.fixture
def run(place, tmp_path, monkeypatch) -> RunFolder:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "data", place / "kept", dirs_exist_ok=True)
    yield RunFolder(shutil.copytree(place / "run", tmp_path / "run"))
    shutil.rmtree(place / "data")
    shutil.move(place / "kept", place / "data")


@pytest.mark.parametrize("other", [name for name in RUNS if name != "run"])
def test_a_checkpoint_of_another_run_is_not_gone_on_with(other, place, run, capsys):
    shutil.copy(RunFolder(place / other).last_checkpoint, run.last_checkpoint)
    before = run.metrics.read_bytes()
    epochs = "4" if other != "epochs" else "2"
    if other == "epochs":
        run.add_facts(finished=False)
    message = error_of(capsys, "train", "--resume", "--epochs", epochs, "--out", "run")
    assert "it is not of this run: " in message
    assert f"its {other} " in message
    assert "last.ckpt" in message
    assert run.metrics.read_bytes() == before


def test_checkpoints_that_were_exchanged_are_not_measured(place, run, capsys):
    shutil.rmtree(run.moments)
    first, second = run.checkpoint(1), run.checkpoint(2)
    first.rename("kept.ckpt")
    second.rename(first)
    Path("kept.ckpt").rename(second)
    assert main(["measure", "run"]) == 1
    told = capsys.readouterr().err
    assert "epoch0001.ckpt' cannot be measured" in told
    assert "it is of epoch 2, not 1" in told
    assert {epoch for epoch, _ in run.measured()} == {2}  # of last.ckpt
    shutil.copy(RunFolder(place / "seed").checkpoint(1), first)
    assert main(["measure", "run"]) == 1
    assert "its seed is 1, not 0" in capsys.readouterr().err


def move_a_label(data: Path) -> None:
    (data / "train" / "a" / "a00.png").rename(data / "train" / "b" / "a00.png")


def change_an_image(data: Path) -> None:
    path = data / "test" / "a" / "a03.png"
    pixels = np.asarray(Image.open(path)).copy()
    pixels[2, 2] ^= 1
    Image.fromarray(pixels).save(path)


def add_an_image(data: Path) -> None:
    pixels = np.random.default_rng(5).integers(256, size=(6, 6), dtype=np.uint8)
    Image.fromarray(pixels).save(data / "train" / "b" / "new.png")


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a label": (move_a_label, "labels of the train split"),
    "an image": (change_an_image, "images of the test split"),
    "one more": (add_an_image, "labels of the train split"),
}


@pytest.mark.parametrize("arguments", ["train --resume --epochs 3 --out run", "measure run"])
@pytest.mark.parametrize("change", CHANGES)
def test_data_that_changed_since_are_refused(change, arguments, place, run, capsys):
    change_data, expected = CHANGES[change]
    shutil.rmtree(run.moments)
    change_data(place / "data")
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file() and path.name != ".lock"}
    message = error_of(capsys, *arguments.split())
    assert f"data must be those with which the run in 'run' was started (environment.yaml): {expected}" in message
    assert {path: path.read_bytes() for path in before} == before


def test_a_comparison_is_not_gone_on_with_on_other_data(place, run, capsys):
    flags = [f"--{name}={value}" for name, value in SMALL.items()]
    compared = ["compare", f"--data={place / 'data'}", *flags, "--methods=standard,fixed", "--seeds=1", "--out=all"]
    assert main([*compared, "--epochs=1"]) == 0
    change_an_image(place / "data")
    assert "images of the test split" in error_of(capsys, "compare", "--resume", "--epochs=2", "--out=all")
    assert set(read_table(Path("all/metrics.csv"))["epoch"]) == {1}


def exchange(first: Path, second: Path) -> None:
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)


RECORDS: dict[str, tuple[Callable[[RunFolder, Path], object], str]] = {
    "epochs": (
        lambda run, _: exchange(run.measurement(1, "train"), run.measurement(2, "train")),
        "epoch 1, train split",
    ),
    "splits": (lambda run, _: exchange(run.measurement(2, "train"), run.measurement(2, "test")), "epoch 2, test split"),
    "runs": (
        lambda run, place: shutil.copy(RunFolder(place / "seed").measurement(2, "train"), run.measurement(2, "train")),
        "it belongs to another run or another model",
    ),
    "labels": (
        lambda run, place: shutil.copy(
            RunFolder(place / "label_noise").measurement(2, "train"), run.measurement(2, "train")
        ),
        "must have the labels of the run",
    ),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_records_that_are_of_something_else_are_neither_drawn_nor_read(kind, place, run, capsys):
    spoil, expected = RECORDS[kind]
    spoil(run, place)
    assert main(["distance", "run"]) in (1, 2)
    assert expected in capsys.readouterr().err
    assert main(["plot", "run", "--figure", "margins", "--out", "figures"]) == 1
    assert expected in capsys.readouterr().err
    assert expected in error_of(capsys, "report", "run", "--out", "page.html")


def test_a_record_of_something_else_is_measured_again(run, capsys):
    exchange(run.measurement(1, "train"), run.measurement(2, "train"))
    before = run.metrics.read_bytes()
    assert main(["measure", "run"]) == 0
    capsys.readouterr()
    assert main(["report", "run", "--out", "page.html"]) == 0
    pd.testing.assert_frame_equal(
        read_table(run.metrics), pd.read_csv(pd.io.common.BytesIO(before), converters={"value": float}), rtol=1e-9
    )


def test_a_checkpoint_says_whose_it_is(run):
    kept = torch.load(run.last_checkpoint, weights_only=True)["neuralcollapse"]
    assert kept["data"] == run.read_environment()["data_fingerprint"]
    assert kept["config"] == RunConfig(**run.settings()).in_force()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda run: run.environment.unlink(),
        lambda run: run.environment.write_text("- 1\n"),
        lambda run: run.environment.write_text("[\n"),
        lambda run: run.environment.write_text("finished: false\n"),
    ],
)
def test_a_run_without_its_environment_is_not_resumed(spoil, run, capsys):
    spoil(run)
    checkpoint = run.last_checkpoint.read_bytes()
    assert "environment.yaml'" in error_of(capsys, "train", "--resume", "--epochs", "3", "--out", "run")
    assert run.last_checkpoint.read_bytes() == checkpoint


def test_runs_whose_names_differ_in_what_folders_do_not_take_are_told_apart(place, tmp_path):
    for name in ("a b", "a:b", "A:B"):
        shutil.copytree(place / "data", tmp_path / name)
    settings = SMALL | {"epochs": 1, "keep_at": None}
    runs = [RunConfig(**settings, data=str(tmp_path / name)) for name in ("a b", "a:b", "A:B")]
    folder = train_runs(runs, tmp_path / "out", progress=False)
    names = [one.path.name for one in folder.run_folders()]
    assert len({name.casefold() for name in names}) == 3
    assert [one.settings()["data"] for one in folder.run_folders()] == [run.data for run in runs]
    train_runs(runs, tmp_path / "out", resume=True, progress=False)
    assert [one.path.name for one in folder.run_folders()] == names
