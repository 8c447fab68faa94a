"""The frame of a prescribed Gram matrix that is nearest to given class means, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from neuralcollapse._checks import compute_dtype, values_readable
from neuralcollapse.geometry import stiefel
from neuralcollapse.geometry.centring import centre, check_arguments, check_weight_values
from neuralcollapse.geometry.codes import check_code, coordinates, principal_code
from neuralcollapse.geometry.polar import Method, polar
from neuralcollapse.geometry.watch import Watch


def nearest_frame(
    class_means: Tensor,
    code: Tensor,
    *,
    anchor: Tensor | None = None,
    proximal_weight: float = 0.0,
    class_weights: Tensor | None = None,
    method: Method = "auto",
    check_values: bool = True,
) -> Tensor:
    r"""The rotation L Q of a code that is nearest to the class means, differentiable in them.

    With C the means and L the code, both centred at their (weighted) mean, the code compressed to its rank r, and
    Ĉ = C/‖C‖_F, it minimises

        (r/2) Σ_k ω_k ‖ĉ_k − l_kQ/‖L‖_F‖² + (γ/2) ‖Q − Q₀‖_F²

    over Q (r, d) with orthonormal rows. ‖diag(ω)^(1/2) L Q‖_F does not depend on Q, so the minimiser is the polar
    factor of (r/‖L‖_F) Lᵀ diag(ω) Ĉ + γ Q₀, as for the simplex ETF, whose code `nearest_simplex_etf` has built in. It
    is unique where that matrix has full rank.

    Args:
        class_means: (..., K, d) floating. fp16 and bf16 are computed in fp32.
        code: L (K, r') floating, a row a class, of rank r ≤ d after centring; a constant. See `code_from_gram`.
        anchor: (K, d) or (..., K, d), a frame L Q₀ of the same code to stay close to (the last solution); used if γ >
            0.
        proximal_weight: γ ≥ 0, in units in which the mean singular value of the data term is 1 at collapse.
        class_weights: (K,) or (..., K), ω ≥ 0 up to a common factor; equal if not given.
        method: How the polar factor is found, as for `polar_factor`.
        check_values: Check finiteness, that the means are not all equal, that the anchor is a frame of the code and
            that products converged (on an accelerator this waits for the device). The code is always looked at.

    Returns:
        (..., K, d), L Q in the dtype of ``class_means``: its Gram is that of the centred code. With class weights the
        code is centred at their mean, which shifts all rows of L Q alike and changes no softmax.

    Raises:
        ValueError: An argument of another kind, shapes that do not match, non-finite values, negative weights, a code
            with a zero row, of rank above d (which rank) or that requires a gradient, γ > 0 without an anchor, an
            anchor that is no frame of the code, or means that are all equal with no anchor to decide.

    Source: this project, after Markou, Ajanthan, Gould, "Guiding Neural Collapse" (NeurIPS 2024).

    Examples:
        >>> from neuralcollapse import nearest_frame
        >>> from neuralcollapse.geometry import attribute_gram, code_from_gram
        >>> gram = attribute_gram(torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]), torch.tensor([0.3, 0.3]))
        >>> frame = nearest_frame(torch.randn(4, 16), code_from_gram(gram, feature_dim=16))
        >>> bool(torch.allclose(frame @ frame.T, gram, atol=1e-5))
        True
    """
    check_arguments(class_means, anchor, proximal_weight, class_weights, method)
    check_code(code, class_means.shape[-2])
    means = class_means.to(compute_dtype(class_means.dtype))
    principal = principal_code(code, class_means.shape[-1]).to(means)
    if check_values:
        if anchor is not None:
            _check_anchor(anchor, principal)
        if class_weights is not None:
            check_weight_values(class_weights)
    watch = Watch.AT_ONCE if check_values else 0
    frame = solve_frame(means, principal, anchor, proximal_weight, class_weights, method, watch, check_values)
    return frame.to(class_means.dtype)


def solve_frame(
    means: Tensor,
    code: Tensor,
    anchor: Tensor | None,
    proximal_weight: float | Tensor,
    class_weights: Tensor | None = None,
    method: Method = "auto",
    watch: int = 0,
    check_values: bool = False,
) -> Tensor:
    """`nearest_frame` behind its door, of fp32 or fp64 means and a principal code in their dtype; γ may be a tensor.

    An anchor that is a frame of another code pulls by its part in this one's span: for a tight code that is
    (γ/2)(r/‖L‖²_F) ‖LQ − W₀‖²_F.
    """
    if isinstance(proximal_weight, float | int) and proximal_weight == 0:
        anchor = None
    centred, norm, weights = centre(means, class_weights, check_values, anchor is None)
    own, weighted = code, centred
    if weights is not None:
        own, weighted = code - (weights * code).mean(-2, keepdim=True), weights * centred
    # Lᵀ diag(ω) Ĉ is the same of every centring of the code, since diag(ω) Ĉ sums to zero.
    reach = code.shape[-1] / torch.linalg.matrix_norm(own, keepdim=True)
    target = code.mT @ weighted * (reach / norm)
    if anchor is not None:
        target = target + proximal_weight * coordinates(code, anchor.to(means.dtype))
    return own @ polar(target, method=method, watch=watch)


def placed(code: Tensor, feature_dim: int, generator: torch.Generator | None = None) -> Tensor:
    """A principal code (K, r) as a frame (K, d): its coordinates come first, or are turned Haar-uniformly."""
    rank = code.shape[-1]
    if generator is None:
        return torch.nn.functional.pad(code, (0, feature_dim - rank))
    rotation = stiefel.random_point(rank, feature_dim, generator=generator, dtype=code.dtype, device=generator.device)
    return code @ rotation.to(code.device)


def _check_anchor(anchor: Tensor, code: Tensor) -> None:
    """Raise unless the anchor is, up to a row common to all classes, L Q₀ with orthonormal rows of Q₀."""
    if not values_readable(anchor):
        return
    tolerance = 3e-2 if anchor.dtype in (torch.bfloat16, torch.float16) else 1e-3
    anchor = anchor.to(code)
    rotation = coordinates(code, anchor)
    off = (anchor - anchor.mean(-2, keepdim=True) - code @ rotation).abs().amax() / code.abs().amax()
    identity = torch.eye(code.shape[-1], dtype=code.dtype, device=code.device)
    error = max(float(off), float((rotation @ rotation.mT - identity).abs().amax()))
    if not error <= tolerance:
        raise ValueError(
            f"anchor must be a frame of the code (a solution of nearest_frame), got one off by {error:.3g}"
        )
