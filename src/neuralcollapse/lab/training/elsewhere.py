"""Measure a model that was never trained here, from its state_dict."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuralcollapse.lab.config import BatchSettings, DataSettings, RunConfig
from neuralcollapse.lab.data.augmentation import batch_shape
from neuralcollapse.lab.data.batches import evaluation_batches
from neuralcollapse.lab.data.loading import load_data
from neuralcollapse.lab.models.building import build_backbone, own_module
from neuralcollapse.lab.results.folder import RunFolder
from neuralcollapse.lab.training.collapse_callback import measure_splits
from neuralcollapse.lab.training.measuring import select_splits, write_measurements


@dataclass(frozen=True, kw_only=True)
class Images(BatchSettings, DataSettings):
    """Which data, and how they are made into batches."""


def measure_state_dict(
    checkpoint: str | Path,
    model: str,
    out: str | Path,
    settings: Mapping[str, Any],
    *,
    model_options: dict[str, Any] | None = None,
    classifier: str | None = None,
    epoch: int | None = None,
    splits: Sequence[str] | None = None,
    layers: Sequence[str] = (),
) -> list[Path]:
    """Measure a model from elsewhere on data of the laboratory.

    Args:
        checkpoint: A state_dict, in a safetensors file or a torch file of tensors alone, there also under
            ``"state_dict"`` or ``"model"``.
        model: The dotted path of a class, whose module ends in a classifier; or the name of a ResNet of the
            laboratory, for a state_dict with torchvision's names.
        out: The folder to write: settings, environment, metrics.csv and moments/.
        settings: Of the data and their batches.
        model_options: Keyword arguments of the class.
        classifier: The classifier's dotted name, where it is not found.
        epoch: Epochs it was trained, for the record.
        splits: Which to measure; by default all.
        layers: Dotted names of modules whose outputs are measured as well.

    Returns:
        The files written.

    Raises:
        ValueError: A file that is no state_dict, a class that cannot be made, a state_dict of another class, or data
            or a folder that cannot be used.
    """
    images, state = Images(**settings), read_state_dict(Path(checkpoint))
    folder, name = RunFolder(out), Path(checkpoint).stem
    kept = {"checkpoint": str(checkpoint), "model": model, "model_options": model_options, "epoch": epoch}
    kept = {key: value for key, value in kept.items() if value is not None} | images.in_force()
    folder.check(kept)
    data = load_data(images)
    network = _network(model, model_options or {}, state, batch_shape(data.image_shape, images), data.num_classes)
    wanted, loaders = select_splits(evaluation_batches(data, images), splits)
    found = measure_splits(
        network,
        loaders,
        classifier=classifier,
        layers=list(layers),
        epoch=epoch or 0,
        model_name=f"{model} ({name})",
    )
    with folder.writing(kept, facts={"data": str(data), "num_classes": data.num_classes}):
        records = write_measurements(folder, epoch or 0, {split: found[split] for split in wanted})
    return [folder.metrics, *records, folder.config]


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a state_dict by name; nothing of the file is executed.

    Raises:
        ValueError: There is no such file, or it holds something else.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint must be a file, and {str(path)!r} is none")
    try:
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
    model: str, options: dict[str, Any], state: dict[str, Tensor], image_shape: tuple[int, int, int], num_classes: int
) -> nn.Module:
    if "." in model:
        network = own_module(model, options, image_shape)
    else:
        config = RunConfig(backbone=model, method="standard", **options)
        backbone = build_backbone(config, image_shape)
        network = nn.Sequential(backbone, nn.Linear(backbone.feature_dim, num_classes, bias="fc.bias" in state))
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
