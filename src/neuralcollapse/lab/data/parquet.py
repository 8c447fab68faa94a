"""Parquet files of a folder: which of them make which split, and their rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from neuralcollapse.lab.data.folders import TRAIN_NAMES, Listing, listed

_SHARD = re.compile(r"(?P<split>.+)-(?P<number>[0-9]{5})-of-(?P<total>[0-9]{5})")
# What file names call a split, and what it is called here, as in Hugging Face's `datasets`.
_WORDS = {
    **dict.fromkeys(TRAIN_NAMES, "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def find_parquet(
    root: Path, listing: Listing, data: str, config: str | None
) -> tuple[dict[str, list[Path]], list[str]]:
    """Find the Parquet files of each split.

    Args:
        root: The folder.
        listing: What it holds.
        data: Its name, for messages.
        config: The configuration, where a copy of a data set of the hub has several.

    Returns:
        The files by split, and those that are not used.

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
    used = {path for paths in by_split.values() for path in paths}
    order = sorted(by_split, key=lambda split: (split != "train", split))
    return {split: [root / path for path in by_split[split]] for split in order}, sorted(set(files) - used)


def holds_images(path: Path) -> bool:
    """Return whether a Parquet file has a column of bytes, as images are stored."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return any("binary" in str(column.type) for column in pq.read_schema(path))
    except (OSError, pa.ArrowException):
        return False


def load_parquet(files: Sequence[Path]) -> list[Any]:
    """Load the files of one split as Hugging Face data sets, one for all that declare the same columns.

    Raises:
        ValueError: if one is not a Parquet file.
    """
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    groups: dict[str, list[tuple[Path, str]]] = {}
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
        groups.setdefault(repr(datasets.Features.from_arrow_schema(schema)), []).append((path, version))
    return [_load(group) for group in groups.values()]


def _load(files: Sequence[tuple[Path, str]]) -> Any:
    from datasets.data_files import DataFilesDict, DataFilesList
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
    from datasets.packaged_modules.parquet.parquet import Parquet

    # Given as they are, and not as patterns: a path may hold brackets and stars. What says whether a file has changed
    # since it was prepared is its size, time and place.
    paths = DataFilesList([str(path.absolute()) for path, _ in files], [(version,) for _, version in files])
    builder = Parquet(data_files=DataFilesDict(train=paths), hash=_PACKAGED_DATASETS_MODULES["parquet"][1])
    builder.download_and_prepare()
    return builder.as_dataset("train")


def _by_card(root: Path, files: Sequence[str], data: str, config: str | None) -> dict[str, list[str]]:
    """The files of each split as the README of a data set of the hub lists them."""
    card = root / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        described = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        described = None
    configs = described.get("configs") if isinstance(described, dict) else None
    known = {
        str(one["config_name"]): one
        for one in (configs if isinstance(configs, list) else [])
        if isinstance(one, dict) and "config_name" in one and one.get("data_files")
    }
    if not known:
        return {}
    default = [name for name, one in known.items() if one.get("default")] or [
        name for name in known if name == "default"
    ]
    chosen = config or (default or list(known))[0]
    if chosen not in known or (config is None and not default and len(known) > 1):
        raise ValueError(
            f"data_config must be a configuration of {data!r}, which has {', '.join(known)}; got {config!r}"
        )
    given = known[chosen]["data_files"]
    if isinstance(given, dict):
        given = [{"split": split, "path": path} for split, path in given.items()]
    elif not (isinstance(given, list) and all(isinstance(one, dict) for one in given)):
        given = [{"path": given}]
    patterns = {str(one.get("split", "train")): one.get("path", []) for one in given}
    by_split = {
        split: [
            path for path in files for one in ([paths] if isinstance(paths, str) else paths) if _matches(path, str(one))
        ]
        for split, paths in patterns.items()
    }
    return {split: paths for split, paths in by_split.items() if paths}


def _by_name(files: Sequence[str], data: str, config: str | None) -> dict[str, list[str]]:
    if config is not None:
        inside = [path for path in files if config in path.split("/")[:-1]]
        if not inside:
            raise ValueError(f"data_config must be a folder of Parquet files in {data!r}, got {config!r}")
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
                f"data_config must say which folder of {data!r} to take: {listed(folders)} have a split {split!r} each"
            )
    return {split: list(paths) for split, paths in by_split.items()}


def _split_of(path: str) -> tuple[str, str]:
    """The split that a file is of, by its own name or by the folder nearest to it, and the folder around that."""
    parts = path[: -len(".parquet")].split("/")
    if shard := _SHARD.fullmatch(parts[-1]):
        name = shard["split"].casefold()
        return "train" if name in TRAIN_NAMES else name, "/".join(parts[:-1])
    for place in reversed(range(len(parts))):
        words = {_WORDS[word] for word in re.split(r"[^a-z0-9]+", parts[place].casefold()) if word in _WORDS}
        if len(words) == 1:
            return words.pop(), "/".join(parts[:place])
    return "", ""


def _check_complete(split: str, paths: Sequence[str], data: str) -> None:
    shards = [shard for path in paths if (shard := _SHARD.fullmatch(Path(path).stem))]
    for shard in shards:
        total = int(shard["total"])
        alike = {
            each["number"] for each in shards if each["split"] == shard["split"] and each["total"] == shard["total"]
        }
        if len(alike) < total:
            raise ValueError(f"data must have all files of its split {split!r}; {data!r} has {len(alike)} of {total}")


def _matches(path: str, pattern: str) -> bool:
    """Return whether a relative path matches a pattern of `datasets`, where ``**`` goes through folders."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.removeprefix("./"))
    meant: Mapping[str, str] = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.fullmatch("".join(meant.get(part, re.escape(part)) for part in parts), path) is not None
