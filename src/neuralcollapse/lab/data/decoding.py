"""From encoded images to tensors of bytes: all of them at once, or the samples of a batch when they are needed."""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor

# Rows that are read from a table at a time: a row by itself takes ten times as long.
_ROWS = 256
# Bytes at the end of a file that a fingerprint is made of.
_TAIL = 4096


class Images(Protocol):
    """A table of images. Can be pickled."""

    @property
    def description(self) -> str:
        """What they are of, for messages."""
        ...

    def read(self, rows: Sequence[int]) -> Iterator[np.ndarray]:
        """The images in these rows, (H, W, C) of bytes; C is 1 for a grey one and 3 for any other."""
        ...

    def name(self, row: int) -> str:
        """The file of an image, or its row, for messages."""
        ...

    def fingerprints(self, rows: Sequence[int]) -> Iterator[bytes]:
        """A fingerprint: equal for images of the same content, and nearly always different for others."""
        ...

    def content(self, row: int) -> bytes:
        """An image as it is stored."""
        ...


@dataclass(frozen=True)
class ArrayImages:
    """Images that are arrays already."""

    arrays: Sequence[np.ndarray]
    description: str

    def read(self, rows: Sequence[int]) -> Iterator[np.ndarray]:
        """The images in these rows."""
        return (self.arrays[row] for row in rows)

    def name(self, row: int) -> str:
        """Its number."""
        return f"image {row} of {self.description}"

    def fingerprints(self, rows: Sequence[int]) -> Iterator[bytes]:
        """A digest of each image."""
        return (hashlib.blake2b(self.content(row)).digest() for row in rows)

    def content(self, row: int) -> bytes:
        """The bytes of an image."""
        return self.arrays[row].tobytes()


class EncodedImages:
    """The images of a column of Hugging Face data sets: bytes, or paths of files.

    Args:
        parts: The data sets, whose rows are counted through.
        column: Its column of images.
        description: What they are of, for messages.
        folder: The folder that paths are relative to and that files are in.
        roots: Further folders that files may be in.
    """

    def __init__(
        self, parts: Sequence[Any], column: str, description: str, folder: str = "", roots: tuple[str, ...] = ()
    ) -> None:
        import datasets

        self.folder = os.path.abspath(folder)
        self.roots = tuple(
            {place for root in (folder, *roots) for place in (os.path.abspath(root), os.path.realpath(root))}
        )
        image = datasets.Image(decode=False)
        columns = [rows.select_columns([column]).cast_column(column, image) for rows in parts]
        self.rows = datasets.concatenate_datasets(columns) if len(columns) > 1 else columns[0]
        self.column = column
        self.description = description

    def read(self, rows: Sequence[int]) -> Iterator[np.ndarray]:
        """The images in these rows.

        Raises:
            ValueError: One cannot be read; it is named.
        """
        for row, encoded in self._encoded(rows):
            try:
                with self._open(encoded) as file:
                    pixels = _decode(file)
            except Exception as error:  # Pillow's decoders fail in many ways
                raise self._unreadable(encoded, row, error) from error
            yield pixels

    def name(self, row: int) -> str:
        """The path of a file, else its row."""
        ((_, encoded),) = self._encoded([row])
        return f"row {row + 1} of {self.description}" if _stored(encoded) else str((encoded or {}).get("path"))

    def fingerprints(self, rows: Sequence[int]) -> Iterator[bytes]:
        """The size and a digest: of bytes all of them, of a file its end, so that little of a large one is read."""
        for row, encoded in self._encoded(rows):
            try:
                with self._open(encoded) as file:
                    length = file.seek(0, os.SEEK_END)
                    file.seek(0 if _stored(encoded) else max(0, length - _TAIL))
                    yield length.to_bytes(8, "big") + hashlib.blake2b(file.read()).digest()
            except (OSError, ValueError) as error:
                raise self._unreadable(encoded, row, error) from error

    def content(self, row: int) -> bytes:
        """An image as it is stored."""
        ((_, encoded),) = self._encoded([row])
        with self._open(encoded) as file:
            return file.read()

    def check_files(self) -> None:
        """Check that every path is that of a file within the folder, before any is opened.

        Raises:
            ValueError: One is not.
        """
        import pyarrow.compute as pc

        column = self.rows.with_format("arrow")[:][self.column]
        length = pc.binary_length(pc.struct_field(column, "bytes")).fill_null(0)
        outside = np.flatnonzero(length.to_numpy() == 0)
        paths = pc.struct_field(column, "path").take(outside).to_pylist() if len(outside) else []
        for row, path in zip(outside.tolist(), paths, strict=True):
            try:
                _check_regular(self._path(path))
            except (OSError, ValueError) as error:
                raise self._unreadable({"path": path}, row, error) from error

    def _encoded(self, rows: Sequence[int]) -> Iterator[tuple[int, dict[str, Any] | None]]:
        for start in range(0, len(rows), _ROWS):
            chunk = rows[start : start + _ROWS]
            yield from zip(chunk, self.rows[chunk][self.column], strict=True)

    def _open(self, encoded: dict[str, Any] | None) -> BinaryIO:
        if encoded is not None and _stored(encoded):
            return io.BytesIO(encoded["bytes"])
        path = self._path((encoded or {}).get("path"))
        _check_regular(path)
        return path.open("rb")

    def _path(self, given: str | None) -> Path:
        if not given:
            raise ValueError("it is missing")
        path = Path(os.path.normpath(Path(self.folder, given)))
        if not any(path.is_relative_to(root) for root in self.roots):
            raise ValueError("paths must stay within the data folder")
        return path

    def _unreadable(self, encoded: dict[str, Any] | None, row: int, error: Exception) -> ValueError:
        name = (encoded or {}).get("path") or f"number {row}"
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = re.sub(r" <_io\..*>", "", text.split("\n")[0]) or type(error).__name__
        return ValueError(f"data must have images that can be read; {name} of {self.description} cannot: {reason}")


@dataclass(frozen=True)
class Format:
    """The size and the channels that every image is given, where they are not None."""

    size: int | None = None
    channels: int | None = None

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """An image (H, W, C) in this format.

        It is scaled so that its shorter side fits, then cropped at the centre; colour becomes grey by its luminance.
        """
        if self.size is None and self.channels in (None, pixels.shape[-1]):
            return pixels
        from PIL import Image, ImageOps

        image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
        if self.channels is not None:
            image = image.convert("L" if self.channels == 1 else "RGB")
        if self.size is not None:
            image = ImageOps.fit(image, (self.size, self.size), Image.Resampling.BILINEAR)
        array = np.asarray(image)
        return array[..., None] if array.ndim == 2 else array


@dataclass(frozen=True)
class EncodedSamples:
    """Samples of one or several images side by side, decoded when a worker process asks for them."""

    images: Images
    rows: Tensor
    form: Format
    size: tuple[int, int]
    """Height and width of one image."""

    def __getitem__(self, indices: Sequence[int]) -> Tensor | ValueError:
        """A batch (B, C, H, W), or what went wrong: raised here, it would reach the user as a worker's traceback."""
        rows = self.rows[indices]
        try:
            decoded = [self.form(image) for image in self.images.read(rows.flatten().tolist())]
            images = stack(decoded, self.images.description, [self.size])
        except ValueError as error:
            return error
        return side_by_side(images, torch.arange(rows.numel()).view_as(rows))


def decode(images: Images, rows: Tensor, form: Format, *, progress: bool = True) -> Tensor:
    """The images in these rows (N,), as (N, C, H, W); C is 1 if all of them are grey.

    Raises:
        ValueError: An image that cannot be read, which is named, or images that differ in size.
    """
    from tqdm.auto import tqdm

    bar = tqdm(
        images.read(rows.tolist()),
        total=len(rows),
        desc=f"decoding {images.description}",
        unit="image",
        disable=None if progress else True,  # None: where there is no terminal
        delay=0.5,
    )
    decoded: np.ndarray | None = None
    for place, image in enumerate(form(image) for image in bar):
        height, width, channels = image.shape
        if decoded is None:  # one array from the start, so that memory holds the images once
            decoded = np.empty((len(rows), channels, height, width), dtype=image.dtype)
        one_size({decoded.shape[2:], (height, width)}, images.description)
        if channels > decoded.shape[1]:
            decoded = np.repeat(decoded, channels, axis=1)
        decoded[place] = image.transpose(2, 0, 1)
    if decoded is None:
        raise ValueError(f"data must have at least one image in {images.description}")
    return torch.from_numpy(decoded)


def side_by_side(images: Tensor, places: Tensor) -> Tensor:
    """For each row of places (N, k) the images (., C, H, W) there, from left to right: (N, C, H, k·W)."""
    return images[places].permute(0, 2, 3, 1, 4).flatten(3)


def stack(images: Sequence[np.ndarray], description: str, sizes: Collection[tuple[int, int]] = ()) -> Tensor:
    """Images (H, W, C) of one size, which is that in ``sizes``, as one tensor (N, C, H, W), in colour if one is."""
    height, width = one_size({*sizes, *(image.shape[:2] for image in images)}, description)
    stacked = np.empty((len(images), max(image.shape[2] for image in images), height, width), dtype=images[0].dtype)
    for place, image in zip(stacked, images, strict=True):
        place[:] = image.transpose(2, 0, 1)
    return torch.from_numpy(stacked)


def one_size(sizes: Collection[tuple[int, ...]], description: str) -> tuple[int, ...]:
    """The height and width, or a ValueError where there are several."""
    if len(sizes) > 1:
        smallest, *_, largest = (f"{height}x{width}" for height, width in sorted(sizes))
        raise ValueError(
            f"image_size must be given, because the images of {description} differ in size: {smallest} and {largest}"
        )
    return next(iter(sizes))


def _stored(encoded: dict[str, Any] | None) -> bool:
    """Return whether the table holds the bytes of an image, and not the path of a file alone."""
    return bool(encoded and encoded.get("bytes"))


def _check_regular(path: Path) -> None:
    if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe or a device may never end
        raise ValueError("it is not a regular file")


def _decode(file: BinaryIO) -> np.ndarray:
    """One image (H, W, C) of bytes, C = 1 for a grey one and 3 for any other.

    It is turned as its EXIF orientation says, and what is transparent is laid on white.
    """
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        # A smaller decompression bomb is only warned of: refused as well, before its pixels are decoded.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"pixels must have 8 bits, got Pillow's mode {image.mode}")
            transparent = image.has_transparency_data
            grey = image.mode in ("1", "L", "LA", "La")
            mode = "L" if grey else "RGB"
            ImageOps.exif_transpose(image, in_place=True)
            if transparent:
                over = image.convert("RGBA")
                pixels = np.asarray(Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert(mode))
            else:
                pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels[..., None] if grey else pixels
