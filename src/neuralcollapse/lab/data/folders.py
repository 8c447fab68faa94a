"""Interpretation of data folders: splits, classes, Parquet files, and files that are left out.

The folder is listed by this module instead of `datasets`, which silently drops classes whose names look like those of
splits, and interprets names of files and folders as patterns.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

# Usual names of splits, in order of preference.
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation")
_KINDS = {"train": TRAIN_NAMES, "test": ("test", "testing"), "validation": ("validation", "valid", "val", "dev")}
# Words in names of folders that may denote splits.
_SPLIT_WORDS = {
    "train": re.compile(r"(?<![a-z])train", re.IGNORECASE),
    "test": re.compile(r"(?<![a-z])(test|valid|val(?![a-z])|dev(?![a-z])|eval)", re.IGNORECASE),
}
# Words in the names of Parquet files, and the splits that they mean, as in Hugging Face's `datasets`.
_FILE_WORDS = {
    **{name: kind for kind, names in _KINDS.items() for name in names},
    **dict.fromkeys(("eval", "evaluation"), "test"),
}
_SHARD = re.compile(r"(?P<split>.+)-(?P<number>[0-9]{5})-of-(?P<total>[0-9]{5})")
# Files left by file managers, archivers and notebooks.
_LITTER = {".ds_store", "thumbs.db", "desktop.ini", "__macosx", "__pycache__", "@eadir", "lost+found"}
# Formats that Pillow lists but cannot decode by itself.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}
_LISTED = 3


def is_split_name(name: str) -> bool:
    """Return whether a name is a usual name of a split, in upper or lower case."""
    return name.strip().casefold() in (*TRAIN_NAMES, *TEST_NAMES)


def split_kind(name: str) -> str:
    """Return the common name for all usual names of splits with the same meaning."""
    name = name.strip().casefold()
    return next((kind for kind, names in _KINDS.items() if name in names), name)


def listed(names: Sequence[str]) -> str:
    """Return the first names and the number of the others, for a message."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


@cache
def image_extensions() -> frozenset[str]:
    """Return the file name extensions of the formats that Pillow decodes."""
    from PIL import Image

    known = Image.registered_extensions().items()
    return frozenset(extension for extension, kind in known if kind in Image.OPEN and kind not in _NOT_DECODED)


# Listing.


@dataclass
class Listing:
    """Contents of a folder; paths are relative to the root."""

    path: str
    images: list[str] = field(default_factory=list)
    folders: dict[str, Listing] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    """Files that are not images, hidden files, and folders that are not entered."""

    def walk(self) -> Iterator[Listing]:
        """Yield this folder and all folders below it."""
        yield self
        for folder in self.folders.values():
            yield from folder.walk()

    @cached_property
    def with_images(self) -> dict[str, Listing]:
        """Sub-folders that contain images, directly or in folders below."""
        return {name: folder for name, folder in self.folders.items() if any(each.images for each in folder.walk())}

    def contents(self) -> str:
        """Return the types of files and their numbers, for a message."""
        files = [path for folder in self.walk() for path in (*folder.images, *folder.others)]
        kinds = Counter(Path(path).suffix.lower() or "without an extension" for path in files)
        return ", ".join(f"{number} {kind}" for kind, number in kinds.most_common(5)) or "no files"


def list_folder(root: Path, path: str = "", ancestors: tuple[tuple[int, int], ...] = ()) -> Listing:
    """List a folder and all folders below it. Links are followed, except to a folder that contains them.

    Args:
        root: The folder.
        path: Its path relative to the data folder.
        ancestors: Device and inode of each folder around it.

    Raises:
        ValueError: if a folder cannot be read, a link to an image is broken, or a name is not valid UTF-8.
    """
    listing = Listing(path)
    try:
        status = root.stat()
        with os.scandir(root) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"data must have folders that can be read; {str(root)!r} cannot: {reason}") from error
    ancestors = (*ancestors, (status.st_dev, status.st_ino))
    for entry in entries:
        if entry.name.casefold() in _LITTER:
            continue
        if any("\ud800" <= character <= "\udfff" for character in entry.name):  # bytes that are not UTF-8
            raise ValueError(f"data must have file names in UTF-8, but {str(root)!r} has {entry.name!r}")
        path = f"{listing.path}/{entry.name}" if listing.path else entry.name
        image = os.path.splitext(entry.name)[1].lower() in image_extensions() and not entry.name.startswith(".")
        if entry.is_symlink() and not os.path.exists(entry.path):
            if image:
                raise ValueError(f"data must have links that lead to a file, but {path!r} of {str(root)!r} does not")
            listing.others.append(path)
        elif entry.is_dir():
            status = os.stat(entry.path)
            if entry.name.startswith(".") or (status.st_dev, status.st_ino) in ancestors:
                listing.others.append(f"{path}/")
            else:
                listing.folders[entry.name] = list_folder(Path(entry.path), path, ancestors)
        elif image and entry.is_file():
            listing.images.append(path)
        else:
            listing.others.append(path)
    return listing


# Class folders.


def class_folders(
    listing: Listing, data: str, train: str | None = None, test: str | None = None, *, drop_unlabelled: bool = False
) -> tuple[dict[str, dict[str, list[str]]], list[str]] | None:
    """Return the splits and classes of the sub-folders, or None if they are not class folders.

    Sub-folders are splits if the settings name them, or if they have usual names of splits and all contain folders of
    images. Otherwise they are classes, regardless of their names. Images in sub-folders of a class belong to the class.

    Args:
        listing: The folder.
        data: Name of the folder, for messages.
        train: Sub-folder to train on, if it is given.
        test: Sub-folder to test on, if it is given.
        drop_unlabelled: Leave out a split whose images are not in class folders.

    Returns:
        The image files of each split by class, and one line for each kind of omission.

    Raises:
        ValueError: if the sub-folders can be read in more than one way, or a split has no class folders.
    """
    notes: list[str] = []
    strays: list[str] = []
    outermost = listing
    while not listing.images and len(listing.with_images) == 1:  # archives often have one folder around all others
        ((name, inner),) = listing.with_images.items()
        if is_split_name(name) or name in (train, test) or inner.images or not inner.with_images:
            break
        strays += listing.others
        listing = inner
    if listing is not outermost:
        notes.append(f"the images are taken from {listing.path}")

    folders = listing.with_images
    splits = _named_splits(folders, data, train, test) or _usual_splits(folders, data, drop_unlabelled)
    if splits is None:
        if len(folders) < 2 or all(is_split_name(name) for name in folders):
            return None
        _check_without_splits(folders, data)
        if like_splits := _like_splits(list(folders), data):
            notes.append(f"taken as classes and not as splits: {listed(like_splits)}")
        splits = {"train": listing}
    else:
        splits = dict(sorted(splits.items(), key=lambda item: (split_kind(item[0]) != "train", item[0])))
        if unused := [folder for name, folder in folders.items() if name not in splits]:
            numbers = [f"{each.path}/ ({sum(len(inner.images) for inner in each.walk())} images)" for each in unused]
            notes.append(f"left out, next to the splits {', '.join(splits)}: {listed(numbers)}")
        splits = _without_wrapping(splits, notes)
        strays += [*listing.images, *listing.others]

    empty = []
    for folder in splits.values():
        strays += [*folder.images, *folder.others]
        empty += [f"{inner.path}/" for name, inner in folder.folders.items() if name not in folder.with_images]
        strays += [path for inner in folder.with_images.values() for each in inner.walk() for path in each.others]
    if empty:
        notes.append(f"left out, without an image in it: {listed(empty)}")
    if tables := [path for path in strays if Path(path).suffix.lower() in (".csv", ".tsv", ".jsonl")]:
        notes.append(
            f"not used, as the sub-folders are the classes: {listed(tables)}; data_options can name a table for labels"
        )
    if others := [path for path in strays if path not in tables]:
        notes.append(f"left out, not an image of a class: {listed(others)}")
    return {name: _by_class(folder) for name, folder in splits.items()}, notes


def _named_splits(
    folders: dict[str, Listing], data: str, train: str | None, test: str | None
) -> dict[str, Listing] | None:
    """Return the splits that the settings name and others with usual names; None if the settings do not name one."""
    named = [name for name in (train, test) if name in folders]
    for name in named:
        if not folders[name].with_images:
            raise ValueError(
                f"data must have a folder of images for each class in each split; {name!r} of {data!r} has none"
            )
    usual = [name for name, folder in folders.items() if is_split_name(name) and folder.with_images]
    return {name: folder for name, folder in folders.items() if name in (*named, *usual)} if named else None


def _usual_splits(folders: dict[str, Listing], data: str, drop_unlabelled: bool) -> dict[str, Listing] | None:
    """Return the splits by their usual names; None if the folders are not splits."""
    known = {name: folder for name, folder in folders.items() if is_split_name(name)}
    others = [name for name in folders if name not in known]
    with_classes = {name: folder for name, folder in known.items() if folder.with_images}
    flat = [name for name in known if name not in with_classes]
    if not with_classes:
        return None
    if not others and (not flat or drop_unlabelled):
        return with_classes
    if not others:
        raise ValueError(
            f"data must have a folder of images for each class in each split, and {listed(flat)} of {data!r} has none: "
            "with --leave_out unlabelled it is left out; a table, named in data_options, gives labels instead"
        )
    shared = Counter(name for folder in with_classes.values() for name in folder.with_images)
    if not flat and max(shared.values()) > 1:  # the splits share classes
        return with_classes
    raise ValueError(
        f"data must show which sub-folders are splits and which are classes: in {data!r}, {listed(list(with_classes))} "
        f"with folders in it may be either, next to {listed([*flat, *others])}; name the splits "
        "(data_options: train_split, test_split), or move one of these folders away"
    )


def _like_splits(names: Sequence[str], data: str) -> list[str]:
    """Return the names of classes that could also be names of splits.

    Raises:
        ValueError: if this applies to all names, such as ``train_images`` and ``test_images``.
    """
    kinds = {name: {kind for kind, word in _SPLIT_WORDS.items() if word.search(name)} for name in names}
    alike = [name for name, meanings in kinds.items() if meanings]
    if len(set().union(*kinds.values())) > 1 and len(alike) == len(names):
        raise ValueError(
            f"data must show which sub-folders are splits and which are classes: {listed(names)} of {data!r} may be "
            "either; name the splits (data_options: train_split, test_split), or put the classes into a folder train"
        )
    return alike


def _check_without_splits(classes: dict[str, Listing], data: str) -> None:
    """Check that the classes are not divided into splits themselves."""
    for name, folder in classes.items():
        inner = {each.strip().casefold() for each in folder.with_images}
        if inner & set(TRAIN_NAMES) and inner & set(TEST_NAMES):
            raise ValueError(
                f"data must have splits with classes in them, and {name!r} of {data!r} is a class with splits in it "
                f"({listed(list(folder.with_images))}): move them to {data}/train/{name} and {data}/test/{name}"
            )


def _without_wrapping(splits: dict[str, Listing], notes: list[str]) -> dict[str, Listing]:
    """Return the splits without a single folder around the classes of each, as in ``train/train/cat``."""
    inner = {name: next(iter(folder.with_images.values())) for name, folder in splits.items()}
    if any(len(splits[name].with_images) > 1 or each.images or not each.with_images for name, each in inner.items()):
        return splits
    notes.append(f"the classes are taken from {listed([each.path for each in inner.values()])}")
    return inner


def _by_class(folder: Listing) -> dict[str, list[str]]:
    """Return the images of each class; names that look the same, composed or decomposed, are one class."""
    classes: dict[str, list[str]] = {}
    for name, inner in sorted(folder.with_images.items()):
        images = sorted(path for each in inner.walk() for path in each.images)
        classes.setdefault(unicodedata.normalize("NFC", name), []).extend(images)
    return classes


# Parquet files.


def find_parquet(
    root: Path, listing: Listing, data: str, config: str | None
) -> tuple[dict[str, list[Path]], list[str]]:
    """Find the Parquet files of each split.

    Args:
        root: The folder.
        listing: Its contents.
        data: Its name, for messages.
        config: The configuration, if a copy of a data set of the hub has several.

    Returns:
        The files by split, and a line on those that are not used.

    Raises:
        ValueError: if it is not clear which files make a split, or some of its files are missing.
    """
    files = sorted(path for folder in listing.walk() for path in folder.others if path.lower().endswith(".parquet"))
    files = [path for path in files if not any(part.startswith(".") for part in path.split("/"))]
    if not files:
        return {}, []
    by_split = _by_card(root, files, data, config) or _by_name(files, data, config)
    for split, paths in by_split.items():
        _check_complete(split, paths, data)
    unused = sorted(set(files) - {path for paths in by_split.values() for path in paths})
    order = sorted(by_split, key=lambda split: (split != "train", split))
    notes = [f"not used: {listed(unused)}"] if unused else []
    return {split: [root / path for path in by_split[split]] for split in order}, notes


def holds_images(path: Path) -> bool:
    """Return whether a Parquet file has a column of bytes, as images are stored."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return any("binary" in str(column.type) for column in pq.read_schema(path))
    except (OSError, pa.ArrowException):
        return False


def load_parquet(files: Sequence[Path]) -> list[Any]:
    """Load the files of one split as Hugging Face data sets, one for all files that declare the same columns.

    Raises:
        ValueError: if one is not a Parquet file.
    """
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets.data_files import DataFilesDict, DataFilesList
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
    from datasets.packaged_modules.parquet.parquet import Parquet

    groups: dict[str, list[tuple[str, str]]] = {}
    for path in files:
        try:
            schema, footer = pq.read_schema(path), pq.read_metadata(path)
        except (OSError, pa.ArrowException) as error:
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"data must have Parquet files that can be read; {str(path)!r} cannot: {reason}"
            ) from error
        status = path.stat()
        version = f"{status.st_size} {status.st_mtime_ns} {status.st_ino} {footer.num_rows}"
        columns = repr(datasets.Features.from_arrow_schema(schema))
        groups.setdefault(columns, []).append((str(path.absolute()), version))
    parts = []
    for group in groups.values():
        paths, versions = zip(*group, strict=True)
        # Given as they are, and not as patterns, since a path may hold brackets and stars. A file that was prepared
        # before is prepared again if its size, time, inode or number of rows has changed.
        data_files = DataFilesDict(train=DataFilesList(list(paths), [(version,) for version in versions]))
        builder = Parquet(data_files=data_files, hash=_PACKAGED_DATASETS_MODULES["parquet"][1])
        builder.download_and_prepare()
        parts.append(builder.as_dataset("train"))
    return parts


def _by_card(root: Path, files: Sequence[str], data: str, config: str | None) -> dict[str, list[str]]:
    """Return the files of each split as the README of a data set of the hub lists them; none without such a list."""
    import yaml
    from datasets.data_files import sanitize_patterns

    card = root / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        described = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        described = None
    configs = described.get("configs") if isinstance(described, dict) else None
    configs = [each for each in configs if isinstance(each, dict)] if isinstance(configs, list) else []
    known = {str(each["config_name"]): each for each in configs if "config_name" in each and each.get("data_files")}
    if not known:
        return {}
    default = [name for name, each in known.items() if each.get("default")] or [
        name for name in known if name == "default"
    ]
    chosen = config or (default or list(known))[0]
    if chosen not in known or (config is None and not default and len(known) > 1):
        raise ValueError(
            f"data_options.config must be a configuration of {data!r}, which has {', '.join(known)}; got {config!r}"
        )
    try:
        patterns: dict[str, list[str]] = sanitize_patterns(known[chosen]["data_files"])
    except (TypeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"data must have a README.md whose data_files `datasets` can read, and that of {data!r} does not: {reason}"
        ) from error
    by_split = {
        str(split): [path for path in files for pattern in wanted if _matches(path, str(pattern))]
        for split, wanted in patterns.items()
    }
    return {split: paths for split, paths in by_split.items() if paths}


def _by_name(files: Sequence[str], data: str, config: str | None) -> dict[str, list[str]]:
    """Return the files of each split by words in their names and folders, all of one folder."""
    if config is not None:
        inside = [path for path in files if config in path.split("/")[:-1]]
        if not inside:
            raise ValueError(f"data_options.config must be a folder of Parquet files in {data!r}, got {config!r}")
        files = inside
    by_split: dict[str, dict[str, str]] = {}
    for path in files:
        split, around = _split_of(path)
        by_split.setdefault(split, {})[path] = around
    if set(by_split) == {""}:
        by_split = {"train": by_split[""]}
    by_split.pop("", None)
    for split, paths in by_split.items():
        folders = sorted(set(paths.values()))
        if len(folders) > 1 and config is None:
            raise ValueError(
                f"data_options.config must say which folder of {data!r} to take: {listed(folders)} have a split "
                f"{split!r} each"
            )
    return {split: list(paths) for split, paths in by_split.items()}


def _split_of(path: str) -> tuple[str, str]:
    """Return the split of a file, from its name or from the nearest folder, and the folder that contains the split."""
    parts = path[: -len(".parquet")].split("/")
    if shard := _SHARD.fullmatch(parts[-1]):
        name = shard["split"].casefold()
        return "train" if name in TRAIN_NAMES else name, "/".join(parts[:-1])
    for depth in reversed(range(len(parts))):
        words = re.split(r"[^a-z0-9]+", parts[depth].casefold())
        splits = {_FILE_WORDS[word] for word in words if word in _FILE_WORDS}
        if len(splits) == 1:
            return splits.pop(), "/".join(parts[:depth])
    return "", ""


def _check_complete(split: str, paths: Sequence[str], data: str) -> None:
    shards = [shard for path in paths if (shard := _SHARD.fullmatch(Path(path).stem))]
    numbers: dict[tuple[str, str], set[str]] = {}
    for shard in shards:
        numbers.setdefault((shard["split"], shard["total"]), set()).add(shard["number"])
    for (_, total), present in numbers.items():
        if len(present) < int(total):
            raise ValueError(
                f"data must have all files of its split {split!r}; {data!r} has {len(present)} of {int(total)}"
            )


def _matches(path: str, pattern: str) -> bool:
    """Return whether a relative path matches a pattern of `datasets`, where ``**`` also matches slashes."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.removeprefix("./"))
    meanings: Mapping[str, str] = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.fullmatch("".join(meanings.get(part, re.escape(part)) for part in parts), path) is not None
