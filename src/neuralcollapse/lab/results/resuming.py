"""Checks of the stored settings, facts and data of a run, for types and for resuming."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from neuralcollapse.lab.config import RunConfig
from neuralcollapse.lab.untrusted import without_secrets

# Settings that may change when a run resumes, because they do not affect results.
FREE = ("checkpoint_minutes", "devices", "num_nodes")
# Schedules whose rate at an epoch is independent of the number of epochs; None for an optimiser without a rate.
OPEN_ENDED = (None, "constant", "step")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_fingerprint(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(of_split, dict) for of_split in value.values())


_Check = tuple[Callable[[Any], bool], str]
_TEXT, _INTEGER = (_is_text, "a text"), (_is_integer, "an integer")
# Types of values that are read from files; None counts as missing.
SETTINGS: dict[str, _Check] = {
    **dict.fromkeys(("method", "loss", "backbone", "model", "data", "recipe", "schedule"), _TEXT),
    **dict.fromkeys(("seed", "epochs"), _INTEGER),
    "weight_average": (_is_number, "a number"),
    "lr": (lambda value: _is_number(value) or value == "auto", "a number or auto"),
}
FACTS: dict[str, _Check] = {
    **dict.fromkeys(
        ("neuralcollapse", "machine", "accelerator", "command", "data", "started", "ended", "diverged"), _TEXT
    ),
    "packages": (lambda value: isinstance(value, dict), "a mapping"),
    "num_classes": (lambda value: _is_integer(value) and value >= 2, "an integer of at least 2"),
    "largest_class_share": (_is_number, "a number"),
    "finished": (lambda value: isinstance(value, bool), "true or false"),
    "resumed": (lambda value: isinstance(value, list), "a list"),
    "runs": (
        lambda value: isinstance(value, list) and all(map(is_folder_name, value)),
        "a list of folder names without paths",
    ),
    "data_fingerprint": (_is_fingerprint, "a mapping of splits to mappings"),
    "checkpoints": (_is_fingerprint, "a mapping of epochs to mappings"),
}
# Facts that are required to resume a run, because the summary shows them.
NEEDED_FACTS = ("neuralcollapse", "packages", "machine", "command")


def is_folder_name(name: Any) -> bool:
    """Return whether a value is the name of a folder without a path.

    Examples:
        >>> [is_folder_name(name) for name in ("fixed-seed0", "..", "a/b", "/tmp", "")]
        [True, False, False, False, False]
    """
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def is_external(settings: Mapping[str, Any]) -> bool:
    """Return whether settings belong to measurements of an external model instead of a run."""
    return "method" not in settings and "model" in settings


def check_types(values: Mapping[str, Any], checks: Mapping[str, _Check], where: str) -> None:
    """Check the types of values.

    Args:
        values: Values by name; missing values and None are accepted.
        checks: Checks by name.
        where: Beginning of the message.

    Raises:
        ValueError: if a value has the wrong type.
    """
    for name, (fits, words) in checks.items():
        value = values.get(name)
        if value is not None and not fits(value):
            raise ValueError(f"{where}: {name} must be {words}, got {without_secrets(value, name)!r}")


def check_plain(value: Any, name: str) -> None:
    """Check that a value is plain: a text, number, boolean or None, or a list or mapping of these.

    Raises:
        ValueError: if the value is not plain.
    """
    if isinstance(value, dict):
        if strange := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"{name} must have texts for names, got {strange[0]!r}")
        for key, item in value.items():
            check_plain(item, f"{name}[{key!r}]")
    elif isinstance(value, list):
        for item in value:
            check_plain(item, name)
    elif type(value) not in (str, int, float, bool, type(None)):
        raise ValueError(f"{name} must be a plain value (text, number, list, mapping), got {type(value).__name__}")


def changed_settings(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> tuple[dict[str, tuple[Any, Any]], str]:
    """Return the settings that prevent a run or a checkpoint from being resumed.

    A setting that did not exist when the settings were stored is assumed to have its default. More epochs are allowed
    if the learning rate does not depend on their number.

    Args:
        stored: Settings of the run.
        asked: Settings to resume with.

    Returns:
        Stored and given value by name; and a reason to add to the message, if it is not obvious.
    """
    stored, asked = (dict(without_secrets(settings)) for settings in (stored, asked))
    compared = [*asked, *(name for name in stored if name not in asked)]
    known = RunConfig.override(dict(RunConfig.resolve({}, RunConfig.sound(stored))[0]), stored)
    changed = [name for name in compared if asked.get(name) != known.get(name) and name not in FREE]
    reason = ""
    if "epochs" in changed and _is_integer(known["epochs"]) and asked.get("epochs", 0) > known["epochs"]:
        if known.get("schedule") in OPEN_ENDED:
            changed.remove("epochs")
        else:
            reason = f" (schedule {known['schedule']} ends with the last epoch, so the run cannot be extended)"
    return {name: (known.get(name), asked.get(name)) for name in changed}, reason


def changed_data(stored: Mapping[str, Any], present: Mapping[str, Any]) -> str | None:
    """Describe the first part of the data whose fingerprint has changed; None if nothing changed or is known.

    Args:
        stored: Stored SHA-256 by split and part.
        present: SHA-256 of the present data by split and part.
    """
    for split, of_split in stored.items():
        for part, digest in of_split.items():
            now = present.get(split, {}).get(part)
            if now != digest:
                is_now = "are missing" if now is None else f"have {str(now)[:12]}…"
                return f"{part} of the {split} split had the SHA-256 {str(digest)[:12]}… and now {is_now}"
    more = [split for split in present if split not in stored]
    return f"the data now have a {more[0]} split, but had none" if stored and more else None
