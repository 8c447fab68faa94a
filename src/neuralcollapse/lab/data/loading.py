"""Load a data set: choose its samples by their labels, then decode them at once, or leave that to worker processes."""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from neuralcollapse.lab.conditions import DRAWN_DATA
from neuralcollapse.lab.config import DataSettings
from neuralcollapse.lab.data.copies import copy_groups, decoded_copies, same_pixels, stored_copies
from neuralcollapse.lab.data.decoding import EncodedSamples, Format, decode, one_size, side_by_side
from neuralcollapse.lab.data.generated import generated
from neuralcollapse.lab.data.selection import Samples, choose_test, choose_train, choose_validation, count_classes
from neuralcollapse.lab.data.sources import Source, Table, digits, stored
from neuralcollapse.lab.data.splits import AnySplit, ImageData, Split, StreamedSplit
from neuralcollapse.lab.memory import check_memory
from neuralcollapse.lab.ranks import global_rank

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
    train_samples = source.train.samples
    if config.validation_share is not None and source.copies != "ignore" and train_samples.groups is None:
        groups = copy_groups(source.train.images, train_samples.rows.flatten())
        train_samples = replace(train_samples, groups=groups)
    chosen = {
        "train": (source.train, choose_train(train_samples, source.num_classes, config)),
        "validation": (source.train, choose_validation(train_samples, source.num_classes, config)),
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
    _check_batch(config, shape)

    splits: dict[str, AnySplit]
    if required > config.memory_budget * 2**30:
        tables["test"], note = _without_copies(source, tables, None, form)
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
        images = f"memory_budget must be less than there is: the decoded images of {config.data!r}"
        check_memory(required, images, "; over the budget they are read while training")
        decoded = _alike({name: _decoded(table, form, progress) for name, table in tables.items()})
        tables["test"], note = _without_copies(source, tables, decoded, form)
        splits = {name: _composed(tables[name].samples, *decoded[name]) for name in tables}
    _check_samples(config.data, tables)
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
        notes=(*source.notes, *([note] if note else [])),
    )
    _check_classes(data, config)
    _say(data)
    return data


def _say(data: ImageData) -> None:
    """Print what was left out, once for all ranks and processes."""
    if global_rank() == 0 and multiprocessing.parent_process() is None:
        for note in data.notes:
            print(f"data {data.name}: {note}", file=sys.stderr)


def _source(config: DataSettings) -> Source:
    if config.data == "digits":
        return digits()
    return generated(config) if config.data in DRAWN_DATA else stored(config)


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
    if config.image_size is not None:
        _check_batch(config, (config.channels or 1, config.image_size, config.image_size))


def _check_batch(config: DataSettings, shape: tuple[int, int, int]) -> None:
    number, (channels, height, width) = getattr(config, "batch_size", 1), shape
    images = f"image_size must be such that a batch fits into memory: {number} images of {height}x{width}"
    check_memory(4 * number * channels * height * width, images)


def _first_image_shape(table: Table, form: Format) -> tuple[int, int, int]:
    (pixels,) = table.images.read(table.samples.rows[0, :1].tolist())
    height, width, channels = form(pixels).shape
    return channels, height, width


_Decoded = tuple[Tensor, Tensor]
"""Images (N, C, H, W), and their rows (N,)."""


def _decoded(table: Table, form: Format, progress: bool) -> _Decoded:
    single = table.samples.rows.shape[1] == 1
    rows = table.samples.rows.flatten() if single else table.samples.rows.unique()
    return decode(table.images, rows, form, progress=progress), rows


def _alike(decoded: dict[str, _Decoded]) -> dict[str, _Decoded]:
    """The images of all splits, in colour if those of one are."""
    channels = max(images.shape[1] for images, _ in decoded.values())
    return {
        name: (images if images.shape[1] == channels else images.expand(-1, channels, -1, -1).contiguous(), rows)
        for name, (images, rows) in decoded.items()
    }


def _composed(samples: Samples, images: Tensor, rows: Tensor) -> Split:
    if samples.rows.shape[1] > 1:
        return Split(side_by_side(images, torch.searchsorted(rows, samples.rows)), samples.labels)
    if len(samples) < len(rows):
        images = images[torch.isin(rows, samples.rows.flatten())]
    return Split(images, samples.labels)


def _without_copies(
    source: Source, tables: dict[str, Table], decoded: dict[str, _Decoded] | None, form: Format
) -> tuple[Table, str | None]:
    """The samples to test on without images that are trained on too, and one line about those that there are.

    Raises:
        ValueError: if there are some, and they are to be refused.
    """
    test = tables["test"]
    copies: dict[int, int] = {}
    for name in tables if source.copies != "ignore" else ():
        if name != "test":
            copies |= {other: row for row, other in _copies(tables[name], test, name, decoded, form)}
    if not copies:
        return test, None
    is_copy = torch.isin(test.samples.rows, torch.tensor(list(copies))).any(1)
    other, row = next(iter(copies.items()))
    example = f"{source.train.images.name(row)} and {test.images.name(other)} are the same"
    number = f"{int(is_copy.sum())} of {len(is_copy)} test images are training images too"
    if source.copies == "refuse":
        raise ValueError(
            f"data must have no image both to train and to test on, and {example}; {number}: remove one of each two, "
            "or leave them out of the test split with --drop_copies"
        )
    if source.copies == "report":
        return test, f"{number} ({example}), as published; --drop_copies leaves them out"
    return Table(test.images, test.samples.take((~is_copy).nonzero().flatten())), f"{number} and left out ({example})"


def _copies(
    train: Table, test: Table, name: str, decoded: dict[str, _Decoded] | None, form: Format
) -> Iterator[tuple[int, int]]:
    """Rows of both tables with the same image: by their files, or by the pixels where those are decoded."""
    if decoded is None:
        yield from stored_copies(*((table.images, table.samples.rows.unique().tolist()) for table in (train, test)))
        return
    (first, rows), (second, test_rows) = decoded[name], decoded["test"]
    for row, other in decoded_copies((first, rows.tolist()), (second, test_rows.tolist())):
        # What is scaled may have become alike.
        if form == Format() or same_pixels(train.images, row, test.images, other):
            yield row, other


def _default_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_WORKERS)
