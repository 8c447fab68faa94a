"""`neuralcollapse transfer`: linear probe and nearest class mean on frozen features of runs, for other data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from neuralcollapse.lab.commands import Command
from neuralcollapse.lab.commands.arguments import asked_for
from neuralcollapse.lab.commands.common import (
    Outcome,
    add_backbone,
    add_epochs,
    add_runs,
    epochs_of,
    option,
    runs_and_figures,
)
from neuralcollapse.lab.config import DataSettings

if TYPE_CHECKING:
    from neuralcollapse.metrics import TransferredLayer


def _add_arguments(parser: ArgumentParser) -> None:
    add_runs(parser)
    parser.add_argument("--layers", metavar="A,B", help="modules whose outputs are evaluated in addition to the "
                        "features; by default blocks, all blocks of the model; features: only these")  # fmt: skip
    add_epochs(parser)
    parser.add_argument("--ridge", metavar="LAMBDA", help="penalty of the linear probe, in units of the mean variance "
                        "of a feature; by default 0")  # fmt: skip
    parser.add_argument("--out", metavar="FOLDER", help="folder of the figure; by default figures/ of the run")
    add_backbone(parser)


def _run(settings: Namespace) -> int:
    given = asked_for(settings, DataSettings)
    layers = option(settings, "layers", list[str], ["blocks"])
    epochs = epochs_of(settings)
    ridge = option(settings, "ridge", float, 0.0)
    if not 0 <= ridge < float("inf"):
        raise ValueError(f"ridge must be finite and at least 0, got {ridge}")
    runs = runs_and_figures(settings)

    from neuralcollapse.lab.evaluate.transfer import transfer_run
    from neuralcollapse.lab.figures.transfer import write_transfer
    from neuralcollapse.lab.training.runs import Preparation

    names = {"blocks": "blocks", "features": []}.get(layers[0], layers) if len(layers) == 1 else layers
    outcome, preparation = Outcome(), Preparation(resumed=True, progress=True)
    for run, figures in runs:
        results = transfer_run(
            run, preparation, given, layers=names, epochs=epochs, ridge=ridge, backbone=settings.get("backbone")
        )
        for result in results:
            title = f"{run.path.name}, epoch {result.epoch}, on {result.data}"
            print(f"{title}\n\n{_table(result.layers)}\n")
            stem = f"{result.data}-epoch{result.epoch}"
            outcome.written += write_transfer(result.layers, title, stem, figures)
        outcome.written.append(run.transfer)
    outcome.written = [*dict.fromkeys(outcome.written)]
    return outcome.report()


def _table(layers: Sequence[TransferredLayer]) -> str:
    """Return the accuracies of each layer as a table."""
    width = max(len(row.layer) for row in layers)
    lines = [f"{'layer':{width}}  {'d':>6}  linear probe  nearest class mean"]
    lines += [
        f"{row.layer:{width}}  {row.dimension:>6}  {row.linear_probe:>12.2%}  {row.nearest_class_mean:>18.2%}"
        for row in layers
    ]
    return "\n".join(lines)


TRANSFER = Command(
    "Evaluate the frozen features of checkpoints on other data, by layer: the test accuracies of a linear probe (least "
    "squares on one-hot targets, in closed form) and of the nearest class mean, both fitted to the train split of "
    "these data. The settings below select the data; by default they are the data of the run, restricted to the "
    "classes that it held out (hold_out_classes). Accuracies are written to transfer.csv of the run and replace those "
    "of the same epoch, data and layer; a figure shows them by depth.",
    _add_arguments,
    _run,
    (DataSettings,),
)
