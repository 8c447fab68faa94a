"""The benchmark of features in files, at a small size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "features.py"


@pytest.mark.slow
def test_the_benchmark_measures_what_two_passes_of_numpy_give(tmp_path):
    sizes = ["--samples", "3000", "--dim", "16", "--classes", "30", "--out", tmp_path]
    subprocess.run([sys.executable, BENCHMARK, *sizes], check=True, capture_output=True)
    rows = json.loads((tmp_path / "features.json").read_text())["rows"]
    assert len(rows) == 3
    assert all(row["difference"] < 1e-9 for row in rows)
    assert all(row["seconds"] > 0 for row in rows)
    assert [row["metrics"] for row in rows] == sorted(row["metrics"] for row in rows)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process on Linux only")
def test_memory_does_not_grow_with_the_logits_of_all_samples(tmp_path):
    sizes = ["--samples", "50000", "--dim", "16", "--classes", "1000", "--out", tmp_path]
    subprocess.run([sys.executable, BENCHMARK, *sizes], check=True, capture_output=True)
    rows = json.loads((tmp_path / "features.json").read_text())["rows"]
    assert rows[-1]["way"] == "measure_features"
    assert rows[-1]["memory_gb"] < 0.2  # logits of all samples take 0.2 GB in fp32; a block's, 17 MB
