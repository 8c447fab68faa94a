"""What training minimises: the loss of a batch, and the penalties that are part of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from neuralcollapse import losses
from neuralcollapse.heads import AttachedHead
from neuralcollapse.lab.config import LossSettings, Optimisation

_OF_FEATURES: dict[str, Callable[..., Tensor]] = {
    "dot-regression": losses.dot_regression,
    "normface": losses.normface,
    "ntce": losses.ntce,
    "nonl": losses.nonl,
    "decoupled": losses.decoupled_cross_entropy,
    "two-way": losses.two_way,
}


def batch_loss(
    config: LossSettings, logits: Tensor, targets: Tensor, features: Tensor, weight: Tensor, share: float = 1.0
) -> Tensor:
    """The loss of a batch, a mean over its samples; of several ranks, the mean of their losses is.

    - ``"cross-entropy"``, with the share ``label_smoothing`` of each target spread over all classes;
    - ``"mse"``: mean over samples and classes of (logit − one-hot)² (Zhu et al., NeurIPS 2021);
    - ``"dot-regression-published"``: ½(w_y·h + b_y − 1)² (released code of Markou, Ajanthan, Gould, NeurIPS 2024);
    - those of `neuralcollapse.losses`, of features and weight.

    Args:
        config: The settings.
        logits: (N, K).
        targets: (N,).
        features: (N, d), what the weight multiplies.
        weight: (K, d), with its graph.
        share: The part of the whole batch's samples that this rank has, times the number of ranks.
    """
    if config.loss in _OF_FEATURES:
        options = {"temperature": config.temperature, "margin": config.margin}
        given: dict[str, Any] = {name: float(value) for name, value in options.items() if value is not None}
        function = losses.bidirectional_nonl if config.bidirectional else _OF_FEATURES[config.loss]
        return function(features, targets, weight, **given)
    if config.loss == "mse":
        return share * functional.mse_loss(logits, functional.one_hot(targets, logits.shape[1]).to(logits.dtype))
    if config.loss == "dot-regression-published":
        true_logit = logits.gather(1, targets[:, None])
        return share * 0.5 * (true_logit - 1).square().mean()
    return share * functional.cross_entropy(logits, targets, label_smoothing=config.label_smoothing or 0.0)


def penalty(config: Optimisation, model: AttachedHead, features: Tensor, ranks: int = 1) -> Tensor | None:
    """What is added to the loss of a batch, or None; of several ranks, the mean of what it is for each is.

    With a ``feature_decay`` λ_H, λ/2 (‖W‖² + ‖b‖²) of the classifier and λ_H/2 Σ‖h‖² over the batch (separate decay,
    Zhu et al., NeurIPS 2021); for L-BFGS without it, λ/2 of the squared norm of all parameters.

    Args:
        config: The settings.
        model: The model.
        features: h (N, d), what the classifier's weight multiplies.
        ranks: How many have a part of the batch.
    """
    if config.feature_decay is not None:
        if config.published_quirk:
            features = functional.normalize(features)
        of_features = 0.5 * config.feature_decay * ranks * features.square().sum()
        return of_features + _half_square(model.head, config.weight_decay or 0.0, features)
    if config.optimizer == "lbfgs":
        return _half_square(model, config.weight_decay or 0.0, features)
    return None


def _half_square(module: nn.Module, decay: float, like: Tensor) -> Tensor:
    total = like.new_zeros(())
    for parameter in module.parameters():
        total = total + torch.sum(parameter.square())
    return 0.5 * decay * total
