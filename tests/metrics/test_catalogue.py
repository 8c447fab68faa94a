"""The catalogue of metrics, and that the measured values agree with it."""

from __future__ import annotations

import inspect
import math
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import neuralcollapse
from helpers import generator
from neuralcollapse.catalogue import METRICS, OfClasses, in_order
from neuralcollapse.metrics import ClassMoments, collapse_metrics, measure
from neuralcollapse.metrics.collapse import find_function

METRICS_FOLDER = Path(neuralcollapse.__file__).parent / "metrics"
DOCS = Path(__file__).parents[2] / "docs"


def test_the_documentation_has_a_table_of_the_catalogue():
    pytest.importorskip("latex2mathml")
    hooks = runpy.run_path(str(DOCS / "hooks.py"))
    page = hooks["on_page_markdown"]((DOCS / "metrics.md").read_text())
    rows = re.findall(r"^\| `(\w+)` \| .* \|$", page, re.M)
    assert [name for name in rows if name in METRICS] == list(METRICS)
    assert all(row.count("|") == 6 for row in hooks["metrics_table"]().splitlines())


@pytest.mark.parametrize("name", [name for name, entry in METRICS.items() if entry.function])
def test_functions_of_the_catalogue_exist_and_take_as_many_arguments_as_they_have_inputs(name):
    function, entry = find_function(METRICS[name].function), METRICS[name]
    parameters = list(inspect.signature(function).parameters.values())
    required = [parameter for parameter in parameters if parameter.default is inspect.Parameter.empty]
    assert len(required) <= len(entry.inputs) <= len(parameters)


def test_a_new_entry_is_computed_reported_and_recomputed(monkeypatch):
    """An entry is all that a metric needs besides its function."""
    new = {
        "of_moments": replace(METRICS["effective_rank_means"], name="of_moments"),
        "of_pairs": replace(METRICS["nc2_equiangular_weights"], name="of_pairs", statistic="variance"),
        "of_samples": replace(METRICS["alignment"], name="of_samples", statistic="class mean"),
    }
    for name, entry in new.items():
        monkeypatch.setitem(METRICS, name, entry)
    features, targets = torch.randn(20, 4, generator=generator()), torch.arange(20) % 3
    measurement = measure(nn.Sequential(nn.Identity(), nn.Linear(4, 3)), [(features, targets)], progress=False)
    metrics = measurement.metrics
    assert metrics["of_moments"] == metrics["effective_rank_means"]
    assert metrics["of_pairs"] > 0
    assert metrics["of_samples"] == pytest.approx(metrics["alignment"], abs=0.1)
    assert measurement.recompute(center="classes").metrics.keys() & new.keys() == {"of_moments", "of_pairs"}
    assert measurement.recompute(pairwise=False).metrics.keys() & new.keys() == {"of_moments", "of_samples"}
    with pytest.warns(UserWarning, match="of_moments"):
        equal = measure(nn.Sequential(nn.Identity(), nn.Linear(4, 3)), [(features * 0, targets)], progress=False)
    assert equal.undefined.keys() >= {"of_moments", "of_samples"}


def test_every_condition_of_the_catalogue_is_one_that_can_hold():
    known = re.findall(r'Condition\(\s*"([\w ]+)"', "".join(path.read_text() for path in METRICS_FOLDER.glob("*.py")))
    named = set().union(*(entry.conditions for entry in METRICS.values()))
    assert named == set(known)


def test_labels_are_valid_mathtext_that_fits_into_one_column():
    mathtext = pytest.importorskip("matplotlib.mathtext")
    read = mathtext.MathTextParser("path").parse
    for name, metric in METRICS.items():
        assert 0 < read(metric.label, dpi=72)[0] < 300, name
        assert metric.label.count("$") in (0, 2), name


def test_metrics_are_returned_in_the_catalogue_s_order():
    moments = ClassMoments(3, 4, class_scatter=True)
    moments.update(torch.randn(20, 4, generator=generator()), torch.arange(20) % 3)
    values = collapse_metrics(moments, torch.randn(3, 4), ood_mean=torch.ones(4))
    assert list(values) == [name for name in METRICS if name in values]
    assert list(in_order({"mine": 1, "nc5_ood": 2, "nc1_vci": 3})) == ["nc1_vci", "nc5_ood", "mine"]


@pytest.mark.parametrize("num_classes", [2, 3, 10])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_values_are_in_range(num_classes, scale):
    targets = torch.arange(40) % num_classes
    means = scale * torch.randn(num_classes, 12, generator=generator(1))
    moments = ClassMoments(num_classes, 12, class_scatter=True)
    moments.update(means[targets] + torch.randn(40, 12, generator=generator(2)), targets)
    weight = torch.randn(num_classes, 12, generator=generator(3))
    for name, value in collapse_metrics(moments, weight, ood_mean=means[0]).items():
        low, high = METRICS[name].range
        high = high(num_classes) if isinstance(high, OfClasses) else high
        assert low - 1e-12 <= value <= high + 1e-12, name


def test_values_at_collapse_are_in_range():
    for name, metric in METRICS.items():
        value = metric.value_at_collapse(10)
        if value is not None:
            high = metric.range[1](10) if isinstance(metric.range[1], OfClasses) else metric.range[1]
            assert metric.range[0] <= value <= high < math.inf or high == math.inf, name


def test_importing_the_catalogue_needs_neither_torch_nor_matplotlib():
    """Of the package itself, which another test holds to be light, only the folder is taken."""
    package = Path(__file__).parents[2] / "src" / "neuralcollapse"
    code = f"""
import sys, types
package = types.ModuleType("neuralcollapse"); package.__path__ = [{str(package)!r}]
sys.modules["neuralcollapse"] = package
import neuralcollapse.catalogue
print([name for name in ("torch", "numpy", "matplotlib", "torchmetrics") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
