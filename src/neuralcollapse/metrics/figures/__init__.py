"""Registry of the figures of measurements; importing this module imports neither torch nor matplotlib."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FigureEntry:
    """Entry of a figure in a registry.

    Attributes:
        description: Short description of the content.
        panels: Module and name of the function that returns the panels; imported when the figure is drawn.
        columns: Number of columns of the page.
    """

    description: str
    panels: str
    columns: int = 3

    def title(self, subject: str) -> str:
        """Return the title of the page that shows this figure of a subject."""
        return f"{self.description[0].upper()}{self.description[1:]}: {subject}"


_HERE = f"{__name__}."
FIGURES = {
    "papyan": FigureEntry("Figures 1 to 7 of Papyan, Han, Donoho 2020", f"{_HERE}published:papyan", 4),
    "zhu": FigureEntry("NC1 to NC4 and accuracies, as Figures 3 and 6 of Zhu et al. 2021", f"{_HERE}published:zhu"),
    "markou": FigureEntry(
        "accuracy, NC, ETF distances and margins, as Markou et al. 2024 show them", f"{_HERE}published:markou", 4
    ),
    "margins": FigureEntry("sorted cosine margins of all samples", f"{_HERE}published:margins", 2),
    "layers": FigureEntry("collapse of every measured layer against its depth", f"{_HERE}published:layers", 2),
    "profile": FigureEntry(
        "error of the nearest class mean by layer and epoch, effective depth", f"{_HERE}published:profile"
    ),
    "classes": FigureEntry("norms, variances and cosines of every class", f"{_HERE}published:classes", 4),
    "features": FigureEntry(
        "features of three classes on their plane, from epoch to epoch", f"{_HERE}features:feature_panels"
    ),
    "overview": FigureEntry("every metric", f"{_HERE}curves:overview"),
}
"""Figures that need only measurements, by name."""
