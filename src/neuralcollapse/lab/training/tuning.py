"""The learning rate of each method and loss, chosen on a validation split before they are compared."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import count
from typing import Any

from neuralcollapse.lab.config import RunConfig
from neuralcollapse.lab.experiments import Comparison
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.locking import sole_writer
from neuralcollapse.lab.results.tables import read_table
from neuralcollapse.lab.training.runs import train_runs


def with_chosen_rates(
    runs: Sequence[RunConfig],
    comparison: Comparison,
    folder: RunFolder,
    settings: dict[str, Any],
    *,
    parallel: int = 1,
    locks: ExitStack | None = None,
    **options: Any,
) -> list[RunConfig]:
    """Train each method with each loss and weight average at every candidate, and give their runs the best.

    That is the rate of the greatest last validation accuracy, then of the greatest mean over measured epochs, then the
    smallest, in runs of the first seed that is not compared. The folder is started, and keeps these runs in its
    ``tuning/``: those that are there are not trained again. One that fails is named and left out.

    Args:
        runs: What is to be compared.
        comparison: With ``lr_candidates`` and ``tuning_share``.
        folder: That of the comparison.
        settings: What it keeps as its settings.
        parallel: How many runs to train at a time.
        locks: What holds the folder for writing from its start on, until it is closed.
        options: Whether to ``resume`` and to ``overwrite``, as for `train_runs`.

    Raises:
        ValueError: As `train_runs`; or a method fails at every candidate.
    """
    folder.check(settings, **options)
    rates = sorted(comparison.lr_candidates or [])
    seed = next(seed for seed in count() if seed not in comparison.seed_list)
    kinds = {_kind(run): run for run in reversed(runs)}
    tried = [
        run.replace(lr=rate, seed=seed, validation_share=run.validation_share or comparison.tuning_share)
        for run in reversed(kinds.values())
        for rate in rates
    ]

    def start() -> None:
        if locks is not None:
            locks.enter_context(sole_writer(folder.path))
        folder.start(settings, overwrite=options.get("overwrite", False))

    whole = train_runs(tried, folder.tuning, before_writing=start, leave_out_failed=True, parallel=parallel, **options)
    scores: dict[tuple[str, str, float | None], dict[float, tuple[float, float, float]]] = {kind: {} for kind in kinds}
    for run, place in zip(tried, whole.run_folders(diverged=True), strict=True):
        accuracies = _validation_accuracies(place)
        if run.lr is not None and accuracies and max(accuracies) == run.epochs:
            mean = sum(accuracies.values()) / len(accuracies)
            scores[_kind(run)][run.lr] = (accuracies[run.epochs], mean, -run.lr)
    for (method, loss, _), found in scores.items():
        if not found:
            raise ValueError(f"lr_candidates must hold one at which {method} trains with {loss}, got {rates}")
    best = {kind: max(found, key=lambda rate: found[rate]) for kind, found in scores.items()}
    return [run.replace(lr=best[_kind(run)]) for run in runs]


def _kind(run: RunConfig) -> tuple[str, str, float | None]:
    return run.method, run.loss, run.weight_average


def _validation_accuracies(run: RunFolder) -> dict[int, float]:
    """By measured epoch."""
    if not run.metrics.exists():
        return {}
    table = read_table(run.metrics)
    chosen = table[(table["split"] == "validation") & (table["metric"] == "accuracy")]
    return dict(zip(chosen["epoch"], chosen["value"], strict=True))
