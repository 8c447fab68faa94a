"""Figures of measurements in memory: what is drawn, and what is refused."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import neuralcollapse as nc
from neuralcollapse.lab import RunFolder
from neuralcollapse.lab.results.groups import RunGroups
from neuralcollapse.metrics import Provenance
from neuralcollapse.metrics.figures import FIGURES
from neuralcollapse.metrics.figures.panels import draw_page
from neuralcollapse.metrics.figures.published import papyan

LABELS = torch.arange(60) % 3


def record(noise: float, epoch: int | None = None, split: str | None = None, model: str = "", weight: bool = True):
    generator = torch.Generator().manual_seed(0)
    means = 3 * torch.randn(3, 8, generator=generator)
    features = means[LABELS] + noise * torch.randn(60, 8, generator=generator)
    origin = Provenance(epoch=epoch, split=split, model=model)
    return nc.measure_features(features, LABELS, means if weight else None, provenance=origin, progress=False)


def lines(axes) -> list[tuple[list[float], list[float]]]:
    """Return positions and values of the lines of a panel, without the one at collapse."""
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines if line.get_label()[0] != "_"]


def panel(figure, title: str):
    return next(axes for axes in figure.axes if axes.get_title() == title)


def test_a_course_of_measurements_is_one_line_per_label_against_the_epoch():
    fast, slow = ([record(noise, epoch=e) for e, noise in enumerate(n, 1)] for n in ((1, 0.5, 0.1), (2, 1, 0.5)))
    figure = nc.plot({"fast": fast, "slow": slow}, "zhu")
    expected = [([1, 2, 3], [record.metrics["nc1_pinv"] for record in course]) for course in (fast, slow)]
    assert lines(panel(figure, "NC1")) == expected
    assert panel(figure, "NC1").get_xlabel() == "epoch"


def test_a_figure_of_records_is_that_of_their_run_folder(tmp_path):
    records = {(e, s): record(2.0 / e, e, s, model="mine") for e in (1, 2) for s in ("train", "test")}
    folder = RunFolder.create(tmp_path / "run", name="mine")
    for (epoch, split), measurement in records.items():
        folder.record(epoch, split, measurement)
    of_folder = draw_page("", papyan(RunGroups([folder])), 4)
    of_records = nc.plot(list(records.values()))
    assert len(of_records.axes) == len(of_folder.axes) == 7
    for ours, theirs in zip(of_records.axes, of_folder.axes, strict=True):
        assert lines(ours) == lines(theirs)
        assert ours.get_title() == theirs.get_title()


def test_measurements_of_one_epoch_and_split_are_further_seeds():
    pairs = [[record(noise, epoch) for epoch in (1, 2)] for noise in (0.5, 1.0)]
    axes = panel(nc.plot({"both": [*pairs[0], *pairs[1]]}, "zhu"), "NC1")
    values = np.array([[measurement.metrics["nc1_pinv"] for measurement in run] for run in pairs])
    assert lines(axes)[0][1] == pytest.approx(list(values.mean(0)), rel=1e-12)
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((values.min(), values.max()), rel=1e-12)


def test_models_without_epochs_are_grouped_by_name_and_numbered():
    first, second, other = record(1.0, model="A"), record(0.5, model="A"), record(0.2, model="B")
    axes = panel(nc.plot([first, other, second], "zhu"), "NC1")
    expected = [first.metrics["nc1_pinv"], second.metrics["nc1_pinv"]]
    assert lines(axes) == [([1, 2], expected), ([1], [other.metrics["nc1_pinv"]])]
    assert axes.get_xlabel() == "measurement"


def test_distances_are_to_the_first_epoch_and_those_of_the_library():
    records = [record(noise, epoch) for epoch, noise in ((4, 1.0), (9, 0.1))]
    figure = nc.plot(records, "markou")
    first, last = (measurement.moments.means for measurement in records)
    weight = records[0].weight.double()
    of_last = nc.etf_distances(weight, last, reference_weight=weight, reference_means=first)
    drawn = lines(panel(figure, "ETF of means to reference, epoch 4"))[0]
    assert drawn[0] == [4, 9]
    assert drawn[1] == pytest.approx([0, of_last["etf_means_reference"]], abs=1e-12)


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_drawn_of_one_measurement_with_and_without_classifier(name):
    for weight, split in ((True, None), (False, "test")):
        page = record(1.0, split=split, weight=weight).plot(name)
        with Image.open(io.BytesIO(page._repr_png_())) as picture:
            assert len(picture.convert("RGB").getcolors(10**7)) > 10


def test_panels_without_a_classifier_say_so():
    figure = record(1.0, weight=False).plot()
    assert [text.get_text() for text in panel(figure, "model: cosines of weights").texts] == [
        "no classifier was measured"
    ]
    image = panel(figure, "model: cosines of means").images[0].get_array()
    assert image.shape == (3, 3)
    texts = [text.get_text() for text in panel(nc.plot([record(1.0, weight=False)], "zhu"), "NC3").texts]
    assert [text.replace("\n", " ") for text in texts] == ["nc3_duality was not measured on the train split"]


@pytest.mark.parametrize(
    ("measurements", "figure", "message"),
    [
        ([], "", "at least one"),
        ({}, "", "at least one"),
        ([{"nc1_pinv": 0.1}], "", "got dict"),
        ("run.safetensors", "", "got str"),
        (record(1.0), "papian", "figure must be .*'papyan'.* got 'papian'"),
        ([record(1.0), nc.measure_features(torch.randn(8, 2), LABELS[:8] % 2, progress=False)], "", r"got \[2, 3\]"),
    ],
)
def test_what_is_refused(measurements, figure, message):
    with pytest.raises(ValueError, match=message):
        nc.plot(measurements, figure)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    measurement = record(1.0)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"neuralcollapse\[lab\]; matplotlib.figure is not installed"):
        measurement.plot()
