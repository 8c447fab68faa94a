"""`neuralcollapse report`: HTML page about runs, written from their folders alone."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from neuralcollapse.lab.commands import Command
from neuralcollapse.lab.commands.common import Outcome, add_runs, check_new_file, new_files, option, runs_of


def _add_arguments(parser: ArgumentParser) -> None:
    add_runs(parser)
    parser.add_argument("--out", metavar="FILE", help="the page, ending in .html; by default report.html")
    parser.add_argument("--classes", metavar="A,B,C",
                        help="three classes (a plane) or four (a space); by default the first three")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def _run(settings: Namespace) -> int:
    out, overwrite = Path(option(settings, "out", default="report.html")), bool(settings.get("overwrite"))
    if out.suffix not in (".html", ".htm"):
        raise ValueError(f"out must be a file ending in .html, got {str(out)!r}")
    check_new_file(out, overwrite=overwrite)
    classes = option(settings, "classes", list[int])
    runs = runs_of(settings.runs)

    from neuralcollapse.lab.figures.report import write_report

    outcome = Outcome()
    with new_files([out], overwrite=overwrite):
        write_report(runs, out, classes)
    outcome.written.append(out)
    return outcome.report()


REPORT = Command(
    "Write a page that needs only a browser. It contains tables, interactive figures of every metric over epochs, "
    "cosines between classes, and an animation of the class means, classifier rows and features of three or four "
    "classes over the epochs. Runs that differ only in their seed are one line, with a band over the seeds.",
    _add_arguments,
    _run,
)
