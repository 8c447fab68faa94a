"""Checks of a run's stored settings, facts and data, against types and against those to resume with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from neuralcollapse.lab.config import RunConfig
from neuralcollapse.lab.untrusted import without_secrets

# Settings that may change when a run resumes, since they do not affect its numbers.
FREE = ("checkpoint_minutes", "devices", "num_nodes")
# Schedules whose rate at an epoch does not depend on the number of epochs; None for an optimiser without a rate.
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
# Types of the values that are read again; None counts as missing.
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
        "a list of names of folders, without any path",
    ),
    "data_fingerprint": (_is_fingerprint, "a mapping of splits to mappings"),
    "checkpoints": (_is_fingerprint, "a mapping of epochs to mappings"),
}
# Facts without which a run is not resumed: its summary shows them.
NEEDED_FACTS = ("neuralcollapse", "packages", "machine", "command")


def is_folder_name(name: Any) -> bool:
    """Return whether a value is the name of a folder without any path.

    Examples:
        >>> [is_folder_name(name) for name in ("fixed-seed0", "..", "a/b", "/tmp", "")]
        [True, False, False, False, False]
    """
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def is_external(settings: Mapping[str, Any]) -> bool:
    """Return whether settings are of measurements of an external model, not of a run."""
    return "method" not in settings and "model" in settings


def check_types(values: Mapping[str, Any], checks: Mapping[str, _Check], where: str) -> None:
    """Check values by name.

    Args:
        values: Name to value; missing and None are accepted.
        checks: Name to check.
        where: Beginning of the message.

    Raises:
        ValueError: if one is of another type.
    """
    for name, (fits, words) in checks.items():
        value = values.get(name)
        if value is not None and not fits(value):
            raise ValueError(f"{where}: {name} must be {words}, got {without_secrets(value, name)!r}")


def check_plain(value: Any, name: str) -> None:
    """Check that a value is plain: a text, number, truth value or None, or a list or mapping of these.

    Raises:
        ValueError: if it is not.
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

    A setting that was added after the stored ones were written had its default. More epochs are allowed if no rate
    depends on their number.

    Args:
        stored: Settings of the run.
        asked: Settings to resume with.

    Returns:
        Name to stored and given value; and a reason that is added to the message, if it is not obvious.
    """
    stored, asked = (dict(without_secrets(settings)) for settings in (stored, asked))
    compared = [*asked, *(name for name in stored if name not in asked)]
    known = dict(RunConfig.resolve({}, RunConfig.sound(stored))[0]) | stored
    changed = [name for name in compared if asked.get(name) != known.get(name) and name not in FREE]
    reason = ""
    if "epochs" in changed and _is_integer(known["epochs"]) and asked.get("epochs", 0) > known["epochs"]:
        if known.get("schedule") in OPEN_ENDED:
            changed.remove("epochs")
        else:
            reason = f" (schedule {known['schedule']} ends with the last epoch: a run with it is not extended)"
    return {name: (known.get(name), asked.get(name)) for name in changed}, reason


def changed_data(stored: Mapping[str, Any], present: Mapping[str, Any]) -> str | None:
    """Describe the first part of the data whose fingerprint has changed; None if none has or none is known.

    Args:
        stored: Split to part to SHA-256, as stored.
        present: The same for the present data.
    """
    for split, of_split in stored.items():
        for part, digest in of_split.items():
            now = present.get(split, {}).get(part)
            if now != digest:
                is_now = "there are none" if now is None else f"it is {str(now)[:12]}…"
                return f"{part} of the {split} split had the SHA-256 {str(digest)[:12]}…, now {is_now}"
    more = [split for split in present if split not in stored]
    return f"there is a {more[0]} split, and there was none" if stored and more else None
