"""Critical points of the unconstrained features model as tables."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch

from neuralcollapse.ufm import Visit, hessian_extremes, loss_slice

_EIGENVALUES, _STEPS = 60, 81


@dataclass
class LandscapeTables:
    """Rows of the tables of a survey.

    Attributes:
        points: name, kind, objective, excess (over the optimum), gradient_norm, least_eigenvalue, iterations.
        spectrum: name, index, eigenvalue: the least of the Hessian at each saddle and at one optimum.
        slices: name, step, objective: along each saddle's direction of most negative curvature.
        optimum: The least f, in closed form.
    """

    points: list[dict[str, Any]] = field(default_factory=list)
    spectrum: list[dict[str, Any]] = field(default_factory=list)
    slices: list[dict[str, Any]] = field(default_factory=list)
    optimum: float = math.nan

    def frames(self) -> dict[str, pd.DataFrame]:
        """Return the tables by name, as data frames."""
        return {name: pd.DataFrame(getattr(self, name)) for name in ("points", "spectrum", "slices")}


def tabulate(visits: Iterable[Visit], generator: torch.Generator) -> LandscapeTables:
    """Make the tables of a survey, with the spectrum's edge and the slices."""
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
