"""Scaling by powers of two, unit rows and roots that neither overflow nor underflow, with finite gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def power_of_two(*tensors: Tensor) -> Tensor:
    """Return the scalar 2^−e, without gradient, that scales the greatest magnitude of all tensors into [1, 2).

    Multiplication by it is exact. It is 1 for half-precision tensors, whose squares are computed in a wider dtype.

    Examples:
        >>> power_of_two(torch.tensor([3.0, -40.0]))
        tensor(0.0312)
    """
    bounds = [torch.stack(torch.aminmax(tensor.detach())) for tensor in tensors if tensor.numel()]
    greatest = torch.stack(bounds or [tensors[0].new_zeros(2)]).abs().amax()
    if greatest.dtype in (torch.float16, torch.bfloat16):
        return torch.ones_like(greatest)
    greatest = greatest.clamp(min=torch.finfo(greatest.dtype).tiny)
    return 2 * torch.frexp(greatest).mantissa / greatest


def rescaled(tensor: Tensor) -> Tensor:
    """Return a tensor multiplied by its `power_of_two`."""
    return tensor * power_of_two(tensor)


def unit_rows(rows: Tensor, least: Tensor | float = 0.0) -> Tensor:
    """Return rows scaled to unit norm; NaN for a row whose norm is at most ``least``.

    Args:
        rows: (..., N, d).
        least: Greatest norm of a row without direction: (..., N), or one number for all rows.

    Examples:
        >>> unit_rows(torch.tensor([[3e-30, 4e-30], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [   nan,    nan]])
    """
    norms = _norms(rows)
    directed = norms.detach() > torch.as_tensor(least, dtype=norms.dtype, device=norms.device)
    return rows / torch.where(directed, norms, torch.nan).unsqueeze(-1).to(rows.dtype)


def unit_deviations(rows: Tensor, center: Tensor) -> Tensor:
    """Return `unit_rows` of rows − center; NaN for a row that equals the centre, up to rounding."""
    deviations = rows - center
    return unit_rows(deviations, 4 * torch.finfo(deviations.dtype).eps * _norms(center.detach()))


def _norms(rows: Tensor) -> Tensor:
    """Return the norms of rows; those of fp32 rows are computed in fp64, so that squares stay in range."""
    wide = torch.float64 if rows.dtype == torch.float32 and rows.device.type != "mps" else None
    return torch.linalg.vector_norm(rows, dim=-1, dtype=wide)


def square_root(values: Tensor) -> Tensor:
    """Return the square root, with gradient 0 at 0.

    Examples:
        >>> square_root(torch.tensor([0.0, 4.0]))
        tensor([0., 2.])
    """
    positive = values != 0  # NaN stays NaN
    return torch.where(positive, torch.where(positive, values, 1).sqrt(), 0)
