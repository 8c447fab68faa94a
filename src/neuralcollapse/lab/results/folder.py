"""Run folders: what is in them, and how it gets there whole even if the run is killed."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.plugins.io import TorchCheckpointIO

from neuralcollapse.lab.config import CompareConfig, RunConfig


class RunFolder:
    """The folder of one training run, or of a comparison, which keeps its runs in a folder of theirs.

    Attributes:
        path: The folder.
        config: Resolved settings and environment, enough to run it again.
        metrics: What was measured after each epoch: epoch, split, metric, value.
        training_log: What training itself saw in each epoch, never compared: seconds, loss, accuracy, alignment,
            learning rate (of AGD: its step η).
        gradients: Size of each parameter's gradient at the end of each epoch.
        train_labels: The labels trained on, where they are not the data set's own.
        summary: The table of results.
        checkpoints: One file for each saved epoch, and the last one, from which a run is resumed.
        figures: PNG files.
        runs: The runs of a comparison.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.csv"
        self.training_log = path / "training.csv"
        self.gradients = path / "gradients.csv"
        self.train_labels = path / "train_labels.csv"
        self.summary = path / "summary.md"
        self.checkpoints = path / "checkpoints"
        self.last_checkpoint = self.checkpoints / "last.ckpt"
        self.figures = path / "figures"
        self.runs = path / "runs"

    def checkpoint(self, epoch: int) -> Path:
        """The checkpoint kept of an epoch, counted from 1 as in the tables."""
        return self.checkpoints / f"epoch{epoch:04d}.ckpt"

    def run(self, method: str, seed: int) -> RunFolder:
        """The folder of one of a comparison's runs."""
        return RunFolder(self.runs / f"{method}-seed{seed}")

    def check(self, config: RunConfig | CompareConfig, *, resume: bool = False, overwrite: bool = False) -> None:
        """See whether a run with these settings may use the folder; change nothing.

        Raises:
            ValueError: It holds a run that is neither to be resumed nor to be overwritten, a run with other settings
                than those to resume with, or files that are no run.
        """
        if self.config.exists() and overwrite:
            return
        if self.config.exists() and resume:
            self._check_same(config)
        elif self.config.exists():
            raise ValueError(
                f"out must not hold a run, and {str(self.path)!r} does: --resume goes on with it, "
                "--overwrite deletes it, --out names another folder"
            )
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.glob("[!.]*"))):
            raise ValueError(f"out must be a new folder, an empty one or a run's; {str(self.path)!r} holds other files")

    def open(self, config: RunConfig | CompareConfig, *, resume: bool = False, overwrite: bool = False) -> None:
        """Make the folder ready for a run with these settings, after the same check."""
        self.check(config, resume=resume, overwrite=overwrite)
        if self.config.exists() and overwrite:
            self._clear()
        if not self.config.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            content = asdict(config) | {"environment": environment()}
            write_whole(self.config, lambda path: path.write_text(yaml.safe_dump(content, sort_keys=False)))

    def _clear(self) -> None:
        files = (self.config, self.metrics, self.training_log, self.gradients, self.train_labels, self.summary)
        for path in files:
            path.unlink(missing_ok=True)
        for path in (self.checkpoints, self.figures, self.runs, self.path / "tensorboard", self.path / "wandb"):
            shutil.rmtree(path, ignore_errors=True)

    def _check_same(self, config: RunConfig | CompareConfig) -> None:
        stored = read_settings(self.config)
        for name, value in asdict(config).items():
            if name not in stored or stored[name] != value:
                raise ValueError(
                    f"{name} must stay {stored.get(name)!r} to resume the run in {str(self.path)!r}, got {value!r}"
                )


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints of tensors and plain values, that replace the last one only when they are complete."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(Path(path), lambda partial: torch.save(checkpoint, partial))

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        """Read a checkpoint; raises ValueError if it cannot be read."""
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # truncated files fail in many ways
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"checkpoint {str(path)!r} cannot be read ({reason}); delete it to start that run again"
            ) from error


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Have a file written under another name, then put it in place: a kill leaves the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    os.replace(partial, path)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings and the environment in a run's config.yaml.

    Raises:
        ValueError: It holds something else.
    """
    stored = yaml.safe_load(path.read_text())
    if not isinstance(stored, dict) or "environment" not in stored:
        raise ValueError(f"{str(path)!r} must be a run's settings, and is not; --overwrite starts that run again")
    return stored


def environment() -> dict[str, Any]:
    """What a result depends on beside its settings."""
    return {
        "neuralcollapse": version("neuralcollapse"),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("torch", "lightning", "datasets", "numpy", "scikit-learn")},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of this package, if it runs from a checkout; marked if files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
