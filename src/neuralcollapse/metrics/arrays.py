"""Rows of arrays in memory and in files (npy, npz, safetensors, Parquet), block by block."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from neuralcollapse._checks import listed

Source = Tensor | np.ndarray | str | Path
SUFFIXES = (".npy", ".npz", ".safetensors", ".parquet")
_NAMED = re.compile(r"(.+(?:\.npz|\.safetensors|\.parquet)):(.+)", re.DOTALL)
_SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_LARGEST_HEADER = 100_000_000  # bytes, of the safetensors format


@dataclass(frozen=True)
class Rows:
    """Array (N, ...) that is read block by block.

    Attributes:
        shape: Shape of the array.
        dtype: Data type of the array.
        read: Function that takes a number n and yields the rows in order, in blocks of at most n rows.
        is_view: Whether blocks are views of memory or of a memory-mapped file, and need no additional memory.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int], Iterator[Tensor]]
    is_view: bool

    def whole(self) -> Tensor:
        """Return the array as one tensor."""
        if not self.shape[0]:
            return torch.empty(self.shape, dtype=self.dtype)
        blocks = list(self.read(self.shape[0]))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def open_rows(argument: str, source: Source) -> Rows:
    """Return the rows of a tensor, an array or a file.

    Args:
        argument: Name of the argument, for messages.
        source: A tensor; a NumPy array; or the path of a ``.npy``, ``.npz``, ``.safetensors`` or ``.parquet`` file.
            Append ``":NAME"`` to the path to select one of several arrays in the file. In a Parquet file, the name is a
            column of numbers or of lists of equal length, or a pattern such as ``"f*"`` that matches several columns of
            numbers.

    Raises:
        ValueError: if the source has another type, the name is missing or not in the file, or the entries are not
            numbers.
        OSError: if the file cannot be read.
        ImportError: if a Parquet file is given and pyarrow is not installed.
    """
    if isinstance(source, Tensor):
        return _of_tensor(source.detach())
    if isinstance(source, np.ndarray):
        return _of_array(argument, source)
    if not isinstance(source, str | Path):
        kinds = f"a tensor, an array or the path of a file ({', '.join(SUFFIXES)})"
        raise ValueError(f"{argument} must be {kinds}, got {type(source).__name__}")
    named = _NAMED.fullmatch(str(source))
    path, name = (Path(named[1]), named[2]) if named else (Path(source), None)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{argument} must be a file of {', '.join(SUFFIXES)}, got {str(source)!r}")
    if not path.is_file():
        raise FileNotFoundError(f"{argument} must be a file, and {str(path)!r} is not")
    if path.suffix == ".npy":
        return _of_array(argument, _loaded(argument, path))
    if path.suffix == ".npz":
        return _of_array(argument, _of_archive(argument, path, name))
    if path.suffix == ".safetensors":
        return _of_tensor(_of_safetensors(argument, path, name))
    return _of_parquet(argument, path, name)


def _of_tensor(tensor: Tensor) -> Rows:
    if not tensor.ndim:
        raise ValueError("an array of features or labels must have at least one dimension, got a single number")
    return Rows(tuple(tensor.shape), tensor.dtype, lambda size: iter(tensor.split(max(size, 1))), True)


def _of_array(argument: str, array: np.ndarray) -> Rows:
    if array.dtype.kind not in "fiu" or array.dtype.itemsize > 8 or not array.ndim:
        raise ValueError(f"{argument} must be an array of numbers of at most 64 bits, got {array.dtype} {array.shape}")
    is_view = bool(array.dtype.isnative and array.flags.aligned and all(stride >= 0 for stride in array.strides))

    def read(size: int) -> Iterator[Tensor]:
        for start in range(0, len(array), max(size, 1)):
            block = array[start : start + size]
            yield _as_tensor(block if is_view else np.array(block, dtype=array.dtype.newbyteorder("=")))

    return Rows(array.shape, _as_tensor(np.empty(0, array.dtype.newbyteorder("="))).dtype, read, is_view)


def _as_tensor(array: np.ndarray) -> Tensor:
    """Return an array as a tensor, which must not be written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(array)


def _loaded(argument: str, path: Path) -> np.ndarray:
    """Return the array of a .npy file, memory-mapped."""
    try:
        return np.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{argument}: {path} is not a file of numbers that numpy.save wrote: {error}") from None


def _of_archive(argument: str, path: Path, name: str | None) -> np.ndarray:
    """Return an array of a .npz file, memory-mapped unless it is compressed."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            member = members[_chosen(argument, path, name, list(members))]
            if member.compress_type != zipfile.ZIP_STORED:
                with archive.open(member) as stream:
                    return np.lib.format.read_array(stream, allow_pickle=False)
            file.seek(member.header_offset + 26)  # lengths of the name and of the extra field, which precede the data
            lengths = np.frombuffer(file.read(4), "<u2")
            file.seek(member.header_offset + 30 + int(lengths.sum()))
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, in_columns, dtype = read_header(file)
            if dtype.hasobject:
                raise ValueError("it contains objects")
            order: Literal["F", "C"] = "F" if in_columns else "C"
            return np.memmap(path, dtype, mode="c", offset=file.tell(), shape=shape, order=order)
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{argument}: {path} is not a file of arrays that numpy.savez wrote: {error}") from None


def _of_safetensors(argument: str, path: Path, name: str | None) -> Tensor:
    """Return a tensor of a safetensors file, memory-mapped."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if 0 < length <= _LARGEST_HEADER else None
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise ValueError(f"{argument}: {path} is not a safetensors file")
    header.pop("__metadata__", None)
    entry = header[_chosen(argument, path, name, list(header))]
    if entry["dtype"] not in _SAFETENSORS:
        raise ValueError(f"{argument} must be of {', '.join(_SAFETENSORS)}, got {entry['dtype']}")
    start, end = entry["data_offsets"]
    if 8 + length + end > path.stat().st_size:
        raise ValueError(f"{argument}: {path} is truncated")
    dtype, shape = _SAFETENSORS[entry["dtype"]], entry["shape"]
    if end == start:
        return torch.empty(shape, dtype=dtype)
    content = np.memmap(path, np.uint8, mode="c", offset=8 + length + start, shape=(end - start,))
    return torch.from_numpy(content).view(dtype).view(shape)


def _of_parquet(argument: str, path: Path, name: str | None) -> Rows:
    try:
        from pyarrow import ArrowInvalid, parquet, types
    except ImportError:
        raise ImportError(f"{argument}: a Parquet file needs pyarrow, of the extra neuralcollapse[lab]") from None
    try:
        file = parquet.ParquetFile(path, memory_map=True)
    except ArrowInvalid as error:
        raise ValueError(f"{argument}: {path} is not a Parquet file: {error}") from None
    schema = file.schema_arrow
    if name is None or name in schema.names:
        columns = [_chosen(argument, path, name, schema.names)]
    else:
        columns = [column for column in schema.names if fnmatchcase(column, name)]
        if not columns:
            _chosen(argument, path, name, schema.names)
    for column in columns:
        kind = schema.field(column).type
        listing = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        number = kind.value_type if listing and len(columns) == 1 else kind
        if not (types.is_integer(number) or types.is_floating(number)):
            raise ValueError(f"{argument} must be columns of numbers, but column {column!r} of {path} has type {kind}")

    def read(size: int) -> Iterator[Tensor]:
        for batch in file.iter_batches(max(size, 1), columns=columns):
            if any(batch.column(column).null_count for column in columns):
                raise ValueError(f"{argument} must not have missing values, but {path} has some")
            arrays = [_numbers(argument, path, batch.column(column)) for column in columns]
            whole_name = len(columns) == 1 and name in (None, columns[0])
            yield _as_tensor(arrays[0] if whole_name else np.column_stack(arrays))

    first = next(read(1), None)
    if first is None:
        raise ValueError(f"{argument} must have at least one row, but {path} has none")
    return Rows((file.metadata.num_rows, *first.shape[1:]), first.dtype, read, False)


def _numbers(argument: str, path: Path, column: Any) -> np.ndarray:
    """Return a column of numbers as (n,), or a column of lists as (n, d)."""
    if not hasattr(column, "flatten") or not hasattr(column.type, "value_type"):
        return column.to_numpy(zero_copy_only=False)
    values = column.flatten()
    lengths = np.unique(column.value_lengths().to_numpy(zero_copy_only=False))
    if len(lengths) > 1 or values.null_count:
        raise ValueError(f"{argument} must be lists of equal length without missing values, unlike those of {path}")
    return values.to_numpy(zero_copy_only=False).reshape(len(column), -1)


def _chosen(argument: str, path: Path, name: str | None, names: list[str]) -> str:
    """Return the name of an array in a file; it may be left out if the file has only one array."""
    if name is None and len(names) == 1:
        return names[0]
    if name not in names:
        got = "no name" if name is None else repr(name)
        raise ValueError(f"{argument} must name one of {listed(names)} as '{path}:NAME', got {got}")
    return name
