"""Damaged files, a full disk, two writers: one line, and the last good state is left."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from helpers import error_of
from neuralcollapse.lab import RunConfig, RunFolder, train_runs
from neuralcollapse.lab.results.files import sole_writer, write_whole
from neuralcollapse.lab.results.tables import read_table

SMALL = {"backbone": "mlp", "width": 12, "depth": 1, "train_samples": 60, "test_samples": 30, "batch_size": 20}
FLAGS = [f"--{name}={value}" for name, value in SMALL.items()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "trained"
    train_runs(RunConfig(**SMALL, epochs=2, schedule="constant"), folder, progress=False)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> RunFolder:
    """A run of two epochs, to be spoilt."""
    return RunFolder(shutil.copytree(trained, tmp_path / "run"))


def overwrite_tensor(path: Path) -> None:
    with zipfile.ZipFile(path) as records:
        largest = max(records.infolist(), key=lambda record: record.file_size)
    content = bytearray(path.read_bytes())
    place = largest.header_offset + 200 + largest.file_size // 2
    content[place : place + 16] = bytes(byte ^ 0xFF for byte in content[place : place + 16])
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


class Payload:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, ("touch executed",)


def changed(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def change_file(path: Path) -> None:
        found = torch.load(path, weights_only=True)
        change(found)
        torch.save(found, path)

    return change_file


SPOILT = {
    "overwritten": (overwrite_tensor, "it is damaged: its record"),
    "truncated": (truncate, "it is truncated, or not a checkpoint"),
    "empty": (lambda path: path.write_bytes(b""), "it is truncated, or not a checkpoint"),
    "text": (lambda path: path.write_text("notes"), "it is truncated, or not a checkpoint"),
    "zip": (lambda path: zipfile.ZipFile(path, "w").writestr("a/b", "c"), "it is not a checkpoint"),
    "foreign": (
        lambda path: torch.save({"weight": torch.ones(3)}, path),
        "it is not a checkpoint of a run of the laboratory",
    ),
    "list": (lambda path: torch.save([1, 2], path), "it is not a checkpoint of a run of the laboratory"),
    "payload": (lambda path: torch.save(Payload(), path), "which are not loaded"),
    "newer": (
        changed(lambda found: found["neuralcollapse"].update(format_version=7, package_version="9.1")),
        "it is of format 7, written by neuralcollapse 9.1, but this version reads up to 2",
    ),
    "format 1": (
        changed(lambda found: found["neuralcollapse"].update(format_version=1)),
        "it is of format 1, written by an earlier version, and can be measured but not resumed",
    ),
    "format 0": (
        lambda path: torch.save({"state_dict": {}, "epoch": 1, "loops": {}}, path),
        "it has an unreleased format",
    ),
    "another model": (
        changed(lambda found: found["state_dict"].update({"model.model.extra.weight": torch.ones(2)})),
        "its model does not match settings and data: model.model.extra.weight is (2,), not missing",
    ),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_spoilt_checkpoint_is_refused_by_name_and_nothing_is_executed(kind, run, monkeypatch, capsys):
    monkeypatch.chdir(run.path)
    spoil, expected = SPOILT[kind]
    spoil(run.last_checkpoint)
    before = run.last_checkpoint.read_bytes()
    message = error_of(capsys, "train", "--resume", "--epochs", "3", "--out", str(run.path))
    assert expected in message
    assert "last.ckpt' cannot be read" in message
    assert run.last_checkpoint.read_bytes() == before
    assert not (run.path / "executed").exists()


def test_a_damaged_record_is_refused(run, capsys):
    record = next(iter(run.measured().values()))
    overwrite = bytearray(record.read_bytes())
    overwrite[-5] ^= 1
    record.write_bytes(overwrite)
    assert "is damaged: its content does not match its checksum" in error_of(capsys, "distance", str(run.path))


def test_a_kill_before_a_file_is_renamed_leaves_the_former_one(run):
    content = run.metrics.read_bytes()

    def write(partial: Path) -> None:
        partial.write_text("epoch,split,metric,value\n")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", keep_from_replacing(run.metrics.name))
        with pytest.raises(KeyboardInterrupt):
            write_whole(run.metrics, write)
        with pytest.raises(KeyboardInterrupt):
            write_whole(run.metrics, write)
    assert run.metrics.read_bytes() == content
    assert not [path for path in run.path.iterdir() if path.name.endswith(".partial")]
    assert read_table(run.metrics)["value"].notna().all()


def keep_from_replacing(name: str) -> Callable[[Path, Path], None]:
    replace = os.replace

    def replaced(source: Path, target: Path) -> None:
        if Path(target).name == name:
            raise KeyboardInterrupt
        replace(source, target)

    return replaced


@contextmanager
def small_files(most: int) -> Iterator[None]:
    """Limit the size of every file, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("most", "file"), [(20_000, "last.ckpt"), (4_000, "safetensors"), (10, "environment.yaml")])
def test_a_disk_that_fills_is_one_line_and_the_last_state_is_left(most, file, run, capsys):
    checkpoint, metrics = run.last_checkpoint.read_bytes(), run.metrics.read_bytes()
    with small_files(most):
        message = error_of(capsys, "train", "--resume", "--epochs", "3", "--out", str(run.path))
    assert re.search(f"{file}'.*File too large|File too large.*{file}'", message)
    assert run.last_checkpoint.read_bytes() == checkpoint
    assert not list(run.path.rglob("*.partial"))
    if file != "last.ckpt":
        assert run.metrics.read_bytes() == metrics
    longer = RunConfig(**run.settings() | {"epochs": 3})
    assert 3 in set(read_table(train_runs(longer, run.path, resume=True, progress=False).metrics)["epoch"])


def test_a_figure_that_cannot_be_written_is_one_line(run, capsys):
    figure = run.figures / "margins.png"
    figure.parent.mkdir()
    figure.write_bytes(b"before")
    with small_files(3_000):
        message = error_of(
            capsys, "plot", str(run.path), "--figure", "margins", "--out", str(run.figures), "--overwrite"
        )
    assert "margins.png' cannot be written: File too large" in message
    assert figure.read_bytes() == b"before"
    assert list(run.figures.iterdir()) == [figure]


def test_a_folder_has_one_writer(run, capsys):
    code = (
        "import sys; from pathlib import Path; from neuralcollapse.lab.results.files import sole_writer\n"
        "with sole_writer(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    for command in (["train", "--resume", "--epochs", "3", "--out"], ["train", "--overwrite", *FLAGS, "--out"]):
        assert f"is being written by process {holder.pid}" in error_of(capsys, *command, str(run.path))
    assert f"is being written by process {holder.pid}" in error_of(capsys, "measure", str(run.path))
    holder.kill()  # which leaves no lock behind
    holder.wait()
    with sole_writer(run.path):
        pass


def test_a_run_is_extended_as_if_it_had_been_longer_from_the_start(run, tmp_path):
    whole = train_runs(RunConfig(**SMALL, epochs=3, schedule="constant"), tmp_path / "whole", progress=False)
    train_runs(RunConfig(**SMALL, epochs=3, schedule="constant"), run.path, resume=True, progress=False)
    assert run.metrics.read_bytes() == whole.metrics.read_bytes()
    found, expected = (torch.load(one.last_checkpoint, weights_only=True)["state_dict"] for one in (run, whole))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert run.settings()["epochs"] == 3
    made = run.read_environment()
    assert made["finished"] is True
    assert [again["epochs"] for again in made["resumed"]] == [3]


def test_a_comparison_is_extended(tmp_path):
    def runs(epochs: int) -> list[RunConfig]:
        return [
            RunConfig(**SMALL, epochs=epochs, schedule="step", schedule_options={"step_at": 40}, method=one)
            for one in ("standard", "implicit")
        ]

    out = train_runs(runs(1), tmp_path / "out", progress=False)
    whole = train_runs(runs(2), tmp_path / "whole", progress=False)
    train_runs(runs(2), out.path, resume=True, progress=False)
    for one, other in zip(out.run_folders(), whole.run_folders(), strict=True):
        assert one.metrics.read_bytes() == other.metrics.read_bytes()
    assert out.settings()["epochs"] == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--epochs 3 --schedule cosine", "schedule must stay 'constant' to resume the run"),
        ("--lr 0.3 --batch_size 30", "batch_size must stay 20 to resume"),
        ("--lr 0.3 --batch_size 30", "got 30; lr must stay 0.05, got 0.3"),
        ("--epochs 1", "epochs must stay 2 to resume the run"),
        ("--checkpoint_minutes 1", "is finished: larger --epochs extend it"),
    ],
)
def test_what_a_run_does_not_go_on_with_is_named(arguments, expected, run, capsys):
    run.summary.write_text("| implicit |")
    run.add_facts(reported=True)
    assert expected in error_of(capsys, "train", "--resume", "--out", str(run.path), *arguments.split())


def test_a_schedule_that_ends_with_the_run_is_not_extended(tmp_path, capsys):
    train_runs(RunConfig(**SMALL, epochs=1), tmp_path / "out", progress=False)
    message = error_of(capsys, "train", "--resume", "--epochs=2", "--out", str(tmp_path / "out"))
    assert "epochs must stay 1 to resume" in message
    assert "schedule cosine ends with the last epoch" in message


def test_the_environment_tells_what_a_paper_needs(run):
    made = run.read_environment()
    assert made["finished"] is True
    assert made["started"] <= made["ended"]
    assert made["device"] == "cpu"
    assert made["threads"] == torch.get_num_threads()
    assert {"torch", "torchmetrics", "lightning", "datasets", "numpy", "pillow"} <= set(made["packages"])
    assert "cpu" in made
    marks = made["data_fingerprint"]
    assert set(marks) == {"train", "test"}
    assert all(len(value) == 64 for one in marks.values() for value in one.values())


def test_a_run_killed_at_its_start_is_begun_again(tmp_path):
    for name in ("environment.yaml", "checksums.yaml"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text("{}\n")
    train_runs(RunConfig(**SMALL, epochs=1), tmp_path / "out", progress=False)
    assert RunFolder(tmp_path / "out").read_environment()["finished"] is True
