"""What classes share, as the code of a frame."""

from __future__ import annotations

import torch
from torch import Tensor

from neuralcollapse.geometry import attribute_gram, code_from_gram
from neuralcollapse.lab.config import ModelSettings

# Of all attributes together, where the features have room for the simplex ETF that the rest of the Gram is.
_SHARED = 0.6


def attribute_code(config: ModelSettings, feature_dim: int, num_classes: int) -> Tensor:
    """The code (K, r) of the Gram of what classes share, every attribute with the same weight.

    Raises:
        ValueError: The attributes cannot be read or are of another number of classes, or the Gram does not fit.
    """
    source = str(config.class_attributes)
    attributes = digits_of_classes(num_classes) if source == "digits" else read_attributes(source, num_classes)
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


def digits_of_classes(num_classes: int) -> Tensor:
    """(K, places): the decimal digits of 0 to K−1, the greatest place first."""
    places = len(str(num_classes - 1))
    return torch.tensor([[int(digit) for digit in f"{label:0{places}}"] for label in range(num_classes)])


def read_attributes(path: str, num_classes: int) -> Tensor:
    """(K, A): the values of each attribute as integers, from a CSV file whose first line names the attributes.

    Raises:
        ValueError: It cannot be read, lacks a value, or is of another number of classes.
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
    return torch.tensor(table.apply(lambda values: pd.factorize(values)[0]).to_numpy("int64"))
