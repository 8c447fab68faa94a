"""Choice of the learning rate of each method and loss on a validation split, before they are compared."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Mapping, Sequence
from contextlib import closing
from itertools import count
from typing import Any, TypeVar

from neuralcollapse.lab.config import RunConfig
from neuralcollapse.lab.experiments import Comparison
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.labels import common_settings
from neuralcollapse.lab.results.tables import read_table
from neuralcollapse.lab.training.runs import Preparation, named_runs, train_each
from neuralcollapse.metrics import Measurement

_Kind = TypeVar("_Kind", bound=Hashable)


def with_chosen_rates(
    runs: Sequence[RunConfig], comparison: Comparison, folder: RunFolder, *, resume: bool = False, parallel: int = 1
) -> list[RunConfig]:
    """Train each method with each loss and weight average at every candidate rate, and set the best rate in the runs.

    Args:
        runs: Runs to compare.
        comparison: Comparison with ``lr_candidates`` and ``tuning_share``.
        folder: Folder of the comparison, as for `best_rates`.
        resume: Resume the runs in the folder.
        parallel: Number of runs to train at a time.

    Raises:
        ValueError: as for `best_rates`.
    """
    rates = comparison.lr_candidates or []
    seed = next(seed for seed in count() if seed not in comparison.seed_list)
    kinds = {_kind(run): run for run in reversed(runs)}
    named = named_runs(
        [run for kind in reversed(kinds.values()) for run in tuning_runs(kind, rates, seed, comparison.tuning_share)]
    )
    candidates = {name: (_kind(run), run) for name, run in named.items()}
    common = common_settings([*named.values()])
    best = best_rates(candidates, folder, common, resume=resume, parallel=parallel)
    return [run.replace(lr=best[_kind(run)]) for run in runs]


def tuning_runs(run: RunConfig, rates: Sequence[float], seed: int, share: float | None) -> list[RunConfig]:
    """Return a run at each candidate rate, with a seed and a share of validation images, unless it has one."""
    return [run.replace(lr=rate, seed=seed, validation_share=run.validation_share or share) for rate in sorted(rates)]


def best_rates(
    candidates: Mapping[str, tuple[_Kind, RunConfig]],
    folder: RunFolder,
    settings: Mapping[str, Any],
    *,
    resume: bool,
    parallel: int,
) -> dict[_Kind, float]:
    """Train runs that differ in their rate, and return the best rate of each kind.

    The best rate is that with the greatest last validation accuracy, then with the greatest mean over measured epochs,
    then the smallest rate. For runs with the setting ``imbalance``, the accuracy is the mean over classes, because most
    of the validation images are of the frequent classes. The runs are stored in ``tuning/`` of the folder; finished
    runs are not trained again. Runs that fail are reported and left out.

    Args:
        candidates: Kind and settings of each run, by the name of its folder.
        folder: Folder of the compared runs, inside its ``writing`` context; `RunFolder.begin` is called after all
            candidates are checked.
        settings: Settings of ``tuning/``, which have to stay the same to resume.
        resume: Resume the runs in the folder.
        parallel: Number of runs to train at a time.

    Raises:
        ValueError: as for `train_runs`, or if a kind fails at every candidate.
    """
    runs = {name: run for name, (_, run) in candidates.items()}
    tuning = RunFolder(folder.tuning)
    if not resume or not all(tuning.run(name).is_finished(run.in_force()) for name, run in runs.items()):
        preparation = Preparation(resumed=resume, progress=True)
        facts = preparation.check(runs, tuning, parallel)
        folder.begin()
        with tuning.writing(settings, resume=resume):
            tuning.begin(facts)
            with closing(train_each(runs, tuning, preparation, parallel)) as failures:
                for name, failure in failures:
                    print(f"neuralcollapse: skipped: {name}: {failure}", file=sys.stderr)
    scores: dict[_Kind, dict[float, tuple[float, float, float]]] = {kind: {} for kind, _ in candidates.values()}
    for name, (kind, run) in candidates.items():
        accuracies = _validation_accuracies(tuning.run(name), by_class=run.imbalance is not None)
        if run.lr is not None and accuracies and max(accuracies) == run.epochs:
            mean = sum(accuracies.values()) / len(accuracies)
            scores[kind][run.lr] = (accuracies[run.epochs], mean, -run.lr)
    for kind, run in candidates.values():
        if not scores[kind]:
            rates = [other.lr for of_kind, other in candidates.values() if of_kind == kind]
            raise ValueError(f"lr_candidates must have one at which {run.method} trains with {run.loss}, got {rates}")
    return {kind: max(by_rate, key=by_rate.__getitem__) for kind, by_rate in scores.items()}


def _kind(run: RunConfig) -> tuple[str, str, float | None]:
    return run.method, run.loss, run.weight_average


def _validation_accuracies(run: RunFolder, *, by_class: bool) -> dict[int, float]:
    """Return the validation accuracy of each measured epoch: of all images, or the mean over classes."""
    if by_class:
        records = {epoch: path for (epoch, split), path in run.measured().items() if split == "validation"}
        return {epoch: float(Measurement.load(path).class_accuracy.nanmean()) for epoch, path in records.items()}
    if not run.metrics.exists():
        return {}
    table = read_table(run.metrics)
    chosen = table[(table["split"] == "validation") & (table["metric"] == "accuracy")]
    return dict(zip(chosen["epoch"], chosen["value"], strict=True))
