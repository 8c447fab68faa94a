"""Features kept, where they are, for a second look without a second run of the model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Samples(NamedTuple):
    """Features (N, d), their targets (N,), and the classifier's answers (N,)."""

    features: Tensor
    targets: Tensor
    predictions: Tensor


class FeatureCache:
    """Batches of samples, on the device that they came from; above ``max_bytes`` features go to a temporary file.

    Used as a context, at whose end the file is removed.

    Args:
        max_bytes: Features kept in memory at most.
        folder: Where the temporary file goes; the system's own place by default.

    Examples:
        >>> with FeatureCache(max_bytes=0) as cache:
        ...     cache.append(torch.eye(2), torch.tensor([0, 1]), torch.tensor([1, 1]))
        ...     [samples.features.sum() for samples in cache]
        [tensor(2.)]
    """

    def __init__(self, max_bytes: int = 2**31, folder: str | None = None) -> None:
        self.max_bytes = max_bytes
        self._folder = folder
        self._held: list[Samples] = []
        self._bytes = 0
        self._path: Path | None = None

    def __enter__(self) -> FeatureCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.clear()
        if self._path is not None:
            self._path.unlink()
            self._path = None

    def append(self, features: Tensor, targets: Tensor, predictions: Tensor) -> None:
        """Keep a batch."""
        features = features.detach()
        size = features.numel() * features.element_size()
        if size and self._bytes + size > self.max_bytes:
            features = self._to_disk(features.cpu().contiguous())
        else:
            self._bytes += size
        self._held.append(Samples(features, targets, predictions))

    def draw(self, size: int, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features and targets of at most ``size`` samples, always the same ones of the same data, in their order.

        Args:
            size: How many at most.
            among: (K,) whether a class's samples may be drawn; all if not given.
        """
        if not self._held:
            return torch.empty(0, 0), torch.empty(0, dtype=torch.int64)
        targets = self.targets
        eligible = torch.arange(len(targets)) if among is None else among.cpu()[targets].nonzero().flatten()
        order = torch.randperm(len(eligible), generator=torch.Generator().manual_seed(0))
        drawn = eligible[order[:size]].sort().values
        return self.take(drawn, torch.device("cpu")), targets[drawn]

    @property
    def targets(self) -> Tensor:
        """(N,) targets of all samples, in their order."""
        held = [batch.targets.cpu().long() for batch in self._held]
        return torch.cat(held) if held else torch.empty(0, dtype=torch.int64)

    def take(self, indices: Tensor, device: torch.device) -> Tensor:
        """Return the features of samples on a device.

        Args:
            indices: (n,) ascending places in the order of all samples.
            device: Where to.
        """
        starts = torch.tensor([0, *(len(batch.targets) for batch in self._held)]).cumsum(0)
        bounds = torch.searchsorted(indices.contiguous(), starts).tolist()
        found = [
            batch.features[(indices[first:end] - start).to(batch.features.device)].to(device)
            for batch, start, first, end in zip(self._held, starts.tolist(), bounds, bounds[1:], strict=False)
            if first < end
        ]
        return torch.cat(found) if found else torch.empty(0, self._held[0].features.shape[1], device=device)

    def sample(self, size: int) -> tuple[Tensor, Tensor]:
        """As `draw`, with features in fp16; in bf16, or in their own dtype, where their size is beyond its range."""
        rows, targets = self.draw(size)
        greatest = float(rows.abs().max()) if len(rows) else 0.0
        for dtype in (torch.float16, torch.bfloat16, rows.dtype):
            limits = torch.finfo(dtype)
            if greatest == 0 or limits.tiny / limits.eps <= greatest <= limits.max:
                return rows.to(dtype), targets
        return rows, targets

    def __iter__(self) -> Iterator[Samples]:
        return iter(self._held)

    def _to_disk(self, features: Tensor) -> Tensor:
        """The same tensor, memory-mapped: read from the file when it is used, and dropped again under pressure."""
        if self._path is None:
            with tempfile.NamedTemporaryFile(suffix=".features", dir=self._folder, delete=False) as file:
                self._path = Path(file.name)
        with self._path.open("ab") as file:
            offset = file.tell()
            features.view(torch.uint8).numpy().tofile(file)
        mapped = np.memmap(self._path, mode="r+", offset=offset, shape=(features.numel() * features.element_size(),))
        return torch.from_numpy(mapped).view(features.dtype).view(features.shape)
