from __future__ import annotations

from itertools import pairwise

import pandas as pd
import pytest
import yaml

from helpers import error_of
from neuralcollapse.cli import main
from neuralcollapse.lab.ufm.compare import UFMRun, least_loss, loss_after, measurement_points, train_run
from neuralcollapse.ufm import global_optimum

SMALL = ["--classes", "3,5", "--seeds", "2", "--feature_dim", "6", "--samples_per_class", "4", "--iterations", "6"]
FEW = ["--tuning_iterations", "4", "--sgd_rates", "0.01,0.1", "--agd_gains", "10"]


def values(rows, metric):
    return [row["value"] for row in rows if row["metric"] == metric]


def test_ufm_trains_all_combinations_and_prints_the_files_written(tmp_path, capsys):
    out = tmp_path / "ufm"
    assert main(["ufm", *SMALL, *FEW, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for written in ("summary.md", "figures/ufm3.png", "figures/ufm5.png", "metrics.csv", "tuning.csv", "config.yaml"):
        assert (out / written).stat().st_size > 0
        assert str(out / written) in printed
    metrics = pd.read_csv(out / "metrics.csv")
    assert list(metrics) == ["classes", "optimizer", "method", "seed", "rate", "iteration", "metric", "value"]
    runs = metrics.groupby(["classes", "optimizer", "method", "seed"])["iteration"].max()
    assert len(runs) == 2 * 2 * 3 * 2
    assert set(runs) == {6}
    tuning = pd.read_csv(out / "tuning.csv")
    assert (tuning.groupby(["classes", "optimizer", "method"])["chosen"].sum() == 1).all()
    of_sgd = tuning[tuning["optimizer"] == "sgd"]
    best = of_sgd.loc[of_sgd.groupby(["classes", "method"])["excess_loss"].idxmin()]
    assert best["chosen"].all()
    assert sum(line.startswith("| UFM-5 ") for line in printed.split("\n")) == 6


def test_ufm_resumes_with_the_same_result(tmp_path, capsys):
    out, few = tmp_path / "ufm", ["ufm", *SMALL[2:], "--classes", "3", *FEW, "--methods", "fixed,implicit"]
    assert main([*few, "--out", str(out)]) == 0
    whole = pd.read_csv(out / "metrics.csv")
    kept, lost = out / "runs" / "ufm3-sgd-fixed-seed0.csv", out / "runs" / "ufm3-agd-implicit-seed1.csv"
    lost.unlink()
    before = kept.stat().st_mtime_ns
    assert main([*few, "--out", str(out), "--resume"]) == 0
    assert kept.stat().st_mtime_ns == before
    again = pd.read_csv(out / "metrics.csv")
    timed = whole["metric"] == "seconds"
    pd.testing.assert_frame_equal(whole[~timed], again[~timed])
    assert "--resume resumes it" in error_of(capsys, *few, "--out", str(out))
    assert "seeds must stay 2" in error_of(capsys, *few, "--out", str(out), "--seeds", "3", "--resume")


@pytest.mark.parametrize("optimizer", ["sgd", "agd"])
def test_runs_of_a_seed_start_from_the_same_features_and_end_near_the_least_loss(optimizer):
    rate = {"sgd": 0.1, "agd": 10.0}[optimizer]
    started = []
    for method in ("standard", "fixed", "implicit"):
        run = UFMRun(method, optimizer, 4, 5, 8, 2.0, seed=3)
        rows = train_run(run, rate, 150, {0, 150})
        started.append(values(rows, "nc1_quotient")[0])
        assert -1e-6 < values(rows, "excess_loss")[-1] < 0.01
        assert values(rows, "nc2_etf_means")[-1] < 0.1
        assert values(rows, "loss")[-1] == pytest.approx(values(rows, "excess_loss")[-1] + least_loss(run))
    assert len({round(value, 5) for value in started}) == 1


def test_the_least_loss_is_that_of_the_closed_form_at_the_same_norms():
    """The margin of unit rows and features of norm τ is τ K/(K−1); a global optimum's loss is that of its margin."""
    optimum = global_optimum(5, 3, 0.01, 0.01)
    run = UFMRun("fixed", "sgd", 5, 3, 8, optimum.margin * 4 / 5, 0)
    decay = 0.01 * optimum.weight_norm_squared
    assert least_loss(run) == pytest.approx(optimum.loss - decay, rel=1e-12)


def test_a_rate_at_which_training_diverges_is_not_chosen():
    run = UFMRun("standard", "sgd", 4, 5, 8, 1e30, seed=0)
    assert loss_after(run, 1e30, 5) == float("inf")


def test_measurements_are_evenly_spaced_in_their_logarithm():
    points = sorted(measurement_points(1000, 10))
    assert points[0] == 1
    assert points[-1] == 1000
    assert all(later / earlier <= 1.3 for earlier, later in pairwise(points) if earlier >= 10)


def test_landscape_classifies_its_points(tmp_path, capsys):
    out = tmp_path / "landscape"
    arguments = ["landscape", "--num_classes", "4", "--samples_per_class", "2", "--starts", "3", "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for written in ("summary.md", "figures/landscape.png", "points.csv", "spectrum.csv", "slices.csv", "config.yaml"):
        assert (out / written).stat().st_size > 0
        assert str(out / written) in printed
    points = pd.read_csv(out / "points.csv").set_index("name")
    assert list(points["kind"]) == ["global optimum"] * 3 + ["strict saddle", "global optimum"] * 2
    optimum = global_optimum(4, 2, 0.01, 0.01).loss
    assert points.loc["from 2 groups", "objective"] == pytest.approx(optimum, rel=1e-10)
    slices = pd.read_csv(out / "slices.csv")
    for name, along in slices.groupby("name"):
        at_saddle = along.loc[along["step"].abs().idxmin(), "objective"]
        assert at_saddle == pytest.approx(points.loc[name, "objective"])
        assert along["objective"].min() < at_saddle
    spectrum = pd.read_csv(out / "spectrum.csv").groupby("name")["eigenvalue"].min()
    assert spectrum["origin"] < 0
    assert spectrum["the optimum"] > -1e-8


def test_config_shown_is_the_one_in_force(capsys):
    assert main(["ufm", "--classes", "10", "--print_config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["classes"], shown["methods"]) == ([10], ["standard", "fixed", "implicit"])
    assert main(["landscape", "--starts", "2", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["starts"] == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("ufm --classes 1", "classes must be at least 2, got [1]"),
        ("ufm --classes 10,10", "classes must contain at least one value, all distinct"),
        ("ufm --methods best", "methods must be a list, each item one of standard, fixed, implicit"),
        ("ufm --optimizers sgd,lion", "optimizers must be a list, each item one of sgd, agd"),
        ("ufm --seeds 0", "seeds must be at least 1, got 0"),
        ("ufm --classes 10,100 --feature_dim 50", "feature_dim must be at least K - 1 = 99, got 50"),
        ("ufm --feature_norm -1", "feature_norm must be above 0, got -1"),
        ("ufm --sgd_rates 0.1,0", "sgd_rates must be above 0"),
        ("ufm --colour red", "unrecognized arguments: --colour red"),
        ("landscape --num_classes 1", "num_classes must be at least 2, got 1"),
        ("landscape --weight_decay 0", "weight_decay must be above 0, got 0"),
        ("landscape --feature_dim 3", "feature_dim must be at least num_classes - 1 = 5, got 3"),
        ("landscape --weight_decay 0.5 --feature_decay 0.5", "the origin is the only critical point"),
        ("landscape --resume", "resume must not be given"),
    ],
)
def test_a_mistake_in_a_flag_is_one_line_and_writes_nothing(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert expected in error_of(capsys, *arguments.split())
    assert list(tmp_path.iterdir()) == []
