"""Images: stored images, which are decoded one by one, and splits of a data set in memory or streamed."""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

# Number of rows that are read from a table at a time: reading single rows takes ten times as long.
_ROWS = 256
# Number of bytes at the end of a file from which its fingerprint is computed.
_TAIL = 4096
# Maximum number of streamed images from which a fingerprint is computed.
_FINGERPRINT_SAMPLES = 1000


@dataclass(frozen=True)
class ArrayImages:
    """Images that are stored as arrays (H, W, C)."""

    arrays: Sequence[np.ndarray]
    description: str

    def read(self, rows: Sequence[int]) -> Iterator[np.ndarray]:
        return (self.arrays[row] for row in rows)

    def name(self, row: int) -> str:
        return f"image {row} of {self.description}"

    def fingerprints(self, rows: Sequence[int]) -> Iterator[bytes]:
        return (hashlib.blake2b(self.content(row)).digest() for row in rows)

    def content(self, row: int) -> bytes:
        return self.arrays[row].tobytes()


class EncodedImages:
    """Images in a column of Hugging Face data sets, as bytes or as paths of files. Can be pickled.

    Args:
        parts: The data sets, whose rows are counted consecutively.
        column: The column of images.
        description: The description in messages.
        folder: The folder that paths are relative to, and that files must be in.
        roots: Further folders that files may be in.
    """

    def __init__(
        self, parts: Sequence[Any], column: str, description: str, folder: str = "", roots: tuple[str, ...] = ()
    ) -> None:
        import datasets

        self.folder = os.path.abspath(folder)
        self.roots = {path for root in (folder, *roots) for path in (os.path.abspath(root), os.path.realpath(root))}
        image = datasets.Image(decode=False)
        columns = [rows.select_columns([column]).cast_column(column, image) for rows in parts]
        self.rows = datasets.concatenate_datasets(columns) if len(columns) > 1 else columns[0]
        self.column = column
        self.description = description

    def read(self, rows: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield the images in these rows, (H, W, C) of bytes; C is 1 for grey images and 3 for all others.

        Raises:
            ValueError: if an image cannot be read; the message names it.
        """
        for row, encoded in self._encoded(rows):
            try:
                with self._open(encoded) as file:
                    pixels = _decode(file)
            except Exception as error:  # the decoders of Pillow fail in many ways
                raise self._unreadable(encoded, row, error) from error
            yield pixels

    def name(self, row: int) -> str:
        """Return the path of an image's file, or its row, for messages."""
        ((_, encoded),) = self._encoded([row])
        return f"row {row + 1} of {self.description}" if encoded.get("bytes") else str(encoded.get("path"))

    def fingerprints(self, rows: Sequence[int]) -> Iterator[bytes]:
        """Yield the size and a digest of each image, equal for equal content and nearly always different otherwise.

        The digest of a file is that of its end, so that large files are not read completely.
        """
        for row, encoded in self._encoded(rows):
            try:
                with self._open(encoded) as file:
                    length = file.seek(0, os.SEEK_END)
                    file.seek(0 if encoded.get("bytes") else max(0, length - _TAIL))
                    yield length.to_bytes(8, "big") + hashlib.blake2b(file.read()).digest()
            except (OSError, ValueError) as error:
                raise self._unreadable(encoded, row, error) from error

    def content(self, row: int) -> bytes:
        """Return the stored bytes of an image."""
        ((_, encoded),) = self._encoded([row])
        with self._open(encoded) as file:
            return file.read()

    def check_files(self) -> None:
        """Check that every path is that of a regular file within the folder, before any is opened.

        Raises:
            ValueError: if one is not.
        """
        import pyarrow.compute as pc

        column = self.rows.with_format("arrow")[:][self.column]
        length = pc.binary_length(pc.struct_field(column, "bytes")).fill_null(0)
        outside = np.flatnonzero(length.to_numpy() == 0)
        paths = pc.struct_field(column, "path").take(outside).to_pylist() if len(outside) else []
        for row, path in zip(outside.tolist(), paths, strict=True):
            try:
                self._path(path)
            except (OSError, ValueError) as error:
                raise self._unreadable({"path": path}, row, error) from error

    def _encoded(self, rows: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        for start in range(0, len(rows), _ROWS):
            chunk = rows[start : start + _ROWS]
            for row, encoded in zip(chunk, self.rows[chunk][self.column], strict=True):
                yield row, encoded or {}

    def _open(self, encoded: dict[str, Any]) -> BinaryIO:
        if encoded.get("bytes"):
            return io.BytesIO(encoded["bytes"])
        return self._path(encoded.get("path")).open("rb")

    def _path(self, given: str | None) -> Path:
        if not given:
            raise ValueError("it is missing")
        path = Path(os.path.normpath(Path(self.folder, given)))
        if not any(path.is_relative_to(root) for root in self.roots):
            raise ValueError("paths must stay within the data folder")
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe or a device may never end
            raise ValueError("it is not a regular file")
        return path

    def _unreadable(self, encoded: dict[str, Any], row: int, error: Exception) -> ValueError:
        name = encoded.get("path") or f"number {row}"
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = re.sub(r" <_io\..*>", "", text.split("\n")[0]) or type(error).__name__
        return ValueError(f"data must have images that can be read; {name} of {self.description} cannot: {reason}")


Images = ArrayImages | EncodedImages


def _decode(file: BinaryIO) -> np.ndarray:
    """Return an image (H, W, C) of bytes, rotated by its EXIF orientation, with transparent pixels in white."""
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        # Pillow only warns about smaller decompression bombs; here they raise an error before their pixels are decoded.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"pixels must have 8 bits, got Pillow's mode {image.mode}")
            transparent = image.has_transparency_data
            mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
            ImageOps.exif_transpose(image, in_place=True)
            if transparent:
                over = image.convert("RGBA")
                pixels = np.asarray(Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert(mode))
            else:
                pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels[..., None] if mode == "L" else pixels


@dataclass(frozen=True)
class Format:
    """Size and channels to which every image is converted, unless they are None."""

    size: int | None = None
    channels: int | None = None

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Return an image (H, W, C) in this format.

        The image is scaled so that its shorter side fits, then cropped at the centre; colour is converted to luminance.
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


def stack(images: Iterable[np.ndarray], number: int, description: str, size: tuple[int, int] | None = None) -> Tensor:
    """Return images (H, W, C) as one tensor (N, C, H, W), in colour if one of them is.

    Args:
        images: The images, which are consumed one by one, so that each is in memory only once.
        number: Number of images N.
        description: Description for messages.
        size: Height and width; by default those of the first image.

    Raises:
        ValueError: if there are no images, or they differ in size.
    """
    stacked: np.ndarray | None = None
    for position, image in enumerate(images):
        height, width, channels = image.shape
        if stacked is None:
            stacked = np.empty((number, channels, *(size or (height, width))), dtype=image.dtype)
        if stacked.shape[2:] != (height, width):
            one_size([stacked.shape[2:], (height, width)], description)
        if channels > stacked.shape[1]:
            stacked = np.repeat(stacked, channels, axis=1)
        stacked[position] = image.transpose(2, 0, 1)
    if stacked is None:
        raise ValueError(f"data must have at least one image in {description}")
    return torch.from_numpy(stacked)


def one_size(sizes: Iterable[tuple[int, ...]], description: str) -> tuple[int, ...]:
    """Return the height and width if all are equal.

    Raises:
        ValueError: if they are not.
    """
    smallest, *larger = sorted(set(sizes))
    if larger:
        first, last = (f"{height}x{width}" for height, width in (smallest, larger[-1]))
        raise ValueError(
            f"image_size must be given, because the images of {description} differ in size: {first} and {last}"
        )
    return smallest


def side_by_side(images: Tensor, places: Tensor) -> Tensor:
    """Return the images (., C, H, W) with the indices in each row of (N, k), side by side: (N, C, H, k·W)."""
    return images[places].permute(0, 2, 3, 1, 4).flatten(3)


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W) of bytes and labels (N,), on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of the images."""
        return {"images": _sha256(self.images)}

    def to(self, device: torch.device) -> Split:
        """Return the same split on another device."""
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, indices: Tensor) -> Split:
        """Return the samples at these indices, in that order."""
        indices = indices.to(self.labels.device)
        return Split(self.images.index_select(0, indices), self.labels.index_select(0, indices))

    def batches(self, index_batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images of bytes and labels at these indices, batch by batch."""
        for chosen in [indices.to(self.labels.device) for indices in index_batches]:
            yield self.images.index_select(0, chosen), self.labels.index_select(0, chosen)


@dataclass(frozen=True)
class EncodedSamples:
    """Samples of one or several images side by side, decoded when a worker process asks for them."""

    images: Images
    rows: Tensor
    form: Format
    size: tuple[int, int]
    """Height and width of one image."""

    def __getitem__(self, indices: Sequence[int]) -> Tensor | ValueError:
        """Return a batch (B, C, H, W), or an error, which would appear as a traceback of a worker if raised here."""
        rows = self.rows[indices]
        decoded = (self.form(image) for image in self.images.read(rows.flatten().tolist()))
        try:
            images = stack(decoded, rows.numel(), self.images.description, self.size)
        except ValueError as error:
            return error
        return side_by_side(images, torch.arange(rows.numel()).view_as(rows))


@dataclass(frozen=True)
class StreamedSplit:
    """Encoded images, which worker processes decode batch by batch, and labels (N,), on the training device."""

    samples: EncodedSamples
    labels: Tensor
    image_shape: tuple[int, int, int]
    """Channels, height and width."""
    workers: int
    """Number of worker processes; with 0, the main process decodes."""

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of at most 1,000 images, evenly spaced."""
        number = min(len(self), _FINGERPRINT_SAMPLES)
        images = self.samples[torch.linspace(0, len(self) - 1, number).long().tolist()]
        if isinstance(images, ValueError):
            raise images
        return {f"{number}_images": _sha256(images)}

    def to(self, device: torch.device) -> StreamedSplit:
        """Return the same split with batches on another device."""
        return replace(self, labels=self.labels.to(device))

    def take(self, indices: Tensor) -> StreamedSplit:
        """Return the samples at these indices, in that order."""
        samples = replace(self.samples, rows=self.samples.rows[indices.to(self.samples.rows.device)])
        return replace(self, samples=samples, labels=self.labels[indices.to(self.labels.device)])

    def batches(self, index_batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images of bytes and labels at these indices, batch by batch, each worker two batches ahead.

        Raises:
            ValueError: if an image cannot be read, or has another size.
        """
        from torch.utils.data import DataLoader

        device, index_batches = self.labels.device, list(index_batches)
        loader: DataLoader[Tensor | ValueError] = DataLoader(
            self.samples,  # type: ignore[arg-type]  # is indexed by the samples of a batch
            batch_size=None,
            sampler=[indices.tolist() for indices in index_batches],
            num_workers=self.workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # the workers' seeds, which are not used, else come from the global generator
        )
        for indices, images in zip(index_batches, loader, strict=True):
            if isinstance(images, ValueError):
                raise images
            yield images.to(device, non_blocking=True), self.labels[indices.to(device)]


AnySplit = Split | StreamedSplit


@dataclass(frozen=True)
class ImageData:
    """Data set with a train and a test split, and a validation split if one is held out of the train split."""

    name: str
    train: AnySplit
    test: AnySplit
    num_classes: int
    relabelled: bool = False
    """True if all or some labels of the train split are random."""
    validation: AnySplit | None = None
    held_out: AnySplit | None = None
    """Test images of the classes that are held out, with their labels among all classes of the data; not one of the
    splits."""
    class_names: tuple[str, ...] | None = None
    revision: str | None = None
    """Commit of a data set on the hub."""
    notes: tuple[str, ...] = ()
    """One line for each kind of thing that was left out or decided in reading the data."""

    @property
    def splits(self) -> dict[str, AnySplit]:
        """All splits by name."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in splits.items() if split is not None}

    @property
    def _parts(self) -> dict[str, AnySplit]:
        """All splits, and the images of classes that are held out."""
        return self.splits | ({} if self.held_out is None else {"held_out": self.held_out})

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.train.image_shape

    def to(self, device: torch.device) -> ImageData:
        """Return the same data on another device."""
        return replace(self, **{name: split.to(device) for name, split in self._parts.items()})  # type: ignore[arg-type]

    @property
    def absent_classes(self) -> list[str]:
        """The names, or numbers, of the classes without training images."""
        names = self.class_names or tuple(map(str, range(self.num_classes)))
        counts = self.train.labels.bincount(minlength=self.num_classes)
        return [names[label] for label in (counts == 0).nonzero().flatten().tolist()]

    def fingerprint(self) -> dict[str, dict[str, str]]:
        """Return SHA-256 of the labels and of the decoded images of each split; of many streamed images, of a part.

        ``"held_out"`` are the images of classes that are held out.
        """
        return {name: {"labels": _sha256(split.labels)} | split.fingerprint for name, split in self._parts.items()}

    def with_train_labels(self, labels: Tensor) -> ImageData:
        """Return the same data with these labels (N,) of the training images, such as those stored by a run.

        Raises:
            ValueError: unless there is one label per training image, and each label is a class.
        """
        if labels.shape != (len(self.train),) or labels.is_floating_point():
            raise ValueError(
                f"labels must be {len(self.train)} integers, one for each training image of {self.name!r}, "
                f"got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        low, high = (int(bound) for bound in torch.aminmax(labels))
        if low < 0 or high >= self.num_classes:
            raise ValueError(f"labels must be in [0, {self.num_classes}), got {low} to {high}")
        return replace(self, train=replace(self.train, labels=labels.long().to(self.train.labels.device)))

    def __str__(self) -> str:
        shape, name = "×".join(map(str, self.image_shape)), Path(self.name).name
        absent = self.absent_classes
        kind = "classes" + (f", {len(absent)} of them without training images" if absent else "")
        kind += ", redrawn train labels" if self.relabelled else ""
        *parts, last = (f"{len(split)} {name}" for name, split in self.splits.items())
        return f"{name}: {', '.join(parts)} and {last} images {shape}, {self.num_classes} {kind}"


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.cpu().contiguous().numpy().data).hexdigest()
