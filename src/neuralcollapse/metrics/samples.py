"""Metrics of single samples, from features that were kept."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from neuralcollapse.metrics import sphere
from neuralcollapse.metrics.cache import FeatureCache
from neuralcollapse.metrics.measurement import Options
from neuralcollapse.metrics.moments import ClassMoments
from neuralcollapse.metrics.nc1 import rank_of_features, rank_of_gram
from neuralcollapse.metrics.nc2 import cos_margins
from neuralcollapse.metrics.nc3 import alignment
from neuralcollapse.metrics.nc4 import nearest_class_mean
from neuralcollapse.metrics.scaling import power_of_two
from neuralcollapse.metrics.statistics import ClassStatistics, class_statistics
from neuralcollapse.metrics.undefined import (
    CONSTANT,
    NO_BETWEEN,
    NO_SAMPLE,
    Reason,
    listed,
    reasons_of_moments,
    without_undefined,
)

INFORMATION_SIZE = 512  # samples of MIR and HDR, which take the eigenvalues of a matrix of that size
RELEASED_CLASSES = 4096  # above which the K × K kernels of the released MIR and HDR are not formed
_GATHERED_ELEMENTS = 2**25  # of features of single classes, in fp64, that are held at a time

_CENTRED = ("alignment", "nc2_cos_margin")
_NEAREST = ("nc4_ncc_mismatch", "nc4_ncc_mismatch_class_mean")
_INFORMATION = ("mir", "hdr", "mir_released", "hdr_released")
_ON_SPHERE = ("instance_alignment", "class_alignment", *_INFORMATION)


class SampleValues(NamedTuple):
    """Values of single samples and of classes, besides the metrics; see `Measurement`."""

    cos_margins: Tensor
    ncc_mismatch: Tensor

    @classmethod
    def of_none(cls, num_classes: int) -> SampleValues:
        """Return the values of no sample."""
        return cls(torch.empty(0), torch.full((num_classes,), torch.nan))


def measure_samples(
    cache: FeatureCache, weight: Tensor, moments: ClassMoments, reference_moments: ClassMoments, options: Options
) -> tuple[dict[str, float], dict[str, str], SampleValues]:
    """Return the metrics of single samples, the reasons of those that are not defined, and `SampleValues`.

    Args:
        cache: The samples.
        weight: W (K, d).
        moments: The moments of the samples.
        reference_moments: Those that give the class means and the centre.
        options: Which classes count, about which centre.
    """
    own, reference = (
        class_statistics(
            one,
            center=options.center,
            min_samples=options.min_samples,
            drop_classes_above=options.drop_classes_above,
        )
        for one in (moments, reference_moments)
    )
    values, undefined, samples = _relative_to(cache, weight, reference, own)
    if own.class_scatter is None:  # else it is a metric of the moments
        known = reasons_of_moments(moments, own, ["nc1_numerical_rank"])
        rank = math.nan if known else numerical_rank(cache, own)
        ranks, of_rank = without_undefined({"nc1_numerical_rank": rank}, known)
        values, undefined = values | ranks, undefined | of_rank
    return values, undefined, samples


def _relative_to(
    cache: FeatureCache, weight: Tensor, reference: ClassStatistics, own: ClassStatistics
) -> tuple[dict[str, float], dict[str, str], SampleValues]:
    """Return all of `measure_samples` but the numerical rank."""
    num_classes, device = len(weight), weight.device
    names = [*_CENTRED, *_NEAREST, *_ON_SPHERE]
    if len(reference.classes) < 2:
        reason = f"only class {int(reference.classes[0])} has samples" if len(reference.classes) else NO_SAMPLE
        return *without_undefined(dict.fromkeys(names, math.nan), dict.fromkeys(names, reason)), SampleValues.of_none(
            num_classes
        )
    _warn_of_classes_without_reference(reference, own)
    rows = weight.double()[reference.classes]
    place = torch.full((num_classes,), -1, device=device)  # of a class among those measured
    place[reference.classes] = torch.arange(len(rows), device=device)
    margins, (aligned, instances) = [], torch.zeros(2, dtype=torch.float64, device=device)
    unit_sums = torch.zeros_like(rows)
    samples, mismatches = torch.zeros(2, num_classes, dtype=torch.float64, device=device).unbind()
    zero_features = torch.zeros((), dtype=torch.int64, device=device)
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
        zero_features += (~features.any(dim=1)).sum()
    present = samples[reference.classes] > 0
    drawn, labels = (tensor.to(device) for tensor in cache.draw(INFORMATION_SIZE, place >= 0))
    information = {"": sphere.matrix_information(drawn, place[labels], rows)} if len(drawn) else {}
    if len(rows) <= RELEASED_CLASSES and len(drawn):
        information["_released"] = sphere.released_information_of_sums(unit_sums[present], rows[present])
    all_margins = torch.cat(margins).sort().values if margins else rows.new_empty(0)
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
    at_center = int(all_margins.isnan().sum())
    known = _reasons(values, reference, rows, int(zero_features), at_center, len(drawn))
    values, undefined = without_undefined(values, known)
    if "nc2_cos_margin" in known and reference.constant:
        all_margins = torch.full_like(all_margins, torch.nan)
    if "nc4_ncc_mismatch" in known:
        by_class = torch.full_like(by_class, torch.nan)
    return values, undefined, SampleValues(all_margins.cpu(), by_class.cpu())


def numerical_rank(cache: FeatureCache, own: ClassStatistics) -> float:
    """Return `nc1_numerical_rank` of the samples, from each class's own features; NaN where there are none.

    The features of as many classes as fit are gathered at a time; those of a class that does not fit in pieces.
    """
    targets, feature_dim = cache.targets, own.class_means.shape[1]
    order = torch.argsort(targets, stable=True)
    ends = torch.bincount(targets, minlength=int(own.classes.max()) + 1 if len(own.classes) else 0).cumsum(0)
    members = [
        order[int(ends[k]) - n : int(ends[k])] for k, n in zip(own.classes.tolist(), own.counts.tolist(), strict=True)
    ]
    most = max(1, _GATHERED_ELEMENTS // feature_dim)
    ranks: list[Tensor] = []
    for group in _groups(members, most):
        if len(group[0]) > max(most, feature_dim):
            unit = power_of_two(own.class_means[len(ranks)], own.within_class_variances[len(ranks)].sqrt())
            pieces = (cache.take(piece, unit.device).double() * unit for piece in group[0].split(most))
            gram = sum((piece.T @ piece for piece in pieces), start=unit.new_zeros(feature_dim, feature_dim))
            ranks.append(rank_of_gram(gram, feature_dim, feature_dim))
            continue
        places, ranking = torch.cat(group).sort()
        gathered = cache.take(places, own.counts.device).double()
        gathered = gathered[ranking.argsort().to(gathered.device)]  # class after class
        ranks += [rank_of_features(features) for features in gathered.split([len(one) for one in group])]
    return float(torch.stack(ranks).mean()) if ranks else math.nan


def _groups(members: list[Tensor], most: int) -> Iterator[list[Tensor]]:
    """Yield members in groups with at most `most` samples together; a larger one is a group by itself."""
    group: list[Tensor] = []
    held = 0
    for one in members:
        if group and held + len(one) > most:
            yield group
            group, held = [], 0
        group.append(one)
        held += len(one)
    if group:
        yield group


def _reasons(
    values: dict[str, float],
    reference: ClassStatistics,
    rows: Tensor,
    zero_features: int,
    at_center: int,
    drawn: int,
) -> dict[str, str]:
    """Return the reason of each value that is not defined."""
    known: dict[str, str] = {}
    if reference.constant:
        known = dict.fromkeys((*_CENTRED, *_NEAREST), CONSTANT)
    elif not reference.centred_means.any():
        known = dict.fromkeys(_NEAREST, NO_BETWEEN)
    for reason, names in _of_single_samples(reference, rows, zero_features, at_center, drawn):
        for name in names:
            if not math.isfinite(values.get(name, 0.0)):
                known.setdefault(name, reason)
    return known


def _of_single_samples(
    reference: ClassStatistics, rows: Tensor, zero_features: int, at_center: int, drawn: int
) -> Iterator[Reason]:
    """Yield what leaves a metric of single samples without a value, if it has none."""
    everything = [*_CENTRED, *_NEAREST, *_ON_SPHERE]
    if not drawn:
        yield "no sample of a class that has a mean was measured", everything
    if zero_features:
        yield f"{zero_features:,} features are zero and have no direction", _ON_SPHERE
    if bool((zero := ~rows.any(dim=1)).any()):
        yield f"rows of the weight are zero (classes {listed(reference.classes[zero].tolist())})", _ON_SPHERE
    if bool((rows - rows.mean(dim=0)).isclose(rows.new_zeros(()), atol=0).all(dim=1).any()):
        yield "a row of the weight is the mean row, and has no direction from it", _CENTRED
    if at_center:
        yield f"{at_center:,} features are at the centre, or the rows of their classes are the mean row", _CENTRED
    yield "the features, or the rows of the weight, have one direction: there is no entropy to share", _INFORMATION


def _warn_of_classes_without_reference(reference: ClassStatistics, own: ClassStatistics) -> None:
    without = ~torch.isin(own.classes, reference.classes)
    if bool(without.any()):
        classes, samples = listed(own.classes[without].tolist()), int(own.counts[without].sum())
        warnings.warn(
            f"{samples:,} samples of classes that the train split lacks ({classes}) are left out of the metrics of "
            "single samples",
            stacklevel=6,
        )
