"""Detection of unknown inputs: AUROC against NC1 over the epochs of runs, and distributions of scores."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from neuralcollapse.catalogue import METRICS
from neuralcollapse.lab.figures import draw
from neuralcollapse.lab.figures.panels import save_figures
from neuralcollapse.lab.results.groups import RunGroups
from neuralcollapse.metrics.figures.curves import line_styles, set_log_scale
from neuralcollapse.metrics.figures.panels import Panel, literal, without_latex, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from neuralcollapse.lab.results.folder import RunFolder
    from neuralcollapse.ood import Evaluation

NC1 = "nc1_quotient"
NC1_LABEL = METRICS[NC1].label.replace("  $", "\n$")  # words and formula on two lines


def detection(runs: RunGroups) -> list[Panel]:
    """Return a panel per group and set: AUROC of each score against NC1 of the train split, epoch by epoch."""
    rates = runs.detection
    panels = []
    for label in runs.groups:
        sets = rates[rates["method"] == label]["set"].unique()
        for name in sets if len(sets) else [""]:
            title = ": ".join([*([label] if len(runs.groups) > 1 else []), *([name] if name else [])])
            draw_panel = partial(_draw_against_nc1, runs=runs, label=label, name=name)
            stem = "-".join(part for part in (runs.stems[label], name) if part)
            panels.append(Panel(stem, literal(wrapped(title)), draw_panel))
    return panels


def detection_of_scores(runs: RunGroups) -> list[Panel]:
    """Return a panel per set and score: AUROC of each group against NC1 of the train split, epoch by epoch."""
    rates = runs.detection
    pairs = [*dict.fromkeys(zip(rates["set"], rates["score"], strict=True))] or [("", "")]
    pairs.sort(key=lambda pair: [*rates["set"].unique()].index(pair[0]) if len(rates) else 0)
    several = rates["set"].nunique() > 1
    return [
        Panel(
            "-".join(part for part in (name, score) if part),
            literal(f"{name}: {score}" if several else score),
            partial(_draw_score, runs=runs, name=name, score=score),
        )
        for name, score in pairs
    ]


def write_detection(run: RunFolder, evaluation: Evaluation, epoch: int, out: Path) -> list[Path]:
    """Draw the distributions of the scores, one page per set, and AUROC against NC1; return the files.

    Args:
        run: Folder of the run.
        evaluation: Rates and scores at the epoch.
        epoch: Number of trained epochs.
        out: Folder to write to.
    """
    sets = dict.fromkeys(row.set for row in evaluation.rows)
    written = [path for name in sets for path in _write_distributions(run, evaluation, name, epoch, out)]
    return [*written, *draw("detection", RunGroups([run]), out, ["png"])]


@without_latex()
def _write_distributions(run: RunFolder, evaluation: Evaluation, name: str, epoch: int, out: Path) -> list[Path]:
    scores = {
        score: {"test": values["test"], name: values[name]}
        for score, values in evaluation.scores.items()
        if not any(values[of].isnan().any() for of in ("test", name))
    }
    if not scores:
        return []
    figure = replace(evaluation, scores=scores).plot()
    figure.suptitle(literal(f"{run.path.name}, epoch {epoch}: distributions of scores"), fontsize=10)
    return save_figures({f"scores-{name}": figure}, out, ["png"])


def _draw_against_nc1(axes: Axes, *, runs: RunGroups, label: str, name: str) -> None:
    """Draw AUROC of each score on a set, for one group."""
    points = _points(runs, (runs.detection["method"] == label) & (runs.detection["set"] == name))
    styles = line_styles(list(points["score"].unique()), markers=True)
    for score, of_score in points.groupby("score", sort=False):
        _draw_course(axes, of_score, label=str(score), **styles[str(score)])
    _finish(axes, points)


def _draw_score(axes: Axes, *, runs: RunGroups, name: str, score: str) -> None:
    """Draw AUROC of one score on a set, for each group."""
    points = _points(runs, (runs.detection["score"] == score) & (runs.detection["set"] == name))
    styles = line_styles(list(runs.groups), markers=True)
    for label, of_label in points.groupby("method", sort=False):
        _draw_course(axes, of_label, label=literal(str(label)), **styles[str(label)])
    _finish(axes, points)


def with_nc1(runs: RunGroups, values: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a table with their NC1 of the train split (value_nc1); rows without it are left out.

    Args:
        runs: The runs.
        values: Columns method, seed, epoch, value, of these runs.
    """
    metrics, keys = runs.metrics, ["method", "seed", "epoch"]
    collapse = metrics[(metrics["split"] == "train") & (metrics["metric"] == NC1)]
    points = values.merge(collapse[[*keys, "value"]], on=keys, suffixes=("", "_nc1"))
    return points[np.isfinite(points["value"]) & np.isfinite(points["value_nc1"])]


def label_axes(axes: Axes, ylabel: str) -> None:
    """Label axes whose horizontal one is NC1, and turn it, so that collapse is to the right."""
    axes.invert_xaxis()
    axes.set_xlabel(NC1_LABEL, fontsize=8, linespacing=1.5)
    axes.set_ylabel(ylabel, fontsize=8)
    axes.grid(alpha=0.3, linewidth=0.5)


def _points(runs: RunGroups, chosen: pd.Series) -> pd.DataFrame:
    """Return the AUROC (value) and the NC1 (value_nc1) at each epoch of chosen rows of the detection rates.

    Raises:
        ValueError: if no epoch has finite values of both.
    """
    rates = runs.detection[chosen & (runs.detection["metric"] == "auroc")]
    if rates.empty:
        raise ValueError("no detection rates: run `neuralcollapse detect`")
    points = with_nc1(runs, rates)
    if points.empty:
        raise ValueError(f"no finite AUROC at an epoch with a finite {NC1}")
    return points


def _draw_course(axes: Axes, points: pd.DataFrame, **style: Any) -> None:
    means = _means(points)
    axes.plot(means["value_nc1"], means["value"], linewidth=1.2, markersize=4, **style)


def _finish(axes: Axes, points: pd.DataFrame) -> None:
    if not set_log_scale(axes, "x", points["value_nc1"]):
        axes.xaxis.set_major_locator(MaxNLocator(4))
    label_axes(axes, "AUROC")


def _means(points: pd.DataFrame) -> pd.DataFrame:
    """Return the means over seeds, one row per epoch."""
    return points.groupby("epoch")[["value", "value_nc1"]].mean()
