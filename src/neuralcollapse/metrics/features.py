"""Measurement of features in memory or in files, without a model."""

from __future__ import annotations

from collections.abc import Iterator

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

_BLOCK_ELEMENTS = 2**22  # maximum number of features, and of logits, of a block


@torch.no_grad()
def measure_features(
    features: Source,
    labels: Source,
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
) -> Measurement:
    """Measure neural collapse of features, as `measure` does of a model.

    Each array is a tensor, a NumPy array, or the path of a file: ``.npy``, ``.npz``, ``.safetensors`` or ``.parquet``,
    with ``":NAME"`` after the path for one of several arrays in it. In a Parquet file the name is that of a column, of
    numbers or of lists of one length, or a pattern such as ``"f*"`` of several columns of numbers. Files are
    memory-mapped and read block by block: besides the moments, the memory is about 100 bytes per sample. Features of
    Parquet and of compressed .npz files take ``options.cache_bytes`` besides, and more go to a temporary file.

    The logits, for predictions and accuracies, are features · Wᵀ + b in the dtype of the features, at least fp32.

    Args:
        features: (N, d) floating point; (B, T, d) with labels (B, T), or (B, d, H, W) with labels (B, H, W), such as
            the features of pixels.
        labels: Integer classes in [0, K). ``options.ignore_index`` leaves samples out.
        weight: W (K, d) of the classifier. Without it, metrics that need one are left out, and accuracies with them.
        bias: b (K,) of the classifier; None for 0.
        num_classes: K, without a weight; by default the greatest label plus 1.
        train: The ``moments`` of the measurement of the train split, if this is another one; as for `measure`.
        ood: Out-of-distribution features of the same d, for ``nc5_ood``.
        device: Device that computes; by default that of ``features``, if it is a tensor, else the CPU.
        options: As for `measure`; ``layer_pooling`` has no effect.
        provenance: Epoch and split for the record, and a name for the model.
        progress: Show a progress bar.

    Returns:
        The measurement. Undefined metrics are NaN; ``undefined`` has their reasons, and so has one warning.

    Raises:
        ValueError: if an array has another shape or type, labels are out of range, features are not finite (the message
            names the block), a bias or ``num_classes`` does not belong to the weight, or a file is of another kind.
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
    targets = open_rows("labels", labels).whole().to(device)
    feature_dim = _feature_dim(rows, targets)
    matrix, offset = _classifier(weight, bias, feature_dim, device)
    num_classes = _num_classes(num_classes, matrix, targets, options.ignore_index)
    if train is not None:
        if not isinstance(train, ClassMoments):
            raise ValueError(f"train must be the moments of a measurement, got {type(train).__name__}")
        check_train_moments(train, num_classes, feature_dim)
    targets = targets.long()
    is_view = rows.is_view and len(rows.shape) == 2 and options.ignore_index is None
    is_view &= device == _device(None, features)
    with FeatureCache(None if is_view else options.cache_bytes) as cache:
        gathered = Gathered(num_classes, feature_dim, device, cache, options, offset)
        start, size = 0, max(1, _BLOCK_ELEMENTS // max(_row_elements(rows), num_classes))
        for block in _blocks(rows, size, progress, "features"):
            of_block, start = targets[start : start + len(block)], start + len(block)
            values = _last_dimension(block.to(device))
            gathered.add(values, of_block, _logits(values, matrix, offset))
        ood_means = {} if ood is None else {"": _mean_feature(ood, feature_dim, device, progress)}
        return gathered.measurement(matrix, offset, train, ood_means, provenance)


def _device(device: torch.device | str | None, features: Source) -> torch.device:
    check_device(device)
    if device is None:
        return features.device if isinstance(features, Tensor) else torch.device("cpu")
    return torch.device(device)


def _row_elements(rows: Rows) -> int:
    return max(1, torch.Size(rows.shape[1:]).numel())


def _feature_dim(rows: Rows, targets: Tensor) -> int:
    """Return d; raise unless features and labels fit."""
    shape, expected = rows.shape, "(N, d), (B, T, d) or (B, d, H, W)"
    if len(shape) not in (2, 3, 4):
        raise ValueError(f"features must be of shape {expected}, got {shape}")
    positions = (shape[0], *shape[2:]) if len(shape) == 4 else shape[:-1]
    if tuple(targets.shape) != positions:
        raise ValueError(
            f"labels must be of shape {tuple(positions)} for features of shape {tuple(shape)}, got "
            f"{tuple(targets.shape)}"
        )
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"labels must be integer class indices, got {targets.dtype}")
    feature_dim = shape[1] if len(shape) == 4 else shape[-1]
    check_at_least("the number of features", feature_dim, 1)
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


def _num_classes(num_classes: int | None, weight: Tensor | None, targets: Tensor, ignore_index: int | None) -> int:
    if weight is not None:
        if num_classes not in (None, len(weight)):
            raise ValueError(f"num_classes must be that of the weight, {len(weight)}, got {num_classes}")
        return len(weight)
    if num_classes is not None:
        check_at_least("num_classes", num_classes, 2)
        return num_classes
    counted = targets if ignore_index is None else targets[targets != ignore_index]
    if not len(counted) or (greatest := int(counted.max())) < 1:
        raise ValueError("labels must be of at least two classes, or num_classes must be given")
    return greatest + 1


def _blocks(rows: Rows, size: int, progress: bool, description: str) -> Iterator[Tensor]:
    """Yield blocks of rows, with a progress bar of rows."""
    from tqdm.auto import tqdm

    with tqdm(total=rows.shape[0], desc=description, unit_scale=True, disable=not progress, leave=False) as bar:
        for block in rows.read(size):
            yield block
            bar.update(len(block))


def _last_dimension(block: Tensor) -> Tensor:
    """Return features (B, d, H, W) as (B, H, W, d), others as they are."""
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
        raise ValueError(f"ood must be features of {feature_dim} dimensions, got an array of shape {rows.shape}")
    total, count = torch.zeros(feature_dim, dtype=torch.float64, device=device), 0
    for block in _blocks(rows, max(1, _BLOCK_ELEMENTS // _row_elements(rows)), progress, "ood"):
        samples = _last_dimension(block).flatten(0, -2).to(device, torch.float64)
        total, count = total + samples.sum(dim=0), count + len(samples)
    return total / count
