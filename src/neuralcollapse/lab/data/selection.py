"""Which samples there are and with which labels: decided from labels alone, before any image is decoded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neuralcollapse.lab.config import DataSettings
from neuralcollapse.lab.seeds import derived_seed

# Parts of a data set are drawn with this seed, so that which images they hold never changes.
_PART_SEED = 0
# A classifier of more classes, with its means and moments, does not fit in memory.
_MOST_CLASSES = 10**6


@dataclass(frozen=True)
class Samples:
    """Which rows of a table of images make each sample, from left to right, (N, k), and its label, (N,)."""

    rows: Tensor
    labels: Tensor
    groups: Tensor | None = None
    """Equal numbers (N,) for samples of the same image, where that is known."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Samples:
        """The samples at these indices."""
        return Samples(self.rows[indices], self.labels[indices], None if self.groups is None else self.groups[indices])


def count_classes(num_classes: int, digits_per_image: int) -> int:
    """The classes of so many images side by side.

    Raises:
        ValueError: Too many for a classifier.
    """
    total = num_classes**digits_per_image
    if digits_per_image > 1 and total > _MOST_CLASSES:
        raise ValueError(
            f"digits_per_image must give at most {_MOST_CLASSES} classes, "
            f"got {digits_per_image}: {num_classes}^{digits_per_image} = {total}"
        )
    return total


def choose_train(source: Samples, num_classes: int, config: DataSettings) -> Samples:
    """The samples to train on, out of those of the train split.

    Args:
        source: One image each.
        num_classes: Of the source.
        config: What to make of them.
    """
    samples = _selected(source, num_classes, config)
    num_classes **= config.digits_per_image
    if config.validation_share is not None:
        samples = samples.take(_validation_parts(samples, config)[0])
    labels = samples.labels
    if config.random_labels:
        labels = labels[torch.randperm(len(labels), generator=_generator(config.data_seed, "random labels"))]
    if config.label_noise:
        labels = noisy_labels(labels, num_classes, config.label_noise, _generator(config.data_seed, "label noise"))
    return Samples(samples.rows, labels)


def choose_validation(source: Samples, num_classes: int, config: DataSettings) -> Samples | None:
    """The samples held out of the train split, with their true labels; None where none are."""
    if config.validation_share is None:
        return None
    samples = _selected(source, num_classes, config)
    return samples.take(_validation_parts(samples, config)[1])


def choose_test(source: Samples, num_classes: int, config: DataSettings) -> Samples:
    """The samples to test on, out of those of the test split; their labels are always the true ones."""
    samples = _side_by_side(source, num_classes, config, config.test_samples, "test")
    return samples.take(subset(samples.labels, config.test_samples))


def stratified_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A random order in which any stretch of n samples holds n·n_k/N ± 1 samples of class k.

    The i-th sample of class k, counted in a random order, stands at (i + u_k)/n_k, with u_k uniform in [0, 1).
    """
    shuffled = torch.randperm(len(labels), generator=generator)
    _, codes, counts = labels[shuffled].unique(return_inverse=True, return_counts=True)
    start = torch.rand(len(counts), generator=generator, dtype=torch.float64)
    return shuffled[((_rank_in_class(codes) + start[codes]) / counts[codes]).argsort(stable=True)]


def balanced_order(
    labels: Tensor, batches: int, classes_per_batch: int, per_class: int, generator: torch.Generator
) -> Tensor:
    """Indices for the given number of batches, each of equally many samples of some classes, in order.

    Classes come in rounds of all of them, and the samples of a class in rounds of all of its samples, so that the
    classes of a batch are different ones, and its samples wherever a class has enough.
    """
    classes = labels.unique().tolist()
    samples = {label: _Rounds((labels == label).nonzero().flatten().tolist(), generator) for label in classes}
    rounds, order = _Rounds(classes, generator), []
    for _ in range(batches):
        batch = [index for label in rounds.take(classes_per_batch) for index in samples[label].take(per_class)]
        order += [batch[place] for place in torch.randperm(len(batch), generator=generator).tolist()]
    return torch.tensor(order)


class _Rounds:
    """Items in random order, round after round."""

    def __init__(self, items: list[int], generator: torch.Generator) -> None:
        self._items, self._generator = items, generator
        self._left: list[int] = []

    def take(self, number: int) -> list[int]:
        """Return the next items, each at most once more often than another."""
        rounds, rest = divmod(number, len(self._items))
        next_ones, self._left = self._left[:rest], self._left[rest:]
        missing = rest - len(next_ones)
        if missing:
            order = torch.randperm(len(self._items), generator=self._generator).tolist()
            shuffled = [self._items[place] for place in order]
            fresh = _without(shuffled, next_ones)[:missing]
            self._left = _without(shuffled, fresh)
            next_ones += fresh
        return self._items * rounds + next_ones


def _without(items: list[int], left_out: list[int]) -> list[int]:
    there = set(left_out)
    return [item for item in items if item not in there]


def hold_out(
    labels: Tensor, share: float = 0.2, generator: torch.Generator | None = None, groups: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Indices of a part to keep and of one that is held out, every class in proportion; the same ones by default.

    Samples of equal ``groups`` (N,), if those are given, are in the same part.
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
    """Indices of at most ``limit`` samples, every class in proportion."""
    if limit is None or limit >= len(labels):
        return torch.arange(len(labels))
    return stratified_order(labels, torch.Generator().manual_seed(_PART_SEED))[:limit].sort().values


def first_of_each_class(labels: Tensor, number: int) -> Tensor:
    """Indices of the first so many samples of each class, or of all that it has."""
    return (_rank_in_class(labels) < number).nonzero().flatten()


def long_tail(labels: Tensor, num_classes: int, config: DataSettings) -> Tensor:
    """Indices of samples whose classes differ in size as in Cao et al. (2019); no class is left without.

    With n the size of the largest class and f the factor, class k of K keeps n·f^(k/(K−1)) samples (exponential); or
    the first K//2 classes keep n and the others n·f (step). Which ones is drawn from the seed.
    """
    largest = int(labels.bincount().max())
    position = torch.arange(num_classes, dtype=torch.float64)
    exponential = config.imbalance == "exponential"
    exponent = position / max(num_classes - 1, 1) if exponential else (position >= num_classes // 2).double()
    # Cut off as in the published code, but 100·0.29 is 29 though its floating-point product is less.
    factor = 1.0 if config.imbalance_factor is None else config.imbalance_factor
    kept = (largest * factor**exponent + 1e-9).long().clamp(min=1)
    shuffled = torch.randperm(len(labels), generator=_generator(config.data_seed, "long tail"))
    return shuffled[_rank_in_class(labels[shuffled]) < kept[labels[shuffled]]].sort().values


def noisy_labels(labels: Tensor, num_classes: int, level: float, generator: torch.Generator) -> Tensor:
    """Labels of which the share ``level`` is replaced by ones drawn among all classes, the true one too.

    What is replaced at one level is replaced alike at every higher one.
    """
    order = torch.randperm(len(labels), generator=generator)
    drawn = torch.randint(num_classes, (len(labels),), generator=generator)
    replaced = order[: round(level * len(labels))]
    return labels.index_copy(0, replaced, drawn[replaced])


def _selected(source: Samples, num_classes: int, config: DataSettings) -> Samples:
    """Those of the train split that the settings leave, with their true labels."""
    samples = _side_by_side(source, num_classes, config, config.train_samples, "train")
    if config.samples_per_class is not None:
        samples = samples.take(first_of_each_class(samples.labels, config.samples_per_class))
    if config.imbalance != "none":
        samples = samples.take(long_tail(samples.labels, num_classes**config.digits_per_image, config))
    return samples.take(subset(samples.labels, config.train_samples))


def _validation_parts(samples: Samples, config: DataSettings) -> tuple[Tensor, Tensor]:
    generator = _generator(config.data_seed, "validation")
    return hold_out(samples.labels, config.validation_share or 0.0, generator, samples.groups)


def _side_by_side(source: Samples, num_classes: int, config: DataSettings, number: int | None, split: str) -> Samples:
    """Samples of k images each, drawn one by one; their labels are the digits, to base C, of the sample's label."""
    if config.digits_per_image == 1:
        return source
    shape = (number or len(source), config.digits_per_image)
    drawn = torch.randint(len(source), shape, generator=_generator(config.data_seed, f"images side by side, {split}"))
    place_values = num_classes ** torch.arange(config.digits_per_image - 1, -1, -1)
    return Samples(source.rows[drawn].flatten(1), (source.labels[drawn] * place_values).sum(1))


def _rank_in_class(labels: Tensor) -> Tensor:
    """How many samples of the same class come before each sample."""
    by_class = labels.argsort(stable=True)
    _, codes, counts = labels[by_class].unique_consecutive(return_inverse=True, return_counts=True)
    ranks = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[codes]
    return torch.empty_like(ranks).index_copy_(0, by_class, ranks)


def _generator(seed: int | None, purpose: str) -> torch.Generator:
    """A generator of its own for each purpose, so that asking for one thing more changes nothing else."""
    return torch.Generator().manual_seed(derived_seed(seed or 0, *purpose.encode()))
