"""The command ``neuralcollapse``."""

from __future__ import annotations

import re
import sys
from argparse import SUPPRESS, ArgumentError
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from neuralcollapse.lab.config import CompareConfig

_USER_ERROR, _INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; errors of the user's are one line on stderr and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        chosen = _parse(arguments)
        _COMMANDS[chosen.subcommand](chosen[chosen.subcommand])
    except (ArgumentError, ValueError, OSError) as error:
        print(f"neuralcollapse: error: {_one_line(str(error))}", file=sys.stderr)
        return _USER_ERROR
    except KeyboardInterrupt:
        print("\nneuralcollapse: interrupted; the same command with --resume goes on", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _parse(arguments: Sequence[str]) -> Namespace:
    """The command and its settings; with --resume, settings not given are those of the run to go on with."""
    parser, commands = _parsers()
    chosen = parser.parse_args(arguments)
    settings = chosen[chosen.subcommand]
    if settings.get("resume") and (stored := Path(settings.out) / "config.yaml").exists():
        commands[chosen.subcommand].default_config_files = [str(stored)]
        chosen = parser.parse_args(arguments)
    return chosen


def _parsers() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="neuralcollapse",
        description="Measure, induce and guide neural collapse in classifiers.",
        exit_on_error=False,
    )
    parser.add_argument("--version", action="version", version=f"neuralcollapse {version('neuralcollapse')}")
    commands = {"compare": _compare_parser()}
    chosen = parser.add_subcommands(dest="subcommand", metavar="COMMAND")
    chosen.add_subcommand(
        "compare", commands["compare"], help="train the methods over several seeds, print a table, draw figures"
    )
    return parser, commands


def _compare_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Train standard, fixed and implicit over several seeds, from the same weights and batches for each "
        "seed; print the table, write the figures. Everything is measured in evaluation mode on un-augmented data.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of settings; flags after it go over it")
    for section in reversed(CompareConfig.__bases__):
        parser.add_class_arguments(section)
    output = parser.add_argument_group("Output")
    output.add_argument("--out", type=str, default="runs/compare", help="folder to write")
    output.add_argument("--resume", action="store_true", help="go on with the run that the folder holds")
    output.add_argument("--overwrite", action="store_true", help="delete the run that the folder holds")
    # Found in the config.yaml of a run, which can be given as --config; nothing is read from it.
    parser.add_argument("--environment", type=dict[str, Any], default=SUPPRESS, help=SUPPRESS)
    return parser


def _compare(settings: Namespace) -> None:
    config = CompareConfig(**{field.name: settings[field.name] for field in fields(CompareConfig)})
    if settings.resume and settings.overwrite:
        raise ValueError("resume and overwrite must not both be given")

    from neuralcollapse.lab.compare import compare  # takes seconds: not for --help, nor for a mistake in a flag

    done = compare(config, Path(settings.out), resume=settings.resume, overwrite=settings.overwrite)
    print(f"\n{done.table}\n\nwrote {done.written[0]}")
    for path in done.written[1:]:
        print(f"      {path}")


def _one_line(message: str) -> str:
    """A message of jsonargparse, or any other, in the words of the command line."""
    message = re.sub(r'Parser key "(\w+)":', r"--\1:", message)
    message = re.sub(r"<class '(\w+)'>", r"\1", message)
    message = re.sub(r"(?:a )?typing\.Literal\[(.*?)\]", r"one of \1", message)
    union = r"Does not validate.*?Subtypes: \[(.*?)\]\n.*Given value:"
    message = re.sub(union, r"Expected \1. Got value:", message, flags=re.DOTALL)
    return " ".join(message.split())


_COMMANDS = {"compare": _compare}
