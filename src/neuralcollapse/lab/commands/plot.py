"""`neuralcollapse plot`: published figures, drawn from run folders alone."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from neuralcollapse.lab.commands import Command
from neuralcollapse.lab.commands.common import Outcome, add_runs, new_files, option, runs_of
from neuralcollapse.lab.figures import FIGURES, FORMATS, draw
from neuralcollapse.lab.settings import closest_names


def _add_arguments(parser: ArgumentParser) -> None:
    add_runs(parser)
    parser.add_argument("--figure", metavar="NAME", help=f"one of {', '.join(FIGURES)}")
    parser.add_argument("--out", metavar="FOLDER", help="folder to write; by default figures")
    parser.add_argument("--format", metavar="A,B", help="formats, from png, pdf and svg; by default png")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")


def _run(settings: Namespace) -> int:
    name, out = option(settings, "figure", default=""), Path(option(settings, "out", default="figures"))
    formats = option(settings, "format", list[str], ["png"])
    if name not in FIGURES:
        raise ValueError(f"figure must be one of {', '.join(FIGURES)}, got {name!r}{closest_names(name, FIGURES)}")
    if wrong := [extension for extension in formats if extension not in FORMATS]:
        raise ValueError(f"format must be of {', '.join(FORMATS)}, got {wrong[0]!r}")
    folders = runs_of(settings.runs)

    from neuralcollapse.lab.results.groups import RunGroups

    runs, outcome = RunGroups(folders), Outcome()
    pages = [out / f"{name}.{extension}" for extension in formats]
    with new_files(pages, overwrite=bool(settings.get("overwrite"))):
        outcome.written = draw(name, runs, out, formats)
    outcome.valid(runs.problems.values())
    return outcome.report()


PLOT = Command(
    "Draw a figure from the tables and records in run folders: a page of all its panels, and each panel in a file with "
    "the width of a printed column. Runs that differ only in their seed are one line, with a band over the seeds. "
    "Figures: " + "; ".join(f"{name} ({figure.description})" for name, figure in FIGURES.items()) + ".",
    _add_arguments,
    _run,
)
