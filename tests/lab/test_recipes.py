"""Recipes against the published values, which are written here by hand, and against their settings of before."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from neuralcollapse.lab import recipes as recipes_module
from neuralcollapse.lab.commands.arguments import add_sections
from neuralcollapse.lab.commands.recipes import recipes_table
from neuralcollapse.lab.config import RunConfig
from neuralcollapse.lab.recipes import families, load_recipe, recipe_names, recipes

FIELD = re.compile(r"^(\w+): (\S.*?)  # (\S.*)$")
MARKER = "not published: our choice"
MARKED = re.compile(rf"^{MARKER}( \(.+\))?$")
PAPERS = r"Papyan et al\. 2020|Zhu et al\. 2021|Markou et al\. 2024|Jordan 2024"
SOURCE = re.compile(rf"^(unofficial reproduction of )?({PAPERS})\b")
SETTINGS = set(RunConfig.model_fields)
FAMILIES = Path(recipes_module.__file__).parent / "recipes"
CLASSES = {"mnist": 10, "cifar10": 10, "cifar100": 100, "stl10": 10, "imagenet": 1000}

# --- the published values ------------------------------------------------------------------------------------------

NOT_AUGMENTED = {"augmentation": {"crop_padding": 0, "flip": False, "rotation": 0.0}}
CROPPED_AND_FLIPPED = {"augmentation": {"crop_padding": 4, "flip": True, "rotation": 0.0}}
ROTATED = {"augmentation": {"crop_padding": 0, "flip": False, "rotation": 25.0}}
MNIST = {"data": "mnist", "image_size": 32, "channels": 3, "pixel_mean": [0.1307], "pixel_std": [0.3081]}
IMAGENET_PIXELS = {"pixel_mean": [0.485, 0.456, 0.406], "pixel_std": [0.229, 0.224, 0.225]}
CIFAR10_PIXELS = {"pixel_mean": [0.4914, 0.4822, 0.4465], "pixel_std": [0.2023, 0.1994, 0.2010]}
CIFAR100_PIXELS = {"pixel_mean": [0.5071, 0.4865, 0.4409], "pixel_std": [0.2673, 0.2564, 0.2762]}
STL10_PIXELS = {"pixel_mean": [0.4467, 0.4398, 0.4066], "pixel_std": [0.2603, 0.2566, 0.2713]}
CANONICAL = {"orientation": "canonical"}
PLAIN_CLASSIFIER = {
    "method": "standard",
    "feature_norm": "none",
    "unit_weight": False,
    "classifier_bias": "learned",
}

PAPYAN = {
    **NOT_AUGMENTED,
    **PLAIN_CLASSIFIER,
    "batch_size": 128,
    "sampling": "random",
    "stem": "7x7",
    "backbone_options": {"batch_norm_affine": True, "initialisation": "he"},
    "epochs": 350,
    "loss": "cross-entropy",
    "optimizer": "sgd",
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "schedule": "step",
    "schedule_options": {"step_at": [116, 233], "lr_factor": 0.1},
    "measure_at": 5,
    "keep_at": 5,
}

STEPS = {"schedule": "step", "schedule_options": {"step_at": 40, "lr_factor": 0.1}}
ZHU = {
    **NOT_AUGMENTED,
    **PLAIN_CLASSIFIER,
    "sampling": "random",
    "backbone": "resnet18",
    "stem": "7x7",
    "backbone_options": {"batch_norm_affine": True, "initialisation": "he"},
    "epochs": 200,
    "loss": "cross-entropy",
    "weight_decay": 5e-4,
    "measure_at": 1,
    "keep_at": 1,
    "seed": 6,
}
ZHU_SGD = ZHU | STEPS | {"batch_size": 128, "optimizer": "sgd", "lr": 0.05, "momentum": 0.9}
ZHU_ADAM = ZHU | STEPS | {"batch_size": 64, "optimizer": "adam", "lr": 1e-3}
ZHU_LBFGS = ZHU | {
    "batch_size": 2048,
    "optimizer": "lbfgs",
    "lr": 0.1,
    "optimizer_options": {"history": 10, "iterations": 20},
    "schedule": "constant",
}
ZHU_CIFAR10 = {"data": "cifar10", **CIFAR10_PIXELS}
ZHU_RANDOM = {
    **ZHU_SGD,
    "data": "cifar10",
    **IMAGENET_PIXELS,
    "label_noise": "permuted",
    "batch_size": 64,
    "lr": 0.01,
    "weight_decay": 1e-4,
}
ZHU_SOTA = ZHU_SGD | CROPPED_AND_FLIPPED | {"data": "cifar10", **CIFAR10_PIXELS, "stem": "3x3"}


def without(values: dict, *names: str) -> dict:
    return {name: value for name, value in values.items() if name not in names}


ZHU_FIXED = without(ZHU_SGD, "unit_weight") | ZHU_CIFAR10 | {"method": "fixed", **CANONICAL}

# Without a bias: {MNIST, CIFAR-10} x {SGD, Adam, L-BFGS} x {learned, fixed}.
ZHU_OPTIMIZERS = {"sgd": ZHU_SGD, "adam": ZHU_ADAM, "lbfgs": ZHU_LBFGS}
ZHU_MSE = {
    f"zhu2021-mse-{data}-{optimizer}-{classifier}": {
        **(values if classifier == "learned" else without(values, "unit_weight")),
        **pixels,
        "loss": "mse",
        "classifier_bias": "none",
        "method": {"learned": "standard", "fixed": "fixed"}[classifier],
        **(CANONICAL if classifier == "fixed" else {}),
    }
    for data, pixels in (("mnist", MNIST), ("cifar10", ZHU_CIFAR10))
    for optimizer, values in ZHU_OPTIMIZERS.items()
    for classifier in ("learned", "fixed")
}

MARKOU_STANDARD = {"method": "standard", "unit_weight": "published"}
MARKOU_FIXED = {"method": "fixed", **CANONICAL, "classifier_bias": "centring"}
MARKOU_IMPLICIT = {"method": "implicit", "classifier_bias": "centring", "means_momentum": "published"}
MARKOU = {
    "batch_size": 256,
    "epochs": 200,
    "loss": "cross-entropy",
    "optimizer_options": {"gain": 10.0},
    "keep_at": 1,
}
MARKOU_MNIST = {
    **MARKOU,
    **MNIST,
    "sampling": "random",
    **ROTATED,
    "backbone": "resnet18",
    "stem": "7x7",
    "backbone_options": {"batch_norm_affine": False},
    "feature_norm": 5.0,
    "optimizer": "agd",
    "seeds": [1, 2, 3],
    "measure_at": [1, 6, ".."],
}
MARKOU_CIFAR10 = {**MARKOU, **CROPPED_AND_FLIPPED, "data": "cifar10", **CIFAR10_PIXELS}
MARKOU_CIFAR100 = {**MARKOU, **CROPPED_AND_FLIPPED, "data": "cifar100", **CIFAR100_PIXELS}
MARKOU_STL10 = {**MARKOU, **CROPPED_AND_FLIPPED, "data": "stl10", "image_size": 96, **STL10_PIXELS}
MARKOU_IMAGENET = {
    **MARKOU,
    **CROPPED_AND_FLIPPED,
    "data": "imagenet",
    "image_size": 256,
    "channels": 3,
    "crop_size": 224,
    **IMAGENET_PIXELS,
}
RESNET18 = {"backbone": "resnet18", "stem": "7x7"}
RESNET50 = {"backbone": "resnet50", "stem": "7x7"}
VGG13 = {"backbone": "vgg13"}

# What is left out of a recipe's row here, the recipe marks as our choice.
PUBLISHED = {
    "papyan2020-cifar10": {**PAPYAN, "data": "cifar10", "backbone": "resnet18", "lr": 0.1302501827396728},
    "papyan2020-cifar100": {**PAPYAN, "data": "cifar100", "backbone": "resnet50", "lr": 0.18045095091164853},
    "zhu2021-mnist-sgd": {**ZHU_SGD, **MNIST},
    "zhu2021-mnist-adam": {**ZHU_ADAM, **MNIST},
    "zhu2021-mnist-lbfgs": {**ZHU_LBFGS, **MNIST},
    "zhu2021-cifar10-sgd": {**ZHU_SGD, **ZHU_CIFAR10},
    "zhu2021-cifar10-adam": {**ZHU_ADAM, **ZHU_CIFAR10},
    "zhu2021-cifar10-lbfgs": {**ZHU_LBFGS, **ZHU_CIFAR10},
    "zhu2021-fixed-etf": ZHU_FIXED,
    "zhu2021-fixdim": {**ZHU_SGD, **ZHU_CIFAR10, "feature_dim": 10},
    "zhu2021-fixed-etf-fixdim": {**ZHU_FIXED, "feature_dim": 10},
    **{
        f"zhu2021-{kind}-{optimizer}": {**ZHU_OPTIMIZERS[optimizer], **ZHU_CIFAR10, **changes}
        for optimizer in ("adam", "lbfgs")
        for kind, changes in (("fixdim", {"feature_dim": 10}),)
    },
    **{
        f"zhu2021-{kind}-{optimizer}": {
            **without(ZHU_OPTIMIZERS[optimizer], "unit_weight"),
            **ZHU_CIFAR10,
            "method": "fixed",
            **CANONICAL,
            **changes,
        }
        for optimizer in ("adam", "lbfgs")
        for kind, changes in (("fixed-etf", {}), ("fixed-etf-fixdim", {"feature_dim": 10}))
    },
    **ZHU_MSE,
    "zhu2021-feature-decay": {**ZHU_SGD, **ZHU_CIFAR10, "batch_size": 64, "feature_decay": 1e-4},
    "zhu2021-feature-decay-mnist": {**ZHU_SGD, **MNIST, "batch_size": 64, "feature_decay": 1e-4},
    "zhu2021-random-labels-mlp": {
        **without(ZHU_RANDOM, "stem"),
        "backbone": "mlp",
        "backbone_options": {"batch_norm_affine": True},
        "width": 1024,
        "depth": 6,
    },
    "zhu2021-random-labels-resnet": {
        **ZHU_RANDOM,
        "stem": "3x3",
        "backbone_options": {"batch_norm_affine": True, "initialisation": "torch"},
    },
    "zhu2021-sota-resnet18": ZHU_SOTA,
    "zhu2021-sota-resnet50": {**ZHU_SOTA, "backbone": "resnet50"},
    **{
        f"zhu2021-sota-{backbone}{name}": {**values, "backbone": backbone}
        for backbone in ("resnet18", "resnet50")
        for name, values in (
            ("-fixdim", {**ZHU_SOTA, "feature_dim": 10}),
            ("-fixed", {**without(ZHU_SOTA, "unit_weight"), "method": "fixed", **CANONICAL}),
            (
                "-fixed-fixdim",
                {**without(ZHU_SOTA, "unit_weight"), "method": "fixed", **CANONICAL, "feature_dim": 10},
            ),
        )
    },
    "markou2024-mnist-standard": {**MARKOU_MNIST, **MARKOU_STANDARD, "classifier_bias": "none"},
    "markou2024-mnist-fixed": {**MARKOU_MNIST, **MARKOU_FIXED},
    "markou2024-mnist-implicit": {
        **MARKOU_MNIST,
        **MARKOU_IMPLICIT,
        "sampling": "stratified",
        "proximal_weight": 0.0045,
    },
    "markou2024-cifar10-resnet18-standard": {**MARKOU_CIFAR10, **RESNET18, **MARKOU_STANDARD},
    "markou2024-cifar10-resnet18-fixed": {**MARKOU_CIFAR10, **RESNET18, **MARKOU_FIXED},
    "markou2024-cifar10-resnet18-implicit": {
        **MARKOU_CIFAR10,
        **RESNET18,
        **MARKOU_IMPLICIT,
        "proximal_weight": 0.0045,
    },
    "markou2024-cifar10-vgg13-standard": {**MARKOU_CIFAR10, **VGG13, **MARKOU_STANDARD},
    "markou2024-cifar10-vgg13-fixed": {**MARKOU_CIFAR10, **VGG13, **MARKOU_FIXED},
    "markou2024-cifar10-vgg13-implicit": {**MARKOU_CIFAR10, **VGG13, **MARKOU_IMPLICIT, "proximal_weight": 0.0045},
    "markou2024-cifar100-resnet50-standard": {**MARKOU_CIFAR100, **RESNET50, **MARKOU_STANDARD},
    "markou2024-cifar100-resnet50-fixed": {**MARKOU_CIFAR100, **RESNET50, **MARKOU_FIXED},
    "markou2024-cifar100-resnet50-implicit": {
        **MARKOU_CIFAR100,
        **RESNET50,
        **MARKOU_IMPLICIT,
        "proximal_weight": 0.0495,
    },
    "markou2024-cifar100-vgg13-standard": {**MARKOU_CIFAR100, **VGG13, **MARKOU_STANDARD},
    "markou2024-cifar100-vgg13-fixed": {**MARKOU_CIFAR100, **VGG13, **MARKOU_FIXED},
    "markou2024-cifar100-vgg13-implicit": {**MARKOU_CIFAR100, **VGG13, **MARKOU_IMPLICIT, "proximal_weight": 0.0495},
    "markou2024-stl10-resnet50-standard": {**MARKOU_STL10, **RESNET50, **MARKOU_STANDARD},
    "markou2024-stl10-resnet50-fixed": {**MARKOU_STL10, **RESNET50, **MARKOU_FIXED},
    "markou2024-stl10-resnet50-implicit": {**MARKOU_STL10, **RESNET50, **MARKOU_IMPLICIT, "proximal_weight": 0.0045},
    "markou2024-stl10-vgg13-standard": {**MARKOU_STL10, **VGG13, **MARKOU_STANDARD},
    "markou2024-stl10-vgg13-fixed": {**MARKOU_STL10, **VGG13, **MARKOU_FIXED},
    "markou2024-stl10-vgg13-implicit": {**MARKOU_STL10, **VGG13, **MARKOU_IMPLICIT, "proximal_weight": 0.0045},
    "markou2024-imagenet-resnet50-standard": {**MARKOU_IMAGENET, **RESNET50, **MARKOU_STANDARD},
    "markou2024-imagenet-resnet50-fixed": {**MARKOU_IMAGENET, **RESNET50, **MARKOU_FIXED},
    "markou2024-imagenet-resnet50-implicit": {
        **MARKOU_IMAGENET,
        **RESNET50,
        **MARKOU_IMPLICIT,
        "proximal_weight": 0.4995,
    },
}

# Jordan (arXiv 2404.00498): rates per 1024 images of a summed loss, with the factor of Nesterov momentum 0.85.
FAST = {
    "sampling": "random",
    "backbone": "fast-convnet",
    "method": "linear",
    "classifier_bias": "none",
    "loss": "cross-entropy",
    "label_smoothing": 0.2,
    "optimizer": "sgd",
    "optimizer_options": {"nesterov": True, "shift_lr_factor": 64.0},
    "momentum": 0.85,
    "schedule": "one-cycle",
    "schedule_options": {
        "three_phase": False,
        "div_factor": 5.0,
        "final_div_factor": 2.857,
        "pct_start": 0.23,
        "anneal_strategy": "linear",
        "cycle_momentum": False,
    },
}
MIRRORED = {"crop_padding": 2, "padding": "reflect", "flip": "alternating", "rotation": 0.0}
FAST_94 = {**FAST, "epochs": 10, "augmentation": MIRRORED, "weight_decay": 0.00133}
FAST_SMALL = {**FAST_94, "lr": 0.375}
FAST_MEDIUM = {
    **FAST_94,
    "lr": 1.5,
    "batch_size": 1024,
    "backbone_options": {"widths": [64, 256, 256], "convolutions": 2},
}
PUBLISHED |= {
    "fast-cifar10-small": {**FAST_SMALL, "data": "cifar10"},
    "fast-cifar10-medium": {**FAST_MEDIUM, "data": "cifar10"},
    "fast-cifar10-large": {
        **FAST,
        "data": "cifar10",
        "backbone_options": {"widths": [128, 512, 512], "convolutions": 3},
        "augmentation": {**MIRRORED, "crop_padding": 4, "cutout": 12},
        "batch_size": 1024,
        "epochs": 40,
        "lr": 1.174,
        "weight_decay": 0.0017,
    },
    "fast-cifar100-small": {**FAST_SMALL, "data": "cifar100"},
    "fast-cifar100-medium": {**FAST_MEDIUM, "data": "cifar100"},
    "fast-mnist-small": {**FAST_SMALL, "augmentation": {**MIRRORED, "flip": False}},
}

every_recipe = pytest.mark.parametrize("name", sorted(PUBLISHED))


def values(name: str) -> dict:
    return yaml.safe_load(load_recipe(name).text)


def test_the_recipes_are_those_of_the_published_experiments():
    assert recipe_names() == sorted(PUBLISHED)
    assert len(PUBLISHED) == 71


@every_recipe
def test_a_recipe_resolves_to_the_published_values(name):
    recipe = load_recipe(name)
    resolved = RunConfig(**recipe.settings).in_force() | {"seeds": recipe.seeds}
    for field, value in PUBLISHED[name].items():
        options = value if isinstance(value, dict) else {}
        assert {option: resolved[field][option] for option in options} == options
        assert options or resolved[field] == value


@pytest.mark.parametrize("name", [name for name in sorted(PUBLISHED) if not name.startswith("fast-")])
def test_a_recipe_resolves_to_the_settings_of_its_file_of_before_the_families(name):
    stored = json.loads((Path(__file__).parents[1] / "fixtures" / "recipes.json").read_text())
    recipe = load_recipe(name)
    config = RunConfig(**recipe.settings)
    epochs = range(1, config.epochs + 1)
    resolved = config.in_force()
    later = resolved.pop("loss_options", None) or {}  # without effect in every recipe of before
    assert set(later.values()) <= {"none", 0.0, "given"}
    resolved["seeds"] = recipe.seeds
    resolved["measured"] = first_last_and_number([epoch for epoch in epochs if config.is_measured(epoch)])
    resolved["kept"] = first_last_and_number([epoch for epoch in epochs if config.is_kept(epoch)])
    assert resolved == stored["of every recipe"] | stored[name]
    assert set(stored) == {"of every recipe", *(name for name in PUBLISHED if not name.startswith("fast-"))}


def first_last_and_number(epochs: list[int]) -> list[int]:
    """The first three epochs, the last, and how many there are."""
    return [*epochs[:3], epochs[-1], len(epochs)]


@every_recipe
def test_settings_without_a_published_value_and_no_others_are_marked_as_our_choice(name):
    recipe = load_recipe(name)
    unmarked = {field for field, source in recipe.sources.items() if not MARKED.match(source)}
    assert unmarked == set(PUBLISHED[name])
    assert recipe.choices == len(values(name)) - len(unmarked)


@every_recipe
def test_every_setting_has_a_source(name):
    recipe = load_recipe(name)
    first, *lines = recipe.text.splitlines()
    assert re.fullmatch(r"# Reproduces: \S.+", first)
    assert first == f"# Reproduces: {recipe.reproduces}"
    for line in lines:
        assert line.startswith("# ") or FIELD.match(line), line
    assert list(recipe.sources) == list(values(name))
    for source in recipe.sources.values():
        assert MARKED.match(source) or SOURCE.match(source), source


@every_recipe
def test_a_recipe_says_what_was_published_and_what_it_costs(name):
    comments = [line for line in load_recipe(name).text.splitlines() if line.startswith("#")]
    for remark in ("Source", "Published", "Cost"):
        assert any(line.startswith(f"# {remark}: ") for line in comments)


def test_every_recipe_is_in_one_family_whose_name_begins_its_name():
    names = [name for family in families() for name in family.recipes]
    assert sorted(names) == sorted(PUBLISHED)
    for family in families():
        assert all(f"{name}-".startswith(f"{family.name}-") for name in family.recipes)
        assert all((family.title, family.source, family.published, family.cost))


@pytest.mark.parametrize("path", sorted(FAMILIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_parts_hold_only_differences_and_each_is_used(path):
    content = yaml.safe_load(path.read_text())
    assert set(content) <= {"title", "source", "published", "cost", "notes", "base", "parts", "variants"}
    assert {part for parts in content["variants"].values() for part in parts} == set(content["parts"])
    for parts in content["variants"].values():
        settings = [content["base"], *(content["parts"][part] for part in parts)]
        assert sum(map(len, settings)) == len({name for values in settings for name in values})
    for line in path.read_text().partition("\nbase:\n")[2].splitlines():
        if line.startswith("    ") or "[" in line:
            assert "  # " in line, line


@every_recipe
def test_fields_are_settings_of_a_run_and_of_their_types(name):
    given = load_recipe(name).settings
    assert set(given) <= SETTINGS
    parser = ArgumentParser(exit_on_error=False)
    add_sections(parser, *reversed(RunConfig.__bases__))
    parsed = parser.parse_object(given, defaults=False)
    assert RunConfig(**parsed.as_dict()) == RunConfig(**given)


@every_recipe
def test_a_recipe_gives_every_field_that_decides_its_result(name):
    given = values(name)
    options = {f"{field}.{option}" for field, value in given.items() if isinstance(value, dict) for option in value}
    assert deciding(given) <= set(given) | options


def deciding(given: dict) -> set[str]:
    names = {"data", "batch_size", "sampling", "augmentation", "backbone"}
    names |= {"method", "classifier_bias", "epochs", "loss", "optimizer"}
    names |= {"seeds" if "seeds" in given else "seed", "measure_at"}
    if given["backbone"] == "fast-convnet":
        names |= {"backbone_options.widths", "backbone_options.convolutions"}
    else:
        names |= {"backbone_options.batch_norm_affine", "feature_norm", "keep_at"}
    names |= {
        "sgd": {"lr", "momentum", "weight_decay", "schedule"},
        "adam": {"lr", "weight_decay", "schedule"},
        "lbfgs": {"lr", "optimizer_options", "weight_decay", "schedule"},
        "agd": {"optimizer_options"},
    }[given["optimizer"]]
    names |= {
        "constant": set(),
        "step": {"schedule_options.step_at", "schedule_options.lr_factor"},
        "one-cycle": {f"schedule_options.{name}" for name in FAST["schedule_options"]},
    }[given.get("schedule", "constant")]
    names |= {
        "standard": {"unit_weight"},
        "fixed": {"orientation"},
        "implicit": {"proximal_weight"},
        "linear": set(),
    }[given["method"]]
    if given["classifier_bias"] == "centring":
        names.add("means_momentum")
    names |= {"mlp": {"width", "depth"}, "vgg13": set(), "fast-convnet": set()}.get(given["backbone"], {"stem"})
    if given["data"] in ("mnist", "imagenet") and given["backbone"] != "fast-convnet":
        names |= {"image_size", "channels"}
    if given["backbone"].startswith("resnet") and given["optimizer"] != "agd":
        names.add("backbone_options.initialisation")
    if given.get("label_noise"):
        names.add("data_seed")
    return names


@pytest.mark.parametrize("name", [name for name in sorted(PUBLISHED) if name.endswith("-implicit")])
def test_the_proximal_weight_is_the_published_delta_converted(name):
    given = values(name)
    assert given["proximal_weight"] == pytest.approx(1e-3 * (CLASSES[given["data"]] - 1) / 2)


def test_pixels_are_standardised_as_published_or_by_the_training_images():
    left_out = {name for name in PUBLISHED if not {"pixel_mean", "pixel_std"} & set(values(name))}
    assert left_out == {name for name in PUBLISHED if name.startswith(("papyan2020-", "fast-"))}


@pytest.mark.parametrize(
    ("wrong", "nearest"), [("zhu2021-mnist-sdg", "zhu2021-mnist-sgd"), ("papyan-cifar10", "papyan2020-cifar10")]
)
def test_an_unknown_recipe_is_refused_with_the_nearest_names(wrong, nearest):
    with pytest.raises(ValueError, match="recipe must be one of those that 'neuralcollapse recipes' lists") as error:
        load_recipe(wrong)
    message = str(error.value)
    assert "\n" not in message
    assert f"got {wrong!r}; nearest: {nearest}" in message


@pytest.mark.parametrize(
    "wrong", ["", "../config", "zhu2021", "zhu2021-mnist-sgd.yaml", "zhu2021-../x", "?", 5, ["zhu2021-fixdim"]]
)
def test_paths_families_and_other_types_are_refused_as_names(wrong):
    with pytest.raises(ValueError, match="nearest: "):
        load_recipe(wrong)


def test_the_table_lists_each_recipe_with_its_number_of_our_choices():
    header, rule, *rows = recipes_table().splitlines()
    assert header.split()[0] == "name"
    assert header.endswith("epochs  our choices")
    assert {len(line) for line in (header, rule, *rows)} == {len(header)}
    for recipe, row in zip(recipes(), rows, strict=True):
        name, *_, data, model, method, epochs, choices = row.split()
        settings = recipe.settings
        assert (name, data, model, method) == (recipe.name, settings["data"], settings["backbone"], settings["method"])
        assert (int(epochs), int(choices)) == (settings["epochs"], recipe.choices)
        assert recipe.reproduces in row


def test_listing_recipes_is_light():
    script = "import sys, neuralcollapse.lab.commands.recipes as r; r.recipes_table(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "lightning", "pandas", "datasets", "matplotlib", "sklearn"} & set(loaded)


def test_the_page_of_recipes_names_each():
    docs = Path(__file__).parents[2] / "docs"
    page = runpy.run_path(str(docs / "hooks.py"))["on_page_markdown"]((docs / "recipes.md").read_text())
    missing = [name for name in recipe_names() if f"| `{name}` |" not in page]
    assert not missing
