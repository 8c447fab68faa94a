"""Transfer of frozen features: accuracy of a linear probe and of the nearest class mean on other data, by layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from neuralcollapse._checks import check_at_least, check_module, check_not_negative, check_targets
from neuralcollapse._running import device_of, evaluation_mode, unchanged_on_error
from neuralcollapse.classifier import ClassifierObserver
from neuralcollapse.metrics.measure import Layers, ModelRun, check_layers, unpack_pair
from neuralcollapse.metrics.moments import ClassMoments
from neuralcollapse.metrics.probes import FittedProbes
from neuralcollapse.metrics.profile import FEATURES
from neuralcollapse.metrics.statistics import MeasureOptions, class_statistics
from neuralcollapse.metrics.tokens import Unpack


class TransferredLayer(NamedTuple):
    """Accuracies of the features of a layer on the test split of other data.

    Attributes:
        layer: Name of the layer; ``"features"`` for the input of the classifier.
        dimension: Number of features d.
        linear_probe: Accuracy of the linear probe, fitted to the train split.
        nearest_class_mean: Accuracy of the nearest class mean of the train split.
    """

    layer: str
    dimension: int
    linear_probe: float
    nearest_class_mean: float


@torch.no_grad()
def transfer(
    model: nn.Module,
    train: Iterable[Any],
    test: Iterable[Any],
    num_classes: int,
    *,
    layers: Layers = (),
    ridge: float = 0.0,
    classifier: str | nn.Module | None = None,
    unpack: Unpack | None = None,
    options: MeasureOptions = MeasureOptions(),
    progress: bool = True,
) -> list[TransferredLayer]:
    """Evaluate frozen features of a model on other data, which may have other classes.

    The model runs once over each loader, in evaluation mode and without gradients. The linear probe is fitted in closed
    form to the class moments of the train split (`linear_probe`), without iterations and without storing features.

    Args:
        model: Any module that ends in a classifier. The classes of the data may differ from those of the classifier.
        train: Batches of the train split, as for `measure`.
        test: Batches of the test split. Samples of classes without a train sample are left out.
        num_classes: Number of classes of the data.
        layers: Layers besides the features, as for `measure`: names, or ``"blocks"``.
        ridge: Penalty of the linear probe, as for `linear_probe`.
        classifier: The classifier, or its dotted name, as for `measure`.
        unpack: As for `measure`.
        options: Pooling of layers, precision, bounds of class sizes, and ignored targets, as for `measure`.
        progress: Show a progress bar.

    Returns:
        One entry per layer, the features last.

    Raises:
        ValueError: if the classifier cannot be found, a loader is empty, targets are not in [0, num_classes), features
            are not finite, fewer than two classes have train samples, no test sample belongs to a measured class, or an
            argument is out of range. The model is then left unchanged.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> batches = [(torch.randn(30, 4), torch.arange(30) % 3)]  # three classes, not two
        >>> [layer] = transfer(model, batches, batches, num_classes=3, progress=False)
        >>> layer.layer, layer.dimension
        ('features', 8)
    """
    check_module("model", model)
    check_at_least("num_classes", num_classes, 2)
    check_layers(layers)
    check_not_negative("ridge", ridge)
    observer = ClassifierObserver(model, classifier)
    run = ModelRun(model, observer, layers, options.layer_pooling, unpack or unpack_pair, device_of(model), progress)
    ignored, moments = options.ignore_index, dict[str, ClassMoments]()
    with unchanged_on_error(model), evaluation_mode(model):
        for outputs in run.over(train, "train"):
            for name, values in {**outputs.layers, FEATURES: outputs.features}.items():
                if name not in moments:
                    size = values.shape[-1]
                    moments[name] = ClassMoments(num_classes, size, dtype=options.dtype, device=values.device)
                moments[name].update(values, outputs.targets, ignore_index=ignored)
        statistics = {name: class_statistics(of_layer, options) for name, of_layer in moments.items()}
        if (num_measured := len(statistics[FEATURES].classes)) < 2:
            raise ValueError(f"train must have samples of at least two classes, got {num_measured}")
        probes = {name: FittedProbes.of(moments[name], measured, ridge) for name, measured in statistics.items()}
        counts = dict.fromkeys(moments, torch.zeros(3, dtype=torch.int64))
        for outputs in run.over(test, "test"):
            targets = outputs.targets.flatten()
            counted = torch.ones_like(targets, dtype=torch.bool) if ignored is None else targets != ignored
            targets = targets[counted]
            check_targets(targets, len(targets), num_classes)
            for name, values in {**outputs.layers, FEATURES: outputs.features}.items():
                counts[name] = counts[name] + probes[name].misses(values.flatten(0, -2)[counted], targets).cpu()
    if not counts[FEATURES][0]:
        raise ValueError("test must have at least one sample of a class of train, got none")
    return [
        TransferredLayer(name, moments[name].feature_dim, 1 - int(linear) / int(number), 1 - int(nearest) / int(number))
        for name, (number, nearest, linear) in counts.items()
    ]
