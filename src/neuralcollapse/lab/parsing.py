"""Setting values read from text: the command line and YAML files. Numbers are decimal, and text stays text."""

from __future__ import annotations

import re
import types
from typing import Any, ClassVar, Literal, Union, get_args, get_origin

import yaml

from neuralcollapse.lab.settings import describe
from neuralcollapse.lab.untrusted import check_limits

_INTEGER = re.compile(r"[-+]?[0-9]+")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.?(?:inf|nan)", re.IGNORECASE)
_NULL = ("", "~", "null")
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
# What YAML 1.1 reads as something else than YAML 1.2, apart from zeros in front of a number.
_AMBIGUOUS = re.compile(r"yes|no|on|off|[-+]?0[xob][0-9a-f_]+|[-+]?[0-9][0-9._]*(?:_|:[0-9])[0-9._:]*", re.IGNORECASE)
_MOST_SHOWN = 80


class Plain(str):
    """A YAML scalar without quotes, whose type is that of the setting which it is given to."""

    __slots__ = ()


class _Loader(yaml.SafeLoader):  # in Python: the C one crashes on deep nesting
    """Loads mappings and lists, and leaves scalars as text."""

    yaml_constructors: ClassVar[dict[str | None, Any]] = {}

    def mapping(self, node: yaml.MappingNode) -> Any:
        """Construct a mapping, and refuse a key that is there twice."""
        found: dict[Any, Any] = {}
        yield found
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, "keys must be text", key_node.start_mark)
            if str(key) in found:
                raise yaml.constructor.ConstructorError(None, None, f"{str(key)!r} is there twice", key_node.start_mark)
            found[str(key)] = self.construct_object(value_node, deep=True)

    def scalar(self, node: yaml.ScalarNode) -> str:
        """Construct a text that knows whether it was quoted."""
        return Plain(node.value) if not node.style else str(node.value)

    def refused(self, node: yaml.Node) -> Any:
        """Refuse a tag."""
        raise yaml.constructor.ConstructorError(None, None, f"tag {node.tag!r} has no meaning here", node.start_mark)


_Loader.yaml_implicit_resolvers = {}  # no scalar has a type of its own
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
        yaml.YAMLError: if it is not YAML, has a key twice, or a tag; or exceeds the limits of `check_limits`.
    """
    check_limits(text)
    return yaml.load(text, _Loader)


def parse(name: str, value: Any, hint: Any) -> Any:
    """Convert the text of a setting to its type; null asks for the default.

    Args:
        name: The setting's.
        value: A text of the command line, or what `load_yaml` gave. Values of other types are left as they are.
        hint: The setting's type.

    Raises:
        ValueError: if the text is not of that type.

    Examples:
        >>> parse("seeds", "010,011", int | list[int]), parse("lr", "1e-3", float), parse("data", "no", str)
        ([10, 11], 0.001, 'no')
    """
    try:
        return _converted(value, hint)
    except (ValueError, yaml.YAMLError) as error:
        shown = str(value) if isinstance(value, list | dict) else repr(str(value))
        shown = shown if len(shown) <= _MOST_SHOWN else f"{shown[:_MOST_SHOWN]}..."
        reason = f" ({' '.join(str(error).split())})" if str(error) else ""
        raise ValueError(f"{name} must be {describe(hint)}, got {shown}{reason}") from None


def load_typed_yaml(text: str) -> Any:
    """Load YAML whose plain scalars have the type that they look like, whatever the version of YAML.

    Raises:
        ValueError: if versions of YAML read a scalar differently, as they do ``no`` and ``0x10``.
        yaml.YAMLError: as `load_yaml`.
    """
    return _typed(load_yaml(text))


def _converted(value: Any, hint: Any) -> Any:
    """Convert a value to the first member of a union that takes it; raise ValueError if none does."""
    hints = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if isinstance(value, dict) or (isinstance(value, str) and any(get_origin(one) is dict for one in hints)):
        return _mapping(value, hints)
    if isinstance(value, list):
        return _items(value, hints)
    if not isinstance(value, str):
        return value
    if isinstance(value, Plain) and value.lower() in _NULL:
        return None
    text = str(value)
    choices = [choice for one in hints if get_origin(one) is Literal for choice in get_args(one)]
    if text in choices or str in hints:
        return text
    text = text.strip()
    if text.lower() in _NULL[1:]:
        return None
    inner = next((get_args(one) for one in hints if get_origin(one) is list), None)
    if inner is not None and (len(hints) == 1 or not {int, float} & set(hints) or re.search(r"[,\[\]]", text)):
        return _items(_split(text), hints)
    if bool in hints and text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    if int in hints and _INTEGER.fullmatch(text):
        return int(text)
    if float in hints and _NUMBER.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    raise ValueError


def _items(values: list[Any], hints: tuple[Any, ...]) -> list[Any]:
    inner = next((get_args(one)[0] for one in hints if get_origin(one) is list), None)
    if inner is None or any(isinstance(value, Plain) and value.lower() in _NULL for value in values):
        raise ValueError
    return [_converted(value, inner) for value in values]


def _split(text: str) -> list[str]:
    """Split a list that is written with commas, in brackets or not; items may be quoted."""
    if text.startswith("[") and text.endswith("]") and len(text) > 1:
        text = text[1:-1].strip()
    if not text:
        return []
    items = [item.strip() for item in text.removesuffix(",").split(",")]
    return [item[1:-1] if len(item) > 1 and item[0] == item[-1] and item[0] in "'\"" else item for item in items]


def _mapping(value: Any, hints: tuple[Any, ...]) -> Any:
    if isinstance(value, str):
        text, value = value, load_yaml(value)
        if text.strip().lower() in _NULL[1:]:
            return None
    if not isinstance(value, dict) or not any(get_origin(one) is dict for one in hints):
        raise ValueError
    return _typed(value)


def _typed(value: Any) -> Any:
    """Give plain scalars the type that they look like; raise ValueError where versions of YAML differ."""
    if isinstance(value, dict):
        return {str(key): _typed(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_typed(one) for one in value]
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
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if _AMBIGUOUS.fullmatch(text):
        raise ValueError(f"write true, false or a decimal number in place of {text}, or quote it where it is a text")
    return text
