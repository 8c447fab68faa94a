"""The benchmark of an accelerator at tiny sizes on a CPU: `benchmarks/gpu.py --tiny`."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from neuralcollapse.lab import RunConfig, load_data

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
# Keys that every row of a section has.
ROWS = {
    "environment": {"device", "torch", "neuralcollapse"},
    "heads": {"num_classes", "feature_dim", "head", "eager_ms", "compile_s", "compiled_ms", "loss_difference"},
    "nearest_etf": {"method", "condition", "forward_ms", "forward_and_backward_ms", "relative_error"},
    "metrics": {"stem", "dtype", "measured_images_per_s", "measured_over_forward"},
    "waits": {"run", "method", "part", "waits", "reason"},
    "two_ranks": set(),
    "fast_small": {"recipe", "accuracy", "target", "epoch_s", "train_s", "total_s", "curve"},
    "fast_medium": {"recipe", "accuracy", "target", "epoch_s", "train_s", "total_s", "curve"},
    "fast_large": {"recipe", "accuracy", "target", "epoch_s", "train_s", "total_s", "curve"},
    "published": {"recipe", "epoch_s", "extrapolated_hours", "extrapolated_from_epochs"},
}


@pytest.fixture(scope="module")
def sections(tmp_path_factory):
    """The rows of the JSON file, by section."""
    folder = tmp_path_factory.mktemp("tiny")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, BENCHMARKS / "gpu.py", "--tiny", "--folder", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    rows = json.loads((folder / "gpu-cpu-tiny.json").read_text())["rows"]
    errors = [(row["section"], row["error"]) for row in rows if "error" in row]
    assert (done.returncode, errors) == (0, []), done.stderr
    return {row["section"]: row for row in rows}


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module, on a machine without CUDA."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return importlib.import_module("gpu")


@pytest.mark.slow
def test_every_section_runs_without_an_error(sections):
    assert list(sections) == list(ROWS)
    for name, section in sections.items():
        assert "less than a minute" in section["needs"]
        if name == "two_ranks":
            assert section["status"] == "skipped"
            assert section["reason"] == "needs cuda: 2 devices, and this machine has 0"
        else:
            assert section["status"] == "done"
            assert section["results"]
        for row in section["results"]:
            assert row.keys() >= ROWS[name]
            assert "error" not in row


@pytest.mark.slow
def test_numbers_are_those_of_what_was_run(gpu, sections):
    heads = sections["heads"]["results"]
    assert [row["head"] for row in heads] == ["linear", "fixed", "nearest_etf", "nearest_frame", "class_means"]
    assert all(row["eager_ms"] > 0 and row["compiled_ms"] > 0 and row["loss_difference"] < 1e-4 for row in heads)
    solves = sections["nearest_etf"]["results"]
    assert {row["method"] for row in solves} == {"products", "spectral", "svd"}
    assert all(row["relative_error"] < 1e-5 for row in solves)
    assert all(row["relative_gradient_error"] < 1e-5 for row in solves if row["method"] != "svd")
    assert [(row["run"], row["method"], row["part"]) for row in sections["waits"]["results"]] == [
        (run, method, part)
        for run in ("convnet on the digits", "fast-cifar10-small")
        for method in ("standard", "fixed", "implicit", "means")
        for part in ("batch", "step")
    ]
    assert [sections[f"fast_{size}"]["results"][0]["recipe"] for size in ("small", "medium", "large")] == list(gpu.FAST)
    (published,) = sections["published"]["results"]
    seconds = 350 * published["epoch_s"] + 71 * published["measure_s"]  # measured after epochs 1, 5, 10, ..., 350
    assert published["extrapolated_hours"] == pytest.approx(seconds / 3600, rel=2e-3)  # of four digits


def test_sections_over_the_budget_are_skipped_and_recorded(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--folder", str(tmp_path), "--budget-minutes", "0.4"])
    assert gpu.main() == 0
    rows = json.loads((tmp_path / "gpu-cpu-tiny.json").read_text())["rows"]
    assert [row["section"] for row in rows] == list(ROWS)
    assert {row["status"] for row in rows} == {"skipped"}
    reasons = {row["section"]: row["reason"] for row in rows}
    assert reasons["fast_large"] == "needs about 6 min, and 0.4 min of the budget are left"
    assert reasons["fast_large"] in capsys.readouterr().out


def test_without_cuda_only_tiny_sizes_run(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "a CUDA device is needed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_sections_fit_into_the_budget(gpu):
    assert sum(section.minutes for section in gpu.SECTIONS.values()) < 25


def test_a_failure_is_recorded_with_its_error(gpu, tmp_path):
    failed = gpu.result_of("heads", gpu.Bench("nowhere", True, tmp_path), 300)
    assert failed["status"] == "failed"
    assert failed["error"].startswith("Traceback")
    assert "nowhere" in failed["error"]
    late = gpu.result_of("metrics", gpu.Bench("cpu", True, tmp_path), 0)
    assert (late["status"], late["error"]) == ("failed", "stopped after 0 s, its limit")


def test_what_is_missing_is_said(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(3e9), int(8e9)))
    bench = gpu.Bench("cuda", False, tmp_path / "cifar10")
    assert gpu.SECTIONS["heads"].missing(bench) is None
    assert gpu.SECTIONS["two_ranks"].missing(bench) == "needs cuda: 2 devices, and this machine has 1"
    assert gpu.SECTIONS["published"].missing(bench).startswith(f"CIFAR-10 must be in {tmp_path / 'cifar10'}")
    bench.cifar10.mkdir()
    assert gpu.SECTIONS["published"].missing(bench) == "needs 4 GB of free device memory, and 3.0 GB are free"


@pytest.mark.parametrize("mode", ["error", "warn"])
def test_steps_that_wait_are_found_with_their_lines(gpu, monkeypatch, mode):
    """Every `torch.where` waits, as torch reports it in each mode; it is called in steps, not for batches."""
    config = RunConfig(method="standard", epochs=1, device="cpu", train_samples=120, batch_size=8)
    data, modes, where = load_data(config, progress=False), ["default"], torch.where

    def waiting(*arguments):
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        if modes[-1] == "warn":
            warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
        return where(*arguments)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch, "where", waiting)
    lines = gpu._lines_that_wait(config, data, "step", mode)
    assert modes[-1] == "default"
    assert modes.count(mode) == (1 if mode == "error" else len(gpu.CHECKED_STEPS))
    assert all(re.fullmatch(r"\S+\.py:\d+ in \w+: .*torch\.where.*", line) for line in lines)
    names = {line.partition(":")[0] for line in lines}
    assert names >= {"lab/training/objective.py"} if mode == "warn" else len(lines) == 1
    assert gpu._lines_that_wait(config, data, "batch", mode) == []


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_bench_leaves_the_accelerator_to_its_own_target():
    bench, gpu = (
        subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for target in ("bench", "bench-gpu")
    )
    assert "benchmarks/head.py" in bench
    assert "benchmarks/gpu.py" not in bench
    assert "benchmarks/gpu.py" in gpu
