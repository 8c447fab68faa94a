"""Folders of images: which sub-folders are splits, which are classes, and what is left out."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

# The usual names of splits, each in the order in which one is chosen.
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation")
_KINDS = {"train": TRAIN_NAMES, "test": ("test", "testing"), "validation": ("validation", "valid", "val", "dev")}
# Words by which the name of a folder may mean a split.
_WORDS = {
    "train": re.compile(r"(?<![a-z])train", re.IGNORECASE),
    "test": re.compile(r"(?<![a-z])(test|valid|val(?![a-z])|dev(?![a-z])|eval)", re.IGNORECASE),
}
# Left behind by file managers, archivers and notebooks.
_LITTER = {".ds_store", "thumbs.db", "desktop.ini", "__macosx", "__pycache__", "@eadir", "lost+found"}
# Formats that Pillow names and does not decode by itself.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}
_LISTED = 3


@dataclass
class Listing:
    """Contents of a folder; paths are relative to the root."""

    path: str
    images: list[str] = field(default_factory=list)
    folders: dict[str, Listing] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    """Files that are not images, hidden files, and folders that are not entered."""

    def walk(self) -> Iterator[Listing]:
        """The folder itself and all below it."""
        yield self
        for folder in self.folders.values():
            yield from folder.walk()

    @cached_property
    def with_images(self) -> dict[str, Listing]:
        """The sub-folders that hold images, directly or further below."""
        return {name: folder for name, folder in self.folders.items() if any(each.images for each in folder.walk())}


@dataclass(frozen=True)
class ClassFolders:
    """The image files of each split by class, and one line for each kind of thing that was left out."""

    splits: dict[str, dict[str, list[str]]]
    notes: tuple[str, ...]


def is_split_name(name: str) -> bool:
    """Return whether a name is a usual one of a split, in upper or lower case."""
    return name.strip().casefold() in (*TRAIN_NAMES, *TEST_NAMES)


def split_kind(name: str) -> str:
    """One of the usual names of a split for all that mean the same."""
    name = name.strip().casefold()
    return next((kind for kind, names in _KINDS.items() if name in names), name)


def listed(names: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


@cache
def image_extensions() -> frozenset[str]:
    """The file name extensions of the formats that Pillow decodes."""
    from PIL import Image

    known = Image.registered_extensions().items()
    return frozenset(extension for extension, kind in known if kind in Image.OPEN and kind not in _NOT_DECODED)


def list_folder(root: Path) -> Listing:
    """List a folder and all below it. Links are followed, except to a folder that contains them.

    Raises:
        ValueError: if a folder cannot be read, a link leads nowhere, or a name is not valid UTF-8.
    """
    listing = Listing("")
    _list(root, listing, ())
    return listing


def class_folders(
    listing: Listing, data: str, train: str | None = None, test: str | None = None, *, drop_unlabelled: bool = False
) -> ClassFolders | None:
    """Return the splits and classes that the sub-folders are, or None if they are not class folders.

    Sub-folders are splits if they are named, or have the usual names and all contain folders of images; else they are
    classes, whatever their names. Images in sub-folders of a class belong to the class.

    Args:
        listing: The folder.
        data: Its name, for messages.
        train: The sub-folder to train on, if it is named.
        test: The sub-folder to test on, if it is named.
        drop_unlabelled: Leave out a split whose images are not in class folders.

    Raises:
        ValueError: if the sub-folders can be read in more than one way, or a split has no class folders.
    """
    notes: list[str] = []
    strays: list[str] = []
    outer = listing
    while not listing.images and len(listing.with_images) == 1:  # as archives have one folder around all others
        ((name, inner),) = listing.with_images.items()
        if is_split_name(name) or name in (train, test) or inner.images or not inner.with_images:
            break
        strays += listing.others
        listing = inner
    if listing is not outer:
        notes.append(f"the images are taken from {listing.path}")

    named = _named_splits(listing, data, train, test) or _splits(listing, data, drop_unlabelled)
    if named is None:
        classes = listing.with_images
        if len(classes) < 2 or all(is_split_name(name) for name in classes):
            return None
        _check_classes_first(classes, data)
        if like_splits := _like_splits(list(classes), data):
            notes.append(f"taken as classes and not as splits: {listed(like_splits)}")
        splits = {"train": listing}
    else:
        splits = dict(sorted(named.items(), key=lambda item: (split_kind(item[0]) != "train", item[0])))
        if unused := [folder for name, folder in listing.with_images.items() if name not in splits]:
            numbers = [f"{each.path}/ ({sum(len(inner.images) for inner in each.walk())} images)" for each in unused]
            notes.append(f"left out, next to the splits {', '.join(splits)}: {listed(numbers)}")
        splits = _without_wrapping(splits, notes)

    strays += [] if named is None else [*listing.images, *listing.others]
    empty = []
    for folder in splits.values():
        strays += [*folder.images, *folder.others]
        empty += [f"{inner.path}/" for name, inner in folder.folders.items() if name not in folder.with_images]
        strays += [path for inner in folder.with_images.values() for each in inner.walk() for path in each.others]
    if empty:
        notes.append(f"left out, without an image in it: {listed(empty)}")
    if tables := [path for path in strays if Path(path).suffix.lower() in (".csv", ".tsv", ".jsonl")]:
        notes.append(f"not used, as the sub-folders are the classes: {listed(tables)}; --table FILE takes its labels")
    if others := [path for path in strays if path not in tables]:
        notes.append(f"left out, not an image of a class: {listed(others)}")
    return ClassFolders({name: _by_class(folder) for name, folder in splits.items()}, tuple(notes))


def contents(listing: Listing) -> str:
    """Return the kinds of files in a folder and their numbers, for a message."""
    files = [path for folder in listing.walk() for path in (*folder.images, *folder.others)]
    kinds = Counter(Path(path).suffix.lower() or "without an extension" for path in files)
    return ", ".join(f"{number} {kind}" for kind, number in kinds.most_common(5)) or "no files"


def _list(folder: Path, listing: Listing, above: tuple[tuple[int, int], ...]) -> None:
    try:
        status = folder.stat()
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"data must have folders that can be read; {str(folder)!r} cannot: {reason}") from error
    above = (*above, (status.st_dev, status.st_ino))
    for entry in entries:
        if entry.name.casefold() in _LITTER:
            continue
        if any("\ud800" <= character <= "\udfff" for character in entry.name):  # bytes that are not UTF-8
            raise ValueError(f"data must have file names in UTF-8, and {str(folder)!r} holds {entry.name!r}")
        path = f"{listing.path}/{entry.name}" if listing.path else entry.name
        image = os.path.splitext(entry.name)[1].lower() in image_extensions() and not entry.name.startswith(".")
        if entry.is_symlink() and not os.path.exists(entry.path):
            if image:
                raise ValueError(f"data must have links that lead to a file, and {path!r} of {str(folder)!r} does not")
            listing.others.append(path)
        elif entry.is_dir():
            inner = os.stat(entry.path)
            if entry.name.startswith(".") or (inner.st_dev, inner.st_ino) in above:
                listing.others.append(f"{path}/")
                continue
            listing.folders[entry.name] = Listing(path)
            _list(Path(entry.path), listing.folders[entry.name], above)
        elif image and entry.is_file():
            listing.images.append(path)
        else:
            listing.others.append(path)


def _named_splits(listing: Listing, data: str, train: str | None, test: str | None) -> dict[str, Listing] | None:
    """Return the splits that the settings name and other sub-folders with usual names; None without such settings."""
    folders = listing.with_images
    named = [name for name in (train, test) if name in folders]
    if not named:
        return None
    for name in named:
        if not folders[name].with_images:
            raise ValueError(
                f"data must have a folder of images for each class in each split; {name!r} of {data!r} has none"
            )
    return {
        name: folder
        for name, folder in folders.items()
        if name in named or (is_split_name(name) and folder.with_images)
    }


def _splits(listing: Listing, data: str, drop_unlabelled: bool) -> dict[str, Listing] | None:
    """Return the splits by their usual names; None if the folders are classes, or neither."""
    known = {name: folder for name, folder in listing.with_images.items() if is_split_name(name)}
    others = [name for name in listing.with_images if name not in known]
    with_classes = {name: folder for name, folder in known.items() if folder.with_images}
    flat = [name for name in known if name not in with_classes]
    if not with_classes:
        return None
    if not others and (not flat or drop_unlabelled):
        return with_classes
    if not others:
        raise ValueError(
            f"data must have a folder of images for each class in each split, and {listed(flat)} of {data!r} has none: "
            "with --drop_unlabelled it is left out; --table FILE gives labels in place of folders"
        )
    shared = Counter(name for folder in with_classes.values() for name in folder.with_images)
    if not flat and max(shared.values()) > 1:
        return with_classes
    raise ValueError(
        f"data must show which sub-folders are splits and which are classes: in {data!r}, {listed(list(with_classes))} "
        f"with folders in it may be either, beside {listed([*flat, *others])}; name the splits (train_split, "
        "test_split), or move one of these folders away"
    )


def _like_splits(names: Sequence[str], data: str) -> list[str]:
    """The names of classes that could be those of splits.

    Raises:
        ValueError: if all could be, as ``train_images`` and ``test_images``.
    """
    kinds = {name: {kind for kind, word in _WORDS.items() if word.search(name)} for name in names}
    alike = [name for name, found in kinds.items() if found]
    if len(set().union(*kinds.values())) > 1 and len(alike) == len(names):
        raise ValueError(
            f"data must show which sub-folders are splits and which are classes: {listed(names)} of {data!r} may be "
            "either; name the splits (train_split, test_split), or put the classes into a folder called train"
        )
    return alike


def _check_classes_first(classes: dict[str, Listing], data: str) -> None:
    """Check that the classes are not divided into splits themselves."""
    for name, folder in classes.items():
        inner = {each.strip().casefold() for each in folder.with_images}
        if inner & set(TRAIN_NAMES) and inner & set(TEST_NAMES):
            raise ValueError(
                f"data must have splits with classes in them, and {name!r} of {data!r} is a class with splits in it "
                f"({listed(list(folder.with_images))}): move them to {data}/train/{name} and {data}/test/{name}"
            )


def _without_wrapping(splits: dict[str, Listing], notes: list[str]) -> dict[str, Listing]:
    """The splits without a single folder around the classes of each, as in ``train/train/cat``."""
    inner = {name: next(iter(folder.with_images.values())) for name, folder in splits.items()}
    if any(len(splits[name].with_images) > 1 or each.images or not each.with_images for name, each in inner.items()):
        return splits
    notes.append(f"the classes are taken from {listed([each.path for each in inner.values()])}")
    return inner


def _by_class(folder: Listing) -> dict[str, list[str]]:
    """The images of each class; names that look the same, composed or decomposed, are one class."""
    classes: dict[str, list[str]] = {}
    for name, inner in sorted(folder.with_images.items()):
        images: Iterable[str] = (path for each in inner.walk() for path in each.images)
        classes.setdefault(unicodedata.normalize("NFC", name), []).extend(sorted(images))
    return classes
