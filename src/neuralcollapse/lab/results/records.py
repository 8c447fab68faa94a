"""Records of a run: epochs with records, and checks that a record belongs to its run, epoch and split."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING

from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.tables import read_table

if TYPE_CHECKING:
    from neuralcollapse.metrics import Measurement

_TOLERANCE = 1e-6


def is_due(epoch: int, every: int, first: int | None = None) -> bool:
    """Return whether an epoch, counted from 1, is recorded: epoch 1, and ``first`` plus multiples of ``every``.

    Args:
        epoch: The epoch.
        every: Number of epochs between records.
        first: First epoch of this progression; by default ``every``.

    Examples:
        >>> [epoch for epoch in range(1, 21) if is_due(epoch, 5)]
        [1, 5, 10, 15, 20]
        >>> [epoch for epoch in range(1, 21) if is_due(epoch, 5, first=1)]
        [1, 6, 11, 16]
    """
    first = every if first is None else first
    return epoch == 1 or (epoch >= first and (epoch - first) % every == 0)


class Records:
    """Reader of the records of a run.

    Args:
        run: Folder of the run.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    def load(self, epoch: int, split: str) -> Measurement:
        """Load the record of an epoch and a split.

        Raises:
            ValueError: if the record is damaged, or its epoch, split, run or labels do not match its name and folder.
            OSError: if the record cannot be read.
        """
        from neuralcollapse.metrics import Measurement

        path = self.run.measurement(epoch, split)
        if path.exists() and not path.is_file():
            raise ValueError(f"{str(path)!r} must be a regular file, but is not")
        try:
            record = Measurement.load(path)
        except (
            KeyError,
            TypeError,
            AttributeError,
            IndexError,
            RuntimeError,
        ) as error:  # other content
            raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error
        origin = record.provenance
        if origin.epoch not in (None, epoch) or origin.split not in (None, split):
            raise ValueError(
                f"{path} must be the record of epoch {epoch}, {split} split, but is that of epoch "
                f"{origin.epoch}, {origin.split} split"
            )
        labels = (self._fingerprint.get(split) or {}).get("labels")
        if labels and origin.labels and labels != origin.labels:
            raise ValueError(
                f"{path} must have the labels of the run, with SHA-256 {labels[:12]}… ({self.run.environment.name}), "
                f"but has labels with SHA-256 {origin.labels[:12]}…"
            )
        for name, value in self._table.get((epoch, split), {}).items():
            recorded = record.metrics.get(name, value)
            undefined = math.isnan(recorded) and math.isnan(value)
            if not undefined and not math.isclose(recorded, value, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE**2):
                raise ValueError(
                    f"{path} must match {self.run.metrics.name}, where {name} is {value:.6g} for epoch {epoch}, "
                    f"{split} split, but has {recorded:.6g}: it belongs to another run or another model"
                )
        return record

    def is_in_table(self, epoch: int, split: str, record: Measurement) -> bool:
        """Return whether the table of the run has every metric of a record."""
        return set(record.metrics) <= set(self._table.get((epoch, split), {}))

    @cached_property
    def _fingerprint(self) -> dict[str, dict[str, str]]:
        return self.run.read_environment().get("data_fingerprint") or {}

    @cached_property
    def _table(self) -> dict[tuple[int, str], dict[str, float]]:
        if not self.run.metrics.exists():
            return {}
        table = read_table(self.run.metrics)
        values: dict[tuple[int, str], dict[str, float]] = {}
        for epoch, split, metric, value in zip(
            table["epoch"], table["split"], table["metric"], table["value"], strict=True
        ):
            values.setdefault((int(epoch), str(split)), {})[str(metric)] = float(value)
        return values
