"""Principal directions of features about a point, and norms of the components outside the leading directions."""

from __future__ import annotations

import torch
from torch import Tensor

from neuralcollapse.metrics.moments import ClassMoments
from neuralcollapse.metrics.samples import FeatureCache

_CHUNK_ELEMENTS = 2**21  # maximum number of elements of each temporary


def logit_origin(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return −W⁺b (d,) in fp64: of the points at which the logits Wh + b have minimal norm, the one nearest to 0.

    Args:
        weight: W (K, d).
        bias: b (K,), or None for 0.

    Examples:
        >>> logit_origin(torch.eye(2, 3), torch.tensor([-1.0, 4.0]))
        tensor([ 1., -4., 0.], dtype=torch.float64)
    """
    if bias is None:
        return torch.zeros_like(weight[0], dtype=torch.float64)
    matrix, values = weight.double(), -bias.double()
    if len(matrix) > matrix.shape[1]:
        basis, matrix = torch.linalg.qr(matrix)
        values = basis.T @ values
    return torch.linalg.pinv(matrix) @ values


def principal_directions(moments: ClassMoments, origin: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues, descending, and the eigenvectors of Σ(h − o)(h − o)ᵀ/N in fp64.

    They are computed from the moments alone: the matrix is (S + Σ_k n_k(M_k − o)(M_k − o)ᵀ)/N.

    Args:
        moments: Moments of at least one sample.
        origin: o (d,).

    Returns:
        Eigenvalues (d,), at least 0, and eigenvectors (d, d) as columns; NaN if the moments are not finite.

    Examples:
        >>> moments = ClassMoments(2, 2)
        >>> moments.update(torch.tensor([[3.0, 0], [0, 1]]), torch.tensor([0, 1]))
        >>> principal_directions(moments, torch.zeros(2))[0]
        tensor([4.5000, 0.5000], dtype=torch.float64)
    """
    shares = moments.counts.double() / moments.counts.sum()
    rows = (moments.means.double() - origin.to(moments.device, torch.float64)) * shares.sqrt()[:, None]
    matrix = moments.within_class_scatter.double() / moments.counts.sum() + rows.T @ rows
    if not torch.isfinite(matrix).all():
        return torch.full_like(matrix[0], torch.nan), torch.full_like(matrix, torch.nan)
    eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
    return eigenvalues.flip(0).clamp(min=0), eigenvectors.flip(1)


def mean_residual_norms(cache: FeatureCache, moments: ClassMoments, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the mean norm of the component outside the j leading principal directions about −W⁺b, j = 0, …, d − 1.

    Mean norms do not follow from moments, so the function makes a second pass over the features: for each sample, the
    squared components are summed from the last direction to the first, with O(N d²) work and O(d²) memory. Each
    component is the sum in fp64 of those of h − M_y and M_y − o, which is accurate in deep collapse.

    Args:
        cache: The features.
        moments: Moments of these features.
        weight: W (K, d).
        bias: b (K,), or None for 0.

    Returns:
        (d,) in fp64 on the CPU; NaN without samples, or if weight, bias or moments are not finite.
    """
    undefined = torch.full((weight.shape[1],), torch.nan, dtype=torch.float64)
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in (weight, bias) if tensor is not None)
    if not (finite and moments.counts.any()):
        return undefined
    origin = logit_origin(weight, bias).to(moments.device)
    _, directions = principal_directions(moments, origin)
    dtype = torch.float64 if moments.dtype == torch.float64 else torch.float32
    means = moments.means.double()
    of_means, of_deviations = (means - origin) @ directions, directions.to(dtype)
    total = undefined.new_zeros(len(undefined), device=moments.device)
    step = max(1, _CHUNK_ELEMENTS // len(total))
    for batch in cache:
        for features, classes in zip(batch.features.split(step), batch.targets.split(step), strict=True):
            targets = classes.to(moments.device)
            deviations = features.to(moments.device).double() - means[targets]
            components = (deviations.to(dtype) @ of_deviations).double() + of_means[targets]
            total += components.square_().flip(1).cumsum(dim=1).sqrt_().sum(dim=0)
    return (total / moments.counts.sum()).flip(0).cpu()
