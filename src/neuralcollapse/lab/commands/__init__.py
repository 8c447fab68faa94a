"""Commands of the command line; the module of a command is imported when it is chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from neuralcollapse.lab.settings import Settings

# Module and name of each command, and its line in `neuralcollapse --help`, in that order.
COMMANDS = {
    "compare": (
        "train:COMPARE",
        "train methods over several seeds, print what they reach and after how many epochs, draw figures",
    ),
    "train": ("train:TRAIN", "train one run, from the recipe of a published experiment or any settings"),
    "incremental": (
        "incremental:INCREMENTAL",
        "add classes to a trained model session by session: accuracy of old and new ones, forgetting, figure",
    ),
    "recipes": ("recipes:RECIPES", "list the recipes of published experiments, or show one"),
    "study": (
        "study:STUDY",
        "a published figure from its runs to its picture and a verdict on each claim; without a name, list the studies",
    ),
    "measure": (
        "measure:MEASURE",
        "NC metrics of every checkpoint of a run, of an external model, or of features in files",
    ),
    "distance": ("distance:DISTANCE", "distances to the nearest simplex ETF over the measured epochs of a run"),
    "detect": (
        "detect:DETECT",
        "how well scores of a trained run detect inputs of unknown classes",
    ),
    "transfer": (
        "transfer:TRANSFER",
        "accuracy of a linear probe and of the nearest class mean of frozen features on other data, by layer",
    ),
    "aggregate": (
        "aggregate:AGGREGATE",
        "mean, std, median, min and max over seeds, of runs that differ in nothing else",
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
    """A command of the command line.

    Attributes:
        description: First paragraph of its help.
        add_arguments: Function that adds its own arguments to a parser.
        run: Function that runs it with the parsed arguments, and returns the exit code; None for 0.
        sections: Settings that it takes, each as a flag.
    """

    description: str
    add_arguments: Callable[[ArgumentParser], object]
    run: Callable[[Namespace], int | None]
    sections: tuple[type[Settings], ...] = ()


def load_command(name: str) -> Command:
    """Import and return a command by its name, a key of `COMMANDS`."""
    command: Command = resolve_name(f"{__name__}.{COMMANDS[name][0]}")
    return command
