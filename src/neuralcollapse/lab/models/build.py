"""Models of runs: built-in or user-defined backbones with the head of a training method."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuralcollapse._checks import check_memory
from neuralcollapse.geometry import attribute_gram, code_from_gram, seli_code, softmax_code
from neuralcollapse.geometry.frames import placed
from neuralcollapse.heads import (
    AttachedHead,
    ClassMeanClassifier,
    FixedETFClassifier,
    FixedFrameClassifier,
    Head,
    LeadingDirections,
    LearnedClassifier,
    NearestETFClassifier,
    NearestFrameClassifier,
    TrustRegion,
    attach_head,
)
from neuralcollapse.lab.config import FAST_CONVNET, METHODS, VITS, ModelSettings, RunConfig
from neuralcollapse.lab.models.backbones import (
    MLP,
    VGG13,
    Backbone,
    ConvNet,
    FastConvNet,
    ImageShape,
    ResNet,
    VisionTransformer,
)
from neuralcollapse.lab.untrusted import without_secrets


def build_model(
    config: RunConfig,
    image_shape: ImageShape,
    num_classes: int,
    *,
    class_names: Sequence[str] | None = None,
    class_counts: Tensor | None = None,
    assigned: int | None = None,
) -> AttachedHead:
    """Return a backbone with the head of a method; initial weights follow from the seed and are equal for all methods.

    Args:
        config: The settings.
        image_shape: Channels, height and width.
        num_classes: K.
        class_names: Names of the classes, for the attributes that they share.
        class_counts: (K,), numbers of training images per class, for ``class_weights`` and ``code``; equal by default.
        assigned: For a fixed simplex ETF, number of classes to which rows are assigned: K plus the number of classes
            that are added later; by default K.

    Returns:
        A module from images (N, C, H, W) to logits (N, K), ``forward(images, targets=None)``.

    Raises:
        ValueError: if settings do not fit the images or the number of classes.

    Examples:
        >>> model = build_model(RunConfig(backbone="mlp", width=16), (1, 8, 8), 10)
        >>> model.eval()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone = build_backbone(config, image_shape)
        rows = f"{num_classes} classes of {backbone.feature_dim} features: the classifier, its gradient and class means"
        check_memory(4 * 4 * num_classes * backbone.feature_dim, rows)
        linear = nn.Linear(backbone.feature_dim, num_classes)
        head = build_head(
            config,
            linear.in_features,
            num_classes,
            class_names=class_names,
            class_counts=class_counts,
            first_bias=linear.bias,
            assigned=assigned,
        )
    return attach_head(nn.Sequential(backbone, linear), head)


def build_head(
    config: RunConfig,
    feature_dim: int,
    num_classes: int,
    *,
    class_names: Sequence[str] | None = None,
    class_counts: Tensor | None = None,
    first_bias: Tensor | None = None,
    assigned: int | None = None,
) -> Head:
    """Return the head of a method, as the table `METHODS` describes it.

    Args:
        config: The settings.
        feature_dim: d.
        num_classes: K.
        class_names: As for `build_model`.
        class_counts: As for `build_model`.
        first_bias: (K,), initial values of the learned bias of a fixed ETF: as published, the bias of the linear layer
            that the head replaces. By default 0.
        assigned: As for `build_model`.

    Raises:
        ValueError: if the head cannot be built with these settings.
    """
    method = METHODS[config.method]
    values: dict[str, Callable[[], Any]] = {
        "feature_norm": lambda: None if config.feature_norm == "none" else config.feature_norm,
        "unit_weight": lambda: config.unit_weight is True,  # published: see build_optimizer
        "class_weights": lambda: _inverse(class_counts, num_classes) if config.class_weights == "inverse" else None,
        "class_attributes": lambda: attribute_code(config, feature_dim, num_classes, class_names=class_names),
        "code": lambda: (
            LeadingDirections()
            if config.code == "means"
            else seli_code(_counts(class_counts, num_classes).clamp_min(1))
            if config.code == "seli"
            else attribute_code(config, feature_dim, num_classes, class_names=class_names)
        ),
        "trust_region": TrustRegion,
    }
    options = {
        argument: values[name]() if name in values else getattr(config, name)
        for argument, name in method.options.items()
    }
    options = {
        argument: value for argument, value in options.items() if value is not None or argument == "feature_norm"
    }
    bias: Any = config.classifier_bias or "none"
    build = _HEADS[method.head]
    if assigned is not None:
        num_classes, options = assigned, options | {"seen": num_classes}
    head = build(feature_dim, num_classes, bias=bias == "learned" if build is LearnedClassifier else bias, **options)
    if isinstance(head, FixedETFClassifier) and head.learned_bias is not None and first_bias is not None:
        head.learned_bias = nn.Parameter(first_bias.detach().clone())
    return head


def softmax_code_classifier(feature_dim: int, num_classes: int, **options: Any) -> FixedFrameClassifier:
    """Return a fixed classifier of the softmax code, which is the simplex ETF if K ≤ d + 1."""
    if num_classes <= feature_dim + 1:
        return FixedETFClassifier(feature_dim, num_classes, **options)
    code = _softmax_code(num_classes, feature_dim)
    return FixedFrameClassifier(feature_dim, num_classes, code, orientation="given", **options)


_HEADS: dict[str, Callable[..., Head]] = {
    build.__name__: build
    for build in (
        LearnedClassifier,
        FixedETFClassifier,
        FixedFrameClassifier,
        ClassMeanClassifier,
        NearestETFClassifier,
        NearestFrameClassifier,
        softmax_code_classifier,
    )
}


def _inverse(class_counts: Tensor | None, num_classes: int) -> Tensor:
    """Return one over the number of images of each class; 0 for a class without images, which has no mean."""
    counts = _counts(class_counts, num_classes).float()
    return torch.where(counts > 0, 1 / counts, 0.0)


def _counts(class_counts: Tensor | None, num_classes: int) -> Tensor:
    """Return the number of images of each class; equal numbers if they are unknown."""
    return torch.ones(num_classes, dtype=torch.int64) if class_counts is None else class_counts.cpu()


@lru_cache(maxsize=4)
def _softmax_code(num_classes: int, feature_dim: int) -> Tensor:
    """Return the softmax code of K > d + 1 classes, cached because it is equal for all seeds and can take minutes.

    A code in closed form (K ≤ 2d) has its vectors on the axes; it is rotated by a fixed random rotation.
    """
    code = softmax_code(num_classes, feature_dim)
    if num_classes > 2 * feature_dim:
        return code
    return placed(code, feature_dim, torch.Generator().manual_seed(0))


class OwnBackbone(Backbone):
    """Backbone given by a user-defined module, whose feature dimension is determined by a call.

    Args:
        module: From images (N, C, H, W) to features (N, feature_dim).
        image_shape: Channels, height and width.

    Raises:
        ValueError: if the module returns anything else.
    """

    def __init__(self, module: nn.Module, image_shape: ImageShape) -> None:
        super().__init__()
        self.layers = module
        training = module.training
        with torch.no_grad():
            try:
                features = module.eval()(torch.zeros(2, *image_shape))
            except Exception as error:
                raise ValueError(
                    f"backbone must take images (N, C, H, W), of C, H, W = {image_shape}; "
                    f"{type(module).__name__} failed: {error}"
                ) from error
        module.train(training)
        if not (isinstance(features, Tensor) and features.ndim == 2 and len(features) == 2):
            given = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"backbone must give features of shape (N, feature_dim), {type(module).__name__} gives {given}"
            )
        self.feature_dim = features.shape[1]


_deep = partial(ResNet, bottleneck=True)
# Class of each backbone, with the settings that it takes in addition to feature_dim and backbone_options.
_BACKBONES: dict[str, tuple[Callable[..., Backbone], tuple[str, ...]]] = {
    "convnet": (ConvNet, ("width",)),
    "mlp": (MLP, ("width", "depth")),
    "resnet18": (partial(ResNet, blocks=(2, 2, 2, 2)), ("width", "stem")),
    "resnet34": (partial(ResNet, blocks=(3, 4, 6, 3)), ("width", "stem")),
    "resnet50": (partial(_deep, blocks=(3, 4, 6, 3)), ("width", "stem")),
    "resnet101": (partial(_deep, blocks=(3, 4, 23, 3)), ("width", "stem")),
    "resnet152": (partial(_deep, blocks=(3, 8, 36, 3)), ("width", "stem")),
    "resnext50-32x4d": (partial(_deep, blocks=(3, 4, 6, 3), widening=2, groups=32), ("width", "stem")),
    "resnext101-32x8d": (partial(_deep, blocks=(3, 4, 23, 3), widening=4, groups=32), ("width", "stem")),
    "wide-resnet50-2": (partial(_deep, blocks=(3, 4, 6, 3), widening=2), ("width", "stem")),
    "wide-resnet101-2": (partial(_deep, blocks=(3, 4, 23, 3), widening=2), ("width", "stem")),
    "vgg13": (VGG13, ("width",)),
    FAST_CONVNET: (FastConvNet, ()),
    **dict.fromkeys(VITS, (VisionTransformer, ("width", "depth"))),
}


def build_backbone(config: ModelSettings, image_shape: ImageShape) -> Backbone:
    """Return a backbone, with weights from torch's global generator.

    Args:
        config: The settings.
        image_shape: Channels, height and width.

    Raises:
        ValueError: if the name is unknown, or the user-defined class cannot be constructed or used.
    """
    if "." in config.backbone:
        return OwnBackbone(
            own_module(config.backbone, config.backbone_options or {}, {"image_shape": image_shape}), image_shape
        )
    if config.backbone not in _BACKBONES:
        raise ValueError(
            f"backbone must be one of {', '.join(_BACKBONES)}, or the dotted path of a user-defined class, "
            f"got {config.backbone!r}"
        )
    backbone, names = _BACKBONES[config.backbone]
    options: dict[str, Any] = {name: getattr(config, name) for name in (*names, "feature_dim")}
    options |= config.backbone_options or {}
    return backbone(image_shape, **{name: value for name, value in options.items() if value is not None})


def own_module(path: str, options: dict[str, Any], known: Mapping[str, Any], *, setting: str = "backbone") -> nn.Module:
    """Return a module of a user-defined class, which is also searched for in the working directory.

    The caller checks that the user named the class, and not only a file that another person may have written.

    Args:
        path: Path package.module.Class of a subclass of `nn.Module`; other objects are not called.
        options: Keyword arguments of the class.
        known: Further arguments by name, such as ``image_shape``, which are passed if the class accepts them.
        setting: Name of the setting, for messages.

    Raises:
        ValueError: if the class cannot be imported or constructed, or is not a subclass of `nn.Module`.
    """
    module_name, _, name = path.rpartition(".")
    if "/" in path or not all(path.split(".")):
        raise ValueError(f"{setting} must be a dotted path such as package.module.Class, got {path!r}")
    working_directory = str(Path.cwd())
    sys.path.insert(0, working_directory)
    try:
        own_class = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # user code may raise any exception, here and below
        raise ValueError(f"{setting} {path!r} cannot be imported: {error}") from error
    finally:
        sys.path.remove(working_directory)
    if not (isinstance(own_class, type) and issubclass(own_class, nn.Module)):
        raise ValueError(
            f"{setting} must be a class that is a torch.nn.Module, but {path!r} is "
            f"{_article(type(own_class).__name__)}: construct a module in the __init__ of a class instead"
        )
    try:
        arguments = inspect.signature(own_class).parameters
        return own_class(**{name: value for name, value in known.items() if name in arguments} | options)
    except Exception as error:
        shown = without_secrets(options)
        raise ValueError(f"{setting} {path!r} cannot be made with {setting}_options {shown}: {error}") from error


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


# --- attributes that classes share ------------------------------------------------------------------------------------

# Total weight of all attributes, if the feature dimension suffices for the simplex ETF in the rest of the Gram matrix.
_SHARED = 0.6
# Names of the column in a table of attributes that contains the class of each line.
_NAMES_OF_CLASSES = ("class", "class name", "class_name", "name")


def attribute_code(
    config: ModelSettings, feature_dim: int, num_classes: int, *, class_names: Sequence[str] | None = None
) -> Tensor:
    """Return the code (K, r) of the Gram matrix of shared attributes, with the same weight for every attribute.

    Args:
        config: The settings.
        feature_dim: d, the greatest rank r.
        num_classes: K.
        class_names: Names of the classes; by default their numbers.

    Raises:
        ValueError: if the attributes cannot be read or do not fit the classes, or the Gram matrix is invalid.
    """
    source = str(config.class_attributes)
    cosines = f"class_attributes needs fewer classes: the cosines of {num_classes} of them, and their decomposition,"
    check_memory(4 * 8 * num_classes**2, cosines)
    if source == "digits":
        attributes = digits_of_classes(num_classes, class_names=class_names)
    else:
        attributes = read_attributes(source, num_classes, class_names=class_names)
    count = attributes.shape[1]
    weight = config.attribute_weight
    if weight is None or weight == "auto":
        weight = (_SHARED if feature_dim >= num_classes - 1 else 1) / count
    try:
        gram = attribute_gram(attributes, torch.full((count,), float(weight), dtype=torch.float64))
        return code_from_gram(gram, feature_dim).float()
    except ValueError as error:
        raise ValueError(
            f"attribute_weight must suit class_attributes, got {weight:g} for each of {count} attributes of "
            f"{num_classes} classes: {error}"
        ) from error


def digits_of_classes(num_classes: int, *, class_names: Sequence[str] | None = None) -> Tensor:
    """Return the decimal digits (K, places) of 0 to K−1, or of the names of the classes, beginning with the highest.

    Raises:
        ValueError: if a name is not a number.
    """
    names = [str(label) for label in range(num_classes)] if class_names is None else class_names
    other = next((name for name in names if not re.fullmatch("[0-9]+", name)), None)
    if other is not None:
        raise ValueError(f"class_attributes digits needs classes whose names are numbers, but one is named {other!r}")
    places = len(str(max(map(int, names))))
    return torch.tensor([[int(digit) for digit in f"{int(name):0{places}}"] for name in names])


def read_attributes(path: str, num_classes: int, *, class_names: Sequence[str] | None = None) -> Tensor:
    """Return the values of each attribute as integers (K, A), from a CSV file whose first line names the attributes.

    Lines are in the order of the classes. If there is a column named class or name, or a column whose values are the
    names of the classes, it determines the class of each line, and the lines may be in any order.

    Args:
        path: The file.
        num_classes: K.
        class_names: Names of the classes, if they have names.

    Raises:
        ValueError: if the file cannot be read or lacks a value, or its lines do not match the classes.
    """
    import pandas as pd

    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False).fillna("")
    except (OSError, ValueError) as error:  # the errors of pandas and of decoding are ValueErrors
        raise ValueError(f"class_attributes must be digits or a CSV file, {path!r} cannot be read: {error}") from error
    if len(table) != num_classes or not len(table.columns):
        raise ValueError(
            f"class_attributes must have a line for each of the {num_classes} classes, {path!r} has {len(table)} below "
            "the names of the attributes"
        )
    if bool((table == "").any(axis=None)):
        raise ValueError(f"class_attributes must have a value of each attribute for each class, {path!r} lacks some")
    table = _in_order_of_classes(table, path, class_names)
    return torch.tensor(table.apply(lambda values: pd.factorize(values)[0]).to_numpy("int64"))


def _in_order_of_classes(table: Any, path: str, class_names: Sequence[str] | None) -> Any:
    """Return the lines of a table in the order of the classes, without the column of class names."""
    if class_names is None:
        return table
    names = sorted(class_names)
    columns = [name for name in table.columns if sorted(table[name].str.strip()) == names]
    named = [
        name
        for name in table.columns
        if name.strip().casefold() in _NAMES_OF_CLASSES and not set(names).isdisjoint(table[name].str.strip())
    ]
    if named and not columns:
        unknown = sorted(set(table[named[0]].str.strip()) - set(names))
        raise ValueError(
            f"class_attributes must name each class once in its column {named[0]!r}, and {path!r} "
            + (f"has {unknown[0]!r}, which is not a class" if unknown else "names one twice")
        )
    if not columns or len(table.columns) == 1:
        return table
    column = next((name for name in columns if name in named), columns[0])
    line_of = {name: line for line, name in enumerate(table[column].str.strip())}
    return table.drop(columns=column).iloc[[line_of[name] for name in class_names]]
