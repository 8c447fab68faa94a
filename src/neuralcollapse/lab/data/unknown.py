"""Inputs of unknown classes for the model of a run: noise, changed test images, held-out classes, other images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuralcollapse.lab.config import BatchSettings, DataSettings
from neuralcollapse.lab.data.batches import EvaluationBatches, Standardisation, standardisation
from neuralcollapse.lab.data.images import ImageData
from neuralcollapse.lab.data.load import load_unlabelled

BUILT_IN = ("noise", "shuffled", "rotated", "held-out")
# Seed of noise and permutations, so that they are equal for all runs.
_SEED = 0


@dataclass(frozen=True)
class ChangedBatches:
    """Images of evaluation batches, changed by a function of each batch and a generator, equally in every pass."""

    batches: EvaluationBatches
    change: Callable[[Tensor, torch.Generator], Tensor]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(_SEED)
        for images, _ in self.batches:
            yield self.change(images, generator)


def unknown_sets(
    sets: Mapping[str, Path | None],
    data: ImageData,
    test: EvaluationBatches,
    config: DataSettings,
    *,
    progress: bool = True,
) -> dict[str, Iterable[Any]]:
    """Return batches of each set, standardised and cropped as the test images of a run.

    Args:
        sets: Mapping from names to folders of images, or from names in `BUILT_IN` to None: ``noise``, the same number
            of images as in the test split, with independent normal pixels that have the mean and standard deviation of
            the training pixels of their channel; ``shuffled``, test images whose pixels are permuted separately for
            each image; ``rotated``, test images rotated by 90 degrees; ``held-out``, test images of held-out classes.
        data: Data of the run.
        test: Batches of the test split.
        config: Settings of the run.
        progress: Show a progress bar while decoding.

    Raises:
        ValueError: if the images of a folder cannot be read or have another shape, the run holds out no classes, or
            its images are not square.
    """
    batches: dict[str, Iterable[Any]] = {}
    for name, folder in sets.items():
        if folder is not None:
            split = load_unlabelled(folder, config, data.image_shape, progress=progress)
            batches[name] = replace(test, split=split.to(data.train.labels.device))
        elif name == "held-out":
            if data.held_out is None:
                raise ValueError("ood held-out needs test images of classes held out in training (hold_out_classes)")
            batches[name] = replace(test, split=data.held_out)
        elif name == "noise":
            of_pixels = standardisation(data, BatchSettings())
            batches[name] = ChangedBatches(test, partial(_noise, of_pixels=of_pixels, standardise=test.standardise))
        elif name == "shuffled":
            batches[name] = ChangedBatches(test, _shuffled)
        else:
            batches[name] = ChangedBatches(test, _rotated)
    return batches


def _noise(
    images: Tensor, generator: torch.Generator, *, of_pixels: Standardisation, standardise: Standardisation
) -> Tensor:
    drawn = torch.randn(images.shape, generator=generator).to(images.device)
    return standardise(of_pixels.mean + of_pixels.std * drawn)


def _shuffled(images: Tensor, generator: torch.Generator) -> Tensor:
    pixels = images.flatten(2)
    order = torch.rand(len(pixels), 1, pixels.shape[2], generator=generator).argsort(dim=2).to(images.device)
    return pixels.gather(2, order.expand_as(pixels)).view_as(images)


def _rotated(images: Tensor, _: torch.Generator) -> Tensor:
    height, width = images.shape[2:]
    if height != width:
        raise ValueError(f"ood rotated needs square images, but those of the run are {height}x{width}")
    return images.rot90(dims=(2, 3))
