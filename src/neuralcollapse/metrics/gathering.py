"""Results of one pass of a model over data, gathered batch by batch, and the measurement computed from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from neuralcollapse._version import __version__
from neuralcollapse.catalogue import in_order
from neuralcollapse.metrics.collapse import measure_moments
from neuralcollapse.metrics.measurement import LabelFingerprint, Measurement, Provenance
from neuralcollapse.metrics.moments import ClassMoments
from neuralcollapse.metrics.principal import mean_residual_norms
from neuralcollapse.metrics.probes import effective_depth, probe_errors
from neuralcollapse.metrics.samples import FeatureCache, SampleValues, measure_samples
from neuralcollapse.metrics.statistics import MeasureOptions
from neuralcollapse.metrics.undefined import NO_SAMPLE, MetricValues, warn_of_undefined, without_undefined

SAMPLE_SIZE = 1000  # number of features saved for figures


class Gathered:
    """Results of one pass over data: moments of features and layers, hits, labels, and cached samples.

    Args:
        num_classes: K.
        feature_dim: d.
        device: Device of the moments.
        cache: Cache to which the samples are added if the options include metrics of single samples.
        options: Options of the measurement.
        bias: b (K,) that is part of the logits, or None.
        caches: Context that closes the caches of layers, which probes need; None without probes.
    """

    def __init__(
        self,
        num_classes: int,
        feature_dim: int,
        device: torch.device,
        cache: FeatureCache,
        options: MeasureOptions,
        bias: Tensor | None,
        caches: ExitStack | None = None,
    ) -> None:
        self.new_moments = partial(
            ClassMoments, dtype=options.dtype, class_scatter=options.class_scatter, device=device
        )
        self.moments = self.new_moments(num_classes, feature_dim)
        self.layers: dict[str, ClassMoments] = {}
        self.options = options
        self._labels = LabelFingerprint()
        self._class_hits = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self._hits = torch.zeros(min(5, num_classes), dtype=torch.int64, device=device)
        self._max_logits = torch.zeros_like(self.moments.means[0, 0])
        self._cache = cache
        self._caches = caches
        self._layer_caches: dict[str, FeatureCache] = {}
        self._bias = None if bias is None or not bool(bias.any()) else bias

    def add(
        self,
        features: Tensor,
        targets: Tensor,
        logits: Tensor | None = None,
        layers: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add a batch.

        Args:
            features: (..., d).
            targets: (...).
            logits: (..., K); None without a classifier.
            layers: Name to output (..., d) of each layer.
        """
        ignore_index = self.options.ignore_index
        self.moments.update(features, targets, ignore_index=ignore_index)
        layers = layers or {}
        for layer, values in layers.items():
            if layer not in self.layers:
                self.layers[layer] = self.new_moments(self.moments.num_classes, values.shape[-1])
            self.layers[layer].update(values, targets, ignore_index=ignore_index)
        targets = targets.flatten().long()  # a uint8 index is a mask
        counted = slice(None) if ignore_index is None else targets != ignore_index
        targets = targets[counted]
        if self._caches is not None:
            for layer, values in layers.items():
                if layer not in self._layer_caches:
                    cache = FeatureCache(self.options.cache_bytes // len(layers))
                    self._layer_caches[layer] = self._caches.enter_context(cache)
                self._layer_caches[layer].append(values.flatten(0, -2)[counted], targets, targets)
        predictions, without_bias = torch.full_like(targets, -1), None
        if logits is not None:
            rows = logits.flatten(0, -2)[counted]
            greatest, ranked = rows.topk(len(self._hits))
            self._max_logits += greatest[:, 0].to(self._max_logits.dtype).sum()
            self._hits += (ranked == targets[:, None]).sum(dim=0)
            predictions = ranked[:, 0]
            self._class_hits += targets[predictions == targets].bincount(minlength=len(self._class_hits))
            if self._bias is not None and self.options.per_sample:
                without_bias = (rows - self._bias).argmax(dim=1)
        self._labels.update(targets)
        if self.options.per_sample or self._caches is not None:
            self._cache.append(features.flatten(0, -2)[counted], targets, predictions, without_bias)

    def measurement(
        self,
        weight: Tensor | None,
        bias: Tensor | None,
        train_moments: ClassMoments | None,
        ood_means: dict[str, Tensor],
        provenance: Provenance,
        train_layers: Mapping[str, ClassMoments] | None = None,
        *,
        predicted: bool = False,
    ) -> Measurement:
        """Return the measurement, with one warning that gives the reasons for undefined metrics.

        Args:
            weight: W (K, d) of the classifier that computed the logits; None without a classifier.
            bias: b (K,), or None.
            train_moments: Moments of the train split, if another split is measured.
            ood_means: Mean feature of the out-of-distribution data, under the key ``""``, and that of each layer.
            provenance: Origin of the data.
            train_layers: Moments of each layer on the train split, if another split is measured.
            predicted: Whether the targets are the predictions of the classifier; its accuracy is then meaningless.
        """
        moments, options = self.moments, self.options
        metrics, undefined = measure_moments(moments, weight, bias, ood_means.get(""), options)
        accuracies = without_undefined(
            {} if weight is None or predicted else self._accuracies(), [] if moments.counts.any() else [NO_SAMPLE]
        )
        samples, residual_norms = SampleValues.without_samples(moments.num_classes), torch.empty(0)
        if options.per_sample:
            samples = measure_samples(self._cache, weight, moments, train_moments or moments, options)
            if weight is not None:
                residual_norms = mean_residual_norms(self._cache, moments, weight, bias)
        sample_features, sample_targets = self._cache.sample(SAMPLE_SIZE)
        of_layers = {
            layer: measure_moments(of_layer, None, None, ood_means.get(layer), options)
            for layer, of_layer in self.layers.items()
        }
        probes, train_layers = MetricValues({}, {}), train_layers or {}
        if self._caches is not None:
            probes = probe_errors(self._cache, train_moments or moments, options)
            for layer, cache in self._layer_caches.items():
                errors = probe_errors(cache, train_layers.get(layer, self.layers[layer]), options)
                values, reasons = of_layers[layer]
                of_layers[layer] = MetricValues(in_order(values | errors.metrics), in_order(reasons | errors.undefined))
        if self._layer_caches:
            of_blocks = [values["ncc_error"] for values, _ in of_layers.values()]
            probes.metrics["effective_depth"] = effective_depth([*of_blocks, probes.metrics["ncc_error"]])
        undefined |= accuracies.undefined | samples.undefined | probes.undefined
        layers_undefined = {layer: reasons for layer, (_, reasons) in of_layers.items() if reasons}
        warn_of_undefined(undefined, layers_undefined, depth=5)
        if predicted:
            undefined |= dict.fromkeys(self._accuracies(), "the labels are the predictions of the classifier")
        return Measurement(
            metrics=in_order(metrics | accuracies.metrics | samples.metrics | probes.metrics),
            undefined=in_order(undefined),
            moments=moments,
            weight=moments.means.new_empty(0, moments.feature_dim).cpu() if weight is None else weight.cpu().clone(),
            bias=None if bias is None else bias.cpu().clone(),
            cos_margins=samples.cos_margins,
            ncc_mismatch=samples.ncc_mismatch,
            class_accuracy=self._class_hits.cpu()
            / (math.nan if weight is None or predicted else moments.counts.cpu().double()),
            mean_max_logit=math.nan if weight is None else float(self._max_logits / moments.counts.sum()),
            residual_norms=residual_norms,
            agreement_without_bias=samples.agreement_without_bias,
            sample_features=sample_features,
            sample_targets=sample_targets,
            layers={layer: values for layer, (values, _) in of_layers.items()},
            layers_undefined=layers_undefined,
            layer_moments=dict(self.layers),
            ood_means=ood_means,
            train_moments=train_moments,
            provenance=replace(provenance, labels=str(self._labels), package_version=__version__),
            options=replace(options, code=None if options.code is None else options.code.detach().cpu().clone()),
        )

    def _accuracies(self) -> dict[str, float]:
        """Return the accuracies of the classifier itself."""
        shares = (self._hits.cumsum(0).double() / self.moments.counts.sum()).tolist()
        return {"accuracy": shares[0]} | ({"accuracy_top5": shares[4]} if self.moments.num_classes > 5 else {})


def check_train_moments(train: ClassMoments, num_classes: int, feature_dim: int) -> None:
    """Raise a `ValueError` unless the moments of a train split have K classes and d dimensions."""
    if train.means.shape != (num_classes, feature_dim):
        raise ValueError(f"train must have K, d = {(num_classes, feature_dim)}, got {tuple(train.means.shape)}")
