"""Runs of several processes against runs of one, on the same batches."""

from __future__ import annotations

import functools
import os
import socket

import pytest
import torch
from torch import multiprocessing

from helpers import slow_except
from neuralcollapse.lab import RunConfig, train_runs
from neuralcollapse.lab.config import PUBLISHED_METHODS
from neuralcollapse.lab.data.batches import EpochBatches, standardisation
from neuralcollapse.lab.data.load import load_data
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.tables import read_table

BACKBONE = """
from torch import nn

class Plain(nn.Sequential):
    def __init__(self, image_shape):
        channels, height, width = image_shape
        super().__init__(nn.Flatten(), nn.Linear(channels * height * width, 16), nn.Tanh(), nn.Linear(16, 16))
"""
# Batches of 48, and a last one of 11.
SMALL = {"backbone": "plain_backbone.Plain", "train_samples": 203, "test_samples": 40, "batch_size": 48, "epochs": 2}
OTHERS = {
    "feature decay": {"method": "standard", "feature_norm": "none", "feature_decay": 1e-4, "accumulate": 2},
    "nonl": {"method": "means", "loss": "nonl"},
}
OF_ONE_RANK = {f"head.{name}" for name in ("features", "class_means", "weight", "bias")}
RUNS = {method: {"method": method, "augmentation": {"crop_padding": 1}} for method in PUBLISHED_METHODS} | OTHERS


def train_all(rank, ranks, port, folder):
    """The runs of one process of the given number of processes."""
    torch.set_num_threads(1)
    os.chdir(folder)
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
        os.environ |= {"TORCHELASTIC_RUN_ID": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, settings in RUNS.items():
        train_runs(RunConfig(**SMALL, **settings, device="cpu", devices=ranks), f"{name}-{ranks}", progress=False)


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """A function that returns the runs, by name, of a number of ranks; they are trained once."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "plain_backbone.py").write_text(BACKBONE)
    multiprocessing.set_forkserver_preload(["neuralcollapse.lab.training.runs"])  # imported once for all

    @functools.cache
    def of(ranks):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        multiprocessing.start_processes(train_all, (ranks, port, str(folder)), nprocs=ranks, start_method="forkserver")
        return {name: RunFolder(folder / f"{name}-{ranks}") for name in RUNS}

    return of


@pytest.mark.parametrize("ranks", slow_except([2, 3], [2]))
@pytest.mark.parametrize("name", RUNS)
def test_several_processes_train_as_one(curves, name, ranks):
    one, several = (curves(number)[name] for number in (1, ranks))
    for table in ("training_log", "gradients"):
        expected, found = (
            read_table(getattr(run, table)).drop(columns="seconds", errors="ignore") for run in (one, several)
        )
        if table == "gradients":  # those of the head's tensors are of runs of one rank alone
            of_one = ~expected["parameter"].isin(found["parameter"])
            assert set(expected["parameter"][of_one]) <= OF_ONE_RANK
            expected = expected[~of_one].reset_index(drop=True)
        assert len(found) == len(expected) > 0
        numbers = expected.select_dtypes("number").columns
        assert (found[numbers] - expected[numbers]).abs().max().max() < 1e-5
    states = [torch.load(run.last_checkpoint, weights_only=True)["state_dict"] for run in (one, several)]
    for key, value in states[0].items():
        assert (states[1][key].double() - value.double()).abs().max() < 1e-5, key
    assert one.measured().keys() == several.measured().keys()


@pytest.mark.parametrize("stratified", [False, True])
def test_ranks_share_every_batch_and_each_has_two_samples(stratified):
    settings = RunConfig(
        train_samples=101,
        batch_size=48,
        sampling="stratified" if stratified else "random",
        augmentation={"crop_padding": 1, "flip": True, "rotation": 5.0},
    )
    data = load_data(settings, progress=False)
    made = [standardisation(data, settings), settings, 3, 0, 0]
    whole = EpochBatches(data.train, *made)
    parts = [EpochBatches(data.train, *made, rank, 3) for rank in range(3)]
    assert whole.sizes == ([51, 50] if stratified else [48, 48, 5])
    assert parts[0].sizes == ([51, 50] if stratified else [48, 53])  # five samples are too few for three
    for part in parts:
        assert all(len(targets) >= 2 for _, targets in part)
    first = next(iter(whole))
    joined = zip(*(next(iter(part)) for part in parts), strict=True)
    for expected, found in zip(first, joined, strict=True):
        torch.testing.assert_close(torch.cat(found), expected)


def test_steps_over_accumulated_batches_are_those_over_their_union(curves, tmp_path, monkeypatch):
    folder = curves(1)["standard"].path.parent
    monkeypatch.chdir(folder)
    common = SMALL | {"method": "standard", "train_samples": 200, "device": "cpu", "loss": "mse"}
    runs = [{"batch_size": 40}, {"batch_size": 20, "accumulate": 2}]
    found = [
        train_runs(RunConfig(**common | run), tmp_path / str(number), progress=False) for number, run in enumerate(runs)
    ]
    states = [torch.load(run.last_checkpoint, weights_only=True)["state_dict"] for run in found]
    for key, value in states[0].items():
        assert (states[1][key] - value).abs().max() < 1e-5, key


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 5, "devices": 3}, "batch_size must be at least 6, two for each of 3 ranks, got 5"),
        ({"optimizer": "lbfgs", "method": "fixed", "devices": 2}, "optimizer lbfgs needs one rank"),
        ({"sync_batchnorm": True}, "sync_batchnorm belongs to several ranks; here devices is 1 and num_nodes is 1"),
    ],
)
def test_what_ranks_cannot_do_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "16-mixed"}, r"precision must be supported by device cpu \(32, bf16-mixed\), got '16-mixed'"),
        ({"devices": 2, "sync_batchnorm": True}, "sync_batchnorm needs device cuda"),
        ({"devices": 4, "train_samples": 7, "leave_out": ["absent-classes"]}, "devices must leave two training images"),
    ],
)
def test_what_a_machine_lacks_is_said_before_anything_is_written(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        train_runs(RunConfig(device="cpu", **settings), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
