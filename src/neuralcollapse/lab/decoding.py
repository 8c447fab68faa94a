"""From encoded images to one tensor of bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def decode(rows: Any, column: str, size: int | None, description: str, *, progress: bool = True) -> Tensor:
    """The images in a column of a Hugging Face data set, (N, C, H, W) of bytes; C is 1 if all of them are grey.

    Raises:
        ValueError: An image that cannot be read, which is named, or images that differ in size.
    """
    import datasets
    from tqdm.auto import tqdm

    encoded = rows.cast_column(column, datasets.Image(decode=False))[column]
    images = []
    for number, image in enumerate(tqdm(encoded, desc=f"decoding {description}", unit="image", disable=not progress)):
        try:
            pixels = _read(image)
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises
            name = image.get("path") or f"number {number}"
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"data must have images that can be read; {name} of {description} cannot: {reason}"
            ) from error
        images.append(pixels if size is None else scale(pixels, size))
    return stack(images, description)


def stack(images: Sequence[np.ndarray], description: str) -> Tensor:
    """Images (H, W, C) of one size as one tensor (N, C, H, W), all of them in colour if one is."""
    sizes = sorted({image.shape[:2] for image in images})
    if len(sizes) > 1:
        smallest, largest = (f"{height}x{width}" for height, width in (sizes[0], sizes[-1]))
        raise ValueError(
            f"image_size must be given, because the images of {description} differ in size: {smallest} and {largest}"
        )
    channels = max(image.shape[2] for image in images)
    stacked = np.stack([np.broadcast_to(image, (*image.shape[:2], channels)) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()


def scale(pixels: np.ndarray, size: int) -> np.ndarray:
    """An image (H, W, C) scaled so that its shorter side fits, then cropped at the centre."""
    from PIL import Image, ImageOps

    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)).reshape(size, size, -1)


def _read(encoded: dict[str, Any]) -> np.ndarray:
    """One image (H, W, C) of bytes, C = 1 for a grey one and 3 for any other."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(encoded["bytes"]) if encoded.get("bytes") else encoded["path"]) as image:
        if image.mode[0] in "IF":
            raise ValueError(f"pixels must have 8 bits, got Pillow's mode {image.mode}")
        grey = image.mode in ("1", "L", "LA")
        pixels = np.asarray(ImageOps.exif_transpose(image).convert("L" if grey else "RGB"))
    return pixels[..., None] if grey else pixels
