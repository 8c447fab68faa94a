"""Figures of measurements in memory; the same figures can be drawn from run folders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Protocol

from neuralcollapse._checks import check_choice
from neuralcollapse.catalogue import REFERENCE_EPOCH
from neuralcollapse.metrics.distances import etf_distances
from neuralcollapse.metrics.figures import FIGURES
from neuralcollapse.metrics.measurement import Measurement

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Records = Measurement | Iterable[Measurement]


class Shown(Protocol):
    """Interface of the data that figures are drawn from: groups of runs, or of records in memory."""

    @property
    def groups(self) -> Mapping[str, object]:
        """Groups by label."""

    @property
    def stems(self) -> Mapping[str, str]:
        """Part of the file names of each group."""

    @property
    def title(self) -> str:
        """Text for the title of a page."""

    @property
    def num_classes(self) -> int | None:
        """K, or None if it is unknown."""

    @property
    def split(self) -> str:
        """Split of figures of classes, layers and features."""

    @property
    def metrics(self) -> pd.DataFrame:
        """Measured values: columns method (the label of the group), seed, epoch, split, metric, value."""

    def hint(self, command: str) -> str:
        """Return text to append to "was not measured": the command that would measure the values in a run folder."""

    def epochs(self, label: str, split: str) -> list[int]:
        """Return the epochs with a record in the first run of a group."""

    def record(self, label: str, split: str, epoch: int) -> Measurement:
        """Return a record of the first run of a group."""

    def last_records(self, label: str, split: str) -> list[Measurement]:
        """Return the last record of each run of a group."""


def plot(measurements: Records | Mapping[str, Records], figure: str = "") -> Figure:
    """Draw a figure of measurements, as the command ``plot`` does for run folders.

    Each line of the figure is a group of measurements: in a mapping, those with the same label; in a list, those with
    the same ``provenance.model``. The horizontal axis is ``provenance.epoch``. If a group has several measurements of
    the same epoch and split, they are treated as runs with different seeds: the line shows their mean, and a band their
    range. Measurements without an epoch are numbered in their order. Measurements without a split are assigned to the
    train split.

    The following figures show values against the epoch: ``"papyan"`` (Figures 1 to 7 of Papyan, Han, Donoho 2020),
    ``"zhu"`` (NC1 to NC4 and accuracies), ``"markou"`` (accuracies, NC and distances to the nearest simplex ETFs, with
    the first epoch as the reference), ``"overview"`` (every metric), ``"profile"`` (layers with probes, at each epoch)
    and ``"features"`` (three classes on their plane, at up to three epochs). The others show the last measurement of
    each group: ``"classes"`` (norms, variances and cosines of every class), ``"margins"`` and ``"layers"``.

    Args:
        measurements: One measurement, several, or a mapping of labels to one or several.
        figure: Name of the figure; by default ``"classes"`` for one measurement, else ``"papyan"``.

    Returns:
        The page, which notebooks show; ``savefig("page.png")`` writes it. A panel whose values were not measured
        contains a message that says so.

    Raises:
        ValueError: if no measurement is given, their numbers of classes differ, or the figure is unknown.
        ImportError: if matplotlib or pandas, of the extra ``lab``, is not installed.

    Examples:
        >>> import torch
        >>> from neuralcollapse.metrics import measure_features
        >>> features = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
        >>> measurement = measure_features(features, torch.arange(60) % 3, progress=False)
        >>> [axes.get_title() for axes in plot(measurement).axes][:2]
        ['model: norms', 'model: within-class variance']
    """
    try:
        import matplotlib.figure  # noqa: F401
        import pandas as pd  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"plot needs matplotlib and pandas, of the extra neuralcollapse[lab]; {error.name} is not installed"
        ) from error
    from neuralcollapse.metrics.figures.panels import draw_page

    check_choice("figure", figure, ("", *FIGURES))
    shown = RecordGroups(measurements, distances=figure in ("markou", "overview"))
    figure = figure or ("classes" if shown.is_single else "papyan")
    entry = FIGURES[figure]
    title, panels = entry.title(shown.title), resolve_name(entry.panels)
    page = panels(shown, title) if figure == "overview" else draw_page(title, panels(shown), entry.columns)
    if not shown.has_epochs:
        for axes in page.axes:
            if axes.get_xlabel() == "epoch":
                axes.set_xlabel("measurement", fontsize=8)
    return page


class RecordGroups:
    """Measurements in memory, in groups that are drawn as one line each.

    Args:
        measurements: As for `plot`.
        distances: Also compute distances to the nearest simplex ETFs.

    Raises:
        ValueError: as for `plot`.
    """

    def __init__(self, measurements: Records | Mapping[str, Records], *, distances: bool = False) -> None:
        grouped: dict[str, list[Measurement]] = {}
        if isinstance(measurements, Mapping):
            for label, records in measurements.items():
                grouped[str(label)] = _checked(records)
        else:
            for record in _checked(measurements):
                grouped.setdefault(record.provenance.model or "model", []).append(record)
        if not grouped:
            raise ValueError("measurements must contain at least one measurement, got none")
        records = [record for group in grouped.values() for record in group]
        numbers = sorted({record.num_classes for record in records})
        if len(numbers) > 1:
            raise ValueError(f"measurements must have the same number of classes, got {numbers}")
        self.num_classes = numbers[0]
        self._with_distances = distances
        self.is_single = len(records) == 1
        self.has_epochs = any(record.provenance.epoch is not None for record in records)
        self.groups = {label: _runs(group) for label, group in grouped.items()}
        splits = {split for runs in self.groups.values() for run in runs for split, _ in run}
        self.split = "train" if "train" in splits else min(splits)

    @property
    def title(self) -> str:
        """Labels of the groups."""
        return ", ".join(self.groups)

    @property
    def stems(self) -> dict[str, str]:
        """Labels of the groups, because no file is written."""
        return {label: label for label in self.groups}

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """Measured values: columns method (the label of the group), seed, epoch, split, metric, value."""
        import pandas as pd

        rows = [
            (label, seed, epoch, split, name, value)
            for label, runs in self.groups.items()
            for seed, run in enumerate(runs)
            for (split, epoch), record in run.items()
            for name, value in (record.metrics | self._distances(run, split, epoch)).items()
        ]
        return pd.DataFrame(rows, columns=["method", "seed", "epoch", "split", "metric", "value"])

    def hint(self, command: str) -> str:
        """Return an empty text, because no command measures records in memory."""
        return ""

    def epochs(self, label: str, split: str) -> list[int]:
        """Return the epochs with a record in the first run of a group.

        Raises:
            ValueError: if the run has no record of the split.
        """
        return _epochs(self.groups[label][0], split)

    def record(self, label: str, split: str, epoch: int) -> Measurement:
        """Return a record of the first run of a group."""
        return self.groups[label][0][split, epoch]

    def last_records(self, label: str, split: str) -> list[Measurement]:
        """Return the last record of each run of a group.

        Raises:
            ValueError: if a run has no record of the split.
        """
        return [run[split, max(_epochs(run, split))] for run in self.groups[label]]

    def _distances(self, run: _Run, split: str, epoch: int) -> dict[str, float]:
        """Return the distances to the nearest simplex ETFs; empty if they are not requested or not defined."""
        first, record = min(_epochs(run, split)), run[split, epoch]
        if not self._with_distances or not len(record.weight):
            return {}
        reference = run[split, first]
        try:
            distances = etf_distances(
                record.weight.double(),
                record.moments.means.cpu(),
                class_counts=record.moments.counts.cpu(),
                reference_weight=reference.weight.double(),
                reference_means=reference.moments.means.cpu(),
            )
        except ValueError:  # the means are not finite, or there are more than d + 1 classes
            return {}
        return distances | {REFERENCE_EPOCH: float(first)}


_Run = dict[tuple[str, int], Measurement]  # split and epoch to record


def _checked(records: Records) -> list[Measurement]:
    records = [records] if isinstance(records, Measurement) else records
    wanted = "measurements must be one measurement, several, or a mapping of labels to them"
    if isinstance(records, str) or not isinstance(records, Iterable):
        raise ValueError(f"{wanted}, got {type(records).__name__}")
    measurements = list(records)
    if wrong := [record for record in measurements if not isinstance(record, Measurement)]:
        raise ValueError(f"{wanted}, got {type(wrong[0]).__name__}")
    return measurements


def _runs(records: Sequence[Measurement]) -> list[_Run]:
    """Return the runs of a group; the n-th record of each split and epoch belongs to the n-th run."""
    runs: list[_Run] = []
    numbers: dict[str, int] = {}
    for record in records:
        split, epoch = record.provenance.split or "train", record.provenance.epoch
        if epoch is None:
            epoch = numbers[split] = numbers.get(split, 0) + 1
        run = next((run for run in runs if (split, epoch) not in run), None)
        if run is None:
            runs.append(run := {})
        run[split, epoch] = record
    return runs


def _epochs(run: _Run, split: str) -> list[int]:
    epochs = sorted(epoch for of_split, epoch in run if of_split == split)
    if not epochs:
        raise ValueError(f"no measurement of the {split} split was given")
    return epochs
