"""Panels, and the files they are written to: one each, and a page of all of them."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from neuralcollapse.lab.results.aggregation import gather_groups, group_runs
from neuralcollapse.lab.results.files import write_whole
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.labels import title_of
from neuralcollapse.lab.results.records import Records
from neuralcollapse.lab.results.tables import read_table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from neuralcollapse.metrics import Measurement

_WIDTH, _HEIGHT = 3.4, 2.7  # inches: a column of print
_LETTERS, _LETTERS_OF_LEGEND = 13, 16  # per inch
_LEGEND, _LINE = 8, 3.5  # points of its letters, and the length of its lines in letters


@contextmanager
def without_latex() -> Iterator[None]:
    """Draw with matplotlib's own text inside, whatever a matplotlibrc says: LaTeX may be missing, and reads more."""
    with matplotlib.rc_context({"text.usetex": False}):
        yield


def literal(text: str) -> str:
    """Escape the dollar signs of a text of the user's, such as a folder's name, which matplotlib takes for formulas."""
    return text.replace("$", r"\$")


def wrapped(text: str, width: float = _WIDTH, letters: int = _LETTERS) -> str:
    """Break a text into lines of a width in inches, by default that of a panel."""
    return textwrap.fill(text, max(1, int(letters * width)), break_on_hyphens=False)


@without_latex()
def check_drawing() -> None:
    """Draw a small figure, so that matplotlib's settings fail before a training and not after it.

    Raises:
        ValueError: if matplotlib cannot draw.
    """
    figure = Figure(figsize=(1, 1))
    figure.text(0, 0, "text and $x^2$")
    try:
        figure.savefig(io.BytesIO(), format="png")
    except Exception as error:  # whatever a font or a setting makes matplotlib raise
        reason = str(error) or type(error).__name__
        raise ValueError(f"matplotlib cannot draw with {matplotlib.matplotlib_fname()}: {reason}") from error


@dataclass(frozen=True)
class Panel:
    """One set of axes.

    Attributes:
        name: Of its file.
        title: What it shows.
        draw: Draws it; raises ValueError where it cannot be drawn, which is then said in the panel.
    """

    name: str
    title: str
    draw: Callable[[Axes], None]


class Runs:
    """Runs to draw together, in groups that differ in more than the seed.

    Args:
        runs: Which; or the groups themselves, by name.

    Attributes:
        groups: The runs of each group by its label, which says in what the groups differ.
        num_classes: K, where it is known.
        problems: What was wrong with files that could not be read, each once; the panels say it as well.

    Raises:
        ValueError: if they are of different numbers of classes, or one was not measured.
    """

    def __init__(self, runs: Sequence[RunFolder] | Mapping[str, Sequence[RunFolder]]) -> None:
        self.problems: dict[str, ValueError] = {}
        self._records: dict[Path, Records] = {}
        self.groups = runs if isinstance(runs, Mapping) else group_runs(runs, always=())
        found = (run.read_environment().get("num_classes") for group in self.groups.values() for run in group)
        classes = {number for number in found if number is not None}
        if len(classes) > 1:
            raise ValueError(
                f"runs that are shown together must have the same number of classes, got {sorted(classes)}"
            )
        self.num_classes: int | None = next(iter(classes), None)

    @property
    def title(self) -> str:
        """The settings that the runs share, and those in which they differ."""
        runs = [run for group in self.groups.values() for run in group]
        return title_of([run.settings() for run in runs], [run.read_environment().get("data") for run in runs])

    @cached_property
    def stems(self) -> dict[str, str]:
        """The part of a file's name that each group has."""
        stems: dict[str, str] = {}
        for label in self.groups:
            stem = re.sub(r"[^\w.=+-]+", "-", label)[:80]
            stems[label] = stem if stem not in stems.values() else f"{stem}-{len(stems) + 1}"
        return stems

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """What was measured: columns method (the group's name), seed, epoch, split, metric, value."""
        with self._noting_problems():
            return gather_groups(self.groups).rename(columns={"group": "method"})

    def gradients(self, label: str) -> list[pd.DataFrame]:
        """The table of gradients of each run of a group that has one.

        Raises:
            ValueError: if one cannot be read.
        """
        with self._noting_problems():
            return [read_table(run.gradients) for run in self.groups[label] if run.gradients.exists()]

    def last_records(self, label: str, split: str) -> list[Measurement]:
        """The last record of each run of a group.

        Raises:
            ValueError: A run has none, or it cannot be read.
        """
        return [self._load(run, split, None) for run in self.groups[label]]

    def epochs(self, label: str, split: str) -> list[int]:
        """The epochs of which the first run of a group has a record."""
        epochs = [epoch for epoch, of in self.groups[label][0].measured() if of == split]
        if not epochs:
            raise ValueError(_no_records(self.groups[label][0], split))
        return epochs

    def record(self, label: str, split: str, epoch: int) -> Measurement:
        """A record of the first run of a group.

        Raises:
            ValueError: It has none of that epoch, or it cannot be read.
        """
        return self._load(self.groups[label][0], split, epoch)

    def _load(self, run: RunFolder, split: str, epoch: int | None) -> Measurement:
        epochs = [of_epoch for of_epoch, of in run.measured() if of == split]
        if not epochs or (epoch is not None and epoch not in epochs):
            raise ValueError(_no_records(run, split))
        records = self._records.setdefault(run.path, Records(run))
        with self._noting_problems():
            return records.load(max(epochs) if epoch is None else epoch, split)

    @contextmanager
    def _noting_problems(self) -> Iterator[None]:
        """Keep what is wrong with a file that is read inside."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.problems.setdefault(str(error), ValueError(str(error)))
            raise


def _no_records(run: RunFolder, split: str) -> str:
    return f"no records of the {split} split in {run.path.name}: run `neuralcollapse measure`"


@without_latex()
def write_panels(
    name: str, title: str, panels: Sequence[Panel], out: Path, formats: Sequence[str], *, columns: int = 3
) -> list[Path]:
    """Write a page of all panels, and each by itself at the width of a column of print.

    Args:
        name: Of the figure, with which its files' names begin.
        title: Above the page.
        panels: What to draw.
        out: Folder.
        formats: ``"png"``, ``"pdf"``, ``"svg"``.
        columns: Of the page.

    Returns:
        The files written.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    width = _WIDTH * columns
    title = wrapped(title, width)
    height = _HEIGHT * rows + 0.2 * (title.count("\n") + 2)
    page = Figure(figsize=(width, height), layout="constrained")
    places = page.subplots(rows, columns, squeeze=False).flat
    for axes, panel in zip(places, panels, strict=False):
        _draw(panel, axes)
    add_legend(page, page.axes)
    for axes in list(page.axes)[len(panels) :]:
        if axes.get_label() != "<colorbar>" and not axes.has_data():
            axes.remove()
    page.suptitle(literal(title), fontsize=10)
    figures = {name: page}
    if len(panels) > 1:
        for panel in panels:
            figures[f"{name}-{panel.name}"] = figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
            _draw(panel, figure.subplots())
            add_legend(figure, figure.axes)
    return save_figures(figures, out, formats)


def add_legend(figure: Figure, panels: Iterable[Axes], *, outside: bool = True) -> float:
    """Write what the lines and bars of the panels are, below them, once each, in as many columns as there is room for.

    Args:
        figure: The figure, which becomes higher by the legend.
        panels: Its axes.
        outside: Let the figure's layout make the room.

    Returns:
        The legend's height in inches; 0 without one, where there is nothing to tell apart.
    """
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if len(handles) < 2:
        return 0.0
    renderer = FigureCanvasAgg(figure).get_renderer()
    line = (_LINE + 3) * _LEGEND * figure.dpi / 72  # with the space around it
    labels = [wrapped(label, (figure.bbox.width - line) / figure.dpi, _LETTERS_OF_LEGEND) for label in handles]
    texts = [figure.text(0, 0, label, fontsize=_LEGEND) for label in labels]
    widest = max(text.get_window_extent(renderer).width for text in texts)
    for text in texts:
        text.remove()
    columns = min(len(handles), max(1, int(figure.bbox.width / (widest + line))))
    columns = -(-len(handles) // -(-len(handles) // columns))  # as many as fill the rows evenly
    place: Any = "outside lower center" if outside else "lower center"
    style: Any = {"frameon": False, "fontsize": _LEGEND, "handlelength": _LINE}
    legend = figure.legend([*handles.values()], labels, loc=place, ncols=columns, **style)
    height = float(legend.get_window_extent(renderer).height / figure.dpi)
    figure.set_figheight(figure.get_figheight() + height)
    return height


def legend_above(axes: Axes, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Write what the lines of a panel are, between the panel and its title."""
    place: Any = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "borderaxespad": 0.0, "ncols": len(labels)}
    axes.legend(handles, labels, frameon=False, fontsize=7, handlelength=3, **place)
    axes.set_title(axes.get_title(), fontsize=axes.title.get_fontsize(), pad=18)


def files_of(names: Sequence[str], out: Path, formats: Sequence[str]) -> list[Path]:
    """The files of figures of these names."""
    return [out / f"{name}.{kind}" for name in names for kind in formats]


@without_latex()
def save_figures(figures: dict[str, Figure], out: Path, formats: Sequence[str]) -> list[Path]:
    """Write figures by name, each in every format."""
    written = []
    for name, figure in figures.items():
        thin_ticks(figure)
        for kind in formats:
            (path,) = files_of([name], out, [kind])
            write_whole(path, partial(figure.savefig, format=kind, dpi=150))
            written.append(path)
    return written


def thin_ticks(figure: Figure) -> None:
    """Lay the figure out, once for all formats, and hide tick labels that would overlap the one before them."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            before: Any = None
            for label in axis.get_ticklabels():
                box = label.get_window_extent(renderer)
                if not label.get_text() or not label.get_visible() or label.get_rotation() % 90:
                    continue
                if before is not None and box.expanded(1.02, 1.0).overlaps(before):
                    label.set_visible(False)
                else:
                    before = box


def draw_or_say_why(axes: Axes, draw: Callable[[Axes], None]) -> None:
    """Draw; or say in the axes why that cannot be done. A figure never ends a run."""
    try:
        draw(axes)
    except Exception as error:  # whatever a table of somebody's numbers makes matplotlib raise
        title, size = axes.get_title(), axes.title.get_fontsize()
        axes.clear()
        axes.set_title(title, fontsize=size)
        axes.set_xticks([])
        axes.set_yticks([])
        reason = literal(textwrap.fill(str(error) or type(error).__name__, 38))
        axes.text(0.5, 0.5, reason, ha="center", va="center", fontsize=8, transform=axes.transAxes)


def _draw(panel: Panel, axes: Axes) -> None:
    axes.set_title(panel.title, fontsize=9)
    axes.tick_params(labelsize=8, which="both")
    draw_or_say_why(axes, panel.draw)
