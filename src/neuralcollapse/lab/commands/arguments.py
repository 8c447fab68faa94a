"""Settings as flags: each with its type, what it does, what it belongs to and its default."""

from __future__ import annotations

import ast
import inspect
import textwrap
from argparse import SUPPRESS
from collections.abc import Sequence
from dataclasses import Field, fields
from itertools import pairwise
from typing import Any, get_args

from jsonargparse import ArgumentParser, Namespace

from neuralcollapse.lab.parsing import parse
from neuralcollapse.lab.results.folder import FORMAT, with_earlier_meanings
from neuralcollapse.lab.settings import Settings, describe, type_hints

_OUTPUT = {"out": str, "resume": bool, "overwrite": bool, "print_config": bool}


def add_sections(parser: ArgumentParser, *sections: type[Settings]) -> None:
    """Add the settings of each section as a group of flags, and `--config`.

    No flag has a default, so that what is parsed is what was asked for. Of a setting that two sections have, the first
    one's meaning counts.
    """
    parser.add_argument("--config", action="config", help="YAML file of settings; flags go over it")
    there: set[str] = set()
    for section in sections:
        group = parser.add_argument_group(str(section.__doc__).split("\n")[0].rstrip("."))
        described, hints = _descriptions(section), type_hints(section)
        for one in fields(section):
            if one.name in there:
                continue
            there.add(one.name)
            text = f"{described[one.name]} ({_meaning(hints[one.name], one)})"
            # The text is kept, and `asked_for` gives it its type.
            if bool in (hints[one.name], *get_args(hints[one.name])):
                group.add_argument(f"--{one.name}", nargs="?", const="true", metavar="{true,false}", help=text)
                group.add_argument(
                    f"--no-{one.name}", dest=one.name, action="store_const", const="false", help=SUPPRESS
                )
            else:
                group.add_argument(f"--{one.name}", metavar=one.name.upper(), help=text)
    # In the config.yaml of a run, which can be given as --config.
    parser.add_argument("--format", default=SUPPRESS, help=SUPPRESS)
    parser.add_argument("--environment", default=SUPPRESS, help=SUPPRESS)


def add_output(parser: ArgumentParser, default: str) -> None:
    """Add where to write, and what to do with what is there."""
    output = parser.add_argument_group("Output")
    output.add_argument("--out", metavar="OUT", help=f"folder to write; by default {default}")
    output.add_argument("--resume", action="store_true", help="go on with the run that the folder holds")
    output.add_argument("--overwrite", action="store_true", help="delete the run that the folder holds")
    output.add_argument("--print_config", action="store_true", help="print the settings in force as YAML, and exit")


def asked_for(settings: Namespace, *sections: type[Settings]) -> dict[str, Any]:
    """The settings of these sections that were given, in a file or as a flag; null asks for the default.

    What `add_output` added is converted in its place.

    Raises:
        ValueError: if a value is not of its setting's type.
    """
    for name, hint in _OUTPUT.items():
        if name in settings:
            settings[name] = parse(name, settings[name], hint)
    if settings.get("resume") and settings.get("overwrite"):
        raise ValueError("resume and overwrite must not both be given")
    given: dict[str, Any] = settings.as_dict()
    hints: dict[str, Any] = {}
    for section in sections:
        hints = type_hints(section) | hints  # of a setting that two sections have, the first one's type counts
    found = {name: parse(name, given[name], hint) for name, hint in hints.items() if name in given}
    # A config.yaml that an earlier version wrote; format 0 has no number, and the environment in the same file.
    number = parse("format", given.get("format", 0 if "environment" in given else FORMAT), int)
    if not number:
        raise ValueError("config must not be the settings of a run of format 0, which was never released")
    return with_earlier_meanings(found) if number < FORMAT else found


def integer(text: str | int) -> int:
    """Convert the text of a flag, in decimal digits; raises ValueError if it is not an integer."""
    return int(parse("it", text, int))


def check_named_classes(settings: Namespace, arguments: Sequence[str]) -> None:
    """Check that classes are named on the command line, and not in a file of settings alone: they are imported.

    Args:
        settings: What was parsed.
        arguments: The command line.

    Raises:
        ValueError: if a class is named elsewhere.
    """
    for name in ("backbone", "model"):
        value, flag = settings.get(name), f"--{name}"
        if not isinstance(value, str) or "." not in value:
            continue
        given = {following for one, following in pairwise(arguments) if one == flag}
        given |= {one.partition("=")[2] for one in arguments if one.startswith(f"{flag}=")}
        if value not in given:
            raise ValueError(
                f"{name} {str(value)!r} is a class named in a file of settings, and is not imported for that: if you "
                f"trust it, name it on the command line with {flag} {value}"
            )


def _descriptions(section: type[Settings]) -> dict[str, str]:
    """What stands below each setting in the source."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for line, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(below, ast.Expr):
            found[line.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return found


def _meaning(hint: Any, one: Field[Any]) -> str:
    """Type, default and condition of a setting, in words."""
    condition, default = one.metadata.get("belongs_to"), one.metadata.get("default", one.default)
    words = [describe(hint)]
    if default is not None and not callable(default):
        words.append(f"by default {str(default).lower() if isinstance(default, bool) else default}")
    return "; ".join(words + ([f"belongs to {condition.text}"] if condition else []))
