"""A data set as tensors: its train and test split, and parts of them that keep the classes in proportion."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Parts of a data set are drawn with this seed, so that which images they hold never changes.
_PART_SEED = 0


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W) of bytes and labels (N,), on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Split:
        """The samples at these indices."""
        return Split(self.images[indices], self.labels[indices])

    def to(self, device: torch.device) -> Split:
        """The same on another device."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class ImageData:
    """A data set with its train and test split."""

    name: str
    train: Split
    test: Split
    num_classes: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device) -> ImageData:
        """The same on another device."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def __str__(self) -> str:
        shape = "×".join(map(str, self.image_shape))
        return (
            f"{self.name}: {len(self.train)} train and {len(self.test)} test images {shape}, {self.num_classes} classes"
        )


def stratified_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A random order in which any stretch of n samples holds n·n_k/N ± 1 samples of class k.

    The i-th sample of class k, counted in a random order, stands at (i + u_k)/n_k, with u_k uniform in [0, 1).
    """
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    _, codes, counts = labels[by_class].unique(return_inverse=True, return_counts=True)
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[codes]
    start = torch.rand(len(counts), generator=generator, dtype=torch.float64)
    return by_class[((rank + start[codes]) / counts[codes]).argsort(stable=True)]


def hold_out(labels: Tensor, share: float = 0.2) -> tuple[Tensor, Tensor]:
    """Indices of a train and of a test part, every class in proportion."""
    order = stratified_order(labels, torch.Generator().manual_seed(_PART_SEED))
    held_out = round(len(labels) * share)
    return order[held_out:].sort().values, order[:held_out].sort().values


def subset(labels: Tensor, indices: Tensor, limit: int | None) -> Tensor:
    """At most ``limit`` of the indices, every class in proportion."""
    if limit is None or limit >= len(indices):
        return indices
    order = stratified_order(labels[indices], torch.Generator().manual_seed(_PART_SEED))
    return indices[order[:limit].sort().values]
