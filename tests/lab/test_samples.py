from __future__ import annotations

import pytest
import torch

from helpers import generator
from neuralcollapse.lab.config import DataSettings
from neuralcollapse.lab.data.images import ArrayImages
from neuralcollapse.lab.data.selection import Samples, count_classes, hold_out, select, stratified_order


def source_of(*counts: int) -> Samples:
    """A shuffled table with the given number of images of each class."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=generator())]
    return Samples(ArrayImages([], "none"), torch.arange(len(labels))[:, None] + 1000, labels)


def train(source: Samples, num_classes: int, **settings) -> Samples:
    return select(source, source, num_classes, DataSettings(**settings))["train"]


def chosen_test(source: Samples, num_classes: int, **settings) -> Samples:
    return select(source, source, num_classes, DataSettings(**settings))["test"]


def counts_of(samples: Samples) -> list[int]:
    return samples.labels.bincount().tolist()


def same_images(first: Samples, second: Samples) -> bool:
    return torch.equal(first.rows, second.rows)


def test_stratified_order_spreads_a_rare_class():
    labels = torch.tensor([0] * 96 + [1] * 4)
    places = (labels[stratified_order(labels, generator())] == 1).nonzero().flatten()
    assert torch.equal(places // 25, torch.arange(4))


def test_any_stretch_of_a_stratified_order_holds_the_classes_in_proportion():
    labels = source_of(300, 500, 200).labels
    ordered = labels[stratified_order(labels, generator())]
    for stretch in ordered.split(50):
        assert (stretch.bincount(minlength=3) - torch.tensor([15, 25, 10])).abs().max() <= 1


def test_the_held_out_part_is_a_fifth_of_each_class_and_nothing_is_in_both():
    labels = source_of(50, 100).labels
    kept, held_out = hold_out(labels)
    assert labels[held_out].bincount().tolist() == [10, 20]
    assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(150))


def test_by_default_all_samples_are_taken_as_they_are():
    source = source_of(3, 5)
    samples = train(source, 2)
    assert same_images(samples, source)
    assert torch.equal(samples.labels, source.labels)


def test_the_first_samples_of_each_class_are_taken_in_order():
    source = source_of(9, 2, 7)
    samples = train(source, 3, samples_per_class=4)
    for label, number in enumerate([4, 2, 4]):
        assert torch.equal(samples.rows[samples.labels == label], source.rows[source.labels == label][:number])
    assert torch.equal(samples.rows, samples.rows.sort(dim=0).values)


def test_the_exponential_tail_of_cifar10_is_the_published_one():
    # Cao et al. (2019), CIFAR-10-LT with a factor of 100.
    samples = train(source_of(*[5000] * 10), 10, imbalance={"exponential": 0.01})
    assert counts_of(samples) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


def test_step_imbalance_makes_the_second_half_of_the_classes_small():
    assert counts_of(train(source_of(*[100] * 5), 5, imbalance={"step": 0.29})) == [100] * 2 + [29] * 3


def test_a_tail_asks_for_no_more_than_there_is_and_leaves_one_of_each_class():
    samples = train(source_of(20, 1000, 3, 500), 4, imbalance={"exponential": 0.001})
    assert counts_of(samples) == [20, 100, 3, 1]


def test_which_samples_the_tail_keeps_follows_from_the_data_seed():
    source, settings = source_of(100, 100), {"imbalance": {"step": 0.3}}
    samples = train(source, 2, **settings)
    assert same_images(samples, train(source, 2, **settings))
    assert not same_images(samples, train(source, 2, **settings, data_seed=1))


def test_images_side_by_side_are_the_digits_of_the_label():
    source = source_of(40, 30, 30)
    label_of = dict(zip(source.rows.flatten().tolist(), source.labels.tolist(), strict=True))
    samples = train(source, 3, digits_per_image=3, train_samples=500)
    assert samples.rows.shape == (500, 3)
    for row, label in zip(samples.rows.tolist(), samples.labels.tolist(), strict=True):
        assert label == int("".join(str(label_of[image]) for image in row), base=3)


def test_images_are_put_side_by_side_uniformly():
    samples = train(source_of(*[10] * 10), 10, digits_per_image=2, train_samples=50_000)
    assert samples.labels.bincount(minlength=100).float().std() < 1.5 * 500**0.5
    assert samples.rows.flatten().bincount().max() < 1000 + 6 * 1000**0.5


def test_as_many_images_side_by_side_are_drawn_as_there_are_single_ones():
    source = source_of(8, 9)
    assert len(train(source, 2, digits_per_image=2)) == 17
    assert len(chosen_test(source, 2, digits_per_image=2)) == 17
    assert len(chosen_test(source, 2, digits_per_image=2, test_samples=30)) == 30


def test_train_and_test_are_drawn_independently_from_the_data_seed():
    source, settings = source_of(50, 50), {"digits_per_image": 2}
    assert not same_images(train(source, 2, **settings), chosen_test(source, 2, **settings))
    assert same_images(train(source, 2, **settings), train(source, 2, **settings))
    assert not same_images(train(source, 2, **settings, data_seed=1), train(source, 2, **settings))


def test_more_classes_than_fit_are_refused():
    assert count_classes(10, 6) == 10**6
    with pytest.raises(
        ValueError, match=r"digits_per_image must give at most 1000000 classes, got 7: 10\^7 = 10000000"
    ):
        count_classes(10, 7)


def test_random_labels_are_a_permutation_of_the_labels_of_the_samples_that_are_trained_on():
    source = source_of(500, 300, 200)
    settings = {"train_samples": 400, "imbalance": {"step": 0.5}}
    true, random = train(source, 3, **settings), train(source, 3, **settings, label_noise="permuted")
    assert same_images(true, random)
    assert counts_of(true) == counts_of(random)
    chance = sum((count / len(true)) ** 2 for count in counts_of(true))
    assert (true.labels == random.labels).double().mean() == pytest.approx(chance, abs=0.12)
    other = train(source, 3, **settings, label_noise="permuted", data_seed=1)
    assert not torch.equal(random.labels, other.labels)


def test_label_noise_replaces_its_share_of_labels():
    source = source_of(*[1000] * 5)
    for level in (0.2, 1.0):
        changed = (train(source, 5, label_noise=level).labels != source.labels).double().mean()
        assert changed == pytest.approx(level * 4 / 5, abs=0.03)  # one in five is drawn as it was


def test_what_is_noise_at_one_level_is_the_same_noise_at_a_higher_one():
    source = source_of(300, 300)
    less, more = (train(source, 2, label_noise=level).labels for level in (0.3, 0.6))
    changed = less != source.labels
    assert torch.equal(more[changed], less[changed])


def test_the_test_split_keeps_its_labels_and_its_classes():
    source = source_of(60, 40)
    changed = {"label_noise": 0.5, "imbalance": {"step": 0.01}, "samples_per_class": 3}
    samples = chosen_test(source, 2, **changed, test_samples=50)
    assert counts_of(samples) == [30, 20]
    assert torch.equal(samples.labels, source.labels[samples.rows.flatten() - 1000])
