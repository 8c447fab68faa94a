"""`neuralcollapse compare`: methods over seeds."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from neuralcollapse.lab.commands.arguments import add_output, add_sections, asked_for, integer
from neuralcollapse.lab.commands.training import output_folder, stored_settings, train_and_report
from neuralcollapse.lab.config import OneRun, RunConfig
from neuralcollapse.lab.experiments import Comparison, common_settings, comparison_of, comparison_runs
from neuralcollapse.lab.running import Ranks

SUMMARY = "train methods over several seeds, print what they reach and how soon, draw figures"
USAGE = (
    "[--recipe FAMILY] [--methods A,B] [--losses A,B] [--weight_averages X,Y] [--combinations A/B/X,...] "
    "[--seeds N] [--lr auto] [--SETTING VALUE ...] [--out FOLDER] [--parallel N] [--resume | --overwrite]"
)
DESCRIPTION = (
    "Train methods (by default standard, fixed and implicit), with one loss or several, over several seeds, from the "
    "same weights and batches for each seed; print what they ended with, and how soon each was where standard ends; "
    "write the figures. Everything is measured in evaluation mode on un-augmented data."
)
SHARED = tuple(section for section in reversed(RunConfig.__bases__) if section not in (OneRun, Ranks))
SECTIONS = (Comparison, *SHARED)


def add_arguments(parser: ArgumentParser) -> None:
    """Add what the command takes."""
    add_sections(parser, *SECTIONS)
    parallel = "train so many runs at a time, each a process with a part of the CPU's threads or a device of cuda"
    parser.add_argument("--parallel", type=integer, metavar="PARALLEL", help=f"{parallel}; by default 1")
    add_output(parser, "runs/compare, or runs/RECIPE")


def run(settings: Namespace) -> int:
    """Train every method with every loss, weight average and seed, and say what was written."""
    given = asked_for(settings, *SECTIONS)
    out = output_folder(settings, f"runs/{given.get('recipe') or 'compare'}")
    given, base = stored_settings(settings, given, out)
    comparison = comparison_of((base or {}) | given)
    auto = comparison.lr == "auto"
    own = {*comparison.__dataclass_fields__} - ({"lr"} if not auto else set())
    shared = {name: value for name, value in given.items() if name not in own}
    runs = comparison_runs(comparison, shared, base)
    config = comparison.in_force() | common_settings(runs) | ({"lr": "auto"} if auto else {})
    config = {name: value for name, value in config.items() if name not in comparison.kinds()[0]}
    return train_and_report(runs, out, config, settings, "compare", comparison)
