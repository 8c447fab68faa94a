"""Selection of the samples of each split from labels alone, before images are decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from neuralcollapse.lab.config import DataSettings, derived_seed
from neuralcollapse.lab.data.images import Images
from neuralcollapse.lab.settings import closest_names

# Seed for drawing parts of a data set, so that the selected images never change.
_PART_SEED = 0
# A classifier with more classes, with its means and moments, does not fit into memory.
_MOST_CLASSES = 10**6


@dataclass(frozen=True)
class Samples:
    """Table of images, rows (N, k) of the images of each sample from left to right, and labels (N,)."""

    images: Images
    rows: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Samples:
        """Return the samples at these indices."""
        return Samples(self.images, self.rows[indices], self.labels[indices])


def count_classes(num_classes: int, digits_per_image: int) -> int:
    """Return the number of classes with the given number of images side by side.

    Raises:
        ValueError: if a classifier for them does not fit into memory.
    """
    total = num_classes**digits_per_image
    if digits_per_image > 1 and total > _MOST_CLASSES:
        raise ValueError(
            f"digits_per_image must give at most {_MOST_CLASSES} classes, "
            f"got {digits_per_image}: {num_classes}^{digits_per_image} = {total}"
        )
    return total


def class_numbers(classes: Sequence[str], class_names: Sequence[str]) -> list[int]:
    """Return the numbers of the classes to hold out, in ascending order.

    Args:
        classes: Names of classes; or their numbers from 0, unless a class of the data has a number for its name.
        class_names: Names of all classes, in order.

    Raises:
        ValueError: if a class does not exist or is given twice, or fewer than two other classes remain.

    Examples:
        >>> class_numbers(["2", "cat"], ["bird", "cat", "dog", "frog"])
        [1, 2]
    """
    number_of = {name: number for number, name in enumerate(class_names)}
    if not any(name.isdecimal() for name in class_names):
        number_of |= {str(number): number for number in range(len(class_names))}
    if unknown := [name for name in classes if name not in number_of]:
        raise ValueError(
            f"hold_out_classes must be among the {len(class_names)} classes of the data, got {unknown[0]!r}"
            f"{closest_names(unknown[0], class_names)}"
        )
    numbers = sorted({number_of[name] for name in classes})
    if len(numbers) < len(classes):
        raise ValueError(f"hold_out_classes must be distinct, got {', '.join(classes)}")
    if len(numbers) > len(class_names) - 2:
        raise ValueError(
            f"hold_out_classes must leave at least 2 of the {len(class_names)} classes, got {', '.join(classes)}"
        )
    return numbers


def divide_classes(samples: Samples, classes: Sequence[int], num_classes: int) -> tuple[Samples, Samples]:
    """Return the samples of the other classes, whose labels are their positions among these, and those of the classes.

    Args:
        samples: Samples of one image each.
        classes: Numbers of some classes, ascending.
        num_classes: Number of all classes.
    """
    is_other = ~torch.isin(samples.labels, torch.tensor(classes))
    others = torch.tensor([number for number in range(num_classes) if number not in classes])
    known, unknown = (samples.take(mask.nonzero().flatten()) for mask in (is_other, ~is_other))
    return replace(known, labels=torch.searchsorted(others, known.labels)), unknown


def select(
    train: Samples,
    test: Samples,
    num_classes: int,
    config: DataSettings,
    copy_groups: Callable[[Samples], Tensor] | None = None,
) -> dict[str, Samples]:
    """Choose the samples of each split.

    The train split is limited per class, made imbalanced and limited in total; then the validation split is taken out
    of it, and the labels of the remaining train split are replaced by random ones. Other splits keep their true labels.

    Args:
        train: The samples of the train split, of one image each.
        test: Those of the test split.
        num_classes: The number of their classes.
        config: What to choose.
        copy_groups: A function that gives copies of one image equal numbers (N,), so that a validation split has none
            of a training image.
    """
    total = num_classes**config.digits_per_image
    train = _side_by_side(train, num_classes, config, config.train_samples, "train")
    if config.samples_per_class is not None:
        train = train.take((_rank_in_class(train.labels) < config.samples_per_class).nonzero().flatten())
    for kind, factor in (config.imbalance or {}).items():
        train = train.take(long_tail(train.labels, total, kind, factor, _generator(config.data_seed, "long tail")))
    train = train.take(subset(train.labels, config.train_samples))
    splits = {"train": train}
    if config.validation_share is not None:
        groups = copy_groups(train) if copy_groups is not None and config.digits_per_image == 1 else None
        generator = _generator(config.data_seed, "validation")
        kept, held_out = hold_out(train.labels, config.validation_share, generator, groups)
        splits = {"train": train.take(kept), "validation": train.take(held_out)}
    labels = splits["train"].labels
    if config.label_noise == "permuted":
        labels = labels[torch.randperm(len(labels), generator=_generator(config.data_seed, "random labels"))]
    elif config.label_noise:
        labels = noisy_labels(labels, total, config.label_noise, _generator(config.data_seed, "label noise"))
    splits["train"] = replace(splits["train"], labels=labels)
    test = _side_by_side(test, num_classes, config, config.test_samples, "test")
    return splits | {"test": test.take(subset(test.labels, config.test_samples))}


def stratified_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random order in which any n consecutive samples hold n·n_k/N ± 1 samples of class k.

    The i-th sample of class k, counted in a random order, is at position (i + u_k)/n_k, with u_k uniform in [0, 1).
    """
    shuffled = torch.randperm(len(labels), generator=generator)
    _, codes, counts = labels[shuffled].unique(return_inverse=True, return_counts=True)
    start = torch.rand(len(counts), generator=generator, dtype=torch.float64)
    return shuffled[((_rank_in_class(codes) + start[codes]) / counts[codes]).argsort(stable=True)]


def hold_out(
    labels: Tensor, share: float = 0.2, generator: torch.Generator | None = None, groups: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return indices of a part to keep and a part to hold out, with classes in proportion; by default always equal.

    If ``groups`` (N,) are given, samples with equal values are in the same part.
    """
    first = torch.arange(len(labels))
    if groups is not None:
        _, codes = groups.unique(return_inverse=True)
        first = first.scatter_reduce(0, codes, first, "amin", include_self=False)[codes]
    leaders = (first == torch.arange(len(labels))).nonzero().flatten()
    order = leaders[stratified_order(labels[leaders], generator or torch.Generator().manual_seed(_PART_SEED))]
    is_held_out = torch.zeros(len(labels), dtype=torch.bool)
    is_held_out[order[: round(len(leaders) * share)]] = True
    is_held_out = is_held_out[first]
    return (~is_held_out).nonzero().flatten(), is_held_out.nonzero().flatten()


def subset(labels: Tensor, limit: int | None) -> Tensor:
    """Return indices of at most ``limit`` samples, every class in proportion."""
    if limit is None or limit >= len(labels):
        return torch.arange(len(labels))
    return stratified_order(labels, torch.Generator().manual_seed(_PART_SEED))[:limit].sort().values


def long_tail(labels: Tensor, num_classes: int, kind: str, factor: float, generator: torch.Generator) -> Tensor:
    """Return indices of samples whose classes differ in size as in Cao et al. (2019), at least one of each class.

    With n the size of the largest class and f the factor, class k of K keeps n·f^(k/(K−1)) samples (``exponential``);
    or the first K//2 classes keep n and the others n·f (``step``).
    """
    largest = int(labels.bincount().max())
    position = torch.arange(num_classes, dtype=torch.float64)
    is_step = kind == "step"
    exponent = (position >= num_classes // 2).double() if is_step else position / max(num_classes - 1, 1)
    # Rounded down as in the published code, except that 100·0.29 is 29 although its floating-point product is less.
    sizes = (largest * factor**exponent + 1e-9).long().clamp(min=1)
    shuffled = torch.randperm(len(labels), generator=generator)
    return shuffled[_rank_in_class(labels[shuffled]) < sizes[labels[shuffled]]].sort().values


def noisy_labels(labels: Tensor, num_classes: int, level: float, generator: torch.Generator) -> Tensor:
    """Return labels of which the share ``level`` is replaced by ones drawn among all classes, the true one included.

    A label that is replaced at one level is replaced by the same one at every higher level.
    """
    order = torch.randperm(len(labels), generator=generator)
    drawn = torch.randint(num_classes, (len(labels),), generator=generator)
    replaced = order[: round(level * len(labels))]
    return labels.index_copy(0, replaced, drawn[replaced])


def _side_by_side(source: Samples, num_classes: int, config: DataSettings, number: int | None, split: str) -> Samples:
    """Return samples of k images each, drawn one by one; the digits to base C of a sample's label are their labels."""
    if config.digits_per_image == 1:
        return source
    shape = (number or len(source), config.digits_per_image)
    drawn = torch.randint(len(source), shape, generator=_generator(config.data_seed, f"images side by side, {split}"))
    place_values = num_classes ** torch.arange(config.digits_per_image - 1, -1, -1)
    return Samples(source.images, source.rows[drawn].flatten(1), (source.labels[drawn] * place_values).sum(1))


def _rank_in_class(labels: Tensor) -> Tensor:
    """Return for each sample the number of samples of its class before it."""
    by_class = labels.argsort(stable=True)
    _, codes, counts = labels[by_class].unique_consecutive(return_inverse=True, return_counts=True)
    ranks = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[codes]
    return torch.empty_like(ranks).index_copy_(0, by_class, ranks)


def _generator(seed: int | None, purpose: str) -> torch.Generator:
    """Return a separate generator for each purpose, so that additional draws do not change others."""
    return torch.Generator().manual_seed(derived_seed(seed or 0, *purpose.encode()))
