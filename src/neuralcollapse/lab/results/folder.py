"""Run folders: what is in them, and who may write there."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from neuralcollapse.lab.config import RunConfig
from neuralcollapse.lab.results.files import CHECKSUMS, read_yaml, write_yaml
from neuralcollapse.lab.results.locking import check_free, sole_writer
from neuralcollapse.lab.results.provenance import environment, now, start
from neuralcollapse.lab.settings import resolve

# Number of the format that is written. 0 had settings and environment in one file, and settings without effect as well.
# Until 2 a fixed classifier had the canonical orientation, one-cycle kept the momentum, and dot-regression was what is
# dot-regression-published now.
FORMAT = 2
# Schedules whose rate at an epoch does not depend on how many there are; of an optimiser without a rate, None.
# What may change between a start and the next: it has no part in what is computed.
_FREE = ("checkpoint_minutes", "devices", "num_nodes")
_OPEN_ENDED = (None, "constant", "step", "multistep")


class RunFolder:
    """The folder of one training run, or of several, which are then in a folder of theirs.

    Attributes:
        path: The folder.
        config: The settings that were in force, enough to run it again, and the format's number.
        environment: What a result depends on beside them: versions, machine, data; when it was made, and whether it is
            finished.
        checksums: SHA-256 of the files beside it, which are compared when they are read again.
        metrics: What was measured: epoch, split, metric, value.
        training_log: What training itself saw in each epoch, never compared: seconds, loss, accuracy, alignment,
            learning rate (of AGD: its step η).
        gradients: Size of each parameter's gradient at the end of each epoch.
        train_labels: The labels trained on, where they are not the data set's own.
        summary: The table of results.
        report: The page with all of it.
        verdict: Of a study: what its claims were judged by, and how.
        moments: One file for each measured epoch and split: a `Measurement`, from which every metric and figure can be
            made again.
        checkpoints: One file for each saved epoch, and the last one, from which a run is resumed.
        figures: PNG files.
        runs: The runs, where there are several.
        tuning: The folder of the runs by which learning rates were chosen.

    Examples:
        >>> RunFolder("runs/digits").metrics.name
        'metrics.csv'
    """

    FILES: ClassVar[dict[str, str]] = {
        "config": "config.yaml",
        "environment": "environment.yaml",
        "checksums": CHECKSUMS,
        "metrics": "metrics.csv",
        "training_log": "training.csv",
        "gradients": "gradients.csv",
        "train_labels": "train_labels.csv",
        "summary": "summary.md",
        "report": "report.html",
        "verdict": "verdict.yaml",
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
    checksums: Path
    metrics: Path
    training_log: Path
    gradients: Path
    train_labels: Path
    summary: Path
    report: Path
    verdict: Path
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
        if number == 0:
            stored = _from_format_0(stored)
        return with_earlier_meanings(stored) if number < 2 else stored

    def read_environment(self) -> dict[str, Any]:
        """What the result depends on beside its settings."""
        path = self.environment if self.environment.exists() else self.config
        stored = read_yaml(path) or {}
        return stored.get("environment", stored)

    def check(self, settings: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False) -> None:
        """See whether a run with these settings may use the folder; change nothing.

        Raises:
            ValueError: It holds a run that is neither to be resumed nor to be overwritten, a run with other settings
                than those to resume with, or files that are no run; or another process writes there.
        """
        check_free(self.path)
        self._check(settings, resume=resume, overwrite=overwrite)

    @contextlib.contextmanager
    def writing(
        self,
        settings: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        facts: Mapping[str, Any] | None = None,
    ) -> Iterator[None]:
        """Be the one process that writes a run with these settings into the folder; keep when, and whether to its end.

        Args:
            settings: To keep in it.
            resume: Go on with the run that it holds.
            overwrite: Delete the run that it holds.
            facts: To keep beside its environment.

        Raises:
            ValueError: As `check`.
        """
        with sole_writer(self.path):
            self._check(settings, resume=resume, overwrite=overwrite)
            self.start(settings, overwrite=overwrite, facts=facts)
            try:
                yield
            except BaseException:
                with contextlib.suppress(OSError, ValueError):  # what went wrong before is to be heard of
                    self.add_facts(ended=now())
                raise
            self.add_facts(ended=now(), finished=True)

    def _check(self, settings: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        if self.config.exists() and overwrite:
            return
        if self.config.exists() and resume:
            self._check_same(settings)
        elif self.config.exists():
            raise ValueError(
                f"out must not hold a run, and {str(self.path)!r} does: --resume goes on with it, "
                "--overwrite deletes it, --out names another folder"
            )
        elif self.path.exists() and not (self.path.is_dir() and self._is_empty()):
            raise ValueError(f"out must be a new folder, an empty one or a run's; {str(self.path)!r} holds other files")

    def _is_empty(self) -> bool:
        """Whether there is nothing but what a run killed at its start leaves."""
        return {path.name for path in self.path.glob("[!.]*")} <= {self.checksums.name, self.environment.name}

    def start(
        self, settings: Mapping[str, Any], *, overwrite: bool = False, facts: Mapping[str, Any] | None = None
    ) -> None:
        """Make the folder ready for a run with these settings, after `check`; or keep that one goes on.

        Args:
            settings: To keep in it.
            overwrite: Delete the run that it holds.
            facts: To keep beside its environment.
        """
        if self.config.exists() and overwrite:
            self._clear()
        if not self.config.exists():
            write_yaml(self.checksums, {})  # first: from here on, what is written is entered there
            write_yaml(self.environment, {**environment(), **(facts or {}), "started": now(), "finished": False})
            write_yaml(self.config, {"format": FORMAT, **settings})  # last: this makes it a run's folder
            return
        made, again = self.read_environment(), start()
        if self.settings().get("epochs") != settings.get("epochs"):
            write_yaml(self.config, {"format": FORMAT, **settings})
            again["epochs"] = settings["epochs"]
        new = {name: fact for name, fact in (facts or {}).items() if name not in made}
        self.add_facts(**new, finished=False, resumed=[*made.get("resumed", []), again])

    def is_finished(self, settings: Mapping[str, Any]) -> bool:
        """Whether it holds a run with these settings, trained to its end."""
        there = self.config.exists() and self.last_checkpoint.exists()
        same = there and self.settings().get("epochs") == settings.get("epochs")
        return same and self.read_environment().get("finished") is True

    def add_facts(self, **facts: Any) -> None:
        """Keep more of what is known of the run beside its environment."""
        write_yaml(self.environment, self.read_environment() | facts)

    def _clear(self) -> None:
        for place in self.FOLDERS.values():
            shutil.rmtree(self.path / place, ignore_errors=True)
        for place in reversed(self.FILES.values()):  # config.yaml last: until then it is a run's folder
            (self.path / place).unlink(missing_ok=True)

    def _check_same(self, settings: Mapping[str, Any]) -> None:
        stored = self.settings()
        if "environment" in stored:  # format 0 says less of what is in force, and more of what is not
            compared = [name for name in settings if stored.get(name) is not None]
        else:
            compared = [*settings, *(name for name in stored if name not in settings)]
        # A setting that is newer than the folder was at its default.
        known = resolve(RunConfig, {}, stored)[0] | stored
        changed = [name for name in compared if settings.get(name) != known.get(name) and name not in _FREE]
        reason = ""
        if "epochs" in changed and settings["epochs"] > known["epochs"]:
            if known.get("schedule") in _OPEN_ENDED:
                changed.remove("epochs")
            else:
                reason = f" (schedule {known['schedule']} ends with the last epoch: a run with it is not extended)"
        if changed:
            more = "".join(
                f"; {name} must stay {known.get(name)!r}, got {settings.get(name)!r}" for name in changed[1:]
            )
            raise ValueError(
                f"{changed[0]} must stay {known.get(changed[0])!r} to resume the run in {str(self.path)!r}, "
                f"got {settings.get(changed[0])!r}{more}{reason}"
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


def with_earlier_meanings(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of format 0 or 1 with what has another default or another name since then."""
    changed = dict(stored)
    for name in ("loss", "losses", "combinations"):
        if changed.get(name) is not None:
            changed[name] = _renamed_loss(changed[name])
    methods = [stored.get("method"), *(stored.get("methods") or [])]
    methods += [text.partition("/")[0] for text in stored.get("combinations") or []]
    if {"fixed", "fixed-frame"} & set(methods):
        changed.setdefault("orientation", "canonical")
    if stored.get("schedule") == "one-cycle" and stored.get("optimizer", "sgd") != "lbfgs":
        changed.setdefault("cycle_momentum", False)
    return changed


def _renamed_loss(value: Any) -> Any:
    """A loss, METHOD/LOSS/SHARE or a list of them, with the name of today."""
    if isinstance(value, list):
        return [_renamed_loss(item) for item in value]
    parts = str(value).split("/")
    return "/".join("dot-regression-published" if part == "dot-regression" else part for part in parts)
