"""Measure a model on a loader: one call, one run of the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from neuralcollapse._checks import check_at_least, check_device, check_ignore_index
from neuralcollapse._running import device_of, evaluation_mode, unchanged_on_error, unwrapped
from neuralcollapse._version import __version__
from neuralcollapse.catalogue import in_order
from neuralcollapse.classifier import ClassifierObserver
from neuralcollapse.metrics.cache import FeatureCache
from neuralcollapse.metrics.collapse import measure_moments
from neuralcollapse.metrics.measurement import LabelFingerprint, Measurement, Options, Provenance
from neuralcollapse.metrics.model_run import ModelRun, Outputs, Pooling, Unpack, unpack_pair
from neuralcollapse.metrics.moments import ClassMoments
from neuralcollapse.metrics.samples import SampleValues, measure_samples
from neuralcollapse.metrics.statistics import Center
from neuralcollapse.metrics.undefined import NO_SAMPLE, warn_of

SAMPLE_SIZE = 1000  # features kept for pictures


@torch.no_grad()  # not inference_mode: what a model caches of its own must stay usable in training
def measure(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    classifier: str | nn.Module | None = None,
    train_loader: Iterable[Any] | None = None,
    train_moments: ClassMoments | None = None,
    ood_loader: Iterable[Any] | None = None,
    layers: Sequence[str] = (),
    layer_pooling: Pooling = "mean",
    unpack: Unpack | None = None,
    device: torch.device | str | None = None,
    center: Center = "samples",
    min_samples: int = 1,
    drop_classes_above: int | None = None,
    ignore_index: int | None = None,
    dtype: torch.dtype | Literal["mixed"] = torch.float64,
    class_scatter: bool = False,
    pairwise: bool = True,
    code: Tensor | None = None,
    per_sample: bool = True,
    epoch: int | None = None,
    split: str | None = None,
    model_name: str | None = None,
    cache_bytes: int = 2**31,
    progress: bool = True,
) -> Measurement:
    """Measure neural collapse of a model on a loader.

    The model runs once over each loader, in evaluation mode and without gradients; afterwards every module is in
    the mode it was in. What is measured is the tensor that the classifier's weight multiplies.

    The first batch decides which module is the classifier: the one for which features · Wᵀ + b equals what the model
    returned, within rounding. Names decide only between modules that pass. A model with none is refused, and so is one
    that something follows, such as a prior or a temperature. Compiled models run as they were before compilation.

    Args:
        model: Any module that ends in a classifier. It returns logits (..., K), alone or in a tuple, mapping or
            dataclass; where one of its tensors is called ``logits``, that one is compared.
        loader: Batches; ``(input, target)`` pairs, unless ``unpack`` says otherwise. Targets are (B,), or for
            features (B, T, d) of tokens (B, T).
        classifier: The classifier, or its dotted name, where several modules compute an output. It is verified too.
        train_loader: The train split, when ``loader`` is another: its class means and centre are used for the
            nearest class mean, the cosine margin and the alignment; samples of classes that it lacks have none.
        train_moments: In place of ``train_loader``, the ``moments`` of the train split's own measurement.
        ood_loader: Out-of-distribution data for ``nc5_ood``; targets, if any, are not looked at.
        layers: Dotted names of modules whose outputs are measured as well; of a module that is called several times,
            the last one.
        layer_pooling: What becomes of outputs with more than two dimensions: ``"mean"`` over positions ((B, C, ...)
            keeps C, and (B, T, d) keeps d), ``"flatten"``, or a function to (B, d). Outputs (B, T, d) with targets
            (B, T) stay as they are. A layer of d dimensions takes d² numbers.
        unpack: From a batch to ``(inputs, targets)``, where inputs are a tensor, a tuple of positional or a mapping
            of keyword arguments.
        device: Where to run: the model is moved there. By default where the model is.
        center: As for `collapse_metrics`.
        min_samples: As for `collapse_metrics`.
        drop_classes_above: As for `collapse_metrics`.
        ignore_index: Samples of this target are left out.
        dtype: As for `ClassMoments`.
        class_scatter: Keep per-class scatter, K d² numbers, from which ``nc1_numerical_rank`` is found without single
            samples, for layers too.
        pairwise: As for `collapse_metrics`.
        code: As for `collapse_metrics`.
        per_sample: Measure what needs single samples, O(N K d); without it features are not kept.
        epoch: For the record: epochs trained.
        split: For the record: what of the data ``loader`` is.
        model_name: For the record; by default the model's class.
        cache_bytes: Features kept in memory at most; what goes beyond is memory-mapped to a temporary file.
        progress: Show a progress bar.

    Returns:
        The measurement. Metrics that are not defined for what was measured are NaN in it; its ``undefined`` says why,
        and so does one warning.

    Raises:
        ValueError: if no module computes the model's output, or several do (the message names them, with their shapes
            and greatest difference), or it is not called once per forward; if a loader is empty, train moments are of
            another K or d, features are not finite (the batch is named), targets are out of range, or ``min_samples``
            or ``drop_classes_above`` leaves out too many classes. The model, its hooks and buffers and torch's random
            state are then left as they were.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> batches = [(torch.randn(16, 4), torch.arange(16) % 2) for _ in range(3)]
        >>> measurement = measure(model, batches, progress=False)
        >>> measurement.cos_margins.shape
        torch.Size([48])
    """
    if train_loader is not None and train_moments is not None:
        raise ValueError("train_loader and train_moments must not both be given")
    _check_types(model, loader, layers, classifier, unpack, device)
    _check_options(train_moments, layer_pooling, ignore_index, epoch, cache_bytes)
    observer = ClassifierObserver(model, classifier)
    if device is not None:
        model.to(device)
    run = ModelRun(model, observer, layers, layer_pooling, unpack or unpack_pair, device_of(model), progress)
    options = Options(center, min_samples, drop_classes_above, pairwise)
    with (
        FeatureCache(cache_bytes if per_sample else 0) as cache,
        unchanged_on_error(model),
        evaluation_mode(model),
    ):
        with closing(run.over(loader, "loader")) as batches:
            first = next(batches)
            weight, bias = run.classifier.weight, run.classifier.bias
            _check_train_moments(train_moments, weight)
            gathered = _Gathered(weight, cache if per_sample else None, ignore_index, dtype, class_scatter)
            for outputs in chain((first,), batches):
                gathered.take(outputs)
        if train_loader is not None:
            train_moments = gathered.new_moments(*weight.shape)
            for outputs in run.over(train_loader, "train_loader"):
                train_moments.update(outputs.features, outputs.targets, ignore_index=ignore_index)
        ood_means = {} if ood_loader is None else run.mean_features(ood_loader)
        moments = gathered.moments
        found = measure_moments(moments, weight, bias, ood_mean=ood_means.get(""), code=code, **asdict(options))
        accuracies = gathered.accuracies()
        metrics, undefined = found[0] | accuracies, found[1] | _undefined_accuracies(accuracies)
        samples = SampleValues.of_none(len(weight))
        sample_features, sample_targets = FeatureCache().sample(0)
        if per_sample:
            values, reasons, samples = measure_samples(cache, weight, moments, train_moments or moments, options)
            sample_features, sample_targets = cache.sample(SAMPLE_SIZE)
            metrics, undefined = metrics | values, undefined | reasons
    of_layers = {
        layer: measure_moments(gathered.layers[layer], ood_mean=ood_means.get(layer), code=code, **asdict(options))
        for layer in layers
    }
    layers_undefined = {layer: reasons for layer, (_, reasons) in of_layers.items() if reasons}
    warn_of(undefined, layers_undefined, depth=4)
    return Measurement(
        metrics=in_order(metrics),
        undefined=in_order(undefined),
        moments=moments,
        weight=weight.cpu().clone(),
        bias=None if bias is None else bias.cpu().clone(),
        code=None if code is None else code.detach().cpu().clone(),
        **samples._asdict(),
        sample_features=sample_features,
        sample_targets=sample_targets,
        layers={layer: values for layer, (values, _) in of_layers.items()},
        layers_undefined=layers_undefined,
        layer_moments={layer: gathered.layers[layer] for layer in layers},
        ood_means=ood_means,
        train_moments=train_moments,
        provenance=Provenance(
            epoch, split, model_name or type(unwrapped(model)).__name__, str(gathered.labels), __version__
        ),
        options=options,
    )


class _Gathered:
    """What one run over a loader leaves: moments of the features and of layers, hits, labels, kept samples."""

    def __init__(
        self,
        weight: Tensor,
        cache: FeatureCache | None,
        ignore_index: int | None,
        dtype: torch.dtype | Literal["mixed"],
        class_scatter: bool,
    ) -> None:
        num_classes, feature_dim = weight.shape
        self.new_moments = partial(ClassMoments, dtype=dtype, class_scatter=class_scatter, device=weight.device)
        self.moments = self.new_moments(num_classes, feature_dim)
        self.layers: dict[str, ClassMoments] = {}
        self.labels = LabelFingerprint()
        self.hits = torch.zeros(min(5, num_classes), dtype=torch.int64, device=weight.device)
        self.cache = cache
        self.ignore_index = ignore_index

    def take(self, outputs: Outputs) -> None:
        """Take in a batch."""
        self.moments.update(outputs.features, outputs.targets, ignore_index=self.ignore_index)
        for layer, values in outputs.layers.items():
            if layer not in self.layers:
                self.layers[layer] = self.new_moments(self.moments.num_classes, values.shape[-1])
            self.layers[layer].update(values, outputs.targets, ignore_index=self.ignore_index)
        features, targets, answers = _samples(outputs, self.ignore_index, len(self.hits))
        self.hits += (answers == targets[:, None]).sum(dim=0)
        self.labels.update(targets)
        if self.cache is not None:
            self.cache.append(features, targets, answers[:, 0])

    def accuracies(self) -> dict[str, float]:
        """Of the classifier itself."""
        shares = (self.hits.cumsum(0).double() / self.moments.counts.sum()).tolist()
        return {"accuracy": shares[0]} | ({"accuracy_top5": shares[4]} if self.moments.num_classes > 5 else {})


def _check_types(
    model: object, loader: object, layers: object, classifier: object, unpack: object, device: object
) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
        raise ValueError(f"loader must be an iterable of batches, got {type(loader).__name__}")
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise ValueError(f"layers must be a list of names, got {layers!r}")
    if classifier is not None and not isinstance(classifier, str | nn.Module):
        raise ValueError(f"classifier must be a module or its dotted name, got {type(classifier).__name__}")
    if unpack is not None and not callable(unpack):
        raise ValueError(f"unpack must be a function of a batch, got {type(unpack).__name__}")
    check_device(device)


def _check_options(
    train_moments: object, layer_pooling: object, ignore_index: int | None, epoch: int | None, cache_bytes: int
) -> None:
    if train_moments is not None and not isinstance(train_moments, ClassMoments):
        raise ValueError(f"train_moments must be ClassMoments, got {type(train_moments).__name__}")
    if not callable(layer_pooling) and layer_pooling not in ("mean", "flatten"):
        raise ValueError(f"layer_pooling must be 'mean', 'flatten' or a function, got {layer_pooling!r}")
    check_ignore_index(ignore_index)
    if epoch is not None:
        check_at_least("epoch", epoch, 0)
    check_at_least("cache_bytes", cache_bytes, 0)


def _check_train_moments(train_moments: ClassMoments | None, weight: Tensor) -> None:
    if train_moments is not None and train_moments.means.shape != weight.shape:
        raise ValueError(
            f"train_moments must be of K, d = {tuple(weight.shape)}, got {tuple(train_moments.means.shape)}"
        )


def _samples(outputs: Outputs, ignore_index: int | None, answers: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, d), targets (N,) and the classifier's first answers (N, answers), without what is ignored."""
    targets = outputs.targets.flatten().long()  # as an index, uint8 would be taken for a mask
    kept = slice(None) if ignore_index is None else targets != ignore_index
    ranked = outputs.logits.flatten(0, -2)[kept].topk(answers).indices
    return outputs.features.flatten(0, -2)[kept], targets[kept], ranked


def _undefined_accuracies(accuracies: dict[str, float]) -> dict[str, str]:
    return {name: NO_SAMPLE for name, value in accuracies.items() if math.isnan(value)}
