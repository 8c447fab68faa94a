"""Settings of a training run, which have the same names as flags, in YAML files and in Python.

`RunConfig` combines all sections. A condition in the annotation of a setting states with which other settings it has an
effect; a setting that is given but has no effect raises an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from neuralcollapse.lab.settings import Condition, Default, Options, Settings, listed, where

# --- methods ----------------------------------------------------------------------------------------------------------

PublishedMethod = Literal["standard", "fixed", "implicit"]
PUBLISHED_METHODS: tuple[PublishedMethod, ...] = get_args(PublishedMethod)
FurtherMethod = Literal["linear", "means", "frame", "attribute-frame", "fixed-frame", "softmax-code", "trust-region"]
Method = Literal[PublishedMethod, FurtherMethod]
Bias = Literal["learned", "centring", "none"]


@dataclass(frozen=True)
class Classifier:
    """Classifier of a training method.

    Attributes:
        text: Description in one line.
        head: Name of a class of `neuralcollapse.heads`, or of a function of `models.build` that returns a head.
        options: For each argument of the head, the setting with its value, or the name of a value that `models.build`
            computes.
        biases: Possible values of ``classifier_bias``, beginning with the default.
        follows_means: Whether the weight changes with the class means of every batch.
    """

    text: str
    head: str
    options: Mapping[str, str] = field(default_factory=dict)
    biases: tuple[Bias, ...] = ("centring", "learned", "none")
    follows_means: bool = False


_SCALED = {"feature_norm": "feature_norm"}
_CENTRED = _SCALED | {"momentum": "means_momentum"}
_NEAREST = _CENTRED | {"proximal_weight": "proximal_weight"}
_WEIGHTED = _NEAREST | {"class_weights": "class_weights"}
_TRAINED: Any = {"biases": ("learned", "none")}
_MOVING: Any = {"biases": ("centring", "none"), "follows_means": True}
METHODS: dict[Method, Classifier] = {
    "standard": Classifier(
        "learned, with rows of unit norm", "LearnedClassifier", _SCALED | {"unit_weight": "unit_weight"}, **_TRAINED
    ),
    "fixed": Classifier("a fixed simplex ETF", "FixedETFClassifier", _CENTRED | {"orientation": "orientation"}),
    "implicit": Classifier("the simplex ETF nearest to the class means", "NearestETFClassifier", _WEIGHTED, **_MOVING),
    "linear": Classifier("a plain linear layer", "LearnedClassifier", **_TRAINED),
    "means": Classifier(
        "the moving class means", "ClassMeanClassifier", _CENTRED | {"means": "class_means"}, **_MOVING
    ),
    "frame": Classifier(
        "the nearest frame of the leading directions of the class means, or of a code",
        "NearestFrameClassifier",
        _WEIGHTED | {"frame": "code"},
        **_MOVING,
    ),
    "attribute-frame": Classifier(
        "the nearest frame of the attributes that classes share",
        "NearestFrameClassifier",
        _WEIGHTED | {"frame": "class_attributes"},
        **_MOVING,
    ),
    "fixed-frame": Classifier(
        "a fixed frame of the attributes that classes share, or of another code",
        "FixedFrameClassifier",
        _CENTRED | {"orientation": "orientation", "code": "code"},
    ),
    "softmax-code": Classifier("a fixed code for any number of classes", "softmax_code_classifier", _CENTRED),
    "trust-region": Classifier(
        "implicit with the published solver", "NearestETFClassifier", _NEAREST | {"solver": "trust_region"}, **_MOVING
    ),
}


def _of_methods(setting: str) -> Condition:
    """Return the condition that the method has a setting."""
    names = [name for name, method in METHODS.items() if setting in method.options.values()]
    others = [name for name in METHODS if name not in names]
    text = f"methods other than {listed(others)}" if len(others) == 1 else f"method {listed(names, 'or')}"
    return Condition(text, ("method",), lambda values: values["method"] in names)


# --- types ------------------------------------------------------------------------------------------------------------

AtLeast1 = Annotated[int, Field(ge=1)]
AtLeast2 = Annotated[int, Field(ge=2)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
HeldOut = Annotated[float, Field(gt=0, le=0.9)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
# A class has the same form, whether it is written as a number or as text.
ClassName = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
# Infinity has the same form, whether it is written as inf, .inf or math.inf.
Margin = Annotated[
    Literal["inf"] | NotNegative | None,
    BeforeValidator(lambda value: "inf" if isinstance(value, float) and value == float("inf") else value),
]
Epochs = AtLeast1 | list[AtLeast1 | Literal["..", "last"]]

Loss = Literal[
    "cross-entropy",
    "mse",
    "dot-regression",
    "dot-regression-published",
    "normface",
    "ntce",
    "nonl",
    "bidirectional-nonl",
    "decoupled",
    "two-way",
]
# The dotted path of a user-defined class.
OwnClass = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")]
Optimizer = Literal["sgd", "adam", "adamw", "lbfgs", "agd"]

# --- conditions and defaults ------------------------------------------------------------------------------------------

OF_LOGITS = ("cross-entropy", "mse", "dot-regression-published")
OF_CLASSES = ("cross-entropy", "normface", "bidirectional-nonl", "decoupled", "two-way")
OF_SAMPLES = ("ntce", "nonl", "dot-regression")
OF_DIRECTIONS = ("normface", "ntce", "nonl", "bidirectional-nonl", "decoupled", "two-way")
WITH_MARGIN = ("nonl", "bidirectional-nonl", "decoupled", "two-way")
RESNETS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50-32x4d", "resnext101-32x8d", "wide-resnet50-2", "wide-resnet101-2"),
)
VITS = ("vit-tiny", "vit-small")
FAST_CONVNET = "fast-convnet"
DRAWN_DATA = ("mnist-1d", "features")
_FIRST_ORDER = ("sgd", "adam", "adamw")
_WITH_RATE = where(optimizer=(*_FIRST_ORDER, "lbfgs"))

_WITH_OPTIONS = Condition("data other than digits", ("data",), lambda values: values["data"] != "digits")
_PICTURES = Condition(
    f"data other than {listed(DRAWN_DATA)}", ("data",), lambda values: values["data"] not in DRAWN_DATA
)
_DRAWN = Condition(
    "a random choice: digits_per_image above 1, imbalance, label_noise or validation_share",
    ("digits_per_image", "imbalance", "label_noise", "validation_share"),
    lambda values: (
        values["digits_per_image"] > 1
        or values["imbalance"] is not None
        or values["label_noise"] != 0
        or values["validation_share"] is not None
    ),
)
_WITH_LOSS_OPTIONS = Condition(
    f"loss {listed((*OF_CLASSES, *OF_SAMPLES), 'or')}, or a loss by dotted path",
    ("loss",),
    lambda values: values["loss"] in OF_CLASSES + OF_SAMPLES or "." in values["loss"],
)
_ONE_IMAGE = Condition("digits_per_image 1", ("digits_per_image",), lambda values: values["digits_per_image"] == 1)
_BUILT_IN = Condition("the built-in backbones", ("backbone",), lambda values: "." not in values["backbone"])
_OF_ONE_WIDTH = Condition(
    f"the built-in backbones other than {FAST_CONVNET}",
    ("backbone",),
    lambda values: "." not in values["backbone"] and values["backbone"] != FAST_CONVNET,
)
_BATCH_NORM = Condition(
    f"the built-in backbones with batch norm, other than {FAST_CONVNET}, whose batch norm trains only a shift",
    ("backbone",),
    lambda values: "." not in values["backbone"] and values["backbone"] not in (FAST_CONVNET, *VITS),
)
_MOVING_MEANS = Condition(
    f"method {listed((name for name, method in METHODS.items() if method.follows_means), 'or')}, or to classifier_bias "
    "centring",
    ("method", "classifier_bias"),
    lambda values: METHODS[values["method"]].follows_means or values["classifier_bias"] == "centring",
)
_WITH_ATTRIBUTES = Condition(
    "method attribute-frame, or fixed-frame with code attributes",
    ("method", "code"),
    lambda values: values["method"] == "attribute-frame" or values["code"] == "attributes",
)
_STEADY_MOMENTUM = Condition(
    "optimizer sgd without cycle_momentum of one-cycle",
    ("optimizer", "schedule_options"),
    lambda values: values["optimizer"] == "sgd" and not (values["schedule_options"] or {}).get("cycle_momentum"),
)
_DECAYING = Condition(
    "an optimizer other than agd; with feature_decay, to a trained classifier",
    ("optimizer", "feature_decay", "method", "classifier_bias"),
    lambda values: (
        values["optimizer"] != "agd"
        if values["feature_decay"] is None
        else "learned" in (METHODS[values["method"]].biases[0], values["classifier_bias"])
    ),
)
_SEVERAL_RANKS = Condition(
    "several ranks", ("devices", "num_nodes"), lambda values: values["devices"] * values["num_nodes"] > 1
)
_BIAS = Default(lambda values: METHODS[values["method"]].biases[0])
_WIDTH = Default(
    lambda values: {"convnet": 32, "mlp": 512, "vit-tiny": 192, "vit-small": 384}.get(values["backbone"], 64)
)
_DEPTH = Default(lambda values: 12 if values["backbone"] in VITS else 3)
_THIRDS = Default(lambda values: sorted({values["epochs"] // 3, 2 * values["epochs"] // 3} - {0}))


# --- sections ---------------------------------------------------------------------------------------------------------


class OneRun(Settings):
    """Run."""

    recipe: str | None = None
    """Name of a published experiment from the list of `neuralcollapse recipes`; --config and flags override its
    settings."""
    method: Annotated[
        Method,
        Field(description=f"Classifier: {'; '.join(f'{name}, {method.text}' for name, method in METHODS.items())}."),
    ] = "implicit"
    seed: Seed = 0
    """Seed of the initial weights, batches and augmentation."""


class WeightedLoss(Settings):
    """Options of ntce and nonl."""

    class_weights: Literal["none", "inverse"] = "none"
    """Weight of each sample: none, equal weights; inverse, one over the number of training images of its class."""


class AdjustedLoss(WeightedLoss):
    """Options of losses that compare classes."""

    prior: NotNegative = 0.0
    """Logit adjustment in training: this factor times the logarithm of the share of training images of each class is
    added to the logits. 1 is the balanced softmax. A class without images counts as having one image."""


class DotRegressionLoss(WeightedLoss):
    """Options of dot-regression."""

    class_lengths: Literal["given", "inverse-root"] = "given"
    """Lengths of the class vectors: by default those of the classifier; or inverse-root, the square root of the mean
    number of training images per class over that of the class (Yang et al., 2022, with the numbers in each batch)."""


class Regularisation(Settings):
    """Options of regulariser."""

    loss: Literal["variability", "koleo", "supcon", "center"] = "variability"
    """variability, the logarithm of the ratio of within-class to between-class variability; koleo, which spreads
    features; supcon, the supervised contrastive loss; center, half the squared distance to the row of the classifier,
    which is scaled to feature_norm if it is set."""
    weight: float | None = None
    """Factor of the loss, required. For variability, positive values increase collapse and negative values decrease
    it."""
    layer: str | None = None
    """Module whose output is regularised, averaged over positions, as for `measure --layers`. By default the features
    that the classifier multiplies."""
    detach_between: Annotated[bool | None, where(loss="variability")] = False
    """Treat between-class variability as constant in the gradient."""

    def check(self) -> None:
        """Check settings together."""
        super().check()
        if not self.weight or not math.isfinite(self.weight):
            raise ValueError(f"weight must be finite and other than 0, got {self.weight}")
        if self.loss == "center" and self.layer is not None:
            raise ValueError(f"layer belongs to a loss other than center, got {self.layer!r}")


class LossSettings(Settings):
    """Loss."""

    loss: Loss | OwnClass = "cross-entropy"
    """Losses of logits: cross-entropy, mse (mean squared error to one-hot targets) or dot-regression-published ((logit
    of the true class - 1)^2 / 2, as in the released code of Markou et al., for any feature norm). Losses of products
    without a bias: dot-regression (pulls each feature towards the vector of its class, for classifiers that are not
    trained). Losses of directions only: normface (cross-entropy of cosines), ntce and nonl (the samples of a class
    against other samples of the batch), bidirectional-nonl (nonl that also compares each sample with the vectors of the
    other classes, in one sum, as in the released code), decoupled (cross-entropy with a margin on the positive logit),
    two-way (half decoupled, half nonl). Or the dotted path of a user-defined class or of a class of another library,
    such as pytorch_metric_learning.losses.ArcFaceLoss, which is called with features (N, d) and classes (N,). The
    classifier replaces its class weights, a parameter (K, d) or (d, K); if it has none, the method must follow the
    class means."""
    label_smoothing: Annotated[Share | None, where(loss="cross-entropy")] = 0.0
    """Share of the target that is distributed over all classes."""
    temperature: Annotated[Positive | None, where(loss=OF_DIRECTIONS)] = 0.1
    """Divisor of the cosines."""
    margin: Annotated[Margin, where(loss=WITH_MARGIN)] = "inf"
    """Margin on the positive logit in the denominator, in units of logits; inf leaves the positive logit out."""
    loss_options: Annotated[
        dict[str, Any] | None,
        _WITH_LOSS_OPTIONS,
        Options(
            lambda values: (
                None
                if "." in values["loss"]
                else AdjustedLoss
                if values["loss"] in OF_CLASSES
                else DotRegressionLoss
                if values["loss"] == "dot-regression"
                else WeightedLoss
            ),
            (WeightedLoss, AdjustedLoss, DotRegressionLoss),
        ),
    ] = Field(default_factory=dict)
    """Keyword arguments of a class by dotted path; num_classes and embedding_size are passed if the class accepts them.
    For the built-in losses, options for long tails:"""
    regulariser: Annotated[dict[str, Any] | None, Options(lambda _: Regularisation, (Regularisation,))] = None
    """Additional loss of features, for more or less collapse:"""


class StoredData(Settings):
    """Options of data from a folder or the hub."""

    config: str | None = None
    """Configuration of a data set on the hub, if it has several."""
    train_split: str | None = None
    """Split to train on. By default train, or the only split."""
    test_split: str | None = None
    """Split to test on. By default test or validation; if neither exists, a fixed fifth of the images is held out."""
    label_column: str | None = None
    """Column of the labels, if a data set has several."""
    table: str | None = None
    """CSV, TSV or JSONL file in the data folder with paths and labels, used instead of class folders."""


class Augmentation(Settings):
    """Augmentation of training images."""

    crop_padding: Annotated[int, Field(ge=0)] = 0
    """Pad by this number of pixels, then crop at random."""
    padding: Literal["reflect"] | None = None
    """reflect: pad with the image mirrored at its border. By default, pad with 0."""
    flip: Literal["alternating"] | bool = False
    """Mirror images: true, each image at random in every epoch; alternating, a random half of the images in the first
    epoch, the other half in the second, and so on alternately (Jordan, 2024)."""
    rotation: NotNegative = 0.0
    """Rotate at random by up to this number of degrees in either direction."""
    cutout: AtLeast1 | None = None
    """Height and width of a square, at a random position inside the image, whose pixels are replaced by the mean."""

    def check(self) -> None:
        """Check settings together."""
        super().check()
        if self.padding and not self.crop_padding:
            raise ValueError("padding belongs to crop_padding above 0; here crop_padding is 0")


class DataSettings(Settings):
    """Data."""

    data: str = "digits"
    """`digits` (embedded), mnist-1d or features (generated according to `data_options`), a known data set (mnist,
    fashion-mnist, svhn, emnist-balanced, cifar10, cifar100, stl10, tiny-imagenet, imagenet: downloaded from the Hugging
    Face hub), a folder (class folders of images, or Parquet files), or the id of any data set on the hub."""
    data_options: Annotated[
        Literal["published"] | dict[str, Any] | None,
        _WITH_OPTIONS,
        Options(lambda values: None if values["data"] in DRAWN_DATA else StoredData, (StoredData,)),
    ] = None
    """Required for mnist-1d: `published` or all settings of that generator; required for features: num_classes,
    feature_dim, train_per_class, test_per_class, noise, seed. For data from a folder or the hub:"""
    leave_out: list[Literal["unlabelled", "copies", "absent-classes"]] = Field(default_factory=list)
    """Leave out images that are an error by default: test images labelled -1 and images without a label (unlabelled),
    test images that are also training images (copies), classes without training images (absent-classes: metrics are
    computed over the other classes, with a note)."""
    hold_out_classes: Annotated[list[ClassName] | None, _ONE_IMAGE] = None
    """Leave the images of these classes, given by name or by number from 0, out of all splits, and train on the other
    classes. `neuralcollapse detect` uses the test images of these classes as unknown inputs."""
    image_size: Annotated[AtLeast1 | None, _PICTURES] = None
    """Scale every image to this height and width. Required if images differ in size."""
    channels: Annotated[Literal[1, 3] | None, _PICTURES] = None
    """Number of channels of every image. By default 1 if all images are grey, else 3."""
    digits_per_image: Annotated[int, Field(ge=1, le=20)] = 1
    """Number k of randomly drawn images that are placed side by side; their labels together give one of 10^k classes
    (C^k for data with C classes)."""
    train_samples: AtLeast1 | None = None
    """Number of training images, from all classes in proportion; with digits_per_image, number of images to generate.
    By default all."""
    test_samples: AtLeast1 | None = None
    """Number of test images. By default all."""
    samples_per_class: AtLeast1 | None = None
    """Number of training images per class, taken from the start of the data. By default all."""
    imbalance: dict[Literal["exponential", "step"], PositiveShare] | None = None
    """Long-tailed training data: {exponential: FACTOR}, the number of images decreases geometrically from the first
    class to the last; {step: FACTOR}, the second half of the classes has fewer images. FACTOR is the number of images
    of the smallest class over that of the largest class."""
    validation_share: HeldOut | None = None
    """Share of the training images, from every class in proportion, that is held out and measured as a third split, for
    model selection. Its labels are the true labels."""
    label_noise: Literal["permuted"] | Share = 0.0
    """Share of training images whose label is replaced by a random class; permuted permutes the labels of all training
    images. The labels do not change during the run."""
    data_seed: Annotated[Seed | None, _DRAWN] = 0
    """Seed of side-by-side images, the long tail, the validation images and noisy labels, independent of `seed`."""
    workers: Literal["auto", "in-memory"] | Annotated[int, Field(ge=0)] = "auto"
    """Number of worker processes that decode images during training; 0 decodes in the training process. in-memory
    decodes all images once and stores them on the training device. auto is in-memory up to 4 GiB, else one worker per
    CPU core, at most 16."""

    @property
    def stored(self) -> StoredData:
        """Options of data from a folder or the hub."""
        return StoredData.model_construct(**self.data_options if isinstance(self.data_options, dict) else {})

    def check(self) -> None:
        """Check settings together."""
        super().check()
        if self.data in DRAWN_DATA and self.data_options is None:
            raise ValueError(f"data_options must define how data {self.data} is generated, but is not given")
        if self.data_options == "published" and self.data != "mnist-1d":
            raise ValueError(f"data_options must be a mapping for data {self.data}, got 'published'")
        if len(self.imbalance or "1") != 1:
            raise ValueError(f"imbalance must have one shape, exponential or step, got {self.imbalance}")
        ignored = [flaw for flaw in self.leave_out if flaw != "absent-classes"]
        if ignored and self.data in ("digits", *DRAWN_DATA):
            raise ValueError(
                f"leave_out {ignored[0]} belongs to data from a folder or the hub; here data is {self.data}"
            )
        if len(set(self.leave_out)) < len(self.leave_out):
            raise ValueError(f"leave_out must be distinct, got {self.leave_out}")
        if self.hold_out_classes is not None and not self.hold_out_classes:
            raise ValueError("hold_out_classes must name at least one class, got []")


class BatchSettings(Settings):
    """Batches."""

    batch_size: AtLeast2 = 128
    """Images per batch."""
    sampling: Literal["random", "stratified"] | AtLeast2 = "random"
    """Sampling of batches: random; stratified, every batch contains the classes in proportion; or a number, every batch
    contains this number of random classes with batch_size / sampling images each, so that images of small classes occur
    more often. The number of batches per epoch is that of full batches in the train split."""
    augmentation: Annotated[dict[str, Any] | None, _PICTURES, Options(lambda _: Augmentation, (Augmentation,))] = Field(
        default_factory=dict
    )
    """Augmentation of training images:"""
    crop_size: Annotated[AtLeast1 | None, _PICTURES] = None
    """Height and width of crops. By default those of the images. Images without augmentation are cropped at the
    centre."""
    pixel_mean: list[float] | None = None
    """Value subtracted from each channel of pixels in [0, 1]; one value, or one per channel. By default the mean of the
    training images."""
    pixel_std: list[float] | None = None
    """Divisor of each channel after the subtraction. By default the standard deviation of the training images."""

    @property
    def augment(self) -> Augmentation:
        """Augmentation of training images."""
        return Augmentation.model_construct(**self.augmentation or {})

    @property
    def classes_per_batch(self) -> int | None:
        """Number of classes in every batch, if `sampling` is a number."""
        return self.sampling if isinstance(self.sampling, int) else None

    def check(self) -> None:
        """Check settings together."""
        super().check()
        if self.classes_per_batch is not None and self.batch_size % self.classes_per_batch:
            raise ValueError(
                f"batch_size must be a multiple of the classes per batch (sampling), which is {self.sampling}, "
                f"got {self.batch_size}"
            )


class BackboneOptions(Settings):
    """Options of the built-in backbones."""

    batch_norm_affine: Annotated[bool | None, _BATCH_NORM] = True
    """Train a scale and a shift in batch norm."""
    initialisation: Annotated[
        Literal["he", "torch"] | None, where(backbone=(*RESNETS, "vgg13"), optimizer=(*_FIRST_ORDER, "lbfgs"))
    ] = "he"
    """Initial weights of convolutions: he, normal by the fan-out (He et al., ICCV 2015), or the default of torch. agd
    uses a separate initialisation."""
    patch_size: Annotated[AtLeast1 | None, where(backbone=VITS)] = None
    """Height and width of patches, which must divide those of the images. By default 16 for images of 128 pixels or
    more, 4 for 16 or more, else 2."""
    widths: Annotated[
        Annotated[list[AtLeast1], Field(min_length=3, max_length=3)] | None, where(backbone=FAST_CONVNET)
    ] = Field(default_factory=lambda: [64, 256, 256])
    """Channels of each of the three stages."""
    convolutions: Annotated[Literal[2, 3] | None, where(backbone=FAST_CONVNET)] = 2
    """Convolutions of each stage; with 3, the output of the first is added to that of the last."""


class ModelSettings(Settings):
    """Model."""

    backbone: str = "convnet"
    """Network that computes the features: convnet, mlp, resnet18, resnet34, resnet50, resnet101, resnet152,
    resnext50-32x4d, resnext101-32x8d, wide-resnet50-2, wide-resnet101-2, vgg13, fast-convnet, vit-tiny, vit-small, or
    the dotted path of a user-defined class, such as package.module.Class, which returns features (N, feature_dim)."""
    backbone_options: Annotated[
        dict[str, Any] | None,
        Options(lambda values: None if "." in values["backbone"] else BackboneOptions, (BackboneOptions,)),
    ] = Field(default_factory=dict)
    """Keyword arguments of a user-defined class. For built-in backbones:"""
    width: Annotated[AtLeast1 | None, _OF_ONE_WIDTH, _WIDTH] = None
    """Channels of the first stage, neurons of a layer, or dimension of a token. By default 32 (convnet), 512 (mlp), 64
    (resnets, vgg13), 192 (vit-tiny), 384 (vit-small)."""
    depth: Annotated[AtLeast1 | None, where(backbone=("mlp", *VITS)), _DEPTH] = None
    """Layers. By default 3 (mlp), 12 (vit-tiny, vit-small)."""
    feature_dim: Annotated[AtLeast1 | None, _BUILT_IN] = None
    """Dimension of the features: output channels of the last block or convolution, or neurons of the last layer, which
    a vision transformer has only with this setting. By default that of the backbone."""
    stem: Annotated[Literal["7x7", "3x3"] | None, where(backbone=RESNETS)] = "7x7"
    """First layer: 7x7 of stride 2 and max-pooling, or 3x3 of stride 1."""
    feature_norm: Annotated[Literal["auto", "none"] | Positive | None, _of_methods("feature_norm")] = "auto"
    """Norm to which features are scaled before the classifier; auto computes it from the number of classes."""
    unit_weight: Annotated[Literal["published"] | bool | None, _of_methods("unit_weight")] = True
    """Keep the rows of the classifier at unit norm: true, from the start; published, from the first step on, as in the
    released code of Markou et al."""
    orientation: Annotated[Literal["random", "canonical"] | None, _of_methods("orientation")] = "random"
    """Orientation of a fixed classifier: random, the same for every seed; or canonical, one axis per class, as in the
    released code, which often does not train after a ReLU."""
    classifier_bias: Annotated[Bias | None, where(loss=OF_LOGITS), _BIAS] = None
    """Bias of the classifier: learned (for standard, linear and fixed classifiers); centring, minus the weight times
    the mean feature (for all but standard and linear); or none. By default learned for standard and linear, else
    centring."""
    code: Annotated[
        Literal["means", "attributes", "seli"] | None,
        _of_methods("code"),
        Default(lambda values: "means" if values["method"] == "frame" else "attributes"),
    ] = None
    """Lengths and angles of the class vectors: seli, those of simplex-encoded-labels interpolation for the numbers of
    training images per class (Thrampoulidis et al., 2022; for equal numbers, the simplex ETF); means, the default of
    method frame: equal lengths in the leading directions of the class means; attributes (class_attributes), the default
    of method fixed-frame. For seli, a class without images counts as having one image."""
    class_attributes: Annotated[str | None, _WITH_ATTRIBUTES] = None
    """Attributes that classes share: digits, the digits of their number; or a CSV file whose first line names the
    attributes and whose other lines have the values of one class each, in the order of the classes. Required for these
    methods."""
    attribute_weight: Annotated[Literal["auto"] | PositiveShare | None, _WITH_ATTRIBUTES] = "auto"
    """Cosine that each attribute adds between classes that share it. auto: 0.6 over the number of attributes, or 1 over
    this number if feature_dim is below K - 1, which is too small for the remaining simplex ETF."""
    proximal_weight: Annotated[NotNegative | None, _of_methods("proximal_weight")] = 0.5
    """Weight of the proximal term towards the previous classifier."""
    class_weights: Annotated[Literal["none", "inverse"] | None, _of_methods("class_weights")] = "none"
    """Weight of each class in the distance between classifier and class means: none, equal weights; inverse, one over
    the number of training images of the class."""
    class_means: Annotated[Literal["previous", "current", "differentiable"] | None, _of_methods("class_means")] = (
        "previous"
    )
    """Class means used for a training batch: those before the batch, after it, or after it with their gradient."""
    means_momentum: Annotated[Literal["cumulative", "published"] | PositiveShare | None, _MOVING_MEANS] = 0.1
    """Weight of a new batch in the moving means."""


class SgdOptions(Settings):
    """Options of sgd."""

    nesterov: bool | None = None
    """Use Nesterov momentum. By default false."""
    shift_lr_factor: Positive | None = None
    """Factor of the learning rate of batch norm shifts; their weight decay is divided by this factor, so that each step
    decays them as much as other parameters. By default 1."""


class LbfgsOptions(Settings):
    """Options of lbfgs."""

    history: AtLeast1 = 10
    """Number of steps from which the curvature is estimated."""
    iterations: AtLeast1 = 20
    """Maximum number of iterations per batch."""


class AgdOptions(Settings):
    """Options of agd."""

    gain: Positive = 10.0
    """Factor of every step."""


class ScheduleOptions(Settings):
    """Options of the schedules."""

    warmup_epochs: Annotated[Annotated[int, Field(ge=0)] | None, where(schedule=("constant", "cosine", "step"))] = 0
    """Number of epochs at the start in which the learning rate increases linearly, batch by batch, to lr. The cosine
    begins after these epochs; step_at includes them in its count."""
    step_at: Annotated[AtLeast1 | list[AtLeast1] | None, where(schedule="step"), _THIRDS] = None
    """Multiply the learning rate after every n epochs, or after the epochs in a list. By default after one third and
    two thirds of all epochs."""
    lr_factor: Annotated[Positive | None, where(schedule="step")] = 0.1
    """Factor of the learning rate in each step."""
    three_phase: Annotated[bool | None, where(schedule="one-cycle")] = False
    """Decrease the rate as fast as it increased, then to 0 in a third phase."""
    div_factor: Annotated[Annotated[float, Field(ge=1)] | None, where(schedule="one-cycle")] = 25.0
    """Begin at lr divided by this value."""
    final_div_factor: Annotated[Annotated[float, Field(ge=1)] | None, where(schedule="one-cycle")] = 1e4
    """End at the initial learning rate divided by this value."""
    pct_start: Annotated[Annotated[float, Field(gt=0, lt=1)] | None, where(schedule="one-cycle")] = 0.3
    """Share of the steps in which the rate increases."""
    anneal_strategy: Annotated[Literal["cos", "linear"] | None, where(schedule="one-cycle")] = "cos"
    """Shape of increase and decrease: cos, half a cosine; or linear, the triangular schedule."""
    cycle_momentum: Annotated[bool | None, where(schedule="one-cycle", optimizer=_FIRST_ORDER)] = True
    """Move the momentum (beta1 of adam and adamw) from 0.95 to 0.85 and back, opposite to the learning rate."""


class Optimisation(Settings):
    """Optimisation."""

    epochs: AtLeast1 = 20
    """Passes over the train split."""
    optimizer: Optimizer = "sgd"
    """Optimiser of all parameters. agd has no learning rate and needs a network without vector parameters."""
    optimizer_options: Annotated[
        dict[str, Any] | None,
        where(optimizer=("sgd", "lbfgs", "agd")),
        Options(
            lambda values: {"sgd": SgdOptions, "lbfgs": LbfgsOptions}.get(values["optimizer"], AgdOptions),
            (SgdOptions, LbfgsOptions, AgdOptions),
        ),
    ] = Field(default_factory=dict)
    """Options of these optimisers:"""
    lr: Annotated[Positive | None, _WITH_RATE] = 0.05
    """Initial learning rate; for one-cycle, the maximum."""
    feature_decay: Literal["published"] | NotNegative | None = None
    """Add half this value times the sum of squares of the features of a batch to the loss; requires feature_norm none.
    weight_decay then applies to the classifier only, and is part of the loss as well. published: 1e-4 of the normalised
    features, which is constant, as in the released code of Zhu et al. (2021)."""
    weight_decay: Annotated[NotNegative | None, _DECAYING] = 5e-4
    """Weight decay; with lbfgs it is part of the loss."""
    momentum: Annotated[NotNegative | None, _STEADY_MOMENTUM] = 0.9
    """Momentum."""
    schedule: Annotated[Literal["constant", "cosine", "step", "one-cycle"] | None, _WITH_RATE] = "cosine"
    """Schedule of the learning rate: cosine ends at 0; step multiplies by lr_factor; one-cycle increases, then
    decreases."""
    schedule_options: Annotated[
        dict[str, Any] | None, _WITH_RATE, Options(lambda _: ScheduleOptions, (ScheduleOptions,))
    ] = Field(default_factory=dict)
    """Options of the schedule:"""
    gradient_clip: Annotated[Positive | None, where(optimizer=_FIRST_ORDER)] = None
    """Scale the gradient of all parameters down to this norm if it exceeds it."""
    weight_average: PositiveShare | None = None
    """Measure an average of the weights, mainly over this share of the steps so far, instead of the current weights. 1
    is the mean over all steps; after step t, the weight of step s is proportional to s^(1/share - 1)."""
    accumulate: Annotated[AtLeast1 | None, where(optimizer=(*_FIRST_ORDER, "agd"))] = 1
    """Number of batches whose gradients are accumulated per step, with equal weight for each sample. The classifier and
    its class means are still updated with every batch."""
    precision: Literal["32", "bf16-mixed", "16-mixed", "auto"] = "32"
    """Precision of the matrix products of the network in training, by autocast; inputs, weights, class means,
    classifier, losses and measurements stay in 32 bits. 16-mixed, with scaled losses, needs cuda. auto is bf16-mixed on
    accelerators that compute in bfloat16 and on CPUs with AMX or AVX512_BF16 instructions, else 32."""
    compile: bool = False
    """Compile the backbone with torch.compile for training: a delay at the start, then faster steps."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to train on; auto selects an accelerator if one is available."""


class Ranks(Settings):
    """Ranks."""

    devices: AtLeast1 = 1
    """Number of processes per machine, one per device; on a CPU, each process uses a part of the cores. Every batch is
    split over the processes, with the gradient of the whole batch."""
    num_nodes: AtLeast1 = 1
    """Number of machines, each with the same number of processes."""
    sync_batchnorm: Annotated[bool | None, _SEVERAL_RANKS] = False
    """Compute batch norm statistics over the whole batch instead of the part of each process. Needs cuda."""

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return self.devices * self.num_nodes


class Record(Settings):
    """Record."""

    measure_at: Epochs = 1
    """Epochs after which collapse is measured. A number n: the first epoch, every n-th epoch (n, 2n, ...) and the last
    epoch. A list: the given epochs; `..` continues the two preceding epochs up to the epoch after it, or to the end,
    and `last` is the last epoch: 1,6,..,last."""
    keep_at: Epochs | None = None
    """Epochs whose checkpoint is kept, in the same form as measure_at; a number n does not include the last epoch,
    whose checkpoint is kept as last.ckpt in any case. By default none."""
    checkpoint_minutes: Positive = 10.0
    """Save the state of training within long epochs at intervals of this number of minutes."""
    loggers: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)
    """Loggers to write to in addition to the CSV files."""

    def check(self) -> None:
        """Check settings together."""
        super().check()
        for name in ("measure_at", "keep_at"):
            _check_progressions(name, getattr(self, name))


class RunConfig(Record, Ranks, Optimisation, ModelSettings, BatchSettings, DataSettings, LossSettings, OneRun):
    """All settings of one training run.

    Raises:
        ValueError: if a setting is out of range, has no effect, or does not fit another setting.
    """

    def check(self) -> None:
        """Check settings together."""
        super().check()
        method = METHODS[self.method]
        if self.classifier_bias is not None and self.classifier_bias not in method.biases:
            raise ValueError(
                f"classifier_bias must be {listed(method.biases, 'or')} for method {self.method}, "
                f"got {self.classifier_bias!r}"
            )
        if self.code in {"frame": ("attributes",), "fixed-frame": ("means",)}.get(self.method, ()):
            other, default = ("attribute-frame", "means") if self.method == "frame" else ("frame", "attributes")
            raise ValueError(
                f"code must be {default} or seli for method {self.method}, got {self.code!r}: that is method {other}"
            )
        if (self.method == "attribute-frame" or self.code == "attributes") and self.class_attributes is None:
            raise ValueError(f"class_attributes must be given for method {self.method}: the attributes of the classes")
        warmup = (self.schedule_options or {}).get("warmup_epochs", 0)
        if warmup and warmup >= self.epochs:
            raise ValueError(
                f"schedule_options.warmup_epochs must be less than epochs, which is {self.epochs}, got {warmup}"
            )
        if self.feature_decay not in (None, 0, "published") and self.feature_norm not in ("none", None):
            raise ValueError("feature_decay needs feature_norm none: for normalised features it is constant")
        if self.batch_size < 2 * self.ranks:
            raise ValueError(
                f"batch_size must be at least {2 * self.ranks}, two for each of {self.ranks} ranks, "
                f"got {self.batch_size}"
            )
        if self.momentum == 0 and (self.optimizer_options or {}).get("nesterov"):
            raise ValueError("optimizer_options.nesterov needs momentum above 0, got 0")
        if self.regulariser and self.regulariser.get("layer") and self.compile:
            raise ValueError("compile must be false with regulariser.layer: a compiled backbone may not run its hook")
        if "." in self.loss and self.ranks > 1:
            raise ValueError("a loss by dotted path needs one rank, because it compares the samples of the whole batch")
        if self.optimizer == "lbfgs":
            self._check_lbfgs(method)

    def _check_lbfgs(self, method: Classifier) -> None:
        if method.follows_means:
            raise ValueError(
                f"optimizer lbfgs cannot train method {self.method}, whose weight would change during the line "
                "search: use method fixed or standard, or another optimiser"
            )
        if self.ranks > 1:
            raise ValueError("optimizer lbfgs needs one rank, because its line search compares losses of whole batches")
        if self.precision == "16-mixed":
            raise ValueError(
                "optimizer lbfgs needs another precision than 16-mixed: its line search cannot scale the loss"
            )
        if self.unit_weight:
            raise ValueError("optimizer lbfgs needs unit_weight false: it cannot keep the rows at unit norm")

    def is_measured(self, epoch: int) -> bool:
        """Return whether collapse is measured after an epoch, counted from 1.

        Examples:
            >>> [epoch for epoch in range(1, 13) if RunConfig(epochs=12, measure_at=5).is_measured(epoch)]
            [1, 5, 10, 12]
            >>> config = RunConfig(epochs=12, measure_at=[1, 4, "..", 10, "last"])
            >>> [epoch for epoch in range(1, 13) if config.is_measured(epoch)]
            [1, 4, 7, 10, 12]
        """
        if isinstance(self.measure_at, int):
            return epoch in (1, self.epochs) or epoch % self.measure_at == 0
        return epoch in _epochs_of(self.measure_at, self.epochs)

    def is_kept(self, epoch: int) -> bool:
        """Return whether the checkpoint of an epoch, counted from 1, is kept.

        Examples:
            >>> [epoch for epoch in range(1, 13) if RunConfig(epochs=12, keep_at=5).is_kept(epoch)]
            [1, 5, 10]
        """
        if isinstance(self.keep_at, int):
            return epoch == 1 or epoch % self.keep_at == 0
        return epoch in _epochs_of(self.keep_at or [], self.epochs)


def _epochs_of(items: list[Any], epochs: int) -> set[int]:
    """Return the epochs of a list such as ``[1, 6, "..", "last"]``."""
    chosen: set[int] = set()
    for position, item in enumerate(items):
        if item == "last":
            chosen.add(epochs)
        elif item == "..":
            first, second, *end = (*items[position - 2 : position], *items[position + 1 : position + 2])
            chosen.update(range(first, (end[0] if end and end != ["last"] else epochs) + 1, second - first))
        else:
            chosen.add(item)
    return chosen


def _check_progressions(name: str, items: Any) -> None:
    """Raise unless each ``..`` continues two increasing epochs and ends at an epoch of their progression."""
    for position, item in enumerate(items if isinstance(items, list) else []):
        if item != "..":
            continue
        before, after = items[max(position - 2, 0) : position], items[position + 1 : position + 2]
        if len(before) < 2 or not all(isinstance(epoch, int) for epoch in before) or before[0] >= before[1]:
            raise ValueError(f"{name} must have two increasing epochs before .., got {items}")
        first, second = before
        if after == [".."] or (
            after and after != ["last"] and (after[0] < second or (after[0] - first) % (second - first))
        ):
            raise ValueError(f"{name} must continue {first}, {second} after .., got {items}")


def derived_seed(*numbers: int) -> int:
    """Return a seed that depends only on these numbers; different numbers give unrelated seeds."""
    import numpy as np

    (state,) = np.random.SeedSequence(list(numbers)).generate_state(1)
    return int(state)
