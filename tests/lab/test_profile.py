"""Profiles of the layers of runs: the flags of `measure`, the figure, and a study of the effective depth."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from helpers import error_of
from neuralcollapse.cli import main
from neuralcollapse.lab import RunConfig, RunFolder, train_runs
from neuralcollapse.lab.results.files import read_yaml
from neuralcollapse.lab.results.groups import RunGroups
from neuralcollapse.lab.results.tables import read_table
from neuralcollapse.metrics import Measurement
from neuralcollapse.metrics.figures.published import profile

SMALL = {"backbone": "mlp", "width": 24, "depth": 3, "train_samples": 300, "epochs": 3}
STUDY = """
title: effective depth of a small MLP
source: our own
figure: profile
profile: true
runs:
  mlp: {backbone: mlp, width: 24, depth: 3}
claims:
  - text: the effective depth falls
    of: mlp
    value: {kind: change, of: effective_depth}
    at_most: 0
  - text: the share of wrong nearest class means falls
    of: mlp
    value: {kind: change, of: ncc_error}
    below: 0
small:
  cost: seconds
  seeds: [0, 1]
  settings: {data: digits, train_samples: 300, epochs: 3, keep_at: [1, last], measure_at: [1, last]}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "mlp"
    train_runs(RunConfig(**SMALL, method="linear", keep_at=[1]), folder, progress=False)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> RunFolder:
    return RunFolder(shutil.copytree(trained, tmp_path / "mlp"))


def test_blocks_and_probes_of_checkpoints_are_recorded(run, capsys):
    before = read_table(run.metrics)
    assert main(["measure", str(run.path), "--layers", "blocks", "--probes"]) == 0
    train, test = (Measurement.load(run.measurement(3, split)) for split in ("train", "test"))
    assert len(train.layers) == 2
    errors = [*(values["ncc_error"] for values in test.layers.values()), test.metrics["ncc_error"]]
    assert train.profile(test).test_metrics["ncc_error"] == tuple(errors)
    table = read_table(run.metrics)
    row = table.query("epoch == 3 and split == 'test' and metric == 'probe_error'")
    assert row["value"].tolist() == [test.metrics["probe_error"]]
    accuracy = "epoch == 3 and metric == 'accuracy'"
    assert np.allclose(table.query(accuracy)["value"], before.query(accuracy)["value"])
    capsys.readouterr()
    assert main(["measure", str(run.path), "--layers", "blocks", "--probes"]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_the_figure_has_the_errors_of_each_epoch(run):
    assert main(["measure", str(run.path), "--layers", "blocks", "--probes"]) == 0
    assert main(["plot", str(run.path), "--figure", "profile", "--out", str(run.path / "drawn")]) == 0
    assert (run.path / "drawn" / "profile.png").exists()
    panels = profile(RunGroups([run]))
    axes = Figure().subplots()
    panels[0].draw(axes)
    lines = {line.get_label(): line.get_ydata() for line in axes.lines if line.get_label().startswith("epoch")}
    for epoch in (1, 3):
        expected = Measurement.load(run.measurement(epoch, "train")).profile().metrics["ncc_error"]
        assert tuple(lines[f"epoch {epoch}"]) == expected


def test_without_probes_the_figure_says_what_to_do(run):
    axes = Figure().subplots()
    with pytest.raises(ValueError, match="measure --layers blocks --probes"):
        profile(RunGroups([run]))[0].draw(axes)


def test_flags_without_effect_are_refused(run, capsys):
    assert "probes has no effect with flips" in error_of(capsys, "measure", str(run.path), "--flips", "--probes")
    assert "probes belongs to a run" in error_of(
        capsys, "measure", "--checkpoint", "a.pt", "--model", "resnet18", "--out", "o", "--probes"
    )
    assert "probes has no effect with features" in error_of(
        capsys, "measure", "--features", "a.npy", "--labels", "b.npy", "--probes"
    )


def test_a_study_measures_the_blocks_and_judges_the_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(STUDY)
    assert main(["study", "mine.yaml", "--out", "study"]) == 0
    record = read_yaml(Path("study/verdict.yaml"))
    assert [claim["measure"] for claim in record["claims"]] == [
        "last minus first train effective_depth",
        "last minus first train ncc_error",
    ]
    changes = []
    for seed in (0, 1):
        values = read_table(RunFolder(f"study/runs/mlp-seed{seed}").metrics).query("split == 'train'")
        of_metric = values[values["metric"] == "ncc_error"].sort_values("epoch")["value"].tolist()
        assert len(of_metric) == 2
        changes.append(of_metric[-1] - of_metric[0])
    assert record["claims"][1]["numbers"][0].startswith(f"mlp {np.mean(changes):.3g} ")
    assert (Path("study") / "figures" / "profile.png").exists()
