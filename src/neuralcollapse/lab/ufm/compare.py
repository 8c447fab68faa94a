"""Comparison of methods on the unconstrained features model (UFM): single runs, tuning, and runs over seeds."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch.optim import Optimizer
from tqdm.auto import tqdm

from neuralcollapse.heads import (
    FixedETFClassifier,
    Head,
    LearnedClassifier,
    NearestETFClassifier,
    collapse_radius,
)
from neuralcollapse.lab.config import PublishedMethod, derived_seed
from neuralcollapse.lab.results.files import write_csv
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.tables import read_table
from neuralcollapse.lab.training.agd import AGD, orthogonal_start
from neuralcollapse.lab.ufm.settings import OptimizerName, UFMSettings
from neuralcollapse.ufm import UnconstrainedFeatures, train_unconstrained_features

_MOMENTUM = 0.9
# Published δ = 1e-3, which corresponds to the proximal weight δ(K−1)/2 of an ETF of K classes. Every batch contains all
# data, so the class means are those of the batch.
_PROXIMAL_WEIGHT, _MEANS_MOMENTUM = 1e-3, 1.0
_TUNING_SEED = 2**62  # differs from the seeds of all compared runs


@dataclass(frozen=True)
class UFMRun:
    """Run of the UFM with the head of a method.

    Attributes:
        method: standard, fixed or implicit.
        optimizer: sgd (momentum 0.9) or agd.
        num_classes: K.
        samples_per_class: n.
        feature_dim: d.
        feature_norm: τ.
        seed: Seed of the initial features and weights, which are the same for every method and rate.
    """

    method: PublishedMethod
    optimizer: OptimizerName
    num_classes: int
    samples_per_class: int
    feature_dim: int
    feature_norm: float
    seed: int

    @property
    def name(self) -> str:
        """Name of the run without its seed."""
        return f"ufm{self.num_classes}-{self.optimizer}-{self.method}"

    def label(self, table: pd.DataFrame) -> pd.DataFrame:
        """Insert the columns classes, optimizer and method as first columns of a table of the run."""
        for position, name in enumerate(("num_classes", "optimizer", "method")):
            table.insert(position, name.removeprefix("num_"), getattr(self, name))
        return table


@dataclass(frozen=True)
class Schedule:
    """Length, measurements and candidate rates of the runs of one size.

    Attributes:
        iterations: Number of steps of a run.
        measurements_per_decade: Number of measurements in 1 … 10, in 10 … 100 iterations, and so on.
        tuning_iterations: Number of steps after which the rate with the smallest loss is chosen.
        rates: Candidate rates of each optimiser; a single candidate is used without tuning.
    """

    iterations: int
    measurements_per_decade: int
    tuning_iterations: int
    rates: dict[str, list[float]]


def ufm_runs(settings: UFMSettings) -> list[tuple[UFMRun, Schedule]]:
    """Return the runs of each size, optimiser and method, with seed 0, and their schedules."""
    runs = []
    for num_classes in settings.classes:
        large = num_classes > 200  # measuring takes seconds
        iterations = settings.iterations or (100 if large else 2000)
        tuning_iterations = min(settings.tuning_iterations or (20 if large else 100), iterations)
        rates = {"sgd": settings.sgd_rates, "agd": settings.agd_gains}
        schedule = Schedule(iterations, 8 if large else 20, tuning_iterations, rates)
        samples_per_class = settings.samples_per_class or min(10, max(2, 1000 // num_classes))
        feature_dim = settings.feature_dim or max(64, 1 << (num_classes - 1).bit_length())
        radius = feature_radius(settings.feature_norm, num_classes)
        runs += [
            (UFMRun(method, optimizer, num_classes, samples_per_class, feature_dim, radius, 0), schedule)
            for optimizer in settings.optimizers
            for method in settings.methods
        ]
    return runs


def train_ufm(
    settings: UFMSettings, folder: RunFolder, *, resume: bool = False, overwrite: bool = False
) -> tuple[str, pd.DataFrame, list[Path]]:
    """Train the runs of a comparison, and write its tables, figures and summary.

    Returns:
        The table as text, the measurements, and the written files, beginning with the most informative.
    """
    from neuralcollapse.lab.ufm.figures import write_ufm

    runs, config = ufm_runs(settings), settings.in_force()
    sizes = dict.fromkeys(
        f"UFM-{run.num_classes}: n = {run.samples_per_class}, d = {run.feature_dim}, "
        f"feature norm {run.feature_norm:g}, {schedule.iterations} iterations"
        for run, schedule in runs
    )
    with folder.writing(config, resume=resume, overwrite=overwrite):
        folder.begin()
        metrics, tuning = compare_on_ufm(runs, range(settings.seeds), folder.runs)
        table, written = write_ufm(folder, metrics, tuning, list(sizes))
        folder.add_facts(reported=True)
    return table, metrics, written


def compare_on_ufm(
    settings: Sequence[tuple[UFMRun, Schedule]], seeds: Sequence[int], folder: Path, *, progress: bool = True
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tune and train every run that has no table in the folder yet.

    Args:
        settings: Runs to train, with any seed, and their schedules.
        seeds: Seeds of each run.
        folder: Folder for the tables of the runs, one file each.
        progress: Whether progress is shown.

    Returns:
        The measurements: classes, optimizer, method, seed, rate, iteration, metric, value; and the tuning: classes,
        optimizer, method, rate, excess_loss, chosen.

    Raises:
        ValueError: if a run diverges at the chosen rate.
    """
    total = sum(_steps(run, schedule, len(seeds)) for run, schedule in settings)
    measured, tuned = [], []
    with _Progress(total, shown=progress) as bar:
        for run, schedule in settings:
            bar.name = f"UFM-{run.num_classes}, {run.optimizer}, {run.method}"
            tuning = _read_or_make(folder / f"{run.name}-tuning.csv", partial(_tune, run, schedule, bar.step))
            rate = float(tuning.loc[tuning["chosen"], "rate"].iloc[0])
            tuned.append(run.label(tuning))
            for seed in seeds:
                make = partial(_train, replace(run, seed=seed), rate, schedule, bar.step)
                table = _read_or_make(folder / f"{run.name}-seed{seed}.csv", make)
                measured.append(run.label(table))
                bar.finish_run(seed, table)
    return pd.concat(measured, ignore_index=True), pd.concat(tuned, ignore_index=True)


def measurement_points(iterations: int, per_decade: int) -> set[int]:
    """Return the iterations after which to measure: logarithmically spaced ones, and the last.

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


def feature_radius(feature_norm: float | Literal["auto"], num_classes: int) -> float:
    """Return τ, which ``"auto"`` computes from the number of classes."""
    return collapse_radius(num_classes) if feature_norm == "auto" else float(feature_norm)


def least_loss(run: UFMRun) -> float:
    """Return the minimal cross-entropy for features of norm τ and unit rows, at collapse: log(1 + (K−1) e^(−τK/(K−1))).

    Examples:
        >>> round(least_loss(UFMRun("fixed", "sgd", 10, 5, 16, 5.0, 0)), 4)
        0.0342
    """
    others = run.num_classes - 1
    return math.log1p(others * math.exp(-run.feature_norm * run.num_classes / others))


def train_run(
    run: UFMRun, rate: float, iterations: int, measure_at: Collection[int], after_step: Callable[[], Any] = int
) -> list[dict[str, Any]]:
    """Train one run, and return its measurements: iteration, metric, value.

    Args:
        run: Run to train.
        rate: Learning rate of sgd, or gain of agd. A step of sgd moves a feature by the rate times the gradient of the
            loss of its sample, and the weight of a class by the rate times the gradient of the mean loss of its
            samples.
        iterations: Number of steps, each with all samples.
        measure_at: Iterations after which to measure.
        after_step: Function called after each step.

    Raises:
        ValueError: if training diverges, or the sizes do not fit together.
    """
    model = _model(run)
    optimizer = _optimizer(run, model, rate)
    rows = []
    for snapshot in train_unconstrained_features(model, optimizer, iterations, measure_at):
        after_step()
        if snapshot is not None:
            values = snapshot.values | {"excess_loss": snapshot.values["loss"] - least_loss(run)}
            values |= {"seconds": snapshot.seconds}
            rows += [
                {"iteration": snapshot.iteration, "metric": name, "value": value} for name, value in values.items()
            ]
    return rows


def loss_after(run: UFMRun, rate: float, iterations: int, after_step: Callable[[], Any] = int) -> float:
    """Return the excess loss of a run after the given number of iterations; infinity if it diverges."""
    try:
        rows = train_run(run, rate, iterations, {iterations}, after_step)
    except ValueError as error:
        if "diverged" not in str(error):
            raise
        return math.inf
    return next(float(row["value"]) for row in rows if row["metric"] == "excess_loss")


def _steps(run: UFMRun, schedule: Schedule, seeds: int) -> int:
    rates = len(schedule.rates[run.optimizer])
    return seeds * schedule.iterations + (rates * schedule.tuning_iterations if rates > 1 else 0)


def _tune(run: UFMRun, schedule: Schedule, step: Callable[[], Any]) -> pd.DataFrame:
    rates = schedule.rates[run.optimizer]
    losses = [float("nan")]
    if len(rates) > 1:
        tuned = replace(run, seed=_TUNING_SEED)
        losses = [loss_after(tuned, rate, schedule.tuning_iterations, step) for rate in rates]
    best = min(range(len(rates)), key=lambda index: losses[index])
    return pd.DataFrame({"rate": rates, "excess_loss": losses, "chosen": [i == best for i in range(len(rates))]})


def _train(run: UFMRun, rate: float, schedule: Schedule, step: Callable[[], Any]) -> pd.DataFrame:
    points = measurement_points(schedule.iterations, schedule.measurements_per_decade)
    try:
        table = pd.DataFrame(train_run(run, rate, schedule.iterations, points, step))
    except ValueError as error:
        raise ValueError(f"{run.name} seed {run.seed}, rate {rate:g}: {error}") from error
    table.insert(0, "seed", run.seed)
    table.insert(1, "rate", rate)
    return table


def _read_or_make(path: Path, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """Read a table; if the file does not exist, compute and write it first."""
    if not path.exists():
        write_csv(path, make())
    return read_table(path)


def _model(run: UFMRun) -> UnconstrainedFeatures:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(run.seed, 0))
        model = UnconstrainedFeatures(
            run.num_classes,
            run.samples_per_class,
            run.feature_dim,
            _head(run),
            generator=torch.Generator().manual_seed(derived_seed(run.seed, 1)),
        )
        if run.optimizer == "agd":
            torch.manual_seed(derived_seed(run.seed, 2))
            orthogonal_start(model)  # the features are drawn first, so that they are equal for all heads
    if isinstance(model.head, LearnedClassifier):
        model.head.project_weight()
    return model


def _head(run: UFMRun) -> Head:
    sizes = (run.feature_dim, run.num_classes)
    if run.method == "standard":
        return LearnedClassifier(*sizes, bias=False, feature_norm=run.feature_norm, unit_weight=True)
    if run.method == "fixed":
        # As published. The orientation does not matter for unconstrained features.
        return FixedETFClassifier(
            *sizes, orientation="canonical", feature_norm=run.feature_norm, momentum=_MEANS_MOMENTUM
        )
    return NearestETFClassifier(
        *sizes,
        feature_norm=run.feature_norm,
        momentum=_MEANS_MOMENTUM,
        proximal_weight=0.5 * _PROXIMAL_WEIGHT * (run.num_classes - 1),
    )


def _optimizer(run: UFMRun, model: UnconstrainedFeatures, rate: float) -> Optimizer:
    weights = list(model.head.parameters())
    if run.optimizer == "agd":
        return AGD([model.features, *weights], gain=rate)
    # In the gradient of the mean loss, each sample has the factor 1/N, and each class 1/K.
    groups = [{"params": [model.features], "lr": rate * len(model.targets)}]
    groups += [{"params": weights, "lr": rate * run.num_classes}] if weights else []
    return torch.optim.SGD(groups, momentum=_MOMENTUM)


class _Progress:
    """Progress over all steps: a bar in a terminal, else one line per run."""

    def __init__(self, total: int, *, shown: bool) -> None:
        self.name = ""
        self._lines = shown and not sys.stderr.isatty()
        self._bar = tqdm(total=total, disable=not shown or self._lines, unit="it", dynamic_ncols=True)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self) -> None:
        """Count one iteration."""
        self._bar.set_description(self.name, refresh=False)
        self._bar.update()

    def finish_run(self, seed: int, table: pd.DataFrame) -> None:
        """Print the last loss of a run, unless a bar is shown."""
        if self._lines:
            last = table[table["metric"] == "excess_loss"].iloc[-1]
            print(
                f"{self.name}, seed {seed}: {last['value']:.2g} above the least loss after {last['iteration']:.0f}",
                file=sys.stderr,
                flush=True,
            )
