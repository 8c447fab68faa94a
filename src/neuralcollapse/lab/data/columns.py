"""Which columns of a table hold the images and the labels, and which classes the labels are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from neuralcollapse.lab.data.folders import listed
from neuralcollapse.lab.data.selection import Samples

# Names of a column of labels that are not declared to be class labels.
_LABELS = ("label", "labels", "class", "target")
_INTEGER = re.compile(r"[+-]?[0-9]+")
# What images are labelled with that are of no known class.
_UNLABELLED = -1
_Name = str | int | None


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
        candidates = candidates or [name for name in features if name.strip().casefold() in _LABELS]
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


@dataclass(frozen=True)
class Given:
    """Labels as they are stored: integers, texts or booleans, None for a missing one.

    Attributes:
        values: One per image.
        names: The names of the classes that integers stand for, if they are declared.
    """

    values: Sequence[Any]
    names: Sequence[str] | None = None


@dataclass(frozen=True)
class Labelled:
    """The images of a split that have a label, and which class each is of."""

    samples: Samples
    note: str | None = None
    """A line on what was left out."""


def given_labels(data: str, split: str, rows: Any, column: str) -> Given:
    """The labels of a Hugging Face data set.

    Raises:
        ValueError: if it has no such column.
    """
    if column not in rows.features:
        raise ValueError(f"data {data!r} must have labels in each split, its {split} split has no column {column!r}")
    return Given(rows[column][:], getattr(rows.features[column], "names", None))


def number_classes(
    data: str, splits: Mapping[str, Sequence[Given]], train: str, *, drop_unlabelled: bool = False
) -> tuple[dict[str, Labelled], tuple[str, ...]]:
    """Number the classes of all splits alike, by their names.

    The order is the one that the training split declares; else names are sorted, those that are all integers by value.
    The label -1 means that an image is unlabelled.

    Args:
        data: The name of the data, for messages.
        splits: The labels of each split, in parts that may declare different orders.
        train: The split whose unlabelled images are always left out.
        drop_unlabelled: Leave those of other splits out as well, and images whose label is missing.

    Returns:
        The labelled images of each split, and the names of the classes.

    Raises:
        ValueError: if a split has no labels, or some that cannot be classes, or splits have labels of different kinds.
    """
    names = {split: [name for part in parts for name in _names(data, split, part)] for split, parts in splits.items()}
    rows = {split: [row for row, name in enumerate(found) if isinstance(name, str)] for split, found in names.items()}
    notes = {
        split: _unlabelled(data, split, found, may_drop=drop_unlabelled, always_drop=split == train)
        for split, found in names.items()
    }
    present = {split: {str(names[split][row]) for row in found} for split, found in rows.items()}
    _check_alike(data, splits, present, train)
    declared = next((part.names for part in splits[train] if part.names is not None), ())
    others = set().union(*present.values()) - set(declared)
    classes = (*declared, *_in_order(data, others))
    number = {name: place for place, name in enumerate(classes)}
    return {
        split: Labelled(
            Samples(
                torch.tensor(found, dtype=torch.long)[:, None],
                torch.tensor([number[str(names[split][row])] for row in found], dtype=torch.long),
            ),
            notes[split],
        )
        for split, found in rows.items()
    }, classes


def has_labels(given: Given) -> bool:
    """Return whether any image is labelled."""
    return any(value not in (None, "", _UNLABELLED, str(_UNLABELLED)) for value in given.values)


def _names(data: str, split: str, given: Given) -> Iterable[_Name]:
    """The name of each image's class, -1 for one that is unlabelled, None for one without a label."""
    if given.names is None:
        texts = (value if value is None else str(value) for value in given.values)
        names = [_UNLABELLED if text == str(_UNLABELLED) else text or None for text in texts]
        negative = next((name for name in names if isinstance(name, str) and re.fullmatch("-[0-9]+", name)), None)
        if negative is not None and all(_INTEGER.fullmatch(name) for name in names if isinstance(name, str)):
            raise ValueError(f"data {data!r} must have labels of at least 0, or -1; its {split} split has {negative}")
        return names
    for value in given.values:
        if value is not None and not _UNLABELLED <= value < len(given.names):
            raise ValueError(
                f"data {data!r} must have labels in [0, {len(given.names)}), its {split} split has {value}"
            )
    return [given.names[value] if value is not None and value >= 0 else value for value in given.values]


def _unlabelled(data: str, split: str, names: Sequence[_Name], *, may_drop: bool, always_drop: bool) -> str | None:
    """One line about the images that are left out because they have no label.

    Raises:
        ValueError: if they must not be left out.
    """
    if not names:
        raise ValueError(f"data {data!r} must have at least one image in its {split} split")
    missing, unlabelled = names.count(None), names.count(_UNLABELLED)
    if missing and not may_drop:
        raise ValueError(
            f"data {data!r} must have a label for each image, its {split} split has images without ({missing} of "
            f"{len(names)}); with --drop_unlabelled they are left out"
        )
    if unlabelled and not (may_drop or always_drop):
        raise ValueError(
            f"data {data!r} must have a label for each image, and {unlabelled} of {len(names)} in its {split} split "
            "have -1, which means unlabelled: --drop_unlabelled leaves them out, --test_split names another split"
        )
    number = missing + unlabelled
    return f"{number} of {len(names)} images of the {split} split left out: they have no label" if number else None


def _check_alike(data: str, splits: Mapping[str, Sequence[Given]], present: Mapping[str, set[str]], train: str) -> None:
    """Check that labels of all splits are of one kind, and that none differ from those of training by case alone."""
    numbers = {split for split, parts in splits.items() if any(_are_numbers(part) for part in parts)}
    texts = {split for split in splits if not all(_INTEGER.fullmatch(name) for name in present[split])}
    if numbers and texts:
        first, second = (sorted(present[min(kind)])[0] for kind in (numbers, texts))
        raise ValueError(
            f"data {data!r} must have labels of one kind: those of its {min(numbers)} split are numbers such as "
            f"{first}, those of its {min(texts)} split are names such as {second!r}"
        )
    similar = {name.strip().casefold(): name for name in present[train]}
    for split, names in present.items():
        for name in sorted(names - present[train]):
            other = similar.get(name.strip().casefold())
            if other is not None and other not in names:
                raise ValueError(
                    f"data {data!r} must have classes of the same names in all splits: {name!r} of its {split} split "
                    f"and {other!r} of its {train} split differ only in case or spaces"
                )


def _are_numbers(given: Given) -> bool:
    first = next((value for value in given.values if value is not None), None)
    return given.names is None and isinstance(first, int)


def _in_order(data: str, names: set[str]) -> list[str]:
    """Names in order: by value if all of them are integers."""
    if not all(_INTEGER.fullmatch(name) for name in names):
        return sorted(names)
    values = Counter(map(int, names))
    if names and max(values.values()) > 1:
        same = [name for name in sorted(names) if values[int(name)] > 1]
        raise ValueError(f"data {data!r} must have a different number for each class, got {listed(same)}")
    return sorted(names, key=int)
