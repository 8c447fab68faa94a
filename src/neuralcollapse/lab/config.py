"""What an experiment is: typed settings, the same as flags, as a YAML file and in Python."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field, fields
from typing import Any, Literal

METHODS = ("standard", "fixed", "implicit")
LOGGERS = ("tensorboard", "wandb")
_BOUNDS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le}


def _at_least(minimum: float, default: Any) -> Any:
    return field(default=default, metadata={"at least": minimum})


def _above(bound: float, default: Any) -> Any:
    return field(default=default, metadata={"above": bound})


def _between(low: float, high: float, default: Any, *, low_allowed: bool = False) -> Any:
    return field(default=default, metadata={"at least" if low_allowed else "above": low, "at most": high})


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """Settings that are checked when they are made."""

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if any(isinstance(item, float) and not math.isfinite(item) for item in _items(value)):
                raise ValueError(f"{setting.name} must be finite, got {value}")
            for kind, bound in setting.metadata.items():
                if isinstance(value, int | float) and not _BOUNDS[kind](value, bound):
                    raise ValueError(f"{setting.name} must be {kind} {bound:g}, got {value}")


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check_epochs(name: str, epochs: list[int]) -> None:
    if any(epoch < 1 for epoch in epochs):
        raise ValueError(f"{name} must be epochs, counted from 1, got {epochs}")


@dataclass(frozen=True, kw_only=True)
class Data(_Settings):
    """Data."""

    data: str = "digits"
    """`digits` (embedded), a known data set (mnist, fashion-mnist, svhn, emnist-balanced, cifar10, cifar100, stl10,
    tiny-imagenet, imagenet: fetched from the Hugging Face hub), a folder (class sub-folders of images, or Parquet
    files), or any data set's id on the hub."""
    data_config: str | None = None
    """Configuration of a data set on the hub that has several."""
    train_split: str | None = None
    """Name of the split to train on. By default train, or the only one."""
    test_split: str | None = None
    """Name of the split to test on. By default test or validation; where there is none, one image in five is held
    out."""
    label_column: str | None = None
    """The column of labels, where a data set has several."""
    image_size: int | None = _at_least(1, None)
    """Scale every image to this height and width. Needed where images differ in size."""
    channels: Literal[1, 3] | None = None
    """Channels of every image. By default 1 if all images are grey, else 3."""
    digits_per_image: int = _between(1, 20, 1, low_allowed=True)
    """Put this many images k side by side, drawn at random, whose labels together are one of 10^k classes (of C^k,
    for data with C)."""
    train_samples: int | None = _at_least(1, None)
    """Train on this many images only, of all classes in proportion; with digits_per_image, draw this many."""
    test_samples: int | None = _at_least(1, None)
    """Test on this many images only."""
    samples_per_class: int | None = _at_least(1, None)
    """Train on the first so many images of each class only."""
    imbalance: Literal["none", "exponential", "step"] = "none"
    """Long-tailed training data: the images of a class fall geometrically from the first class to the last, or the
    second half of the classes has fewer."""
    imbalance_factor: float = _between(0, 1, 0.01)
    """Images of the smallest class over those of the largest."""
    random_labels: bool = False
    """Permute the labels of the training images at random, once; the run keeps them."""
    label_noise: float = _between(0, 1, 0.0, low_allowed=True)
    """Share of training images whose label is replaced by one drawn among all classes; the run keeps them."""
    data_seed: int = _between(0, 2**63 - 1, 0, low_allowed=True)
    """Drawn from it: images put side by side, the long tail, random and noisy labels. The same for every seed."""
    memory_budget: float = _at_least(0, 4.0)
    """GiB. Data that take more when decoded are read by worker processes while training, all others are decoded once
    and live on the training device."""
    workers: int | None = _at_least(0, None)
    """Worker processes, for data over the budget. By default one for each CPU core, at most 16."""


@dataclass(frozen=True, kw_only=True)
class Batches(_Settings):
    """Batches."""

    batch_size: int = _at_least(2, 128)
    """Images in a batch."""
    stratified: bool = False
    """Every batch holds the classes in proportion."""
    crop_padding: int = _at_least(0, 0)
    """Augmentation: pad by this many pixels, then crop at random."""
    crop_size: int | None = _at_least(1, None)
    """Height and width of crops, if not the images' own; images that are not augmented are cropped at the centre."""
    flip: bool = False
    """Augmentation: mirror at random."""
    rotation: float = _at_least(0, 0.0)
    """Augmentation: rotate at random by up to this many degrees, either way."""
    pixel_mean: list[float] | None = None
    """Subtracted from each channel of pixels in [0, 1]; one value, or one a channel. By default the training images'
    own mean."""
    pixel_std: list[float] | None = None
    """What each channel is divided by then. By default the training images' own standard deviation."""


@dataclass(frozen=True, kw_only=True)
class Model(_Settings):
    """Model."""

    backbone: str = "convnet"
    """What computes the features: convnet, mlp, resnet18, resnet34, resnet50, vgg13, or the dotted path of your own
    class, such as package.module.Class, which gives features (N, feature_dim)."""
    backbone_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of your own class."""
    width: int | None = _at_least(1, None)
    """Channels of the first stage, or neurons of a layer. By default 32 (convnet), 512 (mlp), 64 (resnets, vgg13)."""
    depth: int = _at_least(1, 3)
    """Layers of an mlp."""
    feature_dim: int | None = _at_least(1, None)
    """Dimension of the features: output channels of the last stage, or neurons of the last layer. By default the
    backbone's own."""
    stem: Literal["7x7", "3x3"] = "7x7"
    """First layer of a resnet: 7x7 of stride 2 and max-pooling, or 3x3 of stride 1."""
    batch_norm_affine: bool = True
    """Batch norm trains a scale and a shift."""
    feature_norm: Literal["auto", "none"] | float = _above(0, "auto")
    """Norm that features are given before the classifier; `auto` follows from the number of classes."""
    unit_weight: bool = True
    """standard: keep the rows of the classifier at unit norm."""
    classifier_bias: Literal["auto", "learned", "centring", "none"] = "auto"
    """The classifier's bias: learned (standard, fixed), minus weight times mean feature (fixed, implicit), or none.
    `auto` is learned for standard and centring for the others."""
    proximal_weight: float | None = _at_least(0, None)
    """implicit: how strongly the classifier stays with the last one. By default the head's own."""
    means_momentum: Literal["cumulative", "published"] | float | None = _between(0, 1, None)
    """implicit and fixed: weight of a new batch in the moving means. By default the head's own."""


@dataclass(frozen=True, kw_only=True)
class Optimisation(_Settings):
    """Optimisation."""

    epochs: int = _at_least(1, 20)
    """Passes over the train split."""
    loss: Literal["cross-entropy", "mse", "dot-regression"] = "cross-entropy"
    """Cross-entropy, mean squared error to one-hot targets, or (logit of the true class - 1)^2 / 2."""
    label_smoothing: float = _between(0, 1, 0.0, low_allowed=True)
    """cross-entropy: share of the target that is spread over all classes."""
    optimizer: Literal["sgd", "adam", "adamw", "lbfgs", "agd"] = "sgd"
    """Optimiser, of all parameters alike. agd has no learning rate and needs a network without vectors."""
    lr: float = _above(0, 0.05)
    """Learning rate, at the start; the greatest, of one-cycle. Not used by agd."""
    momentum: float = _at_least(0, 0.9)
    """sgd: momentum."""
    weight_decay: float = _at_least(0, 5e-4)
    """Weight decay; of lbfgs it is part of the loss. agd has none."""
    feature_decay: float | None = _at_least(0, None)
    """Part of the loss: this over 2 times the sum of squares of a batch's features, which feature_norm must leave as
    they are. weight_decay is then of the classifier alone, and part of the loss too."""
    published_quirk: bool = False
    """feature_decay: penalise the normalised features, a constant, as the released code of Zhu et al. (2021) does."""
    gain: float = _above(0, 10.0)
    """agd: multiplies every step."""
    lbfgs_history: int = _at_least(1, 10)
    """lbfgs: steps that the curvature is estimated from."""
    lbfgs_iterations: int = _at_least(1, 20)
    """lbfgs: iterations on each batch, at most."""
    schedule: Literal["constant", "cosine", "step", "multistep", "one-cycle"] = "cosine"
    """The learning rate's, which agd has none of: cosine ends at 0; step and multistep multiply it by lr_factor;
    one-cycle rises, then falls to 0."""
    step_epochs: int = _at_least(1, 40)
    """step: after every so many epochs."""
    milestones: list[int] | None = None
    """multistep: after these epochs. By default after one and two thirds of all."""
    lr_factor: float = _above(0, 0.1)
    """step and multistep: what the learning rate is multiplied by."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train; auto takes an accelerator if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_epochs("milestones", self.milestones or [])


@dataclass(frozen=True, kw_only=True)
class Record(_Settings):
    """Record."""

    measure_every: int = _at_least(1, 1)
    """Measure collapse after every so many epochs, and after the last."""
    checkpoint_every: int | None = _at_least(1, None)
    """Keep a checkpoint of every so many epochs, beside the last."""
    checkpoint_epochs: list[int] = field(default_factory=list)
    """Keep checkpoints of these epochs as well."""
    loggers: str = ""
    """Where to log to beside the CSV files: tensorboard, wandb, or both with a comma."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_epochs("checkpoint_epochs", self.checkpoint_epochs)
        unknown = set(self.logger_names) - set(LOGGERS)
        if unknown:
            raise ValueError(f"loggers must be of {', '.join(LOGGERS)}, got {self.loggers!r}")

    @property
    def logger_names(self) -> list[str]:
        """The loggers, one by one."""
        return [name.strip() for name in self.loggers.split(",") if name.strip()]


@dataclass(frozen=True, kw_only=True)
class OneRun(_Settings):
    """What to train."""

    recipe: str | None = None
    """Name of a published experiment, of those that `neuralcollapse recipes` lists; --config and flags go over its
    settings."""
    method: Literal["standard", "fixed", "implicit"] = "implicit"
    """The classifier: learned, a fixed simplex ETF, or the simplex ETF nearest to the class means."""
    seed: int = _between(0, 2**63 - 1, 0, low_allowed=True)
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
class RunConfig(Record, Optimisation, Model, Batches, Data, OneRun):
    """All settings of one training run."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Record, Optimisation, Model, Batches, Data, ManyRuns):
    """All settings of a comparison of methods over seeds."""

    def run(self, method: str, seed: int) -> RunConfig:
        """The settings of one of its runs."""
        own = {setting.name for setting in fields(ManyRuns)}
        shared = {setting.name: getattr(self, setting.name) for setting in fields(self) if setting.name not in own}
        one: dict[str, Any] = {"method": method, "seed": seed}
        return RunConfig(**one, **shared)
