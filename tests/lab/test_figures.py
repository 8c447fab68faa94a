"""Figures are drawn from tables alone."""

from __future__ import annotations

import re

import matplotlib
import pandas as pd
import pytest
from PIL import Image

from neuralcollapse.lab.figures.curves import draw_all, draw_figures
from neuralcollapse.lab.figures.page import Panel, check_drawing, literal, save_figures, write_panels
from neuralcollapse.metrics.catalogue import METRICS


def table(train: float, test: float) -> pd.DataFrame:
    """Every metric, falling by this factor over three epochs on each split."""
    rows = [
        (method, seed, epoch, split, name, factor ** (epoch - 1) * (1 + 0.1 * seed))
        for method in ("standard", "frame")
        for seed in (0, 1)
        for epoch in (1, 2, 3)
        for split, factor in (("train", train), ("test", test))
        for name in METRICS
    ]
    return pd.DataFrame(rows, columns=["method", "seed", "epoch", "split", "metric", "value"])


@pytest.mark.parametrize(("train", "test"), [(0.1, 0.9), (0.0, 1.0)])
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
    """The text of a picture whose text is kept as such."""
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
