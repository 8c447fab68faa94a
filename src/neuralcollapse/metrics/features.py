"""Measurement of features in memory or in files, without a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn import functional

from neuralcollapse._checks import check_at_least, check_device, check_finite, check_floating, compute_dtype
from neuralcollapse.metrics.arrays import Rows, Source, open_rows
from neuralcollapse.metrics.gathering import Gathered, check_train_moments
from neuralcollapse.metrics.measurement import Measurement, Provenance
from neuralcollapse.metrics.moments import ClassMoments
from neuralcollapse.metrics.samples import FeatureCache
from neuralcollapse.metrics.statistics import MeasureOptions
from neuralcollapse.metrics.unlabelled import UnlabelledMeasurement, measure_unlabelled

_BLOCK_ELEMENTS = 2**22  # maximum number of features, and of logits, of a block


@overload
def measure_features(
    features: Source,
    labels: None = None,
    *,
    device: torch.device | str | None = None,
    options: MeasureOptions = ...,
    provenance: Provenance = ...,
    progress: bool = True,
) -> UnlabelledMeasurement: ...


@overload
def measure_features(
    features: Source,
    labels: Source | Literal["predicted"],
    weight: Source | None = None,
    bias: Source | None = None,
    *,
    num_classes: int | None = None,
    train: ClassMoments | None = None,
    ood: Source | None = None,
    device: torch.device | str | None = None,
    options: MeasureOptions = ...,
    provenance: Provenance = ...,
    progress: bool = True,
) -> Measurement: ...


@torch.no_grad()
def measure_features(
    features: Source,
    labels: Source | Literal["predicted"] | None = None,
    weight: Source | None = None,
    bias: Source | None = None,
    *,
    num_classes: int | None = None,
    train: ClassMoments | None = None,
    ood: Source | None = None,
    device: torch.device | str | None = None,
    options: MeasureOptions = MeasureOptions(),
    provenance: Provenance = Provenance(),
    progress: bool = True,
) -> Measurement | UnlabelledMeasurement:
    """Measure neural collapse of stored features, as `measure` does for a model.

    Without labels, only metrics that do not need labels are measured: norms, ranks, and spread over the sphere.

    Each array is a tensor, a NumPy array, or the path of a ``.npy``, ``.npz``, ``.safetensors`` or ``.parquet`` file.
    Append ``":NAME"`` to the path to select one of several arrays in the file. In a Parquet file, the name is a column
    of numbers or of lists of equal length, or a pattern such as ``"f*"`` that matches several columns of numbers.

    Files are memory-mapped and read block by block. With ``per_sample=False``, only the moments, the labels and one
    block are in memory. The metrics of single samples take about 100 bytes per sample in addition, and
    ``nc1_numerical_rank`` takes up to 1 GB. Features of Parquet and of compressed .npz files are cached: up to
    ``options.cache_bytes`` in memory, the rest in a temporary file.

    The logits, for predictions and accuracies, are features · Wᵀ + b in the dtype of the features, at least fp32.

    Args:
        features: (N, d) floating point; (B, T, d) with labels (B, T), or (B, d, H, W) with labels (B, H, W), such as
            the features of pixels.
        labels: Integer classes in [0, K). Samples with the label ``options.ignore_index`` are left out. With
            ``"predicted"``, the class of each sample is the one that the classifier predicts, and the accuracy is
            absent. With None, all other arguments that need labels must be left out, and ``dtype`` is the only option
            that has an effect.
        weight: W (K, d) of the classifier. Without it, accuracies and metrics that need a weight are left out.
        bias: b (K,) of the classifier; None for 0.
        num_classes: K, without a weight; by default the greatest label plus 1.
        train: The ``moments`` of the measurement of the train split, if another split is measured; as for `measure`.
        ood: Out-of-distribution features with the same d, for ``nc5_ood``.
        device: Device of the computation; by default that of ``features`` if it is a tensor, else the CPU.
        options: As for `measure`; ``layer_pooling`` has no effect.
        provenance: Epoch and split for the record, and a name for the model.
        progress: Show a progress bar.

    Returns:
        The measurement; without labels an `UnlabelledMeasurement`. Undefined metrics are NaN; the reasons are in
        ``undefined`` and in one warning. Without labels, metrics that need them are absent, and ``undefined`` has a
        reason for each.

    Raises:
        ValueError: if labels are needed and not given, or ``labels="predicted"`` is given without a weight; if an array
            has the wrong shape or type, labels are out of range, features are not finite (the message names the block),
            a bias or ``num_classes`` does not fit the weight, or a file has another format.
        OSError: if a file cannot be read.

    Examples:
        >>> features = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
        >>> weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
        >>> measurement = measure_features(features, torch.arange(60) % 3, weight, progress=False)
        >>> measurement.moments.counts
        tensor([20, 20, 20])
    """
    rows = open_rows("features", features)
    device = _device(device, features)
    check_floating("features", torch.empty(0, dtype=rows.dtype))
    if labels is None:
        _check_needs_no_labels(weight=weight, bias=bias, num_classes=num_classes, train=train, ood=ood)
        positions, feature_dim = _shape(rows)
        moments = ClassMoments(2, feature_dim, dtype=options.dtype, device=device)
        size = max(1, _BLOCK_ELEMENTS // _row_elements(rows))
        blocks = (_last_dimension(block.to(device)) for block in _blocks(rows, size, progress, "features"))
        return measure_unlabelled(blocks, positions.numel(), moments, provenance)
    predicted = isinstance(labels, str) and labels == "predicted"
    targets = None if predicted else open_rows("labels", labels).whole().to(device)
    feature_dim = _feature_dim(rows, targets)
    matrix, offset = _classifier(weight, bias, feature_dim, device)
    if predicted and matrix is None:
        raise ValueError("weight must be given with labels='predicted', which are the predictions of its classifier")
    num_classes = _num_classes(num_classes, matrix, targets, options.ignore_index)
    if train is not None:
        if not isinstance(train, ClassMoments):
            raise ValueError(f"train must be the moments of a measurement, got {type(train).__name__}")
        check_train_moments(train, num_classes, feature_dim)
    is_view = rows.is_view and len(rows.shape) == 2 and options.ignore_index is None
    is_view &= device == _device(None, features)
    views = rows.whole() if is_view and options.per_sample else None
    with FeatureCache(options.cache_bytes, views=views) as cache:
        gathered = Gathered(num_classes, feature_dim, device, cache, options, offset)
        start, size = 0, max(1, _BLOCK_ELEMENTS // max(_row_elements(rows), num_classes))
        for block in _blocks(rows, size, progress, "features"):
            values = _last_dimension(block.to(device))
            logits = _logits(values, matrix, offset)
            if targets is None:
                assert logits is not None  # there is a weight
                of_block = logits.argmax(dim=-1)
            else:
                of_block, start = targets[start : start + len(block)].long(), start + len(block)
            gathered.add(values, of_block, logits)
        ood_means = {} if ood is None else {"": _mean_feature(ood, feature_dim, device, progress)}
        return gathered.measurement(matrix, offset, train, ood_means, provenance, predicted=predicted)


def _check_needs_no_labels(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None:
            hint = "; labels='predicted' uses the predictions of the classifier" if name == "weight" else ""
            raise ValueError(f"labels must be given with {name}{hint}")


def _device(device: torch.device | str | None, features: Source) -> torch.device:
    check_device(device)
    if device is None:
        return features.device if isinstance(features, Tensor) else torch.device("cpu")
    return torch.device(device)


def _row_elements(rows: Rows) -> int:
    return max(1, torch.Size(rows.shape[1:]).numel())


def _shape(rows: Rows) -> tuple[torch.Size, int]:
    """Return the shape of the sample positions, (N,), (B, T) or (B, H, W), and d."""
    shape, expected = rows.shape, "(N, d), (B, T, d) or (B, d, H, W)"
    if len(shape) not in (2, 3, 4):
        raise ValueError(f"features must be of shape {expected}, got {shape}")
    feature_dim = shape[1] if len(shape) == 4 else shape[-1]
    check_at_least("the number of features", feature_dim, 1)
    return torch.Size((shape[0], *shape[2:]) if len(shape) == 4 else shape[:-1]), feature_dim


def _feature_dim(rows: Rows, targets: Tensor | None) -> int:
    """Return d; raise a `ValueError` unless the shapes of features and labels fit."""
    positions, feature_dim = _shape(rows)
    if targets is None:
        return feature_dim
    if targets.shape != positions:
        raise ValueError(
            f"labels must be of shape {tuple(positions)} for features of shape {tuple(rows.shape)}, got "
            f"{tuple(targets.shape)}"
        )
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"labels must be integer class indices, got {targets.dtype}")
    return feature_dim


def _classifier(
    weight: Source | None, bias: Source | None, feature_dim: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Return the checked weight (K, d) and bias (K,)."""
    if weight is None:
        if bias is not None:
            raise ValueError("bias must come with the weight of the same classifier, got weight = None")
        return None, None
    matrix = open_rows("weight", weight).whole().to(device)
    check_floating("weight", matrix)
    check_finite("weight", matrix)
    if matrix.ndim != 2 or matrix.shape[1] != feature_dim or len(matrix) < 2:
        raise ValueError(f"weight must be of shape (K, {feature_dim}) with K ≥ 2, got {tuple(matrix.shape)}")
    if bias is None:
        return matrix, None
    offset = open_rows("bias", bias).whole().to(device)
    check_floating("bias", offset)
    check_finite("bias", offset)
    if offset.shape != matrix.shape[:1]:
        raise ValueError(f"bias must be of shape ({len(matrix)},), got {tuple(offset.shape)}")
    return matrix, offset


def _num_classes(
    num_classes: int | None, weight: Tensor | None, targets: Tensor | None, ignore_index: int | None
) -> int:
    if weight is not None:
        if num_classes not in (None, len(weight)):
            raise ValueError(f"num_classes must be the number of rows of weight, {len(weight)}, got {num_classes}")
        return len(weight)
    if num_classes is not None:
        check_at_least("num_classes", num_classes, 2)
        return num_classes
    assert targets is not None  # predicted labels are given with a weight
    counted = targets if ignore_index is None else targets[targets != ignore_index]
    if not len(counted) or (greatest := int(counted.max())) < 1:
        raise ValueError("labels must contain at least two classes, or num_classes must be given")
    return greatest + 1


def _blocks(rows: Rows, size: int, progress: bool, description: str) -> Iterator[Tensor]:
    """Yield blocks of rows, with a progress bar of rows."""
    from tqdm.auto import tqdm

    with tqdm(total=rows.shape[0], desc=description, unit_scale=True, disable=not progress, leave=False) as bar:
        for block in rows.read(size):
            yield block
            bar.update(len(block))


def _last_dimension(block: Tensor) -> Tensor:
    """Return features (B, d, H, W) as (B, H, W, d), and features of other shapes unchanged."""
    return block.movedim(1, -1) if block.ndim == 4 else block


def _logits(features: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
    if weight is None:
        return None
    dtype = compute_dtype(features.dtype)
    return functional.linear(features.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _mean_feature(ood: Source, feature_dim: int, device: torch.device, progress: bool) -> Tensor:
    """Return the mean (d,) of out-of-distribution features in fp64."""
    rows = open_rows("ood", ood)
    dimension = rows.shape[1] if len(rows.shape) == 4 else rows.shape[-1]
    if len(rows.shape) not in (2, 3, 4) or dimension != feature_dim or not rows.shape[0]:
        raise ValueError(f"ood must be features with {feature_dim} dimensions, got an array of shape {rows.shape}")
    total, count = torch.zeros(feature_dim, dtype=torch.float64, device=device), 0
    for block in _blocks(rows, max(1, _BLOCK_ELEMENTS // _row_elements(rows)), progress, "ood"):
        samples = _last_dimension(block).flatten(0, -2).to(device, torch.float64)
        total, count = total + samples.sum(dim=0), count + len(samples)
    return total / count
