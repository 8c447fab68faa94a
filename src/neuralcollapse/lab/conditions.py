"""Conditions in which settings have an effect, and defaults that follow from other settings, for `config`."""

from __future__ import annotations

from neuralcollapse.lab.settings import Condition, Values, listed, where

RESNETS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50-32x4d", "resnext101-32x8d", "wide-resnet50-2", "wide-resnet101-2"),
)
VITS = ("vit-tiny", "vit-small")
OF_LOGITS = ("cross-entropy", "mse", "dot-regression-published")
OF_DIRECTIONS = ("normface", "ntce", "nonl", "decoupled", "two-way")
# Whose weight moves with the class means of each batch: it is nearest to them, or they themselves.
NEAREST = ("implicit", "trust-region", "frame", "attribute-frame")
WEIGHING = ("implicit", "frame", "attribute-frame")
MOVING = (*NEAREST, "means")
WITH_ATTRIBUTES = ("attribute-frame", "fixed-frame")
_ANY_BIAS = ("learned", "centring", "none")
BIASES = {
    **dict.fromkeys(("standard", "linear"), ("learned", "none")),
    **dict.fromkeys(("fixed", "fixed-frame", "softmax-code"), _ANY_BIAS),
    **dict.fromkeys(MOVING, ("centring", "none")),
}
NOT_ONE_CYCLE = ("constant", "cosine", "step", "multistep")
DRAWN_DATA = ("mnist-1d", "features")

STORED = Condition(
    "data from a folder or the hub", ("data",), lambda values: values["data"] not in ("digits", *DRAWN_DATA)
)
GENERATED = where(data=DRAWN_DATA)
PICTURES = Condition(
    f"data other than {' and '.join(DRAWN_DATA)}", ("data",), lambda values: values["data"] not in DRAWN_DATA
)
DRAWN = Condition(
    "what is drawn from it: digits_per_image above 1, imbalance, random_labels, label_noise or validation_share",
    ("digits_per_image", "imbalance", "random_labels", "label_noise", "validation_share"),
    lambda values: (
        values["digits_per_image"] > 1
        or values["imbalance"] != "none"
        or values["random_labels"]
        or values["label_noise"] > 0
        or values["validation_share"] is not None
    ),
)
OWN_CLASS = Condition("a backbone of your own", ("backbone",), lambda values: "." in values["backbone"])
BUILT_IN = Condition("the backbones that have a name", ("backbone",), lambda values: "." not in values["backbone"])
BATCH_NORM = Condition(
    "the backbones that have a name and batch norm",
    ("backbone",),
    lambda values: "." not in values["backbone"] and values["backbone"] not in VITS,
)
NORMALISING = Condition("methods other than linear", ("method",), lambda values: values["method"] != "linear")
MOVING_MEANS = Condition(
    f"method {listed(MOVING, 'or')}, or to classifier_bias centring",
    ("method", "classifier_bias"),
    lambda values: values["method"] in MOVING or values["classifier_bias"] == "centring",
)
NOT_STRATIFIED = Condition("batches that are not stratified", ("stratified",), lambda values: not values["stratified"])
STEADY_MOMENTUM = Condition(
    "optimizer sgd, where one-cycle does not move it (cycle_momentum)",
    ("optimizer", "cycle_momentum"),
    lambda values: values["optimizer"] == "sgd" and not values["cycle_momentum"],
)
WITH_RATE = where(optimizer=("sgd", "adam", "adamw", "lbfgs"))
SEVERAL_RANKS = Condition(
    "several ranks", ("devices", "num_nodes"), lambda values: values["devices"] * values["num_nodes"] > 1
)
ACCUMULATING = where(optimizer=("sgd", "adam", "adamw", "agd"))
DECAYING = Condition(
    "an optimizer other than agd; with feature_decay, to a classifier that is trained",
    ("optimizer", "feature_decay", "method", "classifier_bias"),
    lambda values: (
        values["optimizer"] != "agd"
        if values["feature_decay"] is None
        else values["method"] in ("standard", "linear") or values["classifier_bias"] == "learned"
    ),
)
FEATURE_DECAY = Condition("feature_decay", ("feature_decay",), lambda values: values["feature_decay"] is not None)
FIRST_WEIGHTS = where(backbone=(*RESNETS, "vgg13"), optimizer=("sgd", "adam", "adamw", "lbfgs"))
ATTRIBUTES = where(method=WITH_ATTRIBUTES)
UNIT_ROWS = Condition("unit_weight true", ("unit_weight",), lambda values: bool(values["unit_weight"]))
SPARSE = Condition(
    "measure_every or measure_from above 1",
    ("measure_every", "measure_from"),
    lambda values: max(values["measure_every"], values["measure_from"]) > 1,
)
CHECKPOINTS = Condition(
    "checkpoint_every", ("checkpoint_every",), lambda values: values["checkpoint_every"] is not None
)


def default_bias(values: Values) -> str:
    """The bias of each method."""
    return "learned" if values["method"] in ("standard", "linear") else "centring"


def default_width(values: Values) -> int:
    """The width that each backbone is known with."""
    return {"convnet": 32, "mlp": 512, "vit-tiny": 192, "vit-small": 384}.get(values["backbone"], 64)


def default_depth(values: Values) -> int:
    """The depth that each backbone is known with."""
    return 12 if values["backbone"] in VITS else 3


def thirds(values: Values) -> list[int]:
    """The epochs after one and two thirds of all."""
    return sorted({values["epochs"] // 3, 2 * values["epochs"] // 3} - {0})
