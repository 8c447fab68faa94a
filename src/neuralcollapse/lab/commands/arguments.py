"""Settings as flags: each with its type, what it does, what it belongs to and its default."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from argparse import SUPPRESS
from collections.abc import Mapping
from dataclasses import Field, fields
from typing import Any, get_args, get_origin

import yaml
from jsonargparse import ActionYesNo, ArgumentParser, Namespace

from neuralcollapse.lab.results.folder import FORMAT, with_earlier_meanings
from neuralcollapse.lab.settings import Settings, describe, type_hints

_EXPONENT = re.compile(r"[-+]?\d+[eE][-+]?\d+")


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
            if bool in (hints[one.name], *get_args(hints[one.name])):
                group.add_argument(f"--{one.name}", action=ActionYesNo(no_prefix="no-"), nargs="?", help=text)
            else:
                hint = hints[one.name] | str if _is_list(hints[one.name]) else hints[one.name]
                group.add_argument(f"--{one.name}", type=hint, metavar=one.name.upper(), help=text)
    # In the config.yaml of a run, which can be given as --config.
    parser.add_argument("--format", type=int, default=SUPPRESS, help=SUPPRESS)
    parser.add_argument("--environment", type=dict[str, Any], default=SUPPRESS, help=SUPPRESS)


def add_output(parser: ArgumentParser, default: str) -> None:
    """Add where to write, and what to do with what is there."""
    output = parser.add_argument_group("Output")
    output.add_argument("--out", type=str | None, metavar="OUT", help=f"folder to write; by default {default}")
    output.add_argument("--resume", action="store_true", help="go on with the run that the folder holds")
    output.add_argument("--overwrite", action="store_true", help="delete the run that the folder holds")
    output.add_argument("--print_config", action="store_true", help="print the settings in force as YAML, and exit")


def asked_for(settings: Namespace, *sections: type[Settings]) -> dict[str, Any]:
    """The settings of these sections that somebody gave, in a file or as a flag; null asks for the default."""
    if settings.get("resume") and settings.get("overwrite"):
        raise ValueError("resume and overwrite must not both be given")
    given: Mapping[str, Any] = settings.as_dict()
    hints = {name: hint for section in sections for name, hint in type_hints(section).items()}
    found = {name: given[name] for name in hints if name in given}
    found = {name: _items(value) if _is_list(hints[name]) else value for name, value in found.items()}
    # Of a config.yaml that an earlier version wrote; format 0 has no number, and the environment in the same file.
    earlier = given.get("format", 0 if "environment" in given else FORMAT) < FORMAT
    return with_earlier_meanings(found) if earlier else found


def _items(value: Any) -> Any:
    """The items of a list that is written with commas alone."""
    if not isinstance(value, str):
        return value
    # YAML 1.1 takes 1e-3, without a point, for a text.
    return [float(item) if _EXPONENT.fullmatch(str(item)) else item for item in yaml.safe_load(f"[{value}]")]


def _is_list(hint: Any) -> bool:
    return any(get_origin(one) is list for one in (hint, *get_args(hint)))


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
