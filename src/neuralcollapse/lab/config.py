"""What an experiment is: typed settings, the same as flags, as a YAML file and in Python."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, fields
from typing import Any, Literal

METHODS = ("standard", "fixed", "implicit")
_BOUNDS = {"at least": operator.ge, "above": operator.gt}


def _at_least(minimum: float, default: Any) -> Any:
    return field(default=default, metadata={"at least": minimum})


def _above(bound: float, default: Any) -> Any:
    return field(default=default, metadata={"above": bound})


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """Settings that are checked when they are made."""

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            for kind, bound in setting.metadata.items():
                if isinstance(value, int | float) and not _BOUNDS[kind](value, bound):
                    raise ValueError(f"{setting.name} must be {kind} {bound:g}, got {value}")


@dataclass(frozen=True, kw_only=True)
class Data(_Settings):
    """Data."""

    data: str = "digits"
    """`digits` (embedded), a folder (class sub-folders of images, or Parquet files), or a data set's id on the Hugging
    Face hub, such as ylecun/mnist."""
    label_column: str | None = None
    """The column of labels, where a data set has several."""
    image_size: int | None = _at_least(1, None)
    """Scale every image to this height and width. Needed where images differ in size."""
    train_samples: int | None = _at_least(1, None)
    """Train on this many images only, of all classes in proportion."""
    test_samples: int | None = _at_least(1, None)
    """Test on this many images only."""


@dataclass(frozen=True, kw_only=True)
class Batches(_Settings):
    """Batches."""

    batch_size: int = _at_least(2, 128)
    """Images in a batch."""
    stratified: bool = False
    """Every batch holds the classes in proportion."""
    crop_padding: int = _at_least(0, 0)
    """Augmentation: pad by this many pixels, then crop at random."""
    flip: bool = False
    """Augmentation: mirror at random."""
    rotation: float = _at_least(0, 0.0)
    """Augmentation: rotate at random by up to this many degrees, either way."""


@dataclass(frozen=True, kw_only=True)
class Model(_Settings):
    """Model."""

    backbone: Literal["convnet", "mlp", "resnet18"] = "convnet"
    """What computes the features."""
    width: int | None = _at_least(1, None)
    """Channels of the first stage, or neurons of a layer. By default 32 (convnet), 512 (mlp), 64 (resnet18)."""
    depth: int = _at_least(1, 3)
    """Layers of an mlp."""
    stem: Literal["7x7", "3x3"] = "7x7"
    """First layer of a resnet18: 7x7 of stride 2 and max-pooling, or 3x3 of stride 1."""
    feature_norm: Literal["auto", "none"] | float = _above(0, "auto")
    """Norm that features are given before the classifier; `auto` follows from the number of classes."""
    proximal_weight: float | None = _at_least(0, None)
    """implicit: how strongly the classifier stays with the last one. By default the head's own."""
    means_momentum: Literal["cumulative", "published"] | float | None = _above(0, None)
    """implicit and fixed: weight of a new batch in the moving means. By default the head's own."""


@dataclass(frozen=True, kw_only=True)
class Optimisation(_Settings):
    """Optimisation."""

    epochs: int = _at_least(1, 20)
    """Passes over the train split."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Optimiser, of all parameters alike."""
    lr: float = _above(0, 0.05)
    """Learning rate, at the start."""
    momentum: float = _at_least(0, 0.9)
    """sgd: momentum."""
    weight_decay: float = _at_least(0, 5e-4)
    """Weight decay."""
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    """The learning rate's: cosine ends at 0, step divides it by 10 after one and after two thirds."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train; auto takes an accelerator if there is one."""
    checkpoint_every: int | None = _at_least(1, None)
    """Keep a checkpoint of every so many epochs, beside the last."""


@dataclass(frozen=True, kw_only=True)
class OneRun(_Settings):
    """What to train."""

    method: str = "implicit"
    """standard, fixed or implicit."""
    seed: int = _at_least(0, 0)
    """From which initial weights, batches and augmentation follow."""


@dataclass(frozen=True, kw_only=True)
class ManyRuns(_Settings):
    """What to compare."""

    methods: str = ",".join(METHODS)
    """Comma-separated, out of standard, fixed and implicit."""
    seeds: int = _at_least(1, 3)
    """Number of seeds. A seed's runs start from the same weights and see the same batches."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.method_names
        unknown = [name for name in names if name not in METHODS]
        if unknown or len(set(names)) < len(names):
            raise ValueError(f"methods must be different ones of {', '.join(METHODS)}, got {self.methods!r}")

    @property
    def method_names(self) -> list[str]:
        """The methods, one by one."""
        return [name.strip() for name in self.methods.split(",")]


@dataclass(frozen=True, kw_only=True)
class RunConfig(Optimisation, Model, Batches, Data, OneRun):
    """All settings of one training run."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Optimisation, Model, Batches, Data, ManyRuns):
    """All settings of a comparison of methods over seeds."""

    def run(self, method: str, seed: int) -> RunConfig:
        """The settings of one of its runs."""
        own = {setting.name for setting in fields(ManyRuns)}
        shared = {setting.name: getattr(self, setting.name) for setting in fields(self) if setting.name not in own}
        return RunConfig(method=method, seed=seed, **shared)
