"""Transfer of the frozen features of a run to other data, by layer, and its record in the folder of the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from neuralcollapse.lab.config import DataSettings
from neuralcollapse.lab.data.images import ImageData
from neuralcollapse.lab.data.load import load_data
from neuralcollapse.lab.evaluate.checkpoints import checkpoint_files, chosen_checkpoints, saved_run
from neuralcollapse.lab.models.backbones import evaluation_layout
from neuralcollapse.lab.results.files import sole_writer
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.tables import TRANSFER_COLUMNS, add_rows
from neuralcollapse.lab.training.checkpoint import CheckpointFiles
from neuralcollapse.lab.training.run import Run
from neuralcollapse.lab.training.runs import Preparation
from neuralcollapse.metrics import TransferredLayer, transfer
from neuralcollapse.metrics.measure import Layers

ACCURACIES = ("linear_probe", "nearest_class_mean")


@dataclass(frozen=True)
class Transferred:
    """Accuracies of the layers of a run at one epoch, on other data.

    Attributes:
        epoch: Number of trained epochs.
        data: Description of the data, as in the table.
        layers: Accuracies of each layer, ending with the features.
    """

    epoch: int
    data: str
    layers: list[TransferredLayer]


def transfer_run(
    run: RunFolder,
    preparation: Preparation,
    given: Mapping[str, Any],
    *,
    layers: Layers = "blocks",
    epochs: Literal["last", "all"] | Sequence[int] = "last",
    ridge: float = 0.0,
    backbone: str | None = None,
) -> Iterator[Transferred]:
    """Evaluate frozen features of checkpoints of a run on other data, and add the accuracies to ``transfer.csv``.

    The images are standardised like those of the run. The probes are fitted to the train split of these data and
    evaluated on their test split. The folder is locked for other processes until the iterator ends.

    Args:
        run: Folder of the run.
        preparation: Data, loaded once for several runs, and whether progress is shown.
        given: Settings of the other data; by default the data of the run, restricted to the classes that it held out.
        layers: Names of modules of the model, or ``"blocks"``.
        epochs: Epochs with a checkpoint: the last one, all or some.
        ridge: Penalty of the linear probe, as for `linear_probe`.
        backbone: Class that may be imported if the settings of the run name it as their backbone.

    Yields:
        One result per epoch.

    Raises:
        ValueError: if the run lacks a checkpoint, data cannot be loaded or have images of another shape, no data are
            given and the run did not hold out classes, or its settings name a class other than ``backbone``.
    """
    with sole_writer(run.path):
        paths, prepared = checkpoint_files(run), saved_run(run, preparation, backbone)
        files = CheckpointFiles(prepared.config, prepared.fingerprint)
        chosen = chosen_checkpoints(run, paths, files, epochs)
        config = _settings_of(given, prepared)
        data = load_data(config, progress=preparation.progress).to(prepared.data.train.labels.device)
        _check_shape(data, prepared.data)
        name, layers = _name_of(config), prepared.trained.measured_layers(layers)
        train, test = (replace(prepared.evaluation["test"], split=split) for split in (data.train, data.test))
        options, head = prepared.measure_options["options"], prepared.trained.measured.head
        for epoch, path in chosen.items():
            prepared.trained.load_state_dict(files.load(path)["state_dict"])
            with evaluation_layout(prepared.trained):
                rows = transfer(
                    prepared.trained,
                    train,
                    test,
                    data.num_classes,
                    layers=layers,
                    ridge=ridge,
                    classifier=head,
                    options=options,
                    progress=preparation.progress,
                )
            values = [
                (epoch, name, row.layer, accuracy, getattr(row, accuracy)) for row in rows for accuracy in ACCURACIES
            ]
            add_rows(run.transfer, values, columns=TRANSFER_COLUMNS)
            yield Transferred(epoch, name, rows)


def _settings_of(given: Mapping[str, Any], prepared: Run) -> DataSettings:
    """Return the settings of the other data."""
    if given:
        if "data" not in given:
            raise ValueError(f"data must be given with {next(iter(given))}")
        return DataSettings(**given)
    if prepared.config.hold_out_classes is None:
        raise ValueError("data must be given: the run held out no classes (hold_out_classes) to evaluate on")
    assert prepared.data.class_names is not None
    known = prepared.config.section(DataSettings)
    return known.model_copy(update={"hold_out_classes": list(prepared.data.class_names)})


def _check_shape(data: ImageData, of_run: ImageData) -> None:
    if data.image_shape != of_run.image_shape:
        shown = ["x".join(map(str, one.image_shape)) for one in (of_run, data)]
        channels, height, _ = of_run.image_shape
        raise ValueError(
            f"data must have images of {shown[0]} like the run, got {shown[1]}: "
            f"--image_size {height} --channels {channels} convert them"
        )


def _name_of(config: DataSettings) -> str:
    """Return a description of the data."""
    known = Path(config.data).name or config.data
    if config.hold_out_classes is None:
        return known
    return f"{known} without {','.join(config.hold_out_classes)}"
