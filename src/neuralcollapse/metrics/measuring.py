"""Measure a model on a loader: one call, one run of the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from neuralcollapse._checks import check_at_least, check_ignore_index
from neuralcollapse.classifier import resolve_classifier
from neuralcollapse.metrics import sphere
from neuralcollapse.metrics.cache import FeatureCache
from neuralcollapse.metrics.catalogue import in_order
from neuralcollapse.metrics.collapse import collapse_metrics
from neuralcollapse.metrics.doors import check_device
from neuralcollapse.metrics.measurement import LabelFingerprint, Measurement, Options, Provenance
from neuralcollapse.metrics.model_run import ModelRun, Outputs, Pooling, Unpack, evaluation_mode, unpack_pair
from neuralcollapse.metrics.moments import ClassMoments
from neuralcollapse.metrics.nc2 import cos_margins
from neuralcollapse.metrics.nc3 import alignment
from neuralcollapse.metrics.nc4 import nearest_class_mean
from neuralcollapse.metrics.statistics import Center, ClassStatistics, class_statistics

SAMPLE_SIZE = 1000  # features kept for pictures
INFORMATION_SIZE = 512  # samples of MIR and HDR, which take the eigenvalues of a matrix of that size
RELEASED_CLASSES = 4096  # above which the K × K kernels of the released MIR and HDR are not formed


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
    max_samples: int | None = None,
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

    Args:
        model: Any module that ends in a classifier. Its output is not looked at.
        loader: Batches; ``(input, target)`` pairs, unless ``unpack`` says otherwise. Targets are (B,), or for
            features (B, T, d) of tokens (B, T).
        classifier: The classifier, or its dotted name, where `find_classifier` does not find it.
        train_loader: The train split, when ``loader`` is another: its class means and centre are used for the
            nearest class mean, the cosine margin and the alignment.
        train_moments: In place of ``train_loader``, the ``moments`` of the train split's own measurement.
        ood_loader: Out-of-distribution data for ``nc5_ood``; targets, if any, are not looked at.
        layers: Dotted names of modules whose outputs are measured as well.
        layer_pooling: What becomes of outputs with more than two dimensions: ``"mean"`` over positions ((B, C, ...)
            keeps C, and (B, T, d) keeps d), ``"flatten"``, or a function to (B, d). Outputs (B, T, d) with targets
            (B, T) stay as they are. A layer of d dimensions takes d² numbers.
        unpack: From a batch to ``(inputs, targets)``, where inputs are a tensor, a tuple of positional or a mapping
            of keyword arguments.
        device: Where to run: the model is moved there. By default where the model is.
        center: As for `collapse_metrics`.
        min_samples: As for `collapse_metrics`.
        max_samples: As for `collapse_metrics`.
        ignore_index: Samples of this target are left out.
        dtype: As for `ClassMoments`.
        class_scatter: Keep per-class scatter, K d² numbers, for ``nc1_numerical_rank``.
        pairwise: As for `collapse_metrics`.
        code: As for `collapse_metrics`.
        per_sample: Measure what needs single samples, O(N K d); without it features are not kept.
        epoch: For the record: epochs trained.
        split: For the record: what of the data ``loader`` is.
        model_name: For the record; by default the model's class.
        cache_bytes: Features kept in memory at most; what goes beyond is memory-mapped to a temporary file.
        progress: Show a progress bar.

    Raises:
        ValueError: No classifier found, an empty loader, train moments of another K or d, features that are not
            finite (the batch is named), targets out of range, or too few classes.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> batches = [(torch.randn(16, 4), torch.arange(16) % 2) for _ in range(3)]
        >>> measurement = measure(model, batches, progress=False)
        >>> measurement.cos_margins.shape
        torch.Size([48])
    """
    from neuralcollapse import __version__

    if train_loader is not None and train_moments is not None:
        raise ValueError("train_loader and train_moments must not both be given")
    _check_types(model, loader, layers, classifier, unpack, device)
    _check_options(train_moments, layer_pooling, ignore_index, epoch, cache_bytes)
    name, head = resolve_classifier(model, classifier)
    if device is not None:
        model.to(device)
    weight, bias = _parameters(head)
    if train_moments is not None and train_moments.means.shape != weight.shape:
        raise ValueError(
            f"train_moments must be of K, d = {tuple(weight.shape)}, got {tuple(train_moments.means.shape)}"
        )
    run = ModelRun(model, name, head, layers, layer_pooling, unpack or unpack_pair, weight.device, progress)
    options = Options(center, min_samples, max_samples, pairwise)
    with FeatureCache(cache_bytes if per_sample else 0) as cache, evaluation_mode(model):
        gathered = _Gathered(weight, cache if per_sample else None, ignore_index, dtype, class_scatter)
        for outputs in run.over(loader, "loader"):
            gathered.take(outputs)
        if train_loader is not None:
            train_moments = gathered.new_moments(*weight.shape)
            for outputs in run.over(train_loader, "train_loader"):
                train_moments.update(outputs.features, outputs.targets, ignore_index=ignore_index)
        ood_means = {} if ood_loader is None else run.mean_features(ood_loader)
        moments = gathered.moments
        metrics = collapse_metrics(moments, weight, bias, ood_mean=ood_means.get(""), code=code, **asdict(options))
        metrics |= gathered.accuracies()
        samples = _PerSample(torch.empty(0), torch.full((len(weight),), torch.nan), *FeatureCache().sample(0))
        if per_sample:
            reference = class_statistics(
                train_moments or moments, center=center, min_samples=min_samples, max_samples=max_samples
            )
            values, samples = _per_sample(cache, weight, reference)
            metrics |= values
    return Measurement(
        metrics=in_order(metrics),
        moments=moments,
        weight=weight.cpu().clone(),
        bias=None if bias is None else bias.cpu().clone(),
        code=None if code is None else code.detach().cpu().clone(),
        **samples._asdict(),
        layers={
            layer: collapse_metrics(gathered.layers[layer], ood_mean=ood_means.get(layer), code=code, **asdict(options))
            for layer in layers
        },
        layer_moments={layer: gathered.layers[layer] for layer in layers},
        ood_means=ood_means,
        train_moments=train_moments,
        provenance=Provenance(epoch, split, model_name or type(model).__name__, str(gathered.labels), __version__),
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


def _parameters(classifier: Any) -> tuple[Tensor, Tensor | None]:
    bias = classifier.bias
    return classifier.weight.detach(), None if bias is None else bias.detach()


def _samples(outputs: Outputs, ignore_index: int | None, answers: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, d), targets (N,) and the classifier's first answers (N, answers), without what is ignored."""
    targets = outputs.targets.flatten()
    kept = slice(None) if ignore_index is None else targets != ignore_index
    ranked = outputs.logits.flatten(0, -2)[kept].topk(answers).indices
    return outputs.features.flatten(0, -2)[kept], targets[kept], ranked


class _PerSample(NamedTuple):
    """What single samples gave, besides their metrics; see `Measurement`."""

    cos_margins: Tensor
    ncc_mismatch: Tensor
    sample_features: Tensor
    sample_targets: Tensor


def _per_sample(cache: FeatureCache, weight: Tensor, reference: ClassStatistics) -> tuple[dict[str, float], _PerSample]:
    """The metrics of single samples, and what else they gave."""
    num_classes, device = len(weight), weight.device
    rows = weight.double()[reference.classes]
    place = torch.full((num_classes,), -1, device=device)  # of a class among those measured
    place[reference.classes] = torch.arange(len(rows), device=device)
    margins, (aligned, instances) = [], torch.zeros(2, dtype=torch.float64, device=device)
    unit_sums = torch.zeros_like(rows)
    samples, mismatches = torch.zeros(2, num_classes, dtype=torch.float64, device=device).unbind()
    for batch in cache:
        features, targets, predictions = (tensor.to(device) for tensor in batch)
        measured = place[targets] >= 0
        features, targets, predictions = features[measured].double(), targets[measured], predictions[measured]
        if not len(features):
            continue
        margins.append(cos_margins(features, place[targets], rows, reference.center))
        aligned += len(features) * alignment(features, place[targets], rows, reference.center)
        instances += len(features) * sphere.instance_alignment(features, place[targets], rows)
        unit_sums += sphere.unit_class_sums(features, place[targets], rows)[0]
        nearest = reference.classes[nearest_class_mean(features, reference.class_means)]
        samples.index_add_(0, targets, torch.ones_like(targets, dtype=torch.float64))
        mismatches.index_add_(0, targets, (nearest != predictions).double())
    present = samples[reference.classes] > 0
    drawn, labels = (tensor.to(device) for tensor in cache.draw(INFORMATION_SIZE, place >= 0))
    information = {"": sphere.matrix_information(drawn, place[labels], rows)}
    if len(rows) <= RELEASED_CLASSES:
        information["_released"] = sphere.released_information_of_sums(unit_sums[present], rows[present])
    all_margins = torch.cat(margins).sort().values.cpu()
    by_class = mismatches / samples
    values = {
        "nc2_cos_margin": float(all_margins.mean()),
        "alignment": float(aligned / samples.sum()),
        "instance_alignment": float(instances / samples.sum()),
        "class_alignment": float(sphere.alignment_of_sums(unit_sums[present], rows[present])),
        "nc4_ncc_mismatch": float(mismatches.sum() / samples.sum()),
        "nc4_ncc_mismatch_class_mean": float(by_class.nanmean()),
        **{f"mir{form}": float(mir) for form, (mir, _) in information.items()},
        **{f"hdr{form}": float(hdr) for form, (_, hdr) in information.items()},
    }
    return values, _PerSample(all_margins, by_class.cpu(), *cache.sample(SAMPLE_SIZE))
