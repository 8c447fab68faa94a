"""Methods times losses: rates chosen on a validation split, and how soon each is where standard ends."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from scipy.stats import ttest_rel

from helpers import error_of
from neuralcollapse import ClassMeanClassifier, FixedETFClassifier, LearnedClassifier, NearestETFClassifier
from neuralcollapse.cli import main
from neuralcollapse.heads import TrustRegion
from neuralcollapse.lab.config import RunConfig
from neuralcollapse.lab.experiments import Comparison, comparison_of, comparison_runs
from neuralcollapse.lab.models.build import build_head
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.labels import label_of, tell_apart
from neuralcollapse.lab.results.tables import baseline_table, read_table
from neuralcollapse.lab.training.runs import train_runs
from neuralcollapse.lab.training.tuning import with_chosen_rates

SMALL = ["--backbone=mlp", "--width=24", "--depth=1", "--train_samples=300", "--test_samples=100", "--batch_size=50"]
TUNED = ["--methods=standard,means", "--losses=cross-entropy,two-way", "--lr=auto", "--lr_candidates=1e-3,0.1,1e30"]


def compare(out: Path, *arguments: str) -> int:
    return main(["compare", *SMALL, "--out", str(out), *arguments])


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tuned"
    flags = ["--feature_norm=none", "--no-unit_weight", "--seeds=1", "--epochs=2"]
    assert compare(out, *TUNED, *flags) == 0
    return out


def test_every_method_is_trained_with_every_loss(tuned):
    names = {"standard-cross-entropy", "standard-two-way", "means-cross-entropy", "means-two-way"}
    assert {path.name for path in (tuned / "runs").iterdir()} == {f"{name}-seed0" for name in names}
    stored = yaml.safe_load((tuned / "runs" / "means-two-way-seed0" / "config.yaml").read_text())
    assert (stored["method"], stored["loss"], stored["temperature"], stored["margin"]) == (
        "means",
        "two-way",
        0.1,
        "inf",
    )
    assert "classifier_bias" not in stored
    metrics = pd.read_csv(tuned / "metrics.csv")
    assert set(metrics["method"]) == {name.replace("-", " ", 1) for name in names}


def test_the_folder_knows_its_runs_and_data(tuned):
    made = RunFolder(tuned).read_environment()
    names = ["standard-cross-entropy", "standard-two-way", "means-cross-entropy", "means-two-way"]
    assert made["runs"] == [f"{name}-seed0" for name in names]
    assert (made["num_classes"], made["finished"]) == (10, True)


def test_each_has_the_rate_that_is_best_on_images_held_out_of_the_training_set(tuned):
    rates = {}
    for place in RunFolder(tuned / "tuning").run_folders():
        settings = place.settings()
        assert (settings["validation_share"], settings["seed"]) == (0.2, 1)
        if settings["lr"] < 1:  # at 1e30 it diverges and is left out
            table = read_table(place.metrics).query("split == 'validation' and metric == 'accuracy'")
            assert list(table["epoch"]) == [1, 2]
            key = (settings["method"], settings["loss"])
            rates.setdefault(key, []).append((table["value"].iloc[-1], table["value"].mean(), settings["lr"]))
    assert all(len(found) == 2 for found in rates.values())
    for place in RunFolder(tuned).run_folders():
        settings = place.settings()
        assert settings["lr"] == max(rates[settings["method"], settings["loss"]])[2]
        assert "validation_share" not in settings
        assert set(read_table(place.metrics)["split"]) == {"train", "test"}
    rows = [line for line in (tuned / "summary.md").read_text().split("\n") if line.startswith("| means two-way")]
    assert "| 0.1 " in rows[0]


def test_rates_are_not_chosen_again_on_resuming(tuned, capsys):
    folder = RunFolder(tuned)
    kept = [place.checkpoints for place in RunFolder(folder.tuning).run_folders() if place.last_checkpoint.exists()]
    before = [path.stat().st_mtime_ns for path in kept]
    base = folder.settings()
    comparison = comparison_of(base)
    with folder.writing(base, resume=True):
        chosen = with_chosen_rates(comparison_runs(comparison, {}, base), comparison, folder, resume=True)
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert [run.in_force() for run in chosen] == [place.settings() for place in folder.run_folders()]
    flags = ["compare", "--resume", "--out", str(tuned), "--lr_candidates=0.1,0.2"]
    assert "lr_candidates must stay [0.001, 0.1, 1e+30] to resume" in error_of(capsys, *flags)


def test_the_config_runs_the_whole_again(tuned, capsys):
    assert main(["compare", "--config", str(tuned / "config.yaml"), "--print_config"]) == 0
    again, stored = yaml.safe_load(capsys.readouterr().out), yaml.safe_load((tuned / "config.yaml").read_text())
    assert again == {name: value for name, value in stored.items() if name != "format"}
    assert (again["lr"], again["losses"]) == ("auto", ["cross-entropy", "two-way"])


def test_a_method_that_trains_at_no_candidate_is_named(tmp_path, capsys):
    flags = ["--lr=auto", "--lr_candidates=1e30,1e31", "--feature_norm=none", "--no-unit_weight", "--epochs=1"]
    line = error_of(capsys, "compare", *SMALL, *flags, "--methods=standard", "--out", str(tmp_path / "out"))
    assert line == ("lr_candidates must have one at which standard trains with cross-entropy, got [1e+30, 1e+31]")


def test_nothing_is_written_where_a_setting_is_wrong(tmp_path, capsys):
    flags = [*SMALL, *TUNED, "--out", str(tmp_path / "out")]
    assert "crop_size" in error_of(capsys, "compare", *flags, "--crop_size=99")
    assert "lr must be a number, got 'auto'" in error_of(
        capsys, "train", "--lr", "auto", "--out", str(tmp_path / "out")
    )
    assert not (tmp_path / "out").exists()


def test_weight_averages_are_compared_with_what_has_none_at_its_own_rate():
    losses, shares = ["cross-entropy", "nonl"], [0, 0.1]
    runs = comparison_runs(Comparison(methods=["standard"], losses=losses, weight_averages=shares, seeds=1), {})
    rates = {(loss, share or None): 0.1 * number for number, (loss, share) in enumerate(product(losses, shares), 1)}
    runs = [run.replace(lr=rates[run.loss, run.weight_average]) for run in runs]
    labels = [label_of(telling) for telling in tell_apart([run.in_force() for run in runs])]
    assert labels == [
        *("standard cross-entropy", "standard cross-entropy weight_average=0.1"),
        *("standard nonl", "standard nonl weight_average=0.1"),
    ]


def test_the_printed_tables_fit_and_say_how_soon(tuned):
    lines = (tuned / "summary.md").read_text().split("\n")
    start = next(number for number, line in enumerate(lines) if line.startswith("Epochs until"))
    table = [line for line in lines[start:] if line.startswith("|")]
    assert [cell.strip() for cell in table[0].strip("|").split("|")] == [
        *("method", "to acc", "to nc1", "to nc2", "to nc3", "mean acc %", "last acc %", "- standard")
    ]
    assert len(table) == 2 + 4
    assert max(map(len, lines[start : start + 10])) <= 120


def made_up(method: str, seed: int, accuracy: list[float], nc1: list[float]) -> pd.DataFrame:
    """Measured after epochs 1, 5 and 10."""
    values = {"accuracy": accuracy, "nc1_quotient": nc1, "nc2_etf_means": nc1, "nc3_duality": nc1}
    rows = [
        (method, seed, epoch, "test", name, value)
        for name, found in values.items()
        for epoch, value in zip((1, 5, 10), found, strict=True)
    ]
    return pd.DataFrame(rows, columns=["method", "seed", "epoch", "split", "metric", "value"])


def test_the_first_measured_epoch_at_least_as_good_as_the_end_of_standard():
    metrics = pd.concat(
        [
            made_up("standard", 0, [0.5, 0.7, 0.9], [1.0, 0.5, 0.2]),
            made_up("standard", 1, [0.5, 0.82, 0.8], [1.0, 0.5, 0.3]),
            made_up("means", 0, [0.9, 0.8, 0.91], [0.5, 0.3, 0.25]),
            made_up("means", 1, [0.7, 0.8, 0.85], [0.29, 0.3, 0.31]),
            made_up("linear", 0, [0.1, 0.1, 0.1], [2.0, 2.0, 2.0]),
            made_up("linear", 1, [0.1, 0.1, 0.1], [2.0, 2.0, 2.0]),
        ]
    )
    table = baseline_table(metrics).set_index("method")
    assert table.loc["standard", ["to acc", "to nc1", "- standard"]].tolist() == ["7.5", "10.0", ""]
    assert table.loc["means", ["to acc", "to nc1", "to nc3"]].tolist() == ["3.0", "1.0 (1/2)", "1.0 (1/2)"]
    assert table.loc["linear", ["to acc", "to nc2"]].tolist() == ["never", "never"]
    assert table.loc["means", "mean acc %"] == "82.7 ± 6.1"
    interval = ttest_rel([91, 85], [90, 80]).confidence_interval(0.95)
    half = (interval.high - interval.low) / 2
    assert table.loc["means", "- standard"] == f"+3.00 ± {half:.2f}"
    assert baseline_table(metrics[metrics["method"] != "standard"]) is None
    assert baseline_table(metrics[metrics["method"] == "standard"]) is None


@pytest.mark.parametrize(
    ("settings", "kind", "norm"),
    [
        ({"method": "linear"}, LearnedClassifier, None),
        ({"method": "means", "class_means": "current"}, ClassMeanClassifier, 3.0),
        ({"method": "softmax-code"}, FixedETFClassifier, 3.0),
        ({"method": "trust-region"}, NearestETFClassifier, 3.0),
    ],
)
def test_the_head_of_a_method_has_the_settings(settings, kind, norm):
    config = RunConfig(**settings, **({} if norm is None else {"feature_norm": norm}))
    head = build_head(config, 24, 10)
    assert type(head) is kind
    assert head.feature_norm == norm
    assert getattr(head, "means", "current") == "current"
    if kind is NearestETFClassifier:
        assert head.solver == TrustRegion()
    if kind is LearnedClassifier:
        assert head.bias.requires_grad
        assert not torch.allclose(head.weight.norm(dim=1), torch.ones(10), atol=1e-3)
    assert build_head(RunConfig(**settings, loss="nonl"), 24, 10).bias is None


def test_codes_of_more_classes_than_any_etf_has_and_the_published_solver_train_digits(tmp_path):
    """K = 10 in d = 5 has no simplex ETF."""
    shared = {"backbone": "mlp", "width": 24, "depth": 1, "train_samples": 300, "test_samples": 100, "batch_size": 50}
    for method, losses, dim in (
        ("softmax-code", ["cross-entropy", "nonl"], 5),
        ("trust-region", None, 24),
    ):
        comparison = Comparison(methods=[method], losses=losses, seeds=1, lr=0.1)
        runs = comparison_runs(comparison, shared | {"epochs": 3, "feature_dim": dim, "lr": 0.1})
        for place in train_runs(runs, tmp_path / method, progress=False).run_folders():
            accuracy = read_table(place.metrics).query("metric == 'accuracy' and split == 'test'")["value"]
            assert accuracy.max() > 0.3  # three times chance: five features of a ReLU point at half of the code alone
