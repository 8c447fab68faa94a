"""Panels of figures, the page that holds them, and their text, legends and ticks."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _HEIGHT = 3.4, 2.7  # inches: a column of print
_LETTERS, _LETTERS_OF_LEGEND = 13, 16  # characters per inch
_LEGEND, _LINE = 8, 3.5  # font size of a legend in points, and the length of its lines in font sizes


@contextmanager
def without_latex() -> Iterator[None]:
    """Draw text without LaTeX, whatever the matplotlibrc says: it may be missing, and has more special characters."""
    with matplotlib.rc_context({"text.usetex": False}):
        yield


def literal(text: str) -> str:
    """Escape the dollar signs in a user's text, such as a folder name, which matplotlib would read as formulas."""
    return text.replace("$", r"\$")


def wrapped(text: str, width: float = _WIDTH, letters: int = _LETTERS) -> str:
    """Break a text into lines of a given width in inches, by default the width of a panel."""
    return textwrap.fill(text, max(1, int(letters * width)), break_on_hyphens=False)


class Page(Figure):
    """Figure that notebooks show as a picture."""

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        with without_latex():
            self.savefig(picture, format="png", dpi=100)
        return picture.getvalue()


@dataclass(frozen=True)
class Panel:
    """One set of axes.

    Attributes:
        name: Last part of the panel's file name.
        title: Title above the axes.
        draw: Function that draws on the axes. If it raises a ValueError, the message is written in the panel.
    """

    name: str
    title: str
    draw: Callable[[Axes], None]


@without_latex()
def draw_page(title: str, panels: Sequence[Panel], columns: int) -> Page:
    """Draw all panels on one page.

    Args:
        title: Title of the page.
        panels: Panels to draw.
        columns: Maximum number of columns.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    width = _WIDTH * columns
    title = wrapped(title, width)
    height = _HEIGHT * rows + 0.2 * (title.count("\n") + 2)
    page = Page(figsize=(width, height), layout="constrained")
    for axes, panel in zip(page.subplots(rows, columns, squeeze=False).flat, panels, strict=False):
        _draw(panel, axes)
    add_legend(page, page.axes)
    for axes in list(page.axes)[len(panels) :]:
        if axes.get_label() != "<colorbar>" and not axes.has_data():
            axes.remove()
    page.suptitle(literal(title), fontsize=10)
    return page


@without_latex()
def draw_single(panel: Panel) -> Figure:
    """Draw a panel at the width of a column of print."""
    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    _draw(panel, figure.subplots())
    add_legend(figure, figure.axes)
    return figure


def add_legend(figure: Figure, panels: Iterable[Axes], *, outside: bool = True) -> float:
    """Add one legend of all lines and bars below the panels, in as many columns as fit.

    Args:
        figure: The figure; its height is increased by that of the legend.
        panels: Axes whose labelled lines and bars are listed, each label once.
        outside: Whether the layout engine of the figure places the legend.

    Returns:
        Height of the legend in inches; 0 if there is at most one label, and hence no legend.
    """
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if len(handles) < 2:
        return 0.0
    renderer = FigureCanvasAgg(figure).get_renderer()
    line = (_LINE + 3) * _LEGEND * figure.dpi / 72  # with the space around the line
    labels = [wrapped(label, (figure.bbox.width - line) / figure.dpi, _LETTERS_OF_LEGEND) for label in handles]
    texts = [figure.text(0, 0, label, fontsize=_LEGEND) for label in labels]
    widest = max(text.get_window_extent(renderer).width for text in texts)
    for text in texts:
        text.remove()
    columns = min(len(handles), max(1, int(figure.bbox.width / (widest + line))))
    columns = -(-len(handles) // -(-len(handles) // columns))  # fill the rows evenly
    location: Any = "outside lower center" if outside else "lower center"
    style: Any = {"frameon": False, "fontsize": _LEGEND, "handlelength": _LINE}
    legend = figure.legend([*handles.values()], labels, loc=location, ncols=columns, **style)
    height = float(legend.get_window_extent(renderer).height / figure.dpi)
    figure.set_figheight(figure.get_figheight() + height)
    return height


def legend_above(axes: Axes, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Add a legend between the axes and their title."""
    location: Any = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "borderaxespad": 0.0, "ncols": len(labels)}
    axes.legend(handles, labels, frameon=False, fontsize=7, handlelength=3, **location)
    axes.set_title(axes.get_title(), fontsize=axes.title.get_fontsize(), pad=18)


def thin_ticks(figure: Figure) -> None:
    """Compute the layout once for all formats, and hide tick labels that overlap the previous one."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            last: Any = None
            for label in axis.get_ticklabels():
                box = label.get_window_extent(renderer)
                if not label.get_text() or not label.get_visible() or label.get_rotation() % 90:
                    continue
                if last is not None and box.expanded(1.02, 1.0).overlaps(last):
                    label.set_visible(False)
                else:
                    last = box


def draw_or_write_reason(axes: Axes, draw: Callable[[Axes], None]) -> None:
    """Draw; if this raises a ValueError, such as for values that were not measured, write its message in the axes."""
    try:
        draw(axes)
    except ValueError as error:
        title, size = axes.get_title(), axes.title.get_fontsize()
        axes.clear()
        axes.set_title(title, fontsize=size)
        axes.set_xticks([])
        axes.set_yticks([])
        reason = literal(textwrap.fill(str(error), 38))
        axes.text(0.5, 0.5, reason, ha="center", va="center", fontsize=8, transform=axes.transAxes)


def _draw(panel: Panel, axes: Axes) -> None:
    axes.set_title(panel.title, fontsize=9)
    axes.tick_params(labelsize=8, which="both")
    draw_or_write_reason(axes, panel.draw)
