"""What classes share, as the code of a frame."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neuralcollapse.geometry import attribute_gram, code_from_gram
from neuralcollapse.lab.config import ModelSettings
from neuralcollapse.lab.memory import check_memory

# Of all attributes together, where the features have room for the simplex ETF that the rest of the Gram is.
_SHARED = 0.6
# Names of a column, in a table of attributes, that says which class a line is of.
_NAMES_OF_CLASSES = ("class", "class name", "class_name", "name")


def attribute_code(
    config: ModelSettings, feature_dim: int, num_classes: int, *, class_names: Sequence[str] | None = None
) -> Tensor:
    """Return the code (K, r) of the Gram of what classes share, every attribute with the same weight.

    Args:
        config: The settings.
        feature_dim: d, the greatest rank r.
        num_classes: K.
        class_names: The names of the classes. Without them, classes are called by their number.

    Raises:
        ValueError: if the attributes cannot be read or do not fit the classes, or the Gram does not fit.
    """
    source = str(config.class_attributes)
    cosines = f"class_attributes needs fewer classes: the cosines of {num_classes} of them, and their decomposition,"
    check_memory(4 * 8 * num_classes**2, cosines)
    if source == "digits":
        attributes = digits_of_classes(num_classes, class_names=class_names)
    else:
        attributes = read_attributes(source, num_classes, class_names=class_names)
    count = attributes.shape[1]
    weight = config.attribute_weight
    if weight is None or weight == "auto":
        weight = (_SHARED if feature_dim >= num_classes - 1 else 1) / count
    try:
        gram = attribute_gram(attributes, torch.full((count,), float(weight), dtype=torch.float64))
        return code_from_gram(gram, feature_dim).float()
    except ValueError as error:
        raise ValueError(
            f"attribute_weight must suit class_attributes, got {weight:g} for each of {count} attributes of "
            f"{num_classes} classes: {error}"
        ) from error


def digits_of_classes(num_classes: int, *, class_names: Sequence[str] | None = None) -> Tensor:
    """Return the decimal digits (K, places) of 0 to K−1, or of the classes' names, the greatest place first.

    Raises:
        ValueError: if a name is not a number.
    """
    names = [str(label) for label in range(num_classes)] if class_names is None else class_names
    other = next((name for name in names if not re.fullmatch("[0-9]+", name)), None)
    if other is not None:
        raise ValueError(
            f"class_attributes digits needs classes that are called by numbers, and one is called {other!r}"
        )
    places = len(str(max(map(int, names))))
    return torch.tensor([[int(digit) for digit in f"{int(name):0{places}}"] for name in names])


def read_attributes(path: str, num_classes: int, *, class_names: Sequence[str] | None = None) -> Tensor:
    """Return the values of each attribute as integers (K, A), from a CSV file whose first line names the attributes.

    Lines are in the order of the classes. If a column called class or name, or a column whose values are the names of
    the classes, is there, it says which class each line is of, in any order.

    Args:
        path: The file.
        num_classes: K.
        class_names: The names of the classes, if they have names.

    Raises:
        ValueError: if it cannot be read, lacks a value, or its lines are not those of the classes.
    """
    import pandas as pd

    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False).fillna("")
    except (OSError, ValueError) as error:  # the errors of pandas and of decoding are ValueErrors
        raise ValueError(f"class_attributes must be digits or a CSV file, {path!r} cannot be read: {error}") from error
    if len(table) != num_classes or not len(table.columns):
        raise ValueError(
            f"class_attributes must have a line for each of the {num_classes} classes, {path!r} has {len(table)} below "
            "the names of the attributes"
        )
    if bool((table == "").any(axis=None)):
        raise ValueError(f"class_attributes must have a value of each attribute for each class, {path!r} lacks some")
    table = _in_order_of_classes(table, path, class_names)
    return torch.tensor(table.apply(lambda values: pd.factorize(values)[0]).to_numpy("int64"))


def _in_order_of_classes(table: Any, path: str, class_names: Sequence[str] | None) -> Any:
    """The table's lines in the order of the classes, without the column that names them."""
    if class_names is None:
        return table
    names = sorted(class_names)
    columns = [name for name in table.columns if sorted(table[name].str.strip()) == names]
    called = [
        name
        for name in table.columns
        if name.strip().casefold() in _NAMES_OF_CLASSES and not set(names).isdisjoint(table[name].str.strip())
    ]
    if called and not columns:
        unknown = sorted(set(table[called[0]].str.strip()) - set(names))
        raise ValueError(
            f"class_attributes must name each class once in its column {called[0]!r}, and {path!r} "
            + (f"has {unknown[0]!r}, which is not a class" if unknown else "names one twice")
        )
    if not columns or len(table.columns) == 1:
        return table
    column = next((name for name in columns if name in called), columns[0])
    place = {name: number for number, name in enumerate(table[column].str.strip())}
    return table.drop(columns=column).iloc[[place[name] for name in class_names]]
