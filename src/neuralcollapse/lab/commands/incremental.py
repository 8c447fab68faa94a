"""`neuralcollapse incremental`: addition of classes to a trained model in sessions."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from neuralcollapse.lab.commands import Command
from neuralcollapse.lab.commands.arguments import add_output, asked_for
from neuralcollapse.lab.commands.common import output_folder, print_config, print_written
from neuralcollapse.lab.config import OneRun, Ranks, RunConfig
from neuralcollapse.lab.experiments import Incremental, incremental_runs
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.labels import common_settings
from neuralcollapse.lab.untrusted import check_class_is_named

_SECTIONS = (Incremental, *(part for part in reversed(RunConfig.__bases__) if part not in (OneRun, Ranks)))


def _add_arguments(parser: ArgumentParser) -> None:
    add_output(parser, "runs/incremental, or runs/RECIPE")


def _run(settings: Namespace) -> None:
    given = asked_for(settings, *_SECTIONS)
    out = output_folder(settings, f"runs/{given.get('recipe') or 'incremental'}")
    folder, base = RunFolder(out), None
    if settings.get("resume"):
        base = folder.settings()
        if "sessions" not in base:
            raise ValueError(f"resume needs a folder of `incremental`, but {out!r} was written by another command")
        for name in ("backbone", "loss"):
            check_class_is_named(base, given.get(name), folder.config, name)
    names = Incremental.model_fields
    protocol = Incremental(**{name: value for name, value in ((base or {}) | given).items() if name in names})
    shared = {name: value for name, value in given.items() if name not in names}
    runs = incremental_runs(protocol, shared, base)
    config = protocol.in_force() | common_settings(runs)
    if settings.get("print_config"):
        print_config(config)
        return

    options = {name: bool(settings.get(name)) for name in ("resume", "overwrite")}
    with folder.writing(config, **options):
        from neuralcollapse.lab.figures.incremental import summarise_sessions  # takes seconds, so after the checks
        from neuralcollapse.lab.figures.panels import check_drawing
        from neuralcollapse.lab.training.incremental import train_incremental

        check_drawing()
        train_incremental(protocol, shared, folder, base=base, **options)
        table, written = summarise_sessions(folder)
        folder.add_facts(reported=True)
    print(f"\n{table}\n")
    print_written(written)


INCREMENTAL = Command(
    "Train a model on the first classes, then add the others in sessions, with several strategies over several seeds: "
    "class means of the frozen network, rows of a simplex ETF assigned in advance, the nearest simplex ETF grown, and "
    "a learned classifier. After each session, the accuracy of all classes, of old classes (those of the first "
    "session) and of new classes (added since), the harmonic mean of the last two, forgetting, and NC1 to NC3 of old "
    "and of new classes are measured in evaluation mode on un-augmented data.",
    _add_arguments,
    _run,
    _SECTIONS,
)
