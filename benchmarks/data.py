"""Images per second for training: from memory, from worker processes, and from a PIL pipeline.

The batches are of 128 images of CIFAR-10. The PIL pipeline is the usual training code: a DataLoader with two workers
that decodes each PNG, crops and mirrors it with Pillow, and converts it to a standardised tensor. Crop, flip and
rotation of batches from memory are compared with those of kornia. The images are read from ../shared/data/cifar10 or
from the folder NEURALCOLLAPSE_DATA, and stored as PNGs.
"""

from __future__ import annotations

import io
import random
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from _common import data_root, write
from kornia import augmentation as kornia
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from neuralcollapse.lab.config import BatchSettings, DataSettings
from neuralcollapse.lab.data.batches import EpochBatches, Standardisation, standardisation
from neuralcollapse.lab.data.images import AnySplit
from neuralcollapse.lab.data.load import load_data

BATCH, WORKERS, IMAGES, REPEATS = 128, 2, 20_000, 5
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "crop_flip": {"augmentation": {"crop_padding": 4, "flip": True}},
    "rotation": {"augmentation": {"rotation": 25.0}},
}
KORNIA = {
    "crop_flip": nn.Sequential(kornia.RandomCrop((32, 32), padding=4), kornia.RandomHorizontalFlip()),
    "rotation": kornia.RandomRotation(25.0, p=1.0),
}


class PILImages:
    """PNGs, decoded, augmented and standardised one by one."""

    def __init__(self, pngs: list[bytes], labels: list[int], standardise: Standardisation, augmentation: str) -> None:
        self.pngs, self.labels, self.augmentation = pngs, labels, augmentation
        self.mean, self.std = standardise.mean / 255, standardise.std / 255

    def __len__(self) -> int:
        return len(self.pngs)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.open(io.BytesIO(self.pngs[index])).convert("RGB")
        if self.augmentation == "crop_flip":
            left, top = random.randint(-4, 4), random.randint(-4, 4)
            image = image.crop((left, top, left + 32, top + 32))  # pixels outside the image are 0
            if random.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        elif self.augmentation == "rotation":
            image = image.rotate(random.uniform(-25, 25), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.float().div(255).sub(self.mean).div(self.std), self.labels[index]


class Augmented:
    """Batches, augmented by a module."""

    def __init__(self, batches: EpochBatches, module: nn.Module) -> None:
        self.batches, self.module = batches, module

    def __iter__(self) -> Any:
        return ((self.module(images), labels) for images, labels in self.batches)


def save_pngs(folder: Path) -> tuple[list[bytes], list[int]]:
    """Save the first images of the train split of CIFAR-10 as Parquet files of PNGs; return PNGs and labels."""
    files = str(data_root() / "cifar10" / "train-*.parquet")
    rows = datasets.load_dataset("parquet", data_files=files, split="train")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    pngs, labels = [], rows["label"][:IMAGES]
    image_column = next(name for name in rows.features if name != "label")
    for image in rows[:IMAGES][image_column]:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG")
        pngs.append(buffer.getvalue())
    for split in ("train", "test"):
        number = IMAGES if split == "train" else 100
        table = {"image": [{"bytes": png, "path": None} for png in pngs[:number]], "label": labels[:number]}
        datasets.Dataset.from_dict(table, features=features).to_parquet(folder / f"{split}.parquet")
    return pngs, labels


def images_per_second(batches: Iterable[Any]) -> float:
    """Return the images per second of one epoch, which starts the workers, as every epoch of training does."""
    start, number = time.perf_counter(), 0
    for images, _ in batches:
        number += len(images)
    return number / (time.perf_counter() - start)


def sources(memory: AnySplit, streamed: AnySplit, pngs: list[bytes], labels: list[int], standardise: Standardisation):
    """Yield each source of batches, with the names of its path and augmentation."""

    def batches(split: AnySplit, augmentation: str) -> EpochBatches:
        return EpochBatches(split, standardise, BatchSettings(batch_size=BATCH, **SETTINGS[augmentation]), 0, 0)

    for augmentation in SETTINGS:
        images = PILImages(pngs, labels, standardise, augmentation)
        yield "memory", augmentation, batches(memory, augmentation)
        if augmentation in KORNIA:
            yield "memory, kornia", augmentation, Augmented(batches(memory, "none"), KORNIA[augmentation])
        yield "streamed", augmentation, batches(streamed, augmentation)
        yield "PIL", augmentation, DataLoader(images, BATCH, shuffle=True, num_workers=WORKERS, drop_last=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pngs, labels = save_pngs(Path(folder))
        memory, streamed = (
            load_data(DataSettings(data=folder, **how), progress=False) for how in ({}, {"workers": WORKERS})
        )
        standardise = standardisation(memory, BatchSettings())
        measured = list(sources(memory.train, streamed.train, pngs, labels, standardise))
        rates: list[list[float]] = [[] for _ in measured]
        for _ in range(REPEATS):  # interleaved, so that other load on the machine affects all sources equally
            for (*_, batches), found in zip(measured, rates, strict=True):
                found.append(images_per_second(batches))
    rows: list[dict[str, Any]] = []
    for (path, augmentation, _), found in zip(measured, rates, strict=True):
        workers = WORKERS if path in ("streamed", "PIL") else 0
        row = {"path": path, "augmentation": augmentation, "batch": BATCH, "workers": workers}
        rows.append(row | {"images_per_second": statistics.median(found)})
        print(f"{augmentation:10} {path:15} {statistics.median(found):10,.0f} images/s")
    write("data", rows, "kornia", "pillow", "datasets")


if __name__ == "__main__":
    main()
