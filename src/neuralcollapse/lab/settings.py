"""Settings: types and bounds, which setting belongs to which others, and values read from text.

Types, bounds and descriptions are pydantic's. This module adds the rule that a setting without an effect is refused,
defaults that follow from other settings, and a reader of text in which numbers are decimal and text stays text.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from neuralcollapse._html import html_table
from neuralcollapse.lab.untrusted import check_limits

Values = Mapping[str, Any]
_Section = TypeVar("_Section", bound="Settings")


# --- which setting belongs to which -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Condition:
    """The values of other settings with which a setting has an effect; part of its annotation.

    Attributes:
        text: What the setting belongs to, for messages and help.
        reads: The settings that decide it.
        holds: From the values of the settings, whether the setting has an effect.
    """

    text: str
    reads: tuple[str, ...]
    holds: Callable[[Values], bool]


@dataclass(frozen=True)
class Default:
    """A default that follows from other settings; part of a setting's annotation."""

    of: Callable[[Values], Any]


@dataclass(frozen=True)
class Options:
    """The settings that a mapping holds, which follow from other settings; part of the mapping's annotation.

    Attributes:
        of: From the values of the settings, those of the mapping; None if any are accepted.
        kinds: All that ``of`` returns, for the help text.
    """

    of: Callable[[Values], type[Settings] | None]
    kinds: tuple[type[Settings], ...] = ()


def where(**choices: str | tuple[str, ...]) -> Condition:
    """Return the condition that each of these settings has one of these values."""
    allowed = {name: values if isinstance(values, tuple) else (values,) for name, values in choices.items()}
    return Condition(
        " and ".join(f"{name} {listed(values, 'or')}" for name, values in allowed.items()),
        tuple(allowed),
        lambda values: all(values[name] in choices for name, choices in allowed.items()),
    )


class Settings(BaseModel):
    """Settings that are checked when they are made; those not given have their defaults where they have an effect.

    A setting without an effect is None. None asks for the default.

    Raises:
        ValueError: if a value has another type, is out of its bounds, or is of a setting that has no effect with the
            others.
    """

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    def __init__(self, /, **given: Any) -> None:
        refused = self._fill_in(given, {})
        if refused:
            raise ValueError(next(iter(refused.values())))
        self.check()

    def _repr_html_(self) -> str:
        """The settings that have an effect."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        rows = [[name, value] for name, value in values.items() if value is not None]
        return html_table(type(self).__name__, ["", ""], rows)

    @classmethod
    def resolve(cls, given: Values, base: Values | None = None) -> tuple[Self, dict[str, str]]:
        """Fill in what is not given, without `check`.

        Args:
            given: Values that were asked for.
            base: Values to take where none is given, such as a recipe's; they count only where they have an effect,
                and names that are not settings are ignored.

        Returns:
            The settings; and for each setting that was given without an effect, what it belongs to.

        Raises:
            ValueError: if a value has another type or is out of its bounds.
        """
        settings = cls.__new__(cls)
        return settings, settings._fill_in(given, base or {})

    def check(self) -> None:
        """Check settings together; raises ValueError if some do not fit each other."""

    @classmethod
    def sound(cls, values: Values) -> dict[str, Any]:
        """Return those of some values, such as those of a damaged file, that are of the types of their settings."""
        known = {name: value for name, value in values.items() if name in cls.model_fields and value is not None}
        try:
            cls.__pydantic_validator__.validate_python(known, self_instance=cls.__new__(cls))
        except ValidationError as error:
            wrong = {problem["loc"][0] for problem in error.errors()}
            known = {name: value for name, value in known.items() if name not in wrong}
        return known

    def in_force(self) -> dict[str, Any]:
        """Return the settings that have a value: enough to make the same ones again."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in values.items() if value is not None}

    def replace(self, **changes: Any) -> Self:
        """Return settings in which those given differ, and what follows from them."""
        return type(self)(**self.in_force() | changes)

    def section(self, kind: type[_Section]) -> _Section:
        """Return those of the settings that are of one section, without checking them again."""
        return kind.model_construct(**{name: getattr(self, name) for name in kind.model_fields})

    def _fill_in(self, given: Values, base: Values) -> dict[str, str]:
        """Set the values; return what is refused, as `resolve`."""
        known = type(self).model_fields
        asked = {name: value for name, value in base.items() if name in known} | dict(given)
        asked = {name: value for name, value in asked.items() if value is not None}
        try:
            super().__init__(**asked)
        except ValidationError as error:
            raise ValueError(_in_one_line(error, type(self), asked)) from None
        typed = {name: value for name, value in self if name in asked}
        resolution = _Resolution(type(self), typed, given, base)
        self.__dict__.update({name: resolution[name] for name in known})
        return resolution.refused


class _Resolution(dict[str, Any]):
    """The values of settings, each worked out when it is first read.

    Attributes:
        refused: For each setting that was given without an effect, what it belongs to.
    """

    def __init__(self, kind: type[Settings], asked: Values, given: Values, base: Values) -> None:
        super().__init__()
        self.kind, self.asked, self.given, self.base = kind, asked, given, base
        self.refused: dict[str, str] = {}

    def __missing__(self, name: str) -> Any:
        field = self.kind.model_fields[name]
        notes = {type(note): note for note in field.metadata}
        value = self.asked.get(name)
        try:
            condition: Condition | None = notes.get(Condition)
            if condition is not None and not condition.holds(self):
                if self.given.get(name) is not None:
                    decided = listed([f"{read} is {_shown(self[read])}" for read in condition.reads])
                    self.refused[name] = f"{name} belongs to {condition.text}; here {decided}"
                value = None
            else:
                if value is None:
                    value = field.get_default(call_default_factory=True)
                if value is None and Default in notes:
                    value = notes[Default].of(self)
                if isinstance(value, dict) and Options in notes:
                    value = self._options(name, value, notes[Options].of(self))
        except KeyError:  # a section by itself lacks a setting that decides
            pass
        self[name] = value
        return value

    def _options(self, name: str, value: dict[str, Any], kind: type[Settings] | None) -> dict[str, Any] | None:
        """Return the options of a mapping; those of the base count where there are such options."""
        if kind is None:
            return value
        base, given = self.base.get(name), self.given.get(name)
        options = {option: default for option, default in (base or {}).items() if option in kind.model_fields}
        try:
            return kind(**options | (given or {})).in_force() or None
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from None


def listed(names: Iterable[Any], word: str = "and") -> str:
    """Return names as in a sentence: a, b and c."""
    *first, last = map(str, names)
    return f"{', '.join(first)} {word} {last}" if first else last


def closest_names(name: str, names: Iterable[str]) -> str:
    """Return the end of a message: the names most similar to one that does not exist."""
    similar = difflib.get_close_matches(name, list(names), n=3, cutoff=0.0)
    return f"; nearest: {', '.join(similar)}" if similar else ""


def _shown(value: Any) -> str:
    return "not given" if value is None else str(value)


# --- types and bounds in words ----------------------------------------------------------------------------------------

_TYPES = {
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "string": "a text",
    "object": "a mapping",
}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
}


def schema_of(hint: Any) -> dict[str, Any]:
    """Return the JSON schema of a type that a setting can have."""
    return _cached_schema(hint)


@cache
def _cached_schema(hint: Any) -> dict[str, Any]:
    return TypeAdapter(hint).json_schema()


def describe(schema: Mapping[str, Any]) -> str:
    """Return the type that a JSON schema describes, in words."""
    if "anyOf" in schema:
        return listed((describe(part) for part in schema["anyOf"] if part.get("type") != "null"), "or")
    if "const" in schema:
        return str(schema["const"])
    if "pattern" in schema:
        return "a dotted path such as package.module.Class"
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    if schema.get("type") == "array":
        return f"a list, each item {describe(schema['items'])}"
    return _TYPES[schema["type"]]


def _in_one_line(error: ValidationError, kind: type[Settings], values: Values) -> str:
    """Return the first error of pydantic as a line: the setting, what it must be, and its value."""
    problems = error.errors(include_url=False)
    name = str(problems[0]["loc"][0])
    if problems[0]["type"] == "extra_forbidden":
        return f"{name} is not a setting{closest_names(name, kind.model_fields)}"
    problems = [problem for problem in problems if problem["loc"][0] == name]
    words = describe(schema_of(kind.model_fields[name].annotation))
    for problem in problems:
        if problem["type"] in _BOUNDS:
            word, bound = _BOUNDS[problem["type"]]
            return f"{name} must be {word} {problem['ctx'][bound]:g}, got {values[name]}"
        if problem["type"] == "finite_number":
            return f"{name} must be finite{' or inf' if words.startswith('inf') else ''}, got {values[name]}"
    return f"{name} must be {words}, got {values[name]!r}"


# --- values read from text --------------------------------------------------------------------------------------------

_INTEGER = re.compile(r"[-+]?[0-9]+")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.?(?:inf|nan)", re.IGNORECASE)
_NULL = ("", "~", "null")
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
# What YAML 1.1 reads differently from YAML 1.2, other than zeros in front of a number.
_AMBIGUOUS = re.compile(r"yes|no|on|off|[-+]?0[xob][0-9a-f_]+|[-+]?[0-9][0-9._]*(?:_|:[0-9])[0-9._:]*", re.IGNORECASE)
_MOST_SHOWN = 80


class Plain(str):
    """A YAML scalar without quotes, whose type is that of the setting that it is given to."""

    __slots__ = ()


class _Loader(yaml.SafeLoader):  # in Python: the C loader crashes on deep nesting
    """Loader of mappings and lists that leaves scalars as text."""

    yaml_constructors: ClassVar[dict[str | None, Any]] = {}

    def mapping(self, node: yaml.MappingNode) -> Any:
        """Construct a mapping; refuse repeated keys."""
        loaded: dict[Any, Any] = {}
        yield loaded
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, "keys must be text", key_node.start_mark)
            if str(key) in loaded:
                raise yaml.constructor.ConstructorError(None, None, f"{str(key)!r} is there twice", key_node.start_mark)
            loaded[str(key)] = self.construct_object(value_node, deep=True)

    def scalar(self, node: yaml.ScalarNode) -> str:
        """Construct a text that records whether it was quoted."""
        return Plain(node.value) if not node.style else str(node.value)

    def refused(self, node: yaml.Node) -> Any:
        """Refuse a tag."""
        raise yaml.constructor.ConstructorError(None, None, f"tag {node.tag!r} has no meaning here", node.start_mark)


_Loader.yaml_implicit_resolvers = {}  # scalars have no type until they are given to a setting
_Loader.yaml_constructors.update(
    {
        "tag:yaml.org,2002:map": _Loader.mapping,
        "tag:yaml.org,2002:seq": _Loader.construct_yaml_seq,
        "tag:yaml.org,2002:str": _Loader.scalar,
        None: _Loader.refused,
    }
)


def load_yaml(text: str) -> Any:
    """Load YAML whose scalars stay text: quoted ones as `str`, others as `Plain`.

    Raises:
        yaml.YAMLError: if it is not YAML, repeats a key, has a tag, or exceeds the limits of `check_limits`.
    """
    check_limits(text)
    return yaml.load(text, _Loader)


def load_typed_yaml(text: str) -> Any:
    """Load YAML whose plain scalars have the type that they look like, whatever the version of YAML.

    Raises:
        ValueError: if versions of YAML read a scalar differently, as they do ``no`` and ``0x10``.
        yaml.YAMLError: as `load_yaml`.
    """
    return _typed(load_yaml(text))


def parse(name: str, value: Any, hint: Any) -> Any:
    """Convert the text of a setting to its type; null asks for the default.

    Args:
        name: Name of the setting.
        value: A text of the command line, or a value from `load_yaml`. Values of other types are returned as they are.
        hint: Type of the setting.

    Raises:
        ValueError: if the text is not of that type.

    Examples:
        >>> parse("seeds", "010,011", int | list[int]), parse("lr", "1e-3", float), parse("data", "no", str)
        ([10, 11], 0.001, 'no')
    """
    schema = schema_of(hint)
    try:
        return _converted(value, schema)
    except (ValueError, yaml.YAMLError) as error:
        shown = str(value) if isinstance(value, list | dict) else repr(str(value))
        shown = shown if len(shown) <= _MOST_SHOWN else f"{shown[:_MOST_SHOWN]}..."
        reason = f" ({' '.join(str(error).split())})" if str(error) else ""
        raise ValueError(f"{name} must be {describe(schema)}, got {shown}{reason}") from None


def _converted(value: Any, schema: Mapping[str, Any]) -> Any:
    """Convert a value to the first alternative of a schema that takes it; raise ValueError if none does."""
    parts = schema.get("anyOf", [schema])
    alternatives = {part.get("type"): part for part in parts}
    choices = [choice for part in parts for choice in _choices(part)]
    if isinstance(value, dict) or (isinstance(value, str) and "object" in alternatives and value not in choices):
        return _mapping(value, alternatives)
    if isinstance(value, list):
        return _items(value, alternatives)
    if not isinstance(value, str):
        return value
    if isinstance(value, Plain) and value.lower() in _NULL:
        return None
    text = str(value)
    if text in choices or ("string" in alternatives and not _choices(alternatives["string"])):
        return text
    text = text.strip()
    if text.lower() in _NULL[1:]:
        return None
    numbers = {"integer", "number"} & set(alternatives)
    if "array" in alternatives and (not numbers or re.search(r"[,\[\]]", text)):
        return _items(_split(text), alternatives)
    if "boolean" in alternatives and text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    if "integer" in alternatives and _INTEGER.fullmatch(text):
        return int(text)
    if "number" in alternatives and _NUMBER.fullmatch(text):
        return _number(text)
    raise ValueError


def _choices(schema: Mapping[str, Any]) -> list[Any]:
    return [schema["const"]] if "const" in schema else schema.get("enum", [])


def _items(values: list[Any], alternatives: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    if "array" not in alternatives or any(isinstance(value, Plain) and value.lower() in _NULL for value in values):
        raise ValueError
    return [_converted(value, alternatives["array"]["items"]) for value in values]


def _split(text: str) -> list[str]:
    """Split a list that is written with commas, in brackets or not; items may be quoted."""
    if text.startswith("[") and text.endswith("]") and len(text) > 1:
        text = text[1:-1].strip()
    if not text:
        return []
    items = [item.strip() for item in text.removesuffix(",").split(",")]
    return [item[1:-1] if len(item) > 1 and item[0] == item[-1] and item[0] in "'\"" else item for item in items]


def _mapping(value: Any, alternatives: Mapping[str, Any]) -> Any:
    if isinstance(value, str):
        text, value = value, load_yaml(value)
        if text.strip().lower() in _NULL[1:]:
            return None
    if not isinstance(value, dict) or "object" not in alternatives:
        raise ValueError
    return _typed(value)


def _typed(value: Any) -> Any:
    """Give plain scalars the type that they look like; raise ValueError where versions of YAML differ."""
    if isinstance(value, dict):
        return {str(key): _typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_typed(item) for item in value]
    if not isinstance(value, Plain):
        return value
    text = str(value)
    if text.lower() in _NULL:
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if _INTEGER.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text) and text.lstrip("+-").lower() not in ("inf", "nan"):
        return _number(text)
    if _AMBIGUOUS.fullmatch(text):
        raise ValueError(f"write true, false or a decimal number in place of {text}, or quote it if it is a text")
    return text


def _number(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
