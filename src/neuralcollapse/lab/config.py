"""What an experiment is: typed settings, the same as flags, as a YAML file and in Python.

Which setting belongs to which others is said here, in terms of `conditions`, and nowhere else: one that has no effect
with the others is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from neuralcollapse.lab import conditions as only
from neuralcollapse.lab.running import Ranks, Record, check_epochs
from neuralcollapse.lab.settings import Settings, listed, setting, where

PublishedMethod = Literal["standard", "fixed", "implicit"]
PUBLISHED_METHODS: tuple[PublishedMethod, ...] = get_args(PublishedMethod)
FurtherMethod = Literal["linear", "means", "frame", "attribute-frame", "fixed-frame", "softmax-code", "trust-region"]
Method = Literal[PublishedMethod, FurtherMethod]
METHODS: tuple[Method, ...] = get_args(Method)
Loss = Literal[
    "cross-entropy",
    "mse",
    "dot-regression",
    "dot-regression-published",
    "normface",
    "ntce",
    "nonl",
    "decoupled",
    "two-way",
]
LOSSES: tuple[Loss, ...] = get_args(Loss)
MOST_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class OneRun(Settings):
    """What to train."""

    recipe: str | None = None
    """Name of a published experiment, of those that `neuralcollapse recipes` lists; --config and flags go over its
    settings."""
    method: Method = "implicit"
    """The classifier: learned on the sphere (standard), a fixed simplex ETF, or the simplex ETF nearest to the class
    means (implicit); linear, a plain linear layer; means, the moving class means; frame, the nearest frame of the
    means' own leading directions; attribute-frame, that of what classes share, and fixed-frame, one that stands still;
    softmax-code, a fixed code for any number of classes; trust-region, implicit solved as published."""
    seed: int = setting(0, at_least=0, at_most=MOST_SEED)
    """From which initial weights, batches and augmentation follow."""


@dataclass(frozen=True, kw_only=True)
class LossSettings(Settings):
    """Loss."""

    loss: Loss = "cross-entropy"
    """Of logits: cross-entropy, mse (mean squared error to one-hot targets) or dot-regression-published ((logit of the
    true class - 1)^2 / 2, as in the released code of Markou et al., whatever the feature norm). Of products without a
    bias: dot-regression (pulls each feature to the vector of its class, for classifiers that are not trained). Of
    directions alone: normface (cross-entropy of cosines), ntce and nonl (a class's samples against those of its batch),
    decoupled (cross-entropy, the positive held back by a margin), two-way (half decoupled, half nonl)."""
    label_smoothing: float | None = setting(0.0, belongs_to=where(loss="cross-entropy"), at_least=0, at_most=1)
    """Share of the target that is spread over all classes."""
    temperature: float | None = setting(0.1, belongs_to=where(loss=only.OF_DIRECTIONS), above=0)
    """What cosines are divided by."""
    margin: Literal["inf"] | float | None = setting(
        "inf", belongs_to=where(loss=("nonl", "decoupled", "two-way")), at_least=0
    )
    """How far the positive is held back in the denominator, in units of logits; with inf it is left out."""
    bidirectional: bool | None = setting(False, belongs_to=where(loss="nonl"))
    """Compare each sample with the vectors of the other classes too, in one sum, as in the released code of nonl."""


@dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    """Data."""

    data: str = "digits"
    """`digits` (embedded), mnist-1d or features (drawn as `generator` says), a known data set (mnist, fashion-mnist,
    svhn, emnist-balanced, cifar10, cifar100, stl10, tiny-imagenet, imagenet: fetched from the Hugging Face hub), a
    folder (class sub-folders of images, or Parquet files), or any data set's id on the hub."""
    generator: Literal["published"] | dict[str, Any] | None = setting(belongs_to=only.GENERATED)
    """What mnist-1d (`published`, or all of that generator's settings) or features (num_classes, feature_dim,
    train_per_class, test_per_class, noise, seed) are drawn with. Needed for them."""
    data_config: str | None = setting(belongs_to=only.STORED)
    """Configuration of a data set on the hub that has several."""
    train_split: str | None = setting(belongs_to=only.STORED)
    """Name of the split to train on. By default train, or the only one."""
    test_split: str | None = setting(belongs_to=only.STORED)
    """Name of the split to test on. By default test or validation; where there is none, one image in five is held
    out."""
    label_column: str | None = setting(belongs_to=only.STORED)
    """The column of labels, where a data set has several."""
    table: str | None = setting(belongs_to=only.STORED)
    """CSV, TSV or JSONL file in the data folder whose paths and labels are taken in place of class sub-folders."""
    drop_unlabelled: bool | None = setting(False, belongs_to=only.STORED)
    """Leave out test images labelled -1, and images without a label. By default they are refused."""
    drop_copies: bool | None = setting(False, belongs_to=only.STORED)
    """Leave out test images that are training images too. By default they are refused in a folder."""
    image_size: int | None = setting(belongs_to=only.PICTURES, at_least=1)
    """Scale every image to this height and width. Needed where images differ in size."""
    channels: Literal[1, 3] | None = setting(belongs_to=only.PICTURES)
    """Channels of every image. By default 1 if all images are grey, else 3."""
    digits_per_image: int = setting(1, at_least=1, at_most=20)
    """Put this many images k side by side, drawn at random, whose labels together are one of 10^k classes (of C^k,
    for data with C)."""
    train_samples: int | None = setting(at_least=1)
    """Train on this many images only, of all classes in proportion; with digits_per_image, draw this many."""
    test_samples: int | None = setting(at_least=1)
    """Test on this many images only."""
    samples_per_class: int | None = setting(at_least=1)
    """Train on the first so many images of each class only."""
    imbalance: Literal["none", "exponential", "step"] = "none"
    """Long-tailed training data: the images of a class fall geometrically from the first class to the last, or the
    second half of the classes has fewer."""
    imbalance_factor: float | None = setting(
        0.01, belongs_to=where(imbalance=("exponential", "step")), above=0, at_most=1
    )
    """Images of the smallest class over those of the largest."""
    validation_share: float | None = setting(above=0, at_most=0.9)
    """Hold out this share of the training images, every class in proportion, and measure it as a split of its own:
    what choices are made on. Its labels are the true ones."""
    random_labels: bool = False
    """Permute the labels of the training images at random, once; the run keeps them."""
    label_noise: float = setting(0.0, at_least=0, at_most=1)
    """Share of training images whose label is replaced by one drawn among all classes; the run keeps them."""
    allow_absent_classes: bool = False
    """Go on where classes have no training images: figures are then over the others, and say so."""
    data_seed: int | None = setting(0, belongs_to=only.DRAWN, at_least=0, at_most=MOST_SEED)
    """Drawn from it: images put side by side, the long tail, the validation images, random and noisy labels. The same
    for every seed."""
    memory_budget: float = setting(4.0, at_least=0)
    """GiB. Data that take more when decoded are read by worker processes while training, all others are decoded once
    and live on the training device."""
    workers: int | None = setting(at_least=0)
    """Worker processes, for data over the budget alone. By default one for each CPU core, at most 16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data in only.DRAWN_DATA and self.generator is None:
            raise ValueError(f"generator must say what data {self.data} is drawn with, and it is not given")


@dataclass(frozen=True, kw_only=True)
class BatchSettings(Settings):
    """Batches."""

    batch_size: int = setting(128, at_least=2)
    """Images in a batch."""
    stratified: bool = False
    """Every batch holds the classes in proportion."""
    classes_per_batch: int | None = setting(belongs_to=only.NOT_STRATIFIED, at_least=2)
    """Every batch holds this many classes, drawn at random, and batch_size / classes_per_batch images of each; images
    of small classes come more often. An epoch has as many batches as the train split has full ones."""
    crop_padding: int | None = setting(0, belongs_to=only.PICTURES, at_least=0)
    """Augmentation: pad by this many pixels, then crop at random."""
    crop_size: int | None = setting(belongs_to=only.PICTURES, at_least=1)
    """Height and width of crops, if not the images' own; images that are not augmented are cropped at the centre."""
    flip: bool | None = setting(False, belongs_to=only.PICTURES)
    """Augmentation: mirror at random."""
    rotation: float | None = setting(0.0, belongs_to=only.PICTURES, at_least=0)
    """Augmentation: rotate at random by up to this many degrees, either way."""
    pixel_mean: list[float] | None = None
    """Subtracted from each channel of pixels in [0, 1]; one value, or one per channel. By default the training images'
    own mean."""
    pixel_std: list[float] | None = None
    """What each channel is divided by then. By default the training images' own standard deviation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes_per_batch is not None and self.batch_size % self.classes_per_batch:
            raise ValueError(
                f"batch_size must be a multiple of classes_per_batch, which is {self.classes_per_batch}, "
                f"got {self.batch_size}"
            )


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """Model."""

    backbone: str = "convnet"
    """What computes the features: convnet, mlp, resnet18, resnet34, resnet50, resnet101, resnet152, resnext50-32x4d,
    resnext101-32x8d, wide-resnet50-2, wide-resnet101-2, vgg13, vit-tiny, vit-small, or the dotted path of your own
    class, such as package.module.Class, which gives features (N, feature_dim)."""
    backbone_options: dict[str, Any] | None = setting(lambda _: {}, belongs_to=only.OWN_CLASS)
    """Keyword arguments of your own class."""
    width: int | None = setting(only.default_width, belongs_to=only.BUILT_IN, at_least=1)
    """Channels of the first stage, neurons of a layer, or dimension of a token. By default 32 (convnet), 512 (mlp), 64
    (resnets, vgg13), 192 (vit-tiny), 384 (vit-small)."""
    depth: int | None = setting(only.default_depth, belongs_to=where(backbone=("mlp", *only.VITS)), at_least=1)
    """Layers. By default 3 (mlp), 12 (vit-tiny, vit-small)."""
    patch_size: int | None = setting(belongs_to=where(backbone=only.VITS), at_least=1)
    """Height and width of a vision transformer's patches, which must divide those of the images. By default 16 for
    images of 128 pixels or more, 4 for 16 or more, else 2."""
    feature_dim: int | None = setting(belongs_to=only.BUILT_IN, at_least=1)
    """Dimension of the features: output channels of the last block or convolution, or neurons of the last layer, which
    a vision transformer has for this alone. By default the backbone's own."""
    stem: Literal["7x7", "3x3"] | None = setting("7x7", belongs_to=where(backbone=only.RESNETS))
    """First layer: 7x7 of stride 2 and max-pooling, or 3x3 of stride 1."""
    batch_norm_affine: bool | None = setting(True, belongs_to=only.BATCH_NORM)
    """Batch norm trains a scale and a shift."""
    feature_norm: Literal["auto", "none"] | float | None = setting("auto", belongs_to=only.NORMALISING, above=0)
    """Norm that features are given before the classifier; `auto` follows from the number of classes."""
    unit_weight: bool | None = setting(True, belongs_to=where(method="standard"))
    """Keep the rows of the classifier at unit norm."""
    orientation: Literal["random", "canonical"] | None = setting(
        "random", belongs_to=where(method=("fixed", "fixed-frame"))
    )
    """Orientation of a fixed classifier: random, the same for every seed; or canonical, one axis per class, as in the
    released codes, which often does not train behind a ReLU."""
    unit_start: bool | None = setting(True, belongs_to=only.UNIT_ROWS)
    """The rows begin at unit norm; else they are brought to it by the first step."""
    classifier_bias: Literal["learned", "centring", "none"] | None = setting(
        only.default_bias, belongs_to=where(loss=only.OF_LOGITS)
    )
    """The classifier's bias: learned (standard, linear and those that stand still), minus weight times mean feature
    (not standard and linear), or none. By default learned for standard and linear and centring for the others."""
    class_attributes: str | None = setting(belongs_to=only.ATTRIBUTES)
    """What classes share: digits, those of their number; or a CSV file whose first line names attributes, and each
    further one has the values of a class, in the order of the classes. Needed for these methods."""
    attribute_weight: Literal["auto"] | float | None = setting("auto", belongs_to=only.ATTRIBUTES, above=0, at_most=1)
    """How much each attribute draws together the classes that share it. auto: 0.6 over the number of attributes, or 1
    over it where feature_dim is below K - 1, too small for the simplex ETF that is the rest."""
    proximal_weight: float | None = setting(0.5, belongs_to=where(method=only.NEAREST), at_least=0)
    """How strongly the classifier stays with the last one."""
    class_weights: Literal["none", "inverse"] | None = setting("none", belongs_to=where(method=only.WEIGHING))
    """Weight of each class in the distance of the classifier from the class means: none, all the same; inverse, one
    over its number of training images."""
    class_means: Literal["previous", "current", "differentiable"] | None = setting(
        "previous", belongs_to=where(method="means")
    )
    """Which means a training batch is decided by: those of before it, those with it, or these with their gradient."""
    means_momentum: Literal["cumulative", "published"] | float | None = setting(
        0.1, belongs_to=only.MOVING_MEANS, above=0, at_most=1
    )
    """Weight of a new batch in the moving means."""


@dataclass(frozen=True, kw_only=True)
class Optimisation(Settings):
    """Optimisation."""

    epochs: int = setting(20, at_least=1)
    """Passes over the train split."""
    optimizer: Literal["sgd", "adam", "adamw", "lbfgs", "agd"] = "sgd"
    """Optimiser, of all parameters alike. agd has no learning rate and needs a network without vectors."""
    initialisation: Literal["he", "torch"] | None = setting("he", belongs_to=only.FIRST_WEIGHTS)
    """First weights of convolutions: normal by the fan-out (He et al., ICCV 2015), or torch's own. agd has its own."""
    lr: float | None = setting(0.05, belongs_to=only.WITH_RATE, above=0)
    """Learning rate, at the start; the greatest, of one-cycle."""
    feature_decay: float | None = setting(at_least=0)
    """Part of the loss: this over 2 times the sum of squares of a batch's features, which feature_norm must leave as
    they are. weight_decay is then of the classifier alone, and part of the loss too."""
    published_quirk: bool | None = setting(False, belongs_to=only.FEATURE_DECAY)
    """Penalise the normalised features, a constant, as the released code of Zhu et al. (2021) does."""
    weight_decay: float | None = setting(5e-4, belongs_to=only.DECAYING, at_least=0)
    """Weight decay; of lbfgs it is part of the loss."""
    gain: float | None = setting(10.0, belongs_to=where(optimizer="agd"), above=0)
    """Multiplies every step."""
    lbfgs_history: int | None = setting(10, belongs_to=where(optimizer="lbfgs"), at_least=1)
    """Steps that the curvature is estimated from."""
    lbfgs_iterations: int | None = setting(20, belongs_to=where(optimizer="lbfgs"), at_least=1)
    """Iterations on each batch, at most."""
    schedule: Literal["constant", "cosine", "step", "multistep", "one-cycle"] | None = setting(
        "cosine", belongs_to=only.WITH_RATE
    )
    """Schedule of the learning rate: cosine ends at 0; step and multistep multiply it by lr_factor; one-cycle rises,
    then falls."""
    warmup_epochs: int | None = setting(0, belongs_to=where(schedule=only.NOT_ONE_CYCLE), at_least=0)
    """Epochs at the start in which the learning rate rises linearly, batch by batch, to lr. The cosine falls in the
    epochs after them; step_epochs and milestones count them in."""
    three_phase: bool | None = setting(False, belongs_to=where(schedule="one-cycle"))
    """One-cycle falls as fast as it rose, then to 0 in a phase of its own."""
    div_factor: float | None = setting(25.0, belongs_to=where(schedule="one-cycle"), at_least=1)
    """One-cycle begins at lr over this."""
    final_div_factor: float | None = setting(1e4, belongs_to=where(schedule="one-cycle"), at_least=1)
    """One-cycle ends at its first learning rate over this."""
    cycle_momentum: bool | None = setting(
        True, belongs_to=where(schedule="one-cycle", optimizer=("sgd", "adam", "adamw"))
    )
    """One-cycle moves the momentum (of adam and adamw beta1) from 0.95 to 0.85 and back, against the learning rate."""
    momentum: float | None = setting(0.9, belongs_to=only.STEADY_MOMENTUM, at_least=0)
    """Momentum."""
    step_epochs: int | None = setting(40, belongs_to=where(schedule="step"), at_least=1)
    """Multiply after every so many epochs."""
    milestones: list[int] | None = setting(only.thirds, belongs_to=where(schedule="multistep"))
    """Multiply after these epochs. By default after one and two thirds of all."""
    lr_factor: float | None = setting(0.1, belongs_to=where(schedule=("step", "multistep")), above=0)
    """What the learning rate is multiplied by."""
    gradient_clip: float | None = setting(belongs_to=where(optimizer=("sgd", "adam", "adamw")), above=0)
    """Scale the gradient of all parameters down to this norm where it is longer."""
    weight_average: float | None = setting(above=0, at_most=1)
    """Measure an average of the weights in place of the weights of the moment: mostly of this share of the steps so
    far. 1 is the mean of all steps; after step t, step s counts as s^(1/share - 1)."""
    accumulate: int | None = setting(1, belongs_to=only.ACCUMULATING, at_least=1)
    """Batches whose gradients one step takes together, each sample with the same weight. The classifier and its class
    means still move with every batch."""
    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32"
    """Of the network's products in training, by autocast; weights, class means, classifier, losses and all that is
    measured stay in 32 bits. 16-mixed, with scaled losses, needs cuda."""
    compile: bool = False
    """Train the backbone as torch.compile makes it: a wait at the start, then faster steps."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train; auto takes an accelerator if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_epochs("milestones", self.milestones or [])


@dataclass(frozen=True, kw_only=True)
class RunConfig(Record, Ranks, Optimisation, ModelSettings, BatchSettings, DataSettings, LossSettings, OneRun):
    """All settings of one training run.

    Raises:
        ValueError: A setting is out of range, has no effect, or does not go with another.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        possible = only.BIASES[self.method]
        if self.classifier_bias is not None and self.classifier_bias not in possible:
            raise ValueError(
                f"classifier_bias must be {listed(possible, 'or')} for method {self.method}, "
                f"got {self.classifier_bias!r}"
            )
        if self.method in only.WITH_ATTRIBUTES and self.class_attributes is None:
            raise ValueError(f"class_attributes must say what classes share for method {self.method}, and is not given")
        if self.warmup_epochs and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs must be less than epochs, which is {self.epochs}, got {self.warmup_epochs}"
            )
        if self.feature_decay and not self.published_quirk and self.feature_norm not in ("none", None):
            raise ValueError("feature_decay needs feature_norm none: of normalised features it is a constant")
        if self.optimizer == "lbfgs" and self.method in only.MOVING:
            raise ValueError(
                f"optimizer lbfgs cannot train the method {self.method}, whose weight would move under its line "
                "search: take method fixed or standard, or another optimiser"
            )
        if self.batch_size < 2 * self.ranks:
            raise ValueError(
                f"batch_size must be at least {2 * self.ranks}, two for each of {self.ranks} ranks, "
                f"got {self.batch_size}"
            )
        if self.optimizer == "lbfgs" and self.ranks > 1:
            raise ValueError("optimizer lbfgs needs one rank: its line search compares losses of whole batches")
        if self.optimizer == "lbfgs" and self.precision == "16-mixed":
            raise ValueError("optimizer lbfgs needs precision 32 or bf16-mixed: its line search cannot scale the loss")
        if self.optimizer == "lbfgs" and self.unit_weight:
            raise ValueError("optimizer lbfgs needs unit_weight false: it cannot keep the rows at unit norm")

    def is_measured(self, epoch: int) -> bool:
        """Return whether collapse is measured after an epoch, counted from 1.

        Examples:
            >>> [epoch for epoch in range(1, 13) if RunConfig(epochs=12, measure_every=5).is_measured(epoch)]
            [1, 5, 10, 12]
        """
        is_last = epoch == self.epochs and self.measure_last is not False
        return is_last or _is_due(epoch, self.measure_every, self.measure_from)

    def is_kept(self, epoch: int) -> bool:
        """Return whether the checkpoint of an epoch, counted from 1, is kept.

        Examples:
            >>> config = RunConfig(checkpoint_every=5, checkpoint_epochs=[7])
            >>> [epoch for epoch in range(1, 13) if config.is_kept(epoch)]
            [1, 5, 7, 10]
        """
        if epoch in self.checkpoint_epochs:
            return True
        return self.checkpoint_every is not None and _is_due(epoch, self.checkpoint_every, self.checkpoint_from)


def _is_due(epoch: int, every: int, first: int | None) -> bool:
    """Return whether an epoch is the first, or ``first`` plus a multiple of ``every``."""
    first = every if first is None else first
    return epoch == 1 or (epoch >= first and (epoch - first) % every == 0)
