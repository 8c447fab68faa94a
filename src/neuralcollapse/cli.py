"""The command ``neuralcollapse``: parsing, and errors in one line.

Importing this module needs the standard library only. Other packages are imported once Ctrl-C is handled, and a
package that is not installed is an error in one line.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuralcollapse._version import __version__
from neuralcollapse.lab.stopping import INTERRUPTED, TERMINATED, Terminated, answering_signals, caused_by
from neuralcollapse.lab.streams import lasting_streams

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

# In the order in which `--help` lists them.
COMMANDS = (
    "compare",
    "train",
    "recipes",
    "study",
    "measure",
    "distance",
    "aggregate",
    "plot",
    "report",
    "ufm",
    "landscape",
)
_RESUMABLE = ("compare", "train", "ufm")
_USER_ERROR = 2
_OUT_OF_MEMORY = re.compile(r"can't allocate memory|out of memory", re.IGNORECASE)
# Packages of the extra `lab`, by the names under which they are imported.
_LAB = (
    "datasets",
    "jsonargparse",
    "lightning",
    "matplotlib",
    "pandas",
    "PIL",
    "plotly",
    "pyarrow",
    "scipy",
    "sklearn",
    "yaml",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; user errors are one line on stderr and exit code 2.

    Args:
        arguments: Arguments of the command line; None for those of this process, which then ends with the command: its
            streams are prepared, a second Ctrl-C ends it at once, and Ctrl-C after the command has ended is ignored.

    Returns:
        The exit code: 130 after Ctrl-C, 143 after SIGTERM.
    """
    owns_process = arguments is None
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    advice = "; with --resume, without --overwrite, it goes on" if _name(arguments) in _RESUMABLE else ""
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
            return _end(f"neuralcollapse: error: {message}{_place(message, arguments)}", _USER_ERROR)
        return _end(interrupted, INTERRUPTED) if signals.interrupted else code


def _run(arguments: list[str]) -> int:
    name, command = _chosen(arguments)
    chosen = _parse(_parser(name), command, arguments)
    assert command is not None  # without a command, the parser exits or raises
    from neuralcollapse.lab.commands.arguments import check_named_classes

    settings = chosen[chosen.subcommand]
    check_named_classes(settings, arguments)
    return command.run(settings) or 0


def _end(line: str, code: int) -> int:
    """Print why the command ends, below a progress bar if there is one, on the first rank only; return the code."""
    from neuralcollapse.lab.ranks import global_rank

    if global_rank() == 0:
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
        return f"there is too little memory: {reason[2] or reason[0] or 'an array could not be made'}"
    return _one_line(str(error)) if isinstance(error, ArgumentError | ValueError | OSError) else None


def _command(name: str) -> Any:
    """Return the module of a command: SUMMARY, DESCRIPTION, USAGE, SECTIONS, add_arguments(parser), run(settings)."""
    return import_module(f"neuralcollapse.lab.commands.{name}")


def _name(arguments: Sequence[str]) -> str | None:
    """Return the name of the chosen command, or None if there is no such command."""
    name = next((argument for argument in arguments if not argument.startswith("-")), None)
    return name if name in COMMANDS else None


def _chosen(arguments: Sequence[str]) -> tuple[str | None, Any]:
    name = _name(arguments)
    return (name, None) if name is None else (name, _command(name))


def _parser(chosen: str | None) -> ArgumentParser:
    """Return the parser of all commands, with the arguments of the chosen one."""
    import yaml
    from jsonargparse import ArgumentParser, set_loader

    from neuralcollapse.lab.parsing import load_yaml

    set_loader("settings", load_yaml, exceptions=(yaml.YAMLError,))
    options: dict[str, Any] = {
        "exit_on_error": False,
        "allow_abbrev": False,
        "formatter_class": _help_formatter(),
        "parser_mode": "settings",
    }
    parser = ArgumentParser(
        prog="neuralcollapse", description="Measure, induce and guide neural collapse in classifiers.", **options
    )
    parser.add_argument("--version", action="version", version=f"neuralcollapse {__version__}")
    commands = parser.add_subcommands(dest="subcommand", metavar="COMMAND")
    for name in COMMANDS:
        command = _command(name)
        usage = f"neuralcollapse {name} {command.USAGE}"
        subparser = ArgumentParser(description=command.DESCRIPTION, usage=usage, print_config=None, **options)
        if name == chosen:
            command.add_arguments(subparser)
        commands.add_subcommand(name, subparser, help=command.SUMMARY)
    return parser


def _help_formatter() -> Any:
    from jsonargparse import DefaultHelpFormatter

    class Help(DefaultHelpFormatter):
        """Help texts as written, without the types and defaults that jsonargparse adds."""

        def _get_help_string(self, action: Any) -> str:
            return action.help or ""

    return Help


def _parse(parser: ArgumentParser, command: Any, arguments: list[str]) -> Namespace:
    """Parse the arguments; the error for an unknown flag names the most similar flags."""
    from argparse import ArgumentError

    from neuralcollapse.lab.settings import nearest, type_hints

    try:
        return parser.parse_args(arguments, defaults=False)
    except ArgumentError as error:
        unknown = re.search(r"(?i)unrecognized arguments: (--[^\s=]+)", str(error))
        if unknown is None or command is None:
            raise
        flags = [f"--{name}" for section in command.SECTIONS for name in type_hints(section)]
        raise ValueError(f"{error}{nearest(unknown[1], flags)}") from error


def _place(message: str, arguments: Sequence[str]) -> str:
    """Return the file and line of the setting that a message is about, if it was not given as a flag."""
    places: dict[str, str] = {}
    for flag, following in pairwise([*arguments, ""]):
        file = Path(flag.partition("=")[2] or following)
        if flag.partition("=")[0] == "--config" and file.is_file():
            lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
            keys = ((re.match(r"[\"']?(\w+)[\"']?\s*:", line), number) for number, line in enumerate(lines, 1))
            places |= {key[1]: f" ({file}, line {number})" for key, number in keys if key}
            if re.search("parsing config|Unexpected config", message):
                return f" ({file})"
    setting = re.search(r"option '(\w+)'", message) or re.search(r"^(?:--)?(\w+)", message)
    flags = {argument.partition("=")[0] for argument in arguments}
    return places.get(setting[1], "") if setting and f"--{setting[1]}" not in flags else ""


def _one_line(message: str) -> str:
    """Return a message in one line, with those of jsonargparse in the words of the command line."""
    message = re.sub(
        r"Unexpected config: .*",
        "Unexpected config: a file of settings holds lines NAME: VALUE",
        message,
        flags=re.DOTALL,
    )
    message = re.sub(r'Parser key "(\w+)":', r"--\1:", message)
    message = message.replace('in "<unicode string>", ', "in ")
    message = re.sub(r"<class '(\w+)'>", r"\1", message)
    message = re.sub(r"(?:a )?typing\.Literal\[(.*?)\]", r"one of \1", message)
    union = r"Does not validate.*?Subtypes: \[(.*?)\]\n.*Given value:"
    message = re.sub(union, r"Expected \1. Got value:", message, flags=re.DOTALL)
    return " ".join(message.replace(", NoneType.", ".").split())


if __name__ == "__main__":
    sys.exit(main())
