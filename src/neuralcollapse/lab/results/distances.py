"""Distances to the nearest simplex ETF over a run's measured epochs, from its records alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from neuralcollapse.lab.results.folder import RunFolder

if TYPE_CHECKING:
    import pandas as pd

# In a run's table: the epoch to whose ETFs the reference distances of the same epoch and split are.
REFERENCE_EPOCH = "etf_reference_epoch"
# All rows that depend on the reference epoch.
TO_REFERENCE = ("etf_weights_reference", "etf_means_reference", REFERENCE_EPOCH)
_SAME = 1e-20  # squared distances below are of an ETF to itself


def reference_epochs(table: pd.DataFrame) -> set[int]:
    """The epochs to whose simplex ETFs a table holds distances.

    Args:
        table: Columns epoch, metric, value; rows without `REFERENCE_EPOCH`, of earlier versions, have the epoch at
            which the distance is 0.

    Examples:
        >>> import pandas as pd
        >>> table = pd.DataFrame({"epoch": [1, 2], "metric": "etf_means_reference", "value": [0.3, 0.0]})
        >>> reference_epochs(table)
        {2}
    """
    named = table[table["metric"] == REFERENCE_EPOCH]["value"]
    if named.empty:
        named = table[(table["metric"] == "etf_means_reference") & (table["value"] < _SAME)]["epoch"]
    return {int(epoch) for epoch in named}


def distance_rows(run: RunFolder, reference: int = 1) -> Iterator[tuple[int, str, str, float] | ValueError]:
    """Distances of classifier and class means to their nearest ETFs, epoch by epoch and split by split.

    Args:
        run: The run's folder.
        reference: The epoch to whose ETFs, of the weights and of the means apart, each epoch's are compared.

    Yields:
        (epoch, split, metric, value), with the reference epoch as the value of `REFERENCE_EPOCH`; or what was wrong
        with a record, which is left out.

    Raises:
        ValueError: if the run has no records, or none of the reference epoch.
    """
    from neuralcollapse.lab.results.records import Records
    from neuralcollapse.metrics import etf_distances

    records, loaded = run.measured(), Records(run)
    if not records:
        raise ValueError(f"run {str(run.path)!r} must have records in {run.moments.name}/, and has none: measure it")
    references = {split for epoch, split in records if epoch == reference}
    for split in dict.fromkeys(split for _, split in records):
        epochs = [epoch for epoch, other in records if other == split]
        if split not in references:
            measured = ", ".join(map(str, epochs))
            raise ValueError(
                f"reference must be a measured epoch of {str(run.path)!r}, whose {split} split has {measured}; "
                f"got {reference}"
            )
        first = loaded.load(reference, split)
        for epoch in epochs:
            try:
                record = loaded.load(epoch, split)
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
            yield epoch, split, REFERENCE_EPOCH, float(reference)
