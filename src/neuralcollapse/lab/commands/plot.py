"""`neuralcollapse plot`: the published figures, from run folders alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from neuralcollapse.lab.commands.runs import Outcome, add_runs, new_files, runs_of
from neuralcollapse.lab.settings import Settings, nearest

if TYPE_CHECKING:
    from neuralcollapse.lab.figures.page import Runs

# Name: what it shows, and the columns of its page.
FIGURES = {
    "papyan": ("Figures 1 to 7 of Papyan, Han, Donoho 2020", 4),
    "zhu": ("NC1 to NC4 and accuracies, as Figures 3 and 6 of Zhu et al. 2021", 3),
    "markou": ("accuracy, NC, ETF distances and margins, as Markou et al. 2024 show them", 4),
    "gradient-flow": ("mean and largest gradient of each layer, and of features, class means, W and b", 3),
    "margins": ("sorted cosine margins of all samples", 2),
    "layers": ("collapse of every measured layer against its depth", 2),
    "classes": ("norms, variances and cosines of every class", 4),
    "features": ("features of three classes on their plane, from epoch to epoch", 3),
    "overview": ("every metric", 1),
}
FORMATS = ("png", "pdf", "svg")
SUMMARY = "the published figures, from one run or several side by side"
USAGE = "RUN [RUN ...] --figure NAME --out FOLDER [--format png,pdf,svg] [--overwrite]"
DESCRIPTION = (
    "Draw a figure from the tables and records in run folders: a page of all its panels, and each panel by itself at "
    "the width of a column of print. Runs that differ in their seed alone are one line, with a band over the seeds. "
    "Figures: " + "; ".join(f"{name} ({words})" for name, (words, _) in FIGURES.items()) + "."
)
SECTIONS: tuple[type[Settings], ...] = ()


def add_arguments(parser: ArgumentParser) -> None:
    """Add what the command takes."""
    add_runs(parser)
    parser.add_argument("--figure", type=str, metavar="NAME", help=f"one of {', '.join(FIGURES)}")
    parser.add_argument("--out", type=str, metavar="FOLDER", help="where to write; by default figures")
    parser.add_argument("--format", type=str, metavar="A,B", help="of png, pdf and svg; by default png")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")


def run(settings: Namespace) -> int:
    """Draw, and say what was written."""
    name, out = settings.get("figure") or "", Path(settings.get("out") or "figures")
    formats = [kind.strip() for kind in (settings.get("format") or "png").split(",")]
    if name not in FIGURES:
        raise ValueError(f"figure must be one of {', '.join(FIGURES)}, got {name!r}{nearest(name, FIGURES)}")
    if wrong := [kind for kind in formats if kind not in FORMATS]:
        raise ValueError(f"format must be of {', '.join(FORMATS)}, got {wrong[0]!r}")
    folders = runs_of(settings.runs)

    from neuralcollapse.lab.figures import page

    runs, outcome = page.Runs(folders), Outcome()
    with new_files(page.files_of([name], out, formats), overwrite=bool(settings.get("overwrite"))):
        outcome.written = draw(name, runs, out, formats)
    outcome.sound(runs.problems.values())
    return outcome.report("")


def draw(name: str, runs: Runs, out: Path, formats: Sequence[str]) -> list[Path]:
    """Write a figure of runs; the files."""
    from neuralcollapse.lab.figures import page, projection, published, records
    from neuralcollapse.lab.figures.curves import draw_all

    words, columns = FIGURES[name]
    title = f"{words[0].upper()}{words[1:]}: {runs.title}"
    if name == "overview":
        table = runs.metrics
        figure = draw_all(table[table["split"] == "train"], title, runs.num_classes)
        return page.save_figures({name: figure}, out, formats)
    make = {
        "papyan": published.papyan,
        "zhu": published.zhu,
        "markou": published.markou,
        "gradient-flow": published.gradient_flow,
        "margins": records.margin_panels,
        "layers": records.layer_panels,
        "classes": records.class_panels,
        "features": projection.feature_panels,
    }
    return page.write_panels(name, title, make[name](runs), out, formats, columns=columns)
