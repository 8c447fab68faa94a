"""Figures from tables alone."""

from __future__ import annotations

import itertools
import re

import matplotlib
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from helpers import slow_except
from neuralcollapse.catalogue import METRICS
from neuralcollapse.lab.config import PUBLISHED_METHODS
from neuralcollapse.lab.figures.curves import draw_figures
from neuralcollapse.lab.figures.panels import check_drawing, save_figures, write_panels
from neuralcollapse.metrics.figures.curves import (
    RESERVED,
    draw_all,
    draw_metric,
    draw_points,
    line_styles,
    metric_label,
)
from neuralcollapse.metrics.figures.panels import Panel, add_legend, literal


def table(train: float, test: float) -> pd.DataFrame:
    """Return every metric over three epochs, multiplied by a factor per epoch on each split."""
    rows = [
        (method, seed, epoch, split, name, factor ** (epoch - 1) * (1 + 0.1 * seed))
        for method in ("standard", "frame")
        for seed in (0, 1)
        for epoch in (1, 2, 3)
        for split, factor in (("train", train), ("test", test))
        for name in METRICS
    ]
    return pd.DataFrame(rows, columns=["method", "seed", "epoch", "split", "metric", "value"])


@pytest.mark.parametrize(("train", "test"), slow_except([(0.1, 0.9), (0.0, 1.0)], [(0.0, 1.0)]))
def test_any_course_of_any_metric_can_be_drawn(train, test, tmp_path):
    files = draw_figures(table(train, test), tmp_path, "a run", 10)
    assert [file.name for file in files] == [
        *(f"{n}.png" for n in ("accuracy", "nc1", "nc2", "nc3", "nc4")),
        "all_metrics.png",
    ]
    for file in files:
        with Image.open(file) as picture:
            assert len(picture.convert("RGB").getcolors(10**7)) > 10


def few_metrics() -> pd.DataFrame:
    return table(0.5, 0.5).query("metric in ('accuracy', 'nc1_quotient')")


NAMES = ["cost_$\\frac{$", "$", "a $5 b", "$x$", r"\$x\$", r"$\notacommand$", "$$", "$a$ and $b", "100% #1 & ~ ^ _ {"]


def words_of(svg: str) -> str:
    """Return the text of an SVG file that stores text as text."""
    for code, character in (("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        svg = svg.replace(code, character)
    return re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_the_users_is_shown_as_it_is(name, tmp_path):
    draw = lambda axes: axes.plot([1, 2], label=literal(name)) and axes.legend()  # noqa: E731
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        (file,) = write_panels(
            "page", f"title {name}", [Panel("one", f"panel {literal(name)}", draw)], tmp_path, ["svg"]
        )
    words = words_of(file.read_text())
    for shown in (f">title {name}<", f">panel {name}<", f">{name}<"):
        assert shown in words


def test_runs_whose_names_hold_dollars_are_drawn(tmp_path):
    metrics = few_metrics().replace({"method": {"frame": NAMES[0], "standard": NAMES[1]}})
    assert all(path.stat().st_size for path in draw_figures(metrics, tmp_path, NAMES[0], 10))


def test_figures_need_no_latex(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with matplotlib.rc_context({"text.usetex": True}):
        check_drawing()
        assert draw_figures(few_metrics(), tmp_path / "figures", "a run", 10)
        figure = draw_all(few_metrics(), "a run", 10)
        assert save_figures({"overview": figure}, tmp_path / "figures", ["png", "pdf", "svg"])


def test_settings_that_matplotlib_cannot_draw_with_are_named_before_training():
    with (
        matplotlib.rc_context({"figure.facecolor": "none", "path.effects": [object()]}),
        pytest.raises(ValueError, match="matplotlib cannot draw with .*matplotlibrc"),
    ):
        check_drawing()


@pytest.mark.parametrize("number", [1, 2, 3, 4, 7, 8, 12])
def test_lines_of_up_to_twelve_groups_differ_without_colour(number):
    styles = line_styles([f"group {place}" for place in range(number)])
    without_colour = {(str(style["linestyle"]), style["marker"]) for style in styles.values()}
    assert len(without_colour) == number
    assert len({style["color"] for style in styles.values()}) == min(number, 8)
    many = line_styles([f"group {place}" for place in range(40)]).values()
    assert len({tuple(map(str, style.values())) for style in many}) == 40


def test_the_published_methods_always_have_the_same_styles():
    published = line_styles(list(PUBLISHED_METHODS))
    assert RESERVED == PUBLISHED_METHODS
    for labels in (["implicit", "standard"], ["frame", "fixed", "means"], ["a", "b", "standard", "c"]):
        styles = line_styles(labels, markers=False)
        assert len({style["color"] for style in styles.values()}) == len(labels)
        for label in labels:
            of_published = [name for name, style in published.items() if style["color"] == styles[label]["color"]]
            assert of_published == ([label] if label in published else [])


def drawn_on(rows: int, columns: int, groups: int, words: str = "standard resnet18 feature_dim") -> Figure:
    """Return a figure of lines with its legend, after layout."""
    figure = Figure(figsize=(3.4 * columns, 2.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes in panels:
        for label, style in line_styles([f"{words}={group}" for group in range(groups)]).items():
            axes.plot([1, 2], [0, len(label)], label=label, **style)
        axes.set(xlabel="epoch", title="title")
    add_legend(figure, figure.axes)
    figure.suptitle("title")
    FigureCanvasAgg(figure).draw()
    return figure


@pytest.mark.parametrize(("rows", "columns"), slow_except([(1, 1), (2, 3), (5, 4)], [(1, 1), (2, 3)]))
@pytest.mark.parametrize("groups", slow_except([2, 3, 8, 12], [2, 12]))
@pytest.mark.parametrize("words", ["adam", "standard resnet18 feature_dim", "a b c " * 12])
def test_a_legend_is_below_the_axes_and_inside_the_figure(rows, columns, groups, words):
    figure = drawn_on(rows, columns, groups, words)
    (legend,) = figure.legends
    renderer = FigureCanvasAgg(figure).get_renderer()
    box = legend.get_window_extent(renderer)
    assert [text.get_text().replace("\n", " ") for text in legend.get_texts()] == [
        f"{words}={group}" for group in range(groups)
    ]
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= figure.bbox.width
    for axes in figure.axes:
        assert axes.get_legend() is None
        assert box.y1 <= axes.get_tightbbox(renderer).y0
        assert axes.get_window_extent(renderer).height > 1.2 * figure.dpi  # the legend takes no space from a panel
    texts = [text.get_window_extent(renderer) for text in legend.get_texts()]
    assert not any(first.overlaps(second) for first, second in itertools.combinations(texts, 2))


def test_one_group_needs_no_legend():
    assert drawn_on(1, 1, 1).legends == []


@pytest.mark.parametrize("epochs", [[1], [1, 2], [2, 3], [1, 2, 3], [5, 10, 15], list(range(1, 201)), [0, 1000]])
def test_epochs_are_whole_numbers_once_each(epochs):
    rows = [("a run", 0, epoch, "train", "accuracy", 0.1 + 0.001 * epoch) for epoch in epochs]
    figure = Figure()
    axes = figure.subplots()
    draw_metric(axes, pd.DataFrame(rows, columns=list(table(1, 1))), "accuracy")
    FigureCanvasAgg(figure).draw()
    low, high = axes.get_xlim()
    ticks = [label for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
    texts = [label.get_text() for label in ticks]
    assert len(set(texts)) == len(texts) > 0
    assert all(re.fullmatch(r"\d+", text) for text in texts)


@pytest.mark.parametrize(("low", "high", "scale"), [(0.02, 0.4, "log"), (1e-4, 0.4, "log"), (0.3, 0.5, "linear")])
def test_labels_of_a_logarithmic_horizontal_axis_do_not_overlap(low, high, scale):
    points = pd.DataFrame({"method": ["fixed", "standard"], "value": [0.9, 0.8], "nc2": [low, high]})
    figure = Figure(figsize=(4, 3))
    axes = figure.subplots()
    draw_points(axes, points, "nc2", ["fixed", "standard"])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    assert axes.get_xscale() == scale
    shown = [label for label in axes.get_xticklabels(which="both") if label.get_text()]
    boxes = [label.get_window_extent(canvas.get_renderer()) for label in shown]
    assert len(boxes) >= 2
    assert not any(first.overlaps(second) for first, second in itertools.combinations(boxes, 2))


def test_distances_to_a_reference_epoch_name_it():
    rows = [(epoch, "train", "etf_reference_epoch", 7.0) for epoch in (1, 7)]
    rows += [(epoch, "train", "etf_means_reference", 0.5) for epoch in (1, 7)]
    metrics = pd.DataFrame(rows, columns=["epoch", "split", "metric", "value"])
    assert metric_label("etf_means_reference", metrics).startswith("ETF of means to reference, epoch 7  $")
    assert metric_label("etf_means", metrics) == METRICS["etf_means"].label


def test_values_that_are_not_defined_stay_so_in_a_table_and_are_counted(tmp_path):
    from neuralcollapse.lab.results.tables import add_rows, read_table, spread

    path = tmp_path / "metrics.csv"
    add_rows(path, [(1, "train", "nc1_pinv", float("nan")), (1, "train", "accuracy", 0.5)])
    add_rows(path, [(2, "train", "nc1_pinv", 0.25)])
    values = read_table(path).set_index(["epoch", "metric"])["value"]
    assert values.isna().tolist() == [True, False, False]
    assert values[2, "nc1_pinv"] == 0.25
    assert spread(values, "{:.3f}") == "0.375 ± 0.177 (2 of 3)"
    assert spread(values.iloc[:1], "{:.3f}") == "nan"
    assert spread(values.iloc[1:], "{:.3f}") == "0.375 ± 0.177"
