"""Labels and titles of runs: what tells them apart, and what they have in common."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuralcollapse.lab.recipes import load_recipe, recipe_names
from neuralcollapse.lab.results.labels import MAIN, differing_settings, labels_of, short_values, title_of

VALUES = {
    "method": st.sampled_from(["standard", "fixed", "10"]),
    "data": st.sampled_from(["digits", "/data/digits", "/old/data/digits", "fixed", "a b", "1e-3", "hub/mnist"]),
    "backbone": st.sampled_from(["mlp", "package.module.Net", "other.module.Net", "lr=0.1", "fixed"]),
    "optimizer": st.sampled_from(["sgd", "adam"]),
    "lr": st.sampled_from([None, 1, 0.1, 0.01]),
    "milestones": st.sampled_from([None, [10, 20], [10, 30]]),
    "flip": st.sampled_from([None, True, False]),
    "backbone_options": st.sampled_from([None, {}, {"name": None}, {"name": "x" * 40}, {"name": "x" * 41}]),
    "seed": st.integers(0, 2),
}
RUNS = st.lists(st.fixed_dictionaries({}, optional=VALUES), min_size=1, max_size=8)


@given(RUNS)
def test_labels_are_equal_where_only_the_seed_differs(runs):
    labels = labels_of(runs)
    kinds = [{name: value for name, value in run.items() if name != "seed" and value is not None} for run in runs]
    for one, label in zip(kinds, labels, strict=True):
        assert label.strip()
        for other, its_label in zip(kinds, labels, strict=True):
            assert (one == other) == (label == its_label), (one, other)


@given(RUNS, st.permutations(range(8)))
def test_a_label_does_not_depend_on_the_order(runs, order):
    order = [place for place in order if place < len(runs)]
    labels = labels_of(runs)
    assert labels_of([runs[place] for place in order]) == [labels[place] for place in order]


def published(*names: str, **changed) -> list[dict]:
    return [{**load_recipe(name).settings, **changed} for name in names]


@pytest.mark.parametrize(
    ("names", "labels", "title"),
    [
        (
            [f"zhu2021-mnist-{name}" for name in ("sgd", "adam", "lbfgs")],
            ["sgd", "adam", "lbfgs"],
            "resnet18, standard, cross-entropy on mnist; differing: optimizer (sgd, adam, lbfgs)",
        ),
        (
            [f"zhu2021-mse-{'-'.join(parts)}" for parts in product(["mnist", "cifar10"], ["sgd", "lbfgs"],
                                                                   ["learned", "fixed"])],
            [f"{method} {data} {name}" for data, name, method in product(["mnist", "cifar10"], ["sgd", "lbfgs"],
                                                                         ["standard", "fixed"])],
            "resnet18, mse; differing: data (mnist, cifar10), method (standard, fixed), optimizer (sgd, lbfgs)",
        ),
        (
            [f"zhu2021-sota-resnet{size}{fixed}{dim}" for size, fixed, dim in product([18, 50], ["", "-fixed"],
                                                                                      ["", "-fixdim"])],
            [f"{method} resnet{size}{dim}" for size, method, dim in product([18, 50], ["standard", "fixed"],
                                                                            ["", " feature_dim=10"])],
            "cross-entropy, sgd on cifar10; differing: backbone (resnet18, resnet50), method (standard, fixed), "
            "feature_dim (default, 10)",
        ),
        (
            ["zhu2021-random-labels-mlp", "zhu2021-random-labels-resnet"],
            ["mlp", "resnet18"],
            "standard, cross-entropy, sgd on cifar10; differing: backbone (mlp, resnet18)",
        ),
    ],
)  # fmt: skip
def test_labels_and_titles_of_published_runs_say_what_differs_and_no_more(names, labels, title):
    runs = published(*names)
    assert labels_of(runs) == labels
    assert title_of(runs, [None] * len(runs)) == title


def test_every_recipe_can_be_told_from_every_other_one():
    names = recipe_names()
    runs = published(*names)
    kinds = {repr(sorted((k, v) for k, v in run.items() if k not in ("seed", "recipe"))) for run in runs}
    labels = labels_of(runs)
    assert len(set(labels)) == len(kinds)
    assert max(map(len, labels)) < 120


def test_what_follows_from_another_setting_is_in_no_label_and_what_separates_is():
    runs = [
        {"method": "fixed", "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "epochs": 3, "width": 8},
        {"method": "fixed", "optimizer": "adam", "lr": 0.01, "epochs": 3, "width": 8},
        {"method": "fixed", "optimizer": "adam", "lr": 0.02, "epochs": 4, "width": 8},
    ]
    assert labels_of(runs) == ["sgd lr=0.1", "adam lr=0.01", "adam lr=0.02"]
    assert differing_settings(runs) == ["optimizer", "lr", "epochs"]
    assert labels_of(runs[:2]) == ["sgd", "adam"]
    assert labels_of(runs[:2], always=["method"]) == ["fixed sgd", "fixed adam"]
    assert labels_of(runs[:1]) == ["fixed"]
    assert labels_of([{}]) == ["run"]


FAST = [f"fast-cifar10-{size}" for size in ("small", "medium", "large")]


def test_a_recipe_is_named_where_main_settings_are_equal():
    runs = [run | {"recipe": name} for name, run in zip(FAST, published(*FAST), strict=True)]
    assert labels_of(runs) == FAST
    assert title_of(runs, [None] * 3).endswith(f"differing: recipe ({', '.join(FAST)})")
    assert {"backbone_options", "lr", "batch_size", "epochs"} < set(differing_settings(runs))
    slower = runs[0] | {"lr": 0.1}
    assert labels_of([runs[0], slower, runs[1]]) == [f"{FAST[0]} lr=0.375", f"{FAST[0]} lr=0.1", f"{FAST[1]} lr=1.5"]
    assert labels_of([runs[0], runs[0] | {"method": "fixed"}]) == ["linear", "fixed"]
    assert labels_of([runs[0], runs[0] | {"method": "fixed", "recipe": "other"}]) == ["linear", "fixed"]
    renamed = runs[0] | {"recipe": "other"}  # equal settings are repetitions of one experiment
    assert len(set(labels_of([runs[0], renamed, runs[1]]))) == 2


def test_options_of_the_network_come_before_the_learning_rate():
    runs = published(*FAST[:2], recipe=None)
    assert labels_of(runs) == ["backbone_options.widths=[32, 96, 128]", "backbone_options.widths=[64, 256, 256]"]
    assert labels_of([{"backbone_options": {"a": 1, "b": 2}}, {"backbone_options": {"a": 1}}]) == [
        "backbone_options.b=2",
        "backbone_options.b=default",
    ]


def test_a_value_stands_alone_where_it_is_clear():
    assert labels_of([{"data": "/x/fixed", "method": "standard"}, {"data": "/x/mnist", "method": "fixed"}]) == [
        "method=standard data=fixed",
        "method=fixed data=mnist",
    ]
    assert labels_of([{"data": "/x/10"}, {"data": "/x/20"}]) == ["data=10", "data=20"]
    assert labels_of([{"feature_dim": None}, {"feature_dim": 10}]) == ["feature_dim=default", "feature_dim=10"]
    assert labels_of([{"flip": True}, {"flip": False}]) == ["flip=true", "flip=false"]


@pytest.mark.parametrize(
    ("values", "short"),
    [
        (["/a/mnist", "/b/mnist", "mnist"], ["a/mnist", "b/mnist", "mnist"]),
        (["/a/x/mnist", "/b/x/mnist"], ["a/x/mnist", "b/x/mnist"]),
        ([r"C:\data\mnist", "user/cifar"], ["mnist", "cifar"]),
        (["one.module.Net", "two.module.Net"], ["one.module.Net", "two.module.Net"]),
        (["one.module.Net", "one.module.Other"], ["Net", "Other"]),
        (["x" * 50, "y"], ["x" * 29 + "…", "y"]),
        (["x" * 50, "x" * 51], ["x" * 50, "x" * 51]),
        ([0.05, 1e-4, None, True], ["0.05", "0.0001", "", "true"]),
    ],
)
def test_short_values_stay_different(values, short):
    assert short_values(values) == short


def test_titles_name_each_main_setting_once():
    settings = {"method": "fixed", "loss": "mse", "backbone": "mlp", "optimizer": "sgd", "data": "digits"}
    other = {"method": "means", "loss": "nonl", "backbone": "vgg13", "optimizer": "adam", "data": "mnist"}
    for name in settings:
        title = title_of([settings, settings | {name: other[name]}], ["digits: 5 images", None])
        common, _, differing = title.partition("differing: ")
        assert differing == f"{name} ({settings[name]}, {other[name]})"
        for shared in set(settings) - {name}:
            assert title.count(settings[shared]) == 1, title
            assert settings[shared] in common
    options = [settings | {"loss_options": {"prior": prior}} for prior in (0.0, 0.5)]
    assert title_of(options, [None, None]).endswith("; differing: loss_options (2 values)")
    many = [settings | {"backbone": f"net{number}"} for number in range(9)]
    assert title_of(many, [None] * 9).endswith("differing: backbone (9 values)")
    assert set(settings) < set(MAIN)
