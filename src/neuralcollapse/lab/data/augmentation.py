"""Images changed at random, in batches on the training device."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from neuralcollapse.lab.config import BatchSettings


def batch_shape(image_shape: tuple[int, int, int], settings: BatchSettings) -> tuple[int, int, int]:
    """Channels, height and width of the images in a batch, once they are cropped.

    Raises:
        ValueError: ``crop_size`` is more than the padded image has.
    """
    channels, height, width = image_shape
    if settings.crop_size is None:
        return image_shape
    most = min(height, width) + 2 * (settings.crop_padding or 0)
    if settings.crop_size > most:
        padded = f" padded by {settings.crop_padding}" if settings.crop_padding else ""
        raise ValueError(
            f"crop_size must be at most {most}, for images {height}x{width}{padded}, got {settings.crop_size}"
        )
    return channels, settings.crop_size, settings.crop_size


def augment(
    images: Tensor, settings: BatchSettings, generator: torch.Generator, part: Tensor | None = None, whole: int = 0
) -> Tensor:
    """Crop, mirror and rotate a batch at random; what enters the frame is 0.

    Args:
        images: (N, C, H, W) of bytes.
        settings: How.
        generator: What it is drawn from, on the CPU.
        part: (N,) places of the images in a batch that is drawn for; by default they are all of it.
        whole: Size of that batch.
    """
    (number, channels, height, width), device = images.shape, images.device
    part, whole = (torch.arange(number), number) if part is None else (part, whole)
    _, *window = batch_shape((channels, height, width), settings)
    padding = settings.crop_padding or 0
    rooms = [side + 2 * padding - shown for side, shown in zip((height, width), window, strict=True)]
    if any(rooms) or tuple(window) != (height, width):
        top, left = (torch.randint(room + 1, (whole,), generator=generator)[part] for room in rooms)
        images = crop(images, padding, top.to(device), left.to(device), (window[0], window[1]))
    if settings.flip:
        mirrored = torch.rand(whole, generator=generator)[part] < 0.5
        chosen = torch.arange(number) + number * mirrored
        images = torch.cat([images, images.flip(-1)]).index_select(0, chosen.to(device))
    if settings.rotation:
        degrees = settings.rotation * (2 * torch.rand(whole, generator=generator)[part] - 1)
        images = rotate(images, degrees.to(device))
    return images


def crop(images: Tensor, padding: int, top: Tensor, left: Tensor, size: tuple[int, int]) -> Tensor:
    """Windows of this height and width out of the padded images, with the (N,) offsets of each from the top left."""
    (number, channels, *_), (height, width) = images.shape, size
    padded = functional.pad(images, (padding,) * 4)
    place = partial(torch.arange, device=images.device)
    # A window's rows are contiguous stretches of the padded images' memory: whole stretches are copied much faster
    # than pixels are gathered one by one.
    row = padded.shape[2] * (channels * place(number)[:, None] + place(channels))[:, :, None]
    row = row + top[:, None, None] + place(height)
    start = padded.shape[3] * row + left[:, None, None]
    return padded.flatten().unfold(0, width, 1).index_select(0, start.flatten()).view(number, channels, height, width)


def centre_crop(images: Tensor, size: int) -> Tensor:
    """The square in the middle, padded by 0 where the images are smaller; off by half a pixel, it lies up and left."""
    height, width = images.shape[2:]
    above, before = (height - size) // 2, (width - size) // 2
    return functional.pad(images, (-before, size - width + before, -above, size - height + above))


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Each image turned counter-clockwise about its centre by its own angle (N,), by bilinear interpolation."""
    number, _, height, width = images.shape
    cosine, sine = torch.deg2rad(degrees).cos(), torch.deg2rad(degrees).sin()
    zero = torch.zeros_like(cosine)
    # Where each output pixel comes from; the grid's unit is half a side, hence the ratio of the sides.
    row_x = torch.stack([cosine, -sine * height / width, zero], 1)
    row_y = torch.stack([sine * width / height, cosine, zero], 1)
    grid = functional.affine_grid(torch.stack([row_x, row_y], 1), [number, 1, height, width], align_corners=False)
    return functional.grid_sample(images.float(), grid, align_corners=False)
