"""The command ``neuralcollapse``: parsing, and errors in one line."""

from __future__ import annotations

import re
import sys
from argparse import Action, ArgumentError
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from neuralcollapse.lab.settings import nearest, type_hints
from neuralcollapse.lab.stopping import TERMINATED, Terminated, on_sigterm, terminate

# In the order of the list that `--help` prints.
COMMANDS = (
    "compare",
    "train",
    "recipes",
    "study",
    "measure",
    "distance",
    "aggregate",
    "plot",
    "ufm",
    "landscape",
)
_USER_ERROR, _INTERRUPTED = 2, 130


class _Help(DefaultHelpFormatter):
    """Help that says what is written here, and not types and defaults of Python."""

    def _get_help_string(self, action: Action) -> str:
        return action.help or ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; errors of the user's are one line on stderr and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with on_sigterm(terminate):
            name, command = _chosen(arguments)
            parser = _parser(name)
            chosen = _parse(parser, command, arguments)
            return command.run(chosen[chosen.subcommand]) or 0
    except (ArgumentError, ValueError, OSError) as error:
        message = _one_line(str(error))
        print(f"neuralcollapse: error: {message}{_place(message, arguments)}", file=sys.stderr)
        return _USER_ERROR
    except KeyboardInterrupt:
        print("\nneuralcollapse: interrupted; with --resume, without --overwrite, it goes on", file=sys.stderr)
        return _INTERRUPTED
    except Terminated:
        print("\nneuralcollapse: terminated; with --resume, without --overwrite, it goes on", file=sys.stderr)
        return TERMINATED


def _command(name: str) -> Any:
    """Its module: SUMMARY, DESCRIPTION, USAGE, SECTIONS of settings, add_arguments(parser) and run(settings)."""
    return import_module(f"neuralcollapse.lab.commands.{name}")


def _chosen(arguments: Sequence[str]) -> tuple[str | None, Any]:
    name = next((argument for argument in arguments if not argument.startswith("-")), None)
    return (name, _command(name)) if name in COMMANDS else (None, None)


def _parser(chosen: str | None) -> ArgumentParser:
    """The parser of all commands, with the arguments of the one that is chosen."""
    options: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False, "formatter_class": _Help}
    parser = ArgumentParser(
        prog="neuralcollapse", description="Measure, induce and guide neural collapse in classifiers.", **options
    )
    parser.add_argument("--version", action="version", version=f"neuralcollapse {version('neuralcollapse')}")
    commands = parser.add_subcommands(dest="subcommand", metavar="COMMAND")
    for name in COMMANDS:
        command = _command(name)
        usage = f"neuralcollapse {name} {command.USAGE}"
        own = ArgumentParser(description=command.DESCRIPTION, usage=usage, print_config=None, **options)
        if name == chosen:
            command.add_arguments(own)
        commands.add_subcommand(name, own, help=command.SUMMARY)
    return parser


def _parse(parser: ArgumentParser, command: Any, arguments: list[str]) -> Namespace:
    """What is asked for; a flag that does not exist is answered with those most like it."""
    try:
        return parser.parse_args(arguments, defaults=False)
    except ArgumentError as error:
        unknown = re.search(r"(?i)unrecognized arguments: (--[^\s=]+)", str(error))
        if unknown is None or command is None:
            raise
        flags = [f"--{name}" for section in command.SECTIONS for name in type_hints(section)]
        raise ValueError(f"{error}{nearest(unknown[1], flags)}") from error


def _place(message: str, arguments: Sequence[str]) -> str:
    """Where it stands, if what the message is about was given in a file of settings and not as a flag."""
    places: dict[str, str] = {}
    for flag, following in pairwise([*arguments, ""]):
        file = Path(flag.partition("=")[2] or following)
        if flag.partition("=")[0] == "--config" and file.is_file():
            lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
            keys = ((re.match(r"[\"']?(\w+)[\"']?\s*:", line), number) for number, line in enumerate(lines, 1))
            places |= {key[1]: f" ({file}, line {number})" for key, number in keys if key}
            if re.search("parsing config|Unexpected config", message):
                return f" ({file})"
    told = re.search(r"option '(\w+)'", message) or re.search(r"^(?:--)?(\w+)", message)
    flags = {argument.partition("=")[0] for argument in arguments}
    return places.get(told[1], "") if told and f"--{told[1]}" not in flags else ""


def _one_line(message: str) -> str:
    """A message of jsonargparse, or any other, in the words of the command line."""
    message = re.sub(r'Parser key "(\w+)":', r"--\1:", message)
    message = message.replace('in "<unicode string>", ', "in ")
    message = re.sub(r"<class '(\w+)'>", r"\1", message)
    message = re.sub(r"(?:a )?typing\.Literal\[(.*?)\]", r"one of \1", message)
    union = r"Does not validate.*?Subtypes: \[(.*?)\]\n.*Given value:"
    message = re.sub(union, r"Expected \1. Got value:", message, flags=re.DOTALL)
    return " ".join(message.replace(", NoneType.", ".").split())


if __name__ == "__main__":
    sys.exit(main())
