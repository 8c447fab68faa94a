"""Metrics of single samples (entries of the catalogue that have features as inputs), from a cache of features."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from neuralcollapse._checks import listed
from neuralcollapse.catalogue import METRICS, Metric
from neuralcollapse.metrics.alignment import kernel_entropies, unit_class_sums
from neuralcollapse.metrics.collapse import find_function
from neuralcollapse.metrics.moments import ClassMoments
from neuralcollapse.metrics.nc1 import rank_of_features, rank_of_gram
from neuralcollapse.metrics.nc4 import nearest_class_mean
from neuralcollapse.metrics.scaling import power_of_two
from neuralcollapse.metrics.statistics import ClassStatistics, MeasureOptions, class_statistics
from neuralcollapse.metrics.undefined import (
    CONSTANT,
    EQUAL_MEANS,
    Condition,
    conditions_of_moments,
    one_class,
    without_undefined,
)

INFORMATION_SIZE = 512  # number of samples for MIR and HDR, which need the eigenvalues of a matrix of that size
_FIRST_CLASSES = 2**14  # size of a tensor of classes before it doubles
_GATHERED_ELEMENTS = 2**25  # maximum number of features of single classes that are gathered at a time, in fp64


class _InFile(NamedTuple):
    """Location of the features of a batch in a file, which is mapped into memory only while they are used."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: torch.Size

    def read(self) -> Tensor:
        """Return the features, mapped into memory until the tensor is freed."""
        size = math.prod(self.shape) * self.dtype.itemsize
        mapped = np.memmap(self.path, mode="r+", offset=self.offset, shape=(size,))
        return torch.from_numpy(mapped).view(self.dtype).view(self.shape)


class _Classes:
    """Classes of all samples in one tensor, whose size doubles when it is full."""

    def __init__(self) -> None:
        self._values: Tensor | None = None
        self._count = 0

    def add(self, classes: Tensor) -> None:
        """Add the classes (n,) of a batch."""
        if self._values is None:
            self._values = classes.new_empty(max(_FIRST_CLASSES, len(classes)))
        if (end := self._count + len(classes)) > len(self._values):
            self._values = torch.cat([self._values[: self._count], self._values.new_empty(2 * end - self._count)])
        self._values[self._count : end] = classes
        self._count = end

    def __getitem__(self, samples: slice) -> Tensor:
        return torch.empty(0, dtype=torch.int64) if self._values is None else self._values[samples]


class CachedBatch(NamedTuple):
    """Features (N, d), targets (N,), predicted classes (N,), and classes predicted by the logits without the bias."""

    features: Tensor
    targets: Tensor
    predictions: Tensor
    without_bias: Tensor


class FeatureCache:
    """Cache of batches on their device; features beyond ``max_bytes`` are written to a temporary file.

    The cache is a context manager that removes the file on exit.

    Args:
        max_bytes: Maximum size of the features in memory.
        folder: Folder of the temporary file; by default that of the system.
        views: (N, d) all features, if they are in the caller's memory or in a mapped file. Features of added batches
            are then read from it instead of being cached.

    Examples:
        >>> with FeatureCache(max_bytes=0) as cache:
        ...     cache.append(torch.eye(2), torch.tensor([0, 1]), torch.tensor([1, 1]))
        ...     [batch.features.sum() for batch in cache]
        [tensor(2.)]
    """

    def __init__(self, max_bytes: int = 2**31, folder: str | None = None, views: Tensor | None = None) -> None:
        self.max_bytes = max_bytes
        self._folder = folder
        self._views = views
        # Small tensors allocated between large temporary ones, such as logits, would prevent the allocator from reusing
        # the memory of the latter. Therefore only features are stored as one tensor per batch.
        self._features: list[Tensor | _InFile | None] = []  # of each batch; None for views
        self._ends = [0]  # number of samples before each batch, and the total number
        self._targets, self._predictions, self._without_bias = _Classes(), _Classes(), _Classes()
        self._bytes = 0
        self._path: Path | None = None

    def __enter__(self) -> FeatureCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._features.clear()
        self._views = None
        if self._path is not None:
            self._path.unlink()
            self._path = None

    def append(
        self, features: Tensor, targets: Tensor, predictions: Tensor, without_bias: Tensor | None = None
    ) -> None:
        """Add a batch; ``without_bias`` is None for a classifier without bias."""
        stored: Tensor | _InFile | None = None
        if self._views is None:
            features = features.detach()
            size = features.numel() * features.element_size()
            in_memory = not size or self._bytes + size <= self.max_bytes
            self._bytes += size if in_memory else 0
            stored = features if in_memory else self._to_disk(features.cpu().contiguous())
        self._features.append(stored)
        self._ends.append(self._ends[-1] + len(targets))
        self._targets.add(targets)
        self._predictions.add(predictions)
        self._without_bias.add(predictions if without_bias is None else without_bias)

    def __iter__(self) -> Iterator[CachedBatch]:
        return map(self._read, range(len(self._features)))

    @property
    def targets(self) -> Tensor:
        """Targets (N,) of all samples, in their order."""
        return self._targets[: self._ends[-1]].cpu().long()

    def take(self, indices: Tensor, device: torch.device) -> Tensor:
        """Return the features of some samples on a device.

        Args:
            indices: (n,) indices of samples, ascending.
            device: The device.
        """
        starts = torch.tensor(self._ends)
        bounds = torch.searchsorted(indices.contiguous(), starts).tolist()
        rows = [
            _rows(self._features_of(number), indices[first:end] - start).to(device)
            for number, (start, first, end) in enumerate(zip(starts.tolist(), bounds, bounds[1:], strict=False))
            if first < end
        ]
        return torch.cat(rows) if rows else torch.empty(0, self._features_of(0).shape[1], device=device)

    def draw(self, size: int, eligible: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return features and targets of random samples, in their order; the draw is the same for the same data.

        Args:
            size: Maximum number of samples.
            eligible: (K,) bool, classes whose samples may be drawn; by default all.
        """
        if not self._features:
            return torch.empty(0, 0), torch.empty(0, dtype=torch.int64)
        targets = self.targets
        indices = torch.arange(len(targets)) if eligible is None else eligible.cpu()[targets].nonzero().flatten()
        order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))
        drawn = indices[order[:size]].sort().values
        return self.take(drawn, torch.device("cpu")), targets[drawn]

    def sample(self, size: int) -> tuple[Tensor, Tensor]:
        """Return the result of `draw` with features in fp16, or in bf16 or their own dtype if the range requires it."""
        rows, targets = self.draw(size)
        greatest = float(rows.abs().max()) if len(rows) else 0.0
        for dtype in (torch.float16, torch.bfloat16, rows.dtype):
            limits = torch.finfo(dtype)
            if greatest == 0 or limits.tiny / limits.eps <= greatest <= limits.max:
                return rows.to(dtype), targets
        return rows, targets

    def _read(self, number: int) -> CachedBatch:
        """Return a batch."""
        of_batch = slice(self._ends[number], self._ends[number + 1])
        classes = (self._targets[of_batch], self._predictions[of_batch], self._without_bias[of_batch])
        return CachedBatch(self._features_of(number), *classes)

    def _features_of(self, number: int) -> Tensor:
        stored = self._features[number]
        if self._views is not None:
            return self._views[self._ends[number] : self._ends[number + 1]]
        assert stored is not None
        return stored.read() if isinstance(stored, _InFile) else stored

    def _to_disk(self, features: Tensor) -> _InFile:
        """Write a tensor to the file, and return its location."""
        if self._path is None:
            with tempfile.NamedTemporaryFile(suffix=".features", dir=self._folder, delete=False) as file:
                self._path = Path(file.name)
        with self._path.open("ab") as file:
            offset = file.tell()
            features.view(torch.uint8).numpy().tofile(file)
        return _InFile(self._path, offset, features.dtype, features.shape)


def _rows(features: Tensor, indices: Tensor) -> Tensor:
    return features[indices.to(features.device)]


class SampleValues(NamedTuple):
    """Metrics of single samples, the reasons for undefined ones, and the values of samples and classes.

    Attributes:
        metrics: Dictionary from name to value.
        undefined: Dictionary from name to reason.
        cos_margins: (N,) cosine margins, ascending.
        ncc_mismatch: (K,) share of samples of each class whose nearest class mean is not the predicted class.
        agreement_without_bias: Share of samples whose nearest class mean is the class of the greatest entry of Wh.
    """

    metrics: dict[str, float]
    undefined: dict[str, str]
    cos_margins: Tensor
    ncc_mismatch: Tensor
    agreement_without_bias: float = math.nan

    @classmethod
    def without_samples(
        cls, num_classes: int, metrics: dict[str, float] | None = None, undefined: dict[str, str] | None = None
    ) -> SampleValues:
        """Return the values of a measurement without samples."""
        return cls(metrics or {}, undefined or {}, torch.empty(0), torch.full((num_classes,), torch.nan))


def measure_samples(
    cache: FeatureCache, weight: Tensor | None, moments: ClassMoments, train: ClassMoments, options: MeasureOptions
) -> SampleValues:
    """Return the metrics of single samples.

    Args:
        cache: The samples.
        weight: W (K, d); None without a classifier, in which case only the numerical rank is measured.
        moments: Moments of the samples.
        train: Moments that give the class means and the centre.
        options: Options that select classes, the centre, and whether to include MIR and HDR.
    """
    measured, reference = class_statistics(moments, options), class_statistics(train, options)
    entries = [
        entry
        for entry in METRICS.values()
        if entry.of_samples and "class_scatter" not in entry.inputs and (options.information or not entry.optional)
    ]
    if weight is None:
        values = SampleValues.without_samples(moments.num_classes)
    elif len(reference.classes) < 2:
        nothing = dict.fromkeys([entry.name for entry in entries], math.nan)
        values = SampleValues.without_samples(len(weight), *without_undefined(nothing, [one_class(reference.classes)]))
    else:
        _warn_of_classes_without_mean(measured, reference)
        values = _measure_against(reference, cache, weight, entries)
    if measured.class_scatter is not None:  # the numerical rank is then computed from moments
        return values
    conditions = list(conditions_of_moments(moments, measured))
    defined = not without_undefined({"nc1_numerical_rank": 1.0}, conditions)[1]
    rank = numerical_rank(cache, measured) if defined else math.nan
    metrics, undefined = without_undefined({"nc1_numerical_rank": rank}, conditions)
    return values._replace(metrics=values.metrics | metrics, undefined=values.undefined | undefined)


@dataclass(frozen=True)
class _Pass:
    """Results of one pass over the samples of the classes that have a reference mean.

    Attributes:
        values: Values (N,) of each function over samples.
        targets: (N,) classes, as indices into the classes of the reference.
        unit_sums: (K, d) sums of the unit features of each class.
        zero_features: Number of features that are zero.
        agreements: Number of samples whose nearest class mean is the class that Wh predicts.
    """

    values: dict[str, Tensor]
    targets: Tensor
    unit_sums: Tensor
    zero_features: int
    agreements: int

    def mean(self, entry: Metric) -> Tensor:
        """Return the mean over samples, or over classes."""
        values = self.values[entry.function]
        return self.class_means(entry.function).nanmean() if entry.statistic == "class mean" else values.mean()

    def class_means(self, function: str) -> Tensor:
        """Return the means (K,) over the samples of each class; NaN for a class without samples."""
        sums = self.unit_sums.new_zeros(len(self.unit_sums)).index_add_(0, self.targets, self.values[function])
        return sums / self.targets.bincount(minlength=len(sums))


def _measure_against(
    reference: ClassStatistics, cache: FeatureCache, weight: Tensor, entries: list[Metric]
) -> SampleValues:
    """Return the metrics of all samples of the classes that have a reference mean."""
    rows = weight.double()[reference.classes]
    index = torch.full((len(weight),), -1, device=weight.device)  # index of each class in the reference
    index[reference.classes] = torch.arange(len(rows), device=weight.device)
    samples = _pass_over(cache, index, rows, reference, [entry for entry in entries if entry.over == "samples"])
    present = samples.targets.unique()
    totals: dict[str, Any] = {"unit_class_sums": samples.unit_sums[present], "present_weight": rows[present]}
    if len(present) and any("entropies" in entry.inputs for entry in entries):
        drawn, classes = (tensor.to(weight.device) for tensor in cache.draw(INFORMATION_SIZE, index >= 0))
        totals["entropies"] = kernel_entropies(drawn, index[classes], rows)
    metrics = {}
    for entry in entries:
        if entry.over == "samples":
            metrics[entry.name] = float(samples.mean(entry))
        elif {*entry.inputs} <= totals.keys():
            metrics[entry.name] = float(find_function(entry.function)(*(totals[name] for name in entry.inputs)))
        else:
            metrics[entry.name] = math.nan
    margins = samples.values["nc2.cos_margins"].sort().values
    metrics, undefined = without_undefined(metrics, _conditions(reference, rows, samples, int(margins.isnan().sum())))
    if reference.constant:
        margins = torch.full_like(margins, torch.nan)
    mismatch, agreement = torch.full((len(weight),), torch.nan, dtype=torch.float64), math.nan
    if "nc4_ncc_mismatch" not in undefined:
        mismatch[reference.classes.cpu()] = samples.class_means("nc4.mismatches").cpu()
        agreement = samples.agreements / len(samples.targets)
    return SampleValues(metrics, undefined, margins.cpu(), mismatch, agreement)


def _pass_over(
    cache: FeatureCache, index: Tensor, rows: Tensor, reference: ClassStatistics, entries: list[Metric]
) -> _Pass:
    """Return the values of each function over samples."""
    functions = {entry.function: entry.inputs for entry in entries}
    total, filled = len(cache.targets), 0
    values: dict[str, Tensor] = {}  # one tensor for all samples, for the reason given in `FeatureCache`
    targets, unit_sums, zero_features, agreements = index.new_empty(total), torch.zeros_like(rows), 0, 0
    shared = {"weight": rows, "center": reference.center, "class_means": reference.class_means}
    for batch in cache:
        features, labels, predictions, without_bias = (tensor.to(index.device) for tensor in batch)
        measured = index[labels] >= 0
        features, labels, predictions = features[measured].double(), labels[measured], predictions[measured]
        without_bias = without_bias[measured]
        if not len(features):
            continue
        inputs = shared | {"features": features, "targets": index[labels], "predictions": index[predictions]}
        of_batch = slice(filled, filled := filled + len(features))
        for name, arguments in functions.items():
            results = find_function(name)(*(inputs[argument] for argument in arguments))
            values.setdefault(name, results.new_empty(total))[of_batch] = results
        agreeing = values["nc4.mismatches"][of_batch] == 0
        if bool((changed := without_bias != predictions).any()):
            nearest = nearest_class_mean(features[changed], reference.class_means)
            agreeing[changed] = nearest == index[without_bias[changed]]
        agreements += int(agreeing.sum())
        targets[of_batch] = inputs["targets"]
        unit_sums += unit_class_sums(features, inputs["targets"], rows)
        zero_features += int((~features.any(dim=1)).sum())
    return _Pass(
        {name: values[name][:filled] if filled else rows.new_empty(0) for name in functions},
        targets[:filled],
        unit_sums,
        zero_features,
        agreements,
    )


def _conditions(
    reference: ClassStatistics, rows: Tensor, samples: _Pass, undefined_margins: int
) -> Iterator[Condition]:
    """Yield the conditions that hold, in order of priority."""
    if reference.constant:
        yield CONSTANT
    if not reference.centred_means.any():
        yield EQUAL_MEANS
    if not len(samples.targets):
        reason = "no sample of a class with a train mean was measured"
        yield Condition("no sample of a measured class", reason, False)
    if samples.zero_features:
        reason = f"{samples.zero_features:,} features are zero and have no direction"
        yield Condition("zero feature", reason, False)
    if bool((zero := ~rows.any(dim=1)).any()):
        reason = f"rows of the weight are zero (classes {listed(reference.classes[zero].tolist())})"
        yield Condition("zero row of the weight", reason, False)
    if bool((rows - rows.mean(dim=0)).isclose(rows.new_zeros(()), atol=0).all(dim=1).any()):
        reason = "a row of the weight equals the mean row, so their difference has no direction"
        yield Condition("mean row of the weight", reason, False)
    if undefined_margins:
        reason = f"{undefined_margins:,} features are at the centre, or the rows of their classes equal the mean row"
        yield Condition("sample at the centre", reason, False)
    reason = "the features, or the rows of the weight, have a single direction, so their entropy is 0"
    yield Condition("no entropy", reason, False)


def numerical_rank(cache: FeatureCache, measured: ClassStatistics) -> float:
    """Return `nc1_numerical_rank` from the features of each class; NaN without samples.

    Features are gathered for groups of classes that fit into memory; those of a larger class are gathered in parts.
    """
    targets, feature_dim = cache.targets, measured.class_means.shape[1]
    order = torch.argsort(targets, stable=True)
    ends = torch.bincount(targets, minlength=int(measured.classes.max()) + 1 if len(measured.classes) else 0).cumsum(0)
    members = [
        order[int(ends[k]) - n : int(ends[k])]
        for k, n in zip(measured.classes.tolist(), measured.counts.tolist(), strict=True)
    ]
    most = max(1, _GATHERED_ELEMENTS // feature_dim)
    ranks: list[Tensor] = []
    for group in _groups(members, most):
        if len(group[0]) > max(most, feature_dim):
            unit = power_of_two(measured.class_means[len(ranks)], measured.within_class_variances[len(ranks)].sqrt())
            pieces = (cache.take(piece, unit.device).double() * unit for piece in group[0].split(most))
            gram = sum((piece.T @ piece for piece in pieces), start=unit.new_zeros(feature_dim, feature_dim))
            ranks.append(rank_of_gram(gram, feature_dim, feature_dim))
            continue
        samples, ranking = torch.cat(group).sort()
        gathered = cache.take(samples, measured.counts.device).double()
        gathered = gathered[ranking.argsort().to(gathered.device)]  # sorted by class
        ranks += [rank_of_features(features) for features in gathered.split([len(rows) for rows in group])]
    return float(torch.stack(ranks).mean()) if ranks else math.nan


def _groups(members: list[Tensor], most: int) -> Iterator[list[Tensor]]:
    """Yield the members of classes in groups of at most ``most`` samples; a larger class forms a separate group."""
    group: list[Tensor] = []
    size = 0
    for samples in members:
        if group and size + len(samples) > most:
            yield group
            group, size = [], 0
        group.append(samples)
        size += len(samples)
    if group:
        yield group


def _warn_of_classes_without_mean(measured: ClassStatistics, reference: ClassStatistics) -> None:
    without = ~torch.isin(measured.classes, reference.classes)
    if bool(without.any()):
        classes, samples = listed(measured.classes[without].tolist()), int(measured.counts[without].sum())
        warnings.warn(
            f"{samples:,} samples of classes that the train split lacks ({classes}) are left out of the metrics of "
            "single samples",
            stacklevel=6,
        )
