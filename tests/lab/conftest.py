from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny networks are faster so, and the same whatever else the machine does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def data_set_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture
def with_figures() -> None:
    """Let commands that train draw their figures and write their report."""


@pytest.fixture(autouse=True)
def without_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the figures and the report of commands that train, which take longer than the small training itself.

    A test that is about them asks for `with_figures`.
    """
    if "with_figures" not in request.fixturenames:
        monkeypatch.setattr("neuralcollapse.lab.figures.summary.draw_figures", lambda *_: [])
        monkeypatch.setattr("neuralcollapse.lab.figures.summary.write_report", lambda *_: None)


@pytest.fixture
def real_data() -> Path:
    """The folder of real data sets, wherever it is; a test that needs it is skipped where there is none."""
    places = [os.environ.get("NEURALCOLLAPSE_DATA"), Path(__file__).parents[2].parent / "shared" / "data"]
    found = next((Path(place) for place in places if place and Path(place).is_dir()), None)
    if found is None:
        pytest.skip("no real data: neither NEURALCOLLAPSE_DATA nor ../shared/data is a folder")
    return found


@pytest.fixture(scope="session")
def noise_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set in Parquet files whose images and labels are both noise: 3000 to train on and 3000 to test on."""
    folder = tmp_path_factory.mktemp("noise")
    random = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    for split in ("train", "test"):
        images = list(random.integers(256, size=(3000, 6, 6), dtype=np.uint8))
        table = {"image": images, "label": random.integers(10, size=3000)}
        datasets.Dataset.from_dict(table, features=features).to_parquet(folder / f"{split}.parquet")
    return folder
