"""`neuralcollapse train` and `neuralcollapse compare`: a single run, and methods over seeds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from neuralcollapse.lab.commands import Command
from neuralcollapse.lab.commands.arguments import add_output, asked_for
from neuralcollapse.lab.commands.common import FAILED_IN_PART, option, output_folder, print_config, print_written
from neuralcollapse.lab.config import OneRun, Ranks, RunConfig
from neuralcollapse.lab.experiments import Comparison, comparison_of, comparison_runs, single_run
from neuralcollapse.lab.process import global_rank
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.labels import common_settings
from neuralcollapse.lab.results.resuming import is_external
from neuralcollapse.lab.untrusted import check_class_is_named

_OF_RUN = tuple(reversed(RunConfig.__bases__))
_OF_COMPARISON = (Comparison, *(section for section in _OF_RUN if section not in (OneRun, Ranks)))


def _add_train_arguments(parser: ArgumentParser) -> None:
    add_output(parser, "runs/train, or runs/RECIPE")


def _add_compare_arguments(parser: ArgumentParser) -> None:
    add_output(parser, "runs/compare, or runs/RECIPE")
    parser.add_argument("--parallel", metavar="N", help="train N runs at a time, each in a process with a part of the "
                        "CPU's threads or on one device of cuda; by default 1")  # fmt: skip


def _train(settings: Namespace) -> int:
    given = asked_for(settings, *_OF_RUN)
    out = output_folder(settings, f"runs/{given.get('recipe') or 'train'}")
    config = single_run(given, _stored_settings(settings, given, out))
    return _train_and_report(config, out, config.in_force(), settings)


def _compare(settings: Namespace) -> int:
    given = asked_for(settings, *_OF_COMPARISON)
    out = output_folder(settings, f"runs/{given.get('recipe') or 'compare'}")
    base = _stored_settings(settings, given, out)
    comparison = comparison_of((base or {}) | given)
    is_tuned = comparison.lr == "auto"
    of_comparison = {*Comparison.model_fields} - (set() if is_tuned else {"lr"})
    shared = {name: value for name, value in given.items() if name not in of_comparison}
    runs = comparison_runs(comparison, shared, base)
    config = comparison.in_force() | common_settings(runs) | ({"lr": "auto"} if is_tuned else {})
    config = {name: value for name, value in config.items() if name not in comparison.kinds()[0]}
    return _train_and_report(runs, out, config, settings, comparison)


def _stored_settings(settings: Namespace, given: dict[str, Any], out: str) -> dict[str, Any] | None:
    """Return the settings of the run to resume, which are the defaults of settings not given; None for a new run.

    Raises:
        ValueError: if the folder belongs to an external model or to another program, or its settings name a class that
            the command line does not name.
    """
    if not settings.get("resume"):
        return None
    folder = RunFolder(out)
    stored = folder.settings()
    if is_external(stored):
        raise ValueError(f"resume needs the folder of a run, but {out!r} has measurements of an external model")
    if "name" in stored:
        raise ValueError(f"resume needs the folder of a run of `train`, but {out!r} was written by another program")
    for name in ("backbone", "loss"):
        check_class_is_named(stored, given.get(name), folder.config, name)
    return stored


def _check_unfinished(folder: RunFolder, config: dict[str, Any]) -> None:
    """Check that the run to resume has neither diverged nor finished.

    Raises:
        ValueError: if it has diverged or finished.
    """
    if (reason := folder.read_environment().get("diverged")) is not None:
        raise ValueError(f"the run in {str(folder.path)!r} cannot be resumed: {reason}")
    if folder.is_reported(config):
        raise ValueError(
            f"resume needs an unfinished run, but that in {str(folder.path)!r} is finished: larger --epochs extend it, "
            "--overwrite starts it again"
        )


def _train_and_report(
    runs: RunConfig | Sequence[RunConfig],
    out: str,
    config: dict[str, Any],
    settings: Namespace,
    comparison: Comparison | None = None,
) -> int:
    """Train, and write and print table, summary and figures; with --print_config, print the settings instead.

    Returns:
        The exit code: 1 if some of several runs diverged, in which case the table contains the other runs.
    """
    if settings.get("print_config"):
        print_config(config)
        return 0

    folder, parallel = RunFolder(out), option(settings, "parallel", int, 1)
    options = {name: bool(settings.get(name)) for name in ("resume", "overwrite")}
    if isinstance(runs, RunConfig) and runs.ranks > 1 and global_rank() > 0:  # the first rank checks and writes
        from neuralcollapse.lab.training.runs import train_runs

        train_runs(runs, folder, **options)
        return 0
    summary, failure = None, None
    try:
        with folder.writing(config, **options):
            if options["resume"]:
                _check_unfinished(folder, config)

            from neuralcollapse.lab.figures.panels import check_drawing  # takes seconds, so after argument checks
            from neuralcollapse.lab.figures.summary import summarise
            from neuralcollapse.lab.training.objective import Diverged
            from neuralcollapse.lab.training.runs import train_runs
            from neuralcollapse.lab.training.tuning import with_chosen_rates

            check_drawing()
            if comparison is not None and comparison.lr == "auto" and not isinstance(runs, RunConfig):
                runs = with_chosen_rates(runs, comparison, folder, resume=options["resume"], parallel=parallel)
            try:
                train_runs(runs, folder, parallel=parallel, **options)
            except Diverged as error:
                if isinstance(runs, RunConfig) or not folder.run_folders():
                    raise
                failure = error
            summary = summarise(folder, "train" if comparison is None else "compare")
            if failure is not None:
                raise failure
            folder.add_facts(reported=True)
    except ValueError as error:
        if summary is None or error is not failure:
            raise
        print(f"neuralcollapse: skipped in table and figures: {error}", file=sys.stderr)
    assert summary is not None
    print(f"\n{summary.table}\n")
    print_written(summary.written)
    return 0 if failure is None else FAILED_IN_PART


TRAIN = Command(
    "Train one run, from the recipe of a published experiment or from any settings; print a table and draw figures. "
    "Everything is measured in evaluation mode on un-augmented data.",
    _add_train_arguments,
    _train,
    _OF_RUN,
)
COMPARE = Command(
    "Train methods (by default standard, fixed and implicit), with one or several losses, over several seeds, with the "
    "same initial weights and batches for each seed; print their final values and the number of epochs that each takes "
    "to reach the final values of standard; draw figures. Everything is measured in evaluation mode on un-augmented "
    "data.",
    _add_compare_arguments,
    _compare,
    _OF_COMPARISON,
)
