"""`neuralcollapse report`: one HTML page, from run folders alone."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from neuralcollapse.lab.commands.runs import Outcome, add_runs, new_file, new_files, runs_of
from neuralcollapse.lab.settings import Settings

SUMMARY = "one self-contained HTML page of one run or several"
USAGE = "RUN [RUN ...] --out FILE.html [--classes A,B,C[,D]] [--overwrite]"
DESCRIPTION = (
    "Write a page that needs nothing but a browser: tables, interactive figures of every metric over epochs, cosines "
    "of the classes, and class means, classifier rows and features of three or four classes as they collapse, from "
    "epoch to epoch. Runs that differ in their seed alone are one line, with a band over the seeds."
)
SECTIONS: tuple[type[Settings], ...] = ()


def add_arguments(parser: ArgumentParser) -> None:
    """Add what the command takes."""
    add_runs(parser)
    parser.add_argument("--out", type=str, metavar="FILE", help="the page, ending in .html; by default report.html")
    parser.add_argument(
        "--classes",
        type=str,
        metavar="A,B,C",
        help="three classes (a plane) or four (a space); by default the first three",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")


def run(settings: Namespace) -> int:
    """Write the page, and say so."""
    out = Path(settings.get("out") or "report.html")
    if out.suffix not in (".html", ".htm"):
        raise ValueError(f"out must be a file ending in .html, got {str(out)!r}")
    overwrite = bool(settings.get("overwrite"))
    new_file(out, overwrite=overwrite)
    classes = _classes(settings.get("classes"))
    folders = runs_of(settings.runs)

    from neuralcollapse.lab.figures.report import write_report

    outcome = Outcome()
    with new_files([out], overwrite=overwrite):
        write_report(folders, out, classes)
    outcome.written.append(out)
    return outcome.report("")


def _classes(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(item) for item in text.split(",")]
    except ValueError:
        raise ValueError(f"classes must be numbers of classes, such as 0,1,2, got {text!r}") from None
