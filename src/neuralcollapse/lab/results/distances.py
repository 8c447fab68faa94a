"""Distances to the nearest simplex ETF over a run's measured epochs, from its records alone."""

from __future__ import annotations

from collections.abc import Iterator

from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.metrics import Measurement, etf_distances


def distance_rows(run: RunFolder, reference: int = 1) -> Iterator[tuple[int, str, str, float] | ValueError]:
    """Distances of classifier and class means to their nearest ETFs, epoch by epoch and split by split.

    Args:
        run: The run's folder.
        reference: The epoch to whose ETFs, of the weights and of the means apart, each epoch's are compared.

    Yields:
        (epoch, split, metric, value); or what was wrong with a record, which is left out.

    Raises:
        ValueError: The run has no records, or none of the reference epoch.
    """
    records = run.measured()
    if not records:
        raise ValueError(f"run {str(run.path)!r} must have records in {run.moments.name}/, and has none: measure it")
    references = {split: path for (epoch, split), path in records.items() if epoch == reference}
    for split in dict.fromkeys(split for _, split in records):
        epochs = {epoch: path for (epoch, other), path in records.items() if other == split}
        if split not in references:
            measured = ", ".join(map(str, epochs))
            raise ValueError(
                f"reference must be a measured epoch of {str(run.path)!r}, whose {split} split has {measured}; "
                f"got {reference}"
            )
        first = Measurement.load(references[split])
        for epoch, path in epochs.items():
            try:
                record = Measurement.load(path)
            except (ValueError, OSError) as error:
                yield ValueError(str(error))
                continue
            found = etf_distances(
                record.weight.double(),
                record.moments.means,
                class_counts=record.moments.counts,
                reference_weight=first.weight.double(),
                reference_means=first.moments.means,
            )
            yield from ((epoch, split, name, value) for name, value in found.items())
