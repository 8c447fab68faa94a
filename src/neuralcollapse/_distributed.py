"""Sums, maxima and rows over the ranks of the default process group."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def number_of_ranks() -> int:
    """Return the number of ranks of the default process group, or 1 without a group."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum over ranks of a tensor with the same shape on all ranks; the gradient is summed as well."""
    return tensor if number_of_ranks() == 1 else _SumOverRanks.apply(tensor)


def greatest_over_ranks(tensor: Tensor) -> Tensor:
    """Return the elementwise maximum over ranks of a tensor, without gradient."""
    tensor = tensor.detach()
    if number_of_ranks() > 1:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
    return tensor


def gather_over_ranks(tensor: Tensor) -> Tensor:
    """Return the rows (N, ...) of all ranks, in the order of the ranks; the number of rows per rank may differ.

    The gradient of the rows of a rank is the sum over ranks. With several ranks, this function causes a device sync.
    """
    ranks = number_of_ranks()
    if ranks == 1:
        return tensor
    sizes = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(ranks)]
    distributed.all_gather(sizes, torch.tensor([len(tensor)], device=tensor.device))
    lengths = [int(size) for size in sizes]
    before = sum(lengths[: distributed.get_rank()])
    padding = (before, sum(lengths) - before - len(tensor))
    rows = [tensor.new_zeros(length, *tensor.shape[1:]) for length in padding]
    return sum_over_ranks(torch.cat([rows[0], tensor, rows[1]]))


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        total = tensor.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return _SumOverRanks.apply(gradient)
