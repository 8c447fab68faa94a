from __future__ import annotations

import pytest
import torch

from helpers import generator
from neuralcollapse.lab.config import BatchSettings, RunConfig
from neuralcollapse.lab.data.batches import (
    EpochBatches,
    EvaluationBatches,
    Standardisation,
    augment,
    batch_shape,
    centre_crop,
    crop,
    cut_out,
    draw_augmentation,
    evaluation_batches,
    reflected,
    rotate,
    standardisation,
)
from neuralcollapse.lab.data.images import ImageData, Split
from neuralcollapse.lab.training.run import Run


def images_of(number: int = 20, channels: int = 3, height: int = 7, width: int = 5) -> torch.Tensor:
    return torch.randint(256, (number, channels, height, width), dtype=torch.uint8, generator=generator())


def augmented(images: torch.Tensor, settings: BatchSettings, seed: int = 0) -> torch.Tensor:
    drawn = draw_augmentation(len(images), tuple(images.shape[1:]), settings, generator(seed))
    return augment(images, settings, drawn)


def numbered_split(counts: tuple[int, ...] = (30, 50, 20)) -> Split:
    """Each image's only pixel is its number, so that a batch says which samples it holds."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return Split(torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None], labels)


def epoch_of(seed: int = 0, epoch: int = 0, split: Split | None = None, **settings) -> list[list[int]]:
    identity = Standardisation(torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    batches = EpochBatches(
        split or numbered_split(), identity, BatchSettings(**{"batch_size": 10} | settings), seed, epoch
    )
    return [images.flatten().int().tolist() for images, _ in batches]


def test_batches_follow_from_seed_and_epoch_alone():
    first = epoch_of(seed=1, epoch=2)
    torch.manual_seed(7)  # the global generator has no effect
    assert epoch_of(seed=1, epoch=2) == first
    assert epoch_of(seed=1, epoch=3) != first
    assert epoch_of(seed=2, epoch=2) != first
    assert epoch_of(seed=2, epoch=1) != first


def test_drawing_batches_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    epoch_of(augmentation={"flip": True})
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("stratified", [False, True])
def test_an_epoch_holds_every_sample_once(stratified):
    numbers = [number for batch in epoch_of(sampling="stratified" if stratified else "random") for number in batch]
    assert sorted(numbers) == list(range(100))


def test_the_last_batch_may_be_smaller_and_one_sample_joins_the_batch_before():
    assert [len(batch) for batch in epoch_of(batch_size=40)] == [40, 40, 20]
    assert [len(batch) for batch in epoch_of(batch_size=33)] == [33, 33, 34]
    assert [len(batch) for batch in epoch_of(batch_size=150)] == [100]


@pytest.mark.parametrize(
    ("samples", "batch_size", "stratified", "number", "sizes"),
    [
        (60_000, 2048, False, 30, {2048, 608}),  # L-BFGS on MNIST
        (50_000, 2048, False, 25, {2048, 848}),  # and on CIFAR-10
        (60_000, 256, True, 234, {256, 257}),  # MNIST
        (5_000, 256, True, 19, {263, 264}),  # STL-10
    ],
)
def test_the_batches_of_an_epoch_are_the_published_ones(samples, batch_size, stratified, number, sizes):
    split = Split(torch.zeros(samples, 1, 1, 1, dtype=torch.uint8), torch.arange(samples) % 10)
    batches = epoch_of(split=split, batch_size=batch_size, sampling="stratified" if stratified else "random")
    assert len(batches) == number
    assert {len(batch) for batch in batches} == sizes
    assert sum(map(len, batches)) == samples


def test_stratified_batches_hold_the_classes_in_proportion():
    split = numbered_split((30, 50, 20))
    for batch in epoch_of(split=split, sampling="stratified"):
        counts = split.labels[batch].bincount(minlength=3)
        assert (counts - torch.tensor([3, 5, 2])).abs().max() <= 1


def test_balanced_batches_hold_as_many_samples_of_each_of_their_classes():
    split = numbered_split((30, 50, 5, 15))
    drawn = torch.zeros(4)
    seen = torch.zeros(100)
    for epoch in range(30):
        batches = epoch_of(epoch=epoch, split=split, batch_size=9, sampling=3)
        assert len(batches) == 11
        for batch in batches:
            assert len(set(batch)) == 9  # every class has three
            counts = split.labels[batch].bincount(minlength=4)
            assert sorted(counts.tolist()) == [0, 3, 3, 3]
            drawn += counts > 0
            seen += torch.tensor(batch).bincount(minlength=100)
    assert (drawn - drawn.mean()).abs().max() <= 30  # a round of classes at a time: one apart in an epoch
    for label in range(4):  # and the samples of a class alike
        assert seen[split.labels == label].std() < 0.2 * seen[split.labels == label].mean()


def test_balanced_batches_follow_from_seed_and_epoch_alone():
    options = {"batch_size": 6, "sampling": 2}
    first = epoch_of(seed=1, epoch=2, **options)
    torch.manual_seed(7)
    assert epoch_of(seed=1, epoch=2, **options) == first
    assert epoch_of(seed=1, epoch=3, **options) != first


def test_a_class_with_too_few_samples_repeats_them_evenly():
    split = numbered_split((2, 40))
    for batch in epoch_of(split=split, batch_size=10, sampling=2):
        assert sorted(index for index in batch if index < 2) in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])
        assert len({index for index in batch if index >= 2}) == 5


def test_balanced_batches_resume_inside_an_epoch_and_are_split_over_ranks():
    split, identity = numbered_split(), Standardisation(torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    settings = BatchSettings(batch_size=8, sampling=2)
    whole = [images.flatten().int().tolist() for images, _ in EpochBatches(split, identity, settings, 0, 0)]
    assert EpochBatches(split, identity, settings, 0, 0).sizes == [8] * len(whole)
    rest = EpochBatches(split, identity, settings, 0, 0, done=5)
    assert [images.flatten().int().tolist() for images, _ in rest] == whole[5:]
    parts = [EpochBatches(split, identity, settings, 0, 0, rank=rank, ranks=2) for rank in (0, 1)]
    joined = [
        [*one[0].flatten().int().tolist(), *other[0].flatten().int().tolist()]
        for one, other in zip(*parts, strict=True)
    ]
    assert joined == whole


def test_more_classes_in_a_batch_than_there_are_is_refused():
    data = ImageData("own", *(Split(images_of(number), torch.arange(number) % 4) for number in (20, 8)), 4)
    with pytest.raises(ValueError, match="classes_per_batch must be at most the number of classes with training"):
        Run(RunConfig(batch_size=10, sampling=5), data)


def test_standardised_images_have_mean_0_and_variance_1_in_each_channel():
    images = images_of(50)
    images[:, 2] = 9  # a channel that never varies
    standardised = Standardisation.of(images.split(16))(images)
    assert torch.allclose(standardised.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(standardised.var((0, 2, 3), correction=0), torch.tensor([1.0, 1.0, 0.0]), atol=1e-5)


def test_evaluation_batches_hold_every_sample_in_order_without_augmentation():
    split = numbered_split()
    batches = EvaluationBatches(split, Standardisation(torch.zeros(1, 1, 1), torch.ones(1, 1, 1)), batch_size=30)
    assert len(batches) == 4
    assert torch.cat([images for images, _ in batches]).flatten().tolist() == list(range(100))
    assert torch.equal(torch.cat([labels for _, labels in batches]), split.labels)


def test_crop_equals_a_loop_over_padded_images():
    images, padding = images_of(), 2
    top, left = torch.randint(5, (2, len(images)), generator=generator(1))
    padded = torch.zeros(20, 3, 11, 9, dtype=torch.uint8)
    padded[:, :, 2:9, 2:7] = images
    expected = [image[:, i : i + 7, j : j + 5] for image, i, j in zip(padded, top.tolist(), left.tolist(), strict=True)]
    assert torch.equal(crop(images, padding, top, left, (7, 5)), torch.stack(expected))


def test_crop_by_the_padding_itself_is_the_identity():
    images = images_of()
    middle = torch.full((20,), 2)
    assert torch.equal(crop(images, 2, middle, middle, (7, 5)), images)


@pytest.mark.parametrize("quarter_turns", [0, 1, 2, 3])
def test_rotation_by_right_angles_is_rot90(quarter_turns):
    images = images_of(height=6, width=6)
    turned = rotate(images, torch.full((20,), 90.0 * quarter_turns))
    assert torch.allclose(turned, torch.rot90(images.float(), quarter_turns, (2, 3)), atol=1e-2)


def test_rotation_keeps_the_shape_of_things_in_oblong_images():
    image = torch.zeros(1, 1, 21, 41)
    image[..., 10, 15:26] = 255  # a bar of 11 pixels about the centre
    turned = rotate(image, torch.tensor([90.0]))
    assert torch.allclose(turned[0, 0, 5:16, 20], torch.full((11,), 255.0), atol=1)
    assert turned.sum() == pytest.approx(255 * 11, rel=1e-3)


def test_flips_mirror_about_half_of_the_images_and_leave_the_others():
    images = images_of(400)
    flipped = augmented(images, BatchSettings(augmentation={"flip": True}), 3)
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert bool((same ^ mirrored).all())
    assert 150 < int(mirrored.sum()) < 250  # five standard deviations


def test_alternating_flips_mirror_a_random_half_and_the_others_in_the_next_epoch():
    split = Split(torch.arange(81 * 3).to(torch.uint8).view(81, 1, 1, 3), torch.zeros(81, dtype=torch.int64))
    identity = Standardisation(torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    settings = BatchSettings(batch_size=10, augmentation={"flip": "alternating"})
    mirrored = []
    for epoch in range(4):
        images = torch.cat([images for images, _ in EpochBatches(split, identity, settings, 5, epoch)]).view(81, 3)
        sample = ((images[:, 1] - 1) / 3).long()
        mirrored.append(torch.zeros(81).index_put((sample,), (images[:, 0] > images[:, 2]).float()))
    assert 25 <= mirrored[0].sum() <= 56
    assert torch.equal(mirrored[1], 1 - mirrored[0])
    assert torch.equal(mirrored[2], mirrored[0])
    assert torch.equal(mirrored[3], mirrored[1])


def test_padding_by_reflection_is_torchs():
    images = images_of()
    expected = torch.nn.functional.pad(images.float(), (3, 3, 3, 3), mode="reflect")
    assert torch.equal(reflected(images, 3).float(), expected)


def test_crops_of_reflected_images_are_windows_of_them():
    images = images_of(4)
    settings = BatchSettings(augmentation={"crop_padding": 2, "padding": "reflect"})
    drawn = draw_augmentation(4, (3, 7, 5), settings, generator())
    padded = reflected(images, 2)
    for image, whole, top, left in zip(
        augment(images, settings, drawn), padded, drawn["top"], drawn["left"], strict=True
    ):
        assert torch.equal(image, whole[:, top : top + 7, left : left + 5])


def test_a_square_inside_each_image_is_cut_out():
    settings = BatchSettings(augmentation={"cutout": 3})
    drawn = draw_augmentation(400, (2, 7, 5), settings, generator())
    cut = cut_out(torch.ones(400, 2, 7, 5), settings, drawn) == 0
    assert (cut.flatten(1).sum(1) == 2 * 9).all()
    rows, columns = cut.any(1).any(2), cut.any(1).any(1)
    for sides, offsets in ((rows, drawn["cut_top"]), (columns, drawn["cut_left"])):
        assert (sides.sum(1) == 3).all()
        assert torch.equal(sides.long().argmax(1), offsets)
    assert set(drawn["cut_top"].tolist()) == set(range(5))
    assert set(drawn["cut_left"].tolist()) == set(range(3))


def test_random_crops_reach_every_offset():
    image = torch.zeros(500, 1, 5, 5, dtype=torch.uint8)
    image[..., 2, 2] = 1
    places = augmented(image, BatchSettings(augmentation={"crop_padding": 1})).flatten(1).argmax(1)
    assert set(places.tolist()) == {row * 5 + column for row in (1, 2, 3) for column in (1, 2, 3)}


def test_no_augmentation_by_default():
    images = images_of()
    assert torch.equal(augmented(images, BatchSettings()), images)


def data_of(images: torch.Tensor) -> ImageData:
    labels = torch.arange(len(images)) % 2
    return ImageData("images", Split(images, labels), Split(images[:2], labels[:2]), 2)


def test_statistics_are_those_of_all_training_images():
    images = images_of(50)
    standardise = standardisation(data_of(images), BatchSettings())
    pixels = images.double().transpose(0, 1).flatten(1)
    assert torch.allclose(standardise.mean.flatten(), pixels.mean(1).float())
    assert torch.allclose(standardise.std.flatten(), pixels.std(1, correction=0).float())


def test_a_mean_and_a_standard_deviation_that_are_set_are_of_pixels_up_to_1():
    images = images_of(4)
    settings = BatchSettings(pixel_mean=[0.4, 0.5, 0.6], pixel_std=[0.25])
    expected = (images / 255 - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / 0.25
    assert torch.allclose(standardisation(data_of(images), settings)(images), expected, atol=1e-5)


def test_only_what_is_not_set_is_taken_from_the_images():
    data = data_of(images_of(4))
    assert torch.equal(
        standardisation(data, BatchSettings(pixel_mean=[0])).std, standardisation(data, BatchSettings()).std
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pixel_mean": [0.1, 0.2]}, "pixel_mean must be one value or 3, one per channel, got 2"),
        ({"pixel_std": [1.0, 0.0, 1.0]}, "pixel_std must be above 0"),
        ({"crop_size": 6}, "crop_size must be at most 5, for images 7x5, got 6"),
        (
            {"crop_size": 8, "augmentation": {"crop_padding": 1}},
            "crop_size must be at most 7, for images 7x5 padded by 1, got 8",
        ),
        (
            {"augmentation": {"crop_padding": 5, "padding": "reflect"}},
            "augmentation.crop_padding must be less than 5 to reflect images of 7x5, got 5",
        ),
        ({"augmentation": {"cutout": 6}}, "augmentation.cutout must be at most 5 for images of 7x5, got 6"),
    ],
)
def test_settings_that_do_not_fit_the_images_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        evaluation_batches(data_of(images_of()), BatchSettings(**settings))


def test_random_windows_of_a_given_size_lie_anywhere_in_the_padded_image():
    image = torch.zeros(600, 1, 4, 4, dtype=torch.uint8)
    image[:, 0] = torch.arange(1, 17).reshape(4, 4)
    settings = BatchSettings(crop_size=3, augmentation={"crop_padding": 1})
    windows = augmented(image, settings)
    padded = torch.zeros(6, 6, dtype=torch.uint8)
    padded[1:5, 1:5] = image[0, 0]
    expected = {tuple(padded[i : i + 3, j : j + 3].flatten().tolist()) for i in range(4) for j in range(4)}
    assert {tuple(window.flatten().tolist()) for window in windows} == expected
    assert windows.shape[1:] == batch_shape((1, 4, 4), settings) == (1, 3, 3)


def test_a_window_smaller_than_the_image_is_random_without_padding_too():
    windows = augmented(images_of(1).expand(60, -1, -1, -1), BatchSettings(crop_size=5))
    assert len(windows.flatten(1).unique(dim=0)) == 3  # three places along the height, one along the width


def test_a_window_as_large_as_the_padded_image_is_all_of_it():
    images = images_of()[:, :, :5]
    windows = augmented(images, BatchSettings(crop_size=7, augmentation={"crop_padding": 1}))
    assert torch.equal(windows, torch.nn.functional.pad(images, (1, 1, 1, 1)))


@pytest.mark.parametrize(("size", "rows", "columns"), [(3, slice(2, 5), slice(1, 4)), (2, slice(2, 4), slice(1, 3))])
def test_evaluation_takes_the_centre(size, rows, columns):
    images = images_of()
    batches = evaluation_batches(data_of(images), BatchSettings(crop_size=size, pixel_mean=[0], pixel_std=[1 / 255]))
    assert torch.equal(torch.cat([batch for batch, _ in batches["train"]]), images[:, :, rows, columns].float())


def test_the_centre_of_a_smaller_image_is_padded():
    images = images_of()
    cropped = centre_crop(images, 9)
    assert cropped.shape == (20, 3, 9, 9)
    assert torch.equal(cropped[:, :, 1:8, 2:7], images)
    assert cropped.sum() == images.sum()


def test_batches_without_a_crop_have_the_shape_of_the_images():
    assert batch_shape((3, 7, 5), BatchSettings(augmentation={"crop_padding": 2})) == (3, 7, 5)
