"""`neuralcollapse measure`: neural collapse of checkpoints, after the fact."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser, Namespace

from neuralcollapse.lab.commands.arguments import add_sections, asked_for, integer
from neuralcollapse.lab.commands.runs import Outcome, runs_of
from neuralcollapse.lab.config import BatchSettings, DataSettings
from neuralcollapse.lab.parsing import parse

SUMMARY = "NC metrics of every checkpoint of a run, or of a model that was never trained here"
USAGE = (
    "RUN [RUN ...] [--every N] [--split A,B] [--layers A,B]\n"
    "       neuralcollapse measure --checkpoint FILE --model CLASS --data DATA --out FOLDER [--SETTING VALUE ...]"
)
DESCRIPTION = (
    "Measure every saved checkpoint that is not measured yet, on every split, in evaluation mode: all metrics into "
    "metrics.csv, and a record of each epoch and split into moments/. What is there is kept. With --checkpoint, "
    "measure a model from elsewhere: a state_dict (safetensors, or a torch file of tensors alone) of a class of yours, "
    "or of a ResNet with torchvision's names, on the data that the settings below name."
)
SECTIONS = (DataSettings, BatchSettings)


def add_arguments(parser: ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("runs", metavar="RUN", nargs="*", type=str, help="folders of runs or of comparisons of runs")
    parser.add_argument("--every", type=integer, metavar="N", help="every N-th of the saved checkpoints, and the last")
    parser.add_argument("--split", type=str, metavar="A,B", help="splits to measure; by default all")
    parser.add_argument("--layers", type=str, metavar="A,B", help="modules whose outputs are measured as well")
    other = parser.add_argument_group("A model from elsewhere")
    other.add_argument("--checkpoint", type=str, metavar="FILE", help="its state_dict")
    other.add_argument("--model", type=str, metavar="CLASS", help="package.module.Class, or the name of a ResNet here")
    other.add_argument("--model_options", metavar="OPTIONS", help="keyword arguments of the class")
    other.add_argument("--classifier", type=str, metavar="NAME", help="its classifier, where it is not found by itself")
    other.add_argument("--epoch", type=integer, metavar="N", help="epochs it was trained, for the record; by default 0")
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
    if settings.get("checkpoint") is not None:
        if settings.get("runs"):
            raise ValueError("checkpoint is of a model from elsewhere: give it without a RUN")
        for name in ("model", "out"):
            if not settings.get(name):
                raise ValueError(f"{name} must be given with checkpoint")

        from neuralcollapse.lab.training.elsewhere import measure_state_dict

        options = {name: settings.get(name) for name in ("model_options", "classifier", "epoch")}
        options["model_options"] = parse("model_options", options["model_options"], dict[str, Any])
        outcome.written = measure_state_dict(
            settings.checkpoint, settings.model, settings.out, given, splits=splits, layers=layers or (), **options
        )
        return outcome.report("")
    alone = [
        name for name in ("model", "model_options", "classifier", "epoch", "out") if settings.get(name) is not None
    ]
    if given or alone:
        raise ValueError(f"{[*given, *alone][0]} belongs to --checkpoint: a run has its own")
    if not settings.get("runs"):
        raise ValueError("RUN must be the folder of a run or of several; or give --checkpoint")
    runs = runs_of(settings.runs)

    from neuralcollapse.lab.training.many_runs import Preparation
    from neuralcollapse.lab.training.measuring import measure_run

    preparation = Preparation(resumed=True, progress=True)
    for one in runs:
        found = measure_run(one, preparation, every=every, splits=splits, layers=layers or ())
        written = outcome.sound(found)
        outcome.written += [*written, *([one.metrics] if written else [])]
    return outcome.report("nothing to do: every checkpoint is measured")


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]
