"""Softmax code, which replaces the simplex ETF for K > d + 1 classes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from neuralcollapse._checks import check_at_least, check_finite, check_floating, compute_dtype
from neuralcollapse.geometry.simplex import simplex_etf

# Temperatures from 1 to 2⁻¹² by halving: the smooth maximum is then within 2⁻¹² log K² of the true maximum, 3e-3 for
# K = 1000. Margins at (100, 16) for the same number of evaluations: 0.789 in 5 stages, 0.792 in 11, 0.768 in one.
TEMPERATURES = tuple(0.5**stage for stage in range(13))
_HISTORY = 20


def softmax_code(
    num_classes: int,
    feature_dim: int,
    *,
    generator: torch.Generator | None = None,
    max_iterations: int = 40,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Return unit class vectors that maximise the smallest one-vs-rest margin, the limit of collapse if K > d + 1.

    The margin of class k is the distance of w_k from the convex hull of the others. Known optima are returned directly:
    the canonical simplex ETF for K ≤ d+1, the first K vectors e₁, −e₁, e₂, −e₂, … of the orthoplex for d+2 ≤ K ≤ 2d,
    and the regular K-gon at d = 2. Otherwise the margin is maximised numerically, at O(K²d) per evaluation: the result
    is a good code, not a proven optimum.

    Args:
        num_classes: K ≥ 2.
        feature_dim: d ≥ 1; d ≥ 2 for K > 2.
        generator: Generator of the random start, on ``device``; by default a generator with seed 0.
        max_iterations: L-BFGS iterations at each temperature.
        dtype: Floating dtype of the result; the default dtype if not given.
        device: Device of the computation and the result.

    Returns:
        (K, d), unit rows.

    Raises:
        ValueError: if a size is out of range.

    Source: Jiang et al., "Generalized neural collapse for a large number of classes" (ICML 2024).

    Examples:
        >>> code = softmax_code(6, 3)  # the octahedron
        >>> one_vs_rest_margins(code)
        tensor([1., 1., 1., 1., 1., 1.])
    """
    check_at_least("num_classes", num_classes, 2)
    check_at_least("feature_dim", feature_dim, 1)
    if num_classes > 2:
        check_at_least("feature_dim", feature_dim, 2)
    dtype = dtype or torch.get_default_dtype()
    if num_classes <= feature_dim + 1:
        return simplex_etf(num_classes, feature_dim, dtype=dtype, device=device)
    if num_classes <= 2 * feature_dim:
        axes = torch.eye(feature_dim, dtype=torch.float64, device=device)
        return torch.stack([axes, -axes], 1).flatten(0, 1)[:num_classes].to(dtype)
    if feature_dim == 2:
        angles = 2 * math.pi / num_classes * torch.arange(num_classes, dtype=torch.float64, device=device)
        return torch.stack([angles.cos(), angles.sin()], -1).to(dtype)
    generator = generator or torch.Generator(device or "cpu").manual_seed(0)
    start = torch.randn(num_classes, feature_dim, generator=generator, dtype=torch.float64, device=device)
    return _anneal_code(start, max_iterations=max_iterations).to(dtype)


def _anneal_code(start: Tensor, *, temperatures: tuple[float, ...] = TEMPERATURES, max_iterations: int = 40) -> Tensor:
    r"""Maximise the smallest one-vs-rest margin from a start, by a smooth objective with decreasing temperature.

    The margin of class k is the maximum over unit h of min_{j≠k} ⟨w_k − w_j, h⟩. With a unit h_k for each class,

        min over W, H of  t · log Σ_k Σ_{j≠k} exp(⟨w_j − w_k, h_k⟩/t)

    is minimised by L-BFGS on the product of spheres (rows are normalised in the objective) for t decreasing to nearly
    0; as t → 0, it tends to minus the smallest margin. At a high temperature, all vectors repel each other, which
    distributes them evenly; at a low temperature, only the closest pair matters, so that without annealing the
    arrangement of the start would remain.

    Args:
        start: (K, d) floating, rows not zero. fp16 and bf16 are computed in fp32.
        temperatures: t of each stage, positive.
        max_iterations: L-BFGS iterations of each stage.

    Returns:
        (K, d), unit rows, in the dtype of ``start``.

    Raises:
        ValueError: if the start has the wrong shape, a value that is not finite or a zero row, or if a temperature is
            not positive.

    Source: smoothed version of the HardMax problem of Jiang et al. (ICML 2024).

    Examples:
        >>> start = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> bool(torch.allclose(one_vs_rest_margins(_anneal_code(start)), torch.ones(4).double(), atol=1e-6))
        True
    """
    _check_code("start", start)
    check_at_least("max_iterations", max_iterations, 1)
    if not temperatures or not all(0 < temperature < math.inf for temperature in temperatures):
        raise ValueError(f"temperatures must contain at least one value, all positive, got {temperatures}")
    code = start.detach().to(compute_dtype(start.dtype))
    pair = functional.normalize(torch.stack([code, code]), dim=-1)  # W and H
    for temperature in temperatures:
        pair = _stage(pair, temperature, max_iterations)
    return pair[0].to(start.dtype)


def _stage(pair: Tensor, temperature: float, max_iterations: int) -> Tensor:
    """Return W and H, (2, K, d), after optimisation at one temperature."""
    variable = pair.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [variable],
        max_iter=max_iterations,
        history_size=_HISTORY,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
    )

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        code, directions = functional.normalize(variable, dim=-1)
        worst = _negative_margins(code, directions).div(temperature).flatten().logsumexp(0) * temperature
        torch.autograd.backward(worst)
        return worst

    improve: Callable[..., object] = optimizer.step
    with torch.enable_grad():
        improve(evaluate)
    return functional.normalize(variable.detach(), dim=-1)


def _negative_margins(code: Tensor, directions: Tensor) -> Tensor:
    """Return ⟨w_j − w_k, h_k⟩ in row k, column j; −∞ at j = k."""
    products = directions @ code.mT
    margins = products - products.diagonal().unsqueeze(-1)
    return margins.masked_fill(torch.eye(len(code), dtype=torch.bool, device=code.device), -math.inf)


def one_vs_rest_margins(code: Tensor, *, max_iterations: int = 2000, tolerance: float = 1e-7) -> Tensor:
    r"""Return the distance of each class vector from the convex hull of the others, which a softmax code maximises.

    The distances of all classes are computed together, by accelerated projected gradient in the weights of the hull,
    with O(K²d) work per iteration.

    Args:
        code: (K, d) floating, rows not zero.
        max_iterations: Maximum number of iterations.
        tolerance: Gap between the distance to the best point and its lower bound at which to stop.

    Returns:
        (K,), proven lower bounds of the distances, within ``tolerance`` unless ``max_iterations`` is reached.

    Raises:
        ValueError: if the code has the wrong shape, a value that is not finite or a zero row.

    Source: Jiang et al. (ICML 2024); Beck, Teboulle (2009) with the restart of O'Donoghue, Candès (2015).

    Examples:
        >>> one_vs_rest_margins(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]))
        tensor([1.4142, 1.4142, 1.0000])
    """
    _check_code("code", code)
    exact = code.detach().double()
    count = len(exact)
    diagonal = torch.eye(count, dtype=torch.bool, device=code.device)
    weights = torch.full_like(diagonal, 1 / (count - 1), dtype=torch.float64).masked_fill(diagonal, 0)
    ahead, momentum = weights, 1.0
    rate = 1 / float(torch.linalg.matrix_norm(exact, 2)) ** 2
    margins = exact.new_zeros(count)
    for _ in range(max_iterations):
        slope = (ahead @ exact - exact) @ exact.mT
        moved = _project_on_simplex((ahead - rate * slope).masked_fill(diagonal, -math.inf))
        if float(((ahead - moved) * (moved - weights)).sum()) > 0:
            momentum = 1.0
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead = moved + (momentum - 1) / following * (moved - weights)
        weights, momentum = moved, following
        difference = exact - weights @ exact
        distances = torch.linalg.vector_norm(difference, dim=-1)
        directions = difference / distances.clamp_min(torch.finfo(torch.float64).tiny).unsqueeze(-1)
        margins = torch.maximum(margins, -_negative_margins(exact, directions).amax(-1))
        if float((distances - margins).max()) <= tolerance:
            break
    return margins.to(code.dtype)


def _project_on_simplex(vectors: Tensor) -> Tensor:
    """Return the probability vector nearest to each row (Held, Wolfe, Crowder 1974); entries of −∞ stay at 0."""
    ordered = vectors.sort(-1, descending=True).values
    index = torch.arange(1, vectors.shape[-1] + 1, dtype=vectors.dtype, device=vectors.device)
    threshold = (ordered.masked_fill(ordered == -math.inf, 0).cumsum(-1) - 1) / index
    support = (ordered > threshold).sum(-1, keepdim=True)
    return (vectors - threshold.gather(-1, support - 1)).clamp_min(0)


def _check_code(name: str, code: Tensor) -> None:
    check_floating(name, code)
    if code.ndim != 2 or code.shape[0] < 2 or code.shape[1] < 1:
        raise ValueError(f"{name} must be of shape (K, d) with K >= 2, got {tuple(code.shape)}")
    check_finite(name, code)
    if bool((code == 0).all(-1).any()):
        raise ValueError(f"{name} must not have a zero row, got one at {int((code == 0).all(-1).int().argmax())}")
