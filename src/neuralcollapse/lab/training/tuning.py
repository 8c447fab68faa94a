"""Choice of the learning rate of each method and loss on a validation split, before they are compared."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from itertools import count

from neuralcollapse.lab.config import RunConfig
from neuralcollapse.lab.experiments import Comparison
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.labels import common_settings
from neuralcollapse.lab.results.tables import read_table
from neuralcollapse.lab.training.runs import Preparation, named_runs, train_each


def with_chosen_rates(
    runs: Sequence[RunConfig], comparison: Comparison, folder: RunFolder, *, resume: bool = False, parallel: int = 1
) -> list[RunConfig]:
    """Train each method with each loss and weight average at every candidate rate, and set the best rate in the runs.

    The best rate is that with the greatest last validation accuracy, then with the greatest mean over measured epochs,
    then the smallest rate, in runs of the first seed that is not compared. These runs are stored in ``tuning/`` of the
    folder; finished runs are not trained again. Runs that fail are reported and left out.

    Args:
        runs: Runs to compare.
        comparison: Comparison with ``lr_candidates`` and ``tuning_share``.
        folder: Folder of the comparison, inside its ``writing`` context; `RunFolder.begin` is called after all
            candidates are checked.
        resume: Resume the runs in the folder.
        parallel: Number of runs to train at a time.

    Raises:
        ValueError: as for `train_runs`, or if a method fails at every candidate.
    """
    rates = sorted(comparison.lr_candidates or [])
    seed = next(seed for seed in count() if seed not in comparison.seed_list)
    kinds = {_kind(run): run for run in reversed(runs)}
    candidates = named_runs(
        [
            run.replace(lr=rate, seed=seed, validation_share=run.validation_share or comparison.tuning_share)
            for run in reversed(kinds.values())
            for rate in rates
        ]
    )
    tuning, preparation = RunFolder(folder.tuning), Preparation(resumed=resume, progress=True)
    facts = preparation.check(candidates, tuning, parallel)
    folder.begin()
    with tuning.writing(common_settings([*candidates.values()]), resume=resume):
        tuning.begin(facts)
        with closing(train_each(candidates, tuning, preparation, parallel)) as failures:
            for name, failure in failures:
                print(f"neuralcollapse: skipped: {name}: {failure}", file=sys.stderr)
    scores: dict[tuple[str, str, float | None], dict[float, tuple[float, float, float]]] = {kind: {} for kind in kinds}
    for name, run in candidates.items():
        accuracies = _validation_accuracies(tuning.run(name))
        if run.lr is not None and accuracies and max(accuracies) == run.epochs:
            mean = sum(accuracies.values()) / len(accuracies)
            scores[_kind(run)][run.lr] = (accuracies[run.epochs], mean, -run.lr)
    for (method, loss, _), by_rate in scores.items():
        if not by_rate:
            raise ValueError(f"lr_candidates must have one at which {method} trains with {loss}, got {rates}")
    best = {kind: max(by_rate, key=by_rate.__getitem__) for kind, by_rate in scores.items()}
    return [run.replace(lr=best[_kind(run)]) for run in runs]


def _kind(run: RunConfig) -> tuple[str, str, float | None]:
    return run.method, run.loss, run.weight_average


def _validation_accuracies(run: RunFolder) -> dict[int, float]:
    """Return the validation accuracy of each measured epoch."""
    if not run.metrics.exists():
        return {}
    table = read_table(run.metrics)
    chosen = table[(table["split"] == "validation") & (table["metric"] == "accuracy")]
    return dict(zip(chosen["epoch"], chosen["value"], strict=True))
