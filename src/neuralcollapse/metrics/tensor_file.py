"""A safetensors file that says what it is, whether it is whole, and who wrote it."""

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


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write the file whole or not at all: under a temporary name, synced to disk, renamed.

    The header gains a checksum of itself and of the tensors.
    """
    path = Path(path)
    data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    unsigned, body = _parts(serialise(data, dict(header)))
    signed = serialise(data, {**header, "checksum": _checksum(unsigned, body)})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)  # a link there would be written through
        with temporary.open("wb") as file:
            file.write(signed)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def read_tensors(path: str | Path, kind: str, version: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of a file of this kind, of this version of its format or of an earlier one.

    Raises:
        ValueError: The file is truncated, damaged, foreign or of a newer format; the message says which.
    """
    content = Path(path).read_bytes()
    try:
        header, body = _parts(content)
        expected = max(
            (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0
        )
    except _Truncated:
        raise ValueError(f"{path} is truncated: it ends inside its header, after {len(content)} bytes") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{path} is foreign: it is no safetensors file") from None
    metadata: dict[str, str] = dict(header.get("__metadata__", {}))
    if metadata.get("format") != kind:
        raise ValueError(f"{path} is foreign: it is a safetensors file, but no {kind}")
    if not metadata.get("format_version", "").isdecimal() or int(metadata["format_version"]) > version:
        raise ValueError(
            f"{path} is newer: it has format {metadata.get('format_version')} of {kind}, written by neuralcollapse "
            f"{metadata.get('package_version')}; this version reads formats up to {version}"
        )
    if len(body) < expected:
        raise ValueError(f"{path} is truncated: it holds {len(body)} of {expected} bytes of tensors")
    if _checksum(header, body) != metadata.get("checksum"):
        raise ValueError(f"{path} is damaged: its content does not have the checksum that it was written with")
    return parse(content), metadata


class _Truncated(Exception):
    """The header is not there to its end."""


def _parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header, and the bytes of the tensors."""
    length = int.from_bytes(content[:8], "little")
    if content[8:9] not in (b"{", b""):
        raise ValueError("no header")
    if len(content) < 8 + length:
        if length > 100_000_000:  # the format's own limit
            raise ValueError("no header")
        raise _Truncated
    header = json.loads(content[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("no header")
    return header, content[8 + length :]


def _checksum(header: Mapping[str, Any], body: bytes) -> str:
    """SHA-256 of all that the file says, but for the checksum itself."""
    metadata = {name: text for name, text in header.get("__metadata__", {}).items() if name != "checksum"}
    digest = hashlib.sha256(json.dumps({**header, "__metadata__": metadata}, sort_keys=True).encode())
    digest.update(body)
    return digest.hexdigest()
