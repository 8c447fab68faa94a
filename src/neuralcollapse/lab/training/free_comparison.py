"""Methods and optimisers on free features, over sizes and seeds: every run of it, each in a file of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from neuralcollapse.lab.results.files import write_csv
from neuralcollapse.lab.results.tables import read_table
from neuralcollapse.lab.training.free_features import FreeRun, loss_after, train_run

_TUNING_SEED = 2**62  # of which no run is compared


@dataclass(frozen=True)
class Schedule:
    """How long runs of one size are, and what their rates are chosen from.

    Attributes:
        iterations: Steps of a run.
        measurements_per_decade: How often it is measured: after 1 … 10, 10 … 100 iterations, and so on.
        tuning_iterations: The rate is the one with the least loss after so many, of a seed that is not compared.
        rates: For each optimiser the rates to choose from; where it is one, that one.
    """

    iterations: int
    measurements_per_decade: int
    tuning_iterations: int
    rates: dict[str, list[float]]


def compare_free_features(
    settings: Sequence[tuple[FreeRun, Schedule]], seeds: Sequence[int], folder: Path, *, progress: bool = True
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tune and train every run; what a file of the folder has already is not trained again.

    Args:
        settings: What to train, with any seed.
        seeds: Those to train it with.
        folder: Where each run's table is written.
        progress: Show how far it is.

    Returns:
        What was measured: classes, optimizer, method, seed, rate, iteration, metric, value; and the tuning: classes,
        optimizer, method, rate, excess_loss, chosen.

    Raises:
        ValueError: A run diverged at the rate chosen.
    """
    total = sum(_steps(run, schedule, len(seeds)) for run, schedule in settings)
    measured, tuned = [], []
    with _Bar(total, shown=progress) as bar:
        for run, schedule in settings:
            bar.name = f"UFM-{run.num_classes}, {run.optimizer}, {run.method}"
            tuning = _kept(folder / f"{_name(run)}-tuning.csv", partial(_tune, run, schedule, bar.step))
            rate = float(tuning.loc[tuning["chosen"], "rate"].iloc[0])
            tuned.append(_labelled(run, tuning))
            for seed in seeds:
                one = replace(run, seed=seed)
                make = partial(_train, one, rate, schedule, bar.step)
                table = _kept(folder / f"{_name(run)}-seed{seed}.csv", make)
                measured.append(_labelled(run, table))
                bar.tell(f"seed {seed}", table)
    return pd.concat(measured, ignore_index=True), pd.concat(tuned, ignore_index=True)


def measurement_points(iterations: int, per_decade: int) -> set[int]:
    """The iterations to measure after: evenly spaced in their logarithm, and the last.

    Examples:
        >>> sorted(measurement_points(30, 4))
        [1, 2, 3, 6, 10, 18, 30]
    """
    points = {1, iterations}
    exponent = 0
    while (point := round(10 ** (exponent / per_decade))) < iterations:
        points.add(point)
        exponent += 1
    return points


def _steps(run: FreeRun, schedule: Schedule, seeds: int) -> int:
    rates = len(schedule.rates[run.optimizer])
    return seeds * schedule.iterations + (rates * schedule.tuning_iterations if rates > 1 else 0)


def _tune(run: FreeRun, schedule: Schedule, step: Callable[[], Any]) -> pd.DataFrame:
    rates = schedule.rates[run.optimizer]
    losses = [float("nan")]
    if len(rates) > 1:
        tuned = replace(run, seed=_TUNING_SEED)
        losses = [loss_after(tuned, rate, schedule.tuning_iterations, step) for rate in rates]
    best = min(range(len(rates)), key=lambda index: losses[index])
    return pd.DataFrame({"rate": rates, "excess_loss": losses, "chosen": [i == best for i in range(len(rates))]})


def _train(run: FreeRun, rate: float, schedule: Schedule, step: Callable[[], Any]) -> pd.DataFrame:
    points = measurement_points(schedule.iterations, schedule.measurements_per_decade)
    try:
        table = pd.DataFrame(train_run(run, rate, schedule.iterations, points, step))
    except ValueError as error:
        raise ValueError(f"{_name(run)} seed {run.seed}, rate {rate:g}: {error}") from error
    table.insert(0, "seed", run.seed)
    table.insert(1, "rate", rate)
    return table


def _kept(path: Path, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """The table in a file, made and written first where it is not there."""
    if not path.exists():
        write_csv(path, make())
    return read_table(path)


def _labelled(run: FreeRun, table: pd.DataFrame) -> pd.DataFrame:
    labels = {"classes": run.num_classes, "optimizer": run.optimizer, "method": run.method}
    for position, (name, value) in enumerate(labels.items()):
        table.insert(position, name, value)
    return table


def _name(run: FreeRun) -> str:
    return f"ufm{run.num_classes}-{run.optimizer}-{run.method}"


class _Bar:
    """How far it is: a bar in a terminal, a line a run elsewhere."""

    def __init__(self, total: int, *, shown: bool) -> None:
        self.name = ""
        self._lines = shown and not sys.stderr.isatty()
        self._bar = tqdm(total=total, disable=not shown or self._lines, unit="it", dynamic_ncols=True)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self) -> None:
        """One more iteration."""
        self._bar.set_description(self.name, refresh=False)
        self._bar.update()

    def tell(self, what: str, table: pd.DataFrame) -> None:
        """Say that a run is done."""
        if self._lines:
            last = table[table["metric"] == "excess_loss"].iloc[-1]
            print(
                f"{self.name}, {what}: {last['value']:.2g} above the least loss after {last['iteration']:.0f}",
                file=sys.stderr,
                flush=True,
            )
