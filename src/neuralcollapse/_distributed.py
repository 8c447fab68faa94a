"""Sums and maxima over the ranks of the default process group."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def number_of_ranks() -> int:
    """Return the number of ranks of the default process group, or 1 without a group."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum over ranks of a tensor, which has the same shape on all; the gradient is summed as well."""
    return tensor if number_of_ranks() == 1 else _SumOverRanks.apply(tensor)


def greatest_over_ranks(tensor: Tensor) -> Tensor:
    """Return the elementwise maximum over ranks of a tensor, without gradient."""
    tensor = tensor.detach()
    if number_of_ranks() > 1:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
    return tensor


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        total = tensor.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return _SumOverRanks.apply(gradient)
