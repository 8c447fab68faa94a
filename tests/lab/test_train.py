"""The commands `neuralcollapse train` and `neuralcollapse recipes`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import yaml

from helpers import error_of
from neuralcollapse import Measurement
from neuralcollapse.cli import main
from neuralcollapse.lab import RunFolder
from neuralcollapse.lab.recipes import load_recipe, recipe_names
from neuralcollapse.lab.results import files
from neuralcollapse.lab.training import run as training

SMALL = ["--backbone=mlp", "--width=24", "--depth=1", "--train_samples=200", "--test_samples=60", "--batch_size=50"]


def train(out: Path, *arguments: str) -> int:
    return main(["train", *SMALL, "--out", str(out), *arguments])


def read(out: Path) -> pd.DataFrame:
    return pd.read_csv(out / "metrics.csv", converters={"value": float})


def shown_config(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["train", *arguments, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.usefixtures("with_figures")
def test_a_run_writes_its_folder_and_says_so(tmp_path, capsys):
    out = tmp_path / "out"
    assert train(out, "--method", "fixed", "--epochs", "3", "--keep_at", "2") == 0
    printed = capsys.readouterr().out
    assert list(read(out).columns) == ["epoch", "split", "metric", "value"]
    assert read(out)["epoch"].unique().tolist() == [1, 2, 3]
    accuracy = read(out).query("epoch == 3 and split == 'test' and metric == 'accuracy'")["value"].item()
    assert f"| {accuracy:.2%}" in next(line for line in printed.split("\n") if line.startswith("| fixed"))
    names = (
        "summary.md",
        "report.html",
        "metrics.csv",
        "training.csv",
        "gradients.csv",
        "config.yaml",
        "figures/nc1.png",
    )
    for name in (*names, "checkpoints/last.ckpt", "checkpoints/epoch0002.ckpt"):
        assert (out / name).exists()
    for name in names:
        assert str(out / name) in printed
    assert "neuralcollapse train --config config.yaml" in (out / "summary.md").read_text()


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["--optimizer=adam", "--schedule=one-cycle", "--sampling=stratified", "--augmentation={crop_padding: 1}"],
        ["--optimizer=lbfgs", "--method=fixed", "--optimizer_options={iterations: 4}"],
        pytest.param(
            [
                "--optimizer=agd",
                "--optimizer_options={gain: 1}",
                "--backbone_options={batch_norm_affine: false}",
                "--workers=1",
            ],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_goes_on_where_it_stopped_and_runs_again_from_its_config(settings, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    assert train(out, "--epochs", "3", "--keep_at", "1", *settings) == 0
    whole = {name: (out / name).read_bytes() for name in ("metrics.csv", "gradients.csv")}
    (out / "checkpoints" / "epoch0001.ckpt").replace(out / "checkpoints" / "last.ckpt")
    for name in whole:
        (out / name).unlink()
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert main(["train", "--config", str(out / "config.yaml"), "--out", str(again)]) == 0
    for name, content in whole.items():
        assert (out / name).read_bytes() == content
        assert (again / name).read_bytes() == content


def test_a_run_checks_its_folder_and_builds_its_model_once(tmp_path, monkeypatch):
    counts: Counter[str] = Counter()

    def count(owner: object, name: str) -> None:
        function = getattr(owner, name)

        def counted(*arguments: object, **options: object) -> object:
            counts[name] += 1
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)

    count(RunFolder, "check")
    count(training, "build_model")
    count(files, "load_yaml")
    count(files, "sha256")
    assert train(tmp_path / "out", "--epochs", "2") == 0
    assert counts == {"check": 1, "build_model": 1}  # what it writes as YAML, it need not read again


def test_random_labels_are_memorised_kept_and_used_again(tmp_path):
    out = tmp_path / "out"
    plain = ["--method=standard", "--feature_norm=none", "--unit_weight=false", "--weight_decay=0"]
    settings = [*plain, "--label_noise=permuted", "--width=256", "--epochs=20", "--measure_at=20"]
    assert train(out, *settings) == 0
    kept = pd.read_csv(out / "train_labels.csv")
    assert list(kept.columns) == ["image", "label"]
    assert len(kept) == 200
    last = read(out).query("epoch == 20 and metric == 'accuracy'").set_index("split")["value"]
    assert last["train"] > 0.9
    assert last["test"] < 0.4
    # A resumed run trains on the labels that it was begun with: others are refused.
    changed = kept.assign(label=(kept["label"] + 1) % 10)
    changed.to_csv(out / "train_labels.csv", index=False)
    for name in ("checkpoints/last.ckpt", "summary.md"):
        (out / name).unlink()
    assert main(["train", "--out", str(out), "--resume"]) == 2
    assert main(["train", "--out", str(out), "--resume"]) == 2
    assert pd.read_csv(out / "train_labels.csv").equals(changed)
    kept.to_csv(out / "train_labels.csv", index=False)
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert pd.read_csv(out / "train_labels.csv").equals(kept)
    assert not read(out).query("epoch == 20 and metric == 'nc1_quotient'")["value"].empty


def test_a_run_without_some_classes_says_so_and_resumes(tmp_path, capsys):
    out = RunFolder(tmp_path / "out")
    arguments = ["--hold_out_classes", "8,9", "--schedule", "constant"]
    assert train(out.path, *arguments, "--epochs", "1") == 0
    made = out.read_environment()
    assert made["num_classes"] == 8
    assert made["data"] == "digits: 200 train and 60 test images 1×8×8, 8 classes"
    assert "classes 8, 9" in made["data_notes"][0]
    assert made["data_fingerprint"].keys() == {"train", "test", "held_out"}
    record = Measurement.load(out.measurement(1, "test"))
    assert (record.num_classes, int(record.moments.counts.sum())) == (8, 60)
    assert main(["train", "--config", str(out.config), "--resume", "--epochs", "2", "--out", str(out.path)]) == 0
    assert "hold_out_classes must stay ['8', '9'] to resume the run" in error_of(
        capsys, "train", "--config", str(out.config), "--resume", "--hold_out_classes", "8", "--out", str(out.path)
    )


def test_a_recipe_gives_the_settings_and_flags_go_over_it(capsys, tmp_path):
    shown = shown_config(capsys, "--recipe", "zhu2021-mnist-sgd", "--epochs", "7")
    stored = load_recipe("zhu2021-mnist-sgd").settings
    assert shown["epochs"] == 7
    resolved = stored | {"epochs": 7, "schedule_options": {"warmup_epochs": 0, "step_at": 40, "lr_factor": 0.1}}
    assert {key: shown[key] for key in stored} == resolved
    mine = tmp_path / "mine.yaml"
    mine.write_text("lr: 0.123\nwidth: 5\n")
    shown = shown_config(capsys, "--recipe", "zhu2021-mnist-sgd", "--config", str(mine), "--width", "6")
    assert (shown["lr"], shown["width"], shown["schedule_options"]["step_at"]) == (0.123, 6, 40)


def test_a_file_of_settings_may_name_a_recipe(capsys, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("recipe: zhu2021-mnist-adam\nepochs: 3\n")
    shown = shown_config(capsys, "--config", str(mine), "--width", "6")
    assert (shown["recipe"], shown["optimizer"], shown["epochs"], shown["width"]) == (
        "zhu2021-mnist-adam",
        "adam",
        3,
        6,
    )


def test_a_run_goes_on_with_its_own_recipe_only(tmp_path, capsys, real_data):
    out = str(tmp_path / "out")
    settings = ["--data", str(real_data / "mnist"), *SMALL, "--epochs", "1"]
    assert main(["train", "--recipe", "zhu2021-mnist-sgd", "--out", out, *settings]) == 0
    assert "is finished" in error_of(capsys, "train", "--recipe", "zhu2021-mnist-sgd", "--out", out, "--resume")
    message = error_of(capsys, "train", "--recipe", "zhu2021-mnist-adam", "--out", out, "--resume")
    assert "recipe must stay 'zhu2021-mnist-sgd' to resume the run" in message


def test_a_damaged_file_of_a_run_is_named(tmp_path, capsys):
    out = tmp_path / "out"
    assert train(out, "--epochs", "1", "--label_noise", "0.1") == 0
    (out / "summary.md").unlink()
    (out / "train_labels.csv").write_text("image,name\n0,a\n")
    assert "train_labels.csv' must contain the training labels" in error_of(
        capsys, "train", "--out", str(out), "--resume"
    )
    (out / "config.yaml").write_text("")
    assert "config.yaml' must be the settings of a run" in error_of(capsys, "train", "--out", str(out), "--resume")


def test_a_recipe_trains_on_another_folder(tmp_path, monkeypatch, real_data, capsys):
    monkeypatch.chdir(tmp_path)
    short = ["--train_samples=60", "--test_samples=40", "--epochs=1", "--width=4", "--batch_size=20"]
    arguments = ["train", "--recipe", "markou2024-mnist-implicit", "--data", str(real_data / "mnist"), *short]
    assert main(arguments) == 0
    assert "runs/markou2024-mnist-implicit/summary.md" in capsys.readouterr().out
    assert "is finished" in error_of(capsys, *arguments, "--resume")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--recipe", "zhu2021-mnist-sdg"], "zhu2021-mnist-sgd"),
        (["--optimizer", "agd", "--method", "standard"], "agd has no rule for biases"),
        (
            ["--optimizer", "agd", "--lr", "9"],
            "lr belongs to optimizer sgd, adam, adamw or lbfgs; here optimizer is agd",
        ),
        (["--stem", "3x3"], "stem belongs to backbone resnet18, resnet34, resnet50"),
        (
            ["--loss", "mse", "--label_smoothing", "0"],
            "label_smoothing belongs to loss cross-entropy; here loss is mse",
        ),
        (["--method", "fixed", "--proximal_weight", "1"], "proximal_weight belongs to method implicit"),
        (["--learning_rat", "1"], "unrecognized arguments: --learning_rat 1; nearest: --"),
        (["--optimizer", "lbfgs"], "optimizer lbfgs cannot train method implicit"),
        (["--feature_dim", "8"], "must be at least num_classes - 1 = 9, got 8"),
        (["--device", "cuda"], "device must be auto or an available device"),
        (["--recip", "zhu2021-mnist-sgd"], "unrecognized arguments: --recip"),
        (["--seed", "1" + "0" * 30], "seed must be at most"),
        (["--data="], "data must name a data set or a folder"),
        (["--method", "explicit"], "method must be one of standard, fixed, implicit"),
        (["--classifier_bias", "learned"], "classifier_bias must be centring or none for method implicit"),
        (["--data", "./missing"], "'./missing' is not a folder"),
        (["--loggers", "wandb,paper"], "loggers must be a list, each item one of tensorboard, wandb, got"),
    ],
)
def test_what_does_not_fit_together_is_one_line_and_writes_nothing(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert expected in error_of(capsys, "train", *SMALL, *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("colour: red\n", "colour"),
        ("epochs: many\n", "epochs"),
        ("epochs: 0\n", "epochs must be at least 1, got 0"),
        ("schedule: step\nschedule_options: {step_at: [a]}\n", "schedule_options.step_at must be"),
        ("step_at: 3\n", "step_at"),
        ("a: [\n", "Problems parsing config"),
    ],
)
def test_a_field_that_does_not_exist_or_is_of_another_type(text, expected, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(text)
    out = tmp_path / "out"
    assert expected in error_of(capsys, "train", "--config", str(tmp_path / "mine.yaml"), "--out", str(out))
    assert not out.exists()


def test_the_recipes_are_listed_and_shown(capsys):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    for name in recipe_names():
        assert any(name in line.split() for line in listed.split("\n")), name
    assert main(["recipes", "papyan2020-cifar10"]) == 0
    assert capsys.readouterr().out.strip() == load_recipe("papyan2020-cifar10").text
    assert "papyan2020-cifar10" in error_of(capsys, "recipes", "papyan2020-cifar1")
