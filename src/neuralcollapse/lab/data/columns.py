"""Which columns of a table hold the images and the labels, and which classes the labels are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Names of a column of labels that are not declared to be class labels.
_LABELS = ("label", "labels", "class", "target")


def find_image_column(data: str, rows: Any) -> str:
    """The column of images: declared as such, or as pandas writes them: bytes, {bytes, path}, or paths of files.

    Raises:
        ValueError: There is none, or there are several.
    """
    import datasets

    declared = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    candidates = declared[:1] or [name for name, feature in rows.features.items() if _holds_images(rows, name, feature)]
    if len(candidates) > 1:
        raise ValueError(f"data {data!r} must have one column of images, and has {', '.join(candidates)}")
    if not candidates:
        raise ValueError(
            f"data must have images, but {data!r} has only the columns {', '.join(rows.features)}: none is of images, "
            "of their bytes or of paths of image files"
        )
    return candidates[0]


def _holds_images(rows: Any, name: str, feature: Any) -> bool:
    from PIL import Image

    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    kind = getattr(feature, "dtype", "")
    if kind in ("string", "large_string"):
        first = next((value for value in rows[:10][name] if value), "")
        return first[first.rfind(".") :].lower() in Image.registered_extensions()
    return kind in ("binary", "large_binary")


def find_label_column(data: str, wanted: str | None, features: Any) -> str:
    """The column asked for; else the one of class labels, or one that is called so.

    Raises:
        ValueError: There is none, or there are several.
    """
    import datasets

    if wanted is not None:
        candidates = [name for name in features if name == wanted]
    else:
        candidates = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        candidates = candidates or [name for name in features if name in _LABELS]
        candidates = ["label"] if "label" in candidates else candidates
    if len(candidates) > 1:
        raise ValueError(f"label_column must say which labels of {data!r} to take: {', '.join(candidates)}")
    kind = str(getattr(features[candidates[0]], "dtype", "")) if candidates else ""
    if not any(word in kind for word in ("int", "string", "bool")):
        called = f"of class labels called {wanted!r}" if wanted else "of class labels"
        there = f"{candidates[0]!r} is of {kind or 'something else'}" if candidates else "none is called label"
        raise ValueError(
            f"data {data!r} must have a column {called}, integers or texts, or be a folder with a sub-folder of images "
            f"for each class; its columns are {', '.join(features)}, and {there}"
        )
    return candidates[0]


def read_labels(data: str, splits: Mapping[str, Any], column: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The labels of each split, as integers from 0, and the names of their classes.

    Where the classes are not declared, they are the values that occur, in their order.

    Raises:
        ValueError: A split has no labels, or some that are no class.
    """
    values = {split: _values(data, split, rows, column) for split, rows in splits.items()}
    names = getattr(next(iter(splits.values())).features[column], "names", None)
    if names is None:
        classes = sorted({value for one in values.values() for value in one})
        number = {value: place for place, value in enumerate(classes)}
        return {split: torch.tensor([number[value] for value in one]) for split, one in values.items()}, tuple(
            map(str, classes)
        )
    labels = {split: torch.tensor(one) for split, one in values.items()}
    for split, one in labels.items():
        low, high = (int(bound) for bound in torch.aminmax(one))
        if low < 0 or high >= len(names):
            raise ValueError(
                f"data {data!r} must have labels in [0, {len(names)}), its {split} split has {low} to {high}"
            )
    return labels, tuple(names)


def _values(data: str, split: str, rows: Any, column: str) -> list[Any]:
    if column not in rows.features:
        raise ValueError(f"data {data!r} must have labels in each split, its {split} split has no column {column!r}")
    values = rows[column][:]
    if not values:
        raise ValueError(f"data {data!r} must have at least one image in its {split} split")
    if None in values:
        raise ValueError(f"data {data!r} must have a label for each image, its {split} split has images without")
    return list(values)
