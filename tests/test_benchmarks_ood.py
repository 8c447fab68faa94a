"""The benchmark of detection at tiny sizes: `benchmarks/ood.py`."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_both_ways_have_the_same_auroc_and_every_detector_is_timed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    ood = importlib.import_module("ood")
    monkeypatch.setattr(ood, "peak_growth", lambda prepare, *arguments: prepare(*arguments)() or 1.0)  # no process
    sizes = "--samples 3000 --test_samples 2000 --feature_dim 24 --num_classes 4 --images 2 --width 4 --repeats 1"
    monkeypatch.setattr(sys, "argv", ["ood.py", *sizes.split(), "--folder", str(tmp_path)])
    ood.main()
    rows = json.loads((tmp_path / "ood.json").read_text())["rows"]
    kept, moments, with_norms = rows[:3]
    assert [row["way"] for row in rows[:3]] == ["kept", "moments", "moments_and_residual_norms"]
    assert set(kept["auroc"]) == set(with_norms["auroc"]) == {*moments["auroc"], "vim"}
    assert all(0.5 < value < 0.999 for value in kept["auroc"].values())  # neither chance nor perfect
    assert max(moments["auroc_difference"], with_norms["auroc_difference"]) <= 1e-6
    assert {row["score"] for row in rows[3:]} >= {"energy", "mahalanobis", "vim", "neco"}
    for row in rows[3:]:
        assert row["detector_over_model"] == pytest.approx(row["detector_s"] / row["model_s"], rel=1e-3)
