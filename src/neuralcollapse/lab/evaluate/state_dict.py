"""Measurement of external models from their state_dicts: a single checkpoint, or several of one training."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuralcollapse.lab.config import BatchSettings, DataSettings
from neuralcollapse.lab.data.batches import EvaluationBatches, batch_shape, evaluation_batches
from neuralcollapse.lab.data.images import ImageData
from neuralcollapse.lab.data.load import load_data
from neuralcollapse.lab.evaluate.checkpoints import is_measured, select_splits, write_measurements
from neuralcollapse.lab.experiments import single_run
from neuralcollapse.lab.models.backbones import evaluation_layout
from neuralcollapse.lab.models.build import build_backbone, own_module
from neuralcollapse.lab.results.files import sha256
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.provenance import relative_path
from neuralcollapse.lab.results.records import Records
from neuralcollapse.lab.results.resuming import is_external
from neuralcollapse.lab.training.checkpoint import check_zip
from neuralcollapse.metrics import Measurement, Provenance
from neuralcollapse.metrics.measure import measure_splits


class EvaluationSettings(BatchSettings, DataSettings):
    """Data to measure on, and their batches."""


@dataclass(frozen=True)
class ExternalModel:
    """External model, which was not trained by the laboratory.

    Attributes:
        model: Dotted path of an ``nn.Module`` class that ends in a classifier; or the name of a ResNet of the
            laboratory, for a state_dict with the names of torchvision.
        model_options: Keyword arguments of the class.
        classifier: Dotted name of the classifier; by default it is determined automatically.
        seed: Training seed of the model, for the record.
    """

    model: str
    model_options: dict[str, Any] | None = None
    classifier: str | None = None
    seed: int | None = None

    def build(self, state: dict[str, Tensor], data: ImageData, settings: EvaluationSettings) -> nn.Module:
        """Return the model with the tensors of a state_dict.

        Raises:
            ValueError: if the class cannot be built, or the state_dict does not fit it.
        """
        image_shape, options = batch_shape(data.image_shape, settings), self.model_options or {}
        if "." in self.model:
            network = own_module(self.model, options, {"image_shape": image_shape}, setting="model")
        else:
            config = single_run({"backbone": self.model, "method": "standard", **options})
            backbone = build_backbone(config, image_shape)
            linear = nn.Linear(backbone.feature_dim, data.num_classes, bias="fc.bias" in state)
            network = nn.Sequential(backbone, linear)
            state = _from_torchvision(state, network)
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"checkpoint must be a state_dict of {self.model}, but does not fit: {reason}") from error
        return network


def measure_state_dict(
    checkpoints: Mapping[int, Path],
    model: ExternalModel,
    out: str | Path,
    settings: Mapping[str, Any],
    *,
    splits: Sequence[str] | None = None,
    layers: Sequence[str] = (),
) -> list[Path]:
    """Measure an external model on data of the laboratory, at one or several checkpoints.

    If the folder contains earlier measurements of the same model on the same data, epochs are added, and existing
    measurements are not changed.

    Args:
        checkpoints: File of each state_dict by epoch: a safetensors file, or a torch file that contains only tensors,
            possibly under ``"state_dict"`` or ``"model"``.
        model: The model.
        out: Folder to write: settings, environment, metrics.csv and moments/.
        settings: Settings of the data and their batches.
        splits: Splits to measure; by default all.
        layers: Dotted names of modules whose outputs are measured as well.

    Returns:
        The written files; empty if everything is already measured.

    Raises:
        ValueError: if a file is not a state_dict, the class cannot be constructed, a state_dict does not fit the class,
            an epoch was measured with a different checkpoint, or data or folder cannot be used.
    """
    evaluation, folder = EvaluationSettings(**settings), RunFolder(out)
    for path in checkpoints.values():
        _check_file(path)
    config = {name: value for name, value in vars(model).items() if value is not None} | evaluation.in_force()
    digests = {epoch: sha256(path) for epoch, path in checkpoints.items()}
    with folder.writing(config, resume=_is_external_folder(folder)):
        measured = _measured_checkpoints(folder)
        for epoch, path in checkpoints.items():
            earlier = measured.get(epoch)
            if earlier is not None and earlier.get("sha256") != digests[epoch]:
                raise ValueError(
                    f"epoch {epoch} of {str(folder.path)!r} was measured with the checkpoint {earlier.get('file')!r}, "
                    f"but {str(path)!r} differs from it: --epoch sets the epoch of a checkpoint, --out selects another "
                    "folder"
                )
        data = load_data(evaluation, batch_size=evaluation.batch_size)
        loaders = evaluation_batches(data, evaluation)
        facts = {"data": str(data), "num_classes": data.num_classes, "data_fingerprint": data.fingerprint()}
        facts |= {"pixels": _standardisation(loaders["train"], evaluation)}
        if measured:
            folder.check_data(facts)
        splits, loaders = select_splits(loaders, splits)
        records = Records(folder)
        missing = [
            epoch for epoch in checkpoints if epoch not in measured or not is_measured(records, epoch, splits, layers)
        ]
        if not missing and folder.read_environment().get("finished"):
            return []

        def measure_missing() -> Iterator[tuple[int, dict[str, Measurement]]]:
            for epoch in missing:
                path = checkpoints[epoch]
                provenance = Provenance(epoch=epoch, model=f"{model.model} ({path.stem})")
                network = model.build(read_state_dict(path), data, evaluation)
                options: dict[str, Any] = {"layers": list(layers), "classifier": model.classifier}
                with evaluation_layout(network):
                    measurements = measure_splits(network, loaders, provenance, **options)
                yield epoch, {split: measurements[split] for split in splits}

        series, written = measure_missing(), []
        first = list(islice(series, 1))  # a model that does not fit raises an error here, before anything is written
        folder.begin(facts)
        for epoch, measurements in chain(first, series):
            written += write_measurements(folder, epoch, measurements)
            file = relative_path(str(checkpoints[epoch].absolute()), folder.path)
            measured[epoch] = {"file": file, "sha256": digests[epoch]}
            folder.add_facts(checkpoints=dict(sorted(measured.items())))
        return [folder.metrics, *written, folder.config]


def series_epochs(checkpoints: int, epochs: Sequence[int] | None) -> list[int]:
    """Return the epochs of a number of checkpoints; by default 0 for one, and 1, 2, … for several.

    Raises:
        ValueError: unless there is one distinct epoch for each checkpoint.

    Examples:
        >>> series_epochs(3, None), series_epochs(1, None), series_epochs(2, [10, 20])
        ([1, 2, 3], [0], [10, 20])
    """
    if epochs is None:
        return [0] if checkpoints == 1 else list(range(1, checkpoints + 1))
    if len(epochs) != checkpoints or len(set(epochs)) < len(epochs) or min(epochs, default=0) < 0:
        raise ValueError(
            f"epoch must be given once for each of {checkpoints} checkpoints, with distinct values, got {list(epochs)}"
        )
    return list(epochs)


def _is_external_folder(folder: RunFolder) -> bool:
    """Return whether a folder contains measurements of an external model, or False if it does not contain a run.

    Raises:
        ValueError: if it contains a run of the laboratory, or measurements of an earlier version.
    """
    if not folder.config.exists():
        return False
    stored = folder.settings()
    if not is_external(stored):
        raise ValueError(
            f"out must be a new folder or one of measurements of an external model, but {str(folder.path)!r} has a run"
        )
    if "checkpoint" in stored:
        raise ValueError(
            f"out must be a new folder: {str(folder.path)!r} was written by an earlier version, which supported only "
            "one checkpoint per folder"
        )
    return True


def _measured_checkpoints(folder: RunFolder) -> dict[int, dict[str, Any]]:
    """Return file and digest of each measured checkpoint in a folder, by epoch."""
    checkpoints = folder.read_environment().get("checkpoints") or {}
    return {int(epoch): dict(checkpoint) for epoch, checkpoint in checkpoints.items()}


def _standardisation(batches: EvaluationBatches, settings: EvaluationSettings) -> dict[str, Any]:
    """Return mean and standard deviation of pixels in [0, 1], and the origin of each."""
    constants: dict[str, Any] = {}
    for name, given in (("mean", settings.pixel_mean), ("std", settings.pixel_std)):
        values = getattr(batches.standardise, name).flatten() / 255
        constants[name] = [round(value, 6) for value in values.tolist()]
        computed = f"of the {len(batches.split)} training images"
        constants[f"{name}_from"] = computed if given is None else f"as given by pixel_{name}"
    return constants


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"checkpoint must be a file, but {str(path)!r} is not")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a state_dict by name, without executing code from the file.

    Raises:
        ValueError: if the file does not exist or is not a state_dict.
    """
    _check_file(path)
    try:
        if zipfile.is_zipfile(path):
            check_zip(path)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated files and files in other formats fail in many ways
        raise ValueError(f"checkpoint {str(path)!r} cannot be read: {str(error).splitlines()[0]}") from error
    for key in ("state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"checkpoint {str(path)!r} must contain a state_dict: tensors by name")
    return {name.removeprefix("module."): value for name, value in state.items()}


def _from_torchvision(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Rename the tensors of a torchvision ResNet to the names of the laboratory."""
    names = {
        f"{name}.{tensor}": f"{_torchvision_name(name, module)}.{tensor}"
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear)
        for tensor in module.state_dict()
    }
    mismatched = sorted(set(state).symmetric_difference(names.values()))
    if mismatched:
        raise ValueError(
            f"checkpoint must have the names of a torchvision ResNet if model is a name; {mismatched[0]!r} is "
            f"{'not one of them' if mismatched[0] in state else 'missing'} (and {len(mismatched) - 1} more)"
        )
    return {ours: state[theirs] for ours, theirs in names.items()}


def _torchvision_name(name: str, module: nn.Module) -> str:
    kind = "conv" if isinstance(module, nn.Conv2d) else "bn"
    block = re.fullmatch(r"0\.layers\.(\d+)\.(\d+)\.(residual|shortcut)\.(?:(\d+)\.)?(\d+)", name)
    if isinstance(module, nn.Linear):
        return "fc"
    if block is None:
        return f"{kind}1"
    stage, number, path, index, last = block.groups()
    inner = f"downsample.{last}" if path == "shortcut" else f"{kind}{int(index) + 1}"
    return f"layer{stage}.{number}.{inner}"
