"""Pixels of bytes made floating-point numbers of mean 0 and standard deviation 1."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from neuralcollapse.lab.config import BatchSettings
from neuralcollapse.lab.data.selection import subset
from neuralcollapse.lab.data.splits import ImageData, StreamedSplit

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
        """By all pixels of batches (N, C, H, W); a channel that never varies is centred only."""
        pixels, sums = 0, torch.zeros(2, 1, dtype=torch.int64)
        for images in batches:  # of bytes in whole numbers, so that the sums are exact on every device
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
        """The same on another device."""
        return Standardisation(self.mean.to(device), self.std.to(device))

    def __call__(self, images: Tensor) -> Tensor:
        """Images of bytes, or of the same range in floating point, standardised."""
        return (images.float() - self.mean) / self.std


def standardisation(data: ImageData, settings: BatchSettings) -> Standardisation:
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
        batches = data.train.batches(indices.split(handy_batch_size(data.image_shape)))
        own = Standardisation.of(images for images, _ in batches)
        mean, std = own.mean if mean is None else mean, own.std if std is None else std
    return Standardisation(mean, std).to(device)


def handy_batch_size(image_shape: tuple[int, int, int]) -> int:
    """Images in a batch that nothing asks to be of a certain size."""
    return max(1, min(_BATCH_SIZE, _BATCH_BYTES // math.prod(image_shape)))


def _by_channel(setting: str, values: list[float] | None, channels: int) -> Tensor | None:
    """Values of pixels in [0, 1], one or one a channel, as (C, 1, 1) in units of bytes."""
    if values is None:
        return None
    if len(values) not in (1, channels):
        several = f" or {channels}, one a channel" if channels > 1 else ""
        raise ValueError(f"{setting} must be one value{several}, got {len(values)}")
    return 255 * torch.tensor(values, dtype=torch.float32).expand(channels)[:, None, None]
