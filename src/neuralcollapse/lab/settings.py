"""Settings that are checked when they are made, and that know with which others they mean something."""

from __future__ import annotations

import difflib
import math
import operator
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Values = Mapping[str, Any]
_BOUNDS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le}
_HINTS: dict[type, dict[str, Any]] = {}
_Section = TypeVar("_Section", bound="Settings")


@dataclass(frozen=True)
class Condition:
    """With which other settings a setting has an effect.

    Attributes:
        text: What the setting belongs to, for messages and help.
        reads: The settings that decide it; they stand before the one they decide.
        holds: From their values, whether the setting has an effect.
    """

    text: str
    reads: tuple[str, ...]
    holds: Callable[[Values], bool]


def where(**choices: str | tuple[str, ...]) -> Condition:
    """Where each of these settings has one of these values."""
    allowed = {name: values if isinstance(values, tuple) else (values,) for name, values in choices.items()}
    return Condition(
        " and ".join(f"{name} {listed(values, 'or')}" for name, values in allowed.items()),
        tuple(allowed),
        lambda found: all(found[name] in values for name, values in allowed.items()),
    )


def setting(
    default: Any = None,
    *,
    belongs_to: Condition | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A setting of a dataclass of `Settings`.

    Args:
        default: Its value where it is not given; a function of the settings before it where those decide it.
        belongs_to: Where it has an effect; elsewhere it is None, and giving it is refused.
        at_least: The least value it takes.
        above: A bound that its values exceed.
        at_most: The greatest value it takes.
    """
    bounds = {"at least": at_least, "above": above, "at most": at_most}
    metadata = {
        "bounds": {kind: bound for kind, bound in bounds.items() if bound is not None},
        "belongs_to": belongs_to,
        "default": default,
    }
    return field(default=None if belongs_to or callable(default) else default, metadata=metadata)


def listed(names: tuple[str, ...] | list[str], word: str = "and") -> str:
    """Names in a sentence: a, b and c."""
    *first, last = map(str, names)
    return f"{', '.join(first)} {word} {last}" if first else last


def resolve(kind: type[Settings], given: Values, base: Values | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """Fill in what is not given, setting by setting.

    Args:
        kind: Which settings there are.
        given: Values that somebody asked for; None asks for the default.
        base: Values to take where none is given, such as a recipe's; they count only where they have an effect.

    Returns:
        The value of every setting, None where it has no effect; and for each setting that was given without one, what
        it belongs to.
    """
    values: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for one in fields(kind):
        condition: Condition | None = one.metadata.get("belongs_to")
        default = one.metadata.get("default", one.default)
        value = (given if one.name in given else base or {}).get(one.name)
        reads_all = condition is None or all(name in values for name in condition.reads)
        if condition is not None and reads_all and not condition.holds(values):
            if given.get(one.name) is not None:
                here = listed([f"{name} is {_shown(values[name])}" for name in condition.reads])
                refused[one.name] = f"{one.name} belongs to {condition.text}; here {here}"
            value = None
        elif value is None and reads_all:
            value = _default(default, values)
        values[one.name] = value
    return values, refused


def _default(default: Any, values: Values) -> Any:
    if not callable(default):
        return default
    try:
        return default(values)
    except KeyError:  # a section by itself lacks what decides
        return None


def _shown(value: Any) -> str:
    return "not given" if value is None else str(value)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that are checked when they are made; those left out are filled in where they have an effect.

    Raises:
        ValueError: A value of another type, out of its bounds, or of a setting that has no effect with the others.
    """

    def __post_init__(self) -> None:
        hints = type_hints(type(self))
        given = {one.name: _infinity_by_name(getattr(self, one.name), hints[one.name]) for one in fields(self)}
        if wrong := wrong_types(type(self), given):
            raise ValueError(next(iter(wrong.values())))
        values, refused = resolve(type(self), given)
        if refused:
            raise ValueError(next(iter(refused.values())))
        for one in fields(self):
            object.__setattr__(self, one.name, values[one.name])
            _check_bounds(one.name, values[one.name], hints[one.name], one.metadata.get("bounds", {}))

    def in_force(self) -> dict[str, Any]:
        """The settings that have a value: enough to make the same ones again."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def section(self, kind: type[_Section]) -> _Section:
        """Those of the settings that are of one section."""
        return kind(**{one.name: getattr(self, one.name) for one in fields(kind)})


def _infinity_by_name(value: Any, hint: Any) -> Any:
    """Return ``"inf"`` for an infinite number where that is a value of the setting, else the value.

    So ``math.inf``, YAML's ``.inf`` and ``inf`` on the command line are one value, and compare equal.
    """
    infinite = isinstance(value, float) and value == math.inf
    return "inf" if infinite and _fits("inf", hint) else value


def _check_bounds(name: str, value: Any, hint: Any, bounds: Mapping[str, float]) -> None:
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, float) and not math.isfinite(item) for item in items):
        raise ValueError(f"{name} must be finite{' or inf' if _fits('inf', hint) else ''}, got {value}")
    for kind, bound in bounds.items():
        if any(isinstance(item, int | float) and not _BOUNDS[kind](item, bound) for item in items):
            raise ValueError(f"{name} must be {kind} {bound:g}, got {value}")


def type_hints(kind: type[Settings]) -> dict[str, Any]:
    """The type of each setting."""
    if kind not in _HINTS:
        _HINTS[kind] = get_type_hints(kind)
    return _HINTS[kind]


def wrong_types(kind: type[Settings], values: Values) -> dict[str, str]:
    """Errors of values that are not of the types of their settings, by name; other names are left out."""
    hints = type_hints(kind)
    return {
        name: f"{name} must be {describe(hints[name])}, got {value!r}"
        for name, value in values.items()
        if name in hints and value is not None and not _fits(value, hints[name])
    }


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type that a setting can have."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return any(value == argument and type(value) is type(argument) for argument in arguments)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


def describe(hint: Any) -> str:
    """A type that a setting can have, in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return listed([describe(argument) for argument in arguments if argument is not types.NoneType], "or")
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is list:
        return f"a list, each item {describe(arguments[0])}"
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}
    return names.get(hint, "a mapping")


def nearest(name: str, names: Iterable[str]) -> str:
    """The names most like one that does not exist, as the end of a message."""
    found = difflib.get_close_matches(name, list(names), n=3, cutoff=0.0)
    return f"; nearest: {', '.join(found)}" if found else ""
