"""Run folders: what is in them, and who may write there."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from neuralcollapse.lab.results.files import read_yaml, write_yaml
from neuralcollapse.lab.results.provenance import environment

# Number of the format that is written. 0 had settings and environment in one file, and settings without effect as well.
FORMAT = 1


class RunFolder:
    """The folder of one training run, or of several, which are then in a folder of theirs.

    Attributes:
        path: The folder.
        config: The settings that were in force, enough to run it again, and the format's number.
        environment: What a result depends on beside them.
        metrics: What was measured: epoch, split, metric, value.
        training_log: What training itself saw in each epoch, never compared: seconds, loss, accuracy, alignment,
            learning rate (of AGD: its step η).
        gradients: Size of each parameter's gradient at the end of each epoch.
        train_labels: The labels trained on, where they are not the data set's own.
        summary: The table of results.
        moments: One file for each measured epoch and split: a `Measurement`, from which every metric and figure can be
            made again.
        checkpoints: One file for each saved epoch, and the last one, from which a run is resumed.
        figures: PNG files.
        runs: The runs, where there are several.
        tuning: The folder of the runs by which learning rates were chosen.

    Example:
        >>> RunFolder("runs/digits").metrics.name
        'metrics.csv'
    """

    FILES: ClassVar[dict[str, str]] = {
        "config": "config.yaml",
        "environment": "environment.yaml",
        "metrics": "metrics.csv",
        "training_log": "training.csv",
        "gradients": "gradients.csv",
        "train_labels": "train_labels.csv",
        "summary": "summary.md",
    }
    FOLDERS: ClassVar[dict[str, str]] = {
        "moments": "moments",
        "checkpoints": "checkpoints",
        "figures": "figures",
        "runs": "runs",
        "tuning": "tuning",
        "tensorboard": "tensorboard",
        "wandb": "wandb",
    }
    config: Path
    environment: Path
    metrics: Path
    training_log: Path
    gradients: Path
    train_labels: Path
    summary: Path
    moments: Path
    checkpoints: Path
    figures: Path
    runs: Path
    tuning: Path

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        for name, place in (self.FILES | self.FOLDERS).items():
            setattr(self, name, self.path / place)

    @property
    def last_checkpoint(self) -> Path:
        """The checkpoint that a run goes on from."""
        return self.checkpoints / "last.ckpt"

    def checkpoint(self, epoch: int) -> Path:
        """The checkpoint kept of an epoch, counted from 1 as in the tables."""
        return self.checkpoints / f"epoch{epoch:04d}.ckpt"

    def measurement(self, epoch: int, split: str) -> Path:
        """The record of what was measured of a split after an epoch, counted from 1."""
        return self.moments / f"epoch{epoch:04d}-{split}.safetensors"

    def measured(self) -> dict[tuple[int, str], Path]:
        """All such records, by epoch and split, in order of epochs."""
        found = {}
        for path in sorted(self.moments.glob("epoch*-*.safetensors")):
            epoch, _, split = path.stem.removeprefix("epoch").partition("-")
            if epoch.isdecimal():
                found[int(epoch), split] = path
        return found

    def run(self, name: str) -> RunFolder:
        """The folder of one of several runs."""
        return RunFolder(self.runs / name)

    def run_folders(self) -> list[RunFolder]:
        """The folders of its runs, in the order in which they are trained; of one run, itself.

        Raises:
            ValueError: It is no run's folder.
        """
        self.settings()
        if not self.runs.is_dir():
            return [self]
        names = self.read_environment().get("runs") or sorted(path.name for path in self.runs.iterdir())
        return [self.run(name) for name in names]

    def settings(self) -> dict[str, Any]:
        """The settings that were in force; of format 0, all there were.

        Raises:
            ValueError: It is no run's folder, or one of a newer format.
        """
        if not self.config.exists():
            raise ValueError(f"{str(self.path)!r} must be the folder of a run, and has no {self.config.name}")
        stored = read_yaml(self.config)
        if stored is None or not {"format", "environment"} & set(stored):
            raise ValueError(
                f"{str(self.config)!r} must be a run's settings, and is not; --overwrite starts that run again"
            )
        number = stored.pop("format", 0)
        if not isinstance(number, int) or number > FORMAT:
            raise ValueError(
                f"{str(self.path)!r} is a run of format {number}, and this version of neuralcollapse reads up to "
                f"{FORMAT}: install a newer one"
            )
        return _from_format_0(stored) if number == 0 else stored

    def read_environment(self) -> dict[str, Any]:
        """What the result depends on beside its settings."""
        path = self.environment if self.environment.exists() else self.config
        stored = read_yaml(path) or {}
        return stored.get("environment", stored)

    def check(self, settings: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False) -> None:
        """See whether a run with these settings may use the folder; change nothing.

        Raises:
            ValueError: It holds a run that is neither to be resumed nor to be overwritten, a run with other settings
                than those to resume with, or files that are no run.
        """
        if self.config.exists() and overwrite:
            return
        if self.config.exists() and resume:
            self._check_same(settings)
        elif self.config.exists():
            raise ValueError(
                f"out must not hold a run, and {str(self.path)!r} does: --resume goes on with it, "
                "--overwrite deletes it, --out names another folder"
            )
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.glob("[!.]*"))):
            raise ValueError(f"out must be a new folder, an empty one or a run's; {str(self.path)!r} holds other files")

    def start(
        self, settings: Mapping[str, Any], *, overwrite: bool = False, facts: Mapping[str, Any] | None = None
    ) -> None:
        """Make the folder ready for a run with these settings, after `check`.

        Args:
            settings: To keep in it.
            overwrite: Delete the run that it holds.
            facts: To keep beside its environment.
        """
        if self.config.exists() and overwrite:
            self._clear()
        if not self.config.exists():
            write_yaml(self.environment, {**environment(), **(facts or {})})
            write_yaml(self.config, {"format": FORMAT, **settings})  # last: this makes it a run's folder

    def add_facts(self, **facts: Any) -> None:
        """Keep more of what is known of the run beside its environment."""
        write_yaml(self.environment, self.read_environment() | facts)

    def _clear(self) -> None:
        for place in self.FILES.values():
            (self.path / place).unlink(missing_ok=True)
        for place in self.FOLDERS.values():
            shutil.rmtree(self.path / place, ignore_errors=True)

    def _check_same(self, settings: Mapping[str, Any]) -> None:
        stored = self.settings()
        if "environment" in stored:  # format 0 says less of what is in force, and more of what is not
            compared = [name for name in settings if stored.get(name) is not None]
        else:
            compared = [*settings, *(name for name in stored if name not in settings)]
        for name in compared:
            if settings.get(name) != stored.get(name):
                raise ValueError(
                    f"{name} must stay {stored.get(name)!r} to resume the run in {str(self.path)!r}, "
                    f"got {settings.get(name)!r}"
                )


def _from_format_0(stored: dict[str, Any]) -> dict[str, Any]:
    """Settings of today's types; the environment stays among them, which tells that some may have no effect."""
    changed: dict[str, Any] = {}
    for name in ("methods", "loggers"):
        if isinstance(stored.get(name), str):
            changed[name] = [item.strip() for item in stored[name].split(",") if item.strip()]
    if stored.get("classifier_bias") == "auto":
        changed["classifier_bias"] = None
    return stored | changed
