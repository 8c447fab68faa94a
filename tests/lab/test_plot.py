"""Published figures from run folders alone."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from helpers import error_of, slow_except
from neuralcollapse import measure, random_simplex_etf
from neuralcollapse.cli import main
from neuralcollapse.lab import RunConfig, RunFolder, train_runs
from neuralcollapse.lab.figures import FIGURES
from neuralcollapse.lab.figures.gradients import gradient_flow
from neuralcollapse.lab.figures.panels import write_panels
from neuralcollapse.lab.recipes import load_recipe
from neuralcollapse.lab.results.groups import RunGroups
from neuralcollapse.lab.results.tables import add_rows
from neuralcollapse.metrics import ClassMoments, pair_matrices
from neuralcollapse.metrics.figures.features import project
from neuralcollapse.metrics.figures.panels import Panel, thin_ticks
from neuralcollapse.metrics.figures.published import class_cosines, draw_series, markou

SMALL = {"backbone": "mlp", "width": 16, "depth": 1, "train_samples": 150, "test_samples": 60, "epochs": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods over two seeds, without checkpoints; one run with distances and layers."""
    folder = tmp_path_factory.mktemp("runs") / "all"
    runs = [RunConfig(method=m, seed=s, **SMALL) for s in (0, 1) for m in ("fixed", "implicit")]
    train_runs(runs, folder, progress=False)
    shutil.rmtree(folder / "runs" / "fixed-seed0" / "moments")
    assert main(["measure", str(folder / "runs" / "fixed-seed0"), "--layers", "model.0.layers.1"]) == 0
    assert main(["distance", str(folder / "runs" / "implicit-seed0"), str(folder / "runs" / "implicit-seed1")]) == 0
    for run in RunFolder(folder).run_folders():
        shutil.rmtree(run.checkpoints)
    return folder


@pytest.mark.parametrize("name", slow_except(FIGURES, set(FIGURES) - {"markou", "overview", "classes"}))
def test_each_figure_is_drawn_from_the_folders(name, trained, tmp_path, capsys):
    out = tmp_path / "figures"
    assert main(["plot", str(trained), "--figure", name, "--out", str(out), "--format", "png,svg"]) == 0
    assert f"wrote {out / name}.png" in capsys.readouterr().out
    with Image.open(out / f"{name}.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**7)) > 10
    files = {path.stem for path in out.iterdir()}
    assert files == {path.stem for path in out.glob("*.png")} == {path.stem for path in out.glob("*.svg")}
    if name == "papyan":
        assert len(files) == 8


def drawn_ticks(figure: Figure) -> bool:
    """Return whether no two tick labels of an axis overlap."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            labels = [label for label in axis.get_ticklabels() if label.get_text() and label.get_visible()]
            boxes = [label.get_window_extent(canvas.get_renderer()) for label in labels]
            if any(first.overlaps(second) for first, second in itertools.combinations(boxes, 2)):
                return False
    return True


@pytest.mark.parametrize("classes", [(0, 2, 5), (6, 1, 3, 4)])
def test_at_collapse_features_means_and_classifier_lie_on_the_vertices(classes):
    etf = random_simplex_etf(7, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.arange(7).repeat_interleave(3)
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(12, 7)).double()
    model[1].weight.data.copy_(3 * etf)
    record = measure(model, [(5 * etf[targets] + 1, targets)], progress=False)
    projected = project(record, classes)
    vertices = projected.vertices
    assert torch.allclose(projected.means, vertices, atol=1e-12)
    assert torch.allclose(projected.weights, vertices, atol=1e-12)
    expected = vertices[[classes.index(int(target)) for target in projected.targets]]
    assert torch.allclose(projected.features, expected, atol=2e-3)  # stored in fp16
    assert (vertices.norm(dim=1) - 1).abs().max() < 1e-12


@pytest.mark.parametrize("most", [None, 4])
def test_cosines_of_classes_are_those_of_pair_matrices(most):
    targets = torch.tensor([0, 0, 2, 2, 3, 4, 5, 5])  # none of class 1
    features = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    moments = ClassMoments(6, 5)
    moments.update(features, targets)
    record = SimpleNamespace(moments=moments, weight=weight, num_classes=6)
    with_samples = [0, 2, 3, 4, 5]
    matrices = pair_matrices(moments, weight, names=["cosines_means", "cosines_weights"])
    for of in ("means", "weights"):
        cosines = class_cosines(record, of, most)
        assert cosines.shape == (most or 6, most or 6)
        shown = [number for number in with_samples if number < len(cosines)]
        expected = matrices[f"cosines_{of}"][: len(shown), : len(shown)].fill_diagonal_(torch.nan)
        assert cosines[np.ix_(shown, shown)] == pytest.approx(expected.numpy(), rel=1e-12, nan_ok=True)
        assert np.isnan(cosines[1]).all() == (of == "means")


@pytest.mark.parametrize("classes", [(0, 1), (0, 1, 1), (0, 1, 10)])
def test_only_classes_of_the_record_are_projected(classes, trained):
    runs = RunGroups(RunFolder(trained).run_folders())
    with pytest.raises(ValueError, match="classes must be at least three different ones of 0 to 9"):
        project(runs.record("implicit", "train", 1), classes)


def test_ticks_do_not_overlap():
    figure = Figure(figsize=(2, 2))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1])
    axes.set_xticks([0, 0.1, 0.2, 0.5, 0.52, 1], ["first tick", "second", "third", "fourth", "fifth", "the last tick"])
    assert not drawn_ticks(figure)
    thin_ticks(figure)
    assert drawn_ticks(figure)


def test_a_panel_without_data_has_a_message(trained, tmp_path):
    runs = RunGroups(RunFolder(trained).run_folders())
    figure = Figure()
    with pytest.raises(ValueError, match="nc5_ood was not measured on the train split: run `neuralcollapse measure`"):
        draw_series(figure.subplots(), runs=runs, series=[("nc5_ood", "train", "")])

    def refuse(axes):
        raise ValueError("there is nothing")

    (written,) = write_panels("some", "title", [Panel("one", "one", refuse)], tmp_path, ["svg"])
    assert written.exists()


def test_a_line_is_a_group_of_seeds(trained):
    runs = RunGroups(RunFolder(trained).run_folders())
    axes = Figure().subplots()
    draw_series(axes, runs=runs, series=[("accuracy", "test", "")])
    lines = [line for line in axes.get_lines() if line.get_label() in ("fixed", "implicit")]
    assert len(lines) == 2
    table = runs.metrics.query("method == 'fixed' and epoch == 2 and split == 'test' and metric == 'accuracy'")
    assert len(table) == 2
    assert lines[0].get_ydata()[-1] == pytest.approx(table["value"].mean())


def test_runs_of_different_classes_are_not_drawn_together(trained, tmp_path):
    other = train_runs(RunConfig(method="standard", digits_per_image=2, **SMALL), tmp_path / "hundred", progress=False)
    with pytest.raises(ValueError, match=r"must have the same number of classes, got \[10, 100\]"):
        RunGroups([*RunFolder(trained).run_folders(), other])


def test_bad_input_is_one_line(trained, tmp_path, capsys):
    out = str(tmp_path / "out")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "zhu.png").write_text("mine")
    for arguments, message in [
        ([str(trained), "--figure", "papian", "--out", out], "got 'papian'; nearest: papyan"),
        ([str(trained), "--out", out], "figure must be one of papyan, zhu"),
        ([str(trained), "--figure", "zhu", "--format", "gif"], "format must be of png, pdf, svg, got 'gif'"),
        ([str(tmp_path), "--figure", "zhu", "--out", out], "must be the folder of a run, but has no config.yaml"),
        ([str(trained), "--figure", "zhu", "--out", str(tmp_path / "there")], "exists: --overwrite replaces it"),
    ]:
        assert message in error_of(capsys, "plot", *arguments), arguments
    assert (tmp_path / "there" / "zhu.png").read_text() == "mine"
    assert not (tmp_path / "out").exists()


def test_plotting_imports_neither_lightning_nor_datasets(trained, tmp_path):
    arguments = ["plot", str(trained), "--figure", "zhu", "--out", str(tmp_path)]
    code = (
        f"import sys; from neuralcollapse.cli import main; assert main({arguments!r}) == 0\n"
        "assert not {'lightning', 'datasets', 'torch', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def untrained(folder: Path, **settings) -> str:
    """Return the folder of a run with a table, without training."""
    run = RunFolder(folder)
    run.start(RunConfig(**settings).in_force())
    run.add_facts(num_classes=10, data=f"{Path(settings.get('data', 'digits')).name}: 100 images")
    names = ("nc1_pinv", "nc2_etf_weights", "nc3_duality", "nc4_bias", "accuracy")
    rows = [(epoch, split, name, 0.1 * epoch) for epoch in (1, 2) for split in ("train", "test") for name in names]
    add_rows(run.metrics, rows)
    return str(folder)


def words_of(svg: Path) -> list[str]:
    return [unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg.read_text())]


@pytest.mark.slow
def test_titles_name_what_is_common_and_legends_what_differs(tmp_path):
    kinds = list(itertools.product(("mlp", "convnet"), ("sgd", "adam", "lbfgs"), ("fixed", "linear")))
    settings = {"loss": "mse", "seed": 3}
    runs = [
        untrained(
            tmp_path / "-".join(kind),
            **settings,
            backbone=kind[0],
            optimizer=kind[1],
            method=kind[2],
            lr={"sgd": 0.05, "adam": 0.001, "lbfgs": 0.1}[kind[1]],
        )
        for kind in kinds
    ]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        assert main(["plot", *runs, "--figure", "zhu", "--out", str(tmp_path / "out"), "--format", "svg"]) == 0
    for picture in ("zhu", "zhu-nc1"):
        words = words_of(tmp_path / "out" / f"{picture}.svg")
        for backbone, optimizer, method in kinds:
            assert words.count(f"{method} {backbone} {optimizer}") == 1
    title = " ".join(words_of(tmp_path / "out" / "zhu.svg"))
    assert (
        "mse on digits: 100 images; differing: backbone (mlp, convnet), method (fixed, linear), optimizer (sgd, adam, "
        "lbfgs)" in title
    )
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        assert main(["plot", *runs[:6:2], "--figure", "zhu", "--out", str(tmp_path / "three"), "--format", "svg"]) == 0
    words = words_of(tmp_path / "three" / "zhu.svg")
    assert [words.count(name) for name in ("sgd", "adam", "lbfgs")] == [1, 1, 1]


def test_the_legend_of_times_names_recipes(tmp_path):
    names = ["fast-mnist-small", "fast-cifar10-medium"]
    runs = [
        untrained(tmp_path / name, **load_recipe(name).settings | {"recipe": name, "data": "mnist"}) for name in names
    ]
    for run in runs:
        pd.DataFrame({"epoch": [1, 2], "seconds": [30.0, 31.0]}).to_csv(RunFolder(run).training_log, index=False)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        assert main(["plot", *runs, "--figure", "time", "--out", str(tmp_path / "out"), "--format", "svg"]) == 0
    words = words_of(tmp_path / "out" / "time.svg")
    assert [words.count(name) for name in names] == [1, 1]
    assert not any("lr=" in word for word in words)


def test_gradient_bars_of_the_implicit_head(trained):
    runs = RunGroups(RunFolder(trained).run_folders())
    names = {}
    for panel in gradient_flow(runs):
        axes = Figure().subplots()
        panel.draw(axes)
        names[panel.title] = [label.get_text() for label in axes.get_xticklabels()]
        (tallest,) = [bars for bars in axes.containers if bars.get_label() == "largest"]
        tables = [pd.read_csv(run.gradients).query("epoch == 2") for run in runs.groups[panel.title]]
        largest = pd.concat(tables).groupby("parameter")["max"].mean()
        assert tallest[-1].get_height() == pytest.approx(
            largest["head.bias" if panel.title == "implicit" else "model.0.layers.1.1.weight"]
        )
    assert names["implicit"][-4:] == ["features", "class means", "W", "b"]
    assert not {"features", "class means", "W"} & set(names["fixed"])


def test_panels_of_distances_name_the_reference_epoch(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained / "runs" / "implicit-seed0", folder)
    assert main(["distance", str(folder), "--reference", "2"]) == 0
    titles = [panel.title for panel in markou(RunGroups([RunFolder(folder)]))]
    assert "ETF of weights to reference, epoch 2" in titles
    assert "ETF of means to reference, epoch 2" in titles


def test_names_of_files_differ(trained):
    run = RunFolder(trained).run("fixed-seed0")
    runs = RunGroups({"a/b": [run], "a b": [run], "..": [run], "a-b": [run]})
    assert len(set(runs.stems.values())) == 4
    assert not any("/" in stem for stem in runs.stems.values())
