"""Protection against untrusted files: limits of YAML, no import of named classes, no display of secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MOST_DEPTH, _MOST_VALUES = 50, 1_000_000
_SECRET_NAME = re.compile(
    r"token(?!iz)|secret|passw|pwd|credential|authoriz|(api|access|private|auth|account|sas|signing)[-_]?key|(^|[-_])(key|auth)$",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(
    r"\b(hf_\w{8}|sk-[\w-]{8}|gh[pousr]_\w{8}|github_pat_\w{8}|glpat-[\w-]{8}|xox[abp]-\w|AKIA\w{8}|AIza[\w-]{8}|eyJ[\w-]{10})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY|://[^/\s:@]+:[^/\s@]+@"
)
REDACTED = "***"


def load_yaml(text: str) -> Any:
    """Return the plain values of a YAML document.

    Raises:
        ValueError: if the text is not YAML of plain values, or exceeds the limits of `check_limits`.
    """
    try:
        check_limits(text)
        return yaml.load(text, _LOADER)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML of plain values: {' '.join(str(error).split())}") from error


def check_limits(text: str) -> None:
    """Check the size of a YAML document before it is loaded.

    Deep nesting would crash the process inside libyaml, and nested aliases may expand to more values than fit into
    memory.

    Raises:
        yaml.YAMLError: if the document is nested deeper or expands to more values than settings need, or is not YAML.
    """
    anchors: dict[str, int] = {}
    sizes: list[int] = [0]  # number of values in each open collection, beginning with the document
    names: list[str | None] = [None]
    for event in yaml.parse(text, _LOADER):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchors:
                raise yaml.YAMLError(f"the alias *{event.anchor} is undefined, or contains itself")
            sizes[-1] += anchors[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            sizes[-1] += 1
            if event.anchor:
                anchors[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            if event.anchor:
                anchors.pop(event.anchor, None)
            sizes.append(1)
            names.append(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            size, name = sizes.pop(), names.pop()
            sizes[-1] += size
            if name:
                anchors[name] = size
        if len(sizes) > _MOST_DEPTH:
            raise yaml.YAMLError(f"its values are nested more than {_MOST_DEPTH} deep")
        if sum(sizes) > _MOST_VALUES:
            raise yaml.YAMLError(f"it holds more than {_MOST_VALUES:,} values")


def check_class_is_named(
    settings: Mapping[str, Any], named: str | None, where: Path | str, setting: str = "backbone"
) -> None:
    """Check that a class named by settings from a file is named on the command line as well.

    Args:
        settings: Settings from the file.
        named: Class named on the command line, or None.
        where: The file.
        setting: Setting that may name a class.

    Raises:
        ValueError: if the class is not named on the command line.
    """
    path = settings.get(setting)
    if isinstance(path, str) and "." in path and path != named:
        raise ValueError(
            f"{setting} {path!r} is a class named in {str(where)!r}, which is not imported automatically: if you trust "
            f"it, name it on the command line with --{setting} {path}"
        )


def without_secrets(values: Any, name: str = "") -> Any:
    """Return plain values with every text replaced that looks like a secret or whose name looks like that of a secret.

    Args:
        values: A mapping, a list or a single value.
        name: Name of the value.

    Examples:
        >>> without_secrets({"depth": 3, "hub_token": "abc", "num_tokens": 4})
        {'depth': 3, 'hub_token': '***', 'num_tokens': 4}
    """
    if isinstance(values, Mapping):
        inherited = name if _SECRET_NAME.search(name) else ""
        return {key: without_secrets(value, inherited or str(key)) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [without_secrets(value, name) for value in values]
    if isinstance(values, str) and values and (_SECRET_NAME.search(name) or _SECRET_VALUE.search(values)):
        return REDACTED
    return values
