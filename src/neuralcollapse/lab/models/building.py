"""A backbone with the head of a training method, and which backbone a name is."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuralcollapse.heads import (
    AttachedHead,
    FixedETFClassifier,
    Head,
    LearnedClassifier,
    NearestETFClassifier,
    attach_head,
)
from neuralcollapse.lab.config import METHODS, Model, RunConfig
from neuralcollapse.lab.models.backbones import MLP, VGG13, Backbone, ConvNet, ImageShape, ResNet


def build_model(config: RunConfig, image_shape: tuple[int, int, int], num_classes: int) -> AttachedHead:
    """A backbone and the method's head. The backbone's first weights follow from the seed, whatever the method."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone = build_backbone(config, image_shape)
        place = nn.Linear(backbone.feature_dim, num_classes)
        head = build_head(config, config.method, place.in_features, num_classes)
        if isinstance(head, LearnedClassifier) and head.unit_weight:
            head.project_weight()
    return attach_head(nn.Sequential(backbone, place), head)


def build_head(config: Model, method: str, feature_dim: int, num_classes: int) -> Head:
    """The head of a method: standard, fixed or implicit.

    Raises:
        ValueError: There is no such method, or the head cannot be built with these settings.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    bias = config.classifier_bias
    if bias == "auto":
        bias = "learned" if method == "standard" else "centring"
    if (method, bias) in (("standard", "centring"), ("implicit", "learned")):
        possible = "learned or none" if method == "standard" else "centring or none"
        raise ValueError(f"classifier_bias must be {possible} for method {method}, got {bias!r}")
    norm = None if config.feature_norm == "none" else config.feature_norm
    options: dict[str, Any] = {"in_features": feature_dim, "num_classes": num_classes, "feature_norm": norm}
    if method == "standard":
        return LearnedClassifier(unit_weight=config.unit_weight, bias=bias == "learned", **options)
    options["bias"] = bias
    if config.means_momentum is not None:
        options["momentum"] = config.means_momentum
    if method == "fixed":
        return FixedETFClassifier(**options)
    if config.proximal_weight is not None:
        options["proximal_weight"] = config.proximal_weight
    return NearestETFClassifier(**options)


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


# Each with those of the settings that it takes beside the dimension of its features and the kind of its batch norm.
_BACKBONES: dict[str, tuple[Callable[..., Backbone], tuple[str, ...]]] = {
    "convnet": (ConvNet, ("width",)),
    "mlp": (MLP, ("width", "depth")),
    "resnet18": (partial(ResNet, blocks=(2, 2, 2, 2)), ("width", "stem")),
    "resnet34": (partial(ResNet, blocks=(3, 4, 6, 3)), ("width", "stem")),
    "resnet50": (partial(ResNet, blocks=(3, 4, 6, 3), bottleneck=True), ("width", "stem")),
    "vgg13": (VGG13, ("width",)),
}


def build_backbone(config: Model, image_shape: ImageShape) -> Backbone:
    """The backbone that the settings ask for, with weights from torch's global generator.

    Raises:
        ValueError: There is no backbone of that name, or the user's own class cannot be made or used.
    """
    if "." in config.backbone:
        return _own_backbone(config.backbone, config.backbone_options, config.feature_dim, image_shape)
    if config.backbone not in _BACKBONES:
        raise ValueError(
            f"backbone must be one of {', '.join(_BACKBONES)}, or the dotted path of your own class, "
            f"got {config.backbone!r}"
        )
    if config.backbone_options:
        raise ValueError(f"backbone_options are of your own class, and backbone is {config.backbone!r}")
    backbone, names = _BACKBONES[config.backbone]
    options: dict[str, Any] = {name: getattr(config, name) for name in (*names, "feature_dim")}
    options = {name: value for name, value in options.items() if value is not None}
    return backbone(image_shape, affine=config.batch_norm_affine, **options)


def _own_backbone(path: str, options: dict[str, Any], feature_dim: int | None, image_shape: ImageShape) -> Backbone:
    """The user's class, looked for in the folder of work as well; given ``image_shape`` if it has such an argument."""
    module_name, _, name = path.rpartition(".")
    if "/" in path or not all(path.split(".")):
        raise ValueError(f"backbone must be a dotted path such as package.module.Class, got {path!r}")
    if feature_dim is not None:
        raise ValueError(f"feature_dim of your own backbone {path!r} is set in backbone_options")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        make = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # the user's code may fail in any way, here and below
        raise ValueError(f"backbone {path!r} cannot be imported: {error}") from error
    finally:
        sys.path.remove(here)
    try:
        takes_shape = "image_shape" in inspect.signature(make).parameters
        made = make(**options, **({"image_shape": image_shape} if takes_shape else {}))
    except Exception as error:
        raise ValueError(f"backbone {path!r} cannot be made with backbone_options {options}: {error}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"backbone {path!r} must make a torch.nn.Module, it made a {type(made).__name__}")
    return OwnBackbone(made, image_shape)
