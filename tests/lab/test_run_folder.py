"""Run folders of today's format and of those before."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from helpers import error_of
from neuralcollapse import Measurement, measure
from neuralcollapse.cli import main
from neuralcollapse.lab import RunConfig, RunFolder, train_runs
from neuralcollapse.lab.figures.summary import summarise
from neuralcollapse.lab.results.provenance import forget_peak_memory, peak_memory
from neuralcollapse.lab.results.tables import gather, read_table

FIXTURES = Path(__file__).parents[1] / "fixtures"
SMALL = {"backbone": "mlp", "width": 12, "depth": 1, "train_samples": 200, "test_samples": 60, "epochs": 1}


def test_a_folder_of_the_unreleased_format_0_is_refused(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("environment: {}\nmethod: fixed\n")
    for command in ("train --resume --out", "plot --figure papyan", "aggregate --out all.csv", "distance", "measure"):
        assert "a run of an unreleased format, 0" in error_of(capsys, *command.split(), str(tmp_path))
    file = ["--config", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "new")]
    assert "a run in format 0, which was never released" in error_of(capsys, "train", *file)


@pytest.mark.parametrize(
    ("settings", "meant"),
    [
        ({"method": "fixed"}, {"orientation": "canonical"}),
        ({"method": "implicit"}, {"orientation": None}),
        ({"methods": ["standard", "fixed"]}, {"orientation": "canonical"}),
        ({"loss": "dot-regression", "method": "implicit"}, {"loss": "dot-regression-published", "orientation": None}),
        ({"losses": ["mse", "dot-regression"]}, {"losses": ["mse", "dot-regression-published"]}),
        ({"schedule": "one-cycle", "optimizer": "adam"}, {"schedule_options": {"cycle_momentum": False}}),
        ({"schedule": "one-cycle", "optimizer": "lbfgs"}, {"schedule_options": None}),
        ({"schedule": "cosine", "optimizer": "sgd"}, {"schedule_options": None}),
    ],
)
def test_settings_whose_default_has_changed_keep_their_meaning_in_older_folders(settings, meant, tmp_path):
    for number, expected in ((1, meant), (2, {name: settings.get(name) for name in meant})):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"format": number, **settings}))
        found = RunFolder(tmp_path).settings()
        assert {name: found.get(name) for name in meant} == expected


@pytest.mark.parametrize(
    ("former", "today"),
    [
        ({"measure_every": 5, "measure_from": 1, "measure_last": False}, {"measure_at": [1, 6, ".."]}),
        ({"measure_every": 2, "measure_from": 4, "measure_last": True}, {"measure_at": [1, 4, 6, "..", "last"]}),
        ({"measure_every": 5, "measure_from": 5, "measure_last": True}, {"measure_at": 5}),
        ({"checkpoint_every": 3, "checkpoint_from": 3, "checkpoint_epochs": []}, {"keep_at": 3}),
        ({"checkpoint_every": 3, "checkpoint_from": 2, "checkpoint_epochs": [7]}, {"keep_at": [7, 1, 2, 5, ".."]}),
        ({"checkpoint_epochs": [2, 4]}, {"keep_at": [2, 4]}),
        ({"drop_copies": True, "allow_absent_classes": True}, {"leave_out": ["copies", "absent-classes"]}),
        ({"train_split": "a", "data_config": "b"}, {"data_options": {"train_split": "a", "config": "b"}}),
        ({"generator": "published"}, {"data_options": "published"}),
        ({"crop_padding": 4, "flip": True}, {"augmentation": {"crop_padding": 4, "flip": True}}),
        ({"stratified": True}, {"sampling": "stratified"}),
        ({"stratified": False, "classes_per_batch": 4}, {"sampling": 4}),
        ({"random_labels": True, "label_noise": 0.0}, {"label_noise": "permuted"}),
        ({"imbalance": "step", "imbalance_factor": 0.2}, {"imbalance": {"step": 0.2}}),
        ({"imbalance": "none", "memory_budget": 9.0}, {"imbalance": None, "workers": "in-memory"}),
        ({"unit_weight": True, "unit_start": False}, {"unit_weight": "published"}),
        ({"loss": "nonl", "bidirectional": True}, {"loss": "bidirectional-nonl"}),
        ({"feature_decay": 1e-4, "published_quirk": True}, {"feature_decay": "published"}),
        ({"schedule": "multistep", "milestones": [3]}, {"schedule": "step", "schedule_options": {"step_at": [3]}}),
        ({"schedule": "step", "step_epochs": 3}, {"schedule": "step", "schedule_options": {"step_at": 3}}),
        ({"lbfgs_history": 5, "lbfgs_iterations": 6}, {"optimizer_options": {"history": 5, "iterations": 6}}),
        ({"patch_size": 4}, {"backbone_options": {"patch_size": 4}}),
        (
            {"three_phase": True, "div_factor": 5.0, "final_div_factor": 9.0, "cycle_momentum": False},
            {
                "schedule_options": {
                    "three_phase": True,
                    "div_factor": 5.0,
                    "final_div_factor": 9.0,
                    "cycle_momentum": False,
                }
            },
        ),
        ({"batch_norm_affine": False}, {"backbone_options": {"batch_norm_affine": False}}),
    ],
)
def test_former_names_of_settings_are_read_in_folders_of_format_2(former, today, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"format": 2, **former}))
    assert RunFolder(tmp_path).settings() == today


def test_former_names_of_settings_are_read_in_folders_of_format_3(tmp_path):
    former = {
        "warmup_epochs": 1,
        "step_at": [2],
        "lr_factor": 0.5,
        "initialisation": "torch",
        "batch_norm_affine": False,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"format": 3, **former}))
    assert RunFolder(tmp_path).settings() == {
        "schedule_options": {"warmup_epochs": 1, "step_at": [2], "lr_factor": 0.5},
        "backbone_options": {"initialisation": "torch", "batch_norm_affine": False},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"format": 3, "one_cycle": {"pct_start": 0.2}}))
    assert RunFolder(tmp_path).settings() == {"schedule_options": {"pct_start": 0.2}}


def test_a_run_of_format_3_resumes_with_its_options(tmp_path):
    out = tmp_path / "out"
    options = {"schedule": "step", "schedule_options": {"step_at": 1}, "backbone_options": {"batch_norm_affine": False}}
    train_runs(RunConfig(**SMALL, **options), out, progress=False)
    settings = yaml.safe_load((out / "config.yaml").read_text())
    for name in ("schedule_options", "backbone_options"):
        settings |= settings.pop(name)
    del settings["warmup_epochs"]  # a setting that did not exist when the run began has its default
    (out / "config.yaml").write_text(yaml.safe_dump(settings | {"format": 3}))
    assert main(["train", "--resume", "--epochs", "2", "--out", str(out)]) == 0
    resumed = RunFolder(out).settings()
    assert resumed["schedule_options"] == {"warmup_epochs": 0, "step_at": 1, "lr_factor": 0.1}
    assert resumed["backbone_options"] == {"batch_norm_affine": False}


def test_a_config_of_an_older_folder_keeps_its_meaning_as_a_file_of_settings(tmp_path, capsys):
    file = tmp_path / "config.yaml"
    for head, orientation in (({"format": 1}, "canonical"), ({}, "random")):
        file.write_text(yaml.safe_dump({**head, "method": "fixed"}))
        assert main(["train", "--config", str(file), "--print_config"]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["orientation"] == orientation
        assert main(["train", "--config", str(file), "--orientation", "random", "--print_config"]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["orientation"] == "random"


def test_a_fixed_run_of_format_1_resumes_with_its_orientation(tmp_path):
    out = tmp_path / "out"
    run = RunConfig(method="fixed", orientation="canonical", schedule="constant", **SMALL)
    train_runs(run, out, progress=False)
    settings = yaml.safe_load((out / "config.yaml").read_text())
    del settings["orientation"]
    (out / "config.yaml").write_text(yaml.safe_dump(settings | {"format": 1}))
    assert main(["train", "--resume", "--epochs", "2", "--out", str(out)]) == 0
    assert RunFolder(out).settings()["orientation"] == "canonical"


def test_a_folder_of_a_newer_format_is_refused(tmp_path, capsys):
    out = tmp_path / "out"
    train_runs(RunConfig(**SMALL), out, progress=False)
    settings = yaml.safe_load((out / "config.yaml").read_text())
    (out / "config.yaml").write_text(yaml.safe_dump(settings | {"format": 99}))
    message = error_of(capsys, "train", "--resume", "--out", str(out))
    assert "is a run of format 99, but this version of neuralcollapse reads up to 4: install a newer version" in message


def test_what_is_no_run_folder_is_said(tmp_path):
    with pytest.raises(ValueError, match="must be the folder of a run, but has no config.yaml"):
        RunFolder(tmp_path).run_folders()


def test_a_list_of_runs_trains_each_into_a_folder_named_after_what_it_is(tmp_path):
    runs = [RunConfig(method="fixed", lr=rate, **SMALL) for rate in (0.1, 0.2)]
    folder = train_runs(runs, tmp_path / "out", progress=False)
    assert [run.path.name for run in folder.run_folders()] == ["fixed-lr0.1-seed0", "fixed-lr0.2-seed0"]
    assert [run.settings()["lr"] for run in folder.run_folders()] == [0.1, 0.2]
    stored = folder.settings()
    assert stored["epochs"] == 1
    assert "lr" not in stored
    with pytest.raises(ValueError, match="--resume resumes it"):
        train_runs(runs, tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="runs must be distinct"):
        train_runs([runs[0], runs[0]], tmp_path / "other", progress=False)
    with pytest.raises(ValueError, match="runs must contain at least one run"):
        train_runs([], tmp_path / "other", progress=False)
    assert not (tmp_path / "other").exists()


def test_a_part_of_the_training_images_is_held_out_and_measured(tmp_path):
    config = RunConfig(**SMALL, validation_share=0.25, label_noise=0.5, data_seed=3)
    folder = train_runs(config, tmp_path / "out", progress=False)
    metrics = gather([folder], "metrics")
    assert set(metrics["split"]) == {"train", "validation", "test"}
    assert folder.read_environment()["data"].startswith("digits: 150 train, 50 validation and 60 test images")
    assert "validation acc" in summarise(folder, "train").table
    assert len((tmp_path / "out" / "train_labels.csv").read_text().splitlines()) == 151


def test_a_folder_of_format_1_is_read_and_drawn_from(tmp_path):
    """What version 0.1.0 wrote once settings and environment were apart; one seed has kept its records."""
    copy = Path(shutil.copytree(FIXTURES / "format1", tmp_path / "format1"))
    folder = RunFolder(copy)
    assert [run.path.name for run in folder.run_folders()] == [
        f"{method}-seed{seed}" for seed in (0, 1) for method in ("standard", "implicit")
    ]
    assert folder.settings()["methods"] == ["standard", "implicit"]
    assert "| implicit" in summarise(folder, "compare").table
    one = str(folder.run("implicit-seed0").path)
    assert main(["distance", one]) == 0
    assert main(["plot", one, "--figure", "margins", "--out", str(tmp_path / "figures")]) == 0
    assert main(["aggregate", str(copy), "--out", str(tmp_path / "all.csv")]) == 0


def test_a_checkpoint_of_format_1_is_read_and_not_resumed(tmp_path, capsys):
    """Version 0.1.0 wrote it when SIGTERM stopped it inside the second epoch; as that of an epoch it is measured."""
    folder = RunFolder(shutil.copytree(FIXTURES / "checkpoint1", tmp_path / "checkpoint1"))
    checkpoint = torch.load(folder.last_checkpoint, weights_only=True)
    provenance = checkpoint["neuralcollapse"]
    assert (provenance["format_version"], provenance["epoch"], provenance["batches"]) == (1, 2, 2)
    message = error_of(capsys, "train", "--resume", "--out", str(folder.path))
    assert "last.ckpt' cannot be read: it is of format 1, written by an earlier version, and can be measured" in message
    provenance |= {"epoch": 3}
    del provenance["batches"]
    torch.save(checkpoint, folder.last_checkpoint)
    assert main(["measure", str(folder.path)]) == 0
    assert set(read_table(folder.metrics)["epoch"]) == {1, 3}


def test_peak_memory_is_of_what_was_in_use_since_it_was_forgotten():
    block = bytearray(200 << 20)
    with_block = peak_memory()
    del block
    forget_peak_memory()
    if not Path("/proc/self/clear_refs").exists() or torch.cuda.is_available():
        pytest.skip("the peak of a process cannot be forgotten here")
    assert peak_memory() < with_block - 150


def test_recorded_measurements_are_those_that_a_training_writes(tmp_path):
    run = train_runs(RunConfig(**SMALL | {"epochs": 3}, measure_at=1), tmp_path / "run", progress=False)
    folder = RunFolder(tmp_path / "recorded")
    folder.start(run.settings())
    measured = {key: Measurement.load(path) for key, path in run.measured().items()}
    order = [(epoch, split) for epoch in (1, 2, 3) for split in ("train", "test")]
    # As by a run that is stopped after the second epoch's table is written, and resumes from the first.
    for epoch, split in [*order[:4], *order[2:]]:
        assert folder.record(epoch, split, measured[epoch, split]) == folder.measurement(epoch, split)
    assert folder.metrics.read_bytes() == run.metrics.read_bytes()
    for key, path in run.measured().items():  # but for the order of their metadata, which differs with each writing
        with safe_open(path, "pt") as written, safe_open(folder.measurement(*key), "pt") as recorded:
            assert recorded.metadata()["checksum"] == written.metadata()["checksum"]


def test_a_measurement_is_recorded_under_its_epoch_and_split(tmp_path):
    folder = RunFolder(tmp_path)
    batches = [(torch.randn(8, 6), torch.arange(8) % 4)]
    measurement = measure(torch.nn.Linear(6, 4), batches, progress=False)
    with pytest.raises(ValueError, match="must be the folder of a run, but has no config.yaml"):
        folder.record(1, "train", measurement)
    folder.start({})
    record = Measurement.load(folder.record(2, "train", measurement))
    assert (record.provenance.epoch, record.provenance.split) == (2, "train")
    with pytest.raises(ValueError, match="must be of epoch 3, train split, and its provenance is epoch 2, train split"):
        folder.record(3, "train", record)
    with pytest.raises(ValueError, match="measurement must be the result of measure, got dict"):
        folder.record(2, "train", measurement.metrics)
    for split in ("", "..", "a/b", "=1+1"):
        with pytest.raises(ValueError, match="split must be a name without a path"):
            folder.record(2, split, measurement)
    with pytest.raises(ValueError, match="epoch must be"):
        folder.record(-1, "train", measurement)
    folder.record(1, "train", measurement)
    assert read_table(folder.metrics)["epoch"].is_monotonic_increasing


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Record each time, in order, that the table of metrics is read or replaced."""
    events: list[str] = []
    names = {"open": "read", "os.rename": "written"}

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if active and event in names and str(arguments[event == "os.rename"]).endswith("metrics.csv"):
            events.append(names[event])

    active = True
    sys.addaudithook(hook)  # it cannot be removed
    yield events
    active = False


def test_a_training_writes_its_table_once_an_epoch_and_reads_it_only_to_resume(opened, tmp_path):
    settings = SMALL | {"checkpoint_minutes": 1e-9, "schedule": "constant", "measure_at": 1, "keep_at": 1}
    train_runs(RunConfig(**settings | {"epochs": 3}), tmp_path, progress=False)
    assert opened == ["written"] * 3
    train_runs(RunConfig(**settings | {"epochs": 5}), tmp_path, resume=True, progress=False)
    assert opened == ["written"] * 3 + ["read"] + ["written"] * 2


def test_rows_that_another_process_adds_stay(tmp_path):
    folder, other = RunFolder.create(tmp_path, name="mine"), RunFolder(tmp_path)
    batches = [(torch.randn(8, 6), torch.arange(8) % 4)]
    measurement = measure(torch.nn.Linear(6, 4), batches, progress=False)
    folder.record(1, "train", measurement)
    other.record(1, "test", measurement)
    folder.record_splits(2, {"train": measurement, "test": measurement})
    assert {row[:2] for row in folder.metric_rows.load()} == {(1, "train"), (1, "test"), (2, "train"), (2, "test")}
    assert folder.metric_rows.load() == list(read_table(folder.metrics).itertuples(index=False, name=None))


def test_a_folder_with_the_checksums_of_an_earlier_version_is_read_and_resumed(tmp_path):
    folder = train_runs(RunConfig(**SMALL, schedule="constant"), tmp_path / "out", progress=False)
    manifest = folder.path / "checksums.yaml"
    manifest.write_text("metrics.csv:\n- 0a0b\n")
    assert set(read_table(folder.metrics)["epoch"]) == {1}
    train_runs(RunConfig(**SMALL | {"epochs": 2}, schedule="constant"), folder.path, resume=True, progress=False)
    assert set(read_table(folder.metrics)["epoch"]) == {1, 2}
    assert not manifest.exists()  # an earlier version would refuse the new files by it
