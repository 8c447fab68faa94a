"""Helpers shared by the commands: values of flags, input folders, output files, and printed lines."""

from __future__ import annotations

import re
import sys
from argparse import Action
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from jsonargparse import ArgumentParser, Namespace

from neuralcollapse.lab.results.files import sole_writer
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.settings import closest_names, parse

_Item = TypeVar("_Item")
Epochs = Literal["last", "all"] | list[int]
FAILED_IN_PART = 1
_NAME_OF_SET = re.compile(r"[A-Za-z0-9][\w.+-]*")


class Append(Action):
    """Flag that may be given several times, as a list of its values; a file may contain one value or a list."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        earlier = namespace.get(self.dest) or []
        setattr(namespace, self.dest, [*(earlier if isinstance(earlier, list) else [earlier]), values])


def option(settings: Namespace, name: str, hint: Any = str, default: Any = None) -> Any:
    """Return the value of a flag, converted to its type; the default if it is not given.

    Raises:
        ValueError: if the value does not have this type.
    """
    value = parse(name, settings.get(name), hint)
    return default if value is None else value


def add_runs(parser: ArgumentParser, *, required: bool = True) -> None:
    """Add the folders of runs to read as positional arguments."""
    number = "+" if required else "*"
    parser.add_argument("runs", metavar="RUN", nargs=number, help="folders of runs or of comparisons of runs")


def add_backbone(parser: ArgumentParser) -> None:
    """Add the flag of the class that may be imported if the settings of a run name it."""
    parser.add_argument("--backbone", metavar="CLASS", help="user-defined class with which a run was trained; it is "
                        "not imported merely because config.yaml names it")  # fmt: skip


def add_epochs(parser: ArgumentParser) -> None:
    """Add the flag of the epochs whose checkpoints are evaluated."""
    parser.add_argument("--epochs", metavar="EPOCHS", help="last, all, or comma-separated epochs of kept checkpoints; "
                        "by default last")  # fmt: skip


def epochs_of(settings: Namespace) -> Epochs:
    """Return the value of the flag of `add_epochs`.

    Raises:
        ValueError: if the value is invalid.
    """
    epochs: Epochs = option(settings, "epochs", Epochs, "last")
    return epochs


def runs_and_figures(settings: Namespace) -> list[tuple[RunFolder, Path]]:
    """Return the runs to read, each with the folder for its figures; ``out`` sets it for a single run.

    Raises:
        ValueError: if a path is not the folder of a run or of several runs, or ``out`` is given for several runs.
    """
    runs, out = runs_of(option(settings, "runs", list[str])), option(settings, "out")
    if out is not None and len(runs) > 1:
        raise ValueError(f"out belongs to one run, got {len(runs)} runs: the figures of each are in its folder")
    return [(run, Path(out or run.figures)) for run in runs]


def runs_of(paths: Sequence[str]) -> list[RunFolder]:
    """Return the runs in folders, each once; in folders of several runs, diverged runs are skipped and reported.

    Raises:
        ValueError: if a path is not the folder of a run or of several runs.
    """
    runs: dict[Path, RunFolder] = {}
    for folder in map(RunFolder, paths):
        finite = {run.path.resolve(): run for run in folder.run_folders()}
        for run in folder.run_folders(diverged=True):
            if run.path.resolve() not in finite:
                print(f"neuralcollapse: skipped: {run.path.name}, which diverged", file=sys.stderr)
        runs |= finite
    return list(runs.values())


def unknown_sets_of(texts: list[str]) -> dict[str, Path | None]:
    """Return the folder of each set of unknown inputs by name; None for built-in sets.

    Raises:
        ValueError: if a set is unknown or repeated, a name is invalid, or a folder does not exist.
    """
    from neuralcollapse.lab.data.unknown import BUILT_IN

    forms = f"{', '.join(BUILT_IN)} or NAME=FOLDER"
    if not texts:
        raise ValueError(f"ood must name at least one set: {forms}")
    sets: dict[str, Path | None] = {}
    for text in texts:
        name, has_folder, folder = text.partition("=")
        if not has_folder and name not in BUILT_IN:
            raise ValueError(f"ood must be {forms}, got {text!r}{closest_names(name, BUILT_IN)}")
        if has_folder and (name in (*BUILT_IN, "test") or not _NAME_OF_SET.fullmatch(name)):
            raise ValueError(
                f"ood must be NAME=FOLDER with a name of letters, digits, dots, plus and minus signs and underscores, "
                f"other than test, {', '.join(BUILT_IN)}, got {text!r}"
            )
        if has_folder and not Path(folder).expanduser().is_dir():
            raise ValueError(f"ood must be NAME=FOLDER with an existing folder, got {text!r}")
        if name in sets:
            raise ValueError(f"ood must name different sets, got {name!r} twice")
        sets[name] = Path(folder).expanduser() if has_folder else None
    return sets


def output_folder(settings: Namespace, default: str) -> str:
    """Return the output folder.

    Raises:
        ValueError: if the name is empty, or the folder does not contain a run to resume.
    """
    out = default if settings.get("out") is None else settings.out
    if not out:
        raise ValueError("out must name a folder, got ''")
    if settings.get("resume") and not RunFolder(out).config.exists():
        raise ValueError(f"resume needs the folder of a run, but {out!r} has none: omit --resume to start a new run")
    return str(out)


def check_new_file(path: Path, *, overwrite: bool) -> None:
    """Check that a file may be written.

    Raises:
        ValueError: if it exists and ``overwrite`` is False.
    """
    if path.exists() and not overwrite:
        raise ValueError(f"out must be a new file, but {str(path)!r} exists: --overwrite replaces it")


@contextmanager
def new_files(paths: Sequence[Path], *, overwrite: bool) -> Iterator[None]:
    """Check and write files that belong together; if their folder is that of a run, it is locked in the meantime.

    The files must not exist, unless ``overwrite`` is True or the same command was stopped while it wrote them.

    Raises:
        ValueError: if a file exists, or another process writes to the folder of the run.
    """
    folder = paths[0].parent
    unfinished = folder / f".{paths[0].name}.unfinished"
    for path in paths:
        if path.exists() and not path.is_file():
            raise ValueError(f"out must be a regular file, but {str(path)!r} is not")
        check_new_file(path, overwrite=overwrite or unfinished.exists())
    with sole_writer(folder) if (folder / RunFolder.FILES["environment"]).exists() else nullcontext():
        existing, is_new = {path for path in paths if path.exists()}, not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        unfinished.unlink(missing_ok=True)
        unfinished.touch()
        try:
            yield
        except BaseException:
            if not any(path.exists() for path in paths if path not in existing):
                unfinished.unlink(missing_ok=True)
                with suppress(OSError):  # the folder contains other files
                    if is_new:
                        folder.rmdir()
            raise
        unfinished.unlink(missing_ok=True)


def print_config(settings: dict[str, Any]) -> None:
    """Print settings as YAML for `--config`."""
    print(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), end="")


def print_written(paths: Sequence[Path]) -> None:
    """Print the written files, beginning with the most informative."""
    for position, path in enumerate(paths):
        print(f"{'wrote' if position == 0 else '     '} {path}")


class Outcome:
    """Written files, and the number of skipped items."""

    def __init__(self) -> None:
        self.written: list[Path] = []
        self.skipped = 0

    def valid(self, items: Iterable[_Item | ValueError]) -> list[_Item]:
        """Return the items that are not errors; print and count the errors."""
        valid = []
        for item in items:
            if isinstance(item, ValueError):
                self.skipped += 1
                print(f"neuralcollapse: skipped: {item}", file=sys.stderr)
            else:
                valid.append(item)
        return valid

    def report(self, nothing: str = "") -> int:
        """Print the written files, or the given line if nothing was written; return the exit code."""
        if self.written:
            print_written(self.written)
        else:
            print(nothing)
        return FAILED_IN_PART if self.skipped else 0
