"""Copies of images: within a table, and between those to train on and those to test on."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from neuralcollapse.lab.data.decoding import Images

# An image of a single colour has nothing to be recognised by: it is never taken for a copy.


def copy_groups(images: Images, rows: Tensor) -> Tensor:
    """For each row (N,) the place of the first one with the same image, by the content of files: (N,)."""
    groups = torch.arange(len(rows))
    places = defaultdict(list)
    for place, key in enumerate(images.fingerprints(rows.tolist())):
        places[key].append(place)
    for alike in (each for each in places.values() if len(each) > 1):
        by_content = defaultdict(list)
        for place in alike:
            by_content[hashlib.blake2b(images.content(int(rows[place]))).digest()].append(place)
        for same in by_content.values():
            if len(same) > 1 and not _is_plain(images, int(rows[same[0]])):
                groups[same] = same[0]
    return groups


def stored_copies(train: tuple[Images, Sequence[int]], test: tuple[Images, Sequence[int]]) -> Iterator[tuple[int, int]]:
    """Rows to train on and rows to test on that hold the same image, by the content of files."""
    (first, train_rows), (second, test_rows) = train, test
    wanted = defaultdict(list)
    for row, key in zip(test_rows, second.fingerprints(test_rows), strict=True):
        wanted[key].append(row)
    for row, key in zip(train_rows, first.fingerprints(train_rows), strict=True):
        content = first.content(row) if key in wanted else b""
        for other in wanted.get(key, ()):
            if second.content(other) == content and not _is_plain(first, row):
                yield row, other


def decoded_copies(
    train: tuple[Tensor, Sequence[int]], test: tuple[Tensor, Sequence[int]]
) -> Iterator[tuple[int, int]]:
    """Rows to train on and rows to test on whose images (N, C, H, W) have the same pixels."""
    wanted = defaultdict(list)
    for row, key in zip(test[1], _pixel_keys(test[0]), strict=True):
        if key is not None:
            wanted[key].append(row)
    for row, key in zip(train[1], _pixel_keys(train[0]), strict=True):
        for other in wanted.get(key or b"", ()):
            yield row, other


def same_pixels(first: Images, row: int, second: Images, other: int) -> bool:
    """Return whether two images are the same before they are scaled."""
    (one,), (two,) = first.read([row]), second.read([other])
    return np.array_equal(one, two)


def _pixel_keys(images: Tensor) -> Iterator[bytes | None]:
    for image in images.numpy():
        plain = bool((image == image[:, :1, :1]).all())
        yield None if plain else hashlib.blake2b(np.ascontiguousarray(image).data).digest()


def _is_plain(images: Images, row: int) -> bool:
    (pixels,) = images.read([row])
    return bool((pixels == pixels[:1, :1]).all())
