"""Commands of the command line; the module of a command is imported only when the command is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from neuralcollapse.lab.settings import Settings

# Module and object of each command, and its line in `neuralcollapse --help`, in the order of that list.
COMMANDS = {
    "compare": (
        "train:COMPARE",
        "train methods over several seeds, print final values and epochs to reach them, draw figures",
    ),
    "train": ("train:TRAIN", "train one run, from the recipe of a published experiment or any settings"),
    "incremental": (
        "incremental:INCREMENTAL",
        "add classes to a trained model in sessions: accuracy of old and new classes, forgetting, figure",
    ),
    "recipes": ("recipes:RECIPES", "list the recipes of published experiments, or show one"),
    "study": (
        "study:STUDY",
        "reproduce a published figure: runs, figure and a verdict on each claim; without a name, list the studies",
    ),
    "measure": (
        "measure:MEASURE",
        "NC metrics of every checkpoint of a run, of an external model, or of features in files",
    ),
    "distance": ("distance:DISTANCE", "distances to the nearest simplex ETF over the measured epochs of a run"),
    "detect": (
        "detect:DETECT",
        "evaluate how well scores of a trained run detect inputs of unknown classes",
    ),
    "transfer": (
        "transfer:TRANSFER",
        "accuracy of a linear probe and of the nearest class mean of frozen features on other data, by layer",
    ),
    "aggregate": (
        "aggregate:AGGREGATE",
        "mean, std, median, min and max over seeds, for runs that differ only in their seed",
    ),
    "plot": ("plot:PLOT", "the published figures, from one run or several side by side"),
    "report": ("report:REPORT", "one self-contained HTML page of one run or several"),
    "ufm": ("ufm:UFM", "the unconstrained features model (UFM) trained with each method"),
    "landscape": (
        "ufm:LANDSCAPE",
        "critical points of the unconstrained features model: the global optimum, strict saddles",
    ),
}


@dataclass(frozen=True)
class Command:
    """Command of the command line.

    Attributes:
        description: First paragraph of the help text.
        add_arguments: Function that adds the arguments of the command to a parser.
        run: Function that runs the command with the parsed arguments and returns the exit code; None means 0.
        sections: Settings that the command accepts, each as a flag.
    """

    description: str
    add_arguments: Callable[[ArgumentParser], object]
    run: Callable[[Namespace], int | None]
    sections: tuple[type[Settings], ...] = ()


def load_command(name: str) -> Command:
    """Import and return a command by its name, a key of `COMMANDS`."""
    command: Command = resolve_name(f"{__name__}.{COMMANDS[name][0]}")
    return command
