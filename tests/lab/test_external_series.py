"""Checkpoints of an external model: one folder of a series, which the commands on run folders read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from torch import nn

from helpers import error_of, generator
from neuralcollapse import measure
from neuralcollapse.cli import main
from neuralcollapse.lab import RunFolder
from neuralcollapse.lab.data.batches import evaluation_batches
from neuralcollapse.lab.data.load import load_data
from neuralcollapse.lab.evaluate.state_dict import EvaluationSettings
from neuralcollapse.lab.results.tables import read_table

DATA = {"train_samples": 200, "test_samples": 60}
MODEL = ["--model", "external.Net", *(f"--{name}={value}" for name, value in DATA.items())]


def network(seed: int) -> nn.Sequential:
    """A network whose classes lie the further apart, the greater the seed."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1 + 0.1 * seed, generator=generator(seed))
    return model


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("external.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))\n"
    )
    for seed, name in enumerate("abcd"):
        torch.save(network(seed).state_dict(), f"{name}.pt")
    return tmp_path


def measured(*arguments: str) -> int:
    return main(["measure", *MODEL, *arguments])


def test_a_series_at_once_and_one_after_another_are_the_same_folder(place, capsys):
    at_once = ["--checkpoint=a.pt", "--checkpoint=b.pt", "--checkpoint=c.pt", "--epoch=5", "--epoch=10", "--epoch=20"]
    assert measured(*at_once, "--out", "whole") == 0
    told = capsys.readouterr().out
    assert "pixels in [0, 1] were standardised by mean 0.3" in told
    assert "of the 200 training images" in told
    assert [f"epoch {epoch}" in told for epoch in (5, 10, 20)] == [True] * 3
    for name, epoch in zip("cab", (20, 5, 10), strict=True):
        assert measured(f"--checkpoint={name}.pt", f"--epoch={epoch}", "--out", "series") == 0
    assert Path("series/metrics.csv").read_bytes() == Path("whole/metrics.csv").read_bytes()
    table = read_table(Path("series/metrics.csv"))
    images = EvaluationSettings(**DATA)
    loaders = evaluation_batches(load_data(images, progress=False), images)
    for seed, epoch in ((0, 5), (1, 10), (2, 20)):
        expected = measure(network(seed), loaders["test"], train=loaders["train"], progress=False).metrics
        found = table[(table["epoch"] == epoch) & (table["split"] == "test")].set_index("metric")["value"]
        assert found[list(expected)].to_dict() == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True)
    made = RunFolder("series").read_environment()
    assert [one["file"] for one in made["checkpoints"].values()] == ["../a.pt", "../b.pt", "../c.pt"]
    assert str(place) not in Path("series/environment.yaml").read_text()


def test_the_commands_on_run_folders_read_a_series(place, capsys):
    assert measured("--checkpoint=a.pt", "--checkpoint=b.pt", "--out", "series") == 0
    assert "epochs: 1 to 2, in the given order" in capsys.readouterr().out
    assert main(["distance", "series"]) == 0
    assert main(["report", "series", "--out", "page.html"]) == 0
    assert "external.Net" in Path("page.html").read_text()
    for figure in ("zhu", "classes"):
        assert main(["plot", "series", "--figure", figure, "--out", "figures"]) == 0
    assert main(["aggregate", "series", "--out", "all.csv", "--reach", "nc1_quotient=1e9"]) == 0
    table = pd.read_csv("all.csv")
    assert set(table["epoch"]) == {1, 2}
    assert set(table["seeds"]) <= {0, 1}  # of a value that is not defined, none
    assert pd.read_csv("all-reach.csv")["epoch"].tolist() == [1]


@pytest.mark.slow
@pytest.mark.parametrize("figure", ["papyan", "markou", "margins", "features", "overview"])
def test_a_figure_of_a_series_is_drawn(figure, place):
    assert measured("--checkpoint=a.pt", "--checkpoint=b.pt", "--out", "series") == 0
    assert main(["plot", "series", "--figure", figure, "--out", "figures"]) == 0


def test_series_of_several_seeds_are_one_group(place, capsys):
    for seed, names in enumerate(("ab", "cd")):
        files = [f"--checkpoint={name}.pt" for name in names]
        assert measured(*files, f"--seed={seed}", "--out", f"seed{seed}") == 0
        assert measured(*files, "--out", f"none{seed}") == 0
    assert main(["aggregate", "seed0", "seed1", "--out", "all.csv"]) == 0
    assert set(pd.read_csv("all.csv").query("metric == 'accuracy'")["seeds"]) == {2}
    assert "`measure --checkpoint` takes --seed" in error_of(capsys, "aggregate", "none0", "none1", "--out", "b.csv")


def test_a_folder_of_an_earlier_version_is_read(place, capsys):
    assert measured("--checkpoint=a.pt", "--epoch=3", "--out", "old") == 0
    config = Path("old/config.yaml")
    stored = yaml.safe_load(config.read_text()) | {"format": 1, "checkpoint": "a.pt", "epoch": 3}
    config.write_text(yaml.safe_dump(stored))
    assert main(["report", "old", "--out", "page.html"]) == 0
    assert main(["distance", "old"]) == 0
    message = error_of(capsys, "measure", *MODEL, "--checkpoint=b.pt", "--epoch=4", "--out=old")
    assert "was written by an earlier version" in message


def test_what_is_measured_is_left_and_what_was_stopped_is_completed(place, capsys):
    assert measured("--checkpoint=a.pt", "--epoch=1", "--out", "series") == 0
    assert measured("--checkpoint=a.pt", "--epoch=1", "--out", "series") == 0
    assert "nothing to do" in capsys.readouterr().out
    run = RunFolder("series")
    before = run.metrics.read_bytes()
    run.measurement(1, "test").unlink()
    assert measured("--checkpoint=a.pt", "--epoch=1", "--out", "series") == 0
    assert run.measurement(1, "test").exists()
    assert run.metrics.read_bytes() == before


def test_what_does_not_belong_together_is_refused(place, capsys):
    assert measured("--checkpoint=a.pt", "--epoch=1", "--out", "series") == 0
    shutil.copytree("series", "kept")
    for arguments, message in [
        (["--checkpoint=b.pt", "--epoch=1"], "epoch 1 of 'series' was measured with the checkpoint '../a.pt'"),
        (["--checkpoint=b.pt", "--epoch=2", "--pixel_mean=0.5"], "pixel_mean must stay None to resume"),
        (["--checkpoint=b.pt", "--epoch=2", "--test_samples=50"], "test_samples must stay 60"),
        (["--checkpoint=b.pt", "--epoch=2", "--classifier=3"], "classifier must stay None"),
        (["--checkpoint=b.pt", "--checkpoint=c.pt", "--epoch=2"], "epoch must be given once for each of 2"),
        (["--checkpoint=b.pt", "--checkpoint=c.pt", "--epoch=2", "--epoch=2"], "epoch must be given once for each"),
        (["--checkpoint=b.pt", "--epoch=1.5"], "epoch must be"),
        (["--checkpoint=none.pt", "--epoch=2"], "checkpoint must be a file"),
    ]:
        assert message in error_of(capsys, "measure", *MODEL, *arguments, "--out=series"), arguments
    for path in (path for path in Path("kept").rglob("*") if path.is_file() and path.name != ".lock"):
        assert (Path("series") / path.relative_to("kept")).read_bytes() == path.read_bytes()
    assert "has measurements of an external model" in error_of(capsys, "train", "--resume", "--out", "series")
    assert "must have checkpoints to measure" in error_of(capsys, "measure", "series")
    assert main(["train", "--backbone=mlp", "--width=16", "--epochs=1", "--train_samples=100", "--out=run"]) == 0
    message = error_of(capsys, "measure", *MODEL, "--checkpoint=a.pt", "--out=run")
    assert "one of measurements of an external model, but 'run' has a run" in message


def test_pixels_that_are_given_are_said(place, capsys):
    pixels = ["--pixel_mean=0.25", "--pixel_std=0.5"]
    assert measured("--checkpoint=a.pt", *pixels, "--out", "series") == 0
    told = capsys.readouterr().out
    assert "mean 0.25, as given by pixel_mean; standard deviation 0.5, as given by pixel_std" in told
    assert RunFolder("series").read_environment()["pixels"]["mean"] == [0.25]


@pytest.mark.parametrize("options", ["{colour: 1}", "{width: wide}"])
def test_options_that_a_model_of_the_laboratory_does_not_have_are_one_line(options, place, capsys):
    arguments = ["--checkpoint=a.pt", "--model=resnet18", f"--model_options={options}", "--out=new"]
    assert error_of(capsys, "measure", *arguments).startswith(options[1:].partition(":")[0])
    assert not Path("new").exists()


def test_a_damaged_checkpoint_is_refused(place, capsys):
    content = bytearray(Path("a.pt").read_bytes())
    content[len(content) // 2] ^= 1
    Path("a.pt").write_bytes(content)
    message = error_of(capsys, "measure", *MODEL, "--checkpoint=a.pt", "--out=new")
    assert "'a.pt' cannot be read: it is" in message
    assert not Path("new").exists()
