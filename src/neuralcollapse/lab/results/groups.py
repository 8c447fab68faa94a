"""Groups of runs that differ in more than the seed; tables and records are read once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from neuralcollapse.catalogue import reference_epochs
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.labels import labels_of, title_of
from neuralcollapse.lab.results.records import Records
from neuralcollapse.lab.results.tables import COLUMNS, DETECTION_COLUMNS, TRANSFER_COLUMNS, read_table, seed_of

if TYPE_CHECKING:
    from neuralcollapse.metrics import Measurement

# Split under which the columns of the training log are gathered.
TRAINING = "training"


class RunGroups:
    """Runs that are shown together, in groups that differ in more than the seed.

    Args:
        runs: Folders of the runs, or a mapping from names to groups of runs.

    Attributes:
        groups: Runs of each group by label; the labels show in which settings the groups differ.
        num_classes: K, or None if it is unknown.
        problems: Error for each file that could not be read, by message.

    Raises:
        ValueError: if the numbers of classes differ, or two runs of a group have the same seed.
    """

    def __init__(self, runs: Sequence[RunFolder] | Mapping[str, Sequence[RunFolder]]) -> None:
        self.problems: dict[str, ValueError] = {}
        self._records: dict[Path, Records] = {}
        self.groups = runs if isinstance(runs, Mapping) else group_runs(runs, always=())
        environments = [run.read_environment() for group in self.groups.values() for run in group]
        numbers = {known["num_classes"] for known in environments if known.get("num_classes") is not None}
        if len(numbers) > 1:
            raise ValueError(
                f"runs that are shown together must have the same number of classes, got {sorted(numbers)}"
            )
        self.num_classes: int | None = next(iter(numbers), None)
        self.split = "train"  # of figures of classes, layers and features

    def hint(self, command: str) -> str:
        """Return text to append to "was not measured": the command that measures the values."""
        return f": run `neuralcollapse {command}` on the runs"

    @property
    def title(self) -> str:
        """Text with the settings that the runs share, and those in which they differ."""
        runs = [run for group in self.groups.values() for run in group]
        return title_of([run.settings() for run in runs], [run.read_environment().get("data") for run in runs])

    @cached_property
    def stems(self) -> dict[str, str]:
        """Part of the file names of each group, unique and without characters that are invalid in paths."""
        stems: dict[str, str] = {}
        for label in self.groups:
            stem = re.sub(r"[^\w.=+-]+", "-", label)[:80]
            stems[label] = stem if stem not in stems.values() else f"{stem}-{len(stems) + 1}"
        return stems

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """Measured values: columns method (the label of the group), seed, epoch, split, metric, value."""
        with self._noting_problems():
            return gather_groups(self.groups).rename(columns={"group": "method"})

    @cached_property
    def detection(self) -> pd.DataFrame:
        """Detection rates: columns method (the label of the group), seed, epoch, set, score, metric, value."""
        return self._gather("detection", DETECTION_COLUMNS)

    @cached_property
    def transfer(self) -> pd.DataFrame:
        """Transfer accuracies: columns method (the label of the group), seed, epoch, data, layer, metric, value."""
        return self._gather("transfer", TRANSFER_COLUMNS)

    def _gather(self, table: str, columns: Sequence[str]) -> pd.DataFrame:
        """Return the rows of a table of all run folders, given by its attribute; runs without it are left out."""
        paths = [(label, run, getattr(run, table)) for label, runs in self.groups.items() for run in runs]
        with self._noting_problems():
            tables = [
                read_table(path).assign(method=label, seed=seed_of(run)) for label, run, path in paths if path.exists()
            ]
        columns = ["method", "seed", *columns]
        return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)

    def gradients(self, label: str) -> list[pd.DataFrame]:
        """Return the table of gradients of each run of a group that has one.

        Raises:
            ValueError: if a table cannot be read.
        """
        with self._noting_problems():
            return [read_table(run.gradients) for run in self.groups[label] if run.gradients.exists()]

    def epochs(self, label: str, split: str) -> list[int]:
        """Return the epochs with a record in the first run of a group.

        Raises:
            ValueError: if the run has no record of the split.
        """
        return _recorded_epochs(self.groups[label][0], split)

    def record(self, label: str, split: str, epoch: int) -> Measurement:
        """Return a record of the first run of a group.

        Raises:
            ValueError: if the run has no record of the epoch, or the record cannot be read.
        """
        return self._load(self.groups[label][0], split, epoch)

    def last_records(self, label: str, split: str) -> list[Measurement]:
        """Return the last record of each run of a group.

        Raises:
            ValueError: if a run has no record of the split, or a record cannot be read.
        """
        return [self._load(run, split, max(_recorded_epochs(run, split))) for run in self.groups[label]]

    def _load(self, run: RunFolder, split: str, epoch: int) -> Measurement:
        if epoch not in _recorded_epochs(run, split):
            raise ValueError(_no_records(run, split))
        records = self._records.setdefault(run.path, Records(run))
        with self._noting_problems():
            return records.load(epoch, split)

    @contextmanager
    def _noting_problems(self) -> Iterator[None]:
        """Add the error of a file that cannot be read to `problems`, and raise it as a ValueError."""
        try:
            yield
        except (ValueError, OSError) as error:
            problem = ValueError(str(error))
            self.problems.setdefault(str(error), problem)
            raise problem from error


def _recorded_epochs(run: RunFolder, split: str) -> list[int]:
    epochs = [epoch for epoch, recorded_split in run.measured() if recorded_split == split]
    if not epochs:
        raise ValueError(_no_records(run, split))
    return epochs


def _no_records(run: RunFolder, split: str) -> str:
    return f"no records of the {split} split in {run.path.name}: run `neuralcollapse measure`"


def group_runs(runs: Sequence[RunFolder], always: Sequence[str] = ("name", "method")) -> dict[str, list[RunFolder]]:
    """Group runs that differ only in their seed, by labels that show in which settings the groups differ.

    Args:
        runs: Folders of the runs.
        always: Settings that are part of each label, even if the groups do not differ in them.

    Raises:
        ValueError: if two runs have the same settings and seed.
    """
    settings = [run.settings() for run in runs]
    groups: dict[str, list[RunFolder]] = {}
    seeds: dict[str, set[int | None]] = {}
    for run, of_run, label in zip(runs, settings, labels_of(settings, always), strict=True):
        seed = of_run.get("seed")
        if seed in seeds.setdefault(label, set()):
            same = f"have seed {seed}" if seed is not None else "have no seed (`measure --checkpoint` takes --seed)"
            raise ValueError(f"runs must differ, but two of {label!r} {same}: {str(run.path)!r} is one of them")
        seeds[label].add(seed)
        groups.setdefault(label, []).append(run)
    return groups


def gather_groups(groups: Mapping[str, Sequence[RunFolder]]) -> pd.DataFrame:
    """Return all values of all runs: columns group, seed, epoch, split, metric, value.

    Values of the training log (loss, alignment and accuracy of training batches) have the split ``"training"``.

    Raises:
        ValueError: if a run has no table, or the distances of the runs of a group have different reference epochs.
    """
    tables = []
    for label, runs in groups.items():
        references: dict[int, RunFolder] = {}
        for run in runs:
            if not run.metrics.exists():
                raise ValueError(f"run {str(run.path)!r} must have a {run.metrics.name}, but has none: measure it")
            measured, trained = read_table(run.metrics), _training_values(run)
            # The columns of an empty table have no type, and would turn epochs and values into objects.
            table = pd.concat([measured, trained], ignore_index=True) if len(trained) else measured
            references |= dict.fromkeys(reference_epochs(table), run)
            if len(references) > 1:
                (first, run_of_first), (second, run_of_second) = references.items()
                raise ValueError(
                    f"distances of the runs of {label!r} must have the same reference epoch, but have {first} in "
                    f"{str(run_of_first.path)!r} and {second} in {str(run_of_second.path)!r}: `neuralcollapse "
                    "distance` with --reference computes them again"
                )
            table.insert(0, "group", label)
            table.insert(1, "seed", seed_of(run))
            tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _training_values(run: RunFolder) -> pd.DataFrame:
    if not run.training_log.exists():
        return pd.DataFrame(columns=COLUMNS)
    tidy = read_table(run.training_log).melt("epoch", var_name="metric", value_name="value")
    tidy.insert(1, "split", TRAINING)
    return tidy
