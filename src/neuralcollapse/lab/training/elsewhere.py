"""Measure external models, from their state_dicts: one, or a series of one model."""

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
from neuralcollapse.lab.experiments import single_run
from neuralcollapse.lab.models.backbones import evaluation_layout
from neuralcollapse.lab.models.building import build_backbone, own_module
from neuralcollapse.lab.results.files import sha256
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.results.provenance import relative_path
from neuralcollapse.lab.results.records import Records
from neuralcollapse.lab.results.resuming import is_external
from neuralcollapse.lab.training.checkpoints import check_zip
from neuralcollapse.lab.training.measuring import is_measured, select_splits, write_measurements
from neuralcollapse.lightning import measure_splits
from neuralcollapse.metrics import Measurement, Provenance


@dataclass(frozen=True, kw_only=True)
class Images(BatchSettings, DataSettings):
    """Which data, and how they are made into batches."""


def measure_state_dict(
    checkpoint: str | Path | Sequence[str | Path],
    model: str,
    out: str | Path,
    settings: Mapping[str, Any],
    *,
    model_options: dict[str, Any] | None = None,
    classifier: str | None = None,
    epoch: int | Sequence[int] | None = None,
    seed: int | None = None,
    splits: Sequence[str] | None = None,
    layers: Sequence[str] = (),
) -> list[Path]:
    """Measure an external model on data of the laboratory, at one checkpoint or at several.

    The folder may hold earlier measurements of the same model on the same data: further epochs are added. What is
    measured already is left as it is.

    Args:
        checkpoint: A state_dict, in a safetensors file or a torch file of tensors alone, there also under
            ``"state_dict"`` or ``"model"``; or several, of one training.
        model: The dotted path of a class, whose module ends in a classifier; or the name of a ResNet of the
            laboratory, for a state_dict with torchvision's names.
        out: The folder to write: settings, environment, metrics.csv and moments/.
        settings: Of the data and their batches.
        model_options: Keyword arguments of the class.
        classifier: The classifier's dotted name, where it is not found.
        epoch: Epochs that it was trained, of each checkpoint; by default as `series_epochs`.
        seed: The seed that it was trained with, for the record.
        splits: Which to measure; by default all.
        layers: Dotted names of modules whose outputs are measured as well.

    Returns:
        The files written.

    Raises:
        ValueError: A file that is no state_dict, a class that cannot be made, a state_dict of another class, epochs
            that are not one for each checkpoint or are those of other checkpoints, or data or a folder that cannot be
            used.
    """
    images, folder = Images(**settings), RunFolder(out)
    paths = [Path(one) for one in ([checkpoint] if isinstance(checkpoint, str | Path) else checkpoint)]
    of_epoch = dict(zip(series_epochs(len(paths), epoch), paths, strict=True))
    for path in paths:
        _check_file(path)
    kept = {"model": model, "model_options": model_options, "classifier": classifier, "seed": seed}
    kept = {key: value for key, value in kept.items() if value is not None} | images.in_force()
    there = _check_folder(folder, kept)
    digests = {number: sha256(path) for number, path in of_epoch.items()}
    for number, path in of_epoch.items():
        before = there.get(number)
        if before is not None and before.get("sha256") != digests[number]:
            raise ValueError(
                f"epoch {number} of {str(folder.path)!r} is that of the checkpoint {before.get('file')!r}, and "
                f"{str(path)!r} is another one: --epoch says of which epoch a checkpoint is, --out names another folder"
            )
    data = load_data(images, batch_size=images.batch_size)
    loaders = evaluation_batches(data, images)
    facts = {"data": str(data), "num_classes": data.num_classes, "data_fingerprint": data.fingerprint()}
    facts |= {"pixels": _pixels(loaders["train"], images)}
    if there:
        folder.check_data(facts)
    wanted, loaders = select_splits(loaders, splits)
    records = Records(folder)
    missing = [number for number in of_epoch if number not in there or not is_measured(records, number, wanted, layers)]
    if not missing and folder.read_environment().get("finished"):
        return []

    def measured() -> Iterator[tuple[int, dict[str, Measurement]]]:
        for number in missing:
            path, provenance = of_epoch[number], Provenance(epoch=number, model=f"{model} ({of_epoch[number].stem})")
            network = _network(model, model_options or {}, read_state_dict(path), data, images)
            with evaluation_layout(network):
                found = measure_splits(network, loaders, provenance, layers=list(layers), classifier=classifier)
            yield number, {split: found[split] for split in wanted}

    series, written = measured(), []
    first = list(islice(series, 1))  # what does not fit shows here, before anything is written
    with folder.writing(kept, resume=folder.config.exists(), facts=facts):
        for number, found in chain(first, series):
            written += write_measurements(folder, number, found)
            there[number] = {"file": relative_path(str(of_epoch[number].absolute()), folder.path)}
            there[number]["sha256"] = digests[number]
            folder.add_facts(checkpoints=dict(sorted(there.items())))
    return [folder.metrics, *written, folder.config]


def series_epochs(checkpoints: int, epoch: int | Sequence[int] | None) -> list[int]:
    """The epochs of a number of checkpoints, where they are not given: 0 for one, 1, 2, … for several.

    Raises:
        ValueError: if they are given and not one for each, or not different.

    Examples:
        >>> series_epochs(3, None), series_epochs(1, None), series_epochs(2, [10, 20])
        ([1, 2, 3], [0], [10, 20])
    """
    if epoch is None:
        return [0] if checkpoints == 1 else list(range(1, checkpoints + 1))
    epochs = [epoch] if isinstance(epoch, int) else list(epoch)
    if len(epochs) != checkpoints or len(set(epochs)) < len(epochs) or min(epochs, default=0) < 0:
        raise ValueError(
            f"epoch must be given once for each of {checkpoints} checkpoints, different ones, got {epochs}"
        )
    return epochs


def _check_folder(folder: RunFolder, kept: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The checkpoints that are measured there, by epoch."""
    if not folder.config.exists():
        folder.check(kept)
        return {}
    stored = folder.settings()
    if not is_external(stored):
        raise ValueError(
            f"out must be a new folder or one of measurements of an external model, and {str(folder.path)!r} "
            "holds a run"
        )
    if "checkpoint" in stored:
        raise ValueError(
            f"out must be a new folder: {str(folder.path)!r} was written by an earlier version, which kept one "
            "checkpoint in a folder"
        )
    folder.check(kept, resume=True)
    return {int(number): dict(one) for number, one in (folder.read_environment().get("checkpoints") or {}).items()}


def _pixels(batches: EvaluationBatches, images: Images) -> dict[str, Any]:
    """Standardisation of pixels: the constants, in units of pixels in [0, 1], and where each comes from."""
    own = f"of the {len(batches.split)} training images"
    found: dict[str, Any] = {}
    for name, given in (("mean", images.pixel_mean), ("std", images.pixel_std)):
        values = getattr(batches.standardise, name).flatten() / 255
        found[name] = [round(value, 6) for value in values.tolist()]
        found[f"{name}_from"] = own if given is None else f"as given by pixel_{name}"
    return found


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"checkpoint must be a file, and {str(path)!r} is none")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a state_dict by name; nothing of the file is executed.

    Raises:
        ValueError: There is no such file, or it holds something else.
    """
    _check_file(path)
    try:
        if zipfile.is_zipfile(path):
            check_zip(path)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated and foreign files fail in many ways
        raise ValueError(f"checkpoint {str(path)!r} cannot be read: {str(error).splitlines()[0]}") from error
    for key in ("state_dict", "model"):
        found = found.get(key, found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"checkpoint {str(path)!r} must hold a state_dict: tensors by name")
    return {name.removeprefix("module."): value for name, value in found.items()}


def _network(
    model: str, options: dict[str, Any], state: dict[str, Tensor], data: ImageData, images: Images
) -> nn.Module:
    image_shape = batch_shape(data.image_shape, images)
    if "." in model:
        network = own_module(model, options, image_shape, setting="model")
    else:
        config = single_run({"backbone": model, "method": "standard", **options})
        backbone = build_backbone(config, image_shape)
        network = nn.Sequential(backbone, nn.Linear(backbone.feature_dim, data.num_classes, bias="fc.bias" in state))
        state = _from_torchvision(state, network)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"checkpoint must be a state_dict of {model}, and does not fit: {reason[:300]}") from error
    return network


def _from_torchvision(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The tensors under this network's names."""
    names = {
        f"{name}.{tensor}": f"{_torchvision_name(name, module)}.{tensor}"
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear)
        for tensor in module.state_dict()
    }
    strange = sorted(set(state).symmetric_difference(names.values()))
    if strange:
        raise ValueError(
            f"checkpoint must have torchvision's names of a ResNet where model is a name; {strange[0]!r} is "
            f"{'not one of them' if strange[0] in state else 'missing'} (and {len(strange) - 1} more)"
        )
    return {ours: state[theirs] for ours, theirs in names.items()}


def _torchvision_name(name: str, module: nn.Module) -> str:
    kind = "conv" if isinstance(module, nn.Conv2d) else "bn"
    block = re.fullmatch(r"0\.layers\.(\d+)\.(\d+)\.(residual|shortcut)\.(?:(\d+)\.)?(\d+)", name)
    if isinstance(module, nn.Linear):
        return "fc"
    if block is None:
        return f"{kind}1"
    stage, number, path, place, last = block.groups()
    inner = f"downsample.{last}" if path == "shortcut" else f"{kind}{int(place) + 1}"
    return f"layer{stage}.{number}.{inner}"
