"""Profile of the layers of a model: collapse, errors of probes and rank, by depth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from neuralcollapse._html import html_table
from neuralcollapse.catalogue import METRICS
from neuralcollapse.metrics.moments import ClassMoments
from neuralcollapse.metrics.nc2 import nc2_one_vs_rest
from neuralcollapse.metrics.probes import EPSILON, effective_depth
from neuralcollapse.metrics.statistics import MeasureOptions, class_statistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neuralcollapse.metrics.measurement import Measurement

FEATURES = "features"  # name of the last layer, the input of the classifier
_ERRORS = ("ncc_error", "probe_error")
_SHOWN = ("nc1_quotient", "rank_me", *_ERRORS)


@dataclass(frozen=True)
class LayerProfile:
    """Collapse, errors of probes and rank of each layer of a model, in the order of the forward pass.

    `Measurement.profile` returns a profile. `plot` draws it, and `print` shows it as a table.

    Attributes:
        layers: Names of the layers; the last is ``"features"``, the input of the classifier.
        dimensions: Number of features d of each layer, after pooling.
        metrics: Dictionary from name to one value per layer: ``nc1_quotient``; ``rank_me`` (effective rank of the
            features); ``ncc_error`` and ``probe_error`` if they were measured (``probes=True``); and, if any layer has
            K > d + 1, ``nc2_one_vs_rest`` of the class means, the GNC2 of Jiang et al. (ICML 2024), which is NaN for
            the other layers.
        test_metrics: Errors of the other split, if such a measurement was given.
    """

    layers: tuple[str, ...]
    dimensions: tuple[int, ...]
    metrics: dict[str, tuple[float, ...]]
    test_metrics: dict[str, tuple[float, ...]]

    @classmethod
    def of(cls, measurement: Measurement, test: Measurement | None = None) -> LayerProfile:
        """Return the profile of a measurement, with the errors of another split.

        Args:
            measurement: Measurement of the train split, with layers.
            test: Measurement of another split, with the same layers.

        Raises:
            ValueError: if no layers were measured, or the other split has other layers or no probes.
        """
        if not measurement.layers:
            raise ValueError("profile needs measured layers, got none: use measure(..., layers='blocks', probes=True)")
        rows = _rows(measurement)
        names = [name for name in _SHOWN if all(name in values for values in rows)]
        metrics = {name: tuple(values[name] for values in rows) for name in names}
        moments = [*measurement.layer_moments.values(), measurement.moments]
        generalised = tuple(_generalised(of_layer, measurement.options) for of_layer in moments)
        if not all(map(math.isnan, generalised)):
            metrics["nc2_one_vs_rest"] = generalised
        of_test: dict[str, tuple[float, ...]] = {}
        if test is not None:
            if list(test.layers) != list(measurement.layers):
                raise ValueError(f"test must have the layers {list(measurement.layers)}, got {list(test.layers)}")
            if not all(name in values for values in _rows(test) for name in _ERRORS):
                raise ValueError("test must be measured with probes=True")
            of_test = {name: tuple(values[name] for values in _rows(test)) for name in _ERRORS}
        dimensions = tuple(of_layer.feature_dim for of_layer in moments)
        return cls((*measurement.layers, FEATURES), dimensions, metrics, of_test)

    def effective_depth(self, epsilon: float = EPSILON) -> int:
        """Return the number, from 1, of the first layer whose ``ncc_error`` is at most ε, or else of the last layer.

        Args:
            epsilon: ε, in [0, 1].

        Raises:
            ValueError: if the probes were not measured, or ``epsilon`` is out of range.

        Source: Galanti, Galanti & Ben-Shaul 2022 (arXiv 2202.09028).
        """
        if "ncc_error" not in self.metrics:
            raise ValueError("effective_depth needs errors of the nearest class mean: use measure(..., probes=True)")
        return effective_depth(self.metrics["ncc_error"], epsilon)

    def plot(self) -> Figure:
        """Draw NC1, the errors of both splits and the rank against depth, in one panel each; needs matplotlib."""
        from matplotlib.figure import Figure

        errors = [name for name in _ERRORS if name in self.metrics]
        panels = [["nc1_quotient"], *([errors] if errors else []), ["rank_me"]]
        panels += [["nc2_one_vs_rest"]] if "nc2_one_vs_rest" in self.metrics else []
        depth = range(1, len(self.layers) + 1)
        figure = Figure(figsize=(3.6 * len(panels), 3.4), layout="constrained")
        all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, names in zip(all_axes, panels, strict=True):
            for number, name in enumerate(names):
                label = "" if len(names) == 1 else METRICS[name].label
                splits = {"train": self.metrics[name]} | {"test": self.test_metrics.get(name, ())}
                for split, values in splits.items():
                    if values:
                        style: dict[str, Any] = {"color": f"C{number}", "linestyle": "-" if split == "train" else "--"}
                        legend = f"{label}, {split}" if self.test_metrics else label
                        axes.plot(depth, values, marker="o", markersize=4, linewidth=1.2, label=legend, **style)
            if len(names) > 1:
                axes.legend(fontsize=7)
                axes.axvline(self.effective_depth(), color="grey", linewidth=0.8, linestyle=":")
            axes.set_title(_title(names), fontsize=9)
            positive = [value for name in names for value in self.metrics[name] if value > 0]
            if names[0] == "nc1_quotient" and positive and max(positive) > 10 * min(positive):
                axes.set_yscale("log")
            axes.set_xticks(depth, [str(number) for number in depth])
            axes.set_xlabel("layer", fontsize=8)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3, linewidth=0.5)
        return figure

    def __repr__(self) -> str:
        caption, head, rows = self._table()
        cells = [head, *rows]
        widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
            ).rstrip()
            for row in cells
        ]
        return "\n".join([caption, *lines])

    def _repr_html_(self) -> str:
        return html_table(*self._table())

    def _table(self) -> tuple[str, list[str], list[list[str]]]:
        columns = dict(self.metrics) | {f"test {name}": values for name, values in self.test_metrics.items()}
        head = ["", "d", *columns]
        rows = [
            [f"{number} {name}", str(dimension), *(f"{values[number - 1]:.4g}" for values in columns.values())]
            for number, (name, dimension) in enumerate(zip(self.layers, self.dimensions, strict=True), start=1)
        ]
        depth = f", effective depth {self.effective_depth()} (ε = {EPSILON})" if "ncc_error" in self.metrics else ""
        return f"{len(self.layers)} layers{depth}", head, rows


def _rows(measurement: Measurement) -> list[dict[str, float]]:
    """Return the metrics of each layer, followed by those of the features."""
    return [*measurement.layers.values(), measurement.metrics]


def _title(names: list[str]) -> str:
    """Return the title of a panel."""
    titles = {
        "nc1_quotient": METRICS["nc1_quotient"].label,
        "rank_me": "effective rank (RankMe)",
        "nc2_one_vs_rest": "GNC2: least one-vs-rest distance",
    }
    return titles.get(names[0], "errors; dotted: effective depth")


def _generalised(moments: ClassMoments, options: MeasureOptions) -> float:
    """Return GNC2 of the class means if K > d + 1, else NaN."""
    means = class_statistics(moments, options).class_means
    if len(means) <= moments.feature_dim + 1 or moments.feature_dim < 2 or not bool(torch.isfinite(means).all()):
        return math.nan
    return float(nc2_one_vs_rest(means))
