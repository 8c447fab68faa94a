"""Figures in the folder of a run or a comparison."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from neuralcollapse.catalogue import METRICS
from neuralcollapse.lab.results.files import write_whole
from neuralcollapse.metrics.figures.curves import draw_all, draw_metric
from neuralcollapse.metrics.figures.panels import add_legend, draw_or_write_reason, literal, without_latex, wrapped

if TYPE_CHECKING:
    import pandas as pd

# Metrics of the figures in the folder of a run or a comparison, by file name.
_FIGURES = {
    "accuracy.png": "accuracy",
    "nc1.png": "nc1_quotient",
    "nc2.png": "nc2_etf_means",
    "nc3.png": "nc3_duality",
    "nc4.png": "nc4_ncc_mismatch",
}


@without_latex()
def draw_figures(metrics: pd.DataFrame, folder: Path, title: str, num_classes: int | None = None) -> list[Path]:
    """Draw the main metrics of a run or a comparison on both splits, and a page of all metrics of the train split.

    Args:
        metrics: Columns method, seed, epoch, split, metric, value.
        folder: Folder to write to.
        title: Model and data.
        num_classes: K, for values at collapse that depend on it.

    Returns:
        The written files.
    """
    seeds = metrics["seed"].nunique()
    title += f"; mean, and range of {seeds} seeds" if seeds > 1 else ""
    for file, name in _FIGURES.items():
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, split in zip(panels, ("train", "test"), strict=True):
            axes.set(title=f"{split} split", xlabel="epoch")
            measured = metrics[metrics["split"] == split]
            draw_or_write_reason(axes, partial(draw_metric, metrics=measured, name=name, num_classes=num_classes))
        panels[0].set_ylabel(METRICS[name].label)
        add_legend(figure, panels)
        figure.suptitle(literal(wrapped(title, 9)), fontsize=10)
        write_whole(folder / file, partial(figure.savefig, format="png", dpi=150))
    overview = folder / "all_metrics.png"
    figure = draw_all(metrics[metrics["split"] == "train"], title, num_classes)
    write_whole(overview, partial(figure.savefig, format="png", dpi=100))
    return [*(folder / name for name in _FIGURES), overview]
