"""The command ``neuralcollapse``."""

from __future__ import annotations

import re
import sys
from argparse import SUPPRESS, ArgumentError
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from neuralcollapse.lab.config import CompareConfig, RunConfig
from neuralcollapse.lab.recipes import recipe_path, recipes_table

if TYPE_CHECKING:
    from neuralcollapse.lab.figures.summary import Report

_Config = TypeVar("_Config", RunConfig, CompareConfig)
_USER_ERROR, _INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; errors of the user's are one line on stderr and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        chosen = _parse(arguments)
        _COMMANDS[chosen.subcommand][1](chosen[chosen.subcommand])
    except (ArgumentError, ValueError, OSError) as error:
        print(f"neuralcollapse: error: {_one_line(str(error))}", file=sys.stderr)
        return _USER_ERROR
    except KeyboardInterrupt:
        print("\nneuralcollapse: interrupted; with --resume, without --overwrite, it goes on", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _parse(arguments: Sequence[str]) -> Namespace:
    """The command and its settings.

    Defaults are those of the recipe, if one is named; with --resume, those of the run to go on with. Which, is known
    once the arguments are parsed; then they are parsed again.
    """
    parser, commands = _parsers()
    chosen = parser.parse_args([argument for argument in arguments if not argument.startswith("--print_config")])
    settings = chosen[chosen.subcommand]
    recipe = settings.get("recipe")
    stored = Path(settings.get("out") or _default_out(chosen.subcommand, recipe)) / "config.yaml"
    if settings.get("resume") and stored.exists():
        commands[chosen.subcommand].default_config_files = [str(stored)]
    elif recipe is not None:
        commands[chosen.subcommand].default_config_files = [str(recipe_path(recipe))]
    return parser.parse_args(arguments)


def _default_out(command: str, recipe: str | None) -> str:
    return f"runs/{recipe or command}"


def _parsers() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="neuralcollapse",
        description="Measure, induce and guide neural collapse in classifiers.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"neuralcollapse {version('neuralcollapse')}")
    chosen = parser.add_subcommands(dest="subcommand", metavar="COMMAND")
    commands = {}
    for name, (make, _, summary) in _COMMANDS.items():
        commands[name] = make()
        chosen.add_subcommand(name, commands[name], help=summary)
    return parser, commands


def _compare_parser() -> ArgumentParser:
    return _training_parser(
        CompareConfig,
        "compare",
        "Train standard, fixed and implicit over several seeds, from the same weights and batches for each seed; print "
        "the table, write the figures. Everything is measured in evaluation mode on un-augmented data.",
    )


def _train_parser() -> ArgumentParser:
    return _training_parser(
        RunConfig,
        "train",
        "Train one run, from the recipe of a published experiment or from any settings; print the table, write the "
        "figures. Everything is measured in evaluation mode on un-augmented data.",
    )


def _training_parser(settings: type[RunConfig] | type[CompareConfig], command: str, description: str) -> ArgumentParser:
    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file of settings; flags after it go over it")
    for section in reversed(settings.__bases__):
        parser.add_class_arguments(section)
    output = parser.add_argument_group("Output")
    default = _default_out(command, None) + (", or runs/RECIPE" if settings is RunConfig else "")
    output.add_argument("--out", type=str | None, help=f"folder to write; by default {default}")
    output.add_argument("--resume", action="store_true", help="go on with the run that the folder holds")
    output.add_argument("--overwrite", action="store_true", help="delete the run that the folder holds")
    # Found in the config.yaml of a run, which can be given as --config; nothing is read from it.
    parser.add_argument("--environment", type=dict[str, Any], default=SUPPRESS, help=SUPPRESS)
    return parser


def _recipes_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="List the recipes of published experiments: what each reproduces, and how many of its settings no "
        "source gives, so that they are our choice.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("name", type=str | None, nargs="?", help="show this recipe, with the source of each setting")
    return parser


def _compare(settings: Namespace) -> None:
    config = _config(CompareConfig, settings)

    from neuralcollapse.lab.commands.compare import (
        compare,  # takes seconds: not for --help, nor for a mistake in a flag
    )

    out = Path(settings.out or _default_out("compare", None))
    _print_report(compare(config, out, resume=settings.resume, overwrite=settings.overwrite))


def _train(settings: Namespace) -> None:
    config = _config(RunConfig, settings)

    from neuralcollapse.lab.commands.train import train_single

    out = Path(settings.out or _default_out("train", settings.recipe))
    _print_report(train_single(config, out, resume=settings.resume, overwrite=settings.overwrite))


def _recipes(settings: Namespace) -> None:
    print(recipes_table() if settings.name is None else recipe_path(settings.name).read_text().rstrip())


def _config(kind: type[_Config], settings: Namespace) -> _Config:
    if settings.resume and settings.overwrite:
        raise ValueError("resume and overwrite must not both be given")
    return kind(**{field.name: settings[field.name] for field in fields(kind)})


def _print_report(report: Report) -> None:
    print(f"\n{report.table}\n\nwrote {report.written[0]}")
    for path in report.written[1:]:
        print(f"      {path}")


def _one_line(message: str) -> str:
    """A message of jsonargparse, or any other, in the words of the command line."""
    message = re.sub(r'Parser key "(\w+)":', r"--\1:", message)
    message = re.sub(r"<class '(\w+)'>", r"\1", message)
    message = re.sub(r"(?:a )?typing\.Literal\[(.*?)\]", r"one of \1", message)
    union = r"Does not validate.*?Subtypes: \[(.*?)\]\n.*Given value:"
    message = re.sub(union, r"Expected \1. Got value:", message, flags=re.DOTALL)
    return " ".join(message.split())


# Each with what makes its parser, what runs it, and what the list of commands says.
_COMMANDS: dict[str, tuple[Callable[[], ArgumentParser], Callable[[Namespace], None], str]] = {
    "compare": (_compare_parser, _compare, "train the methods over several seeds, print a table, draw figures"),
    "train": (_train_parser, _train, "train one run, from the recipe of a published experiment or any settings"),
    "recipes": (_recipes_parser, _recipes, "list the recipes of published experiments"),
}
