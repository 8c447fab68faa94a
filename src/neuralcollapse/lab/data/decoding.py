"""From encoded images to tensors of bytes: all of them at once, or the samples of a batch when they are needed."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

# Rows that are read from a table at a time: a row by itself takes ten times as long.
_ROWS = 256


class Images(Protocol):
    """A table of images. Can be pickled."""

    @property
    def description(self) -> str:
        """What they are of, for messages."""
        ...

    def read(self, rows: Sequence[int]) -> Iterator[np.ndarray]:
        """The images in these rows, (H, W, C) of bytes; C is 1 for a grey one and 3 for any other."""
        ...


@dataclass(frozen=True)
class ArrayImages:
    """Images that are arrays already."""

    arrays: Sequence[np.ndarray]
    description: str

    def read(self, rows: Sequence[int]) -> Iterator[np.ndarray]:
        """The images in these rows."""
        return (self.arrays[row] for row in rows)


class EncodedImages:
    """The images of a column of a Hugging Face data set; paths in it are relative to the folder."""

    def __init__(self, rows: Any, column: str, description: str, folder: str = "") -> None:
        import datasets

        self.folder = folder
        self.rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self.column = column
        self.description = description

    def read(self, rows: Sequence[int]) -> Iterator[np.ndarray]:
        """The images in these rows.

        Raises:
            ValueError: One cannot be read; it is named.
        """
        for start in range(0, len(rows), _ROWS):
            chunk = rows[start : start + _ROWS]
            for row, encoded in zip(chunk, self.rows[chunk][self.column], strict=True):
                try:
                    pixels = _decode(encoded, self.folder)
                except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises
                    name = (encoded or {}).get("path") or f"number {row}"
                    reason = str(error).split("\n")[0]
                    raise ValueError(
                        f"data must have images that can be read; {name} of {self.description} cannot: {reason}"
                    ) from error
                yield pixels


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
    """All samples, (N, C, H, W), where rows (N, k) are those of each sample's images; C is 1 if all images are grey.

    Raises:
        ValueError: An image that cannot be read, which is named, or images that differ in size.
    """
    from tqdm.auto import tqdm

    single = rows.shape[1] == 1
    needed, places = (rows.flatten(), None) if single else rows.unique(return_inverse=True)
    bar = tqdm(
        images.read(needed.tolist()),
        total=len(needed),
        desc=f"decoding {images.description}",
        unit="image",
        disable=None if progress else True,  # None: where there is no terminal
        delay=0.5,
    )
    decoded = stack([form(image) for image in bar], images.description)
    return decoded if places is None else side_by_side(decoded, places)


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


def _decode(encoded: dict[str, Any] | None, folder: str) -> np.ndarray:
    """One image (H, W, C) of bytes, C = 1 for a grey one and 3 for any other."""
    from PIL import Image, ImageOps

    if encoded is None:
        raise ValueError("it is missing")
    file = io.BytesIO(encoded["bytes"]) if encoded.get("bytes") else Path(folder, encoded["path"] or "").expanduser()
    with Image.open(file) as image:
        if image.mode[0] in "IF":
            raise ValueError(f"pixels must have 8 bits, got Pillow's mode {image.mode}")
        grey = image.mode in ("1", "L", "LA")
        mode = "L" if grey else "RGB"
        ImageOps.exif_transpose(image, in_place=True)
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels[..., None] if grey else pixels
