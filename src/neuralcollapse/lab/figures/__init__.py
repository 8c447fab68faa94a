"""Figures of runs, drawn from their folders alone, and their registry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neuralcollapse.lab.results.groups import RunGroups

FORMATS = ("png", "pdf", "svg")


@dataclass(frozen=True)
class FigureEntry:
    """A figure of the registry.

    Attributes:
        description: What it shows, in a few words.
        panels: Module and name of the function that returns its panels; imported when the figure is drawn.
        columns: Number of columns of its page.
    """

    description: str
    panels: str
    columns: int = 3


FIGURES = {
    "papyan": FigureEntry("Figures 1 to 7 of Papyan, Han, Donoho 2020", "published:papyan", 4),
    "zhu": FigureEntry("NC1 to NC4 and accuracies, as Figures 3 and 6 of Zhu et al. 2021", "published:zhu"),
    "markou": FigureEntry(
        "accuracy, NC, ETF distances and margins, as Markou et al. 2024 show them", "published:markou", 4
    ),
    "gradient-flow": FigureEntry(
        "mean and largest gradient of each layer, and of features, class means, W and b", "published:gradient_flow"
    ),
    "margins": FigureEntry("sorted cosine margins of all samples", "published:margins", 2),
    "layers": FigureEntry("collapse of every measured layer against its depth", "published:layers", 2),
    "classes": FigureEntry("norms, variances and cosines of every class", "published:classes", 4),
    "features": FigureEntry("features of three classes on their plane, from epoch to epoch", "features:feature_panels"),
    "detection": FigureEntry("detection of unknown inputs against NC1", "detection:detection"),
    "detection-scores": FigureEntry(
        "detection of unknown inputs against NC1, one panel per score", "detection:detection_of_scores", 4
    ),
    "overview": FigureEntry("every metric", "curves:overview"),
}


def draw(name: str, runs: RunGroups, out: Path, formats: Sequence[str]) -> list[Path]:
    """Draw a figure of the registry: one page of all its panels, and one file per panel.

    Args:
        name: Name of the figure, a key of `FIGURES`.
        runs: Runs to draw.
        out: Folder to write to.
        formats: File formats, of `FORMATS`.

    Returns:
        The files written.
    """
    from neuralcollapse.lab.figures.panels import save_figures, write_panels

    entry = FIGURES[name]
    title = f"{entry.description[0].upper()}{entry.description[1:]}: {runs.title}"
    make = resolve_name(f"{__name__}.{entry.panels}")
    if name == "overview":  # a page without single panels, whose number is too large for matplotlib's layout
        return save_figures({name: make(runs, title)}, out, formats)
    return write_panels(name, title, make(runs), out, formats, columns=entry.columns)
