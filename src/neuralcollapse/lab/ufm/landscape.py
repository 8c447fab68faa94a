"""Critical points of the unconstrained features model: their tables, and a figure of the curvature at saddles."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from neuralcollapse.heads import LearnedClassifier
from neuralcollapse.lab.figures.summary import made_by, write_summary
from neuralcollapse.lab.results.files import write_csv, write_whole
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.tables import aligned
from neuralcollapse.lab.ufm.settings import LandscapeSettings
from neuralcollapse.metrics.figures.curves import line_styles
from neuralcollapse.metrics.figures.panels import without_latex
from neuralcollapse.ufm import (
    UnconstrainedFeatures,
    Visit,
    hessian_extremes,
    loss_slice,
    origin_curvature,
    survey,
)

_EIGENVALUES, _STEPS = 60, 81


def survey_landscape(
    settings: LandscapeSettings, folder: RunFolder, *, overwrite: bool = False
) -> tuple[str, list[Path]]:
    """Find and classify critical points, and write their tables, figure and summary.

    Returns:
        The table of points as text, and the written files, beginning with the most informative.
    """
    num_classes, feature_dim = settings.num_classes, settings.feature_dim or settings.num_classes
    model = UnconstrainedFeatures(
        num_classes,
        settings.samples_per_class,
        feature_dim,
        LearnedClassifier(feature_dim, num_classes),
        weight_decay=settings.weight_decay,
        feature_decay=settings.feature_decay,
    )
    generator = torch.Generator().manual_seed(settings.seed)
    visits = survey(model, starts=settings.starts, generator=generator)
    first = next(visits)  # invalid sizes are refused here, before anything is deleted
    groups = sum(num_classes % number == 0 for number in range(1, num_classes))
    total, hidden = settings.starts + 2 * groups, not sys.stderr.isatty()
    with folder.writing(settings.in_force(), overwrite=overwrite):
        folder.begin({"reported": True})
        bar = tqdm(chain([first], visits), total=total, unit="point", dynamic_ncols=True, disable=hidden)
        tables = tabulate(bar, generator)
        bound = origin_curvature(num_classes, settings.samples_per_class, settings.weight_decay, settings.feature_decay)
        return write_landscape(folder, tables, settings.title, bound)


@dataclass
class LandscapeTables:
    """Rows of the tables of a survey.

    Attributes:
        points: name, kind, objective, excess (over the optimum), gradient_norm, least_eigenvalue, iterations.
        spectrum: name, index, eigenvalue: the least eigenvalues of the Hessian at each saddle and at one optimum.
        slices: name, step, objective: along the direction of most negative curvature of each saddle.
        optimum: Minimum of f, in closed form.
    """

    points: list[dict[str, Any]] = field(default_factory=list)
    spectrum: list[dict[str, Any]] = field(default_factory=list)
    slices: list[dict[str, Any]] = field(default_factory=list)
    optimum: float = math.nan

    def frames(self) -> dict[str, pd.DataFrame]:
        """Return the tables by name, as data frames."""
        return {name: pd.DataFrame(getattr(self, name)) for name in ("points", "spectrum", "slices")}


def tabulate(visits: Iterable[Visit], generator: torch.Generator) -> LandscapeTables:
    """Tabulate the points of a survey, with the lower edge of the Hessian's spectrum and slices of f.

    Args:
        visits: Points of `survey`.
        generator: Generator of the start vectors of the eigenvalue solver.
    """
    tables = LandscapeTables()
    for visit in visits:
        point = visit.point
        if point.optimum is not None:
            tables.optimum = point.optimum
        tables.points.append(
            {
                "name": visit.name,
                "kind": point.kind,
                "objective": point.objective,
                "excess": point.objective - tables.optimum,
                "gradient_norm": point.gradient_norm,
                "least_eigenvalue": point.least_eigenvalue,
                "iterations": visit.iterations,
            }
        )
        if visit.name == "from origin":
            _add_spectrum(tables, "the optimum", visit, generator)
        elif visit.constructed:
            _add_spectrum(tables, visit.name, visit, generator)
            _add_slice(tables, visit)
    return tables


def write_landscape(folder: RunFolder, tables: LandscapeTables, title: str, bound: float) -> tuple[str, list[Path]]:
    """Write the tables, the figure and the summary of a survey.

    Args:
        folder: Folder to write to.
        tables: Tables of the survey.
        title: Sizes and decays of the model.
        bound: Least eigenvalue of the Hessian at the origin, by its formula.

    Returns:
        The table of points as text, and the written files, beginning with the most informative.
    """
    frames = tables.frames()
    paths = {name: folder.path / f"{name}.csv" for name in frames}
    for name, path in paths.items():
        write_csv(path, frames[name])
    figure = _draw(frames["spectrum"], frames["slices"], title, tables.optimum, bound)
    picture = folder.figures / "landscape.png"
    write_whole(picture, partial(figure.savefig, format="png", dpi=130))
    table = aligned(_table_of_points(frames["points"]))
    explanation = (
        f"`excess` is f minus its value at the global optimum, {tables.optimum:.10g}, in closed form. Random starts\n"
        "are in one row, with the largest value of each column (for eigenvalues, the smallest). By the formula, the\n"
        f"least eigenvalue at the origin is {bound:.6g}."
    )
    write_summary(folder, f"The landscape: {title}", [table, explanation], [picture], made_by(folder))
    return table, [folder.summary, picture, *paths.values(), folder.config]


def _add_spectrum(tables: LandscapeTables, name: str, visit: Visit, generator: torch.Generator) -> None:
    parameters = sum(parameter.numel() for parameter in visit.model.parameters())
    least = hessian_extremes(visit.model, count=min(_EIGENVALUES, parameters - 1), generator=generator).least.tolist()
    tables.spectrum += [{"name": name, "index": i, "eigenvalue": value} for i, value in enumerate(least, 1)]


def _add_slice(tables: LandscapeTables, visit: Visit) -> None:
    if visit.point.direction is None:
        return
    reach = 3 * math.sqrt(visit.model.num_classes)
    steps = torch.linspace(-reach, reach, _STEPS, dtype=torch.float64)
    values = loss_slice(visit.model, visit.point.direction, steps).tolist()
    tables.slices += [
        {"name": visit.name, "step": step, "objective": value}
        for step, value in zip(steps.tolist(), values, strict=True)
    ]


def _table_of_points(points: pd.DataFrame) -> pd.DataFrame:
    """Return one row for all random starts that end at the same kind of point, and one row for every other point."""
    random = points["name"].str.startswith("start ")
    groups = [
        (f"{len(group)} random starts", kind, group) for kind, group in points[random].groupby("kind", sort=False)
    ]
    groups += [
        (group["name"].iloc[0], group["kind"].iloc[0], group)
        for _, group in points[~random].groupby("name", sort=False)
    ]
    return pd.DataFrame(
        [
            {
                "point": name,
                "kind": kind,
                "excess": f"{group['excess'].max():.2g}",
                "gradient norm": f"{group['gradient_norm'].max():.1e}",
                "least eigenvalue": f"{group['least_eigenvalue'].min():.3g}",
                "iterations": f"{group['iterations'].max():.0f}",
            }
            for name, kind, group in groups
        ]
    )


@without_latex()
def _draw(spectrum: pd.DataFrame, slices: pd.DataFrame, title: str, optimum: float, bound: float) -> Figure:
    figure = Figure(figsize=(11, 4), layout="constrained")
    edge, line = figure.subplots(1, 2)
    styles = line_styles(list(spectrum["name"].unique()), markers=False)
    for name, group in spectrum.groupby("name", sort=False):
        edge.plot(group["index"], group["eigenvalue"], label=name, **styles[str(name)])
        along = slices[slices["name"] == name]
        if not along.empty:
            line.plot(along["step"], along["objective"], label=name, **styles[str(name)])
    edge.axhline(bound, color="grey", linewidth=0.8, linestyle=":", label="the formula at the origin")
    edge.set(title="the least eigenvalues of the Hessian", xlabel="number", ylabel="eigenvalue")
    line.axhline(optimum, color="grey", linewidth=0.8, linestyle=":", label="the global optimum")
    line.set(title="f along the most negative curvature", xlabel="step", ylabel="f")
    for axes in (edge, line):
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure
