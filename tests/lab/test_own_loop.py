"""Run folders that a user's own program writes: what is refused, and the commands that read them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

import neuralcollapse as nc
from helpers import error_of
from neuralcollapse.cli import main
from neuralcollapse.lab import RunFolder
from neuralcollapse.lab.results.tables import gather, results_table


def train(path: Path, *, name: str = "mine", seed: int = 0, lr: float = 0.5, epochs: int = 4) -> RunFolder:
    torch.manual_seed(0)
    centres = 2 * torch.randn(3, 6)
    train, test = ([(centres[y] + torch.randn(60, 6), y)] for y in (torch.arange(60) % 3, torch.arange(60) % 3))
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)

    folder = RunFolder.create(path, name=name, settings={"lr": lr, "seed": seed, "data": "three clouds"})
    for epoch in range(1, epochs + 1):
        for inputs, labels in train:
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        measured = nc.measure(model, train, progress=False)
        folder.record(epoch, "train", measured)
        folder.record(epoch, "test", nc.measure(model, test, train=measured.moments, progress=False))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    for seed in (0, 1):
        train(folder / f"mine{seed}", seed=seed)
    train(folder / "slow", name="slow", lr=0.01)
    return folder


def test_statistics_and_distances_of_own_runs(runs, tmp_path):
    mine = [str(runs / name) for name in ("mine0", "mine1", "slow")]
    assert main(["distance", *mine]) == 0
    out = tmp_path / "all.csv"
    assert main(["aggregate", *mine, "--out", str(out), "--reach", "accuracy=0.9"]) == 0
    table = pd.read_csv(out)
    assert set(table["group"]) == {"mine", "slow"}
    assert set(table.query("group == 'mine' and metric == 'etf_means'")["seeds"]) == {2}
    assert set(table["epoch"]) == {1, 2, 3, 4}


@pytest.mark.parametrize("figure", ["papyan", "classes"])
def test_figures_of_own_runs(figure, runs, tmp_path, capsys):
    assert main(["plot", str(runs / "mine0"), str(runs / "slow"), "--figure", figure, "--out", str(tmp_path)]) == 0
    assert (tmp_path / f"{figure}.png").stat().st_size > 10_000
    assert "skipped" not in capsys.readouterr().err


def test_the_report_of_own_runs(runs, tmp_path):
    page = tmp_path / "page.html"
    assert main(["report", *(str(runs / name) for name in ("mine0", "mine1", "slow")), "--out", str(page)]) == 0
    text = page.read_text()
    assert "three clouds" in text
    assert "slow" in text


def test_the_table_of_comparisons_holds_own_runs(runs):
    folders = [RunFolder(runs / name) for name in ("mine0", "mine1", "slow")]
    table = results_table(gather(folders, "metrics"), gather(folders, "training_log"))
    assert table["method"].tolist() == ["mine", "slow"]
    assert "±" in table["nc1_quotient"][0]


def test_a_folder_is_created_once(tmp_path):
    folder = RunFolder.create(tmp_path / "run", name="first", settings={"seed": 1})
    assert folder.settings() == {"name": "first", "seed": 1}
    with pytest.raises(ValueError, match=r"path must be a new or empty folder, but .* has a run"):
        RunFolder.create(tmp_path / "run", name="second")
    assert RunFolder.create(tmp_path / "run", name="second", overwrite=True).settings() == {"name": "second"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="has other files"):
        RunFolder.create(tmp_path / "other", name="third", overwrite=True)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("", {}, "name must be a text, got ''"),
        (3, {}, "name must be a text, got 3"),
        ("a", {"name": "b"}, "settings must not contain 'name', which is reserved"),
        ("a", {"seed": "first"}, "settings: seed must be an integer, got 'first'"),
        ("a", {"lr": torch.tensor(0.1)}, r"settings\['lr'\] must be a plain value .*, got Tensor"),
        ("a", {"options": {"layers": [Path()]}}, r"settings\['options'\]\['layers'\] must be a plain value"),
        ("a", {"options": {1: 2}}, r"settings\['options'\] must have texts for names, got 1"),
    ],
)
def test_what_a_folder_does_not_keep_is_refused(name, settings, expected, tmp_path):
    with pytest.raises(ValueError, match=expected):
        RunFolder.create(tmp_path / "run", name=name, settings=settings)
    assert not (tmp_path / "run").exists()


def test_the_commands_that_train_and_measure_refuse_an_own_run(runs, capsys):
    mine = str(runs / "mine0")
    assert "was written by another program" in error_of(capsys, "train", "--resume", "--out", mine)
    assert "must have checkpoints to measure, but has none" in error_of(capsys, "measure", mine)
