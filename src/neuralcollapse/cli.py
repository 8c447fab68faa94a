"""Command ``neuralcollapse``: parsing of arguments, and errors in one line.

Importing this module needs only the standard library. Other packages, and only the module of the chosen command, are
imported after the handler of Ctrl-C is installed. If a package is not installed, the error is a single line.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuralcollapse._version import __version__
from neuralcollapse.lab.commands import COMMANDS, Command, load_command
from neuralcollapse.lab.process import (
    INTERRUPTED,
    TERMINATED,
    LostRank,
    Terminated,
    answering_signals,
    caused_by,
    global_rank,
    lasting_streams,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

_RESUMABLE = ("compare", "train", "ufm")
_USER_ERROR = 2
_OUT_OF_MEMORY = re.compile(r"can't allocate memory|out of memory", re.IGNORECASE)
# Packages of the extra `lab`, by import name.
_LAB = (
    "datasets",
    "jsonargparse",
    "lightning",
    "matplotlib",
    "pandas",
    "PIL",
    "plotly",
    "pyarrow",
    "pydantic",
    "scipy",
    "sklearn",
    "yaml",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; user errors are one line on stderr and exit code 2.

    Args:
        arguments: Arguments of the command line. If None, those of this process are used, which then ends with the
            command: its streams are prepared, a second Ctrl-C ends it immediately, and Ctrl-C after the command has
            ended is ignored.

    Returns:
        The exit code: 130 after Ctrl-C, 143 after SIGTERM.
    """
    owns_process = arguments is None
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    advice = "; resume it with --resume" if _name(arguments) in _RESUMABLE else ""
    interrupted = f"neuralcollapse: interrupted{advice}"
    with (
        lasting_streams(alone=owns_process),
        answering_signals(interrupted if owns_process else None) as signals,
    ):
        try:
            code = _run(arguments)
        except BaseException as error:
            signals.ignore()
            if signals.interrupted or caused_by(error, KeyboardInterrupt):
                return _end(interrupted, INTERRUPTED)
            if caused_by(error, Terminated):
                return _end(f"neuralcollapse: terminated{advice}", TERMINATED)
            message = _message(error)
            if message is None:
                raise
            line = f"neuralcollapse: error: {message}{_location(message, arguments)}"
            return _end(line, _USER_ERROR, all_ranks=isinstance(error, LostRank))
        return _end(interrupted, INTERRUPTED) if signals.interrupted else code


def _run(arguments: list[str]) -> int:
    command, settings = _parse(arguments)
    return command.run(settings) or 0


def _end(line: str, code: int, *, all_ranks: bool = False) -> int:
    """Print the reason for the end, below a progress bar if there is one, on the first or on all ranks.

    Args:
        line: The reason.
        code: The exit code.
        all_ranks: Whether each rank prints the reason.

    Returns:
        The exit code.
    """
    if all_ranks or global_rank() == 0:
        print("\n" * (code != _USER_ERROR and sys.stderr.isatty()) + line, file=sys.stderr)
    return code


def _message(error: BaseException) -> str | None:
    """Return the message of an error that the user can correct; None for other errors."""
    if isinstance(error, ImportError):
        named = (error.name or "").partition(".")[0]
        missing = next((name for name in _LAB if name == named or f"'{name}'" in str(error)), None)
        if missing is None:
            return None
        return f"the package {missing} of the extra lab is not installed: pip install 'neuralcollapse[lab]'"
    from argparse import ArgumentError

    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error))):
        reason = _one_line(str(error)).partition("DefaultCPUAllocator: ")
        return f"there is too little memory: {reason[2] or reason[0] or 'an array could not be allocated'}"
    return _one_line(str(error)) if isinstance(error, ArgumentError | ValueError | OSError) else None


def _name(arguments: Sequence[str]) -> str | None:
    """Return the name of the chosen command, or None if it is missing or unknown."""
    name = next((argument for argument in arguments if not argument.startswith("-")), None)
    return name if name in COMMANDS else None


def _parse(arguments: list[str]) -> tuple[Command, Namespace]:
    """Return the chosen command and its arguments; without a command, the parser prints its help or raises.

    Raises:
        ValueError: if a flag is unknown (the message names the setting that has it as an option, or the most similar
            flags), or a class is named only in a file.
        ArgumentError: if the arguments are otherwise invalid.
    """
    from argparse import ArgumentError

    name = _name(arguments)
    command = None if name is None else load_command(name)
    parser = _parser(name, command)

    from neuralcollapse.lab.commands.arguments import check_named_classes
    from neuralcollapse.lab.settings import closest_names, setting_with_option

    try:
        parsed = parser.parse_args(arguments, defaults=False)
    except ArgumentError as error:
        unknown = re.search(r"(?i)unrecognized arguments: (--[^\s=]+)", str(error))
        if unknown is None or command is None:
            raise
        option = unknown[1].removeprefix("--")
        if holder := setting_with_option(option, command.sections):
            raise ValueError(f"{error}; {option} is an option of --{holder}") from error
        flags = [f"--{name}" for section in command.sections for name in section.model_fields]
        raise ValueError(f"{error}{closest_names(unknown[1], flags)}") from error
    assert command is not None  # without a command, parsing exits or raises
    settings = parsed[parsed.subcommand]
    check_named_classes(settings, arguments)
    return command, settings


def _parser(chosen: str | None, command: Command | None) -> ArgumentParser:
    """Return the parser of all commands, with the arguments of the chosen one."""
    import yaml
    from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_loader

    from neuralcollapse.lab.commands.arguments import load_settings

    class Help(DefaultHelpFormatter):
        """Formatter of help texts without the types and defaults that jsonargparse adds."""

        def _get_help_string(self, action: Any) -> str:
            return action.help or ""

    set_loader("settings", load_settings, exceptions=(yaml.YAMLError,))
    options: dict[str, Any] = {
        "exit_on_error": False,
        "allow_abbrev": False,
        "formatter_class": Help,
        "parser_mode": "settings",
    }
    parser = ArgumentParser(
        prog="neuralcollapse", description="Measure, induce and guide neural collapse in classifiers.", **options
    )
    parser.add_argument("--version", action="version", version=f"neuralcollapse {__version__}")
    subcommands = parser.add_subcommands(dest="subcommand", metavar="COMMAND")
    for name, (_, summary) in COMMANDS.items():
        subparser = ArgumentParser(prog=f"neuralcollapse {name}", print_config=None, **options)
        if name == chosen and command is not None:
            _add_arguments(subparser, command)
        subcommands.add_subcommand(name, subparser, help=summary)
    return parser


def _add_arguments(parser: ArgumentParser, command: Command) -> None:
    """Add the arguments of a command, and one flag per setting, which the usage line summarises."""
    from neuralcollapse.lab.commands.arguments import add_sections

    parser.description = command.description
    command.add_arguments(parser)
    parser.usage = parser.format_usage().removeprefix("usage: ").rstrip()
    if command.sections:
        parser.usage += " [--SETTING VALUE ...]"
        add_sections(parser, *command.sections)


def _location(message: str, arguments: Sequence[str]) -> str:
    """Return the file and line of the setting to which a message refers, if it was not given as a flag."""
    locations: dict[str, str] = {}
    for flag, following in pairwise([*arguments, ""]):
        file = Path(flag.partition("=")[2] or following)
        if flag.partition("=")[0] == "--config" and file.is_file():
            lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
            keys = ((re.match(r"[\"']?(\w+)[\"']?\s*:", line), number) for number, line in enumerate(lines, 1))
            locations |= {key[1]: f" ({file}, line {number})" for key, number in keys if key}
            if re.search("parsing config|Unexpected config", message):
                return f" ({file})"
    setting = re.search(r"option '(\w+)'", message) or re.search(r"^(?:--)?(\w+)", message)
    flags = {argument.partition("=")[0] for argument in arguments}
    return locations.get(setting[1], "") if setting and f"--{setting[1]}" not in flags else ""


def _one_line(message: str) -> str:
    """Return a message in one line; messages of jsonargparse about the file of settings are reworded."""
    if message.startswith("Unexpected config: "):
        message = "Unexpected config: a file of settings must consist of lines NAME: VALUE"
    message = message.replace('Parser key "config":', "--config:").replace('in "<unicode string>", ', "in ")
    return " ".join(message.split())


if __name__ == "__main__":
    sys.exit(main())
