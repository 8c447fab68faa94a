"""A data set with its train and test split, each of them decoded in memory or read by worker processes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from neuralcollapse.lab.data.decoding import EncodedSamples

# Of streamed images so many are read for a fingerprint, at most.
_FINGERPRINT_SAMPLES = 1000


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
        """The same on another device."""
        return Split(self.images.to(device), self.labels.to(device))

    def batches(self, index_batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Images of bytes and labels at these indices, batch by batch."""
        for indices in index_batches:
            place = indices.to(self.labels.device)
            yield self.images.index_select(0, place), self.labels.index_select(0, place)


@dataclass(frozen=True)
class StreamedSplit:
    """Images that stay encoded, decoded by worker processes batch by batch, and labels (N,), on the training device."""

    samples: EncodedSamples
    labels: Tensor
    image_shape: tuple[int, int, int]
    """Channels, height and width."""
    workers: int
    """Worker processes; with 0 of them this process decodes."""

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of so many images, evenly spaced."""
        number = min(len(self), _FINGERPRINT_SAMPLES)
        images = self.samples[torch.linspace(0, len(self) - 1, number).long().tolist()]
        if isinstance(images, ValueError):
            raise images
        return {f"{number}_images": _sha256(images)}

    def to(self, device: torch.device) -> StreamedSplit:
        """The same with batches on another device."""
        return replace(self, labels=self.labels.to(device))

    def batches(self, index_batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Images of bytes and labels at these indices, batch by batch, two batches ahead for each worker.

        Raises:
            ValueError: An image that cannot be read, or that is of another size.
        """
        from torch.utils.data import DataLoader

        device, index_batches = self.labels.device, list(index_batches)
        loader: DataLoader[Tensor | ValueError] = DataLoader(
            self.samples,  # type: ignore[arg-type]  # is indexed by the samples of a batch
            batch_size=None,
            sampler=[indices.tolist() for indices in index_batches],
            num_workers=self.workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # the workers' seeds, of which nothing is drawn, else come from the global one
        )
        for indices, images in zip(index_batches, loader, strict=True):
            if isinstance(images, ValueError):
                raise images
            yield images.to(device, non_blocking=True), self.labels[indices.to(device)]


AnySplit = Split | StreamedSplit


@dataclass(frozen=True)
class ImageData:
    """A data set with its train and test split, and a validation split if one is held out of the train split."""

    name: str
    train: AnySplit
    test: AnySplit
    num_classes: int
    relabelled: bool = False
    """All or some of the train labels are random."""
    validation: AnySplit | None = None
    class_names: tuple[str, ...] | None = None
    revision: str | None = None
    """Of a data set of the hub, the commit."""
    notes: tuple[str, ...] = ()
    """Lines on what was left out or decided in reading the data."""

    @property
    def splits(self) -> dict[str, AnySplit]:
        """All of them, by name."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in splits.items() if split is not None}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.train.image_shape

    def to(self, device: torch.device) -> ImageData:
        """The same on another device."""
        return replace(self, **{name: split.to(device) for name, split in self.splits.items()})  # type: ignore[arg-type]

    @property
    def absent_classes(self) -> list[str]:
        """The names, or numbers, of the classes that have no training images."""
        names = self.class_names or tuple(map(str, range(self.num_classes)))
        counts = self.train.labels.bincount(minlength=self.num_classes)
        return [names[place] for place in (counts == 0).nonzero().flatten().tolist()]

    def fingerprint(self) -> dict[str, dict[str, str]]:
        """SHA-256 of the labels and of the images of each split, as they are decoded; of many streamed ones, a part."""
        return {name: {"labels": _sha256(split.labels)} | split.fingerprint for name, split in self.splits.items()}

    def with_train_labels(self, labels: Tensor) -> ImageData:
        """The same with these labels (N,) of the training images, such as those that a run kept.

        Raises:
            ValueError: There are not as many as training images, or not all are classes.
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
        kind = "random train labels" if self.relabelled else "classes"
        absent = self.absent_classes
        kind += f", {len(absent)} of them without training images" if absent else ""
        *parts, last = (f"{len(split)} {name}" for name, split in self.splits.items())
        return f"{name}: {', '.join(parts)} and {last} images {shape}, {self.num_classes} {kind}"


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.cpu().contiguous().numpy().data).hexdigest()
