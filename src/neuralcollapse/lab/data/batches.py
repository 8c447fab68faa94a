"""Standardised batches on the training device: augmented batches of an epoch, and unchanged batches to measure on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from neuralcollapse.lab.config import BatchSettings, derived_seed
from neuralcollapse.lab.data.images import AnySplit, ImageData, StreamedSplit
from neuralcollapse.lab.data.selection import stratified_order, subset

# Maximum number of images from which the statistics of streamed data are estimated.
_STATISTICS_SAMPLES = 10_000
# Constant that, combined with the seed of a run, gives the seed of the images that are mirrored in the first epoch.
_ALTERNATING = 3
# Maximum number of images per batch, and of their bytes, if the batch size is not a setting.
_BATCH_SIZE, _BATCH_BYTES = 512, 2**25


@dataclass(frozen=True)
class EpochBatches:
    """Batches of a training epoch, which depend only on the data, the settings, the seed and the epoch.

    Every sample is in one batch. The last batch may be smaller; a single remaining sample, which has no variance for
    batch norm, is added to the preceding batch. With stratified ``sampling``, the sizes of batches differ by at most
    one.

    With a number of classes per batch, all batches have the same size and the same number of samples of each of their
    classes. Within an epoch, a sample of a small class may occur several times, and a sample of a large class not at
    all.

    With several ranks, each rank receives a part of every batch, with at least two samples. The batches are those of a
    single rank, except that a last batch with fewer than two samples per rank is added to the preceding batch.

    On a mid-epoch resume, the ``done`` completed batches are skipped; the others are unchanged.
    """

    split: AnySplit
    standardise: Standardisation
    settings: BatchSettings
    seed: int
    epoch: int
    done: int = 0
    rank: int = 0
    ranks: int = 1

    def __len__(self) -> int:
        full, rest = divmod(len(self.split), self.settings.batch_size)
        return max(1, full + (rest >= 2 * self.ranks and self.settings.sampling == "random"))

    @property
    def sizes(self) -> list[int]:
        """Number of samples of each batch, including completed batches."""
        if self.settings.classes_per_batch is not None:
            return [self.settings.batch_size] * len(self)
        return [len(batch) for batch in self._divide(torch.arange(len(self.split)))]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # Drawn on the CPU, so that the batches are equal on all devices; drawn for skipped batches as well.
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
        batches = self._divide(self._order(generator))
        shape = self.split.image_shape
        drawn = [draw_augmentation(len(batch), shape, self.settings, generator) for batch in batches]
        if self.settings.augment.flip == "alternating":
            mirrored = self._mirrored()
            drawn = [values | {"mirrored": mirrored[batch]} for values, batch in zip(drawn, batches, strict=True)]
        parts = [batch.tensor_split(self.ranks)[self.rank] for batch in batches[self.done :]]
        # On the device before the first batch: a copy to it would wait for all that it has yet to compute.
        device = self.split.labels.device
        values_of_parts = [
            {name: value.tensor_split(self.ranks)[self.rank].to(device) for name, value in values.items()}
            for values in drawn[self.done :]
        ]
        for values, (images, labels) in zip(values_of_parts, self.split.batches(parts), strict=True):
            images = self.standardise(augment(images, self.settings, values))
            yield cut_out(images, self.settings, values), labels

    def _mirrored(self) -> Tensor:
        """Return which samples are mirrored: a random half in the first epoch, the other half in the next, etc."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, 0, _ALTERNATING))
        return (torch.rand(len(self.split), generator=generator) < 0.5) ^ bool(self.epoch % 2)

    def _order(self, generator: torch.Generator) -> Tensor:
        labels, settings = self.split.labels.cpu(), self.settings
        if settings.classes_per_batch is not None:
            per_class = settings.batch_size // settings.classes_per_batch
            return balanced_order(labels, len(self), settings.classes_per_batch, per_class, generator)
        if settings.sampling == "stratified":
            return stratified_order(labels, generator)
        return torch.randperm(len(labels), generator=generator)

    def _divide(self, order: Tensor) -> tuple[Tensor, ...]:
        if self.settings.sampling == "stratified":
            return order.tensor_split(len(self))
        return order.tensor_split([self.settings.batch_size * number for number in range(1, len(self))])


@dataclass(frozen=True)
class EvaluationBatches:
    """All samples of a split in order, standardised; with ``crop_size``, cropped at the centre to a square."""

    split: AnySplit
    standardise: Standardisation
    batch_size: int = _BATCH_SIZE
    crop_size: int | None = None

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.split.batches(torch.arange(len(self.split)).split(self.batch_size)):
            yield self.standardise(images if self.crop_size is None else centre_crop(images, self.crop_size)), labels


def evaluation_batches(data: ImageData, settings: BatchSettings) -> dict[str, EvaluationBatches]:
    """Return the batches to measure each split on: not augmented, with one standardisation for all splits.

    Raises:
        ValueError: if settings do not fit the images.
    """
    batch_shape(data.image_shape, settings)
    standardise, batch_size = standardisation(data, settings), _default_batch_size(data.image_shape)
    return {
        name: EvaluationBatches(split, standardise, batch_size, settings.crop_size)
        for name, split in data.splits.items()
    }


def some_images(batches: EvaluationBatches, limit: int) -> Iterator[Tensor]:
    """Yield batches of at most ``limit`` standardised images of a split in total, with the classes in proportion."""
    indices = subset(batches.split.labels.cpu(), limit).split(batches.batch_size)
    return (batches.standardise(images) for images, _ in batches.split.batches(indices))


def _default_batch_size(image_shape: tuple[int, int, int]) -> int:
    return max(1, min(_BATCH_SIZE, _BATCH_BYTES // math.prod(image_shape)))


def balanced_order(
    labels: Tensor, batches: int, classes_per_batch: int, per_class: int, generator: torch.Generator
) -> Tensor:
    """Return indices for the given number of batches, in order, each with equally many samples of some classes.

    Classes are drawn in rounds of all classes, and samples of a class in rounds of all its samples. Thus the classes of
    a batch are distinct, and so are its samples if the classes are large enough.
    """
    classes = labels.unique().tolist()
    samples = {label: _Rounds((labels == label).nonzero().flatten().tolist(), generator) for label in classes}
    rounds, order = _Rounds(classes, generator), []
    for _ in range(batches):
        batch = [index for label in rounds.take(classes_per_batch) for index in samples[label].take(per_class)]
        order += [batch[position] for position in torch.randperm(len(batch), generator=generator).tolist()]
    return torch.tensor(order)


class _Rounds:
    """Items in random order, round after round."""

    def __init__(self, items: list[int], generator: torch.Generator) -> None:
        self._items, self._generator = items, generator
        self._remaining: list[int] = []

    def take(self, number: int) -> list[int]:
        """Return the next items; their numbers of occurrences differ by at most one."""
        rounds, rest = divmod(number, len(self._items))
        taken, self._remaining = self._remaining[:rest], self._remaining[rest:]
        if missing := rest - len(taken):
            order = torch.randperm(len(self._items), generator=self._generator).tolist()
            shuffled = [self._items[position] for position in order]
            fresh = _without(shuffled, taken)[:missing]
            self._remaining = _without(shuffled, fresh)
            taken += fresh
        return self._items * rounds + taken


def _without(items: list[int], excluded: list[int]) -> list[int]:
    excluded_set = set(excluded)
    return [item for item in items if item not in excluded_set]


@dataclass(frozen=True)
class Standardisation:
    """(x − mean)/std of each channel, with mean and std of shape (C, 1, 1) in units of bytes."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, batches: Iterable[Tensor]) -> Standardisation:
        """Return the standardisation by all pixels of batches (N, C, H, W); constant channels are only centred."""
        pixels, sums = 0, torch.zeros(2, 1, dtype=torch.int64)
        for images in batches:  # bytes are summed as integers, so that the sums are exact on every device
            pixels += images.numel() // images.shape[1]
            channels = images.transpose(0, 1).flatten(1)
            channels = channels.double() if images.is_floating_point() else channels.int()
            sums = sums + torch.stack([channels.sum(1), channels.square().sum(1)]).cpu()
        variances = [(pixels * squares - total**2) / pixels**2 for total, squares in sums.T.tolist()]
        return cls(
            torch.tensor([total / pixels for total in sums[0].tolist()])[:, None, None],
            torch.tensor([math.sqrt(variance) if variance > 0 else 1.0 for variance in variances])[:, None, None],
        )

    def to(self, device: torch.device) -> Standardisation:
        """Return the same standardisation on another device."""
        return Standardisation(self.mean.to(device), self.std.to(device))

    def __call__(self, images: Tensor) -> Tensor:
        """Return standardised images, from bytes or floating-point values of the same range."""
        return (images.float() - self.mean) / self.std


def standardisation(data: ImageData, settings: BatchSettings) -> Standardisation:
    """Return the standardisation by ``pixel_mean`` and ``pixel_std``, by default those of the training images.

    Those of streamed data are estimated from at most 10,000 images, with the classes in proportion.

    Raises:
        ValueError: if a setting does not fit the channels, or a standard deviation is not positive.
    """
    channels, device = data.image_shape[0], data.train.labels.device
    mean = _per_channel("pixel_mean", settings.pixel_mean, channels)
    std = _per_channel("pixel_std", settings.pixel_std, channels)
    if std is not None and not bool((std > 0).all()):
        raise ValueError(f"pixel_std must be above 0, got {settings.pixel_std}")
    if mean is None or std is None:
        limit = _STATISTICS_SAMPLES if isinstance(data.train, StreamedSplit) else None
        indices = subset(data.train.labels.cpu(), limit).split(_default_batch_size(data.image_shape))
        of_images = Standardisation.of(images for images, _ in data.train.batches(indices))
        mean, std = of_images.mean if mean is None else mean, of_images.std if std is None else std
    return Standardisation(mean, std).to(device)


def _per_channel(setting: str, values: list[float] | None, channels: int) -> Tensor | None:
    """Return pixel values in [0, 1], a single value or one per channel, as (C, 1, 1) in units of bytes."""
    if values is None:
        return None
    if len(values) not in (1, channels):
        several = f" or {channels}, one per channel" if channels > 1 else ""
        raise ValueError(f"{setting} must be one value{several}, got {len(values)}")
    return 255 * torch.tensor(values, dtype=torch.float32).expand(channels)[:, None, None]


def batch_shape(image_shape: tuple[int, int, int], settings: BatchSettings) -> tuple[int, int, int]:
    """Return channels, height and width of the images in a batch, after cropping.

    Raises:
        ValueError: if ``crop_size`` exceeds the padded images, or ``augmentation`` does not fit the images.
    """
    channels, height, width = image_shape
    augmentation = settings.augment
    if augmentation.padding == "reflect" and augmentation.crop_padding >= min(height, width):
        raise ValueError(
            f"augmentation.crop_padding must be less than {min(height, width)} to reflect images of {height}x{width}, "
            f"got {augmentation.crop_padding}"
        )
    smallest = min(height, width, settings.crop_size or height)
    if augmentation.cutout is not None and augmentation.cutout > smallest:
        raise ValueError(
            f"augmentation.cutout must be at most {smallest} for images of {height}x{width}, got {augmentation.cutout}"
        )
    if settings.crop_size is None:
        return image_shape
    largest = min(height, width) + 2 * settings.augment.crop_padding
    if settings.crop_size > largest:
        padded = f" padded by {settings.augment.crop_padding}" if settings.augment.crop_padding else ""
        raise ValueError(
            f"crop_size must be at most {largest}, for images {height}x{width}{padded}, got {settings.crop_size}"
        )
    return channels, settings.crop_size, settings.crop_size


def draw_augmentation(
    number: int, image_shape: tuple[int, int, int], settings: BatchSettings, generator: torch.Generator
) -> dict[str, Tensor]:
    """Draw the augmentation of the given number of images: values (N,) by name, for the enabled settings.

    ``top`` and ``left`` are the offsets of the crop in the padded image, ``degrees`` the angle of the rotation, and
    ``cut_top`` and ``cut_left`` the offsets of the square that is cut out. Flips in turns are not drawn here.
    """
    _, *sides = image_shape
    _, *window = batch_shape(image_shape, settings)
    ranges = [side + 2 * settings.augment.crop_padding - length for side, length in zip(sides, window, strict=True)]
    drawn = {}
    if any(ranges) or window != sides:
        for name, largest in zip(("top", "left"), ranges, strict=True):
            drawn[name] = torch.randint(largest + 1, (number,), generator=generator)
    if settings.augment.flip is True:
        drawn["mirrored"] = torch.rand(number, generator=generator) < 0.5
    if settings.augment.rotation:
        drawn["degrees"] = settings.augment.rotation * (2 * torch.rand(number, generator=generator) - 1)
    if settings.augment.cutout is not None:
        for name, length in zip(("cut_top", "cut_left"), window, strict=True):
            drawn[name] = torch.randint(length - settings.augment.cutout + 1, (number,), generator=generator)
    return drawn


def augment(images: Tensor, settings: BatchSettings, drawn: Mapping[str, Tensor]) -> Tensor:
    """Crop, mirror and rotate images (N, C, H, W) of bytes as drawn by `draw_augmentation`.

    New pixels are 0; if ``padding`` is ``"reflect"``, pixels around the image are its pixels mirrored at the border.
    """
    number, *shape = images.shape
    if "top" in drawn:
        _, height, width = batch_shape((shape[0], shape[1], shape[2]), settings)
        top, left = (drawn[name].to(images.device) for name in ("top", "left"))
        padding = settings.augment.crop_padding
        if settings.augment.padding == "reflect":
            images, padding = reflected(images, padding), 0
        images = crop(images, padding, top, left, (height, width))
    if "mirrored" in drawn:
        mirrored = drawn["mirrored"].to(images.device)
        chosen = torch.arange(number, device=images.device) + number * mirrored
        images = torch.cat([images, images.flip(-1)]).index_select(0, chosen)
    if "degrees" in drawn:
        images = rotate(images, drawn["degrees"].to(images.device))
    return images


def crop(images: Tensor, padding: int, top: Tensor, left: Tensor, size: tuple[int, int]) -> Tensor:
    """Return windows of this height and width from the padded images, at offsets (N,) from the top left corner."""
    (number, channels, *_), (height, width) = images.shape, size
    padded = functional.pad(images, (padding,) * 4)
    arange = partial(torch.arange, device=images.device)
    # The rows of a window are contiguous in the memory of the padded images: copying rows is much faster than gathering
    # single pixels.
    row = padded.shape[2] * (channels * arange(number)[:, None] + arange(channels))[:, :, None]
    row = row + top[:, None, None] + arange(height)
    start = padded.shape[3] * row + left[:, None, None]
    return padded.flatten().unfold(0, width, 1).index_select(0, start.flatten()).view(number, channels, height, width)


def reflected(images: Tensor, padding: int) -> Tensor:
    """Return images padded on every side by their pixels mirrored at the border pixel, which is not repeated."""
    for dimension in (2, 3):
        last = images.shape[dimension] - 1
        position = torch.arange(-padding, last + padding + 1, device=images.device).abs()
        images = images.index_select(dimension, last - (last - position).abs())
    return images


def cut_out(images: Tensor, settings: BatchSettings, drawn: Mapping[str, Tensor]) -> Tensor:
    """Set a square of each standardised image (N, C, H, W) to 0, which is the mean, as drawn by `draw_augmentation`."""
    if "cut_top" not in drawn:
        return images
    rows, columns = (
        torch.arange(length, device=images.device) - drawn[name].to(images.device)[:, None]
        for name, length in zip(("cut_top", "cut_left"), images.shape[2:], strict=True)
    )
    size = settings.augment.cutout or 0
    rows, columns = (rows >= 0) & (rows < size), (columns >= 0) & (columns < size)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)


def centre_crop(images: Tensor, size: int) -> Tensor:
    """Return the central square, rounded to the top left by half a pixel, padded by 0 if images are smaller."""
    height, width = images.shape[2:]
    above, before = (height - size) // 2, (width - size) // 2
    return functional.pad(images, (-before, size - width + before, -above, size - height + above))


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Rotate each image counter-clockwise about its centre by its angle (N,), with bilinear interpolation."""
    number, _, height, width = images.shape
    cosine, sine = torch.deg2rad(degrees).cos(), torch.deg2rad(degrees).sin()
    zero = torch.zeros_like(cosine)
    # The source of each output pixel; the grid's unit is half a side, hence the ratio of the sides.
    row_x = torch.stack([cosine, -sine * height / width, zero], 1)
    row_y = torch.stack([sine * width / height, cosine, zero], 1)
    grid = functional.affine_grid(torch.stack([row_x, row_y], 1), [number, 1, height, width], align_corners=False)
    return functional.grid_sample(images.float(), grid, align_corners=False)
