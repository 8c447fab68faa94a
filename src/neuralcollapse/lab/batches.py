"""Batches of images that are on the training device already: order, augmentation, standardisation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from neuralcollapse.lab.config import Batches
from neuralcollapse.lab.splits import ImageData, Split, stratified_order


@dataclass(frozen=True)
class Standardisation:
    """(x − mean)/std of each channel; (C, 1, 1) each."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, images: Tensor, chunk: int = 4096) -> Standardisation:
        """Of images (N, C, H, W) of bytes, a chunk at a time."""
        pixels = images.numel() / images.shape[1]
        chunks = images.split(chunk)
        mean = sum(part.double().sum((0, 2, 3)) for part in chunks) / pixels
        variance = sum((part.double() - mean[:, None, None]).square().sum((0, 2, 3)) for part in chunks) / pixels
        std = torch.where(variance > 0, variance, 1).sqrt()
        return cls(mean.float()[:, None, None], std.float()[:, None, None])

    def __call__(self, images: Tensor) -> Tensor:
        """Images of bytes, or of the same range in floating point, standardised."""
        return (images.float() - self.mean) / self.std


@dataclass(frozen=True)
class EpochBatches:
    """The batches of one epoch of training: a function of the data, the settings, the seed and the epoch alone.

    A last batch that is not full is left out, for batch norm's and class means' sake, unless it is the only one.
    """

    split: Split
    standardise: Standardisation
    settings: Batches
    seed: int
    epoch: int

    def __len__(self) -> int:
        return max(1, len(self.split) // self.settings.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # Drawn on the CPU, so that every device sees the same batches.
        (state,) = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1)
        generator = torch.Generator().manual_seed(int(state))
        labels = self.split.labels.cpu()
        stratified = self.settings.stratified
        order = stratified_order(labels, generator) if stratified else torch.randperm(len(labels), generator=generator)
        for indices in order.split(self.settings.batch_size)[: len(self)]:
            batch = self.split.take(indices.to(self.split.images.device))
            yield self.standardise(augment(batch.images, self.settings, generator)), batch.labels


@dataclass(frozen=True)
class EvaluationBatches:
    """All samples of a split in order, as they are."""

    split: Split
    standardise: Standardisation
    batch_size: int = 512

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        parts = zip(self.split.images.split(self.batch_size), self.split.labels.split(self.batch_size), strict=True)
        return ((self.standardise(images), labels) for images, labels in parts)


def evaluation_batches(data: ImageData) -> dict[str, EvaluationBatches]:
    """The train and the test split, un-augmented, standardised by the train split's statistics."""
    standardise = Standardisation.of(data.train.images)
    return {"train": EvaluationBatches(data.train, standardise), "test": EvaluationBatches(data.test, standardise)}


def augment(images: Tensor, settings: Batches, generator: torch.Generator) -> Tensor:
    """Crop, mirror and rotate a batch of bytes at random; what enters the frame is 0."""
    number, device = len(images), images.device
    if settings.crop_padding:
        offsets = torch.randint(2 * settings.crop_padding + 1, (2, number), generator=generator)
        images = crop(images, settings.crop_padding, *offsets.to(device))
    if settings.flip:
        mirrored = torch.rand(number, generator=generator) < 0.5
        images = torch.where(mirrored.to(device)[:, None, None, None], images.flip(-1), images)
    if settings.rotation:
        degrees = settings.rotation * (2 * torch.rand(number, generator=generator) - 1)
        images = rotate(images, degrees.to(device))
    return images


def crop(images: Tensor, padding: int, top: Tensor, left: Tensor) -> Tensor:
    """Windows of the images' own size out of the padded images; (N,) offsets of each, in [0, 2·padding]."""
    number, channels, height, width = images.shape
    padded = functional.pad(images, (padding,) * 4)
    rows = (top[:, None] + torch.arange(height, device=images.device))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width, device=images.device))[:, None, None, :]
    samples = torch.arange(number, device=images.device)[:, None, None, None]
    return padded[samples, torch.arange(channels, device=images.device)[:, None, None], rows, columns]


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
