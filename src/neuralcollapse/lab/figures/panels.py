"""Figures as files: a page of panels, one file per panel, and a check that matplotlib can draw."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from neuralcollapse.lab.results.files import write_whole
from neuralcollapse.metrics.figures.panels import Panel, draw_page, draw_single, thin_ticks, without_latex


@without_latex()
def check_drawing() -> None:
    """Draw a small figure, so that invalid settings of matplotlib raise an error before training instead of after it.

    Raises:
        ValueError: if matplotlib cannot draw.
    """
    figure = Figure(figsize=(1, 1))
    figure.text(0, 0, "text and $x^2$")
    try:
        figure.savefig(io.BytesIO(), format="png")
    except Exception as error:  # fonts and settings can make matplotlib raise any exception
        reason = str(error) or type(error).__name__
        raise ValueError(f"matplotlib cannot draw with {matplotlib.matplotlib_fname()}: {reason}") from error


@without_latex()
def write_panels(
    name: str, title: str, panels: Sequence[Panel], out: Path, formats: Sequence[str], *, columns: int = 3
) -> list[Path]:
    """Write a page of all panels and, if there are several, each panel at the width of a printed column.

    Args:
        name: Name of the figure, with which its file names begin.
        title: Title of the page.
        panels: Panels to draw.
        out: Folder to write to.
        formats: File formats: ``"png"``, ``"pdf"``, ``"svg"``.
        columns: Maximum number of columns of the page.

    Returns:
        The written files.
    """
    figures: dict[str, Figure] = {name: draw_page(title, panels, columns)}
    if len(panels) > 1:
        for panel in panels:
            figures[f"{name}-{panel.name}"] = draw_single(panel)
    return save_figures(figures, out, formats)


@without_latex()
def save_figures(figures: dict[str, Figure], out: Path, formats: Sequence[str]) -> list[Path]:
    """Write each figure in every format, and return the files."""
    written = []
    for name, figure in figures.items():
        thin_ticks(figure)
        for kind in formats:
            path = out / f"{name}.{kind}"
            write_whole(path, partial(figure.savefig, format=kind, dpi=150))
            written.append(path)
    return written
