"""Settings with types, bounds, and conditions on other settings, and parsing of their values from text.

Types, bounds and descriptions are those of pydantic. This module adds errors for settings that have no effect, defaults
that follow from other settings, and a parser in which numbers are decimal and text stays text.
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
from pydantic.fields import FieldInfo

from neuralcollapse._html import html_table
from neuralcollapse.lab.untrusted import check_limits

Values = Mapping[str, Any]
_Section = TypeVar("_Section", bound="Settings")


# --- which setting belongs to which -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Condition:
    """Condition on other settings under which a setting has an effect; part of its annotation.

    Attributes:
        text: Description of the condition, for messages and help.
        reads: Names of the settings on which the condition depends.
        holds: Function of the values of the settings that returns whether the setting has an effect.
    """

    text: str
    reads: tuple[str, ...]
    holds: Callable[[Values], bool]


@dataclass(frozen=True)
class Default:
    """Default that follows from other settings; part of the annotation of a setting."""

    of: Callable[[Values], Any]


@dataclass(frozen=True)
class Options:
    """Settings that a mapping may contain, which depend on other settings; part of the annotation of the mapping.

    Conditions and defaults of the options may depend on each other and on the settings that surround the mapping.

    Attributes:
        of: Function of the values of the settings that returns the settings class of the mapping; None if any keys are
            accepted.
        kinds: All classes that ``of`` may return, for the help text.
    """

    of: Callable[[Values], type[Settings] | None]
    kinds: tuple[type[Settings], ...] = ()


def where(**choices: str | tuple[str, ...]) -> Condition:
    """Return the condition that each of the given settings has one of the given values."""
    allowed = {name: values if isinstance(values, tuple) else (values,) for name, values in choices.items()}
    return Condition(
        " and ".join(f"{name} {listed(values, 'or')}" for name, values in allowed.items()),
        tuple(allowed),
        lambda values: all(values[name] in choices for name, choices in allowed.items()),
    )


class Settings(BaseModel):
    """Settings that are validated on construction; settings that are not given have their defaults if they apply.

    The value of a setting that has no effect is None. The value None selects the default.

    Raises:
        ValueError: if a value has the wrong type or is out of bounds, or if its setting has no effect together with the
            other settings.
    """

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    def __init__(self, /, **given: Any) -> None:
        refused = self._fill_in(given, {}, None)
        if refused:
            raise ValueError(next(iter(refused.values())))
        self.check()

    def _repr_html_(self) -> str:
        """Return a table of the settings that have an effect."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        rows = [[name, value] for name, value in values.items() if value is not None]
        return html_table(type(self).__name__, ["", ""], rows)

    @classmethod
    def resolve(cls, given: Values, base: Values | None = None) -> tuple[Self, dict[str, str]]:
        """Fill in settings that are not given, without calling `check`.

        Args:
            given: Values that were requested.
            base: Values for settings that are not given, such as those of a recipe. Values without an effect and names
                that are not settings are ignored.

        Returns:
            The settings; and for each given setting without an effect, the condition that it needs. An option of a
            setting has the name ``setting.option``.

        Raises:
            ValueError: if a value has the wrong type or is out of bounds.
        """
        settings = cls.__new__(cls)
        return settings, settings._fill_in(given, base or {}, None)

    def check(self) -> None:
        """Check settings together; raise a `ValueError` if some do not fit each other."""

    @classmethod
    def sound(cls, values: Values) -> dict[str, Any]:
        """Return those of the given values, such as those of a damaged file, that have the types of their settings."""
        known = {name: value for name, value in values.items() if name in cls.model_fields and value is not None}
        try:
            cls.__pydantic_validator__.validate_python(known, self_instance=cls.__new__(cls))
        except ValidationError as error:
            wrong = {problem["loc"][0] for problem in error.errors()}
            known = {name: value for name, value in known.items() if name not in wrong}
        return known

    def in_force(self) -> dict[str, Any]:
        """Return the settings that have a value, from which equal settings can be constructed."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in values.items() if value is not None}

    def replace(self, **changes: Any) -> Self:
        """Return settings with the given changes, and with updated defaults that depend on them."""
        return type(self)(**self.in_force() | changes)

    def section(self, kind: type[_Section]) -> _Section:
        """Return the settings of one section, without validating them again."""
        return kind.model_construct(**{name: getattr(self, name) for name in kind.model_fields})

    @classmethod
    def override(cls, base: Values, changes: Values) -> dict[str, Any]:
        """Return values with the given changes; options of a setting are changed one by one."""
        changed = {**base, **changes}
        for name, value in changes.items():
            notes = cls.model_fields[name].metadata if name in cls.model_fields else []
            has_options = any(isinstance(note, Options) for note in notes)
            if has_options and isinstance(value, dict) and isinstance(base.get(name), dict):
                changed[name] = base[name] | value
        return changed

    def _fill_in(self, given: Values, base: Values, within: Values | None) -> dict[str, str]:
        """Set the values; return the conditions of settings without an effect, as `resolve` does.

        Args:
            given: Values that were requested.
            base: Values for settings that are not given.
            within: Values of the surrounding settings, if these are options.
        """
        known = type(self).model_fields
        asked = {name: value for name, value in base.items() if name in known} | dict(given)
        asked = {name: value for name, value in asked.items() if value is not None}
        try:
            super().__init__(**asked)
        except ValidationError as error:
            raise ValueError(_in_one_line(error, type(self), asked)) from None
        typed = {name: value for name, value in self if name in asked}
        resolution = _Resolution(type(self), typed, given, base, within)
        self.__dict__.update({name: resolution[name] for name in known})
        return resolution.refused


class _Resolution(dict[str, Any]):
    """Values of settings, each of which is determined when it is first read.

    Attributes:
        refused: For each given setting without an effect, the condition that it needs.
    """

    def __init__(
        self, kind: type[Settings], asked: Values, given: Values, base: Values, within: Values | None = None
    ) -> None:
        super().__init__()
        self.kind, self.asked, self.given, self.base, self.within = kind, asked, given, base, within
        self.refused: dict[str, str] = {}

    def __missing__(self, name: str) -> Any:
        if self.within is not None and name not in self.kind.model_fields:
            return self.within[name]
        field = self.kind.model_fields[name]
        notes = {type(note): note for note in field.metadata}
        value = self.asked.get(name)
        try:
            condition: Condition | None = notes.get(Condition)
            if condition is not None and not condition.holds(self):
                given = self.given.get(name)
                if given is not None:
                    decided = listed([f"{read} is {_shown(self[read])}" for read in condition.reads])
                    reason = f"{name} belongs to {condition.text}; here {decided}"
                    options = given if isinstance(given, dict) and Options in notes else {}
                    self.refused |= dict.fromkeys([name, *(f"{name}.{option}" for option in options)], reason)
                value = None
            else:
                if value is None:
                    value = field.get_default(call_default_factory=True)
                if value is None and Default in notes:
                    value = notes[Default].of(self)
                if isinstance(value, dict) and Options in notes:
                    value = self._options(name, field, notes[Options])
        except KeyError:  # a single section may lack a setting on which the condition depends
            pass
        self[name] = value
        return value

    def _options(self, name: str, field: FieldInfo, options: Options) -> dict[str, Any] | None:
        """Return the options of a mapping; options of the base are used if they have an effect."""
        kind, given = options.of(self), self.given.get(name)
        base = None if name in self.given and given is None else self.base.get(name)
        if kind is None:  # any keys are accepted; options of the base are used unless a built-in choice had them
            if base is not None and options.of(_Resolution(self.kind, self.base, {}, {})) is not None:
                base = None
            default: dict[str, Any] | None = field.get_default(call_default_factory=True)
            return next((value for value in (given, base) if value is not None), default)
        settings = kind.__new__(kind)
        try:
            refused = settings._fill_in(given or {}, base if isinstance(base, dict) else {}, self)
            settings.check()
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from None
        self.refused |= {f"{name}.{option}": f"{name}.{reason}" for option, reason in refused.items()}
        return settings.in_force() or None


def listed(names: Iterable[Any], word: str = "and") -> str:
    """Return names as text, such as "a, b and c"."""
    *first, last = map(str, names)
    return f"{', '.join(first)} {word} {last}" if first else last


def closest_names(name: str, names: Iterable[str]) -> str:
    """Return the names most similar to a name that does not exist, as the end of a message."""
    similar = difflib.get_close_matches(name, list(names), n=3, cutoff=0.0)
    return f"; nearest: {', '.join(similar)}" if similar else ""


def setting_with_option(name: str, kinds: Iterable[type[Settings]]) -> str | None:
    """Return the setting of these classes that has an option of this name, or None."""
    fields = {setting: field for kind in kinds for setting, field in kind.model_fields.items()}
    for setting, field in fields.items():
        for options in (note for note in field.metadata if isinstance(note, Options)):
            if any(name in kind.model_fields for kind in options.kinds):
                return setting
    return None


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
    """Return a description of the type that a JSON schema defines."""
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
    """Return the first error of pydantic in one line: the setting, its requirement, and its value."""
    problems = error.errors(include_url=False)
    name = str(problems[0]["loc"][0])
    if problems[0]["type"] == "extra_forbidden":
        holder = setting_with_option(name, [kind])
        advice = f", but an option of {holder}" if holder else closest_names(name, kind.model_fields)
        return f"{name} is not a setting{advice}"
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
# Scalars that YAML 1.1 and YAML 1.2 read differently, other than numbers with leading zeros.
_AMBIGUOUS = re.compile(r"yes|no|on|off|[-+]?0[xob][0-9a-f_]+|[-+]?[0-9][0-9._]*(?:_|:[0-9])[0-9._:]*", re.IGNORECASE)
_MOST_SHOWN = 80


class Plain(str):
    """YAML scalar without quotes, which takes the type of the setting to which it is assigned."""

    __slots__ = ()


class _Loader(yaml.SafeLoader):  # implemented in Python, because the C loader crashes on deep nesting
    """Loader of mappings and lists that leaves scalars as text."""

    yaml_constructors: ClassVar[dict[str | None, Any]] = {}

    def mapping(self, node: yaml.MappingNode) -> Any:
        """Construct a mapping; raise an error for repeated keys."""
        loaded: dict[Any, Any] = {}
        yield loaded
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, "keys must be text", key_node.start_mark)
            if str(key) in loaded:
                raise yaml.constructor.ConstructorError(None, None, f"{str(key)!r} occurs twice", key_node.start_mark)
            loaded[str(key)] = self.construct_object(value_node, deep=True)

    def scalar(self, node: yaml.ScalarNode) -> str:
        """Construct a text that records whether it was quoted."""
        return Plain(node.value) if not node.style else str(node.value)

    def refused(self, node: yaml.Node) -> Any:
        """Raise an error for a tag."""
        raise yaml.constructor.ConstructorError(None, None, f"tag {node.tag!r} is not supported", node.start_mark)


_Loader.yaml_implicit_resolvers = {}  # scalars have no type until they are assigned to a setting
_Loader.yaml_constructors.update(
    {
        "tag:yaml.org,2002:map": _Loader.mapping,
        "tag:yaml.org,2002:seq": _Loader.construct_yaml_seq,
        "tag:yaml.org,2002:str": _Loader.scalar,
        None: _Loader.refused,
    }
)


def load_yaml(text: str) -> Any:
    """Load YAML with scalars as text: quoted scalars as `str`, others as `Plain`.

    Raises:
        yaml.YAMLError: if it is not YAML, repeats a key, has a tag, or exceeds the limits of `check_limits`.
    """
    check_limits(text)
    return yaml.load(text, _Loader)


def load_typed_yaml(text: str) -> Any:
    """Load YAML whose plain scalars have the type that they look like, independent of the version of YAML.

    Raises:
        ValueError: if versions of YAML read a scalar differently, such as ``no`` and ``0x10``.
        yaml.YAMLError: as for `load_yaml`.
    """
    return _typed(load_yaml(text))


def parse(name: str, value: Any, hint: Any) -> Any:
    """Convert the text of a setting to its type; null selects the default.

    Args:
        name: Name of the setting.
        value: Text from the command line, or a value from `load_yaml`. Values of other types are returned unchanged.
        hint: Type of the setting.

    Raises:
        ValueError: if the text does not represent a value of this type.

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
    """Convert a value to the first alternative of a schema that accepts it; raise a `ValueError` if none does."""
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
    """Split a comma-separated list, with or without brackets; items may be quoted."""
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
    """Give plain scalars the type that they look like; raise a `ValueError` if versions of YAML differ."""
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
        raise ValueError(f"write true, false or a decimal number instead of {text}, or quote it if it is text")
    return text


def _number(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
