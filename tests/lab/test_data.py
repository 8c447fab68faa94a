from __future__ import annotations

import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from neuralcollapse.lab.config import BatchSettings, DataSettings
from neuralcollapse.lab.data import batches as batches_module
from neuralcollapse.lab.data import load as load_module
from neuralcollapse.lab.data.batches import EpochBatches, evaluation_batches, standardisation
from neuralcollapse.lab.data.images import Split, StreamedSplit
from neuralcollapse.lab.data.load import load_data

STREAMED = {"workers": 0}


def load(source: Path | str, **settings):
    return load_data(DataSettings(data=str(source), **settings), progress=False)


def save_images(folder: Path, classes: dict[str, int], size: tuple[int, int] = (6, 4), mode: str = "RGB") -> None:
    """For each class a sub-folder of images in one colour, the class's number of them."""
    for value, (name, number) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for index in range(number):
            color = 40 * value + index if mode == "L" else (40 * value + index, 0, 255)
            Image.new(mode, size, color).save(folder / name / f"{index}.png")


def save_table(folder: Path, labels: dict[str, list[int]], features: dict[str, object], split: str = "train") -> None:
    rows = len(next(iter(labels.values())))
    images = list(np.random.default_rng(len(split)).integers(256, size=(rows, 5, 5, 3), dtype=np.uint8))
    folder.mkdir(exist_ok=True)
    kinds = datasets.Features({"picture": datasets.Image()} | features)
    datasets.Dataset.from_dict({"picture": images} | labels, features=kinds).to_parquet(folder / f"{split}.parquet")


def test_digits_are_split_in_proportion_and_always_alike():
    data = load("digits")
    assert data.image_shape == (1, 8, 8)
    assert (len(data.train), len(data.test), data.num_classes) == (1438, 359, 10)
    assert data.train.images.dtype == torch.uint8
    assert int(data.train.images.max()) == 255
    shares = data.test.labels.bincount() / (data.train.labels.bincount() + data.test.labels.bincount())
    assert (shares - 0.2).abs().max() < 0.01
    assert torch.equal(load("digits").test.images, data.test.images)


def test_no_digit_is_in_both_splits():
    data = load("digits")
    both = torch.cat([data.train.images, data.test.images]).flatten(1)
    assert len(both.unique(dim=0)) == 1797


@pytest.mark.parametrize("workers", ["in-memory", 0])
def test_held_out_classes_are_in_no_split_and_the_other_images_stay(workers):
    every = load("digits")
    data = load("digits", hold_out_classes=[3, 7], workers=workers)
    assert (data.num_classes, data.class_names) == (8, ("0", "1", "2", "4", "5", "6", "8", "9"))
    new_label = torch.tensor([0, 1, 2, -1, 3, 4, 5, -1, 6, 7])
    for name, split in every.splits.items():
        is_known = new_label[split.labels] >= 0
        images, labels = next(data.splits[name].batches([torch.arange(int(is_known.sum()))]))
        assert len(data.splits[name]) == is_known.sum()
        assert torch.equal(images, split.images[is_known])
        assert torch.equal(labels, new_label[split.labels[is_known]])
    is_unknown = new_label[every.test.labels] < 0
    (unknown,) = data.held_out.batches([torch.arange(len(data.held_out))])
    assert torch.equal(unknown[0], every.test.images[is_unknown])
    assert torch.equal(unknown[1], every.test.labels[is_unknown])
    numbers = (int((new_label[split.labels] < 0).sum()) for split in (every.train, every.test))
    note = "held out: classes 3, 7; {} training images left out, {} test images are unknown inputs"
    assert data.notes == (note.format(*numbers),)
    assert data.fingerprint().keys() == {"train", "test", "held_out"}
    assert every.held_out is None
    assert every.fingerprint().keys() == {"train", "test"}


def test_classes_of_a_folder_are_held_out_by_name_or_number(tmp_path):
    for split in ("train", "test"):
        save_images(tmp_path / split, {"bird": 4, "cat": 6, "dog": 5, "frog": 6}, mode="L")
    data = load(tmp_path, hold_out_classes=["dog", "0"], validation_share=0.4, test_samples=4)
    assert data.class_names == ("cat", "frog")
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 7, "validation": 5, "test": 4}
    assert len(data.held_out) == 4  # at most test_samples
    for split in data.splits.values():
        assert torch.equal(split.images[:, 0, 0, 0] >= 100, split.labels == 1)


def test_a_class_is_held_out_by_its_name_where_names_are_numbers(tmp_path):
    save_images(tmp_path, {"1": 6, "2": 6, "3": 6}, mode="L")
    assert load(tmp_path, hold_out_classes=[2]).class_names == ("1", "3")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["10"], "must be among the 10 classes of the data, got '10'; nearest"),
        (["nine"], "must be among the 10 classes of the data, got 'nine'"),
        ([-1], "must be among the 10 classes of the data, got '-1'"),
        ([3, "3"], "must be distinct, got 3, 3"),
        (list(range(9)), "must leave at least 2 of the 10 classes, got 0, 1"),
        ([], "must name at least one class"),
        ("8", "must be a list"),
    ],
)
def test_classes_that_cannot_be_held_out_are_refused(classes, message):
    with pytest.raises(ValueError, match=f"hold_out_classes {message}"):
        load("digits", hold_out_classes=classes)


def test_classes_are_held_out_of_single_images_only():
    with pytest.raises(ValueError, match="hold_out_classes belongs to digits_per_image 1; here digits_per_image is 2"):
        DataSettings(hold_out_classes=[3], digits_per_image=2)


def test_a_folder_of_class_folders_with_train_and_test(tmp_path):
    save_images(tmp_path / "train", {"cat": 3, "dog": 4})
    save_images(tmp_path / "test", {"cat": 2, "dog": 1})
    data = load(tmp_path)
    assert data.image_shape == (3, 4, 6)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert data.test.labels.tolist() == [0, 0, 1]
    assert data.train.images[:, :, 0, 0].tolist() == [[value, 0, 255] for value in (0, 1, 2, 40, 41, 42, 43)]


def test_without_a_test_split_one_image_in_five_is_held_out(tmp_path):
    save_images(tmp_path, {"a": 10, "b": 20}, mode="L")
    data = load(tmp_path)
    assert data.test.labels.bincount().tolist() == [2, 4]
    values = torch.cat([data.train.images, data.test.images])[:, 0, 0, 0]
    assert sorted(values.tolist()) == [*range(10), *range(40, 60)]


def test_images_of_different_size_need_image_size(tmp_path):
    save_images(tmp_path / "train", {"a": 10})
    save_images(tmp_path / "train" / "more", {"b": 10}, size=(9, 9))
    for image in (tmp_path / "train" / "more" / "b").iterdir():
        (tmp_path / "train" / "b").mkdir(exist_ok=True)
        image.rename(tmp_path / "train" / "b" / image.name)
    with pytest.raises(ValueError, match="image_size must be given, because the images of .* 4x6 and 9x9"):
        load(tmp_path)
    assert load(tmp_path, image_size=8).image_shape == (3, 8, 8)


def test_a_grey_image_among_coloured_ones_becomes_coloured(tmp_path):
    save_images(tmp_path / "train", {"a": 2})
    save_images(tmp_path / "train" / "x", {"b": 2}, mode="L")
    (tmp_path / "train" / "x" / "b").rename(tmp_path / "train" / "b")
    (tmp_path / "train" / "x").rmdir()
    save_images(tmp_path / "test", {"a": 1, "b": 1}, mode="L")
    data = load(tmp_path)
    assert data.image_shape == (3, 4, 6)
    assert data.test.images.shape == (2, 3, 4, 6)
    grey = data.train.images[data.train.labels == 1]
    assert torch.equal(grey[:, 0], grey[:, 2])


def test_parquet_columns_are_found_by_what_they_hold(tmp_path):
    save_table(tmp_path, {"kind": [0, 1, 2, 1]}, {"kind": datasets.ClassLabel(names=["x", "y", "z"])})
    save_table(tmp_path, {"kind": [2, 0]}, {"kind": datasets.ClassLabel(names=["x", "y", "z"])}, split="validation")
    data = load(tmp_path)
    assert data.num_classes == 3
    assert data.train.labels.tolist() == [0, 1, 2, 1]
    assert data.test.labels.tolist() == [2, 0]
    assert data.train.images[0].permute(1, 2, 0).flatten()[:4].tolist() == (
        np.random.default_rng(5).integers(256, size=(4, 5, 5, 3), dtype=np.uint8)[0].flatten()[:4].tolist()
    )


def test_a_column_of_integers_called_label_holds_the_labels(tmp_path):
    save_table(tmp_path, {"label": [0, 3, 1, 2] * 5}, {"label": datasets.Value("int32")})
    assert load(tmp_path).num_classes == 4


def test_one_of_several_columns_of_labels_must_be_named(tmp_path):
    kinds = {"coarse": datasets.ClassLabel(num_classes=2), "fine": datasets.ClassLabel(num_classes=4)}
    save_table(tmp_path, {"coarse": [0, 0, 1, 1] * 5, "fine": [0, 1, 2, 3] * 5}, kinds)
    with pytest.raises(ValueError, match="label_column must say which labels of .* to take: coarse, fine"):
        load(tmp_path)
    assert load(tmp_path, data_options={"label_column": "fine"}).num_classes == 4
    with pytest.raises(ValueError, match="must have a column of class labels called 'finer'"):
        load(tmp_path, data_options={"label_column": "finer"})


def test_images_without_labels_are_refused(tmp_path):
    save_images(tmp_path, {"only": 3})
    with pytest.raises(
        ValueError, match=r"a sub-folder of images for each of at least 2 classes, .* has images in only"
    ):
        load(tmp_path)


def test_one_class_is_not_enough(tmp_path):
    for label, split in enumerate(("train", "test")):
        save_table(tmp_path, {"label": [label] * 10}, {"label": datasets.ClassLabel(names=["x", "y"])}, split)
    with pytest.raises(ValueError, match="at least 2 classes, .* has 1"):
        load(tmp_path)


def test_labels_that_mean_unknown_are_refused(tmp_path):
    save_table(tmp_path, {"label": [0, 1, 2]}, {"label": datasets.ClassLabel(num_classes=3)})
    save_table(tmp_path, {"label": [-1, -1]}, {"label": datasets.ClassLabel(num_classes=3)}, split="test")
    with pytest.raises(
        ValueError, match=r"2 of 2 in its test split have -1, which means unlabelled: --leave_out unlabelled"
    ):
        load(tmp_path)


def test_an_unreadable_image_is_named(tmp_path):
    save_images(tmp_path, {"a": 10, "b": 10})
    (tmp_path / "b" / "7.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"images that can be read; .*b/7\.png"):
        load(tmp_path)


def test_a_truncated_image_is_named(tmp_path):
    save_images(tmp_path, {"a": 10, "b": 10}, size=(60, 60))
    whole = (tmp_path / "a" / "3.png").read_bytes()
    (tmp_path / "a" / "3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"images that can be read; .*a/3\.png"):
        load(tmp_path)


def test_train_and_test_samples_keep_the_classes_in_proportion():
    data = load("digits", train_samples=100, test_samples=50)
    assert set(data.train.labels.bincount().tolist()) <= {9, 10, 11}
    assert set(data.test.labels.bincount().tolist()) <= {4, 5, 6}


def test_mnist(real_data):
    data = load(real_data / "mnist", train_samples=500, test_samples=200)
    assert data.image_shape == (1, 28, 28)
    assert (len(data.train), len(data.test), data.num_classes) == (500, 200, 10)
    assert 25 < data.train.images.float().mean() < 45  # of all of MNIST: 33.3


def test_cifar10(real_data):
    data = load(real_data / "cifar10", train_samples=300, test_samples=100)
    assert data.image_shape == (3, 32, 32)
    assert data.num_classes == 10


def test_images_side_by_side_are_those_of_the_labels(real_data):
    single = load(real_data / "mnist", train_samples=1000)
    data = load(real_data / "mnist", digits_per_image=2, train_samples=500, test_samples=100)
    assert data.image_shape == (1, 28, 56)
    assert data.num_classes == 100
    halves = data.train.images.unflatten(3, (2, 28)).permute(0, 3, 1, 2, 4).flatten(2).float()
    # A nearest neighbour among single images says what each half shows, right for five of six with so few of them.
    nearest = torch.cdist(halves.flatten(0, 1), single.train.images.flatten(1).float()).argmin(1)
    read = single.train.labels[nearest].view(-1, 2) @ torch.tensor([10, 1])
    tens, ones = (data.train.labels // 10, data.train.labels % 10)
    assert (read // 10 == tens).double().mean() > 0.75
    assert (read % 10 == ones).double().mean() > 0.75


def test_no_image_is_in_both_splits_when_they_are_put_side_by_side():
    data = load("digits", digits_per_image=2, train_samples=4000, test_samples=1000)
    train, test = (
        {image.numpy().tobytes() for half in split.images.split(8, dim=3) for image in half}
        for split in (data.train, data.test)
    )
    assert not train & test
    assert (len(train), len(test)) == (pytest.approx(1438, abs=30), pytest.approx(359, abs=10))


def test_images_side_by_side_equal_a_loop():
    single = load("digits")
    image_of = {image.numpy().tobytes(): int(label) for image, label in zip(*vars(single.train).values(), strict=True)}
    data = load("digits", digits_per_image=3, train_samples=200)
    assert data.num_classes == 1000
    for image, label in zip(data.train.images, data.train.labels.tolist(), strict=True):
        shown = [image_of[part.contiguous().numpy().tobytes()] for part in image.split(8, dim=2)]
        assert label == int("".join(map(str, shown)))


def test_relabelled_data_are_marked():
    assert not load("digits").relabelled
    assert load("digits", label_noise="permuted").relabelled
    assert load("digits", label_noise=0.1).relabelled


def test_labels_that_a_run_kept_are_used_again():
    data, random = load("digits"), load("digits", label_noise="permuted")
    assert not torch.equal(random.train.labels, data.train.labels)
    assert torch.equal(random.test.labels, data.test.labels)
    again = random.with_train_labels(data.train.labels.int())
    assert torch.equal(again.train.labels, data.train.labels)
    assert again.train.labels.dtype == torch.long
    assert again.relabelled


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(5, dtype=torch.long), r"labels must be 1438 integers, one for each training image of 'digits'"),
        (torch.zeros(1438), "labels must be 1438 integers"),
        (torch.full((1438,), 10), r"labels must be in \[0, 10\), got 10 to 10"),
    ],
)
def test_kept_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        load("digits").with_train_labels(labels)


def test_channels_can_be_set(tmp_path):
    assert load("digits", channels=3).image_shape == (3, 8, 8)
    save_images(tmp_path, {"a": 10, "b": 10})
    data = load(tmp_path, channels=1)
    assert data.image_shape == (1, 4, 6)
    red = int(load(tmp_path).train.images[0, 0, 0, 0])
    assert int(data.train.images[0, 0, 0, 0]) == pytest.approx(0.299 * red + 0.114 * 255, abs=1)


# Known data sets and splits.


@pytest.fixture
def asked_of_the_hub(monkeypatch) -> list[tuple[str | None, ...]]:
    asked = []

    def load_dataset(*names):
        asked.append(names)
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(
    ("settings", "path", "config"),
    [
        ({"data": "mnist"}, "ylecun/mnist", None),
        ({"data": "fashion-mnist"}, "zalando-datasets/fashion_mnist", None),
        ({"data": "svhn"}, "ufldl-stanford/svhn", "cropped_digits"),
        ({"data": "ufldl-stanford/svhn"}, "ufldl-stanford/svhn", "cropped_digits"),
        ({"data": "svhn", "data_options": {"config": "full_numbers"}}, "ufldl-stanford/svhn", "full_numbers"),
        ({"data": "cifar100"}, "uoft-cs/cifar100", None),
        ({"data": "imagenet"}, "ILSVRC/imagenet-1k", None),
        ({"data": "someone/something", "data_options": {"config": "one"}}, "someone/something", "one"),
    ],
)
def test_known_names_are_fetched_from_the_hub(asked_of_the_hub, settings, path, config):
    with pytest.raises(ValueError, match=f"'{path}' could not be fetched from the hub .*--data FOLDER") as caught:
        load_data(DataSettings(**settings), progress=False)
    assert f"{settings['data']!r}" in str(caught.value)
    assert asked_of_the_hub == [(path, config)]


def test_options_of_known_data_sets_are_used(tmp_path, monkeypatch):
    kinds = {"coarse_label": datasets.ClassLabel(num_classes=2), "fine_label": datasets.ClassLabel(num_classes=4)}
    for split, rows in (("train", 5), ("test", 1), ("validation", 2)):
        save_table(tmp_path, {"coarse_label": [0, 0, 1, 1] * rows, "fine_label": [0, 1, 2, 3] * rows}, kinds, split)
    splits = datasets.load_dataset(str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: splits)
    assert load("cifar100").num_classes == 4
    assert load("uoft-cs/cifar100", data_options={"label_column": "coarse_label"}).num_classes == 2
    assert len(load("imagenet", data_options={"label_column": "fine_label"}).test) == 8
    assert len(load("imagenet", data_options={"label_column": "fine_label", "test_split": "test"}).test) == 4
    swapped = load("cifar100", data_options={"train_split": "validation", "test_split": "train"})
    assert (len(swapped.train), len(swapped.test)) == (8, 20)


def test_a_split_that_does_not_exist_is_refused_with_those_that_do(tmp_path):
    for split in ("train", "test"):
        save_table(tmp_path, {"label": [0, 1]}, {"label": datasets.ClassLabel(num_classes=2)}, split)
    for setting in ("train_split", "test_split"):
        with pytest.raises(ValueError, match=f"{setting} must be a split of .*, which has train, test; got 'dev'"):
            load(tmp_path, data_options={setting: "dev"})
    with pytest.raises(ValueError, match="test_split must be another split than train_split, got 'train' for both"):
        load(tmp_path, data_options={"test_split": "train"})


def test_without_a_split_called_train_there_must_be_only_one_or_one_must_be_named(tmp_path):
    for split in ("test", "validation"):
        save_table(tmp_path, {"label": [0, 1]}, {"label": datasets.ClassLabel(num_classes=2)}, split)
    with pytest.raises(ValueError, match="train_split must say which split of .* to train on: (test|validation), "):
        load(tmp_path)
    assert len(load(tmp_path, data_options={"train_split": "validation"}).test) == 2
    (tmp_path / "test.parquet").unlink()
    save_table(tmp_path, {"label": [0, 1] * 5}, {"label": datasets.ClassLabel(num_classes=2)}, "validation")
    assert len(load(tmp_path).test) == 2


def test_missing_labels_are_refused(tmp_path):
    save_table(tmp_path, {"label": [0, None, 1]}, {"label": datasets.Value("int64")})
    with pytest.raises(ValueError, match="must have a label for each image, its train split has images without"):
        load(tmp_path)


def test_a_class_without_any_image_is_refused(tmp_path):
    save_table(tmp_path, {"label": [0, 2] * 5}, {"label": datasets.ClassLabel(num_classes=5)})
    with pytest.raises(ValueError, match="must have training images of each of its 5 classes, but has none of 1, 3, 4"):
        load(tmp_path)


# Data that are decoded by worker processes.


def batches_of(data, **settings) -> list[torch.Tensor]:
    """Two epochs of training and the evaluation, after one another."""
    config = BatchSettings(batch_size=16, augmentation={"crop_padding": 1, "flip": True}, **settings)
    evaluation = evaluation_batches(data, config)
    training = [EpochBatches(data.train, evaluation["train"].standardise, config, 3, epoch) for epoch in (0, 1)]
    return [tensor for part in (*training, *evaluation.values()) for batch in part for tensor in batch]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("settings", [{}, {"digits_per_image": 2}, {"image_size": 20, "channels": 3}])
def test_streamed_batches_are_those_from_memory(real_data, workers, settings):
    settings |= {"train_samples": 100, "test_samples": 30}
    in_memory = load(real_data / "mnist", **settings)
    streamed = load(real_data / "mnist", workers=workers, **settings)
    assert isinstance(in_memory.train, Split)
    assert isinstance(streamed.train, StreamedSplit)
    assert streamed.image_shape == in_memory.image_shape
    assert same(batches_of(streamed, sampling="stratified"), batches_of(in_memory, sampling="stratified"))


def test_streamed_data_take_other_labels_as_well():
    labels = torch.arange(1438) % 10
    in_memory, streamed = (load("digits", **budget) for budget in ({}, STREAMED))
    batches = [batches_of(data.with_train_labels(labels)) for data in (in_memory, streamed)]
    assert same(*batches)


def test_streamed_splits_can_be_sent_to_a_process(tmp_path):
    save_images(tmp_path, {"a": 20, "b": 20})
    split = load(tmp_path, workers=0).train
    sent = pickle.loads(pickle.dumps(split))
    indices = [torch.tensor([3, 1]), torch.tensor([7])]
    for (images, labels), (expected, true) in zip(sent.batches(indices), split.batches(indices), strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(labels, true)


def test_the_memory_of_the_images_decides_whether_they_are_streamed(tmp_path, monkeypatch):
    save_images(tmp_path, {"a": 20, "b": 20}, size=(64, 32))
    required = 40 * 64 * 32 * 3
    monkeypatch.setattr(load_module, "MEMORY_BUDGET", required)
    assert isinstance(load(tmp_path).train, Split)
    monkeypatch.setattr(load_module, "MEMORY_BUDGET", 0.99 * required)
    assert isinstance(load(tmp_path).train, StreamedSplit)
    assert isinstance(load(tmp_path, train_samples=20).train, Split)
    assert isinstance(load(tmp_path, channels=1).train, Split)
    assert isinstance(load(tmp_path, workers="in-memory").train, Split)


def test_reading_streamed_batches_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    batches_of(load("digits", workers=1, train_samples=32, test_samples=2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_by_the_worker_that_finds_it(tmp_path, workers):
    save_images(tmp_path, {"a": 10, "b": 10})
    (tmp_path / "b" / "7.png").write_bytes(b"not an image")
    data = load(tmp_path, workers=workers)
    with pytest.raises(ValueError, match=r"images that can be read; .*b/7\.png of .* cannot") as caught:
        batches_of(data)
    assert "\n" not in str(caught.value)


def test_streamed_images_of_different_size_need_image_size(tmp_path):
    save_images(tmp_path / "small", {"a": 10})
    save_images(tmp_path / "large", {"b": 10}, size=(9, 9))
    for name, size in (("a", "small"), ("b", "large")):
        (tmp_path / size / name).rename(tmp_path / name)
        (tmp_path / size).rmdir()
    with pytest.raises(ValueError, match="image_size must be given, because the images of .* 4x6 and 9x9"):
        batches_of(load(tmp_path, workers=0))
    data = load(tmp_path, workers=0, image_size=5)
    assert data.image_shape == (3, 5, 5)
    assert len(batches_of(data)) > 0


def test_the_first_streamed_image_decides_whether_all_are_grey(tmp_path):
    save_images(tmp_path / "train", {"a": 2, "b": 2}, mode="L")
    save_images(tmp_path / "test", {"a": 1, "b": 1})
    data = load(tmp_path, workers=0)
    assert data.image_shape == (1, 4, 6)
    ((images, _),) = data.test.batches([torch.arange(2)])
    assert images.shape == (2, 1, 4, 6)


def test_statistics_of_many_streamed_images_are_those_of_some_of_them(monkeypatch):
    monkeypatch.setattr(batches_module, "_STATISTICS_SAMPLES", 300)
    in_memory, streamed = (load("digits", **budget) for budget in ({}, STREAMED))
    exact, estimated = (standardisation(data, BatchSettings()) for data in (in_memory, streamed))
    assert not torch.equal(exact.mean, estimated.mean)
    assert estimated.mean.item() == pytest.approx(exact.mean.item(), rel=0.03)
    assert estimated.std.item() == pytest.approx(exact.std.item(), rel=0.03)
