"""The landscape of the unconstrained features model: its table, the spectrum's edge, the way out of each saddle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from neuralcollapse.lab.figures.curves import line_styles
from neuralcollapse.lab.figures.panels import without_latex
from neuralcollapse.lab.results.files import write_csv, write_whole
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.tables import aligned


def report_landscape(
    folder: RunFolder, tables: Mapping[str, pd.DataFrame], title: str, *, optimum: float, bound: float
) -> tuple[str, list[Path]]:
    """Write the tables, the summary and the figure; return the table and the files written, most telling first.

    Args:
        folder: Folder to write to.
        tables: ``points``, with the columns name, kind, objective, excess, gradient_norm, least_eigenvalue and
            iterations; ``spectrum``, the least eigenvalues of each point's Hessian: name, index, eigenvalue; and
            ``slices`` along the direction of most negative curvature: name, step, objective.
        title: The model.
        optimum: The least f.
        bound: The formula's least eigenvalue at the origin.
    """
    paths = {name: folder.path / f"{name}.csv" for name in tables}
    for name, path in paths.items():
        write_csv(path, tables[name])
    folder.figures.mkdir(parents=True, exist_ok=True)
    figure = folder.figures / "landscape.png"
    _draw(tables["spectrum"], tables["slices"], title, optimum, bound, figure)
    table, made = aligned(_table(tables["points"])), folder.read_environment()
    text = f"""# The landscape: {title}

{table}

`excess` is f less the global optimum's, {optimum:.10g}, in closed form. Random starts are in one row, with the largest
of each column (of the least eigenvalues the least). The formula's least eigenvalue at the origin is {bound:.6g}.

![landscape]({figure.relative_to(folder.path)})

Made by `{made["command"]}` with neuralcollapse {made["neuralcollapse"]} (torch {made["packages"]["torch"]}).
"""
    write_whole(folder.summary, lambda path: path.write_text(text, encoding="utf-8"))
    return table, [folder.summary, figure, *paths.values(), folder.config]


def _table(points: pd.DataFrame) -> pd.DataFrame:
    """One row for all random starts of a kind, and one for every other point."""
    random = points["name"].str.startswith("start ")
    groups = [
        (f"{len(group)} random starts", kind, group) for kind, group in points[random].groupby("kind", sort=False)
    ]
    groups += [
        (row["name"].iloc[0], row["kind"].iloc[0], row) for _, row in points[~random].groupby("name", sort=False)
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
def _draw(spectrum: pd.DataFrame, slices: pd.DataFrame, title: str, optimum: float, bound: float, path: Path) -> None:
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
    figure.savefig(path, dpi=130)
