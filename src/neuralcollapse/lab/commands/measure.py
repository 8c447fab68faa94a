"""`neuralcollapse measure`: neural collapse of checkpoints, after the fact."""

from __future__ import annotations

from argparse import Action
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from neuralcollapse.lab.commands.arguments import add_sections, asked_for, integer
from neuralcollapse.lab.commands.runs import Outcome, runs_of
from neuralcollapse.lab.config import BatchSettings, DataSettings
from neuralcollapse.lab.parsing import parse
from neuralcollapse.lab.results.folder import RunFolder

if TYPE_CHECKING:
    import pandas as pd

SUMMARY = "NC metrics of every checkpoint of a run, or of a model that was never trained here"
USAGE = (
    "RUN [RUN ...] [--every N] [--split A,B] [--layers A,B] [--backbone CLASS]\n"
    "       neuralcollapse measure --checkpoint FILE [--checkpoint FILE ...] [--epoch N ...] --model CLASS\n"
    "                              --data DATA --out FOLDER [--SETTING VALUE ...]"
)
DESCRIPTION = (
    "Measure every saved checkpoint that is not measured yet, on every split, in evaluation mode: all metrics into "
    "metrics.csv, and a record of each epoch and split into moments/. What is there is kept. With --checkpoint, "
    "measure an external model: a state_dict (safetensors, or a torch file of tensors alone) of a class of yours, or "
    "of a ResNet with torchvision's names, on the data that the settings below name. Several checkpoints of one "
    "training, given at once or one after another, become one folder that plot, report, distance and aggregate read."
)
SECTIONS = (DataSettings, BatchSettings)


class _Each(Action):
    """A flag that may be given several times; what it was given each time."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, [*_each(namespace.get(self.dest)), values])


def _each(value: Any) -> list[Any]:
    """The values of a repeated flag, or of the setting of a file: one value or a list."""
    return [] if value is None else value if isinstance(value, list) else [value]


def _epochs(value: Any) -> list[int] | None:
    try:
        return [integer(one) for one in _each(value)] or None
    except ValueError:
        raise ValueError(f"epoch must be a whole number, once for each checkpoint, got {value}") from None


def add_arguments(parser: ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("runs", metavar="RUN", nargs="*", type=str, help="folders of runs or of comparisons of runs")
    parser.add_argument("--every", type=integer, metavar="N", help="every N-th of the saved checkpoints, and the last")
    parser.add_argument("--split", type=str, metavar="A,B", help="splits to measure; by default all")
    parser.add_argument("--layers", type=str, metavar="A,B", help="modules whose outputs are measured as well")
    parser.add_argument("--backbone", type=str, metavar="CLASS", help="class of yours that a run was trained with: "
                        "what its config.yaml names is not imported for that")  # fmt: skip
    other = parser.add_argument_group("An external model")
    other.add_argument("--checkpoint", action=_Each, metavar="FILE", help="its state_dict; may be given several times")
    other.add_argument("--model", type=str, metavar="CLASS", help="package.module.Class, or the name of a ResNet here")
    other.add_argument("--model_options", metavar="OPTIONS", help="keyword arguments of the class")
    other.add_argument("--classifier", type=str, metavar="NAME", help="its classifier, where it is not found by itself")
    other.add_argument("--epoch", action=_Each, metavar="N", help="epochs it was trained, for the record, once per "
                       "checkpoint; by default 0, of several 1, 2, ...")  # fmt: skip
    other.add_argument("--seed", type=integer, metavar="N", help="seed it was trained with, for the record")
    other.add_argument("--out", type=str, metavar="FOLDER", help="folder to write")
    add_sections(parser, *SECTIONS)


def run(settings: Namespace) -> int:
    """Measure, and say what was written."""
    every = 1 if settings.get("every") is None else settings.every
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    splits, layers = (_names(settings.get(name)) for name in ("split", "layers"))
    given = asked_for(settings, *SECTIONS)
    outcome = Outcome()
    own = ("model", "model_options", "classifier", "epoch", "seed", "out")
    if settings.get("checkpoint") is not None:
        for name in ("runs", "backbone"):
            if settings.get(name):
                raise ValueError(f"{name.removesuffix('s')} belongs to a run, and checkpoint to an external model")
        for name in ("model", "out"):
            if not settings.get(name):
                raise ValueError(f"{name} must be given with checkpoint")
        return _measure_external(settings, given, splits, layers or [])
    alone = [name for name in own if settings.get(name) is not None]
    if given or alone:
        raise ValueError(f"{[*given, *alone][0]} belongs to --checkpoint: a run has its own")
    if not settings.get("runs"):
        raise ValueError("RUN must be the folder of a run or of several; or give --checkpoint")
    runs = runs_of(settings.runs)

    from neuralcollapse.lab.evaluate.checkpoints import measure_run
    from neuralcollapse.lab.training.runs import Preparation

    preparation = Preparation(resumed=True, progress=True)
    for one in runs:
        options = {"every": every, "splits": splits, "backbone": settings.get("backbone")}
        written = outcome.sound(measure_run(one, preparation, layers=layers or (), **options))
        outcome.written += [*written, *([one.metrics] if written else [])]
    return outcome.report("nothing to do: every checkpoint is measured")


def _measure_external(settings: Namespace, given: dict[str, Any], splits: list[str] | None, layers: list[str]) -> int:
    from neuralcollapse.lab.evaluate.state_dict import ExternalModel, measure_state_dict, series_epochs
    from neuralcollapse.lab.results.tables import read_table

    outcome = Outcome()
    options = parse("model_options", settings.get("model_options"), dict[str, Any])
    model = ExternalModel(settings.model, options, settings.get("classifier"), settings.get("seed"))
    paths, asked = [Path(file) for file in _each(settings.checkpoint)], _epochs(settings.get("epoch"))
    epochs = series_epochs(len(paths), asked)
    checkpoints = dict(zip(epochs, paths, strict=True))
    outcome.written = measure_state_dict(checkpoints, model, settings.out, given, splits=splits, layers=layers)
    folder = RunFolder(settings.out)
    print(_words_of_pixels(folder.read_environment().get("pixels") or {}))
    if asked is None and len(epochs) > 1:
        print(f"epochs: 1 to {len(epochs)}, in the order given; --epoch names others")
    for epoch in epochs:
        print(f"\n{_values(read_table(folder.metrics), epoch, splits)}")
    print()
    return outcome.report("nothing to do: every checkpoint is measured")


def _words_of_pixels(pixels: dict[str, Any]) -> str:
    parts = [
        f"{words} {', '.join(f'{value:g}' for value in pixels.get(name, []))}, {pixels.get(f'{name}_from')}"
        for name, words in (("mean", "mean"), ("std", "standard deviation"))
    ]
    return (
        f"pixels in [0, 1] were standardised by {'; '.join(parts)}. A model that was trained with other constants "
        "needs them: --pixel_mean, --pixel_std"
    )


def _values(table: pd.DataFrame, epoch: int, splits: list[str] | None) -> str:
    """Table of an epoch: one row per metric, one column per split."""
    of_epoch = table[table["epoch"] == epoch]
    names = [name for name in of_epoch["split"].unique() if splits is None or name in splits]
    values = of_epoch.pivot(index="metric", columns="split", values="value")
    shown = values.loc[of_epoch["metric"].unique(), names].rename_axis(index=None, columns=f"epoch {epoch}")
    return shown.to_string(float_format="{:.4g}".format)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]
