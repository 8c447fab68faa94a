"""Batches on the training device: those of an epoch of training, and those to measure on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from neuralcollapse.lab.config import BatchSettings
from neuralcollapse.lab.data.augmentation import augment, batch_shape, centre_crop
from neuralcollapse.lab.data.selection import balanced_order, stratified_order
from neuralcollapse.lab.data.splits import AnySplit, ImageData
from neuralcollapse.lab.data.standardisation import Standardisation, handy_batch_size, standardisation
from neuralcollapse.lab.seeds import derived_seed


@dataclass(frozen=True)
class EpochBatches:
    """The batches of one epoch of training: a function of the data, the settings, the seed and the epoch alone.

    No sample is left out: the last batch may be smaller, and one sample, of which batch norm knows no variance, joins
    the batch before it. Stratified batches are as many as are full, and differ in size by one at most.

    With ``classes_per_batch``, batches are as many as are full, all of the same size, and hold as many samples of each
    of their classes: a sample of a small class may come several times in an epoch, one of a large class not at all.

    Of several ranks, each gets its part of every batch, two samples or more. The batches are those of one rank, but
    that a last one of fewer than two samples for each of them joins the batch before it.

    Of a run that goes on inside the epoch, the batches that it has done are left out, and the others are the same.
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
        only_full = self.settings.stratified or self.settings.classes_per_batch is not None
        return max(1, full + (rest >= 2 * self.ranks and not only_full))

    @property
    def sizes(self) -> list[int]:
        """Samples of each batch, those done among them."""
        if self.settings.classes_per_batch is not None:
            return [self.settings.batch_size] * len(self)
        return [len(chunk) for chunk in self._chunks(torch.arange(len(self.split)))]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # Drawn on the CPU, so that every device sees the same batches.
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
        chunks = self._chunks(self._order(generator))
        for indices in chunks[: self.done]:  # no images, but all that is drawn for them
            nothing = torch.empty(len(indices), *self.split.image_shape, dtype=torch.uint8, device="meta")
            augment(nothing, self.settings, generator)
        chunks = chunks[self.done :]
        parts = [torch.arange(len(chunk)).tensor_split(self.ranks)[self.rank] for chunk in chunks]
        own = self.split.batches(chunk[part] for chunk, part in zip(chunks, parts, strict=True))
        for chunk, part, (images, targets) in zip(chunks, parts, own, strict=True):
            yield self.standardise(augment(images, self.settings, generator, part, len(chunk))), targets

    def _order(self, generator: torch.Generator) -> Tensor:
        labels, settings = self.split.labels.cpu(), self.settings
        if settings.classes_per_batch is not None:
            each = settings.batch_size // settings.classes_per_batch
            return balanced_order(labels, len(self), settings.classes_per_batch, each, generator)
        if settings.stratified:
            return stratified_order(labels, generator)
        return torch.randperm(len(labels), generator=generator)

    def _chunks(self, order: Tensor) -> tuple[Tensor, ...]:
        if self.settings.stratified:
            return order.tensor_split(len(self))
        return order.tensor_split([self.settings.batch_size * number for number in range(1, len(self))])


@dataclass(frozen=True)
class EvaluationBatches:
    """All samples of a split in order, as they are, or cropped at the centre to a square."""

    split: AnySplit
    standardise: Standardisation
    batch_size: int = 512
    crop_size: int | None = None

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.split.batches(torch.arange(len(self.split)).split(self.batch_size)):
            yield self.standardise(images if self.crop_size is None else centre_crop(images, self.crop_size)), labels


def evaluation_batches(data: ImageData, settings: BatchSettings) -> dict[str, EvaluationBatches]:
    """Every split, un-augmented, standardised alike.

    Raises:
        ValueError: Settings that do not fit the images.
    """
    batch_shape(data.image_shape, settings)
    standardise, batch_size = standardisation(data, settings), handy_batch_size(data.image_shape)
    return {
        name: EvaluationBatches(split, standardise, batch_size, settings.crop_size)
        for name, split in data.splits.items()
    }
