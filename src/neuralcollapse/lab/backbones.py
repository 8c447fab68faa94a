"""Networks from images to features (N, feature_dim)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from neuralcollapse.lab.config import Model

ImageShape = tuple[int, int, int]


class Backbone(nn.Module):
    """From images (N, C, H, W) to features (N, feature_dim)."""

    feature_dim: int
    layers: nn.Sequential

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class ConvNet(Backbone):
    """Four 3×3 convolutions with batch norm, pooled once half-way and averaged at the end.

    Args:
        image_shape: Channels, height and width.
        width: Channels of the first two convolutions; the others have twice as many.
    """

    def __init__(self, image_shape: ImageShape, width: int = 32) -> None:
        super().__init__()
        channels = (image_shape[0], width, width, 2 * width, 2 * width)
        blocks = [_convolution(*pair) for pair in itertools.pairwise(channels)]
        pooling = nn.MaxPool2d(2, ceil_mode=True)
        self.layers = nn.Sequential(*blocks[:2], pooling, *blocks[2:], nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.feature_dim = channels[-1]


class MLP(Backbone):
    """Fully connected layers with batch norm.

    Args:
        image_shape: Channels, height and width.
        width: Neurons of each layer.
        depth: Number of layers.
    """

    def __init__(self, image_shape: ImageShape, width: int = 512, depth: int = 3) -> None:
        super().__init__()
        sizes = [math.prod(image_shape)] + [width] * depth
        layers = [
            nn.Sequential(nn.Linear(*pair, bias=False), nn.BatchNorm1d(pair[1]), nn.ReLU())
            for pair in itertools.pairwise(sizes)
        ]
        self.layers = nn.Sequential(nn.Flatten(), *layers)
        self.feature_dim = width


class ResNet18(Backbone):
    """The 18-layer residual network of He et al. (CVPR 2016), section 4.1, without its classifier.

    Args:
        image_shape: Channels, height and width.
        width: Channels k of the first stage; the others have 2k, 4k and 8k.
        stem: ``"7x7"`` of stride 2, then max-pooling, as published; or ``"3x3"`` of stride 1, for small images.
    """

    def __init__(self, image_shape: ImageShape, width: int = 64, stem: str = "7x7") -> None:
        super().__init__()
        if stem == "7x7":
            first = nn.Sequential(_convolution(image_shape[0], width, size=7, stride=2), nn.MaxPool2d(3, 2, padding=1))
        else:
            first = _convolution(image_shape[0], width)
        channels = [width, width, 2 * width, 4 * width, 8 * width]
        stages = [
            nn.Sequential(ResidualBlock(before, after, stride), ResidualBlock(after, after))
            for before, after, stride in zip(channels[:-1], channels[1:], (1, 2, 2, 2), strict=True)
        ]
        self.layers = nn.Sequential(first, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.feature_dim = channels[-1]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ResidualBlock(nn.Module):
    """relu(x + conv(relu(conv(x)))); where the shape changes, x goes through a 1×1 convolution (option B)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            _convolution(in_channels, out_channels, stride=stride),
            _convolution(out_channels, out_channels, activation=False),
        )
        same = in_channels == out_channels and stride == 1
        self.shortcut = (
            nn.Identity() if same else _convolution(in_channels, out_channels, size=1, stride=stride, activation=False)
        )

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(self.shortcut(images) + self.residual(images))


def _convolution(
    in_channels: int, out_channels: int, *, size: int = 3, stride: int = 1, activation: bool = True
) -> nn.Sequential:
    """Convolution, batch norm and, if asked for, ReLU."""
    convolution = nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)
    layers: list[nn.Module] = [convolution, nn.BatchNorm2d(out_channels)]
    return nn.Sequential(*layers, nn.ReLU()) if activation else nn.Sequential(*layers)


# Each with those of the settings that it takes.
_BACKBONES: dict[str, tuple[Callable[..., Backbone], tuple[str, ...]]] = {
    "convnet": (ConvNet, ("width",)),
    "mlp": (MLP, ("width", "depth")),
    "resnet18": (ResNet18, ("width", "stem")),
}


def build_backbone(config: Model, image_shape: ImageShape) -> Backbone:
    """The backbone that the settings ask for, with weights from torch's global generator.

    Raises:
        ValueError: There is no backbone of that name.
    """
    if config.backbone not in _BACKBONES:
        raise ValueError(f"backbone must be one of {', '.join(_BACKBONES)}, got {config.backbone!r}")
    backbone, names = _BACKBONES[config.backbone]
    options = {name: getattr(config, name) for name in names}
    return backbone(image_shape, **{name: value for name, value in options.items() if value is not None})
