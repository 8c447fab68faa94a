"""`neuralcollapse plot`: the published figures, from run folders alone."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from neuralcollapse.lab.commands.runs import Outcome, add_runs, new_files, runs_of
from neuralcollapse.lab.figures import FIGURES, FORMATS, draw
from neuralcollapse.lab.settings import Settings, nearest

SUMMARY = "the published figures, from one run or several side by side"
USAGE = "RUN [RUN ...] --figure NAME --out FOLDER [--format png,pdf,svg] [--overwrite]"
DESCRIPTION = (
    "Draw a figure from the tables and records in run folders: a page of all its panels, and each panel by itself at "
    "the width of a column of print. Runs that differ in their seed alone are one line, with a band over the seeds. "
    "Figures: " + "; ".join(f"{name} ({figure.description})" for name, figure in FIGURES.items()) + "."
)
SECTIONS: tuple[type[Settings], ...] = ()


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_runs(parser)
    parser.add_argument("--figure", type=str, metavar="NAME", help=f"one of {', '.join(FIGURES)}")
    parser.add_argument("--out", type=str, metavar="FOLDER", help="where to write; by default figures")
    parser.add_argument("--format", type=str, metavar="A,B", help="of png, pdf and svg; by default png")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")


def run(settings: Namespace) -> int:
    """Draw a figure, and print the files written."""
    name, out = settings.get("figure") or "", Path(settings.get("out") or "figures")
    formats = [kind.strip() for kind in (settings.get("format") or "png").split(",")]
    if name not in FIGURES:
        raise ValueError(f"figure must be one of {', '.join(FIGURES)}, got {name!r}{nearest(name, FIGURES)}")
    if wrong := [kind for kind in formats if kind not in FORMATS]:
        raise ValueError(f"format must be of {', '.join(FORMATS)}, got {wrong[0]!r}")
    folders = runs_of(settings.runs)

    from neuralcollapse.lab.results.groups import RunGroups

    runs, outcome = RunGroups(folders), Outcome()
    with new_files([out / f"{name}.{kind}" for kind in formats], overwrite=bool(settings.get("overwrite"))):
        outcome.written = draw(name, runs, out, formats)
    outcome.sound(runs.problems.values())
    return outcome.report("")
