"""A backbone with the head of a training method, on a device."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from neuralcollapse.heads import (
    AttachedHead,
    FixedETFClassifier,
    Head,
    LearnedClassifier,
    NearestETFClassifier,
    attach_head,
)
from neuralcollapse.lab.agd import orthogonal_start
from neuralcollapse.lab.backbones import build_backbone
from neuralcollapse.lab.config import METHODS, Model, RunConfig


def build_model(config: RunConfig, image_shape: tuple[int, int, int], num_classes: int) -> AttachedHead:
    """A backbone and the method's head. The backbone's first weights follow from the seed, whatever the method."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone = build_backbone(config, image_shape)
        if config.optimizer == "agd":
            orthogonal_start(backbone)
        place = nn.Linear(backbone.feature_dim, num_classes)
        head = build_head(config, config.method, place.in_features, num_classes)
        if config.optimizer == "agd":
            orthogonal_start(head)
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


def resolve_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is an accelerator if there is one.

    Raises:
        ValueError: There is no such device.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available.get(name):
        there = ", ".join(kind for kind in available if available[kind])
        raise ValueError(f"device must be auto or one that is there ({there}), got {name!r}")
    return torch.device(name)
