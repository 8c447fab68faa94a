"""What the commands that work on run folders have in common."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TypeVar

from jsonargparse import ArgumentParser

from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.locking import sole_writer

_Found = TypeVar("_Found")
FAILED_IN_PART = 1


def add_runs(parser: ArgumentParser) -> None:
    """Add the folders to work on."""
    parser.add_argument("runs", metavar="RUN", nargs="+", type=str, help="folders of runs or of comparisons of runs")


def runs_of(paths: Sequence[str]) -> list[RunFolder]:
    """The runs in these folders, each once; those of several that diverged are named and left out.

    Raises:
        ValueError: One is no run's folder.
    """
    runs: dict[Path, RunFolder] = {}
    for folder in map(RunFolder, paths):
        sound = {run.path.resolve(): run for run in folder.run_folders()}
        for run in folder.run_folders(diverged=True):
            if run.path.resolve() not in sound:
                print(f"neuralcollapse: left out: {run.path.name}, which diverged", file=sys.stderr)
        runs |= sound
    return list(runs.values())


def new_file(path: Path, *, overwrite: bool) -> Path:
    """A file to write, as it is given.

    Raises:
        ValueError: It is there, and not to be replaced.
    """
    if path.exists() and not overwrite:
        raise ValueError(f"out must be a new file, and {str(path)!r} exists: --overwrite replaces it")
    return path


@contextmanager
def new_files(paths: Sequence[Path], *, overwrite: bool) -> Iterator[None]:
    """Write files that belong together, and hold their folder meanwhile if it is a run's.

    None of them may be there, unless they are to be replaced, or the same command was stopped while it wrote them.

    Raises:
        ValueError: if one is there, or another process writes the run's folder.
    """
    folder = paths[0].parent
    unfinished = folder / f".{paths[0].name}.unfinished"
    for path in paths:
        if path.exists() and not path.is_file():
            raise ValueError(f"out must be a regular file, and {str(path)!r} is not")
        new_file(path, overwrite=overwrite or unfinished.exists())
    with sole_writer(folder) if (folder / RunFolder.FILES["environment"]).exists() else nullcontext():
        there_before, is_new = {path for path in paths if path.exists()}, not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        unfinished.unlink(missing_ok=True)
        unfinished.touch()
        try:
            yield
        except BaseException:
            if not any(path.exists() for path in paths if path not in there_before):
                unfinished.unlink(missing_ok=True)
                with suppress(OSError):  # it has other files
                    if is_new:
                        folder.rmdir()
            raise
        unfinished.unlink(missing_ok=True)


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
