"""What the commands that work on run folders have in common."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from jsonargparse import ArgumentParser

from neuralcollapse.lab.results.folder import RunFolder

_Found = TypeVar("_Found")
FAILED_IN_PART = 1


def add_runs(parser: ArgumentParser) -> None:
    """Add the folders to work on."""
    parser.add_argument("runs", metavar="RUN", nargs="+", type=str, help="folders of runs or of comparisons of runs")


def runs_of(paths: Sequence[str]) -> list[RunFolder]:
    """The runs in these folders, each once.

    Raises:
        ValueError: One is no run's folder.
    """
    runs = [run for path in paths for run in RunFolder(path).run_folders()]
    return list({run.path.resolve(): run for run in runs}.values())


def new_file(path: Path, *, overwrite: bool) -> Path:
    """A file to write, as it is given.

    Raises:
        ValueError: It is there, and not to be replaced.
    """
    if path.exists() and not overwrite:
        raise ValueError(f"out must be a new file, and {str(path)!r} exists: --overwrite replaces it")
    return path


def say_written(paths: Sequence[Path]) -> None:
    """Say what was written, most telling first."""
    for place, path in enumerate(paths):
        print(f"{'wrote' if place == 0 else '     '} {path}")


class Outcome:
    """What was written, and what could not be."""

    def __init__(self) -> None:
        self.written: list[Path] = []
        self.problems = 0

    def sound(self, found: Iterable[_Found | ValueError]) -> list[_Found]:
        """What is sound of it; the rest is named and left out."""
        kept = []
        for one in found:
            if isinstance(one, ValueError):
                self.problems += 1
                print(f"neuralcollapse: left out: {one}", file=sys.stderr)
            else:
                kept.append(one)
        return kept

    def report(self, nothing: str) -> int:
        """Say what was written, or that nothing was; the exit code."""
        if self.written:
            say_written(self.written)
        else:
            print(nothing)
        return FAILED_IN_PART if self.problems else 0
