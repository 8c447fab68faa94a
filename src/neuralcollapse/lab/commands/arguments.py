"""Settings as flags, with their descriptions, types, defaults and conditions."""

from __future__ import annotations

from argparse import SUPPRESS
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from neuralcollapse.lab.results.formats import FORMAT, with_earlier_meanings
from neuralcollapse.lab.settings import (
    Condition,
    Options,
    Settings,
    describe,
    load_typed_yaml,
    load_yaml,
    parse,
    schema_of,
)

_OUTPUT = {"out": str, "resume": bool, "overwrite": bool, "print_config": bool}


def add_sections(parser: ArgumentParser, *sections: type[Settings]) -> None:
    """Add the settings of each section as a group of flags, and `--config`.

    Flags have no default, so that only given values are parsed. If a setting is in two sections, the first one is used.
    """
    parser.add_argument("--config", action="config", help="YAML file of settings; flags override it")
    added: set[str] = set()
    for section in sections:
        group = parser.add_argument_group(str(section.__doc__).split("\n")[0].rstrip("."))
        for name, field in section.model_fields.items():
            if name in added:
                continue
            added.add(name)
            # The text is stored unchanged; `asked_for` converts it.
            if _is_switch(field):
                group.add_argument(f"--{name}", nargs="?", const="true", metavar="{true,false}", help=_help(field))
                group.add_argument(f"--no-{name}", dest=name, action="store_const", const="false", help=SUPPRESS)
            else:
                group.add_argument(f"--{name}", metavar=name.upper(), help=_help(field))


def add_output(parser: ArgumentParser, default: str) -> None:
    """Add the flags of the output folder, and of the run that it may contain."""
    output = parser.add_argument_group("Output")
    output.add_argument("--out", metavar="OUT", help=f"folder to write; by default {default}")
    output.add_argument("--resume", action="store_true", help="resume the run in the folder")
    output.add_argument("--overwrite", action="store_true", help="delete the run in the folder")
    output.add_argument("--print_config", action="store_true", help="print the effective settings as YAML and exit")


def asked_for(settings: Namespace, *sections: type[Settings]) -> dict[str, Any]:
    """Return the explicitly given settings of these sections, from a file or flags; null selects the default.

    The arguments of `add_output` are converted in place.

    Raises:
        ValueError: if a value does not have the type of its setting.
    """
    for name, hint in _OUTPUT.items():
        if name in settings:
            settings[name] = parse(name, settings[name], hint)
    if settings.get("resume") and settings.get("overwrite"):
        raise ValueError("resume and overwrite must not both be given")
    given: dict[str, Any] = settings.as_dict()
    hints: dict[str, Any] = {}
    for section in sections:
        hints = {name: field.annotation for name, field in section.model_fields.items()} | hints
    return {name: parse(name, given[name], hint) for name, hint in hints.items() if name in given}


def load_settings(text: str) -> Any:
    """Load a file of settings, which may be the config.yaml of a run in an earlier format."""
    loaded = load_yaml(text)
    if not isinstance(loaded, dict) or not {"format", "environment"} & set(loaded):
        return loaded
    number = parse("format", loaded.pop("format", 0), int)
    if number < 1:
        raise ValueError("config must not be the settings of a run in format 0, which was never released")
    if number >= FORMAT:
        return loaded
    typed = load_typed_yaml(text)
    return with_earlier_meanings({name: typed[name] for name in loaded}, number)


def check_named_classes(settings: Namespace, arguments: Sequence[str]) -> None:
    """Check that classes to import are named on the command line, not only in a file of settings.

    Args:
        settings: The parsed arguments.
        arguments: The command line.

    Raises:
        ValueError: if a class is named only in a file.
    """
    for name in ("backbone", "model"):
        value, flag = settings.get(name), f"--{name}"
        if not isinstance(value, str) or "." not in value:
            continue
        given = {following for argument, following in pairwise(arguments) if argument == flag}
        given |= {argument.partition("=")[2] for argument in arguments if argument.startswith(f"{flag}=")}
        if value not in given:
            raise ValueError(
                f"{name} {str(value)!r} is a class named in a file of settings, which is not imported automatically: "
                f"if you trust it, name it on the command line with {flag} {value}"
            )


def _is_switch(field: FieldInfo) -> bool:
    schema = schema_of(field.annotation)
    return any(part.get("type") == "boolean" for part in schema.get("anyOf", [schema]))


def _help(field: FieldInfo) -> str:
    """Return description, options, type, default and condition of a setting."""
    words = [describe(schema_of(field.annotation))]
    if field.default not in (None, PydanticUndefined, []):
        words.append(f"by default {str(field.default).lower() if isinstance(field.default, bool) else field.default}")
    notes = {type(note): note for note in field.metadata}
    if condition := notes.get(Condition):
        words.append(f"belongs to {condition.text}")
    options: Options | None = notes.get(Options)
    within = [
        f"{name}: {_help(option)}"
        for kind in (options.kinds if options else ())
        for name, option in kind.model_fields.items()
    ]
    return " ".join([" ".join(str(field.description).split()), *within, f"({'; '.join(words)})"])
