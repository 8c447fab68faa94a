"""Loading of data sets by name or folder, with the images and labels of all splits."""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from neuralcollapse._checks import check_memory
from neuralcollapse.lab.config import DRAWN_DATA, DataSettings
from neuralcollapse.lab.data.generated import generated
from neuralcollapse.lab.data.images import (
    AnySplit,
    EncodedSamples,
    Format,
    ImageData,
    Images,
    Split,
    StreamedSplit,
    one_size,
    side_by_side,
    stack,
)
from neuralcollapse.lab.data.selection import (
    Samples,
    class_numbers,
    count_classes,
    divide_classes,
    hold_out,
    select,
    subset,
)
from neuralcollapse.lab.data.sources import Source, digits, stored, unlabelled_images
from neuralcollapse.lab.process import global_rank

# Largest number of bytes of decoded images that are kept in memory by default.
MEMORY_BUDGET = 4 * 2**30
_MOST_WORKERS = 16
# Name of the samples of classes that are held out, next to the names of splits.
_HELD_OUT = "held_out"

_Decoded = tuple[Tensor, Tensor]
"""Images (N, C, H, W), and their rows (N,)."""


def load_data(config: DataSettings, *, batch_size: int = 1, progress: bool = True) -> ImageData:
    """Load a data set.

    Without a test split, a fixed fifth of the images is held out. Data that exceed the memory budget
    stay encoded; the number of channels is then that of the first training image, and other images are converted.

    Args:
        config: Settings of the data set.
        batch_size: Number of images in a training batch, whose memory is checked before images are decoded.
        progress: Show a progress bar while decoding.

    Raises:
        ValueError: if the data set does not exist, has no images or no labels, has labels that do not fit or images
            that cannot be read, or has images of different sizes and ``image_size`` is not given.

    Examples:
        >>> from neuralcollapse.lab import RunConfig
        >>> print(load_data(RunConfig(train_samples=100, test_samples=50), progress=False))
        digits: 100 train and 50 test images 1×8×8, 10 classes
    """
    if config.image_size is not None:
        _check_batch(batch_size, (config.channels or 1, config.image_size, config.image_size))
    source = _source(config)
    copy_groups = None if source.copies == "ignore" else _copy_groups
    source, held_out = _without_classes(config, _with_test_split(source, copy_groups))
    assert source.test is not None
    num_classes = count_classes(source.num_classes, config.digits_per_image)
    samples = select(source.train, source.test, source.num_classes, config, copy_groups)
    _check_samples(config.data, samples)
    if held_out is not None:
        samples[_HELD_OUT] = held_out

    # The first image of each split determines the shape of all images; images of another size then raise an error.
    form = Format(config.image_size, config.channels)
    shapes = [_first_image_shape(part, form) for part in samples.values()]
    channels = shapes[0][0]
    height, width = one_size([shape[1:] for shape in shapes], config.data)
    shape = (channels, height, config.digits_per_image * width)
    _check_batch(batch_size, shape)
    required = sum(map(len, samples.values())) * math.prod(shape)
    decoded: dict[str, _Decoded] | None = None
    if _fits_into_memory(required, config, config.data):
        decoded = _decode(samples, form, progress)
    known = {name: part for name, part in samples.items() if name != _HELD_OUT}
    samples["test"], copies_note = _without_copies(source.copies, known, decoded, form)
    _check_samples(config.data, known | {"test": samples["test"]})

    splits: dict[str, AnySplit] = {}
    for name, part in samples.items():
        if decoded is not None:
            splits[name] = _compose(part, *decoded.pop(name))
        else:
            encoded = EncodedSamples(part.images, part.rows, Format(config.image_size, channels), (height, width))
            splits[name] = StreamedSplit(encoded, part.labels, shape, _workers(config))
    data = ImageData(
        config.data,
        splits["train"],
        splits["test"],
        num_classes,
        config.label_noise != 0,
        splits.get("validation"),
        splits.get(_HELD_OUT),
        class_names=source.class_names if config.digits_per_image == 1 else None,
        revision=source.revision,
        notes=(*source.notes, *([copies_note] if copies_note else [])),
    )
    _check_classes(data, config)
    if global_rank() == 0 and multiprocessing.parent_process() is None:  # once for all ranks and processes
        for note in data.notes:
            print(f"data {data.name}: {note}", file=sys.stderr)
    return data


def load_unlabelled(
    folder: Path, config: DataSettings, image_shape: tuple[int, int, int], *, progress: bool = True
) -> AnySplit:
    """Load the images of a folder in the format of a data set; their labels are ignored and set to 0.

    Args:
        folder: Folder with images in it and in its sub-folders, Parquet files, or a data set saved by `datasets`. If
            the folder has splits, the test split is used.
        config: Settings of the data set, including the size to which images are scaled.
        image_shape: Channels, height and width of the images of the data set.
        progress: Show a progress bar while decoding.

    Raises:
        ValueError: if there are no images, or they cannot be read or have another height or width.
    """
    images = unlabelled_images(folder)
    channels, *size = image_shape
    rows = torch.arange(len(images.rows))
    samples, form = Samples(images, rows[:, None], torch.zeros_like(rows)), Format(config.image_size, channels)
    _, *found = _first_image_shape(samples, form)
    if found != size:
        raise ValueError(
            f"ood must have images of the run's size, {size[0]}x{size[1]}, and those of {str(folder)!r} are "
            f"{found[0]}x{found[1]}; with image_size in training all are scaled"
        )
    if _fits_into_memory(len(rows) * math.prod(image_shape), config, str(folder)):
        return _compose(samples, *_decode({"": samples}, form, progress)[""])
    return StreamedSplit(
        EncodedSamples(images, samples.rows, form, (size[0], size[1])), samples.labels, image_shape, _workers(config)
    )


def _source(config: DataSettings) -> Source:
    if config.data == "digits":
        return digits()
    return generated(config) if config.data in DRAWN_DATA else stored(config)


def _with_test_split(source: Source, copy_groups: Callable[[Samples], Tensor] | None) -> Source:
    """Return the source with a test split; if it has none, a fixed fifth of the images is held out.

    All copies of an image are in the same split.
    """
    train, notes = source.train, source.notes
    if source.test is not None:
        return source
    groups = copy_groups(train) if copy_groups is not None else torch.arange(len(train))
    if number := int((groups != torch.arange(len(groups))).sum()):
        notes += (f"{number} images are copies of others; copies of one image are all trained on or all held out",)
    kept, held_out = hold_out(train.labels, groups=groups)
    return replace(source, train=train.take(kept), test=train.take(held_out), notes=notes)


def _without_classes(config: DataSettings, source: Source) -> tuple[Source, Samples | None]:
    """Return the source without the classes that are held out, and the test samples of these, if there are some."""
    if config.hold_out_classes is None:
        return source, None
    assert source.test is not None
    names = source.class_names or tuple(map(str, range(source.num_classes)))
    classes = class_numbers(config.hold_out_classes, names)
    train, left_out = divide_classes(source.train, classes, source.num_classes)
    test, held_out = divide_classes(source.test, classes, source.num_classes)
    held_out = held_out.take(subset(held_out.labels, config.test_samples))
    note = (
        f"held out: classes {', '.join(names[number] for number in classes)}; {len(left_out)} training images left "
        f"out, {len(held_out)} test images are unknown inputs"
    )
    known = replace(
        source,
        train=train,
        test=test,
        num_classes=source.num_classes - len(classes),
        class_names=tuple(name for number, name in enumerate(names) if number not in classes),
        notes=(*source.notes, note),
    )
    return known, held_out if len(held_out) else None


def _check_samples(data: str, samples: Mapping[str, Samples]) -> None:
    for name, part in samples.items():
        if not len(part):
            raise ValueError(f"data {data!r} must have at least one image in its {name} split")
        present = len(part.labels.unique())
        if present < 2:
            raise ValueError(f"data must have {name} images of at least 2 classes, {data!r} has {present}")


def _check_classes(data: ImageData, config: DataSettings) -> None:
    """Check that no class is absent, except among the many classes of images side by side."""
    absent = data.absent_classes
    if absent and config.digits_per_image == 1 and "absent-classes" not in config.leave_out:
        names = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
        raise ValueError(
            f"data {config.data!r} must have training images of each of its {data.num_classes} classes, but has none "
            f"of {names}; with --leave_out absent-classes the others are trained and measured"
        )


def _check_batch(number: int, shape: tuple[int, int, int]) -> None:
    channels, height, width = shape
    images = f"image_size must be such that a batch fits into memory: {number} images of {height}x{width}"
    check_memory(4 * number * channels * height * width, images)


def _fits_into_memory(required: int, config: DataSettings, data: str) -> bool:
    """Return whether images are decoded once and stored in memory.

    Raises:
        ValueError: if this is requested but memory is insufficient.
    """
    if not (config.workers == "in-memory" or (config.workers == "auto" and required <= MEMORY_BUDGET)):
        return False
    images = f"workers must be a number where memory is short: the decoded images of {data!r}"
    check_memory(required, images, "; with a number of workers they are decoded during training")
    return True


def _workers(config: DataSettings) -> int:
    if isinstance(config.workers, int):
        return config.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_WORKERS)


# Decoding.


def _first_image_shape(samples: Samples, form: Format) -> tuple[int, int, int]:
    (pixels,) = samples.images.read(samples.rows[0, :1].tolist())
    height, width, channels = form(pixels).shape
    return channels, height, width


def _decode(samples: Mapping[str, Samples], form: Format, progress: bool) -> dict[str, _Decoded]:
    """Decode each image of each split once; all are in colour if one is."""
    from tqdm.auto import tqdm

    decoded = {}
    for name, part in samples.items():
        rows = part.rows.flatten() if part.rows.shape[1] == 1 else part.rows.unique()
        bar = tqdm(
            part.images.read(rows.tolist()),
            total=len(rows),
            desc=f"decoding {part.images.description}",
            unit="image",
            disable=None if progress else True,  # None: if there is no terminal
            delay=0.5,
        )
        decoded[name] = stack(map(form, bar), len(rows), part.images.description), rows
    channels = max(images.shape[1] for images, _ in decoded.values())
    return {
        name: (images if images.shape[1] == channels else images.expand(-1, channels, -1, -1).contiguous(), rows)
        for name, (images, rows) in decoded.items()
    }


def _compose(samples: Samples, images: Tensor, rows: Tensor) -> Split:
    """Return the split of these samples from decoded images, which may be more than the samples need."""
    if samples.rows.shape[1] > 1:
        return Split(side_by_side(images, torch.searchsorted(rows, samples.rows)), samples.labels)
    if len(samples) < len(rows):
        images = images[torch.isin(rows, samples.rows.flatten())]
    return Split(images, samples.labels)


# Copies of images. Images of a single colour are not considered copies, because their content does not identify them.


def _without_copies(
    treatment: str, samples: Mapping[str, Samples], decoded: Mapping[str, _Decoded] | None, form: Format
) -> tuple[Samples, str | None]:
    """Return the samples to test on, without training images if they are to be dropped, and a line about those.

    Raises:
        ValueError: if a test image is also a training image, and this is not permitted.
    """
    test = samples["test"]
    train_row_of = {} if treatment == "ignore" else _copies(samples, decoded, form)
    if not train_row_of:
        return test, None
    is_copy = torch.isin(test.rows, torch.tensor(list(train_row_of))).any(1)
    test_row, row = next(iter(train_row_of.items()))
    example = f"{samples['train'].images.name(row)} and {test.images.name(test_row)} are the same"
    number = f"{int(is_copy.sum())} of {len(is_copy)} test images are training images too"
    if treatment == "refuse":
        raise ValueError(
            f"data must have no image both to train and to test on, and {example}; {number}: remove one of each two, "
            "or leave them out of the test split with --leave_out copies"
        )
    if treatment == "report":
        return test, f"{number} ({example}), as published; --leave_out copies leaves them out"
    return test.take((~is_copy).nonzero().flatten()), f"{number} and left out ({example})"


def _copies(samples: Mapping[str, Samples], decoded: Mapping[str, _Decoded] | None, form: Format) -> dict[int, int]:
    """Return the test rows whose image is also a training image, with the row of the training image.

    Images are compared by the content of their files, or by their pixels if they are decoded.
    """
    if decoded is None:
        rows = {name: part.rows.unique().tolist() for name, part in samples.items()}
        contents = _content_keys(*((part.images, rows[name]) for name, part in samples.items()))
        keys = dict(zip(samples, contents, strict=True))
    else:
        rows = {name: indices.tolist() for name, (_, indices) in decoded.items()}
        keys = {name: [_pixel_key(image) for image in images.numpy()] for name, (images, _) in decoded.items()}
    rows_of = defaultdict(list)
    for row, key in zip(rows["test"], keys["test"], strict=True):
        if key is not None:
            rows_of[key].append(row)
    copies = {}
    for name in (name for name in samples if name != "test"):
        for row, key in zip(rows[name], keys[name], strict=True):
            for test_row in rows_of.get(key or b"", ()):
                if decoded is None or form == Format() or _same_pixels(samples[name], row, samples["test"], test_row):
                    copies[test_row] = row
    return copies


def _copy_groups(samples: Samples) -> Tensor:
    """Return for each sample of one image (N,) the position of the first one with the same image, by files' content."""
    (keys,) = _content_keys((samples.images, samples.rows.flatten().tolist()))
    first: dict[bytes, int] = {}
    return torch.tensor([index if key is None else first.setdefault(key, index) for index, key in enumerate(keys)])


def _content_keys(*tables: tuple[Images, Sequence[int]]) -> list[list[bytes | None]]:
    """Return keys of images, equal for equal content of files; None for an image that is unique or of one colour."""
    fingerprints = [list(images.fingerprints(rows)) for images, rows in tables]
    counts = Counter(chain(*fingerprints))
    is_plain: dict[bytes, bool] = {}
    keys: list[list[bytes | None]] = []
    for (images, rows), values in zip(tables, fingerprints, strict=True):
        keys.append([None] * len(rows))
        for index, (row, fingerprint) in enumerate(zip(rows, values, strict=True)):
            if counts[fingerprint] > 1:  # nearly always a copy: large files are read as a whole only now
                key = hashlib.blake2b(images.content(row)).digest()
                if key not in is_plain:
                    (pixels,) = images.read([row])
                    is_plain[key] = bool((pixels == pixels[:1, :1]).all())
                keys[-1][index] = None if is_plain[key] else key
    return keys


def _pixel_key(image: np.ndarray) -> bytes | None:
    return None if (image == image[:, :1, :1]).all() else hashlib.blake2b(np.ascontiguousarray(image).data).digest()


def _same_pixels(train: Samples, row: int, test: Samples, test_row: int) -> bool:
    """Return whether two images are equal before scaling, which may have made them equal."""
    return np.array_equal(next(train.images.read([row])), next(test.images.read([test_row])))
