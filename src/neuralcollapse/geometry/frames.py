"""Closed form of the frame of a code nearest to class means, with the nearest simplex ETF as a special case."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neuralcollapse._checks import (
    check_choice,
    check_finite,
    check_floating,
    check_not_negative,
    compute_dtype,
    values_readable,
)
from neuralcollapse.geometry import stiefel
from neuralcollapse.geometry.codes import Code, SimplexCode, check_constant_code, principal_code
from neuralcollapse.geometry.polar import METHODS, Method, polar_factor
from neuralcollapse.geometry.polar_iteration import IMMEDIATE, ConvergenceCheck
from neuralcollapse.geometry.simplex import simplex_basis

Proximal = tuple[Tensor, float | Tensor]  # the anchor and its weight γ


def nearest_simplex_etf(
    class_means: Tensor,
    *,
    anchor: Tensor | None = None,
    proximal_weight: float = 0.0,
    class_weights: Tensor | None = None,
    method: Method = "auto",
    check_values: bool = True,
) -> Tensor:
    r"""Return the unit simplex ETF nearest to the class means, differentiable in them.

    With C the means centred at their (weighted) mean, Ĉ = C/‖C‖_F, and E = √(K/(K−1)) B Q, it minimises

        ((K−1)/2) Σ_k ω_k ‖ĉ_k − e_k/√K‖² + (γ/2) ‖Q − Q₀‖_F²

    over Q with orthonormal rows. The objective is linear in Q, so the minimiser is the polar factor of
    √(K−1) Bᵀ diag(ω) Ĉ + γ Q₀, without iterations and with a derivative in closed form. It is unique if that
    matrix has full rank. B (K, K−1) is an orthonormal basis of the complement of the all-ones vector. This is
    `nearest_frame` for `SimplexCode`, except that class weights do not shift the ETF.

    Args:
        class_means: (..., K, d) floating, d ≥ K−1. fp16 and bf16 are computed in fp32.
        anchor: (K, d) or (..., K, d), a unit simplex ETF E₀ = √(K/(K−1)) B Q₀, usually the previous solution; used if
            γ > 0.
        proximal_weight: γ ≥ 0, in units in which the singular values of the data term are 1 at collapse.
        class_weights: As for `nearest_frame`.
        method: As for `polar_factor`.
        check_values: Whether to check values of tensors, as for `nearest_frame`.

    Returns:
        (..., K, d), unit rows with pairwise cosine −1/(K−1), in the dtype of ``class_means``.

    Raises:
        ValueError: if an argument has the wrong type, K < 2, d < K−1, shapes do not match, values are not finite,
            weights are negative, γ > 0 without an anchor, the anchor is not a simplex ETF, or the means are all equal
            without an anchor that determines the orientation.

    Source: based on Markou, Ajanthan, Gould, "Guiding Neural Collapse" (NeurIPS 2024), reduced to the complement
    of the all-ones vector.

    Examples:
        >>> from neuralcollapse import nearest_simplex_etf, random_simplex_etf
        >>> etf = random_simplex_etf(10, 64, generator=torch.Generator().manual_seed(0))
        >>> bool(torch.allclose(nearest_simplex_etf(5 * etf + 2), etf, atol=1e-5))
        True
    """
    _check_means(class_means)
    return nearest_frame(
        class_means,
        SimplexCode(class_means.shape[-2], proximal_weight),
        anchor=anchor,
        proximal_weight=proximal_weight,
        class_weights=class_weights,
        method=method,
        check_values=check_values,
    )


def nearest_frame(
    class_means: Tensor,
    code: Tensor | Code,
    *,
    anchor: Tensor | None = None,
    proximal_weight: float = 0.0,
    class_weights: Tensor | None = None,
    method: Method = "auto",
    check_values: bool = True,
) -> Tensor:
    r"""Return the frame L Q of a code that is nearest to the class means, differentiable in them.

    With C the means and L the code, both centred at their (weighted) mean, the code in its r principal coordinates, and
    Ĉ = C/‖C‖_F, it minimises

        (r/2) Σ_k ω_k ‖ĉ_k − l_kQ/‖L‖_F‖² + (γ/2) ‖Q − Q₀‖_F²

    over Q (r, d) with orthonormal rows. ‖diag(ω)^(1/2) L Q‖_F does not depend on Q, so the minimiser is the polar
    factor of (r/‖L‖_F) Lᵀ diag(ω) Ĉ + γ Q₀. It is unique if that matrix has full rank.

    Args:
        class_means: (..., K, d) floating. fp16 and bf16 are computed in fp32.
        code: L (K, r') floating, one row per class, a constant of rank r ≤ d after centring (see `code_from_gram`); or
            a `Code`.
        anchor: (K, d) or (..., K, d), a frame L Q₀ of the same code, usually the previous solution; used if γ > 0.
        proximal_weight: γ ≥ 0, in units in which the mean singular value of the data term is 1 at collapse.
        class_weights: (K,) or (..., K), ω ≥ 0 up to a common factor; equal by default.
        method: Method that computes the polar factor, as for `polar_factor`.
        check_values: Whether to check that values are finite, that the means are not all equal, that the anchor is a
            frame of the code, and that products converged (on an accelerator, this causes a sync). A tensor ``code`` is
            always checked.

    Returns:
        (..., K, d), L Q in the dtype of ``class_means``; its Gram matrix is that of the centred code. With class
        weights, the code is centred at its weighted mean, which shifts all rows of L Q by the same vector and does not
        change the softmax.

    Raises:
        ValueError: if an argument has the wrong type, shapes do not match, values are not finite, weights are negative,
            the code has a zero row, has a rank above d (the message contains it) or requires a gradient, γ > 0 without
            an anchor, the anchor is not a frame of the code, or the means are all equal without an anchor that
            determines the orientation.

    Source: this project, based on Markou, Ajanthan, Gould, "Guiding Neural Collapse" (NeurIPS 2024).

    Examples:
        >>> from neuralcollapse import nearest_frame
        >>> from neuralcollapse.geometry import attribute_gram, code_from_gram
        >>> gram = attribute_gram(torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]), torch.tensor([0.3, 0.3]))
        >>> frame = nearest_frame(torch.randn(4, 16), code_from_gram(gram, feature_dim=16))
        >>> bool(torch.allclose(frame @ frame.T, gram, atol=1e-5))
        True
    """
    proximal = _checked_proximal(class_means, anchor, proximal_weight, class_weights)
    check_choice("method", method, METHODS)
    num_classes, feature_dim = class_means.shape[-2:]
    means = class_means.to(compute_dtype(class_means.dtype))
    if not isinstance(code, Code):
        check_constant_code(code, num_classes)
        code = Code(principal_code(code, feature_dim))
    code.check_dimension(feature_dim)
    code = code.to(means)
    if check_values and anchor is not None:
        code.check_frame("anchor", anchor)
    if check_values and class_weights is not None:
        check_weight_values(class_weights)
    check = IMMEDIATE if check_values else None
    frame = solve_frame(means, code, proximal, class_weights=class_weights, method=method, check=check)
    return frame.to(class_means.dtype)


def solve_frame(
    means: Tensor,
    code: Code,
    proximal: Proximal | None = None,
    *,
    class_weights: Tensor | None = None,
    method: Method = "auto",
    check: ConvergenceCheck | None = None,
) -> Tensor:
    """Return the result of `nearest_frame` without checking arguments, for use by the heads.

    Args:
        means: (..., K, d) of fp32 or fp64.
        code: The code, in the dtype of the means.
        proximal: The anchor and γ, as for `nearest_frame`; γ may be a tensor. If the anchor is a frame of another code,
            only its component in the span of this code has an effect: for a tight code, the proximal term is
            (γ/2)(r/‖L‖²_F) ‖LQ − W₀‖²_F.
        class_weights: As for `nearest_frame`.
        method: As for `polar_factor`.
        check: Check of whether products converged; None for no check. `IMMEDIATE` also checks that the means differ.
    """
    target, shifted, centred, norm, _ = _target(means, code, proximal, class_weights)
    if check is IMMEDIATE and values_readable(norm) and not bool(torch.isfinite(norm).all()):
        check_finite("class_means", means)
        if not bool(torch.isfinite(torch.linalg.vector_norm(centred))):
            raise ValueError(f"class_means must be small enough to be squared in {means.dtype}")
        if proximal is None:
            raise ValueError(
                "class_means must not be all equal (centred, they are all zero), "
                "unless an anchor with a positive proximal_weight determines the orientation"
            )
    return shifted.expand(code.polar(target, method, check))


def _target(
    means: Tensor, code: Code, proximal: Proximal | None, class_weights: Tensor | None
) -> tuple[Tensor, Code, Tensor, Tensor, Tensor]:
    """Return Ã = (r/‖L‖_F) Lᵀ diag(ω) Ĉ + γ Q₀, whose polar factor is Q, and its components.

    Returns:
        Ã (..., r, d); the code L, shifted by the class weights; C; ‖C‖_F; and diag(ω) C.
    """
    centred, norm, weights = _centre(means, class_weights)
    shifted, weighted = (code, centred) if weights is None else (code.shifted(weights), weights * centred)
    target = shifted.reduce(weighted, norm)
    if proximal is not None:
        anchor, proximal_weight = proximal
        target = target + code.coordinates(anchor.to(means.dtype), proximal_weight)
    return target, shifted, centred, norm, weighted


def _centre(means: Tensor, class_weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return C, centred at the ω-weighted mean; ‖C‖_F, (..., 1, 1); and ω, (..., K, 1) with mean 1, if given.

    If C contains only the rounding error of the centring, the norm is set to infinity: Ĉ is zero, with zero gradient.
    """
    weights = None
    if class_weights is not None:
        weights = class_weights.to(means)
        weights = (weights / weights.mean(-1, keepdim=True)).unsqueeze(-1)
    mean = (means if weights is None else weights * means).mean(-2, keepdim=True)
    centred = means - mean
    norm = torch.linalg.vector_norm(centred, dim=(-2, -1), keepdim=True)
    rounding = 4 * torch.finfo(means.dtype).eps * math.sqrt(means.shape[-2])
    differ = norm > rounding * torch.linalg.vector_norm(mean.detach(), dim=-1, keepdim=True)
    return centred, torch.where(differ, norm, math.inf), weights


@torch.no_grad()
def nearest_etf_diagnostics(
    class_means: Tensor,
    etf: Tensor,
    *,
    anchor: Tensor | None = None,
    proximal_weight: float = 0.0,
    class_weights: Tensor | None = None,
) -> dict[str, float]:
    """Measure how well a simplex ETF solves the problem of `nearest_simplex_etf`, in fp64.

    Args:
        class_means: (K, d).
        etf: (K, d), a unit simplex ETF.
        anchor: As for `nearest_simplex_etf`.
        proximal_weight: As for `nearest_simplex_etf`.
        class_weights: As for `nearest_simplex_etf`.

    Returns:
        ``objective``, the value of the minimised function; ``gradient_norm``, the norm of its Riemannian gradient,
        which is 0 at the minimiser; ``least_singular_value`` of the matrix whose polar factor is the minimiser, 0 if
        the minimiser is not unique; and ``distance_to_anchor``, ‖E − E₀‖_F, NaN without an anchor.

    Raises:
        ValueError: if shapes or the proximal weight are invalid for `nearest_simplex_etf`, or ``etf`` has another
            shape.

    Examples:
        >>> from neuralcollapse import nearest_simplex_etf, simplex_etf
        >>> means = 3 * simplex_etf(4, 6) + 1
        >>> diagnostics = nearest_etf_diagnostics(means, nearest_simplex_etf(means))
        >>> abs(diagnostics["objective"]) < 1e-6, round(diagnostics["least_singular_value"], 6)
        (True, 1.0)
    """
    check_floating("class_means", class_means)
    check_floating("etf", etf)
    if class_means.ndim != 2 or etf.shape != class_means.shape:
        raise ValueError(
            f"etf must be of the shape (K, d) of class_means {tuple(class_means.shape)}, got {tuple(etf.shape)}"
        )
    proximal = _checked_proximal(class_means, anchor, proximal_weight, class_weights)
    code = SimplexCode(len(class_means))
    code.check_dimension(class_means.shape[1])
    target, _, centred, norm, weighted = _target(class_means.double(), code, proximal, class_weights)
    frame = code.coordinates(etf.double())
    product = target @ frame.mT
    gradient = target - 0.5 * (product + product.mT) @ frame
    data = code.rank / 2 * ((centred * weighted).sum() / norm**2 + 1)
    return {
        "objective": float(data + proximal_weight * code.rank - product.trace()),
        "gradient_norm": float(torch.linalg.matrix_norm(gradient)),
        "least_singular_value": float(torch.linalg.svdvals(target)[code.rank - 1]),
        "distance_to_anchor": math.nan if anchor is None else float((etf - anchor).double().norm()),
    }


def placed(code: Tensor, feature_dim: int, generator: torch.Generator | None = None) -> Tensor:
    """Return a frame (K, d) of a principal code (K, r): padded with zeros or, with a generator, uniformly rotated."""
    rank = code.shape[-1]
    if generator is None:
        return torch.nn.functional.pad(code, (0, feature_dim - rank))
    rotation = stiefel.random_point(rank, feature_dim, generator=generator, dtype=code.dtype, device=generator.device)
    return code @ rotation.to(code.device)


@torch.no_grad()
def extended_frame(rows: Tensor, code: Tensor | SimplexCode, generator: torch.Generator | None = None) -> Tensor:
    """Return the frame L Q of a code of M classes whose first K rows are nearest to the given rows (K, d).

    Since ‖L_K Q‖_F does not depend on Q, Σ_k ‖(LQ)_k − w_k‖² is minimal if ⟨L_Kᵀ W, Q⟩ is maximal: Q is the polar
    factor of L_Kᵀ W (r, d). The rank of this matrix is at most that of the old frame. The remaining directions of Q do
    not affect the distance; they are random and orthogonal to the others. For simplex ETFs, the minimal squared
    distance is 2K (1 − √(M (K−1)/((M−1) K))), and n = M − K directions remain, in which the old rows share one
    component.

    Args:
        rows: W, (K, d), fp32 or fp64, K ≤ M.
        code: L (M, r) in principal coordinates, or the simplex code of M classes; r ≤ d.
        generator: Generator of the remaining directions; by default a generator with seed 0.

    Returns:
        (M, d), in the dtype and on the device of ``rows``.
    """
    if isinstance(code, SimplexCode):
        vectors = simplex_basis(code.num_classes, dtype=torch.float64) * math.sqrt(code.num_classes / code.rank)
    else:
        vectors = code.double()
    vectors = vectors.to(rows.device)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    target = vectors[: len(rows)].mT @ rows.double()
    left, singular, right = torch.linalg.svd(target, full_matrices=False)
    known = singular > max(target.shape) * torch.finfo(rows.dtype).eps * singular[0]
    coordinates = left[:, known] @ right[known]
    if not bool(known.all()):
        random = torch.randn(target.shape, generator=generator, dtype=torch.float64, device=generator.device)
        # Random part outside the known rows and directions. The polar factor is independent of the null space basis.
        open_rows = left[:, ~known]
        free = open_rows.mT @ random.to(target)
        free = free - free @ right[known].mT @ right[known]
        coordinates = coordinates + open_rows @ polar_factor(free)
    return (vectors @ coordinates).to(rows.dtype)


def _check_means(class_means: Tensor) -> None:
    check_floating("class_means", class_means)
    if class_means.ndim < 2:
        raise ValueError(f"class_means must be of shape (..., K, d), got {tuple(class_means.shape)}")


def _checked_proximal(
    class_means: Tensor, anchor: Tensor | None, proximal_weight: float, class_weights: Tensor | None
) -> Proximal | None:
    """Return the proximal term, None if γ = 0; raise if types, shapes or γ are invalid. Tensor values are not read."""
    _check_means(class_means)
    check_not_negative("proximal_weight", proximal_weight)
    if anchor is not None:
        _check_like("anchor", anchor, class_means, tuple(class_means.shape[-2:]))
    if class_weights is not None:
        _check_like("class_weights", class_weights, class_means, (class_means.shape[-2],))
    if proximal_weight > 0 and anchor is None:
        raise ValueError(f"proximal_weight = {proximal_weight} needs an anchor, got None")
    return None if anchor is None or proximal_weight == 0 else (anchor, proximal_weight)


def check_weight_values(class_weights: Tensor) -> None:
    """Raise unless class weights are at least 0 with a positive sum; skipped if values are unreadable."""
    if not values_readable(class_weights):
        return
    check_finite("class_weights", class_weights)
    if bool((class_weights < 0).any()) or bool((class_weights.sum(-1) == 0).any()):
        raise ValueError("class_weights must be at least 0 with a positive sum")


def _check_like(name: str, tensor: Tensor, means: Tensor, ending: tuple[int, ...]) -> None:
    """Raise unless a floating tensor has the given last dimensions, and leading ones that broadcast to the means'."""
    check_floating(name, tensor)
    if tensor.shape[tensor.ndim - len(ending) :] != ending or tensor.ndim < len(ending):
        raise ValueError(f"{name} must end in the shape {ending}, got {tuple(tensor.shape)}")
    batch, expected = tensor.shape[: tensor.ndim - len(ending)], means.shape[:-2]
    if len(batch) > len(expected) or any(
        size not in (1, wanted) for size, wanted in zip(batch[::-1], expected[::-1], strict=False)
    ):
        raise ValueError(f"{name} must have the leading dimensions {tuple(expected)} or none, got {tuple(batch)}")
