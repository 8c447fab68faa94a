"""Features kept in memory, or in a temporary file, for a second pass without a second run of the model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class CachedBatch(NamedTuple):
    """Features (N, d), their targets (N,) and the predicted classes (N,)."""

    features: Tensor
    targets: Tensor
    predictions: Tensor


class FeatureCache:
    """Batches of samples on their own device; features beyond ``max_bytes`` go to a temporary file.

    It is a context manager that removes the file at its end.

    Args:
        max_bytes: Maximum size of the features kept in memory.
        folder: Folder of the temporary file; by default that of the system.

    Examples:
        >>> with FeatureCache(max_bytes=0) as cache:
        ...     cache.append(torch.eye(2), torch.tensor([0, 1]), torch.tensor([1, 1]))
        ...     [batch.features.sum() for batch in cache]
        [tensor(2.)]
    """

    def __init__(self, max_bytes: int = 2**31, folder: str | None = None) -> None:
        self.max_bytes = max_bytes
        self._folder = folder
        self._batches: list[CachedBatch] = []
        self._bytes = 0
        self._path: Path | None = None

    def __enter__(self) -> FeatureCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._batches.clear()
        if self._path is not None:
            self._path.unlink()
            self._path = None

    def append(self, features: Tensor, targets: Tensor, predictions: Tensor) -> None:
        """Add a batch."""
        features = features.detach()
        size = features.numel() * features.element_size()
        if size and self._bytes + size > self.max_bytes:
            features = self._to_disk(features.cpu().contiguous())
        else:
            self._bytes += size
        self._batches.append(CachedBatch(features, targets, predictions))

    def __iter__(self) -> Iterator[CachedBatch]:
        return iter(self._batches)

    @property
    def targets(self) -> Tensor:
        """Targets (N,) of all samples, in their order."""
        targets = [batch.targets.cpu().long() for batch in self._batches]
        return torch.cat(targets) if targets else torch.empty(0, dtype=torch.int64)

    def take(self, indices: Tensor, device: torch.device) -> Tensor:
        """Return the features of some samples on a device.

        Args:
            indices: (n,) indices of samples, ascending.
            device: The device.
        """
        starts = torch.tensor([0, *(len(batch.targets) for batch in self._batches)]).cumsum(0)
        bounds = torch.searchsorted(indices.contiguous(), starts).tolist()
        rows = [
            batch.features[(indices[first:end] - start).to(batch.features.device)].to(device)
            for batch, start, first, end in zip(self._batches, starts.tolist(), bounds, bounds[1:], strict=False)
            if first < end
        ]
        return torch.cat(rows) if rows else torch.empty(0, self._batches[0].features.shape[1], device=device)

    def draw(self, size: int, eligible: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return features and targets of random samples, in their order; the same ones for the same data.

        Args:
            size: Maximum number of samples.
            eligible: (K,) bool, classes whose samples may be drawn; by default all.
        """
        if not self._batches:
            return torch.empty(0, 0), torch.empty(0, dtype=torch.int64)
        targets = self.targets
        indices = torch.arange(len(targets)) if eligible is None else eligible.cpu()[targets].nonzero().flatten()
        order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))
        drawn = indices[order[:size]].sort().values
        return self.take(drawn, torch.device("cpu")), targets[drawn]

    def sample(self, size: int) -> tuple[Tensor, Tensor]:
        """Return what `draw` returns, with features in fp16, or bf16 or their own dtype if their range requires it."""
        rows, targets = self.draw(size)
        greatest = float(rows.abs().max()) if len(rows) else 0.0
        for dtype in (torch.float16, torch.bfloat16, rows.dtype):
            limits = torch.finfo(dtype)
            if greatest == 0 or limits.tiny / limits.eps <= greatest <= limits.max:
                return rows.to(dtype), targets
        return rows, targets

    def _to_disk(self, features: Tensor) -> Tensor:
        """Write a tensor to the file, and return it memory-mapped."""
        if self._path is None:
            with tempfile.NamedTemporaryFile(suffix=".features", dir=self._folder, delete=False) as file:
                self._path = Path(file.name)
        with self._path.open("ab") as file:
            offset = file.tell()
            features.view(torch.uint8).numpy().tofile(file)
        mapped = np.memmap(self._path, mode="r+", offset=offset, shape=(features.numel() * features.element_size(),))
        return torch.from_numpy(mapped).view(features.dtype).view(features.shape)
