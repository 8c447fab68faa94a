"""What the commands that train have in common, before and after."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from neuralcollapse.lab.commands.runs import FAILED_IN_PART, say_written
from neuralcollapse.lab.config import RunConfig
from neuralcollapse.lab.experiments import Comparison
from neuralcollapse.lab.ranks import global_rank
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.resuming import is_external
from neuralcollapse.lab.untrusted import check_class_is_named


def output_folder(settings: Namespace, default: str) -> str:
    """Where to write.

    Raises:
        ValueError: Nowhere; or a run is to go on that is not there.
    """
    out = default if settings.get("out") is None else settings.out
    if not out:
        raise ValueError("out must name a folder, got ''")
    if settings.get("resume") and not RunFolder(out).config.exists():
        raise ValueError(f"resume goes on with a run, and {out!r} holds none: without --resume one begins there")
    return str(out)


def check_output(folder: RunFolder, config: dict[str, Any], settings: Namespace) -> None:
    """See whether the folder may be written, as `RunFolder.check`, and whether there is something to do.

    Raises:
        ValueError: It may not, or what is to go on is finished.
    """
    folder.check(config, **what_is_there(settings))
    diverged = folder.read_environment().get("diverged") if settings.get("resume") else None
    if diverged is not None:
        raise ValueError(f"the run in {str(folder.path)!r} cannot be resumed: {diverged}")
    if settings.get("resume") and folder.is_reported(config):
        raise ValueError(
            f"resume goes on with a run, and that in {str(folder.path)!r} is finished: --epochs of more extends one "
            "that is trained, --overwrite starts it again"
        )


def what_is_there(settings: Namespace) -> dict[str, Any]:
    """What to do with the run that the folder holds."""
    return {name: bool(settings.get(name)) for name in ("resume", "overwrite")}


def stored_settings(
    settings: Namespace, given: dict[str, Any], out: str
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What is asked for, and the settings to take where nothing is: of the run to go on with, if there is one.

    Raises:
        ValueError: if the folder is of an external model, or its settings name a class that the command line does not.
    """
    if settings.get("resume"):
        folder = RunFolder(out)
        stored = folder.settings()
        if is_external(stored):
            raise ValueError(f"resume goes on with a run, and {out!r} holds measurements of an external model")
        if "name" in stored:
            raise ValueError(f"resume goes on with a run that `train` began, and {out!r} is of another program's")
        check_class_is_named(stored, given.get("backbone"), folder.config)
        return given, stored
    return given, None


def show_config(settings: dict[str, Any]) -> None:
    """Print settings as the YAML that `--config` takes."""
    print(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), end="")


def train_and_report(
    runs: RunConfig | Sequence[RunConfig],
    out: str,
    config: dict[str, Any],
    settings: Namespace,
    command: str,
    comparison: Comparison | None = None,
) -> int:
    """Train, write the table, the summary and the figures, and say so; or show the settings, if that is asked for.

    Returns:
        The exit code: 1 if some of several runs diverged; the table is then of the others.
    """
    if settings.get("print_config"):
        show_config(config)
        return 0

    options: dict[str, Any] = what_is_there(settings)
    if isinstance(runs, RunConfig) and runs.ranks > 1 and global_rank() > 0:  # the first rank checks, and writes
        from neuralcollapse.lab.training.runs import train_runs

        train_runs(runs, out, settings=config, **options)
        return 0
    check_output(RunFolder(out), config, settings)

    from neuralcollapse.lab.figures.panels import check_drawing
    from neuralcollapse.lab.figures.summary import summarise  # seconds: not for a mistake in a flag
    from neuralcollapse.lab.training.objective import Diverged
    from neuralcollapse.lab.training.runs import train_runs
    from neuralcollapse.lab.training.tuning import with_chosen_rates

    check_drawing()
    options["parallel"] = 1 if settings.get("parallel") is None else settings.parallel
    summaries, code = [], 0

    def report(folder: RunFolder) -> None:
        summaries.append(summarise(folder, command))

    with ExitStack() as locks:
        if comparison is not None and comparison.lr == "auto" and not isinstance(runs, RunConfig):
            runs = with_chosen_rates(runs, comparison, RunFolder(out), config, locks=locks, **options)
            options |= {"resume": True, "overwrite": False}
        try:
            train_runs(runs, out, settings=config, finish=report, **options)
        except Diverged as error:
            if not summaries:
                raise
            print(f"neuralcollapse: left out of table and figures: {error}", file=sys.stderr)
            code = FAILED_IN_PART
    print_table(summaries[0].table, summaries[0].written)
    return code


def print_table(table: str, written: Sequence[Path]) -> None:
    """Print a table, and what was written."""
    print(f"\n{table}\n")
    say_written(written)
