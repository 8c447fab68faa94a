"""`neuralcollapse measure`: neural collapse of checkpoints, of runs or of an external model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from neuralcollapse.lab.commands import Command
from neuralcollapse.lab.commands.arguments import asked_for
from neuralcollapse.lab.commands.common import Append, Outcome, add_runs, option, runs_of
from neuralcollapse.lab.config import BatchSettings, DataSettings
from neuralcollapse.lab.results.folder import RunFolder

if TYPE_CHECKING:
    import pandas as pd

SECTIONS = (DataSettings, BatchSettings)
_OF_EXTERNAL = ("model", "model_options", "classifier", "epoch", "seed", "out")
_NOTHING = "nothing to do: every checkpoint is measured"


def _add_arguments(parser: ArgumentParser) -> None:
    add_runs(parser, required=False)
    parser.add_argument("--every", metavar="N", help="every N-th of the saved checkpoints, and the last")
    parser.add_argument("--split", metavar="A,B", help="splits to measure; by default all")
    parser.add_argument("--layers", metavar="A,B", help="modules whose outputs are measured as well")
    parser.add_argument("--backbone", metavar="CLASS", help="class of yours that a run was trained with: it is not "
                        "imported because config.yaml names it")  # fmt: skip
    parser.add_argument("--flips", action="store_true", help="instead, print the accuracy of the last checkpoint with "
                        "test-time flips: of logits averaged over each image and its mirror image")  # fmt: skip
    external = parser.add_argument_group("An external model")
    external.add_argument("--checkpoint", action=Append, metavar="FILE", help="state_dict; may be given several times")
    external.add_argument("--model", metavar="CLASS", help="package.module.Class, or the name of a ResNet")
    external.add_argument("--model_options", metavar="OPTIONS", help="keyword arguments of the class")
    external.add_argument("--classifier", metavar="NAME", help="name of the classifier, if it cannot be found")
    external.add_argument("--epoch", action=Append, metavar="N", help="epochs it was trained, for the record, once "
                          "per checkpoint; by default 0, of several 1, 2, ...")  # fmt: skip
    external.add_argument("--seed", metavar="N", help="seed it was trained with, for the record")
    external.add_argument("--out", metavar="FOLDER", help="folder to write")


def _run(settings: Namespace) -> int:
    every = option(settings, "every", int, 1)
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    splits, layers = option(settings, "split", list[str]), option(settings, "layers", list[str], [])
    given = asked_for(settings, *SECTIONS)
    if settings.get("checkpoint") is not None:
        for name in ("runs", "backbone", "flips"):
            if settings.get(name):
                raise ValueError(f"{name.removesuffix('s')} belongs to a run, and checkpoint to an external model")
        for name in ("model", "out"):
            if not settings.get(name):
                raise ValueError(f"{name} must be given with checkpoint")
        return _measure_external(settings, given, splits, layers)
    external = [name for name in _OF_EXTERNAL if settings.get(name) is not None]
    if given or external:
        raise ValueError(f"{[*given, *external][0]} belongs to --checkpoint: a run has its own")
    if not settings.get("runs"):
        raise ValueError("RUN must be the folder of a run or of several; or give --checkpoint")
    runs = runs_of(option(settings, "runs", list[str]))

    from neuralcollapse.lab.evaluate.checkpoints import accuracy_with_flips, measure_run
    from neuralcollapse.lab.training.runs import Preparation

    outcome, preparation = Outcome(), Preparation(resumed=True, progress=True)
    if settings.get("flips"):
        for name in ("every", "split", "layers"):
            if settings.get(name):
                raise ValueError(f"{name} has no effect with flips, which are of the last checkpoint")
        for run in runs:
            accuracies = accuracy_with_flips(run, preparation, backbone=settings.get("backbone"))
            for split, (plain, flipped) in accuracies.items():
                print(f"{run.path}: {split} accuracy {plain:.2%}, with flips {flipped:.2%}")
        return 0
    options = {"every": every, "splits": splits, "layers": layers, "backbone": settings.get("backbone")}
    for run in runs:
        records = outcome.valid(measure_run(run, preparation, **options))
        outcome.written += [*records, *([run.metrics] if records else [])]
    return outcome.report(_NOTHING)


def _measure_external(settings: Namespace, given: dict[str, Any], splits: list[str] | None, layers: list[str]) -> int:
    from neuralcollapse.lab.evaluate.state_dict import ExternalModel, measure_state_dict, series_epochs
    from neuralcollapse.lab.results.tables import read_table

    model = ExternalModel(
        option(settings, "model"),
        option(settings, "model_options", dict[str, Any]),
        option(settings, "classifier"),
        option(settings, "seed", int),
    )
    paths, asked = list(map(Path, option(settings, "checkpoint", list[str]))), option(settings, "epoch", list[int])
    epochs = series_epochs(len(paths), asked)
    checkpoints = dict(zip(epochs, paths, strict=True))
    outcome, folder = Outcome(), RunFolder(option(settings, "out"))
    outcome.written = measure_state_dict(checkpoints, model, folder.path, given, splits=splits, layers=layers)
    print(_standardisation(folder.read_environment().get("pixels") or {}))
    if asked is None and len(epochs) > 1:
        print(f"epochs: 1 to {len(epochs)}, in the order given; --epoch names others")
    for epoch in epochs:
        print(f"\n{_values(read_table(folder.metrics), epoch, splits)}")
    print()
    return outcome.report(_NOTHING)


def _standardisation(pixels: dict[str, Any]) -> str:
    """Return a sentence on the constants that pixels were standardised by."""
    parts = [
        f"{words} {', '.join(f'{value:g}' for value in pixels.get(name, []))}, {pixels.get(f'{name}_from')}"
        for name, words in (("mean", "mean"), ("std", "standard deviation"))
    ]
    return (
        f"pixels in [0, 1] were standardised by {'; '.join(parts)}. A model that was trained with other constants "
        "needs them: --pixel_mean, --pixel_std"
    )


def _values(table: pd.DataFrame, epoch: int, splits: list[str] | None) -> str:
    """Return the values of an epoch as a table: one row per metric, one column per split."""
    of_epoch = table[table["epoch"] == epoch]
    names = [name for name in of_epoch["split"].unique() if splits is None or name in splits]
    values = of_epoch.pivot(index="metric", columns="split", values="value")
    shown = values.loc[of_epoch["metric"].unique(), names].rename_axis(index=None, columns=f"epoch {epoch}")
    return shown.to_string(float_format="{:.4g}".format)


MEASURE = Command(
    "Measure every saved checkpoint that is not measured yet, on every split, in evaluation mode: all metrics into "
    "metrics.csv, and a record per epoch and split into moments/. Existing measurements are kept. With --checkpoint, "
    "measure an external model: a state_dict (safetensors, or a torch file that holds only tensors) of a class of "
    "yours, or of a ResNet with torchvision's names, on the data that the settings below name. Several checkpoints of "
    "one training, given together or one after another, become one folder that plot, report, distance and aggregate "
    "read.",
    _add_arguments,
    _run,
    SECTIONS,
)
