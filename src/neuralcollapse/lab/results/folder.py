"""Run folders: files, settings and facts of runs, and start, resumption and end of a run."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from neuralcollapse._html import html_table
from neuralcollapse.lab.results.files import read_yaml, sole_writer, write_yaml
from neuralcollapse.lab.results.formats import FORMAT, settings_of_format
from neuralcollapse.lab.results.provenance import environment, now, start
from neuralcollapse.lab.results.resuming import (
    FACTS,
    NEEDED_FACTS,
    SETTINGS,
    changed_data,
    changed_settings,
    check_plain,
    check_types,
    is_folder_name,
)

if TYPE_CHECKING:
    from neuralcollapse.lab.results.tables import MetricRows
    from neuralcollapse.metrics import Measurement

# File of checksums of the other files, which earlier versions wrote.
_MANIFEST = "checksums.yaml"


class RunFolder:
    """Folder of a training run, or of several runs, each of which has a folder inside ``runs``.

    Attributes:
        path: Path of the folder.
        config: Effective settings, from which the run can be repeated, and the format number.
        environment: Facts of the run in addition to its settings: versions, machine, command, data, times, and whether
            it is finished.
        metrics: Table of measured values: epoch, split, metric, value.
        training_log: Table of training metrics per epoch: seconds, learning rate (for AGD the step η), and loss,
            accuracy and alignment of the training batches, which are not used in comparisons.
        gradients: Table of the size of the gradient of each parameter at the end of each epoch.
        train_labels: Training labels, if they are not those of the data set.
        summary: Table of results, in Markdown.
        report: HTML page of the results.
        verdict: Verdicts on the claims of a study.
        detection: Table of detection rates of unknown inputs: epoch, set, score, metric, value.
        sessions: Table of class-incremental training: strategy, seed, session, split, classes, metric, value.
        transfer: Table of accuracies of frozen features on other data: epoch, data, layer, metric, value.
        moments: One file per measured epoch and split, a `Measurement`, from which metrics and figures can be computed
            again.
        checkpoints: One file per kept epoch, and the last checkpoint, from which a run resumes.
        figures: Figures.
        runs: Folders of several runs.
        tuning: Folder of the runs for the choice of learning rates.

    Examples:
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
        "report": "report.html",
        "verdict": "verdict.yaml",
        "detection": "detection.csv",
        "sessions": "sessions.csv",
        "transfer": "transfer.csv",
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
    report: Path
    verdict: Path
    detection: Path
    sessions: Path
    transfer: Path
    moments: Path
    checkpoints: Path
    figures: Path
    runs: Path
    tuning: Path

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        for attribute, name in (self.FILES | self.FOLDERS).items():
            setattr(self, attribute, self.path / name)
        self._pending: dict[str, Any] | None = None  # arguments of `start`, inside `writing`
        self._has_begun = False

    @classmethod
    def create(
        cls, path: str | Path, *, name: str, settings: Mapping[str, Any] | None = None, overwrite: bool = False
    ) -> RunFolder:
        """Create a folder in which another training program records the measurements of a run.

        Args:
            path: A new or empty folder.
            name: Name of the run in tables and figures.
            settings: Plain values that distinguish the run from others, such as data, learning rate and seed. Runs that
                differ only in their ``"seed"`` are aggregated.
            overwrite: Delete the run in the folder.

        Raises:
            ValueError: if the folder contains files, settings are not plain values, or a setting that this package also
                writes, such as ``"seed"``, has another type.
            OSError: if the folder cannot be written to.

        Examples:
            >>> import torch
            >>> from neuralcollapse import measure
            >>> folder = RunFolder.create(getfixture("tmp_path") / "mine", name="mine", settings={"seed": 0})
            >>> batches = [(torch.randn(16, 4), torch.arange(16) % 2)]
            >>> path = folder.record(1, "train", measure(torch.nn.Linear(4, 2), batches, progress=False))
            >>> path.name
            'epoch0001-train.safetensors'
        """
        folder, settings = cls(path), dict(settings or {})
        if not isinstance(name, str) or not name:
            raise ValueError(f"name must be a text, got {name!r}")
        if reserved := {"name", "format"} & set(settings):
            raise ValueError(f"settings must not contain {min(reserved)!r}, which is reserved")
        settings = {"name": name, **settings}
        check_plain(settings, "settings")
        check_types(settings, SETTINGS, "settings")
        if folder.config.exists() and not overwrite:
            raise ValueError(
                f"path must be a new or empty folder, but {str(folder.path)!r} has a run: RunFolder(path) opens it, "
                "overwrite=True deletes it"
            )
        _check_writable(folder.path)
        with sole_writer(folder.path):
            folder.check(settings, overwrite=overwrite)
            if folder.config.exists():
                folder._clear()
            write_yaml(folder.environment, {**environment(folder.path), "started": now()})
            write_yaml(folder.config, {"format": FORMAT, **settings})
        return folder

    def _repr_html_(self) -> str:
        settings = self.settings() if self.config.exists() else {}
        rows: list[list[object]] = [["settings"]]
        rows += [[name, value] for name, value in settings.items() if value is not None]
        if self.metrics.exists():
            from neuralcollapse.catalogue import CORE
            from neuralcollapse.lab.results.tables import read_table

            table = read_table(self.metrics)
            last = table[(table["epoch"] == table["epoch"].max()) & table["metric"].isin(CORE)]
            for split, of_split in last.groupby("split", sort=False):
                rows.append([f"epoch {table['epoch'].max()}, {split}"])
                values = dict(zip(of_split["metric"], of_split["value"], strict=True))
                rows += [[name, f"{value:.4g}"] for name, value in values.items()]
        return html_table(f"RunFolder {self.path}", ["", ""], rows)

    @property
    def last_checkpoint(self) -> Path:
        """Checkpoint from which a run resumes."""
        return self.checkpoints / "last.ckpt"

    def checkpoint(self, epoch: int) -> Path:
        """Return the path of the checkpoint of an epoch, counted from 1 as in the tables."""
        return self.checkpoints / f"epoch{epoch:04d}.ckpt"

    def measurement(self, epoch: int, split: str) -> Path:
        """Return the path of the record of an epoch, counted from 1, and a split."""
        return self.moments / f"epoch{epoch:04d}-{split}.safetensors"

    def measured(self) -> dict[tuple[int, str], Path]:
        """Return the paths of all records by epoch and split, in order of epochs."""
        records = {}
        for path in sorted(self.moments.glob("epoch*-*.safetensors")):
            epoch, _, split = path.stem.removeprefix("epoch").partition("-")
            if epoch.isdecimal():
                records[int(epoch), split] = path
        return records

    def record(self, epoch: int, split: str, measurement: Measurement) -> Path:
        """Save the measurement of an epoch and a split: the record in ``moments``, and the metrics in the table.

        An existing record and all rows of the same epoch and split are replaced; those of other epochs are unchanged.
        If training resumes from an earlier epoch, later rows are replaced when it reaches their epochs again.

        Args:
            epoch: Number of trained epochs.
            split: Name of the split, such as ``"train"``.
            measurement: Result of `neuralcollapse.measure`; epoch and split are added to its provenance if missing.

        Returns:
            Path of the record.

        Raises:
            ValueError: if this is not the folder of a run, the measurement has another epoch or split, or another
                process writes to the folder.
            OSError: if a file cannot be written.
        """
        self.record_splits(epoch, {split: measurement})
        return self.measurement(epoch, split)

    def record_splits(self, epoch: int, measurements: Mapping[str, Measurement]) -> None:
        """Save the measurements of all splits of an epoch, as `record` does; the table is written once.

        Args:
            epoch: Number of trained epochs.
            measurements: Measurement of each split by name.

        Raises:
            ValueError: as for `record`; nothing is then written.
            OSError: if a file cannot be written.
        """
        for split, measurement in measurements.items():
            self._check_measurement(epoch, split, measurement)
        with sole_writer(self.path):
            if not self.metrics.exists():
                self._keep_num_classes(next(iter(measurements.values())).num_classes)
            for split, measurement in measurements.items():
                origin = replace(measurement.provenance, epoch=epoch, split=split)
                replace(measurement, provenance=origin).save(self.measurement(epoch, split))
            self.metric_rows.replace(epoch, self.metric_values(measurements))

    def metric_values(self, measurements: Mapping[str, Measurement]) -> dict[str, dict[str, float]]:
        """Return the values of measurements of an epoch that the table contains, by split and name.

        These are the metrics and, for a run with the setting ``imbalance``, those of `group_metrics`.

        Args:
            measurements: Measurement of each split by name.
        """
        values = {split: dict(one.metrics) for split, one in measurements.items()}
        if not self.settings().get("imbalance"):
            return values
        from neuralcollapse.metrics import group_metrics

        trains = [one.train_moments for one in measurements.values()]
        trains += [one.moments for split, one in measurements.items() if split == "train"]
        counts = next((moments.counts for moments in trains if moments is not None), None)
        if counts is not None:
            for split, one in measurements.items():
                values[split] |= group_metrics(one, counts)
        return values

    def _check_measurement(self, epoch: int, split: str, measurement: Measurement) -> None:
        """Check that a measurement can be recorded as that of an epoch and a split."""
        from neuralcollapse._checks import check_at_least
        from neuralcollapse.metrics import Measurement

        check_at_least("epoch", epoch, 0)
        if not is_folder_name(split) or not split[0].isalnum():
            raise ValueError(f"split must be a name without a path, such as 'train', got {split!r}")
        if not isinstance(measurement, Measurement):
            raise ValueError(f"measurement must be the result of measure, got {type(measurement).__name__}")
        if not self.config.exists():
            raise ValueError(f"{str(self.path)!r} must be the folder of a run, but has no {self.config.name}")
        if not len(measurement.weight):
            raise ValueError(
                "measurement must have the weight of the classifier, because tables and figures compare it with the "
                "class means, but has none: save it with measurement.save(path) instead"
            )
        origin = measurement.provenance
        if origin.epoch not in (None, epoch) or origin.split not in (None, split):
            raise ValueError(
                f"measurement must be of epoch {epoch}, {split} split, and its provenance is epoch {origin.epoch}, "
                f"{origin.split} split"
            )

    @cached_property
    def metric_rows(self) -> MetricRows:
        """Rows of the table of metrics."""
        from neuralcollapse.lab.results.tables import MetricRows

        return MetricRows(self.metrics)

    def _keep_num_classes(self, number: int) -> None:
        if self.read_environment().get("num_classes") is None:
            self.add_facts(num_classes=number)

    def run(self, name: str) -> RunFolder:
        """Return the folder of one of several runs."""
        return RunFolder(self.runs / name)

    def run_folders(self, *, diverged: bool = False) -> list[RunFolder]:
        """Return the folders of the runs, in the order of training; for a single run, a list of this folder.

        Args:
            diverged: Include runs whose training diverged, which have no result, if there are several runs.

        Raises:
            ValueError: if this is not the folder of a run.
        """
        self.settings()
        if not self.runs.is_dir():
            return [self]
        names = self.read_environment().get("runs") or sorted(path.name for path in self.runs.glob("[!.]*"))
        runs = [self.run(name) for name in names]
        return [run for run in runs if diverged or "diverged" not in run.read_environment()]

    def settings(self) -> dict[str, Any]:
        """Return the settings of the run.

        Raises:
            ValueError: if this is not the folder of a run, or its format is newer or was never released.
        """
        if not self.config.exists():
            raise ValueError(f"{str(self.path)!r} must be the folder of a run, but has no {self.config.name}")
        return settings_of_format(read_yaml(self.config), self.config)

    def read_environment(self) -> dict[str, Any]:
        """Return the facts on which the result depends in addition to the settings, such as data and versions.

        The mapping is empty if the file is missing.

        Raises:
            ValueError: if the file is damaged.
        """
        if not self.environment.exists():
            return {}
        stored = read_yaml(self.environment)
        if stored is None:
            raise ValueError(f"{str(self.environment)!r} must contain facts of a run by name, but is damaged")
        check_types(stored, FACTS, f"{str(self.environment)!r} is damaged")
        return stored

    def check(self, settings: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False) -> None:
        """Check that a run with these settings may use the folder, without changing anything.

        Raises:
            ValueError: if the folder contains a run that shall be neither resumed nor overwritten, a run with settings
                that differ from those to resume with, or files that do not belong to a run.
        """
        if self.config.exists() and overwrite:
            return
        if self.config.exists() and resume:
            self._check_same(settings)
            self._check_facts()
        elif self.config.exists():
            raise ValueError(
                f"out must not contain a run, but {str(self.path)!r} does: --resume resumes it, "
                "--overwrite deletes it, --out selects another folder"
            )
        elif self.path.exists() and not (self.path.is_dir() and self._is_empty()):
            raise ValueError(f"out must be a new or empty folder or that of a run; {str(self.path)!r} has other files")

    def check_data(self, facts: Mapping[str, Any]) -> None:
        """Check that the data are those with which the run was started.

        Args:
            facts: Facts with the present fingerprint of the data under ``"data_fingerprint"``.

        Raises:
            ValueError: if labels or images of a split have changed.
        """
        kept = self.read_environment().get("data_fingerprint") or {}
        changed = changed_data(kept, facts.get("data_fingerprint") or {})
        if changed is not None:
            raise ValueError(
                f"data must be those with which the run in {str(self.path)!r} was started ({self.environment.name}): "
                f"{changed}"
            )

    @contextlib.contextmanager
    def writing(self, settings: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False) -> Iterator[None]:
        """Lock the folder for a run with these settings, and check once that the run may use it.

        Nothing is written until `begin` is called. After the context, the run counts as finished, unless an exception
        ended it. A nested ``writing`` of the same object has no effect.

        Args:
            settings: Settings to store in the folder.
            resume: Resume the run in the folder.
            overwrite: Delete the run in the folder.

        Raises:
            ValueError: as for `check`, or if another process writes to the folder.
            OSError: if the folder cannot be written to.
        """
        if self._pending is not None:
            yield
            return
        _check_writable(self.path)
        with sole_writer(self.path):
            self.check(settings, resume=resume, overwrite=overwrite)
            self._pending, self._has_begun = {"settings": settings, "overwrite": overwrite}, False
            try:
                yield
            except BaseException:
                with contextlib.suppress(OSError, ValueError):  # do not mask the original error
                    if self._has_begun:
                        self.add_facts(ended=now())
                raise
            else:
                if self._has_begun:
                    self.add_facts(ended=now(), finished=True)
            finally:
                self._pending = None

    def begin(self, facts: Mapping[str, Any] | None = None) -> None:
        """Write the files of the run of `writing`, or record that the run resumes; further calls add facts.

        Args:
            facts: Facts to store in the environment, such as the fingerprint of the data.

        Raises:
            ValueError: if the run to resume was started with other data.
        """
        assert self._pending is not None, "begin belongs inside writing"
        resumes = self.config.exists() and (self._has_begun or not self._pending["overwrite"])
        if resumes and facts and "data_fingerprint" in facts:
            self.check_data(facts)
        if self._has_begun:
            known = self.read_environment()
            self.add_facts(**{name: fact for name, fact in (facts or {}).items() if name not in known})
        else:
            self.start(**self._pending, facts=facts)
            self._has_begun = True

    def _is_empty(self) -> bool:
        """Return whether the folder contains only files of a run that was killed at its start."""
        return {path.name for path in self.path.glob("[!.]*")} <= {_MANIFEST, self.environment.name}

    def _check_facts(self) -> None:
        """Check, before training, that the environment has the facts that the summary needs."""
        facts = self.read_environment()
        missing = [name for name in NEEDED_FACTS if facts.get(name) is None]
        if missing:
            lacking = f"lacks {', '.join(missing)}" if self.environment.exists() else "is missing"
            raise ValueError(
                f"{str(self.environment)!r} {lacking}, which is needed to resume the run: restore it, or start "
                "the run again with --overwrite"
            )

    def start(
        self, settings: Mapping[str, Any], *, overwrite: bool = False, facts: Mapping[str, Any] | None = None
    ) -> None:
        """Write settings and environment of a run that starts, or record that it resumes; to be called after `check`.

        Args:
            settings: Settings of the run.
            overwrite: Delete the run in the folder.
            facts: Facts to store in the environment.
        """
        if self.config.exists() and overwrite:
            self._clear()
        if not self.config.exists():
            made = environment(self.path)
            write_yaml(
                self.environment, {**made, "reported": False, **(facts or {}), "started": now(), "finished": False}
            )
            write_yaml(self.config, {"format": FORMAT, **settings})  # last, because this file marks the folder of a run
            return
        (self.path / _MANIFEST).unlink(missing_ok=True)  # files written from now on are not entered there
        made, again = self.read_environment(), start(self.path)
        extended = self.settings().get("epochs") != settings.get("epochs")
        if extended:
            again["epochs"] = settings["epochs"]
        new = {name: fact for name, fact in (facts or {}).items() if name not in made}
        if "runs" in made:  # a study may be given more seeds
            runs = made["runs"]
            new["runs"] = [*runs, *(name for name in (facts or {}).get("runs", []) if name not in runs)]
        # Written first: if the process is killed between the two, the run is unfinished, with the earlier epochs.
        self.add_facts(**new, finished=False, reported=False, resumed=[*made.get("resumed", []), again])
        if extended:
            write_yaml(self.config, {"format": FORMAT, **settings})

    def is_finished(self, settings: Mapping[str, Any]) -> bool:
        """Return whether the folder has a completed run with these settings."""
        exists = self.config.exists() and self.last_checkpoint.exists()
        same = exists and self.settings().get("epochs") == settings.get("epochs")
        return same and self.read_environment().get("finished") is True and self._is_logged(settings)

    def is_reported(self, settings: Mapping[str, Any]) -> bool:
        """Return whether the run is finished and its table, figures and page are those of its last epoch."""
        written = self.config.exists() and all(path.exists() for path in (self.summary, self.metrics))
        made = self.read_environment() if written else {}
        same = written and self.settings().get("epochs") == settings.get("epochs")
        # Earlier versions did not store `reported`.
        return same and made.get("finished") is True and made.get("reported") is not False and self._is_logged(settings)

    def _is_logged(self, settings: Mapping[str, Any]) -> bool:
        """Return whether the runs were trained for all epochs of the settings; true if they have no training log."""
        from neuralcollapse.lab.results.tables import read_table

        if not self.training_log.exists() or settings.get("epochs") is None:
            return True
        log = read_table(self.training_log)
        by_run = [name for name in ("method", "seed") if name in log]
        last = log.groupby(by_run)["epoch"].max() if by_run else log["epoch"].agg(["max"])
        return bool((last == settings["epochs"]).all())

    def add_facts(self, **facts: Any) -> None:
        """Add facts to the environment."""
        write_yaml(self.environment, self.read_environment() | facts)

    def _clear(self) -> None:
        """Delete the files of a run; links to other folders are removed without deleting their targets."""
        for name in self.FOLDERS.values():
            path = self.path / name
            if path.is_symlink():
                path.unlink()
            elif path.exists():
                shutil.rmtree(path)
        for name in (_MANIFEST, *reversed(self.FILES.values())):  # config.yaml, which marks a run, comes last
            (self.path / name).unlink(missing_ok=True)

    def _check_same(self, settings: Mapping[str, Any]) -> None:
        changed, reason = changed_settings(self.settings(), settings)
        if changed:
            (name, (known, asked)), *others = changed.items()
            more = "".join(f"; {other} must stay {was!r}, got {now!r}" for other, (was, now) in others)
            raise ValueError(
                f"{name} must stay {known!r} to resume the run in {str(self.path)!r}, got {asked!r}{more}{reason}"
            )


def _check_writable(folder: Path) -> None:
    """Check that a folder can be created or written to."""
    place = folder.absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if place == folder.absolute() and not place.is_dir():
        raise ValueError(f"out must be a new or empty folder or that of a run; {str(folder)!r} is a file")
    if not place.is_dir():
        raise ValueError(f"out must be a folder, but {str(place)!r} in its path is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"out must be a writable folder, but {str(place)!r} cannot be written to")
