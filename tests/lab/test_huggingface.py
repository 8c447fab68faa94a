"""The callback of `transformers.Trainer`: what it records, and the commands that read it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers import normal
from neuralcollapse.cli import main
from neuralcollapse.lab import RunFolder
from neuralcollapse.lab.results.tables import read_table

transformers = pytest.importorskip("transformers")

IMAGES, LABELS = normal(40, 1, 8, 8, dtype=torch.float32), torch.arange(40) % 5
DATA = [{"pixel_values": image, "labels": label} for image, label in zip(IMAGES, LABELS, strict=True)]


def train(folder: Path, run: RunFolder | Path, *, resume: bool = False, **settings: object) -> dict[str, float]:
    """Train a tiny ViT; return the last metrics, measured by hand."""
    from neuralcollapse import measure
    from neuralcollapse.lab.huggingface import CollapseCallback

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=5, **sizes)
    model = transformers.ViTForImageClassification(config)
    settings = {"num_train_epochs": 3, "per_device_train_batch_size": 10, "learning_rate": 1e-2} | settings
    arguments = transformers.TrainingArguments(
        str(folder), report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="epoch", **settings
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=DATA)
    loaders = {"train": trainer.get_eval_dataloader(DATA), "test": trainer.get_eval_dataloader(DATA[:20])}
    trainer.add_callback(CollapseCallback(loaders, run))
    trainer.train(resume_from_checkpoint=resume)
    return measure(model, [(IMAGES, LABELS)], progress=False).metrics


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, dict[str, float]]:
    folder = tmp_path_factory.mktemp("vit")
    run = RunFolder.create(folder / "run", name="tiny ViT", settings={"lr": 1e-2})
    return run, train(folder / "trainer", run)


def test_every_epoch_and_split_is_recorded(recorded):
    run, expected = recorded
    assert set(run.measured()) == {(epoch, split) for epoch in (1, 2, 3) for split in ("train", "test")}
    table = read_table(run.metrics).query("epoch == 3 and split == 'train'").set_index("metric")["value"]
    assert table["nc1_quotient"] == pytest.approx(expected["nc1_quotient"], rel=1e-4)
    assert table["accuracy"] == expected["accuracy"]


def test_the_commands_read_the_run(recorded, tmp_path):
    path = str(recorded[0].path)
    assert main(["distance", path]) == 0
    assert main(["aggregate", path, "--out", str(tmp_path / "all.csv")]) == 0
    assert main(["plot", path, "--figure", "papyan", "--out", str(tmp_path)]) == 0
    assert main(["report", path, "--out", str(tmp_path / "page.html")]) == 0
    assert "tiny ViT" in (tmp_path / "page.html").read_text()


def test_a_training_that_resumes_continues_its_run(recorded, tmp_path):
    train(tmp_path / "trainer", tmp_path / "run", num_train_epochs=2)
    assert RunFolder(tmp_path / "run").settings() == {"name": "ViTForImageClassification"}
    with pytest.raises(ValueError, match="folder must be a run without measurements"):
        train(tmp_path / "other", tmp_path / "run")
    train(tmp_path / "trainer", tmp_path / "run", resume=True)
    assert read_table(tmp_path / "run" / "metrics.csv")["epoch"].unique().tolist() == [1, 2, 3]


def test_the_last_epoch_may_be_incomplete(tmp_path):
    train(tmp_path / "trainer", tmp_path / "run", max_steps=6)
    assert read_table(tmp_path / "run" / "metrics.csv")["epoch"].unique().tolist() == [1, 2]


def test_loaders_and_options_are_checked(tmp_path):
    from neuralcollapse.lab.huggingface import CollapseCallback

    with pytest.raises(ValueError, match="loaders must name at least one split"):
        CollapseCallback({}, tmp_path)
    with pytest.raises(ValueError, match="options must be arguments of measure, got classifer"):
        CollapseCallback({"train": [1]}, tmp_path, classifer="head")
