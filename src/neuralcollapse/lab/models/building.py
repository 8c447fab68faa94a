"""A backbone with the head of a training method, and which backbone a name is."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuralcollapse.geometry import softmax_code
from neuralcollapse.geometry.frames import placed
from neuralcollapse.heads import (
    AttachedHead,
    ClassMeanClassifier,
    ClosedForm,
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
from neuralcollapse.lab.conditions import VITS
from neuralcollapse.lab.config import ModelSettings, RunConfig
from neuralcollapse.lab.memory import check_memory
from neuralcollapse.lab.models.attributes import attribute_code
from neuralcollapse.lab.models.backbones import (
    MLP,
    VGG13,
    Backbone,
    ConvNet,
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
) -> AttachedHead:
    """A backbone with the head of its method. The backbone's first weights follow from the seed, whatever the method.

    Args:
        config: The settings.
        image_shape: Channels, height and width.
        num_classes: K.
        class_names: The names of the classes, for what classes share.
        class_counts: (K,), training images of each class, for ``class_weights``; all the same if not given.

    Returns:
        A module from images (N, C, H, W) to logits (N, K), ``forward(images, targets=None)``.

    Raises:
        ValueError: Settings that do not fit the images or the number of classes.

    Examples:
        >>> model = build_model(RunConfig(backbone="mlp", width=16), (1, 8, 8), 10)
        >>> model.eval()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone = build_backbone(config, image_shape, initialisation=config.initialisation)
        rows = f"{num_classes} classes of {backbone.feature_dim} features: the classifier, its gradient and class means"
        check_memory(4 * 4 * num_classes * backbone.feature_dim, rows)
        place = nn.Linear(backbone.feature_dim, num_classes)
        head = build_head(config, place.in_features, num_classes, class_names=class_names, class_counts=class_counts)
    if isinstance(head, FixedETFClassifier) and head.learned_bias is not None:
        head.learned_bias = (
            place.bias
        )  # as published: the fixed weight alone was put in the place of the linear layer's
    return attach_head(nn.Sequential(backbone, place), head)


def build_head(
    config: RunConfig,
    feature_dim: int,
    num_classes: int,
    *,
    class_names: Sequence[str] | None = None,
    class_counts: Tensor | None = None,
) -> Head:
    """The head of a method.

    Raises:
        ValueError: The head cannot be built with these settings.
    """
    norm = None if config.feature_norm == "none" else config.feature_norm
    options: dict[str, Any] = {"in_features": feature_dim, "num_classes": num_classes, "feature_norm": norm}
    if config.method in ("standard", "linear"):
        # Without a unit start, the optimiser's first step makes it one of unit rows: see build_optimizer.
        return LearnedClassifier(
            unit_weight=config.unit_start is True, bias=config.classifier_bias == "learned", **options
        )
    options["bias"] = config.classifier_bias or "none"
    if config.means_momentum is not None:
        options["momentum"] = config.means_momentum
    if config.method == "fixed":
        return FixedETFClassifier(orientation=config.orientation or "random", **options)
    if config.method == "softmax-code":
        if num_classes <= feature_dim + 1:
            return FixedETFClassifier(**options)
        return FixedFrameClassifier(code=_softmax_code(num_classes, feature_dim), orientation="given", **options)
    if config.method == "means":
        return ClassMeanClassifier(means=config.class_means or "previous", **options)
    if config.method == "fixed-frame":
        code = attribute_code(config, feature_dim, num_classes, class_names=class_names)
        return FixedFrameClassifier(code=code, orientation=config.orientation or "random", **options)
    options["proximal_weight"] = config.proximal_weight or 0.0
    if config.class_weights == "inverse":
        counts = torch.ones(num_classes) if class_counts is None else class_counts.cpu().float()
        options["class_weights"] = torch.where(counts > 0, 1 / counts, 0.0)  # a class without images has no mean
    if config.method in ("frame", "attribute-frame"):
        frame: Any = LeadingDirections()
        if config.method == "attribute-frame":
            frame = attribute_code(config, feature_dim, num_classes, class_names=class_names)
        return NearestFrameClassifier(frame=frame, **options)
    return NearestETFClassifier(solver=TrustRegion() if config.method == "trust-region" else ClosedForm(), **options)


@lru_cache(maxsize=4)
def _softmax_code(num_classes: int, feature_dim: int) -> Tensor:
    """The softmax code of K > d + 1 classes, cached because every seed has the same and it can take minutes.

    A code known in closed form (K ≤ 2d) has its vectors on the axes and is rotated at random, the same each time.
    """
    code = softmax_code(num_classes, feature_dim)
    if num_classes > 2 * feature_dim:
        return code
    return placed(code, feature_dim, torch.Generator().manual_seed(0))


class OwnBackbone(Backbone):
    """A user's own module, whose feature dimension is found by a call.

    Args:
        module: From images (N, C, H, W) to features (N, feature_dim).
        image_shape: Channels, height and width.

    Raises:
        ValueError: The module gives something else.
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
                    f"{type(module).__name__} fails: {error}"
                ) from error
        module.train(training)
        if not (isinstance(features, Tensor) and features.ndim == 2 and len(features) == 2):
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"backbone must give features of shape (N, feature_dim), {type(module).__name__} gives {found}"
            )
        self.feature_dim = features.shape[1]


_deep = partial(ResNet, bottleneck=True)
# Each with those of the settings that it takes beside the dimension of its features and the kind of its batch norm.
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
    **dict.fromkeys(VITS, (VisionTransformer, ("width", "depth", "patch_size"))),
}


def build_backbone(config: ModelSettings, image_shape: ImageShape, *, initialisation: str | None = None) -> Backbone:
    """The backbone that the settings ask for, with weights from torch's global generator.

    Args:
        config: The settings.
        image_shape: Channels, height and width.
        initialisation: How convolutions begin, of backbones for which that is a setting.

    Raises:
        ValueError: There is no backbone of that name, or the user's own class cannot be made or used.
    """
    if "." in config.backbone:
        return OwnBackbone(own_module(config.backbone, config.backbone_options or {}, image_shape), image_shape)
    if config.backbone not in _BACKBONES:
        raise ValueError(
            f"backbone must be one of {', '.join(_BACKBONES)}, or the dotted path of your own class, "
            f"got {config.backbone!r}"
        )
    backbone, names = _BACKBONES[config.backbone]
    options: dict[str, Any] = {name: getattr(config, name) for name in (*names, "feature_dim")}
    options |= {"initialisation": initialisation, "affine": config.batch_norm_affine}
    return backbone(image_shape, **{name: value for name, value in options.items() if value is not None})


def own_module(path: str, options: dict[str, Any], image_shape: ImageShape, *, setting: str = "backbone") -> nn.Module:
    """A module of the user's class, looked for in the folder of work as well.

    The caller checks that the user named the class, not a file that another person may have written.

    Args:
        path: package.module.Class, of a class that is an `nn.Module`: nothing else is called.
        options: Keyword arguments of the class; ``image_shape`` is among them if it has such an argument.
        image_shape: Channels, height and width.
        setting: The name of the setting, for messages.

    Raises:
        ValueError: if it cannot be imported or made, or is not such a class.
    """
    module_name, _, name = path.rpartition(".")
    if "/" in path or not all(path.split(".")):
        raise ValueError(f"{setting} must be a dotted path such as package.module.Class, got {path!r}")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # the user's code may fail in any way, here and below
        raise ValueError(f"{setting} {path!r} cannot be imported: {error}") from error
    finally:
        sys.path.remove(here)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(
            f"{setting} must be a class that is a torch.nn.Module, and {path!r} is {_article(type(found).__name__)}: "
            "what makes a module belongs into the __init__ of a class of your own"
        )
    try:
        takes_shape = "image_shape" in inspect.signature(found).parameters
        return found(**options, **({"image_shape": image_shape} if takes_shape else {}))
    except Exception as error:
        shown = without_secrets(options)
        raise ValueError(f"{setting} {path!r} cannot be made with {setting}_options {shown}: {error}") from error


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
