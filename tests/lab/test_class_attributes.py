"""Frames of what classes share, from a command line to the metrics relative to their Gram."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from helpers import error_of
from neuralcollapse import FixedFrameClassifier, NearestFrameClassifier
from neuralcollapse.cli import main
from neuralcollapse.geometry import attribute_gram, simplex_gram
from neuralcollapse.heads import LeadingDirections
from neuralcollapse.lab.config import RunConfig
from neuralcollapse.lab.models.build import attribute_code, build_head, digits_of_classes, read_attributes
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.tables import read_table
from neuralcollapse.metrics import Measurement

ANIMALS = "legs,feathers\n4,no\n4,no\n2,yes\n2,no\n"


def of(**settings) -> RunConfig:
    return RunConfig(**{"method": "attribute-frame", "class_attributes": "digits"} | settings)


def test_digits_are_those_of_the_class_number_in_as_many_places_as_the_greatest_has():
    assert digits_of_classes(10).tolist() == [[digit] for digit in range(10)]
    assert digits_of_classes(101)[[0, 7, 42, 100]].tolist() == [[0, 0, 0], [0, 0, 7], [0, 4, 2], [1, 0, 0]]


def test_a_table_has_a_row_a_class_and_words_count_as_well_as_numbers(tmp_path):
    path = tmp_path / "animals.csv"
    path.write_text(ANIMALS)
    legs, feathers = read_attributes(str(path), 4).T.tolist()
    assert legs[0] == legs[1] != legs[2] == legs[3]
    assert feathers[0] == feathers[1] == feathers[3] != feathers[2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ANIMALS, "class_attributes must have a line for each of the 3 classes, .* has 4 below the names"),
        ("legs\n4\n2\n", "class_attributes must have a line for each of the 3 classes, .* has 2 below the names"),
        ("legs,feathers\n4,no\n4,\n2,yes\n", "must have a value of each attribute for each class, .* lacks some"),
        ("legs,feathers\n4,no\n4\n2,yes\n", "must have a value of each attribute for each class, .* lacks some"),
        ("", "class_attributes must be digits or a CSV file, .* cannot be read: No columns"),
        (None, "class_attributes must be digits or a CSV file, .* cannot be read: .*No such file"),
    ],
)
def test_a_table_that_does_not_fit_the_classes_is_refused(tmp_path, text, message):
    path = tmp_path / "attributes.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_attributes(str(path), 3)


@pytest.mark.parametrize(("num_classes", "dim", "share", "rank"), [(100, 99, 0.3, 99), (100, 98, 0.5, 18)])
def test_every_attribute_has_the_same_share_and_the_rank_goes_into_the_features(num_classes, dim, share, rank):
    code = attribute_code(of(), dim, num_classes)
    gram = attribute_gram(digits_of_classes(num_classes), torch.tensor([share, share]).double()).float()
    centring = torch.eye(num_classes) - 1 / num_classes
    assert code.shape == (num_classes, rank)
    assert torch.allclose(code @ code.T, centring @ gram @ centring, atol=1e-5)


def test_where_nothing_is_shared_the_frame_is_the_simplex_etf():
    code = attribute_code(of(), 16, 10)
    assert torch.allclose(code @ code.T, simplex_gram(10), atol=1e-5)


@pytest.mark.parametrize(
    ("dim", "weight", "reason"),
    [(30, 0.2, "rank of at most feature_dim = 30, got 99"), (128, 0.9, "weights must be .* with a sum of at most 1")],
)
def test_a_weight_that_does_not_fit_is_named_with_the_reason(dim, weight, reason):
    with pytest.raises(ValueError, match=f"attribute_weight must suit class_attributes, got {weight} .*: .*{reason}"):
        attribute_code(of(attribute_weight=weight), dim, 100)


def test_the_heads_of_the_frame_methods_have_the_settings():
    nearest = build_head(of(proximal_weight=0.7), 64, 100)
    assert type(nearest) is NearestFrameClassifier
    assert nearest.proximal_weight == 0.7
    fixed = build_head(of(method="fixed-frame"), 64, 100)
    assert type(fixed) is FixedFrameClassifier
    for head in (nearest, fixed):
        assert torch.linalg.matrix_rank(head.weight) == 18
    means = build_head(RunConfig(method="frame"), 64, 100)
    assert isinstance(means.frame, LeadingDirections)
    assert means.frame.rank == "auto"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shades in a folder; two images side by side are one of nine classes."""
    folder = tmp_path_factory.mktemp("shades")
    random = np.random.default_rng(0)
    for split, number in (("train", 12), ("test", 6)):
        for label, shade in enumerate((20, 120, 220)):
            (folder / split / str(label)).mkdir(parents=True)
            for image in range(number):
                pixels = (shade + random.integers(-15, 16, (4, 4))).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / str(label) / f"{image}.png")
    return folder


def test_methods_are_compared_and_frames_measured_relative_to_their_gram(pairs, tmp_path):
    table = tmp_path / "places.csv"
    table.write_text("left,right\n" + "".join(f"{label // 3},{label % 3}\n" for label in range(9)))
    flags = ["--methods=standard,frame,attribute-frame,fixed-frame", f"--class_attributes={table}", "--seeds=1"]
    flags += ["--data", str(pairs), "--digits_per_image=2", "--train_samples=300", "--test_samples=90", "--epochs=3"]
    flags += ["--backbone=mlp", "--width=16", "--depth=2", "--batch_size=30"]
    assert main(["compare", *flags, "--out", str(tmp_path / "out")]) == 0
    for place in RunFolder(tmp_path / "out").run_folders():
        metrics, method = read_table(place.metrics), place.settings()["method"]
        last = metrics.query("epoch == 3 and split == 'test'").set_index("metric")["value"]
        assert last["accuracy"] > 0.5  # chance is 0.11
        assert ("nc2_gram_weights" in last) == (method in ("attribute-frame", "fixed-frame"))
        if "nc2_gram_weights" in last:
            assert last["nc2_gram_weights"] < 1e-4
            code = Measurement.load(place.measured()[3, "test"]).options.code
            assert code.shape == (9, 16)
            assert last["nc2_etf_weights"] > 0.1
            assert yaml.safe_load(place.config.read_text())["attribute_weight"] == "auto"


def test_a_wrong_table_is_one_line_before_anything_is_written(pairs, tmp_path, capsys):
    flags = ["train", "--method=attribute-frame", "--data", str(pairs), "--out", str(tmp_path / "out")]
    assert error_of(capsys, *flags).startswith("class_attributes must be given for method")
    (tmp_path / "nine.csv").write_text("left\n" + "a\nb\nc\n" * 3)
    line = error_of(capsys, *flags, f"--class_attributes={tmp_path / 'nine.csv'}")
    assert line.startswith("class_attributes must have a line for each of the 3 classes")
    assert "class_attributes belongs to method" in error_of(capsys, *flags[:1], "--class_attributes=digits")
    assert not (tmp_path / "out").exists()
