"""`neuralcollapse train`: one run."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from neuralcollapse.lab.commands.arguments import add_output, add_sections, asked_for
from neuralcollapse.lab.commands.training import output_folder, stored_settings, train_and_report
from neuralcollapse.lab.config import RunConfig
from neuralcollapse.lab.experiments import single_run

SUMMARY = "train one run, from the recipe of a published experiment or any settings"
USAGE = "[--recipe NAME] [--SETTING VALUE ...] [--out FOLDER] [--resume | --overwrite]"
DESCRIPTION = (
    "Train one run, from the recipe of a published experiment or from any settings; print the table, write the "
    "figures. Everything is measured in evaluation mode on un-augmented data."
)
SECTIONS = tuple(reversed(RunConfig.__bases__))


def add_arguments(parser: ArgumentParser) -> None:
    """Add what the command takes."""
    add_sections(parser, *SECTIONS)
    add_output(parser, "runs/train, or runs/RECIPE")


def run(settings: Namespace) -> int:
    """Train, and say what was written."""
    given = asked_for(settings, *SECTIONS)
    out = output_folder(settings, f"runs/{given.get('recipe') or 'train'}")
    given, base = stored_settings(settings, given, out)
    config = single_run(given, base)
    return train_and_report(config, out, config.in_force(), settings, "train")
