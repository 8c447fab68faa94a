"""Batches on the training device: order, augmentation, standardisation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from neuralcollapse.lab.config import Batches
from neuralcollapse.lab.data.selection import stratified_order, subset
from neuralcollapse.lab.data.splits import AnySplit, ImageData, StreamedSplit
from neuralcollapse.lab.seeds import derived_seed

# Images that the statistics of streamed data are taken from, at most.
_STATISTICS_SAMPLES = 10_000
# Images, and bytes of them, in a batch that nothing asks to be of a certain size.
_BATCH_SIZE, _BATCH_BYTES = 512, 2**25


@dataclass(frozen=True)
class Standardisation:
    """(x − mean)/std of each channel; (C, 1, 1) each."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, batches: Iterable[Tensor]) -> Standardisation:
        """By all pixels of batches (N, C, H, W) of bytes; a channel that never varies is centred only."""
        pixels, sums = 0, torch.zeros(2, 1, dtype=torch.int64)
        for images in batches:  # in whole numbers, so that the sums are exact on every device
            pixels += images.numel() // images.shape[1]
            channels = images.transpose(0, 1).flatten(1).int()
            sums = sums + torch.stack([channels.sum(1), channels.square().sum(1)]).cpu()
        variances = [(pixels * squares - total**2) / pixels**2 for total, squares in sums.T.tolist()]
        return cls(
            torch.tensor([total / pixels for total in sums[0].tolist()])[:, None, None],
            torch.tensor([math.sqrt(variance) if variance > 0 else 1.0 for variance in variances])[:, None, None],
        )

    def to(self, device: torch.device) -> Standardisation:
        """The same on another device."""
        return Standardisation(self.mean.to(device), self.std.to(device))

    def __call__(self, images: Tensor) -> Tensor:
        """Images of bytes, or of the same range in floating point, standardised."""
        return (images.float() - self.mean) / self.std


def standardisation(data: ImageData, settings: Batches) -> Standardisation:
    """By the mean and the standard deviation that are set; by the training images' own where they are not.

    Those of streamed data are estimated from 10,000 images at most, every class in proportion.

    Raises:
        ValueError: What is set does not fit the channels, or cannot be divided by.
    """
    channels, device = data.image_shape[0], data.train.labels.device
    mean = _by_channel("pixel_mean", settings.pixel_mean, channels)
    std = _by_channel("pixel_std", settings.pixel_std, channels)
    if std is not None and not bool((std > 0).all()):
        raise ValueError(f"pixel_std must be above 0, got {settings.pixel_std}")
    if mean is None or std is None:
        limit = _STATISTICS_SAMPLES if isinstance(data.train, StreamedSplit) else None
        indices = subset(data.train.labels.cpu(), limit)
        batches = data.train.batches(indices.split(_handy_batch_size(data.image_shape)))
        own = Standardisation.of(images for images, _ in batches)
        mean, std = own.mean if mean is None else mean, own.std if std is None else std
    return Standardisation(mean, std).to(device)


@dataclass(frozen=True)
class EpochBatches:
    """The batches of one epoch of training: a function of the data, the settings, the seed and the epoch alone.

    A last batch that is not full is left out, for batch norm's and class means' sake, unless it is the only one.
    """

    split: AnySplit
    standardise: Standardisation
    settings: Batches
    seed: int
    epoch: int

    def __len__(self) -> int:
        return max(1, len(self.split) // self.settings.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # Drawn on the CPU, so that every device sees the same batches.
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
        labels = self.split.labels.cpu()
        stratified = self.settings.stratified
        order = stratified_order(labels, generator) if stratified else torch.randperm(len(labels), generator=generator)
        for images, targets in self.split.batches(order.split(self.settings.batch_size)[: len(self)]):
            yield self.standardise(augment(images, self.settings, generator)), targets


@dataclass(frozen=True)
class EvaluationBatches:
    """All samples of a split in order, as they are, or cropped at the centre to a square."""

    split: AnySplit
    standardise: Standardisation
    batch_size: int = _BATCH_SIZE
    crop_size: int | None = None

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.split.batches(torch.arange(len(self.split)).split(self.batch_size)):
            yield self.standardise(images if self.crop_size is None else centre_crop(images, self.crop_size)), labels


def evaluation_batches(data: ImageData, settings: Batches) -> dict[str, EvaluationBatches]:
    """The train and the test split, un-augmented, standardised alike.

    Raises:
        ValueError: Settings that do not fit the images.
    """
    batch_shape(data.image_shape, settings)
    standardise, batch_size = standardisation(data, settings), _handy_batch_size(data.image_shape)
    return {
        name: EvaluationBatches(split, standardise, batch_size, settings.crop_size)
        for name, split in (("train", data.train), ("test", data.test))
    }


def batch_shape(image_shape: tuple[int, int, int], settings: Batches) -> tuple[int, int, int]:
    """Channels, height and width of the images in a batch, once they are cropped.

    Raises:
        ValueError: ``crop_size`` is more than the padded image has.
    """
    channels, height, width = image_shape
    if settings.crop_size is None:
        return image_shape
    most = min(height, width) + 2 * settings.crop_padding
    if settings.crop_size > most:
        padded = f" padded by {settings.crop_padding}" if settings.crop_padding else ""
        raise ValueError(
            f"crop_size must be at most {most}, for images {height}x{width}{padded}, got {settings.crop_size}"
        )
    return channels, settings.crop_size, settings.crop_size


def augment(images: Tensor, settings: Batches, generator: torch.Generator) -> Tensor:
    """Crop, mirror and rotate a batch of bytes at random; what enters the frame is 0."""
    (number, channels, height, width), device = images.shape, images.device
    _, *window = batch_shape((channels, height, width), settings)
    rooms = [side + 2 * settings.crop_padding - shown for side, shown in zip((height, width), window, strict=True)]
    if any(rooms) or tuple(window) != (height, width):
        top, left = (torch.randint(room + 1, (number,), generator=generator) for room in rooms)
        images = crop(images, settings.crop_padding, top.to(device), left.to(device), (window[0], window[1]))
    if settings.flip:
        mirrored = torch.rand(number, generator=generator) < 0.5
        chosen = torch.arange(number) + number * mirrored
        images = torch.cat([images, images.flip(-1)]).index_select(0, chosen.to(device))
    if settings.rotation:
        degrees = settings.rotation * (2 * torch.rand(number, generator=generator) - 1)
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


def _by_channel(setting: str, values: list[float] | None, channels: int) -> Tensor | None:
    """Values of pixels in [0, 1], one or one a channel, as (C, 1, 1) in units of bytes."""
    if values is None:
        return None
    if len(values) not in (1, channels):
        several = f" or {channels}, one a channel" if channels > 1 else ""
        raise ValueError(f"{setting} must be one value{several}, got {len(values)}")
    return 255 * torch.tensor(values, dtype=torch.float32).expand(channels)[:, None, None]


def _handy_batch_size(image_shape: tuple[int, int, int]) -> int:
    return max(1, min(_BATCH_SIZE, _BATCH_BYTES // math.prod(image_shape)))
