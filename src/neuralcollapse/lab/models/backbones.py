"""Backbones: networks that compute features (N, feature_dim) from images (N, C, H, W)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

ImageShape = tuple[int, int, int]


class Backbone(nn.Module):
    """Network from images (N, C, H, W) to features (N, feature_dim)."""

    feature_dim: int
    layers: nn.Module

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class ConvolutionalBackbone(Backbone):
    """Backbone of convolutions, which supports both memory layouts."""


@contextmanager
def evaluation_layout(model: nn.Module) -> Iterator[None]:
    """Convert the weights of convolutional backbones on a CPU to channels-last layout: evaluation is 1.7 times faster.

    With gradients, the gain is small, and with few channels torch 2.13 crashes in the backward pass.
    """
    backbones = [module for module in model.modules() if isinstance(module, ConvolutionalBackbone)]
    backbones = [backbone for backbone in backbones if next(backbone.parameters()).device.type == "cpu"]
    try:
        for backbone in backbones:
            backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        yield
    finally:
        for backbone in backbones:
            backbone.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


class ConvNet(ConvolutionalBackbone):
    """Four 3×3 convolutions with batch norm, max-pooled half-way and averaged at the end.

    Args:
        image_shape: Channels, height and width.
        width: Channels of the first two convolutions; the others have twice as many.
        feature_dim: Channels of the last convolution; by default twice ``width``.
        batch_norm_affine: Train a scale and a shift in batch norm.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        *,
        width: int = 32,
        feature_dim: int | None = None,
        batch_norm_affine: bool = True,
    ) -> None:
        super().__init__()
        channels = (image_shape[0], width, width, 2 * width, feature_dim or 2 * width)
        blocks = [_convolution(*pair, affine=batch_norm_affine) for pair in itertools.pairwise(channels)]
        pooling = nn.MaxPool2d(2, ceil_mode=True)
        self.layers = nn.Sequential(*blocks[:2], pooling, *blocks[2:], nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.feature_dim = channels[-1]


class MLP(Backbone):
    """Fully connected layers with batch norm.

    Args:
        image_shape: Channels, height and width.
        width: Neurons of each layer.
        depth: Number of layers.
        feature_dim: Neurons of the last layer; by default ``width``.
        batch_norm_affine: Train a scale and a shift in batch norm.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        *,
        width: int = 512,
        depth: int = 3,
        feature_dim: int | None = None,
        batch_norm_affine: bool = True,
    ) -> None:
        super().__init__()
        sizes = [math.prod(image_shape)] + [width] * (depth - 1) + [feature_dim or width]
        layers = [
            nn.Sequential(nn.Linear(*pair, bias=False), nn.BatchNorm1d(pair[1], affine=batch_norm_affine), nn.ReLU())
            for pair in itertools.pairwise(sizes)
        ]
        self.layers = nn.Sequential(nn.Flatten(), *layers)
        self.feature_dim = sizes[-1]


class ResNet(ConvolutionalBackbone):
    """Residual network of He et al. (CVPR 2016), section 4.1, without the classifier.

    Args:
        image_shape: Channels, height and width.
        blocks: Residual blocks of each of the four stages.
        bottleneck: Use blocks of three convolutions, whose output has four times as many channels, instead of two.
        widening: Factor of the inner channels of bottlenecks (Zagoruyko and Komodakis, BMVC 2016).
        groups: Groups of the 3×3 convolutions of bottlenecks (Xie et al., CVPR 2017).
        width: Channels k of the first stage; the others have 2k, 4k and 8k.
        stem: ``"7x7"`` of stride 2, then max-pooling, as published; or ``"3x3"`` of stride 1, for small images.
        feature_dim: Output channels of the last block; by default 8k (32k with bottlenecks), as for the other blocks of
            the last stage.
        batch_norm_affine: Train a scale and a shift in batch norm.
        initialisation: ``"he"``, normal by the fan-out (He et al., ICCV 2015), or ``"torch"``, as `nn.Conv2d` does.

    Raises:
        ValueError: if the groups do not divide the inner channels.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        *,
        blocks: Iterable[int],
        bottleneck: bool = False,
        widening: int = 1,
        groups: int = 1,
        width: int = 64,
        stem: str = "7x7",
        feature_dim: int | None = None,
        batch_norm_affine: bool = True,
        initialisation: str = "he",
    ) -> None:
        super().__init__()
        if widening * width % groups:
            raise ValueError(f"width must be such that {groups} groups divide {widening} x width, got {width}")
        if stem == "7x7":
            convolution = _convolution(image_shape[0], width, size=7, stride=2, affine=batch_norm_affine)
            first = nn.Sequential(convolution, nn.MaxPool2d(3, 2, padding=1))
        else:
            first = _convolution(image_shape[0], width, affine=batch_norm_affine)
        expansion = 4 if bottleneck else 1
        stages, before = [], width
        for stage, number in enumerate(blocks):
            inner, after = width * 2**stage, expansion * width * 2**stage
            outputs = [after] * number
            if stage == 3 and feature_dim is not None:
                outputs[-1] = feature_dim
            stage_blocks = []
            for i, output in enumerate(outputs):
                stride = 2 if stage and i == 0 else 1
                residual = (
                    _bottleneck(before, widening * inner, output, stride, groups, batch_norm_affine)
                    if bottleneck
                    else _two_convolutions(before, inner, output, stride, batch_norm_affine)
                )
                stage_blocks.append(ResidualBlock(residual, before, output, stride, batch_norm_affine))
                before = output
            stages.append(nn.Sequential(*stage_blocks))
        self.layers = nn.Sequential(first, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.feature_dim = before
        if initialisation == "he":
            _initialise(self)


class ResidualBlock(nn.Module):
    """Function relu(x + f(x)); if f changes the shape, x passes through a 1×1 convolution (option B)."""

    def __init__(
        self, residual: nn.Module, in_channels: int, out_channels: int, stride: int = 1, affine: bool = True
    ) -> None:
        super().__init__()
        self.residual = residual
        self.shortcut = (
            nn.Identity()
            if in_channels == out_channels and stride == 1
            else _convolution(in_channels, out_channels, size=1, stride=stride, affine=affine)[:2]  # without the ReLU
        )

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(self.shortcut(images) + self.residual(images))


def _two_convolutions(before: int, inner: int, after: int, stride: int, affine: bool) -> nn.Sequential:
    """Return two 3×3 convolutions, the first with the stride."""
    return nn.Sequential(
        _convolution(before, inner, stride=stride, affine=affine),
        _convolution(inner, after, affine=affine)[:2],  # without the ReLU
    )


def _bottleneck(before: int, inner: int, after: int, stride: int, groups: int, affine: bool) -> nn.Sequential:
    """Return 1×1, 3×3 (with the stride) and 1×1 convolutions."""
    return nn.Sequential(
        _convolution(before, inner, size=1, affine=affine),
        _convolution(inner, inner, stride=stride, groups=groups, affine=affine),
        _convolution(inner, after, size=1, affine=affine)[:2],  # without the ReLU
    )


class VGG13(ConvolutionalBackbone):
    """Configuration B of Simonyan and Zisserman (ICLR 2015), with batch norm, averaged at the end.

    Ten 3×3 convolutions, two before each of five max-poolings; images that are small already are pooled fewer times.

    Args:
        image_shape: Channels, height and width.
        width: Channels k of the first stage; the others have 2k, 4k, 8k and 8k.
        feature_dim: Channels of the last convolution; by default 8k.
        batch_norm_affine: Train a scale and a shift in batch norm.
        initialisation: As in `ResNet`.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        *,
        width: int = 64,
        feature_dim: int | None = None,
        batch_norm_affine: bool = True,
        initialisation: str = "he",
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = image_shape[0]
        for stage, scale in enumerate((1, 2, 4, 8, 8)):
            after = scale * width
            last = feature_dim or after if stage == 4 else after
            layers += [
                _convolution(before, after, affine=batch_norm_affine),
                _convolution(after, last, affine=batch_norm_affine),
            ]
            layers += [nn.MaxPool2d(2, ceil_mode=True)]
            before = last
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.feature_dim = before
        if initialisation == "he":
            _initialise(self)


class FastConvNet(Backbone):
    """Convolutional network that trains in seconds on an accelerator, without the classifier (Jordan, 2024).

    The network consists of a whitening of 2×2 patches, of which only the bias is trained; three stages of 3×3
    convolutions, the first of which is followed by max-pooling by 2, and each by batch norm without a scale and GELU;
    and the maximum over the remaining positions, divided by 9. Convolutions are initialised as the identity of their
    first channels. Weights are in channels-last layout, which is faster on CPUs and accelerators.

    Args:
        image_shape: Channels, height and width.
        widths: Channels of each stage.
        convolutions: Convolutions of each stage, 2 or 3; with 3, the output of the first is added to that of the last.
        feature_dim: Channels of the last stage; by default the last of ``widths``.

    Raises:
        ValueError: if the images are smaller than 9×9, for which no positions remain after the stages.

    Source: airbench94 (2 convolutions) and airbench96 (3) of K. Jordan, "94% on CIFAR-10 in 3.29 seconds on a single
    GPU", arXiv:2404.00498, and their released code.

    Examples:
        >>> network = FastConvNet((3, 32, 32), widths=(8, 16, 16))
        >>> network.whiten([torch.randn(100, 3, 32, 32)])
        >>> network(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        image_shape: ImageShape,
        *,
        widths: Sequence[int] = (64, 256, 256),
        convolutions: int = 2,
        feature_dim: int | None = None,
    ) -> None:
        super().__init__()
        channels, *sides = image_shape
        if min(sides) < 9:
            raise ValueError(
                f"images must be at least 9x9 for backbone fast-convnet, got {sides[0]}x{sides[1]}: see image_size"
            )
        self.whitening = _Whitening(channels, 8 * channels, 2)
        self.whitening.weight.requires_grad_(False)
        nn.init.zeros_(self.whitening.bias)  # type: ignore[arg-type]
        stage_widths = (8 * channels, *widths[:2], feature_dim or widths[2])
        stages = [_FastStage(*pair, convolutions) for pair in itertools.pairwise(stage_widths)]
        self.layers = nn.Sequential(self.whitening, nn.GELU(), *stages, nn.AdaptiveMaxPool2d(1), nn.Flatten())
        self.feature_dim = stage_widths[-1]
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.contiguous(memory_format=torch.channels_last)) / 9

    @torch.no_grad()
    def whiten(self, batches: Iterable[Tensor]) -> None:
        """Set the first layer to the whitening of the 2×2 patches of images, and its negative.

        With eigenvectors v and eigenvalues λ of the second moments of patches, the filters are ±v/√(λ + 5e-4). The
        responses have second moment λ/(λ + 5e-4), which is nearly 1 in directions in which patches vary and 0 in
        directions in which they are constant.

        Args:
            batches: Standardised images, each batch (N, C, H, W).
        """
        weight = self.whitening.weight
        total, number = torch.zeros(2 * [weight[0].numel()], dtype=torch.float64), 0
        for images in batches:
            patches = functional.unfold(images, 2).transpose(1, 2).flatten(0, 1)
            total, number = total + (patches.T @ patches).cpu(), number + len(patches)
        values, vectors = torch.linalg.eigh(total / number)
        filters = (vectors / (values.clamp(min=0) + 5e-4).sqrt()).T.flip(0)
        weight.copy_(torch.cat([filters, -filters]).view(weight.shape))


class _Whitening(nn.Conv2d):
    """Convolution in 32 bits, also under autocast: in directions that vary little, whitening amplifies rounding."""

    def forward(self, images: Tensor) -> Tensor:
        device = images.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else images.dtype
        with torch.autocast(device, enabled=False):
            return super().forward(images).to(dtype)


class _FastStage(nn.Module):
    """Convolution, max-pooling, batch norm, GELU; then convolution, batch norm, GELU once or twice."""

    def __init__(self, in_channels: int, out_channels: int, convolutions: int) -> None:
        super().__init__()
        first, *others = (
            _identity_convolution(before, out_channels)
            for before in (in_channels, *[out_channels] * (convolutions - 1))
        )
        self.first = nn.Sequential(first, nn.MaxPool2d(2), _shift_norm(out_channels), nn.GELU())
        self.others = nn.Sequential(
            *(nn.Sequential(convolution, _shift_norm(out_channels), nn.GELU()) for convolution in others)
        )

    def forward(self, images: Tensor) -> Tensor:
        first = self.first(images)
        return self.others(first) + first if len(self.others) > 1 else self.others(first)


def _identity_convolution(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Return a 3×3 convolution whose first channels are the identity."""
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    nn.init.dirac_(convolution.weight.data[:in_channels])
    return convolution


def _shift_norm(channels: int) -> nn.BatchNorm2d:
    """Return batch norm that trains a shift but not a scale.

    Its eps is 1e-3 instead of the published 1e-12. On grey images with an even background, the maximum over each window
    is that of the background in some channels, which are constant then. Each layer divides their gradients by √eps, and
    with 1e-12 they explode at the first step.
    """
    norm = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm


class VisionTransformer(Backbone):
    """Vision transformer of Dosovitskiy et al. (ICLR 2021), whose features are the normalised class token.

    It has pre-norm blocks with width/64 heads and MLPs of four times the width, trained position embeddings, and no
    dropout.

    Args:
        image_shape: Channels, height and width.
        width: Dimension of a token.
        depth: Number of blocks.
        patch_size: Height and width of a patch; by default 16 for images of at least 128 pixels, 4 for at least 16
            pixels, else 2.
        feature_dim: Neurons of a linear layer after the class token; by default without this layer.

    Raises:
        ValueError: if the patch size does not divide the size of the images, or the number of heads the width.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        *,
        width: int,
        depth: int = 12,
        patch_size: int | None = None,
        feature_dim: int | None = None,
    ) -> None:
        super().__init__()
        channels, *sides = image_shape
        if patch_size is None:
            patch_size = 16 if min(sides) >= 128 else 4 if min(sides) >= 16 else 2
        if any(side % patch_size for side in sides):
            raise ValueError(
                f"patch_size must divide the height and the width of the images, {sides[0]} and {sides[1]}, "
                f"got {patch_size}"
            )
        heads = max(1, width // 64)
        if width % heads:
            raise ValueError(f"width must be a multiple of its {heads} heads (width / 64), got {width}")
        self.patches = nn.Conv2d(channels, width, patch_size, patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        number = math.prod(side // patch_size for side in sides)
        self.positions = nn.Parameter(torch.zeros(1, number + 1, width))
        block = nn.TransformerEncoderLayer(
            *(width, heads, 4 * width),
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=1e-6,
            batch_first=True,
            norm_first=True,
        )
        norm = nn.LayerNorm(width, eps=1e-6)
        self.layers = nn.TransformerEncoder(block, depth, norm, enable_nested_tensor=False)
        self.projection = nn.Identity() if feature_dim is None else nn.Linear(width, feature_dim)
        self.feature_dim = feature_dim or width
        for parameter in self.parameters():  # blocks are created as copies: draw separate weights for each
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).mT
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), patches], 1) + self.positions
        return self.projection(self.layers(tokens)[:, 0])


def _convolution(
    in_channels: int,
    out_channels: int,
    *,
    size: int = 3,
    stride: int = 1,
    groups: int = 1,
    affine: bool = True,
) -> nn.Sequential:
    """Return a convolution, batch norm and ReLU."""
    convolution = nn.Conv2d(in_channels, out_channels, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels, affine=affine), nn.ReLU())


def _initialise(network: nn.Module) -> None:
    """Draw the weights of convolutions as in He et al. (ICCV 2015), by the fan-out."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
