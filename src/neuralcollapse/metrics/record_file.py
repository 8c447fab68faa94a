"""Safetensors files with a kind, a format version and a checksum."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load as parse
from safetensors.torch import save as serialise
from torch import Tensor

_LARGEST_HEADER = 100_000_000  # bytes, of the safetensors format


def write_record(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file completely or not at all: to a temporary name, synced to disk, then renamed.

    A checksum of the header and of the tensors is added to the metadata.

    Raises:
        OSError: if the file cannot be written; an existing file is then left unchanged.
    """
    path = Path(path)
    data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checksum = _checksum(*_split(serialise(data, dict(metadata))))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)  # a symbolic link would be followed
        with temporary.open("wb") as file:
            file.write(serialise(data, {**metadata, "checksum": checksum}))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def read_record(path: str | Path, kind: str, version: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file of the given kind, with a format up to ``version``.

    Raises:
        ValueError: if the file is truncated, damaged, of another kind or of a newer format; the message says which.
        OSError: if the file does not exist or cannot be read.
    """
    content = Path(path).read_bytes()
    try:
        header, body = _split(content)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except EOFError:
        raise ValueError(f"{path} is truncated: it ends inside its header, after {len(content)} bytes") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{path} is not a safetensors file") from None
    metadata: dict[str, str] = dict(header.get("__metadata__", {}))
    if metadata.get("format") != kind:
        raise ValueError(f"{path} is a safetensors file, but not a {kind}")
    number = metadata.get("format_version", "")
    if not number.isdecimal() or int(number) > version:
        raise ValueError(
            f"{path} is newer: it has format {number} of {kind}, written by neuralcollapse "
            f"{metadata.get('package_version')}; this version reads formats up to {version}"
        )
    if len(body) < max(ends, default=0):
        raise ValueError(f"{path} is truncated: it holds {len(body)} of {max(ends)} bytes of tensors")
    if _checksum(header, body) != metadata.get("checksum"):
        raise ValueError(f"{path} is damaged: its content does not match its checksum")
    return parse(content), metadata


def _split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header of a safetensors file and the bytes of its tensors; raise EOFError if the header is cut off."""
    length = int.from_bytes(content[:8], "little")
    if content[8:9] not in (b"{", b"") or length > _LARGEST_HEADER:
        raise ValueError("not a header")
    if len(content) < 8 + length:
        raise EOFError
    header = json.loads(content[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("not a header")
    return header, content[8 + length :]


def _checksum(header: Mapping[str, Any], body: bytes) -> str:
    """Return the SHA-256 of header and tensors, without the checksum itself."""
    metadata = {name: text for name, text in header.get("__metadata__", {}).items() if name != "checksum"}
    digest = hashlib.sha256(json.dumps({**header, "__metadata__": metadata}, sort_keys=True).encode())
    digest.update(body)
    return digest.hexdigest()
