"""The commands `measure`, `distance` and `aggregate`: what a run folder gives without training."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from helpers import error_of, generator
from neuralcollapse import Measurement, etf_distances, measure, measure_features
from neuralcollapse.cli import main
from neuralcollapse.lab import RunConfig, RunFolder, train_runs
from neuralcollapse.lab.data.batches import evaluation_batches
from neuralcollapse.lab.data.load import load_data
from neuralcollapse.lab.evaluate.state_dict import EvaluationSettings
from neuralcollapse.lab.models.build import build_model
from neuralcollapse.lab.results.files import write_csv
from neuralcollapse.lab.results.groups import group_runs
from neuralcollapse.lab.results.statistics import epochs_to_levels, statistics_over_seeds
from neuralcollapse.lab.results.tables import read_table

SMALL = {"backbone": "mlp", "width": 24, "depth": 1, "train_samples": 200, "test_samples": 60}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds and two methods, of which every epoch was measured and kept."""
    folder = tmp_path_factory.mktemp("runs") / "all"
    runs = [RunConfig(method=m, seed=s, epochs=3, keep_at=1, **SMALL) for s in (0, 1) for m in ("standard", "implicit")]
    train_runs(runs, folder, progress=False)
    return folder


@pytest.fixture
def runs(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "runs"))


def test_measuring_afterwards_gives_what_training_gave(runs, capsys):
    run = RunFolder(runs / "runs" / "implicit-seed0")
    during = read_table(run.metrics)
    shutil.rmtree(run.moments)
    run.metrics.unlink()
    assert main(["measure", str(run.path)]) == 0
    assert str(run.measurement(2, "test")) in capsys.readouterr().out
    after = read_table(run.metrics)
    pd.testing.assert_frame_equal(during, after, rtol=1e-10, atol=0)
    before = run.metrics.read_bytes()
    assert main(["measure", str(run.path)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert run.metrics.read_bytes() == before


def test_what_was_added_to_a_table_stays_when_the_run_goes_on(tmp_path):
    folder = RunFolder(tmp_path / "run")
    asked = {
        "method": "standard",
        "seed": 0,
        "schedule": "constant",
        "measure_at": 2,
        "keep_at": 1,
        **SMALL,
    }
    train_runs(RunConfig(epochs=3, **asked), folder.path, progress=False)
    assert main(["measure", str(folder.path), "--every", "1"]) == 0
    assert main(["distance", str(folder.path)]) == 0
    before = read_table(folder.metrics)
    assert sorted(before["epoch"].unique()) == [1, 2, 3]
    train_runs(RunConfig(epochs=4, **asked), folder.path, resume=True, progress=False)
    after = read_table(folder.metrics)
    pd.testing.assert_frame_equal(
        after[after["epoch"] <= 3].sort_values(["epoch", "split", "metric"], ignore_index=True),
        before.sort_values(["epoch", "split", "metric"], ignore_index=True),
    )
    assert after["epoch"].max() == 4


def test_flips_give_the_accuracy_of_the_mean_logits_of_images_and_their_mirror_images(runs, capsys):
    run = RunFolder(runs / "runs" / "implicit-seed0")
    table = run.metrics.read_bytes()
    assert main(["measure", str(run.path), "--flips"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    config = RunConfig(**run.settings())
    data = load_data(config, progress=False)
    model = build_model(config, data.image_shape, data.num_classes).eval()
    state = torch.load(run.last_checkpoint, weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    images, targets = next(iter(evaluation_batches(data, config)["test"]))
    with torch.no_grad():
        plain, mirrored = model(images), model(torch.flip(images, dims=[3]))
    accuracies = [
        (logits.argmax(1) == targets).double().mean() for logits in (plain, torch.stack([plain, mirrored]).mean(0))
    ]
    assert line == f"{run.path}: test accuracy {accuracies[0]:.2%}, with flips {accuracies[1]:.2%}"
    assert accuracies[0] != accuracies[1]
    assert run.metrics.read_bytes() == table


def test_flips_refuse_what_has_no_effect_on_them(runs, capsys):
    run = str(runs / "runs" / "implicit-seed0")
    assert "every has no effect with flips" in error_of(capsys, "measure", run, "--flips", "--every", "2")
    shutil.rmtree(RunFolder(run).checkpoints)
    assert "must have its last checkpoint, but has none" in error_of(capsys, "measure", run, "--flips")


def test_every_split_and_layers_say_what_is_measured(runs):
    run = RunFolder(runs / "runs" / "standard-seed1")
    shutil.rmtree(run.moments)
    assert main(["measure", str(run.path), "--every", "2", "--split", "test"]) == 0
    assert set(run.measured()) == {(1, "test"), (3, "test")}
    assert main(["measure", str(run.path), "--split", "test", "--layers", "model.0.layers.1"]) == 0
    found = Measurement.load(run.measurement(2, "test"))
    assert list(found.layers) == ["model.model.0.layers.1"]
    assert found.layers["model.model.0.layers.1"]["nc1_quotient"] > 0


def test_a_record_gives_the_table_again(runs):
    run = RunFolder(runs / "runs" / "standard-seed0")
    table = read_table(run.metrics)
    for (epoch, split), path in run.measured().items():
        record = Measurement.load(path)
        assert (record.provenance.epoch, record.provenance.split) == (epoch, split)
        rows = table[(table["epoch"] == epoch) & (table["split"] == split)].set_index("metric")["value"]
        again = record.recompute().metrics
        assert rows.to_dict() == pytest.approx(again, rel=1e-12, abs=1e-12)


def test_distances_come_from_the_records_alone(runs, capsys):
    for run in RunFolder(runs).run_folders():
        shutil.rmtree(run.checkpoints)
    assert main(["distance", str(runs)]) == 0
    run = RunFolder(runs / "runs" / "implicit-seed1")
    table = read_table(run.metrics).query("epoch == 3 and split == 'test'").set_index("metric")["value"]
    first, last = (Measurement.load(run.measurement(epoch, "test")) for epoch in (1, 3))
    counts = last.moments.counts.double()
    centre = (counts[:, None] * last.moments.means).sum(0) / counts.sum()
    expected = etf_distances(last.weight.double(), last.moments.means - centre, center="classes")
    # Centred means have their class mean at the balanced centre only where classes are balanced: so these nearly are.
    assert table["etf_weights"] == pytest.approx(expected["etf_weights"], rel=1e-9, abs=1e-12)
    assert table["etf_means"] == pytest.approx(expected["etf_means"], rel=0.1)
    assert table["etf_means_reference"] > 0
    start = read_table(run.metrics).query("epoch == 1 and metric.str.endswith('_reference')")["value"]
    assert start.abs().max() < 1e-20
    assert first.provenance.labels == last.provenance.labels
    before = run.metrics.read_bytes()
    capsys.readouterr()
    assert main(["distance", str(runs)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert run.metrics.read_bytes() == before


def test_a_damaged_record_or_checkpoint_is_named_and_left_out(runs, capsys):
    run = RunFolder(runs / "runs" / "standard-seed0")
    record, checkpoint = run.measurement(2, "train"), run.checkpoint(3)
    record.write_bytes(record.read_bytes()[:1000])
    assert main(["distance", str(run.path)]) == 1
    assert str(record) in capsys.readouterr().err
    assert set(read_table(run.metrics).query("metric == 'etf_means' and split == 'train'")["epoch"]) == {1, 3}
    shutil.rmtree(run.moments)
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    run.last_checkpoint.unlink()
    assert main(["measure", str(run.path)]) == 1
    assert f"{str(checkpoint)!r} cannot be measured" in capsys.readouterr().err
    assert set(run.measured()) == {(epoch, split) for epoch in (1, 2) for split in ("train", "test")}


def test_statistics_are_over_runs_that_differ_in_their_seed_alone(runs, tmp_path, capsys):
    out = tmp_path / "all.csv"
    assert main(["aggregate", str(runs), "--out", str(out), "--reach", "accuracy=0.5,nc3_duality=0.6"]) == 0
    assert "implicit: 2 runs" in capsys.readouterr().out
    table = pd.read_csv(out)
    row = table.query("group == 'implicit' and epoch == 2 and split == 'test' and metric == 'accuracy'").iloc[0]
    values = [
        read_table(runs / "runs" / f"implicit-seed{seed}" / "metrics.csv")
        .query("epoch == 2 and split == 'test' and metric == 'accuracy'")["value"]
        .item()
        for seed in (0, 1)
    ]
    assert row["mean"] == pytest.approx(sum(values) / 2)
    assert row["std"] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))
    assert (row["min"], row["max"], row["seeds"]) == (min(values), max(values), 2)
    assert {"batch_loss", "batch_alignment"} <= set(table.query("split == 'training'")["metric"])
    assert set(pd.read_csv(tmp_path / "all-reach.csv")["metric"]) == {"accuracy", "nc3_duality"}
    assert main(["aggregate", str(runs), "--out", str(tmp_path / "all.parquet")]) == 0
    assert len(pd.read_parquet(tmp_path / "all.parquet")) == len(table)


def test_tables_for_papers_have_the_last_epoch_of_each_group(runs, tmp_path, capsys):
    for suffix in ("tex", "md"):
        out = tmp_path / f"all.{suffix}"
        options = ["--reach", "accuracy=0.5,nc3_duality=1e-9", "--metrics", "accuracy,nc3_duality"]
        assert main(["aggregate", str(runs), "--out", str(out), *options]) == 0
    assert main(["aggregate", str(runs), "--out", str(tmp_path / "all.csv")]) == 0
    table = pd.read_csv(tmp_path / "all.csv").query("epoch == 3").set_index(["group", "split", "metric"])
    lines = (tmp_path / "all.tex").read_text().split("\n")
    row = next(line for line in lines if "accuracy" in line and line.startswith("train"))
    values = [table.loc[(group, "train", "accuracy")] for group in ("standard", "implicit")]
    cells = [rf"$({100 * value['mean']:.2f} \pm {100 * value['std']:.2f})\,\%$" for value in values]
    assert set(cells) <= set(row.removesuffix(r" \\").split(" & "))
    assert "| epoch" in (tmp_path / "all.md").read_text()
    assert "not reached" in (tmp_path / "all-reach.md").read_text()
    assert r"nc3\_duality & $1 \cdot 10^{-9}$ & not reached" in (tmp_path / "all-reach.tex").read_text()
    assert "metrics has an effect on .tex and .md only" in error_of(
        capsys, "aggregate", str(runs), "--out", "a.csv", "--metrics", "all"
    )
    assert "got 'nc9'" in error_of(capsys, "aggregate", str(runs), "--out", "a.tex", "--metrics", "nc9")


def test_groups_are_named_after_what_they_differ_in(tmp_path):
    configs = [RunConfig(method="fixed", lr=lr, seed=s, epochs=1, **SMALL) for lr in (0.1, 0.2) for s in (3, 4)]
    for place, config in enumerate(configs):
        RunFolder(tmp_path / str(place)).start(config.in_force())
    folders = [RunFolder(tmp_path / str(place)) for place in range(4)]
    assert {name: len(found) for name, found in group_runs(folders).items()} == {"fixed lr=0.1": 2, "fixed lr=0.2": 2}
    with pytest.raises(ValueError, match="two of 'fixed lr=0.1' have seed 3"):
        group_runs([*folders, folders[0]])


def test_an_epoch_is_interpolated_between_those_measured():
    course = [(1, 0.2), (5, 0.6), (9, 0.5), (13, 0.9)]
    rows = [("a", 0, epoch, "train", name, value) for epoch, value in course for name in ("accuracy",)]
    rows += [("a", 0, epoch, "train", "nc3_duality", 1 - value) for epoch, value in course]
    values = pd.DataFrame(rows, columns=["group", "seed", "epoch", "split", "metric", "value"])
    levels = {"accuracy": 0.5, "nc3_duality": 0.25}
    assert epochs_to_levels(values, levels)["epoch"].tolist() == pytest.approx([4, 11.5])
    assert epochs_to_levels(values, {"accuracy": 0.1})["epoch"].tolist() == [1]
    assert epochs_to_levels(values, {"accuracy": 0.95})["epoch"].isna().all()
    with pytest.raises(ValueError, match="reach must name a metric that was measured on the train split"):
        epochs_to_levels(values, {"nc9": 1})
    assert statistics_over_seeds(values)["std"].isna().all()


@pytest.mark.parametrize("command", ["distance", "aggregate"])
def test_commands_on_folders_import_neither_lightning_nor_datasets(command, runs, tmp_path):
    arguments = [command, str(runs), *(["--out", str(tmp_path / "a.csv")] if command == "aggregate" else [])]
    code = (
        f"import sys; from neuralcollapse.cli import main; assert main({arguments!r}) == 0\n"
        "assert not {'lightning', 'datasets', 'matplotlib', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


class Block(nn.Module):
    """A residual block as torchvision names it."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        same = before == after and stride == 1
        shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        self.downsample = None if same else shortcut

    def forward(self, images):
        inner = self.bn2(self.conv2(self.bn1(self.conv1(images)).relu()))
        return (inner + (images if self.downsample is None else self.downsample(images))).relu()


class LookAlike(nn.Module):
    """A ResNet-18 as torchvision names it, of width 4."""

    def __init__(self, image_shape: tuple[int, int, int] = (1, 8, 8), classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(image_shape[0], 4, 7, 2, 3, bias=False), nn.BatchNorm2d(4)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        sizes = [4, 4, 8, 16, 32]
        for stage in range(1, 5):
            first = Block(sizes[stage - 1], sizes[stage], 1 if stage == 1 else 2)
            setattr(self, f"layer{stage}", nn.Sequential(first, Block(sizes[stage], sizes[stage], 1)))
        self.fc = nn.Linear(32, classes)

    def forward(self, images):
        out = self.maxpool(self.bn1(self.conv1(images)).relu())
        for stage in range(1, 5):
            out = getattr(self, f"layer{stage}")(out)
        return self.fc(out.mean((2, 3)))


@pytest.fixture
def foreign() -> LookAlike:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = LookAlike()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1, generator=generator())
                module.running_var.uniform_(0.5, 2, generator=generator(1))
    return model.eval()


@pytest.mark.parametrize("file", ["model.safetensors", "model.pt"])
def test_a_state_dict_of_torchvisions_names_is_measured(file, foreign, tmp_path):
    path, out = tmp_path / file, tmp_path / "out"
    if file.endswith("pt"):
        torch.save({"state_dict": foreign.state_dict()}, path)
    else:
        save_file(foreign.state_dict(), path)
    data = ["--data", "digits", "--train_samples", "300", "--test_samples", "80", "--out", str(out)]
    options = ["--model", "resnet18", "--model_options", '{"width": 4}', "--epoch", "7"]
    assert main(["measure", "--checkpoint", str(path), *options, *data]) == 0
    images = EvaluationSettings(train_samples=300, test_samples=80)
    loaders = evaluation_batches(load_data(images, progress=False), images)
    expected = measure(foreign, loaders["test"], train=loaders["train"], progress=False).metrics
    table = read_table(out / "metrics.csv").query("split == 'test'")
    assert set(table["epoch"]) == {7}
    assert table.set_index("metric")["value"].to_dict() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert main(["distance", str(out), "--reference", "7"]) == 0


def test_a_model_of_ones_own_class_is_measured(foreign, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someones_model.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, neurons):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(64, neurons), nn.ReLU(), nn.Linear(neurons, 10))\n"
    )
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
    torch.save(model.state_dict(), "model.pt")
    options = ["--model", "someones_model.Net", "--model_options", '{"neurons": 12}', "--out", "out"]
    assert main(["measure", "--checkpoint", "model.pt", *options, "--split", "test"]) == 0
    assert set(read_table(Path("out/metrics.csv"))["split"]) == {"test"}
    assert main(["measure", "--checkpoint", "model.pt", *options]) == 0
    assert set(read_table(Path("out/metrics.csv"))["split"]) == {"train", "test"}


OTHER_NAMES = """
from torch import nn

class Model(nn.Module):
    def __init__(self, temperature):
        super().__init__()
        self.fc, self.out, self.temperature = nn.Linear(64, 12), nn.Linear(12, 10), temperature

    def forward(self, images):
        return self.out(self.fc(images.flatten(1)).relu()) / self.temperature
"""


@pytest.mark.parametrize("temperature", [1, 2])
def test_the_classifier_of_a_checkpoint_computes_its_output(temperature, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "other_names", raising=False)
    (tmp_path / "other_names.py").write_text(OTHER_NAMES)
    state = {"fc.weight": (12, 64), "fc.bias": (12,), "out.weight": (10, 12), "out.bias": (10,)}
    save_file({name: torch.randn(shape, generator=generator(1)) for name, shape in state.items()}, "model.safetensors")
    options = ["--model", "other_names.Model", "--model_options", f'{{"temperature": {temperature}}}', "--out", "out"]
    code = main(["measure", "--checkpoint", "model.safetensors", *options, "--split", "test"])
    if temperature == 1:
        assert code == 0
        assert set(read_table(Path("out/metrics.csv"))["split"]) == {"test"}
        return
    assert code == 2
    line = capsys.readouterr().err.strip().split("\n")[-1]
    assert "no module of Model computes its output" in line
    assert "'out' with weight (10, 12) on features" in line
    assert not Path("out").exists()


def test_bad_input_is_one_line(runs, foreign, tmp_path, capsys):
    torch.save(foreign.state_dict(), tmp_path / "model.pt")
    (tmp_path / "broken.pt").write_bytes(b"no tensors")
    shutil.rmtree(runs / "runs" / "standard-seed0" / "checkpoints")
    shutil.rmtree(runs / "runs" / "standard-seed1" / "moments")
    one = str(runs / "runs" / "standard-seed0")
    elsewhere = ["measure", "--out", str(tmp_path / "new"), "--model", "resnet18", "--checkpoint"]
    (tmp_path / "there.csv").write_text("mine")
    for arguments, message in [
        (["measure", str(tmp_path)], "must be the folder of a run, but has no config.yaml"),
        (["measure"], "RUN must be the folder of a run or of several"),
        (["measure", one], "must have checkpoints to measure, but has none"),
        (
            ["measure", str(runs / "runs" / "implicit-seed0"), "--split", "train,exam"],
            "split must be of train, test",
        ),
        (["measure", one, "--every", "0"], "every must be at least 1, got 0"),
        (["measure", one, "--data", "digits"], "data belongs to --checkpoint: a run has its own"),
        ([*elsewhere, str(tmp_path / "none.pt")], "checkpoint must be a file"),
        ([*elsewhere, str(tmp_path / "broken.pt")], "cannot be read"),
        ([*elsewhere, str(tmp_path / "model.pt")], "does not fit"),
        (["distance", str(runs / "runs" / "standard-seed1")], "must have records in moments/, but has none"),
        (["distance", one, "--reference", "9"], "reference must be a measured epoch"),
        (
            ["aggregate", str(runs), "--out", "a.txt"],
            "out must be a file ending in .csv, .parquet, .tex or .md, got 'a.txt'",
        ),
        (["aggregate", str(runs), "--out", str(tmp_path / "there.csv")], "exists: --overwrite replaces it"),
        (
            ["aggregate", str(runs), "--out", str(tmp_path / "a.csv"), "--reach", "accuracy"],
            "reach must be METRIC=LEVEL",
        ),
        (["aggregate", str(runs), "--out", str(tmp_path / "a.csv"), "--reach", "nc9=1"], "reach must name a metric"),
    ]:
        assert message in error_of(capsys, *arguments), arguments
    assert (tmp_path / "there.csv").read_text() == "mine"
    assert not (tmp_path / "new").exists()


def test_distances_to_another_reference_epoch_replace_those_that_are_there(runs, tmp_path, capsys):
    run = RunFolder(runs / "runs" / "implicit-seed1")
    before = read_table(run.metrics)
    assert main(["distance", str(run.path)]) == 0
    assert main(["distance", str(run.path), "--reference", "2"]) == 0
    assert "distances to the ETFs of epoch 2 replace those to epoch 1" in capsys.readouterr().out
    table = read_table(run.metrics).set_index(["epoch", "split", "metric"])["value"].sort_index()
    for (epoch, split), path in run.measured().items():
        record, other = Measurement.load(path), Measurement.load(run.measurement(2, split))
        expected = etf_distances(
            record.weight.double(),
            record.moments.means,
            class_counts=record.moments.counts,
            reference_weight=other.weight.double(),
            reference_means=other.moments.means,
        )
        assert table[epoch, split].filter(regex="^etf_").to_dict() == expected | {"etf_reference_epoch": 2}
    assert before.merge(table.reset_index()).equals(before)  # the other rows stay
    assert main(["distance", str(run.path)]) == 0
    assert "nothing to do" in capsys.readouterr().out  # without a flag, the reference epoch stays
    assert main(["distance", str(run.path), "--reference", "3", "--overwrite"]) == 0
    printed = capsys.readouterr().out
    assert "reference_epoch" in printed
    assert set(read_table(run.metrics).query("metric == 'etf_reference_epoch'")["value"]) == {3}
    run.measurement(1, "train").unlink()
    assert main(["distance", str(run.path), "--reference", "2"]) == 0  # no row to epoch 3 is left
    rows = read_table(run.metrics).query("metric == 'etf_means_reference'")[["epoch", "split"]]
    assert set(rows.itertuples(index=False, name=None)) == set(run.measured())
    out = ["--out", str(tmp_path / "all.csv")]
    assert main(["distance", str(runs / "runs" / "implicit-seed0")]) == 0
    line = error_of(capsys, "aggregate", str(runs / "runs" / "implicit-seed0"), str(run.path), *out)
    assert "must have the same reference epoch, but have 1 in" in line


def test_distances_of_a_table_that_names_no_reference_epoch_are_known_by_their_zero(runs, capsys):
    run = RunFolder(runs / "runs" / "implicit-seed0")
    assert main(["distance", str(run.path), "--reference", "2"]) == 0
    table = read_table(run.metrics)
    write_csv(run.metrics, table[table["metric"] != "etf_reference_epoch"])
    assert main(["distance", str(run.path)]) == 0
    pd.testing.assert_frame_equal(read_table(run.metrics), table)


@pytest.fixture
def files_of_features(tmp_path) -> dict[str, torch.Tensor]:
    targets = torch.arange(60) % 3
    weight = torch.randn(3, 5, generator=generator(1))
    arrays = {"x": weight[targets] + torch.randn(60, 5, generator=generator(2)), "y": targets, "w": weight}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    return arrays


def test_features_in_files_are_measured_and_recorded(files_of_features, tmp_path, capsys):
    x, y, w = files_of_features.values()
    expected = measure_features(x, y, w, progress=False)
    flags = ["--features", f"{tmp_path}/x.npy", "--labels", f"{tmp_path}/y.npy"]
    assert main(["measure", *flags]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"nc1_quotient {expected.metrics['nc1_quotient']:.4g}" in printed
    assert "nc1_vci" not in printed
    assert main(["measure", *flags, "--metrics", "all"]) == 0
    assert f"nc1_vci {expected.metrics['nc1_vci']:.4g}" in " ".join(capsys.readouterr().out.split())
    flags += ["--weight", f"{tmp_path}/w.npy", "--out", f"{tmp_path}/run", "--epoch", "7", "--split", "test"]
    assert main(["measure", *flags]) == 0
    record = Measurement.load(RunFolder(tmp_path / "run").measurement(7, "test"))
    assert record.metrics == expected.metrics
    table = read_table(RunFolder(tmp_path / "run").metrics).set_index("metric")["value"]
    assert table["nc3_duality"] == pytest.approx(expected.metrics["nc3_duality"])
    assert main(["distance", f"{tmp_path}/run", "--reference", "7"]) == 0
    page = RunFolder(tmp_path / "run")._repr_html_()
    assert "epoch 7, test" in page
    assert f"{expected.metrics['nc3_duality']:.4g}" in page
    assert "<td>features</td>" in page.replace(' style="text-align:left"', "")
    assert "resnet18" in RunConfig(backbone="resnet18")._repr_html_()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--labels", "y.npy"], "labels belongs to --features"),
        (["--features", "x.npy", "--labels", "y.npy", "--flips"], "flips has no effect with features"),
        (["--features", "x.npy", "--labels", "y.npy", "--data", "digits"], "data has no effect with features"),
        (["--features", "x.npy", "--labels", "y.npy", "--epoch", "1"], "epoch is part of the record and needs --out"),
        (["--features", "x.npy", "--labels", "y.npy", "--out", "f"], "weight must be given with out"),
        (["--features", "x.npy", "--labels", "y.npy", "--metrics", "some"], "metrics must be core or all"),
        (["--metrics", "all", "runs/a"], "metrics belongs to --checkpoint"),
        (["--features", "absent.npy", "--labels", "y.npy"], "absent.npy"),
    ],
)
def test_flags_of_features_that_do_not_fit(files_of_features, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, "measure", *flags)
    assert not (tmp_path / "f").exists()
