"""Load a data set: choose its samples by their labels, then decode them at once, or leave that to worker processes."""

from __future__ import annotations

import math
import os

from neuralcollapse.lab.config import Data
from neuralcollapse.lab.data.decoding import EncodedSamples, Format, decode, one_size
from neuralcollapse.lab.data.selection import choose_test, choose_train, count_classes
from neuralcollapse.lab.data.sources import Table, digits, hugging_face
from neuralcollapse.lab.data.splits import AnySplit, ImageData, Split, StreamedSplit

_MOST_WORKERS = 16


def load_data(config: Data, *, progress: bool = True) -> ImageData:
    """Load a data set.

    Where it has no test split, one image in five is held out, the same ones always. Data over the memory budget stay
    encoded; whether they are grey is then taken from the first training image, and all others are made so.

    Args:
        config: Which, how much of it, and what to make of it.
        progress: Show a progress bar while decoding.

    Raises:
        ValueError: There is no such data set, or it has no images, no labels, labels that do not fit, images that
            cannot be read, or images of different size while ``image_size`` is not given.
    """
    source = digits() if config.data == "digits" else hugging_face(config)
    num_classes = count_classes(source.num_classes, config.digits_per_image)
    train = Table(source.train.images, choose_train(source.train.samples, source.num_classes, config))
    test = Table(source.test.images, choose_test(source.test.samples, source.num_classes, config))
    _check_samples(config.data, train, test)

    # The first image of each split tells what all take when decoded; if some are of another size, decoding says so.
    form = Format(config.image_size, config.channels)
    (channels, *train_size), (_, *test_size) = (_first_image_shape(table, form) for table in (train, test))
    height, width = one_size({tuple(train_size), tuple(test_size)}, config.data)
    shape = (channels, height, config.digits_per_image * width)
    required = (len(train.samples) + len(test.samples)) * math.prod(shape)

    train_split: AnySplit
    test_split: AnySplit
    if required > config.memory_budget * 2**30:
        form = Format(config.image_size, channels)
        workers = _default_workers() if config.workers is None else config.workers
        train_split, test_split = (
            StreamedSplit(EncodedSamples(images, samples.rows, form, (height, width)), samples.labels, shape, workers)
            for images, samples in ((train.images, train.samples), (test.images, test.samples))
        )
    else:
        train_split, test_split = _alike(_decoded(train, form, progress), _decoded(test, form, progress))
    relabelled = config.random_labels or config.label_noise > 0
    return ImageData(config.data, train_split, test_split, num_classes, relabelled)


def _check_samples(data: str, train: Table, test: Table) -> None:
    for name, table in (("train", train), ("test", test)):
        if not len(table.samples):
            raise ValueError(f"data {data!r} must have at least one image in its {name} split")
        present = len(table.samples.labels.unique())
        if present < 2:
            raise ValueError(f"data must have {name} images of at least 2 classes, {data!r} has {present}")


def _first_image_shape(table: Table, form: Format) -> tuple[int, int, int]:
    (pixels,) = table.images.read(table.samples.rows[0, :1].tolist())
    height, width, channels = form(pixels).shape
    return channels, height, width


def _decoded(table: Table, form: Format, progress: bool) -> Split:
    return Split(decode(table.images, table.samples.rows, form, progress=progress), table.samples.labels)


def _alike(train: Split, test: Split) -> tuple[Split, Split]:
    """The two splits, both in colour if one is."""
    if train.image_shape[0] == test.image_shape[0]:
        return train, test
    in_colour = [Split(split.images.expand(-1, 3, -1, -1).contiguous(), split.labels) for split in (train, test)]
    return in_colour[0], in_colour[1]


def _default_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_WORKERS)
