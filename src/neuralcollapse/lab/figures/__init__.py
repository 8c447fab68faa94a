"""Registry of the figures of runs, which are drawn from run folders alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from neuralcollapse.metrics.figures import FIGURES as OF_RECORDS
from neuralcollapse.metrics.figures import FigureEntry

if TYPE_CHECKING:
    from neuralcollapse.lab.results.groups import RunGroups

FORMATS = ("png", "pdf", "svg")


FIGURES = {name: entry for name, entry in OF_RECORDS.items() if name != "overview"}
FIGURES |= {
    "gradient-flow": FigureEntry(
        "mean and largest gradient of each layer, and of features, class means, W and b",
        f"{__name__}.gradients:gradient_flow",
    ),
    "time": FigureEntry("accuracy and NC1 to NC3 against training time", f"{__name__}.time:against_time", 2),
    "trade-off": FigureEntry(
        "test accuracy against NC1 to NC3 at the last epoch", f"{__name__}.trade_off:trade_off", 3
    ),
    "groups": FigureEntry(
        "test accuracy and train NC1 of classes with many and few training images",
        f"{__name__}.groups:groups_of_classes",
        2,
    ),
    "detection": FigureEntry("detection of unknown inputs against NC1", f"{__name__}.detection:detection"),
    "detection-scores": FigureEntry(
        "detection of unknown inputs against NC1, one panel per score", f"{__name__}.detection:detection_of_scores", 4
    ),
    "control": FigureEntry(
        "NC1 of layers, and transfer and detection against NC1, at the last epoch", f"{__name__}.control:control"
    ),
    "overview": OF_RECORDS["overview"],
}
"""Figures of run folders by name: those of measurements, and those that need the tables of a run."""


def draw(name: str, runs: RunGroups, out: Path, formats: Sequence[str]) -> list[Path]:
    """Draw a figure of the registry: one page of all its panels, and one file per panel.

    Args:
        name: Name of the figure, a key of `FIGURES`.
        runs: Runs to draw.
        out: Folder to write to.
        formats: File formats from `FORMATS`.

    Returns:
        The written files.
    """
    from neuralcollapse.lab.figures.panels import save_figures, write_panels

    entry = FIGURES[name]
    title, make = entry.title(runs.title), resolve_name(entry.panels)
    if name == "overview":  # only a page, because there are too many panels for the layout engine of matplotlib
        return save_figures({name: make(runs, title)}, out, formats)
    return write_panels(name, title, make(runs), out, formats, columns=entry.columns)
