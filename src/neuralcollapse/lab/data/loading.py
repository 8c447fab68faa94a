"""Load a data set: choose its samples by their labels, then decode them at once, or leave that to worker processes."""

from __future__ import annotations

import math
import os

from neuralcollapse.lab.conditions import DRAWN_DATA
from neuralcollapse.lab.config import DataSettings
from neuralcollapse.lab.data.decoding import EncodedSamples, Format, decode, one_size
from neuralcollapse.lab.data.generated import generated
from neuralcollapse.lab.data.selection import choose_test, choose_train, choose_validation, count_classes
from neuralcollapse.lab.data.sources import Source, Table, digits, hugging_face
from neuralcollapse.lab.data.splits import AnySplit, ImageData, Split, StreamedSplit

_MOST_WORKERS = 16


def load_data(config: DataSettings, *, progress: bool = True) -> ImageData:
    """Load a data set.

    Where it has no test split, one image in five is held out, the same ones always. Data over the memory budget stay
    encoded; whether they are grey is then taken from the first training image, and all others are made so.

    Args:
        config: Which, how much of it, and what to make of it.
        progress: Show a progress bar while decoding.

    Raises:
        ValueError: There is no such data set, or it has no images, no labels, labels that do not fit, images that
            cannot be read, or images of different size while ``image_size`` is not given.

    Examples:
        >>> from neuralcollapse.lab import RunConfig
        >>> print(load_data(RunConfig(train_samples=100, test_samples=50), progress=False))
        digits: 100 train and 50 test images 1×8×8, 10 classes
    """
    _check_memory(config)
    source = _source(config)
    num_classes = count_classes(source.num_classes, config.digits_per_image)
    chosen = {
        "train": (source.train, choose_train(source.train.samples, source.num_classes, config)),
        "validation": (source.train, choose_validation(source.train.samples, source.num_classes, config)),
        "test": (source.test, choose_test(source.test.samples, source.num_classes, config)),
    }
    tables = {name: Table(table.images, samples) for name, (table, samples) in chosen.items() if samples is not None}
    _check_samples(config.data, tables)

    # The first image of each split tells what all take when decoded; if some are of another size, decoding says so.
    form = Format(config.image_size, config.channels)
    shapes = [_first_image_shape(table, form) for table in tables.values()]
    channels = shapes[0][0]
    height, width = one_size({(height, width) for _, height, width in shapes}, config.data)
    shape = (channels, height, config.digits_per_image * width)
    required = sum(len(table.samples) for table in tables.values()) * math.prod(shape)

    splits: dict[str, AnySplit]
    if required > config.memory_budget * 2**30:
        form = Format(config.image_size, channels)
        workers = _default_workers() if config.workers is None else config.workers
        splits = {
            name: StreamedSplit(
                EncodedSamples(table.images, table.samples.rows, form, (height, width)),
                table.samples.labels,
                shape,
                workers,
            )
            for name, table in tables.items()
        }
    else:
        if config.workers is not None:
            raise ValueError(
                f"workers belongs to data over memory_budget; {config.data!r} takes {required / 2**30:.2g} GiB "
                f"and the budget is {config.memory_budget:g} GiB"
            )
        splits = _alike({name: _decoded(table, form, progress) for name, table in tables.items()})
    relabelled = config.random_labels or config.label_noise > 0
    names = source.class_names if config.digits_per_image == 1 else None
    data = ImageData(
        config.data,
        splits["train"],
        splits["test"],
        num_classes,
        relabelled,
        splits.get("validation"),
        class_names=names,
        revision=source.revision,
    )
    _check_classes(data, config)
    return data


def _source(config: DataSettings) -> Source:
    if config.data == "digits":
        return digits()
    return generated(config) if config.data in DRAWN_DATA else hugging_face(config)


def _check_samples(data: str, tables: dict[str, Table]) -> None:
    for name, table in tables.items():
        if not len(table.samples):
            raise ValueError(f"data {data!r} must have at least one image in its {name} split")
        present = len(table.samples.labels.unique())
        if present < 2:
            raise ValueError(f"data must have {name} images of at least 2 classes, {data!r} has {present}")


def _check_classes(data: ImageData, config: DataSettings) -> None:
    """Classes that images side by side make are many: there, some are absent."""
    absent = data.absent_classes
    if absent and config.digits_per_image == 1 and not config.allow_absent_classes:
        listed = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
        raise ValueError(
            f"data {config.data!r} must have training images of each of its {data.num_classes} classes, and has none "
            f"of {listed}; with --allow_absent_classes the others are trained and measured"
        )


def _check_memory(config: DataSettings) -> None:
    """Before an image is decoded: a batch must fit into the memory of this machine."""
    if config.image_size is None or not hasattr(os, "sysconf"):
        return
    number = getattr(config, "batch_size", 1)
    needed = 4 * number * (config.channels or 1) * config.image_size**2
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ValueError(
            f"image_size must be such that a batch fits into memory: {number} images of "
            f"{config.image_size}x{config.image_size} take {needed / 2**30:.0f} GiB, and there are {there / 2**30:.0f}"
        )


def _first_image_shape(table: Table, form: Format) -> tuple[int, int, int]:
    (pixels,) = table.images.read(table.samples.rows[0, :1].tolist())
    height, width, channels = form(pixels).shape
    return channels, height, width


def _decoded(table: Table, form: Format, progress: bool) -> Split:
    return Split(decode(table.images, table.samples.rows, form, progress=progress), table.samples.labels)


def _alike(splits: dict[str, Split]) -> dict[str, AnySplit]:
    """The splits, all of them in colour if one is."""
    channels = max(split.image_shape[0] for split in splits.values())
    return {
        name: split
        if split.image_shape[0] == channels
        else Split(split.images.expand(-1, channels, -1, -1).contiguous(), split.labels)
        for name, split in splits.items()
    }


def _default_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_WORKERS)
