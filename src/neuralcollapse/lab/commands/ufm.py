"""`neuralcollapse ufm`: the unconstrained features model under the methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from jsonargparse import ArgumentParser, Namespace
from pydantic import Field

from neuralcollapse.lab.commands import Command
from neuralcollapse.lab.commands.arguments import add_output, asked_for
from neuralcollapse.lab.commands.common import output_folder, print_config, print_written
from neuralcollapse.lab.config import PUBLISHED_METHODS, AtLeast1, AtLeast2, Positive, PublishedMethod
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from neuralcollapse.lab.ufm.compare import Schedule, UFMRun


_Optimizer = Literal["sgd", "agd"]


class FreeFeatures(Settings):
    """Free features."""

    classes: list[AtLeast2] = Field(default_factory=lambda: [10, 100, 200])
    """Sizes of the model: numbers of classes K. By default 10,100,200."""
    methods: list[PublishedMethod] = Field(default_factory=lambda: list(PUBLISHED_METHODS))
    """Which to train. By default all."""
    optimizers: list[_Optimizer] = Field(default_factory=lambda: list(get_args(_Optimizer)))
    """Each with every method. By default both."""
    seeds: AtLeast1 = 3
    """Number of seeds. Of a seed, methods and rates start from the same features."""
    samples_per_class: AtLeast1 | None = None
    """n. By default 1000/K, at least 2 and at most 10."""
    feature_dim: AtLeast1 | None = None
    """d, at least K - 1. By default the least power of two that is at least K and 64."""
    feature_norm: Literal["auto"] | Positive = 5.0
    """Norm of the features, the published one by default; auto follows from K."""
    iterations: AtLeast1 | None = None
    """Steps, each of all samples. By default the published 2000, and 100 for more than 200 classes."""
    tuning_iterations: AtLeast1 | None = None
    """The rate chosen has the least loss after so many. By default 100, and 20 for more than 200 classes."""
    sgd_rates: list[Positive] = Field(default_factory=lambda: [0.01, 0.03, 0.1, 0.3, 1.0])
    """Learning rates to choose from, in units of a sample's own gradient. By default 0.01,0.03,0.1,0.3,1."""
    agd_gains: list[Positive] = Field(default_factory=lambda: [3.0, 10.0, 30.0, 100.0, 300.0])
    """Gains to choose from. By default 3,10,30,100,300."""

    def check(self) -> None:
        """Check settings together."""
        super().check()
        for name in ("classes", "methods", "optimizers", "sgd_rates", "agd_gains"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be distinct, at least one, got {values}")
        for num_classes in self.classes:
            if self.feature_dim is not None and self.feature_dim < num_classes - 1:
                raise ValueError(f"feature_dim must be at least K - 1 = {num_classes - 1}, got {self.feature_dim}")

    def runs(self) -> list[tuple[UFMRun, Schedule]]:
        """What to train, with any seed."""
        from neuralcollapse.lab.ufm.compare import UFMRun, feature_radius

        return [
            (
                UFMRun(
                    method,
                    optimizer,
                    num_classes,
                    self.samples_per_class or min(10, max(2, 1000 // num_classes)),
                    self.feature_dim or max(64, 1 << (num_classes - 1).bit_length()),
                    feature_radius(self.feature_norm, num_classes),
                    0,
                ),
                self._schedule(num_classes),
            )
            for num_classes in self.classes
            for optimizer in self.optimizers
            for method in self.methods
        ]

    def _schedule(self, num_classes: int) -> Schedule:
        from neuralcollapse.lab.ufm.compare import Schedule

        large = num_classes > 200  # where measuring takes seconds
        rates = {"sgd": self.sgd_rates, "agd": self.agd_gains}
        iterations = self.iterations or (100 if large else 2000)
        tuning_iterations = self.tuning_iterations or (20 if large else 100)
        return Schedule(iterations, 8 if large else 20, min(tuning_iterations, iterations), rates)


def _add_arguments(parser: ArgumentParser) -> None:
    add_output(parser, "runs/ufm")


def _run(settings: Namespace) -> None:
    """Train every method, optimiser, size and seed, and say what was written."""
    config = FreeFeatures(**asked_for(settings, FreeFeatures))
    if settings.get("print_config"):
        print_config(config.in_force())
        return

    folder = RunFolder(output_folder(settings, "runs/ufm"))
    options = {name: bool(settings.get(name)) for name in ("resume", "overwrite")}
    table, _, written = train_ufm(config, folder, **options)
    print(f"\n{table}\n")
    print_written(written)


def train_ufm(
    config: FreeFeatures, folder: RunFolder, *, resume: bool, overwrite: bool
) -> tuple[str, pd.DataFrame, list[Path]]:
    """Train the runs of a comparison, and write its tables, figures and summary.

    Returns:
        The table as text, the measurements, and the files written.
    """
    from neuralcollapse.lab.ufm.compare import compare_on_ufm
    from neuralcollapse.lab.ufm.figures import write_ufm  # seconds: not for a mistake in a flag

    folder.check(config.in_force(), resume=resume, overwrite=overwrite)
    runs = config.runs()
    sizes = dict.fromkeys(
        f"UFM-{one.num_classes}: n = {one.samples_per_class}, d = {one.feature_dim}, "
        f"feature norm {one.feature_norm:g}, {schedule.iterations} iterations"
        for one, schedule in runs
    )
    with folder.writing(config.in_force(), resume=resume, overwrite=overwrite, reported=True):
        metrics, tuning = compare_on_ufm(runs, range(config.seeds), folder.runs)
        table, written = write_ufm(folder, metrics, tuning, list(sizes))
    return table, metrics, written


UFM = Command(
    "Train unconstrained features, without a network, with standard, fixed and implicit, each with sgd and agd; print "
    "after how many iterations each reaches levels of loss and of collapse, and draw them over seeds. The rate of each "
    "method, optimiser and size is first chosen from the same candidates, on a seed that is not compared.",
    _add_arguments,
    _run,
    (FreeFeatures,),
)
