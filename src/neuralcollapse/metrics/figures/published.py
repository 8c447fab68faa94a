"""Panels of published figures and of figures of single records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from neuralcollapse.catalogue import METRICS
from neuralcollapse.metrics.figures.curves import COLORS, draw_band, draw_range, finish_axes, line_styles, metric_label
from neuralcollapse.metrics.figures.panels import Panel, legend_above, literal, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from neuralcollapse.metrics import ClassValues, Measurement
    from neuralcollapse.metrics.figures.records import Shown

Series = Sequence[tuple[str, str, str]]  # metric, split, words of the legend
_SERIES_LINES: tuple[Any, ...] = ("-", "--", ":", "-.")
_EPOCHS = colormaps["viridis_r"]
_OF_LAYERS = ("nc1_quotient", "nc1_cdnv", "nc2_etf_means", "nc2_equiangular_means")


def papyan(runs: Shown) -> list[Panel]:
    """Return the panels of Figures 1 to 7 of Papyan, Han, Donoho (PNAS 2020)."""
    rows: list[tuple[str, str, Series]] = [
        ("1-accuracy", "1: accuracy", [("accuracy", "train", "train"), ("accuracy", "test", "test")]),
        ("2-equinorm", "2: equal norms", _pair("nc2_equinorm")),
        ("3-equiangular", "3: equal angles", _pair("nc2_equiangular")),
        ("4-max-angle", "4: maximal angle", _pair("nc2_max_angle")),
        ("5-duality", "5: classifier meets means", [("nc3_distance", "train", "")]),
        ("6-within-class", "6: within-class variation", [("nc1_pinv", "train", "")]),
        ("7-nearest-mean", "7: nearest class mean", [("nc4_ncc_mismatch", s, s) for s in ("train", "test")]),
    ]
    draw = partial(draw_series, runs=runs, by_marker=True)
    return [Panel(name, title, partial(draw, series=series)) for name, title, series in rows]


def zhu(runs: Shown) -> list[Panel]:
    """Return NC1 to NC4 and the accuracies, as in Figures 3 and 6 of Zhu et al. (NeurIPS 2021)."""
    rows: list[tuple[str, str, Series]] = [
        ("nc1", "NC1", [("nc1_pinv", "train", "")]),
        ("nc2", "NC2", [("nc2_etf_weights", "train", "")]),
        ("nc3", "NC3", [("nc3_duality", "train", "")]),
        ("nc4", "NC4", [("nc4_bias", "train", "")]),
        ("train-accuracy", "train accuracy", [("accuracy", "train", "")]),
        ("test-accuracy", "test accuracy", [("accuracy", "test", "")]),
    ]
    return [Panel(name, title, partial(draw_series, runs=runs, series=series)) for name, title, series in rows]


def markou(runs: Shown) -> list[Panel]:
    """Return accuracy, NC, ETF distances and margins, as in Markou, Ajanthan, Gould (NeurIPS 2024)."""
    names = ["nc1_pinv", "nc1_vci", "nc2_etf_means", "nc2_equinorm_difference", "nc3_duality", "alignment"]
    names += ["nc4_ncc_mismatch", "nc2_cos_margin"]
    names += ["etf_weights", "etf_means", "etf_between", "etf_weights_reference", "etf_means_reference"]
    rows: list[tuple[str, str, Series]] = [
        (f"{split}-accuracy", f"{split} accuracy", [("accuracy", split, "")]) for split in ("train", "test")
    ]
    rows += [(name, metric_label(name, runs.metrics).split("  $")[0], [(name, "train", "")]) for name in names]
    panels = [Panel(name, title, partial(draw_series, runs=runs, series=series)) for name, title, series in rows]
    return panels + margins(runs)


def margins(runs: Shown) -> list[Panel]:
    """Return the sorted cosine margins of all samples of each split at the last epoch."""
    return [
        Panel(f"margins-{split}", f"cosine margins, {split}", partial(_draw_margins, runs=runs, split=split))
        for split in ("train", "test")
    ]


def layers(runs: Shown) -> list[Panel]:
    """Return the collapse of every measured layer against its depth at the last epoch."""
    return [
        Panel(name, METRICS[name].label.replace("  $", "\n$"), partial(_draw_layers, runs=runs, name=name))
        for name in _OF_LAYERS
    ]


def profile(runs: Shown) -> list[Panel]:
    """Return the error of the nearest class mean in each layer at each epoch, by group, and the effective depth."""
    panels = [
        Panel(runs.stems[label], literal(wrapped(label)), partial(_draw_profile, runs=runs, label=label))
        for label in runs.groups
    ]
    series = [("effective_depth", runs.split, "")]
    return [*panels, Panel("effective-depth", "effective depth", partial(draw_series, runs=runs, series=series))]


def classes(runs: Shown) -> list[Panel]:
    """Return norms, variances and cosines of all classes at the last epoch, for the first run of each group."""
    rows: list[tuple[str, str, Callable[..., None]]] = [
        ("norms", "norms", _draw_norms),
        ("variances", "within-class variance", _draw_variances),
        ("means", "cosines of means", partial(_draw_cosines, of="means")),
        ("weights", "cosines of weights", partial(_draw_cosines, of="weights")),
    ]
    return [
        Panel(
            f"{runs.stems[label]}-{name}",
            literal(wrapped(f"{label}: {words}")),
            partial(draw, runs=runs, label=label),
        )
        for label in runs.groups
        for name, words, draw in rows
    ]


def draw_series(axes: Axes, *, runs: Shown, series: Series, by_marker: bool = False) -> None:
    """Draw metrics of all groups against the epoch.

    Args:
        axes: Axes to draw on.
        runs: Runs to draw.
        series: One metric, drawn with one line style per group; or several metrics, each drawn with one line style,
            with one marker per group.
        by_marker: Distinguish groups by markers even for a single metric, as in panels of several metrics.

    Raises:
        ValueError: if the first metric was not measured.
    """
    table, drawn = runs.metrics, []
    by_marker = by_marker or len(series) > 1
    styles = line_styles(list(runs.groups), markers=by_marker or None)
    for (name, split, _), line in zip(series, _SERIES_LINES, strict=False):
        values = table[(table["metric"] == name) & (table["split"] == split)]
        for label, group in values.groupby("method", sort=False):
            style = styles[str(label)] | ({"linestyle": line} if by_marker else {})
            draw_band(axes, group, label=literal(str(label)), **style)
        drawn.append(values["value"])
    name, split, _ = series[0]
    shown = pd.concat(drawn)
    if shown.empty:
        hint = runs.hint("distance" if name.startswith("etf_") else "measure")
        raise ValueError(f"{name} was not measured on the {split} split{hint}")
    finish_axes(axes, shown, name, runs.num_classes)
    axes.set_xlabel("epoch", fontsize=8)
    label = METRICS[name].label.replace("  $", "\n$") if len(series) == 1 else ""
    axes.set_ylabel(label, fontsize=8, linespacing=1.5)
    if len(series) > 1:
        lines = [Line2D([], [], color="0.3", linestyle=line) for _, line in zip(series, _SERIES_LINES, strict=False)]
        legend_above(axes, lines, [words for *_, words in series])


def class_cosines(record: Measurement, of: Literal["means", "weights"], most: int | None = None) -> np.ndarray:
    """Return the cosines (K, K) between centred class means or classifier rows; NaN on the diagonal.

    Args:
        record: The measurement.
        of: Vectors to compare. Cosines with the mean of a class without samples are NaN.
        most: Compare only the given number of first classes; by default all.

    Raises:
        ValueError: if the matrix does not fit into memory, or classifier rows are requested without a measured
            classifier.
    """
    import torch

    from neuralcollapse._checks import check_memory
    from neuralcollapse.metrics import class_statistics
    from neuralcollapse.metrics.pairs import PairTile

    if of == "weights" and not len(record.weight):
        raise ValueError("no classifier was measured")
    size = min(record.num_classes, most or record.num_classes)
    check_memory(2 * 8 * size**2, f"cosines of {size} classes")
    numbers, vectors = torch.arange(record.num_classes), record.weight
    if of == "means":
        statistics = class_statistics(record.moments)
        numbers, vectors = statistics.classes, statistics.centred_means
    compared = numbers < size
    matrix = torch.full((size, size), torch.nan, dtype=torch.float64)
    rows = numbers[compared]
    matrix[rows[:, None], rows] = PairTile.of_all(vectors[compared].double()).cosines
    return np.asarray(matrix.fill_diagonal_(torch.nan))


def _pair(name: str) -> Series:
    return [(f"{name}_{of}", "train", of) for of in ("means", "weights")]


def _draw_margins(axes: Axes, *, runs: Shown, split: str) -> None:
    styles = line_styles(list(runs.groups))
    share = np.linspace(0, 1, 400)
    for label in runs.groups:
        values = [record.cos_margins.numpy() for record in runs.last_records(label, split)]
        defined = [margins[np.isfinite(margins)] for margins in values if np.isfinite(margins).any()]
        if defined:
            quantiles = np.stack([np.quantile(margins, share) for margins in defined])
            style = styles[label] | {"markevery": len(share) // 6}
            draw_range(axes, 100 * share, *_mean_and_range(quantiles), label=literal(label), **style)
    if not axes.lines:
        raise ValueError(f"no cosine margin of the {split} split is defined")
    if runs.num_classes:
        collapsed = runs.num_classes / (runs.num_classes - 1)
        axes.axhline(collapsed, color="0.4", linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
    axes.set_xlabel("share of samples below, in %", fontsize=8)
    axes.set_ylabel("cosine margin", fontsize=8)
    axes.grid(alpha=0.3, linewidth=0.5)


def _draw_layers(axes: Axes, *, runs: Shown, name: str) -> None:
    styles, drawn = line_styles(list(runs.groups), markers=True), []
    for label in runs.groups:
        records = [record for record in runs.last_records(label, runs.split) if record.layers]
        if records:
            values = np.array(
                [[*(layer[name] for layer in record.layers.values()), record.metrics[name]] for record in records]
            )
            depths = range(1, values.shape[1] + 1)
            draw_range(axes, depths, *_mean_and_range(values), label=literal(label), **styles[label])
            drawn.append(values)
    if not drawn:
        raise ValueError(f"no layers were measured{runs.hint('measure --layers A,B')}")
    finish_axes(axes, pd.Series(np.concatenate(drawn).ravel()), name, runs.num_classes)
    axes.set_xlabel("layer, the classifier's features last", fontsize=8)


def _draw_profile(axes: Axes, *, runs: Shown, label: str) -> None:
    """Draw one line per epoch, from light to dark, for the first run of a group."""
    records = {epoch: runs.record(label, runs.split, epoch) for epoch in runs.epochs(label, runs.split)}
    records = {epoch: one for epoch, one in records.items() if "ncc_error" in one.metrics and one.layers}
    if not records:
        raise ValueError(f"no probes of layers were measured{runs.hint('measure --layers blocks --probes')}")
    for number, (epoch, record) in enumerate(records.items(), start=1):
        errors = record.profile().metrics["ncc_error"]
        shade = _EPOCHS(0.15 + 0.75 * number / len(records))
        axes.plot(range(1, len(errors) + 1), errors, color=shade, marker="o", markersize=3, label=f"epoch {epoch}")
    axes.set_yscale("symlog", linthresh=0.01)  # errors from 0 to chance; 0.01 is the threshold of the effective depth
    axes.set_ylim(bottom=0)
    axes.axhline(0.01, color="0.4", linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
    axes.set_yticks([0, 0.01, 0.1, 1], ["0", "1%", "10%", "100%"])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer, the classifier's features last", fontsize=8)
    axes.set_ylabel(METRICS["ncc_error"].label, fontsize=8)
    axes.legend(fontsize=6)
    axes.grid(alpha=0.3, linewidth=0.5)


def _mean_and_range(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return values.mean(0), values.min(0), values.max(0)


def _values_of_classes(runs: Shown, label: str) -> ClassValues:
    from neuralcollapse.metrics import class_values

    record = runs.last_records(label, runs.split)[0]
    return class_values(record.moments, record.weight if len(record.weight) else None)


def _draw_norms(axes: Axes, *, runs: Shown, label: str) -> None:
    values, lines = _values_of_classes(runs, label), []
    for norms, marker, color in ((values.mean_norms, "o-", COLORS[0]), (values.weight_norms, "s--", COLORS[1])):
        if norms is not None:
            lines += axes.plot(values.classes, norms / norms.mean(), marker, color=color, markersize=3, linewidth=0.8)
    legend_above(axes, lines, ["centred means", "weights"][: len(lines)])
    axes.set_ylabel("norm / mean norm", fontsize=8)
    _number_classes(axes)
    axes.grid(alpha=0.3, linewidth=0.5)


def _draw_variances(axes: Axes, *, runs: Shown, label: str) -> None:
    values = _values_of_classes(runs, label)
    axes.bar(values.classes.numpy(), values.within_class_variances.numpy(), color=COLORS[0])
    axes.set_ylabel("mean squared distance to the mean", fontsize=8)
    _number_classes(axes)


def _number_classes(axes: Axes) -> None:
    axes.set_xlabel("class", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _draw_cosines(axes: Axes, *, runs: Shown, label: str, of: Literal["means", "weights"]) -> None:
    cosines = class_cosines(runs.last_records(label, runs.split)[0], of)
    ideal = -1 / (len(cosines) - 1)
    spread = max(float(np.nanmax(np.abs(cosines - ideal))), 0.02)
    picture = axes.imshow(cosines, cmap="cividis", vmin=ideal - spread, vmax=ideal + spread)
    bar = axes.figure.colorbar(picture, ax=axes, shrink=0.85)
    bar.ax.axhline(ideal, color="white", linewidth=1.5)
    bar.ax.tick_params(labelsize=7)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel(f"class; the line at {ideal:.2f} is an ETF's", fontsize=8)
