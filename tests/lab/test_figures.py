"""Figures are drawn from tables alone."""

from __future__ import annotations

import pandas as pd
import pytest
from PIL import Image

from neuralcollapse.lab.figures.curves import draw_figures
from neuralcollapse.metrics.catalogue import METRICS


def table(train: float, test: float) -> pd.DataFrame:
    """Every metric, falling by this factor over three epochs on each split."""
    rows = [
        (method, seed, epoch, split, name, factor ** (epoch - 1) * (1 + 0.1 * seed))
        for method in ("standard", "frame")
        for seed in (0, 1)
        for epoch in (1, 2, 3)
        for split, factor in (("train", train), ("test", test))
        for name in METRICS
    ]
    return pd.DataFrame(rows, columns=["method", "seed", "epoch", "split", "metric", "value"])


@pytest.mark.parametrize(("train", "test"), [(0.1, 0.9), (0.0, 1.0)])
def test_any_course_of_any_metric_can_be_drawn(train, test, tmp_path):
    files = draw_figures(table(train, test), tmp_path, "a run", 10)
    assert [file.name for file in files] == [
        *(f"{n}.png" for n in ("accuracy", "nc1", "nc2", "nc3", "nc4")),
        "all_metrics.png",
    ]
    for file in files:
        with Image.open(file) as picture:
            assert len(picture.convert("RGB").getcolors(10**7)) > 10
