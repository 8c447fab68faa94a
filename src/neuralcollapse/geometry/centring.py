"""What the nearest frames ask of class means: centring at the mean of their weights, and what is checked of both."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neuralcollapse._checks import check_choice, check_finite, check_floating, check_not_negative, values_readable
from neuralcollapse.geometry.polar import METHODS


def centre(
    means: Tensor, class_weights: Tensor | None, check_values: bool, must_differ: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """C, centred at the ω-weighted mean; ‖C‖_F as (..., 1, 1); and ω as (..., K, 1) with mean 1, if given.

    Where C is nothing but the rounding error of the centring, the norm is infinite: Ĉ is zero, with a zero gradient.
    """
    weights = None
    if class_weights is not None:
        weights = class_weights.to(means)
        weights = (weights / weights.mean(-1, keepdim=True)).unsqueeze(-1)
    mean = (means if weights is None else weights * means).mean(-2, keepdim=True)
    centred = means - mean
    norm = torch.linalg.vector_norm(centred, dim=(-2, -1), keepdim=True)
    rounding = 4 * torch.finfo(means.dtype).eps * math.sqrt(means.shape[-2])
    differ = norm > rounding * torch.linalg.vector_norm(mean.detach(), dim=-1, keepdim=True)
    if check_values and values_readable(differ) and not bool(differ.all()):  # a NaN or infinity is not greater either
        check_finite("class_means", means)
        if must_differ:
            raise ValueError(
                "class_means must not be all equal (centred, they are all zero), "
                "unless an anchor with a positive proximal_weight decides the orientation"
            )
    return centred, torch.where(differ, norm, math.inf), weights


def check_arguments(
    class_means: Tensor,
    anchor: Tensor | None,
    proximal_weight: float,
    class_weights: Tensor | None,
    method: str,
) -> None:
    """Raise for what a nearest frame cannot be asked, as far as it can be said without reading values."""
    check_floating("class_means", class_means)
    check_choice("method", method, METHODS)
    if class_means.ndim < 2:
        raise ValueError(f"class_means must be of shape (..., K, d), got {tuple(class_means.shape)}")
    check_not_negative("proximal_weight", proximal_weight)
    if anchor is not None:
        check_like("anchor", anchor, class_means, tuple(class_means.shape[-2:]))
    if class_weights is not None:
        check_like("class_weights", class_weights, class_means, (class_means.shape[-2],))
    if proximal_weight > 0 and anchor is None:
        raise ValueError(f"proximal_weight = {proximal_weight} needs an anchor, got None")


def check_weight_values(class_weights: Tensor) -> None:
    """Raise unless class weights are at least 0 with a positive sum, where their values can be read."""
    if not values_readable(class_weights):
        return
    check_finite("class_weights", class_weights)
    if bool((class_weights < 0).any()) or bool((class_weights.sum(-1) == 0).any()):
        raise ValueError("class_weights must be at least 0 with a positive sum")


def check_like(name: str, tensor: Tensor, means: Tensor, ending: tuple[int, ...]) -> None:
    """Raise unless the tensor is floating and of that ending shape, with no batch dimensions but those of the means."""
    check_floating(name, tensor)
    if tensor.shape[tensor.ndim - len(ending) :] != ending or tensor.ndim < len(ending):
        raise ValueError(f"{name} must end in the shape {ending}, got {tuple(tensor.shape)}")
    batch, whole = tensor.shape[: tensor.ndim - len(ending)], means.shape[:-2]
    if len(batch) > len(whole) or any(
        size not in (1, want) for size, want in zip(batch[::-1], whole[::-1], strict=False)
    ):
        raise ValueError(f"{name} must have the leading dimensions {tuple(whole)} or none, got {tuple(batch)}")
