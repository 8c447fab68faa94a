"""The polar factor and its derivative by matrix products alone, for accelerators.

An eigendecomposition uses a few per cent of an accelerator and stops the host. Here the inverse root of the Gram
matrix comes from nine odd polynomials of degree 5, each the best approximation of the sign on the interval that the
last one left: H ← h(H)²H and Z ← Z h(H), with x·h(x²) the polynomial, take H to I and Z to (AAᵀ)^(−1/2). All of it is
fp64, which squaring the condition asks for, and which TF32 does not touch.

Nothing waits for the device: how far H is from I in the end is looked at some solves later (`Watch`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuralcollapse.geometry.spectral import by_svd, gram_matrix
from neuralcollapse.geometry.watch import CONVERGED, Watch, watch_of

# The ratio of singular values up to which the polynomials converge whatever the slack of the norm's bound.
LEAST = 3e-4
# a, b, c of x·(a + b x² + c x⁴), minimax for 1 on [1e-4, 1], then on what is left (Amsel et al., "The Polar Express").
# Together they take [1e-4, 1] to within 2e-15 of 1.
SIGN_POLYNOMIALS = (
    (8.5098853025862775, -25.264304190830911, 18.753567899739639),
    (4.2495734789228772, -3.1549764881142303, 0.58588478249132738),
    (4.2251221907778435, -3.1380444350845752, 0.58395345512991633),
    (4.1248386869943979, -3.0683324528059918, 0.57600295364569517),
    (3.758010335802898, -2.8092738924032869, 0.54648420658768513),
    (2.8561775412916086, -2.134056233175481, 0.47011076918027424),
    (2.0206004157761758, -1.4037211504667026, 0.39067389685203301),
    (1.8758751004808886, -1.2509719904811062, 0.37509721234197992),
    (1.8750000002349902, -1.2500000002611002, 0.37500000002611002),
)


def decompose(matrix: Tensor, null: float, watch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Q, (AAᵀ)^(−1/2) and AAᵀ: by products, or by SVD where the watch says so."""
    watcher = watch_of(watch)
    if watcher is not None and watcher.asks_for_svd():
        return _by_svd(matrix, null, watcher)
    factor, inverse_root, gram, error = _iterate(matrix, null)
    if watch == Watch.AT_ONCE or (watcher is not None and watcher.is_first()):
        if not float(error) <= CONVERGED:
            return _by_svd(matrix, null, watcher)
    elif watcher is not None:
        watcher.note(error)
    return factor, inverse_root, gram


def vector_jacobian(gradient: Tensor, factor: Tensor, inverse_root: Tensor, gram: Tensor) -> Tensor:
    """∂A = X Q + Z G(I − QᵀQ) for the gradient G of Q: S = (AAᵀ)^(1/2), Z its inverse, S X + X S = G Qᵀ − Q Gᵀ."""
    wide, upstream = factor.double(), gradient.double()
    outer = upstream @ wide.mT
    along = _solve_sylvester(gram @ inverse_root, outer - outer.mT) - inverse_root @ outer
    return (along @ wide + inverse_root @ upstream).to(gradient.dtype)


def _by_svd(matrix: Tensor, null: float, watcher: Watch | None) -> tuple[Tensor, Tensor, Tensor]:
    """The same three from an SVD in fp64, of the directions above rounding."""
    factor, vectors, singular = by_svd(matrix.double(), null)
    cutoff = torch.finfo(matrix.dtype).eps * max(matrix.shape[-2:]) * singular.amax(-1, keepdim=True)
    inverse = torch.where(singular > cutoff, 1 / singular, 0)
    if watcher is not None:
        watcher.count()
        watcher.note(1 - (singular[..., -1] / singular[..., 0]).min().div(LEAST).clamp_max(1))
    inverse_root, gram = (vectors.mT @ (vectors * scale.unsqueeze(-1)) for scale in (inverse, singular.square()))
    return factor.to(matrix.dtype), inverse_root, gram


def _iterate(matrix: Tensor, null: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Q, (AAᵀ)^(−1/2), AAᵀ and max |H − I|."""
    wide = matrix.double()
    gram = gram_matrix(wide, null)
    bound = _norm_bound(gram)
    remaining, inverse_root = gram / bound, None
    for polynomial in SIGN_POLYNOMIALS:
        step = _even_part(polynomial, remaining, remaining @ remaining)
        inverse_root = step if inverse_root is None else inverse_root @ step
        remaining = step @ step @ remaining
    assert inverse_root is not None
    inverse_root = inverse_root / bound.sqrt()
    factor = inverse_root @ wide
    if matrix.dtype == torch.float64:  # one Newton–Schulz step restores what squaring the condition lost
        factor = 1.5 * factor - 0.5 * (factor @ factor.mT) @ factor
    remaining.diagonal(dim1=-2, dim2=-1).sub_(1)
    return factor.to(matrix.dtype), inverse_root, gram, remaining.abs().max()


def _even_part(polynomial: tuple[float, float, float], matrix: Tensor, square: Tensor) -> Tensor:
    """h(X) = a + b X + c X², of the polynomial x·h(x²)."""
    constant, linear, quadratic = polynomial
    value = torch.add(linear * matrix, square, alpha=quadratic)
    value.diagonal(dim1=-2, dim2=-1).add_(constant)
    return value


def _norm_bound(symmetric: Tensor) -> Tensor:
    """A bound of the greatest eigenvalue, (..., 1, 1), at most m^(1/8) times it: a Schatten norm, by two products.

    1 for a zero matrix.
    """
    scale = symmetric.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(torch.finfo(symmetric.dtype).tiny)
    unit = symmetric / scale[..., None, None]
    square = unit @ unit
    bound = scale * torch.linalg.matrix_norm(square @ square).pow(0.25)
    return torch.where(bound > 0, bound, 1)[..., None, None]


def _solve_sylvester(stretch: Tensor, right: Tensor) -> Tensor:
    """X of S X + X S = R, for S positive definite and R skew.

    The sign of [[S, R], [0, −S]] is [[I, 2X], [0, −I]]; the same polynomials take that matrix there, of which only the
    upper two blocks are kept.
    """
    bound = _norm_bound(stretch)
    stretch, right = stretch / bound, right / bound
    for polynomial in SIGN_POLYNOMIALS:
        square = stretch @ stretch
        product = stretch @ right
        upper = product + product.mT  # S R − R S, the upper right block of the square; symmetric, as R is skew
        product = square @ upper
        change = torch.add(polynomial[1] * upper, product + product.mT, alpha=polynomial[2])
        step = _even_part(polynomial, square, square @ square)
        stretch, right = stretch @ step, right @ step + stretch @ change
    return right / 2
