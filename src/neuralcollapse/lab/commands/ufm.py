"""`neuralcollapse ufm` and `neuralcollapse landscape`: unconstrained features model."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from neuralcollapse.lab.commands import Command
from neuralcollapse.lab.commands.arguments import add_output, asked_for
from neuralcollapse.lab.commands.common import output_folder, print_config, print_written
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.ufm.settings import LandscapeSettings, UFMSettings


def _add_ufm_arguments(parser: ArgumentParser) -> None:
    add_output(parser, "runs/ufm")


def _add_landscape_arguments(parser: ArgumentParser) -> None:
    add_output(parser, "runs/landscape")


def _ufm(settings: Namespace) -> None:
    config = UFMSettings(**asked_for(settings, UFMSettings))
    if settings.get("print_config"):
        print_config(config.in_force())
        return
    folder = RunFolder(output_folder(settings, "runs/ufm"))

    from neuralcollapse.lab.ufm.compare import train_ufm  # this import takes seconds, so after argument checks

    options = {name: bool(settings.get(name)) for name in ("resume", "overwrite")}
    table, _, written = train_ufm(config, folder, **options)
    print(f"\n{table}\n")
    print_written(written)


def _landscape(settings: Namespace) -> None:
    config = LandscapeSettings(**asked_for(settings, LandscapeSettings))
    if settings.get("print_config"):
        print_config(config.in_force())
        return
    if settings.get("resume"):
        raise ValueError("resume must not be given: landscape takes seconds; use --overwrite to start it again")
    folder = RunFolder(output_folder(settings, "runs/landscape"))

    from neuralcollapse.lab.ufm.landscape import survey_landscape  # this import takes seconds, so after checks

    table, written = survey_landscape(config, folder, overwrite=bool(settings.get("overwrite")))
    print(f"\n{table}\n")
    print_written(written)


UFM = Command(
    "Train unconstrained features, without a network, with the methods standard, fixed and implicit, each with sgd and "
    "agd; print the number of iterations that each takes to reach levels of loss and of collapse, and draw figures "
    "over seeds. The rate of each method, optimiser and size is first chosen from the same candidates, with a seed "
    "that is not compared.",
    _add_ufm_arguments,
    _ufm,
    (UFMSettings,),
)
LANDSCAPE = Command(
    "Find critical points of the unconstrained features model with cross-entropy: descend from random starts, "
    "construct saddles, classify each point by gradient and curvature, and escape from every saddle; draw the edge of "
    "the spectrum of the Hessian and the loss along the escape direction.",
    _add_landscape_arguments,
    _landscape,
    (LandscapeSettings,),
)
