"""The report: one page of runs, from their folders alone."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest
import torch
import yaml

from browser import chromium, errors, needs_browser, requested
from helpers import error_of, slow_except
from neuralcollapse.catalogue import METRICS
from neuralcollapse.cli import main
from neuralcollapse.lab import RunConfig, RunFolder, train_runs
from neuralcollapse.lab.figures.report.numbers import courses, motion, thinned
from neuralcollapse.lab.results.groups import RunGroups
from neuralcollapse.metrics import Measurement
from neuralcollapse.metrics.figures.features import project

SMALL = {"backbone": "mlp", "width": 16, "depth": 1, "train_samples": 150, "test_samples": 60}
LIMIT = 12 * 2**20  # bytes of a page


def page_of(folder: Path, out: Path, *arguments: str) -> Path:
    """The page of a folder, of which nothing is left but tables and records."""
    for run in RunFolder(folder).run_folders():
        shutil.rmtree(run.checkpoints, ignore_errors=True)
    assert main(["report", str(folder), "--out", str(out), *arguments]) == 0
    assert out.stat().st_size < LIMIT
    return out


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    runs = [
        RunConfig(method=method, seed=seed, epochs=4, **SMALL) for seed in (0, 1) for method in ("standard", "fixed")
    ]
    train_runs(runs, folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def hundred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 100 classes."""
    folder = tmp_path_factory.mktemp("runs") / "hundred"
    settings = SMALL | {"width": 128, "train_samples": 1000, "test_samples": 200, "digits_per_image": 2, "epochs": 3}
    train_runs(RunConfig(method="fixed", **settings), folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def digits_page(digits: Path) -> Path:
    return page_of(digits, digits.parent / "digits.html")


@pytest.fixture(scope="module")
def hundred_page(hundred: Path) -> Path:
    return page_of(hundred, hundred.parent / "hundred.html", "--classes", "0,42,7,99")


def table_of(page: Path, caption: str) -> pd.DataFrame:
    """The table with this caption, its first column the index."""
    for text in re.findall(r"<table>.*?</table>", page.read_text(), re.S):
        table = ElementTree.fromstring(text)
        if table.findtext("caption") == caption:
            rows = [[cell.text or "" for cell in row] for row in table.iter("tr")]
            return pd.DataFrame(rows[1:], columns=rows[0]).set_index(rows[0][0])
    raise AssertionError(f"no table {caption!r}")


def numbers_of(page: Path) -> dict[str, Any]:
    found = re.search(r'<script id="numbers" type="application/json">(.*?)</script>', page.read_text(), re.S)
    assert found is not None
    return json.loads(found[1])


def csv_of(folder: Path) -> pd.DataFrame:
    """Return the tables of the runs."""
    tables = []
    for run in RunFolder(folder).run_folders():
        settings = yaml.safe_load(run.config.read_text())
        tables.append(pd.read_csv(run.metrics).assign(method=settings["method"], seed=settings["seed"]))
    return pd.concat(tables)


@pytest.mark.parametrize("name", ["digits", "hundred"])
def test_tables_agree_with_the_csv(name, request):
    folder, page = request.getfixturevalue(name), request.getfixturevalue(f"{name}_page")
    metrics = csv_of(folder)
    last = metrics[metrics["epoch"] == metrics["epoch"].max()]
    for split in ("train", "test"):
        table = table_of(page, f"Last values, {split} split")
        assert set(table.index) == set(last[last["split"] == split]["metric"])
        for (metric, method), values in last[last["split"] == split].groupby(["metric", "method"])["value"]:
            told = [float(number) for number in table.loc[metric, method].split(" ± ")]
            expected = [values.mean(), values.std()] if len(values) > 1 else [values.mean()]
            assert told == pytest.approx(expected, rel=1e-3), (metric, method)
    results = table_of(page, "At the last measured epoch; collapse metrics of the train split")
    accuracies = last[(last["split"] == "test") & (last["metric"] == "accuracy")].groupby("method")["value"]
    for method, values in accuracies:
        assert results.loc[method, "test acc"].startswith(f"{values.mean():.2%}")


def test_curves_are_the_csv_over_seeds(digits, digits_page):
    found = numbers_of(digits_page)["courses"]
    metrics = csv_of(digits)
    assert list(found) == ["train", "test"]
    for (split, metric, method), values in metrics.groupby(["split", "metric", "method"]):
        over_seeds = values.groupby("epoch")["value"].agg(["mean", "min", "max"])
        course = found[split][metric][method]
        assert course["epochs"] == [1, 2, 3, 4]
        for ours, theirs in (("mean", "mean"), ("least", "min"), ("greatest", "max")):
            assert course[ours] == pytest.approx(over_seeds[theirs].tolist(), rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("classes", [None, [5, 0, 9], [3, 1, 2, 8]])
def test_frames_are_the_projections_of_the_records(classes, digits):
    runs = RunGroups(RunFolder(digits).run_folders())
    found = motion(runs, classes)
    chosen = classes or [0, 1, 2]
    assert found["classes"] == chosen
    assert found["epochs"] == [1, 2, 3, 4]
    for method, frames in found["frames"].items():
        for epoch, frame in zip(found["epochs"], frames, strict=True):
            expected = project(runs.record(method, "train", epoch), chosen)
            for name in ("means", "weights"):
                assert torch.tensor(frame[name]).T.tolist() == pytest.approx(getattr(expected, name), abs=1e-3)
            for one, places in zip(chosen, frame["features"], strict=True):
                mine = expected.features[expected.targets == one]
                assert 0 < len(places[0]) <= len(mine)
                assert torch.allclose(torch.tensor(places).T, mine[: len(places[0])].float(), atol=1e-3)


def test_shorter_runs_stay_at_their_last_record(digits, tmp_path):
    short = train_runs(RunConfig(method="implicit", epochs=2, **SMALL), tmp_path / "short", progress=False)
    folders = [RunFolder(digits).run("standard-seed0"), short]
    assert main(["report", *(str(run.path) for run in folders), "--out", str(tmp_path / "page.html")]) == 0
    frames = numbers_of(tmp_path / "page.html")["motion"]["frames"]
    by_label = {label.split(" ")[0]: [frame["epoch"] for frame in of] for label, of in frames.items()}
    assert by_label == {"standard": [1, 2, 3, 4], "implicit": [1, 2, 2, 2]}
    table = table_of(tmp_path / "page.html", "At the last measured epoch; collapse metrics of the train split")
    assert (table["test acc"] != "nan").all()


def test_class_means_that_are_all_equal_have_no_coordinates(digits, tmp_path):
    folder = tmp_path / "dead"
    shutil.copytree(digits / "runs" / "fixed-seed0", folder)
    path = RunFolder(folder).measurement(2, "train")
    record = Measurement.load(path)
    record.moments.means.zero_()
    record.save(path)
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    frames = numbers_of(tmp_path / "page.html")["motion"]["frames"]["fixed"]
    assert [frame["means"][0][0] is None for frame in frames] == [False, True, False, False]


@pytest.mark.parametrize(("count", "limit"), [(1, 60), (60, 60), (61, 60), (1000, 60), (350, 2)])
def test_epochs_are_thinned_evenly_from_the_first_to_the_last(count, limit):
    kept = thinned(range(1, count + 1), limit)
    assert len(kept) == min(count, limit)
    assert (kept[0], kept[-1]) == (1, count)
    steps = {after - before for before, after in itertools.pairwise(kept)}
    assert not steps or (min(steps) >= 1 and max(steps) - min(steps) <= 1)


def test_many_long_runs_stay_small():
    epochs = range(1, 1001)
    of_one = pd.DataFrame(
        [(e, name, 1 / (3 * e)) for e in epochs for name in METRICS], columns=["epoch", "metric", "value"]
    )
    runs = [
        of_one.assign(method=f"m{method}", split=split, seed=seed)
        for method in range(12)
        for split in ("train", "test")
        for seed in (0, 1)
    ]
    found = courses(pd.concat(runs))
    assert len(json.dumps(found, separators=(",", ":"))) < 3 * 2**20
    assert found["test"]["accuracy"]["m11"]["epochs"][-1] == 1000


def test_nothing_from_a_folder_is_read_as_html(digits, tmp_path):
    bad = "</script><img src=x onerror=alert(1)>"
    folder = tmp_path / "bad"
    shutil.copytree(digits / "runs" / "fixed-seed0", folder)
    for path, name in ((folder / "config.yaml", "backbone"), (folder / "environment.yaml", "data")):
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {name: bad}))
    second = tmp_path / "second"
    shutil.copytree(digits / "runs" / "fixed-seed0", second)
    out = tmp_path / "page.html"
    assert main(["report", str(folder), str(second), "--out", str(out)]) == 0
    text = out.read_text()
    assert "<img" not in text
    assert text.count("</script>") == 3
    labels = numbers_of(out)["courses"]["train"]["accuracy"]
    assert [label.startswith("</script><img src=x") for label in labels] == [True, False]


def test_the_title_of_unlike_runs_names_what_differs_and_what_is_common(digits, tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    for folder, changed in zip(folders, ({}, {"backbone": "convnet", "optimizer": "adam", "lr": 0.001}), strict=True):
        shutil.copytree(digits / "runs" / "fixed-seed0", folder)
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | changed))
    out = tmp_path / "page.html"
    assert main(["report", *map(str, folders), "--out", str(out)]) == 0
    text = out.read_text()
    (heading,) = re.findall(r"<h1>(.*)</h1>", text)
    assert heading.startswith("fixed, cross-entropy on digits: ")
    assert heading.endswith("; differing: backbone (mlp, convnet), optimizer (sgd, adam)")
    assert f"<title>{heading} – neuralcollapse</title>" in text
    assert "They differ in backbone, optimizer, lr." in text
    assert list(numbers_of(out)["styles"]) == ["mlp sgd", "convnet adam"]
    results = table_of(out, "At the last measured epoch; collapse metrics of the train split")
    assert list(results.index) == ["mlp sgd", "convnet adam"]


def test_tables_and_figures_name_the_reference_epoch(digits, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(digits / "runs" / "fixed-seed0", folder)
    assert main(["distance", str(folder), "--reference", "3"]) == 0
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    assert "etf_means_reference (epoch 3)" in table_of(tmp_path / "page.html", "Last values, train split").index
    described = numbers_of(tmp_path / "page.html")["metrics"]["etf_means_reference"]
    assert described["label"] == "ETF of means to reference, epoch 3"


def test_bad_input_is_one_line(digits, hundred, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(digits / "runs" / "fixed-seed0", bare)
    shutil.rmtree(bare / "moments")
    there = tmp_path / "there.html"
    there.write_text("mine")
    out = ["--out", str(tmp_path / "out.html")]
    for arguments, message in [
        ([str(bare), *out], "no records of the train split in bare: run `neuralcollapse measure`"),
        ([str(digits), str(hundred), *out], "must have the same number of classes, got [10, 100]"),
        ([str(digits), "--out", str(there)], "exists: --overwrite replaces it"),
        ([str(digits), "--out", str(tmp_path / "out.pdf")], "out must be a file ending in .html, got"),
        ([str(digits), *out, "--classes", "0,1,10"], "three or four different ones of 0 to 9, got [0, 1, 10]"),
        ([str(digits), *out, "--classes", "0,1"], "three or four different ones of 0 to 9, got [0, 1]"),
        ([str(digits), *out, "--classes", "0,1,1"], "three or four different ones of 0 to 9, got [0, 1, 1]"),
        ([str(digits), *out, "--classes", "0,1,two"], "classes must be a list, each item an integer, got '0,1,two'"),
        ([str(tmp_path), *out], "must be the folder of a run, but has no config.yaml"),
    ]:
        assert message in error_of(capsys, "report", *arguments), arguments
    assert there.read_text() == "mine"
    assert not (tmp_path / "out.html").exists()
    assert main(["report", str(digits), "--out", str(there), "--overwrite"]) == 0
    assert there.read_text().startswith("<!DOCTYPE html>")


def test_it_imports_neither_lightning_nor_datasets(digits, tmp_path):
    arguments = ["report", str(digits), "--out", str(tmp_path / "page.html")]
    code = (
        f"import sys; from neuralcollapse.cli import main; assert main({arguments!r}) == 0\n"
        "assert not {'lightning', 'datasets', 'torchmetrics', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


def opened(browser: Any, page: Path) -> None:
    """Open a page, and wait until it has drawn."""
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(page.as_uri())
    drawn = "return document.readyState === 'complete' && document.querySelectorAll('#cosines .main-svg').length > 0"
    WebDriverWait(browser, 60).until(lambda found: found.execute_script(drawn))


def until(browser: Any, script: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 60).until(lambda found: found.execute_script(f"return {script}"))


@needs_browser
@pytest.mark.parametrize("name", slow_except(["digits", "hundred"], ["digits"]))
def test_the_page_in_a_browser(name, request, browser):
    """No host is asked, nothing goes wrong, and the slider moves the points, on a plane and in space."""
    from selenium.webdriver.common.keys import Keys

    page = request.getfixturevalue(f"{name}_page")
    requested(browser), errors(browser)
    opened(browser, page)
    plot = browser.find_element("css selector", "#motion .plot")
    slider = browser.find_element("id", "frame")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    before, told = plot.screenshot_as_png, plot.get_attribute("aria-label")
    assert plot.screenshot_as_png == before  # what differs below is not chance
    slider.send_keys(Keys.ARROW_RIGHT)
    assert browser.find_element("id", "epoch").text == "2"
    assert slider.get_attribute("aria-valuetext") == "epoch 2"
    browser.execute_script("arguments[0].blur()", slider)
    assert plot.screenshot_as_png != before
    assert "epoch 1" in told
    assert "epoch 2" in plot.get_attribute("aria-label")
    shown = browser.execute_script("return arguments[0].data.slice(1).map((trace) => [...trace.x])", plot)
    frame = next(iter(numbers_of(page)["motion"]["frames"].values()))[1]
    assert shown[::3] == [places[0] for places in frame["features"]]
    browser.find_element("id", "play").send_keys(Keys.ENTER)
    last = str(numbers_of(page)["motion"]["epochs"][-1])
    until(browser, f"document.getElementById('epoch').textContent === '{last}'")
    until(browser, "document.getElementById('play').textContent === 'Play'")
    asked = requested(browser)
    assert {url.partition("#")[0] for url in asked} == {page.as_uri()}
    assert errors(browser) == []


@needs_browser
def test_every_metric_is_drawn_of_either_split_and_says_what_it_shows(digits_page, browser):
    opened(browser, digits_page)
    browser.execute_script("document.querySelector('#courses details').open = true")
    metrics = numbers_of(digits_page)["metrics"]
    until(browser, f"document.querySelectorAll('#courses .plot.js-plotly-plot').length === {len(metrics)}")
    labels = [plot.get_attribute("aria-label") for plot in browser.find_elements("class name", "plot")]
    assert all(len(label) > 40 for label in labels)
    mean = numbers_of(digits_page)["courses"]["test"]["accuracy"]["standard"]["mean"]
    browser.execute_script(
        "const split = document.getElementById('split'); split.value = 'test'; split.dispatchEvent(new Event('change'))"
    )
    accuracy = browser.find_element("css selector", "#courses .plot")
    assert "accuracy (accuracy), test split" in accuracy.get_attribute("aria-label")
    lines = browser.execute_script(
        "return arguments[0].data.filter((trace) => trace.name).map(({y}) => [...y])", accuracy
    )
    assert mean in lines
    box = browser.find_element("css selector", "#groups input")
    box.click()
    lines = browser.execute_script(
        "return arguments[0].data.filter((trace) => trace.name).map(({y}) => [...y])", accuracy
    )
    assert mean not in lines
    assert len(lines) == 1
    assert errors(browser) == []


@needs_browser
def test_ticks_are_whole_numbers_once_each_also_after_zooming(digits_page, browser):
    opened(browser, digits_page)

    def ticks(plot: str) -> list[str]:
        found = f"[...document.querySelector({plot!r}).querySelectorAll('.xtick text')].map((tick) => tick.textContent)"
        return browser.execute_script(f"return {found}")

    assert ticks("#courses .plot") == ["1", "2", "3", "4"]
    assert ticks("#cosines .plot") == ["0", "2", "4", "6", "8"]
    to = "Plotly.relayout(document.querySelector('#courses .plot'), {'xaxis.range[0]': %s, 'xaxis.range[1]': %s})"
    for first, last, expected in [
        (1, 200, ["50", "100", "150", "200"]),
        (2.2, 3.9, ["3"]),
        (1, 4, ["1", "2", "3", "4"]),
    ]:
        browser.execute_script(to % (first, last))
        until(browser, "document.querySelector('#courses .plot').layout.xaxis.dtick === " + str(50 if last > 99 else 1))
        until(
            browser,
            f"document.querySelectorAll('#courses .plot')[0].querySelectorAll('.xtick').length === {len(expected)}",
        )
        assert ticks("#courses .plot") == expected
    assert errors(browser) == []


@needs_browser
def test_the_page_and_its_figures_follow_the_colour_scheme(digits_page, browser):
    grounds = {}
    for scheme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        if scheme == "light":
            opened(browser, digits_page)  # the dark one comes while it is open
        plots = "[...document.querySelectorAll('.js-plotly-plot')].map((plot) => plot.layout.paper_bgcolor)"
        paper = "getComputedStyle(document.documentElement).getPropertyValue('--paper').trim()"
        until(browser, f"{plots}.every((colour) => colour === {paper})")
        grounds[scheme] = browser.execute_script(f"return {paper}")
    assert grounds["light"] == "#ffffff"
    assert int(grounds["dark"][1:3], 16) < 40
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@needs_browser
def test_on_a_narrow_screen_nothing_but_tables_is_wider_than_it(digits_page, browser):
    size = {"width": 380, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    opened(browser, digits_page)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 380
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
