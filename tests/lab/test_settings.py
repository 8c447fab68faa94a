"""A setting is in force or refused: never accepted without effect."""

from __future__ import annotations

import inspect
import math
import re
from functools import cache
from itertools import product

import pytest
import yaml

from helpers import error_of
from neuralcollapse import losses
from neuralcollapse.cli import main
from neuralcollapse.heads import ClassMeanClassifier, FixedFrameClassifier, NearestFrameClassifier
from neuralcollapse.lab import experiments
from neuralcollapse.lab.config import BackboneOptions, RunConfig, ScheduleOptions
from neuralcollapse.lab.experiments import Comparison, comparison_runs, single_run
from neuralcollapse.lab.results.labels import common_settings

OPTIMIZERS = ("sgd", "adam", "adamw", "lbfgs", "agd")
LOSSES = ("cross-entropy", "mse", "dot-regression-published")
BACKBONES = ("convnet", "mlp", "resnet18", "vgg13", "vit-tiny", "package.module.Class")
METHODS = ("standard", "fixed", "implicit")
FURTHER_METHODS = ("linear", "means", "frame", "softmax-code", "trust-region")
ATTRIBUTE_METHODS = ("attribute-frame", "fixed-frame")
CHOICES = (OPTIMIZERS, LOSSES, BACKBONES, METHODS)
SCHEDULES = ("constant", "cosine", "step", "one-cycle")
# Of each setting, or of an option of a setting, a value that is not its default.
OTHER = {
    "recipe": "papyan2020-cifar10",
    "seed": 5,
    "data_options": {"train_split": "training"},
    "leave_out": ["absent-classes"],
    "hold_out_classes": ["3", "4"],
    "image_size": 9,
    "channels": 3,
    "digits_per_image": 2,
    "train_samples": 70,
    "test_samples": 30,
    "samples_per_class": 4,
    "imbalance": {"step": 0.3},
    "validation_share": 0.25,
    "label_noise": "permuted",
    "data_seed": 8,
    "workers": 3,
    "batch_size": 32,
    "sampling": "stratified",
    "augmentation": {"crop_padding": 2, "flip": True, "rotation": 4.0},
    "crop_size": 5,
    "pixel_mean": [0.4],
    "pixel_std": [0.2],
    "backbone_options.batch_norm_affine": False,
    "backbone_options.initialisation": "torch",
    "backbone_options.patch_size": 8,
    "backbone_options.widths": [4, 8, 8],
    "backbone_options.convolutions": 3,
    "width": 48,
    "depth": 2,
    "feature_dim": 33,
    "stem": "3x3",
    "feature_norm": "none",
    "unit_weight": "published",
    "orientation": "canonical",
    "classifier_bias": "none",
    "code": "seli",
    "class_attributes": "attributes.csv",
    "attribute_weight": 0.2,
    "proximal_weight": 0.2,
    "class_means": "current",
    "class_weights": "inverse",
    "temperature": 0.2,
    "margin": 3.0,
    "means_momentum": 0.3,
    "epochs": 7,
    "label_smoothing": 0.4,
    "loss_options": {"class_weights": "none", "prior": 1.0},
    "regulariser": {"loss": "variability", "weight": 0.1, "detach_between": False},
    "lr": 0.3,
    "momentum": 0.2,
    "feature_decay": 0.1,
    "weight_decay": 0.1,
    "optimizer_options": {"gain": 3.0},
    "schedule_options.warmup_epochs": 2,
    "schedule_options.step_at": [2],
    "schedule_options.lr_factor": 0.7,
    "schedule_options.three_phase": True,
    "schedule_options.div_factor": 10.0,
    "schedule_options.final_div_factor": 100.0,
    "schedule_options.pct_start": 0.2,
    "schedule_options.anneal_strategy": "linear",
    "schedule_options.cycle_momentum": False,
    "gradient_clip": 0.5,
    "weight_average": 0.1,
    "accumulate": 2,
    "precision": "bf16-mixed",
    "compile": True,
    "devices": 2,
    "num_nodes": 2,
    "sync_batchnorm": True,
    "checkpoint_minutes": 3.0,
    "device": "cpu",
    "measure_at": 2,
    "keep_at": [2, 4, ".."],
    "loggers": ["tensorboard"],
}
CHOSEN = {"data", "optimizer", "loss", "backbone", "method", "schedule"}


@cache
def kinds() -> list[tuple[dict, dict]]:
    """Every optimiser, loss, backbone and method together, where they go together; and every schedule."""
    choices = [{"optimizer": o, "loss": x, "backbone": b, "method": m} for o, x, b, m in product(*CHOICES)]
    choices += [{"optimizer": "sgd", "method": "standard", "schedule": schedule} for schedule in SCHEDULES]
    choices += [
        {"method": m, "loss": x} for m, x in product(METHODS + FURTHER_METHODS, ("normface", "nonl", "dot-regression"))
    ]
    choices += [{"method": method, "optimizer": o} for method, o in product(FURTHER_METHODS, OPTIMIZERS)]
    choices += [{"method": method, "class_attributes": "digits"} for method in ATTRIBUTE_METHODS]
    choices += [{"backbone": "fast-convnet"}]
    found = []
    for kind in choices:
        try:
            found.append((kind, RunConfig(**kind).in_force()))
        except ValueError:
            continue
    return found


def test_every_setting_has_another_value_to_try():
    assert RunConfig.model_fields.keys() == {name.partition(".")[0] for name in OTHER} | CHOSEN
    options = {"backbone_options": BackboneOptions, "schedule_options": ScheduleOptions}
    nested = {f"{name}.{option}" for name, kind in options.items() for option in kind.model_fields}
    assert nested == {name for name in OTHER if "." in name}


def other(name: str) -> dict:
    """The setting with its other value, which may be a mapping of one option."""
    setting, _, option = name.partition(".")
    return {setting: {option: OTHER[name]} if option else OTHER[name]}


@pytest.mark.parametrize("name", sorted(OTHER))
def test_a_setting_changes_the_resolved_run_or_is_refused(name):
    accepted, refusals = 0, set()
    setting, _, option = name.partition(".")
    for kind, plain in kinds():
        try:
            changed = RunConfig(**kind | other(name)).in_force()
        except ValueError as error:
            refusals.add(str(error))
            continue
        accepted += not option or "." not in plain["backbone"]  # a class by dotted path accepts all options
        assert (changed[setting][option] if option else changed[name]) == OTHER[name]
        assert changed != plain
    reasons = (
        f"{name} belongs to",
        f"{setting} belongs to",
        f"{name}.gain is not",
        f"{name}.prior is not",
        "feature_decay needs",
        "optimizer lbfgs needs",
    )
    reasons += ("classifier_bias must be",)
    reasons += ("class_attributes belongs to method",) if name == "code" else ()
    assert all(reason.startswith(reasons) for reason in refusals)
    assert accepted or name in {  # these belong to settings that are not among the kinds
        *("data_options", "data_seed", "feature_decay", "sync_batchnorm"),
    }


@pytest.mark.parametrize("name", sorted(OTHER))
def test_what_a_run_says_is_in_force_makes_the_same_run(name):
    with_others = {"data": "mnist", "imbalance": {"step": 0.5}, "feature_norm": "none", "feature_decay": 0.1}
    for kind, _ in kinds()[::4]:
        try:
            run = RunConfig(**with_others | kind | other(name))
        except ValueError:
            continue
        assert RunConfig(**run.in_force()) == run


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "agd", "lr": 9.0}, "lr belongs to optimizer sgd, adam, adamw or lbfgs; here optimizer is agd"),
        ({"optimizer": "agd", "schedule": "constant"}, "schedule belongs to optimizer"),
        ({"optimizer": "agd", "weight_decay": 0.0}, "weight_decay belongs to an optimizer other than agd"),
        (
            {"backbone": "mlp", "stem": "7x7"},
            "stem belongs to backbone resnet18, resnet34, resnet50, resnet101, resnet152, resnext50-32x4d, resnext101",
        ),
        ({"loss": "mse", "label_smoothing": 0.0}, "label_smoothing belongs to loss cross-entropy; here loss is mse"),
        (
            {"method": "standard", "proximal_weight": 0.1},
            "proximal_weight belongs to method implicit, frame, attribute-frame or trust-region; here",
        ),
        (
            {"class_attributes": "digits"},
            "class_attributes belongs to method attribute-frame, or fixed-frame with code attributes; here method is "
            "implicit and code is not given",
        ),
        (
            {"method": "frame", "attribute_weight": 0.2},
            "attribute_weight belongs to method attribute-frame, or fixed-frame with code attributes",
        ),
        (
            {"method": "fixed-frame"},
            "class_attributes must be given for method fixed-frame",
        ),
        (
            {"method": "fixed-frame", "class_attributes": "digits", "attribute_weight": 0.0},
            "attribute_weight must be above 0, got 0.0",
        ),
        (
            {"temperature": 0.2},
            "temperature belongs to loss normface, ntce, nonl, bidirectional-nonl, decoupled or two-way; here",
        ),
        (
            {"loss": "ntce", "margin": 1.0},
            "margin belongs to loss nonl, bidirectional-nonl, decoupled or two-way; here loss is ntce",
        ),
        ({"loss": "nonl", "label_smoothing": 0.1}, "label_smoothing belongs to loss cross-entropy; here loss is nonl"),
        (
            {"loss": "nonl", "classifier_bias": "none"},
            "classifier_bias belongs to loss cross-entropy, mse or dot-regression-published; here loss is nonl",
        ),
        (
            {"loss": "dot-regression", "classifier_bias": "learned"},
            "classifier_bias belongs to loss cross-entropy, mse or dot-regression-published; here loss is dot-regress",
        ),
        ({"loss": "dot-regression", "temperature": 0.2}, "temperature belongs to loss normface, ntce, nonl, bidir"),
        ({"method": "implicit", "orientation": "random"}, "orientation belongs to method fixed or fixed-frame; here"),
        (
            {"schedule": "one-cycle", "momentum": 0.9},
            "momentum belongs to optimizer sgd without cycle_momentum of one-cycle; here optimizer is",
        ),
        (
            {"schedule_options": {"div_factor": 10.0}},
            "schedule_options.div_factor belongs to schedule one-cycle; here schedule is cosine",
        ),
        (
            {"schedule": "one-cycle", "schedule_options": {"final_div_factor": 0.5}},
            "schedule_options.final_div_factor must be at least 1, got 0.5",
        ),
        (
            {"schedule": "one-cycle", "schedule_options": {"phases": 3}},
            "schedule_options.phases is not a setting; nearest: three_phase",
        ),
        (
            {"schedule": "one-cycle", "optimizer": "lbfgs", "schedule_options": {"cycle_momentum": True}},
            "schedule_options.cycle_momentum belongs to schedule one-cycle and optimizer sgd, adam or adamw; here "
            "schedule is one-cycle and optimizer is lbfgs",
        ),
        (
            {"schedule": "one-cycle", "schedule_options": {"warmup_epochs": 1}},
            "schedule_options.warmup_epochs belongs to schedule constant, cosine or step; here schedule is one-cycle",
        ),
        (
            {"epochs": 5, "schedule_options": {"warmup_epochs": 5}},
            "schedule_options.warmup_epochs must be less than epochs, which is 5, got 5",
        ),
        ({"optimizer": "agd", "schedule_options": {"warmup_epochs": 1}}, "schedule_options belongs to optimizer sgd"),
        ({"step_at": 3}, "step_at is not a setting, but an option of schedule_options"),
        (
            {"optimizer": "agd", "backbone": "vgg13", "backbone_options": {"initialisation": "he"}},
            "backbone_options.initialisation belongs to backbone resnet18",
        ),
        (
            {"backbone": "fast-convnet", "backbone_options": {"batch_norm_affine": True}},
            "backbone_options.batch_norm_affine belongs to the built-in backbones with batch norm, other than",
        ),
        (
            {"backbone_options": {"widths": [1, 2, 3]}},
            "backbone_options.widths belongs to backbone fast-convnet; here backbone is convnet",
        ),
        (
            {"batch_size": 128, "sampling": 10},
            "batch_size must be a multiple of the classes per batch (sampling), which is 10, got 128",
        ),
        ({"sampling": 1}, "sampling must be at least 2, got 1"),
        ({"leave_out": ["copies"]}, "leave_out copies belongs to data from a folder or the hub; here data is digits"),
        ({"leave_out": ["absent-classes"] * 2}, "leave_out must be distinct, got"),
        ({"data": "cifar10", "data_options": "published"}, "data_options must be a mapping for data cifar10"),
        ({"data": "cifar10", "data_options": {"spilt": "a"}}, "data_options.spilt is not a setting; nearest: "),
        ({"imbalance": {"exponential": 0.1, "step": 0.1}}, "imbalance must have one shape, exponential or step, got"),
        ({"imbalance": {"step": 0.0}}, "imbalance must be above 0, got"),
        ({"imbalance": {"linear": 0.1}}, "imbalance must be"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"label_noise": 1.5}, "label_noise must be at most 1, got 1.5"),
        (
            {"backbone": "vit-tiny", "backbone_options": {"patch": 4}},
            "backbone_options.patch is not a setting; nearest: ",
        ),
        ({"measure_at": 0}, "measure_at must be at least 1, got 0"),
        ({"measure_at": [5, 1, ".."]}, "measure_at must have two increasing epochs before .., got [5, 1, '..']"),
        ({"measure_at": ["first"]}, "measure_at must be an integer or a list, each item an integer or one of .., last"),
        ({"keep_at": [1, 6, "..", 10]}, "keep_at must continue 1, 6 after .., got [1, 6, '..', 10]"),
        ({"loss": "nonl", "temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"loss": "nonl", "margin": -1.0}, "margin must be at least 0, got -1.0"),
        ({"method": "linear", "feature_norm": 5.0}, "feature_norm belongs to methods other than linear; here method"),
        (
            {"method": "trust-region", "class_weights": "inverse"},
            "class_weights belongs to method implicit, frame or attribute-frame; here method is trust-region",
        ),
        ({"class_means": "current"}, "class_means belongs to method means; here method is implicit"),
        (
            {"method": "means", "classifier_bias": "learned"},
            "classifier_bias must be centring or none for method means, got 'learned'",
        ),
        (
            {"method": "means", "optimizer": "lbfgs"},
            "optimizer lbfgs cannot train method means, whose weight would change during the line search",
        ),
        (
            {"method": "fixed", "classifier_bias": "none", "means_momentum": 0.1},
            "means_momentum belongs to",
        ),
        ({"data_seed": 1}, "data_seed belongs to a random choice"),
        (
            {"schedule": "constant", "schedule_options": {"step_at": [1]}},
            "schedule_options.step_at belongs to schedule step; here schedule is constant",
        ),
        ({"lr": "fast"}, "lr must be a number, got 'fast'"),
        ({"epochs": 2.5}, "epochs must be an integer, got 2.5"),
        ({"augmentation": {"flip": 1}}, "augmentation.flip must be alternating or true or false, got 1"),
        ({"method": "explicit"}, "method must be one of standard, fixed, implicit, linear, means,"),
        ({"loggers": "tensorboard"}, "loggers must be a list, each item one of tensorboard, wandb, got 'tensorboard'"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"pixel_std": [float("inf")]}, "pixel_std must be finite, got [inf]"),
    ],
)
def test_what_is_wrong_is_named(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        RunConfig(**settings)


@pytest.mark.parametrize("infinity", ["inf", math.inf, float("1e400")])
def test_an_infinite_margin_is_one_value_however_it_is_written(infinity, tmp_path, capsys):
    run = RunConfig(loss="two-way", margin=infinity)
    assert run == RunConfig(loss="two-way")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"loss": "two-way", "margin": infinity}))
    for written in (f"--config={tmp_path / 'mine.yaml'}", f"--margin={infinity}"):
        assert main(["train", "--loss=two-way", written, "--print_config"]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["margin"] == "inf"


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_no_other_margin_is_infinite(value, tmp_path, capsys):
    with pytest.raises(ValueError, match=f"margin must be finite or inf, got {value}"):
        RunConfig(loss="two-way", margin=value)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"loss": "two-way", "margin": value}))
    assert "margin must be" in error_of(capsys, "train", f"--config={tmp_path / 'mine.yaml'}", "--print_config")


def test_the_defaults_of_the_heads_are_those_of_the_settings():
    nearest, fixed = (inspect.signature(head).parameters for head in (NearestFrameClassifier, FixedFrameClassifier))
    assert RunConfig().proximal_weight == nearest["proximal_weight"].default
    assert RunConfig().means_momentum == nearest["momentum"].default
    assert RunConfig(method="fixed").means_momentum == fixed["momentum"].default
    means = inspect.signature(ClassMeanClassifier).parameters
    assert RunConfig(method="means").means_momentum == means["momentum"].default
    assert RunConfig(method="means").class_means == means["means"].default
    two_way = inspect.signature(losses.two_way).parameters
    assert RunConfig(loss="two-way").temperature == two_way["temperature"].default
    assert float(RunConfig(loss="two-way").margin) == two_way["margin"].default


def test_settings_over_a_recipe_drop_what_has_no_effect_any_more_of_the_recipe_alone():
    run = single_run({"recipe": "zhu2021-mnist-sgd", "optimizer": "agd", "backbone": "mlp"})
    assert (run.lr, run.momentum, run.schedule, run.stem) == (None, None, None, None)
    assert (run.recipe, run.batch_size, run.optimizer_options) == ("zhu2021-mnist-sgd", 128, {"gain": 10.0})
    with pytest.raises(ValueError, match="lr belongs to"):
        single_run({"recipe": "zhu2021-mnist-sgd", "optimizer": "agd", "lr": 0.1})
    with pytest.raises(ValueError, match="colour is not a setting; nearest: "):
        single_run({"colour": "red"})


def test_a_comparison_is_methods_times_seeds_each_with_the_settings_that_are_its_own():
    runs = comparison_runs(Comparison(seeds=[5, 7]), {"proximal_weight": 0.2, "unit_weight": False, "epochs": 3})
    assert [(run.method, run.seed) for run in runs] == [(method, seed) for seed in (5, 7) for method in METHODS]
    assert [run.proximal_weight for run in runs[:3]] == [None, None, 0.2]
    assert [run.unit_weight for run in runs[:3]] == [False, None, None]
    shared = common_settings(runs)
    assert (shared["epochs"], shared["proximal_weight"], shared["unit_weight"]) == (3, 0.2, False)
    assert not {"method", "seed", "classifier_bias"} & set(shared)
    with pytest.raises(
        ValueError,
        match="proximal_weight belongs to method implicit, frame, attribute-frame or trust-region; here",
    ):
        comparison_runs(Comparison(methods=["standard", "fixed"]), {"proximal_weight": 0.2})
    with pytest.raises(ValueError, match="method is not a setting"):
        comparison_runs(Comparison(), {"method": "fixed"})


def test_a_comparison_of_losses_is_methods_times_losses_each_with_its_own_settings():
    comparison = Comparison(methods=["standard", "means"], losses=["cross-entropy", "nonl"], seeds=1)
    runs = comparison_runs(comparison, {"margin": 2.0, "classifier_bias": "none"})
    assert [(run.method, run.loss) for run in runs] == list(product(("standard", "means"), ("cross-entropy", "nonl")))
    assert [run.margin for run in runs] == [None, 2.0] * 2
    assert [run.classifier_bias for run in runs] == ["none", None] * 2
    assert "loss" not in common_settings(runs)
    with pytest.raises(ValueError, match="loss must not be given together with losses"):
        comparison_runs(comparison, {"loss": "mse"})
    with pytest.raises(ValueError, match="margin belongs to loss nonl, bidirectional-nonl, decoupled or two-way"):
        comparison_runs(Comparison(losses=["ntce", "mse"]), {"margin": 2.0})


def test_weight_averages_are_compared_and_0_is_none():
    comparison = Comparison(methods=["fixed"], weight_averages=[0, 0.2], seeds=1)
    assert [run.weight_average for run in comparison_runs(comparison, {})] == [None, 0.2]
    with pytest.raises(ValueError, match="weight_average must not be given together with weight_averages"):
        comparison_runs(comparison, {"weight_average": 0.3})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"losses": []}, "losses must be distinct, at least one"),
        ({"losses": ["nonl", "nonl"]}, "losses must be distinct, at least one"),
        ({"weight_averages": [0.1, 0.1]}, "weight_averages must be distinct, at least one"),
        ({"losses": ["l2"]}, "losses must be a list, each item one of cross-entropy, mse"),
        ({"lr": "best"}, "lr must be auto or a number, got 'best'"),
        ({"lr_candidates": [0.1, 0.2]}, "lr_candidates belongs to lr auto; here lr is not given"),
        ({"lr": "auto", "lr_candidates": [0.1]}, "lr_candidates must be distinct, at least two"),
        ({"lr": "auto", "lr_candidates": [0.1, 0.0]}, "lr_candidates must be above 0"),
        ({"lr": 0.1, "tuning_share": 0.1}, "tuning_share belongs to lr auto; here lr is 0.1"),
    ],
)
def test_what_is_wrong_in_a_comparison_is_named(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Comparison(**settings)


def test_a_rate_that_is_to_be_chosen_needs_an_optimizer_that_has_one():
    with pytest.raises(ValueError, match="lr auto belongs to an optimizer with a learning rate"):
        comparison_runs(Comparison(lr="auto"), {"optimizer": "agd"})


def test_a_published_comparison_gives_each_method_its_own():
    runs = comparison_runs(Comparison(recipe="markou2024-mnist", seeds=[1]), {"epochs": 2})
    assert [run.recipe for run in runs] == [f"markou2024-mnist-{method}" for method in METHODS]
    assert [run.sampling == "stratified" for run in runs] == [False, False, True]
    assert {(run.epochs, run.optimizer, run.feature_norm) for run in runs} == {(2, "agd", 5.0)}


def test_a_published_comparison_whose_recipes_differ_in_data_is_refused(monkeypatch):
    recipes = experiments.recipe_comparison("markou2024-mnist")
    recipes["fixed"].settings["image_size"] = 28
    monkeypatch.setattr(experiments, "recipe_comparison", lambda name: recipes)
    with pytest.raises(ValueError, match="with the same data, but those of 'markou2024-mnist' differ in image_size"):
        comparison_runs(Comparison(recipe="markou2024-mnist"), {})


def test_null_asks_for_the_default_and_not_for_the_recipes_value():
    given = {"recipe": "papyan2020-cifar10", "epochs": 9}
    options = {"warmup_epochs": 0, "step_at": [116, 233], "lr_factor": 0.1}
    assert single_run(given).schedule_options == options
    assert single_run(given | {"schedule_options": None}).schedule_options == options | {"step_at": [3, 6]}
    override = {"schedule_options": {"step_at": None, "lr_factor": 0.5}}
    assert single_run(given | override).schedule_options == {"warmup_epochs": 0, "step_at": [3, 6], "lr_factor": 0.5}


def test_options_of_a_comparison_apply_where_they_have_an_effect():
    axes = Comparison(methods=["fixed"], seeds=1)
    (run,) = comparison_runs(axes, {"schedule_options": {"warmup_epochs": 1}})
    assert run.schedule_options == {"warmup_epochs": 1}
    without_effect = {"schedule_options": {"lr_factor": 0.5}}
    with pytest.raises(ValueError, match="schedule_options.lr_factor belongs to schedule step"):
        comparison_runs(axes, without_effect)


def test_an_option_without_effect_in_every_run_is_refused_even_for_different_reasons(monkeypatch):
    recipes = experiments.recipe_comparison("markou2024-mnist")
    recipes["fixed"].settings.update(optimizer="sgd", schedule="constant")
    monkeypatch.setattr(experiments, "recipe_comparison", lambda name: recipes)
    axes = Comparison(recipe="markou2024-mnist", methods=["fixed", "standard"], seeds=1)
    with pytest.raises(ValueError, match="schedule_options.lr_factor belongs to schedule step"):
        comparison_runs(axes, {"schedule_options": {"lr_factor": 0.5}})
    fixed, standard = comparison_runs(axes, {"schedule_options": {"warmup_epochs": 1}})
    assert (fixed.schedule_options, standard.schedule_options) == ({"warmup_epochs": 1}, None)


def test_options_of_a_built_in_backbone_are_not_passed_to_a_class_by_dotted_path():
    assert single_run({"recipe": "fast-cifar10-small", "backbone": "package.module.Class"}).backbone_options == {}
    base = {"backbone": "package.module.Class", "backbone_options": {"depth": 3}}
    assert single_run({"epochs": 3}, base).backbone_options == {"depth": 3}


def test_changes_of_options_keep_the_other_options():
    base = {"lr": 0.1, "schedule_options": {"step_at": 40, "lr_factor": 0.2}, "imbalance": {"step": 0.1}}
    changes = {"schedule_options": {"step_at": 8}, "imbalance": {"exponential": 0.1}}
    assert RunConfig.override(base, changes) == {
        "lr": 0.1,
        "schedule_options": {"step_at": 8, "lr_factor": 0.2},
        "imbalance": {"exponential": 0.1},
    }


def test_a_run_has_at_most_70_settings():
    assert len(RunConfig.model_fields) <= 70


def test_settings_are_frozen_and_options_of_a_recipe_are_kept_where_they_have_an_effect():
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().epochs = 3
    run = single_run({"recipe": "zhu2021-sota-resnet18", "augmentation": {"flip": False}})
    assert run.augmentation == {"crop_padding": 4, "flip": False, "rotation": 0.0}
    run = single_run(
        {"recipe": "zhu2021-mnist-lbfgs", "optimizer": "agd", "backbone_options": {"batch_norm_affine": False}}
    )
    assert run.optimizer_options == {"gain": 10.0}
    assert run.backbone_options == {"batch_norm_affine": False}


def test_replacing_a_setting_resolves_what_follows_from_it():
    run = RunConfig(method="fixed", backbone="mlp")
    assert run.data_seed is None
    assert run.replace(validation_share=0.2) == RunConfig(method="fixed", backbone="mlp", validation_share=0.2)
    assert run.replace(backbone="vit-tiny", width=None, depth=None, backbone_options=None).depth == 12
