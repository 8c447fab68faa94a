"""`neuralcollapse measure`: neural collapse of checkpoints, of runs or of an external model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from neuralcollapse.lab.commands import Command
from neuralcollapse.lab.commands.arguments import asked_for
from neuralcollapse.lab.commands.common import Append, Outcome, add_backbone, add_runs, option, runs_of
from neuralcollapse.lab.config import BatchSettings, DataSettings
from neuralcollapse.lab.results.folder import RunFolder

if TYPE_CHECKING:
    import pandas as pd

SECTIONS = (DataSettings, BatchSettings)
_OF_EXTERNAL = ("model", "model_options", "classifier", "epoch", "seed", "out")
_OF_FEATURES = ("labels", "weight", "bias")
_NOTHING = "nothing to do: every checkpoint is measured"


def _add_arguments(parser: ArgumentParser) -> None:
    add_runs(parser, required=False)
    parser.add_argument("--every", metavar="N", help="measure every N-th of the saved checkpoints, and the last one")
    parser.add_argument("--split", metavar="A,B", help="splits to measure; by default all")
    parser.add_argument("--layers", metavar="A,B", help="modules whose outputs are measured as well; blocks: all "
                        "blocks of the model, determined from its structure")  # fmt: skip
    parser.add_argument("--probes", action="store_true", help="include the errors of the nearest class mean and of the "
                        "linear probe, for each layer as well, and the effective depth")  # fmt: skip
    add_backbone(parser)
    parser.add_argument("--metrics", metavar="core|all", help="metrics to print for an external model or for features; "
                        "by default core, about twelve")  # fmt: skip
    parser.add_argument("--flips", action="store_true", help="instead of measuring, print the accuracy of the last "
                        "checkpoint with logits averaged over each image and its mirror image")  # fmt: skip
    external = parser.add_argument_group("An external model")
    external.add_argument("--checkpoint", action=Append, metavar="FILE", help="state_dict; may be given several times")
    external.add_argument("--model", metavar="CLASS", help="package.module.Class, or the name of a ResNet")
    external.add_argument("--model_options", metavar="OPTIONS", help="keyword arguments of the class")
    external.add_argument("--classifier", metavar="NAME", help="name of the classifier, if it is ambiguous")
    external.add_argument("--epoch", action=Append, metavar="N", help="number of trained epochs, for the record, once "
                          "per checkpoint; by default 0, or 1, 2, ... for several checkpoints")  # fmt: skip
    external.add_argument("--seed", metavar="N", help="training seed, for the record")
    external.add_argument("--out", metavar="FOLDER", help="folder to write")
    features = parser.add_argument_group("Features in files")
    features.add_argument("--features", metavar="FILE", help="features (N, d): .npy, .npz, .safetensors or .parquet; "
                          "append :NAME for one of several arrays, a column, or columns such as f*")  # fmt: skip
    features.add_argument("--labels", metavar="FILE", help="classes (N,) of the features, or 'predicted' for those "
                          "of the classifier; without labels, ranks, norms and uniformity are measured")  # fmt: skip
    features.add_argument("--weight", metavar="FILE", help="weight (K, d) of the classifier, if there is one")
    features.add_argument("--bias", metavar="FILE", help="bias (K,) of the classifier")


def _run(settings: Namespace) -> int:
    every = option(settings, "every", int, 1)
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    splits, layers = option(settings, "split", list[str]), option(settings, "layers", list[str], [])
    given = asked_for(settings, *SECTIONS)
    metrics = option(settings, "metrics", default="core")
    if metrics not in ("core", "all"):
        raise ValueError(f"metrics must be core or all, got {metrics!r}")
    if settings.get("features") is not None:
        _check_features(settings, given)
        return _measure_features(settings, splits, metrics)
    for name in _OF_FEATURES:
        if settings.get(name) is not None:
            raise ValueError(f"{name} belongs to --features")
    if settings.get("checkpoint") is not None:
        for name in ("runs", "backbone", "flips", "probes"):
            if settings.get(name):
                shown = "run" if name == "runs" else name
                raise ValueError(f"{shown} belongs to a run, and checkpoint to an external model")
        for name in ("model", "out"):
            if not settings.get(name):
                raise ValueError(f"{name} must be given with checkpoint")
        return _measure_external(settings, given, splits, layers, metrics)
    external = [name for name in (*_OF_EXTERNAL, "metrics") if settings.get(name) is not None]
    if given or external:
        raise ValueError(f"{[*given, *external][0]} belongs to --checkpoint: a run has its own")
    if not settings.get("runs"):
        raise ValueError("RUN must be the folder of a run or of several; or give --checkpoint")
    runs = runs_of(option(settings, "runs", list[str]))

    from neuralcollapse.lab.evaluate.checkpoints import accuracy_with_flips, measure_run
    from neuralcollapse.lab.training.runs import Preparation

    outcome, preparation = Outcome(), Preparation(resumed=True, progress=True)
    if settings.get("flips"):
        for name in ("every", "split", "layers", "probes"):
            if settings.get(name):
                raise ValueError(f"{name} has no effect with flips, which use the last checkpoint")
        for run in runs:
            accuracies = accuracy_with_flips(run, preparation, backbone=settings.get("backbone"))
            for split, (plain, flipped) in accuracies.items():
                print(f"{run.path}: {split} accuracy {plain:.2%}, with flips {flipped:.2%}")
        return 0
    options = {
        "every": every,
        "splits": splits,
        "layers": "blocks" if layers == ["blocks"] else layers,
        "probes": bool(settings.get("probes")),
        "backbone": settings.get("backbone"),
    }
    for run in runs:
        records = outcome.valid(measure_run(run, preparation, **options))
        outcome.written += [*records, *([run.metrics] if records else [])]
    return outcome.report(_NOTHING)


def _measure_external(
    settings: Namespace, given: dict[str, Any], splits: list[str] | None, layers: list[str], metrics: str
) -> int:
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
        print(f"epochs: 1 to {len(epochs)}, in the given order; use --epoch for others")
    for epoch in epochs:
        print(f"\n{_values(read_table(folder.metrics), epoch, splits, metrics)}")
    print()
    return outcome.report(_NOTHING)


def _check_features(settings: Namespace, given: dict[str, Any]) -> None:
    """Raise if a flag without effect on features in files is given, or a flag is missing."""
    others = [
        *given,
        "runs",
        "every",
        "layers",
        "probes",
        "backbone",
        "flips",
        "checkpoint",
        "model",
        "model_options",
        "classifier",
    ]
    for name in others:
        if name in given or settings.get(name):
            raise ValueError(f"{name.removesuffix('s') if name == 'runs' else name} has no effect with features")
    if settings.get("labels") is None:
        for name in ("weight", "bias", "out", "metrics", "split", "epoch", "seed"):
            if settings.get(name) is not None:
                raise ValueError(f"{name} has no effect on features without labels")
    if settings.get("out") is None:
        for name in ("split", "epoch", "seed"):
            if settings.get(name) is not None:
                raise ValueError(f"{name} is part of the record and needs --out")
    elif settings.get("weight") is None:
        raise ValueError("weight must be given with out, because tables and figures compare it with the class means")


def _measure_features(settings: Namespace, splits: list[str] | None, metrics: str) -> int:
    """Measure features in files, print the metrics, and record them in a run folder if ``out`` is given."""
    from neuralcollapse.metrics import measure_features

    epochs = option(settings, "epoch", list[int], [0])
    if len(epochs) != 1 or (splits is not None and len(splits) != 1):
        raise ValueError("features must have one epoch and one split, got several")
    paths = {name: option(settings, name) for name in ("features", "labels", "weight", "bias")}
    seed = option(settings, "seed", int)
    folder = None
    if settings.get("out") is not None:
        origin = {name: path for name, path in paths.items() if path is not None}
        name = Path(paths["features"]).stem
        folder = RunFolder.create(settings.out, name=name, settings=origin | ({} if seed is None else {"seed": seed}))
    if paths["labels"] is None:
        print(measure_features(paths["features"]).summary())
        return 0
    measurement = measure_features(**paths)
    print(measurement.summary(metrics))
    outcome = Outcome()
    if folder is not None:
        print()
        outcome.written = [folder.record(epochs[0], (splits or ["train"])[0], measurement), folder.metrics]
        return outcome.report()
    return 0


def _standardisation(pixels: dict[str, Any]) -> str:
    """Return a sentence about the constants by which pixels were standardised."""
    parts = [
        f"{words} {', '.join(f'{value:g}' for value in pixels.get(name, []))}, {pixels.get(f'{name}_from')}"
        for name, words in (("mean", "mean"), ("std", "standard deviation"))
    ]
    return (
        f"pixels in [0, 1] were standardised by {'; '.join(parts)}. If the model was trained with other constants, "
        "give them with --pixel_mean and --pixel_std"
    )


def _values(table: pd.DataFrame, epoch: int, splits: list[str] | None, metrics: str) -> str:
    """Return the values of an epoch as a table with one row per metric and one column per split."""
    from neuralcollapse.catalogue import CORE

    of_epoch = table[(table["epoch"] == epoch) & (table["metric"].isin(CORE) | (metrics == "all"))]
    names = [name for name in of_epoch["split"].unique() if splits is None or name in splits]
    values = of_epoch.pivot(index="metric", columns="split", values="value")
    shown = values.loc[of_epoch["metric"].unique(), names].rename_axis(index=None, columns=f"epoch {epoch}")
    return shown.to_string(float_format="{:.4g}".format)


MEASURE = Command(
    "Measure every saved checkpoint that is not measured yet, on every split, in evaluation mode. All metrics are "
    "written to metrics.csv, and one record per epoch and split to moments/. Existing measurements are kept. With "
    "--checkpoint, measure an external model: a state_dict (safetensors, or a torch file that contains only tensors) "
    "of a user-defined class, or of a ResNet with the names of torchvision, on the data of the settings below. Several "
    "checkpoints of one training, given together or in several commands, form one folder that plot, report, distance "
    "and aggregate can read. With --features, measure features in files, without a model, and print the metrics; "
    "without --labels, only metrics that do not need labels. --out FOLDER records them in a run folder.",
    _add_arguments,
    _run,
    SECTIONS,
)
