"""The catalogue: one place for what each metric is, and everything measured is in it."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import generator
from neuralcollapse.catalogue import METRICS, OfClasses, in_order, table, with_table
from neuralcollapse.metrics import ClassMoments, collapse_metrics

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_the_documented_table_is_the_catalogue_s():
    text = DOCUMENT.read_text()
    assert with_table(text) == text, "run: python -m neuralcollapse.catalogue docs/metrics.md"
    assert table().count("\n") == len(METRICS) + 1


def test_a_document_without_markers_is_refused():
    with pytest.raises(ValueError, match="table of the catalogue: begin"):
        with_table("# Metrics")


def test_labels_are_mathematics_that_matplotlib_reads_and_fit_into_one_column():
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
def test_values_lie_in_their_range(num_classes, scale):
    targets = torch.arange(40) % num_classes
    means = scale * torch.randn(num_classes, 12, generator=generator(1))
    moments = ClassMoments(num_classes, 12, class_scatter=True)
    moments.update(means[targets] + torch.randn(40, 12, generator=generator(2)), targets)
    weight = torch.randn(num_classes, 12, generator=generator(3))
    for name, value in collapse_metrics(moments, weight, ood_mean=means[0]).items():
        low, high = METRICS[name].range
        high = high(num_classes) if isinstance(high, OfClasses) else high
        assert low - 1e-12 <= value <= high + 1e-12, name


def test_values_at_collapse_lie_in_their_range():
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
