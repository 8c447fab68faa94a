"""Polar factor and its derivative by matrix products alone ("Polar Express"), for accelerators.

An eigendecomposition uses a few per cent of the speed of an accelerator and blocks the host. This module computes the
inverse root of the Gram matrix by nine odd polynomials of degree 5. Each polynomial x·h(x²) is the best approximation
of the sign function on the image of the previous one. The iterations H ← h(H)²H and Z ← Z h(H) take H to I and Z to
(AAᵀ)^(−1/2). All computations are in fp64, because forming the Gram matrix squares the condition number, and because
TF32 does not affect fp64.

The solves do not cause device syncs: a `ConvergenceCheck` compares H with I a few solves later.

Source: Amsel, Persson, Musco, Gower, "The Polar Express" (2025).
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Largest max |H − I| that counts as converged. For fp64 input, a further Newton–Schulz step squares it.
CONVERGED = 1e-6
# Ratio of singular values up to which the polynomials converge, however loose the bound of the norm is.
LEAST_RATIO = 3e-4
# Coefficients a, b, c of x·(a + b x² + c x⁴), the minimax approximations of 1 on [1e-4, 1] and then on the image of the
# previous polynomial. Together they map [1e-4, 1] to within 2e-15 of 1.
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


class ConvergenceCheck:
    """Deferred convergence check of solves by products, which avoids a device sync.

    The first solve is checked immediately, because classes that have not been seen yet can make its matrix singular.
    Each later solve is checked exactly `lag` solves later, when an accelerator has finished it; if it did not converge,
    the solve at that time uses an SVD, which is counted in `fallbacks` and logged. The lag is fixed, so that all ranks
    make the same decision.

    A copy, including one by pickling, is a new check without history.

    Args:
        lag: Number of solves between a solve and its check; 0 checks each solve immediately, which causes a sync.

    Attributes:
        fallbacks: Number of solves that used an SVD.
        handle: Integer that identifies this check in a compiled operator; see `polar`.
    """

    def __init__(self, lag: int = 4) -> None:
        self.lag = lag
        self.fallbacks = 0
        self._solves = 0
        self._pending: deque[tuple[Tensor, torch.Event | None]] = deque()
        self.handle = next(_handles)
        _checks[self.handle] = self

    @staticmethod
    def of_handle(handle: int) -> ConvergenceCheck | None:
        """Return the check with a handle; None if the handle is 0 or the check no longer exists."""
        return _checks.get(handle)

    def needs_svd(self) -> bool:
        """Return whether the solve `lag` solves ago did not converge, so that this solve must use an SVD."""
        if self.lag == 0 or len(self._pending) < self.lag:
            return False
        error, event = self._pending.popleft()
        if event is not None:
            event.synchronize()
        return not float(error) <= CONVERGED

    def accepts(self, error: Tensor) -> bool:
        """Return False if this solve is checked immediately and did not converge; otherwise defer its check."""
        self._solves += 1
        if self.lag == 0 or self._solves == 1:
            return float(error) <= CONVERGED
        self._defer(error)
        return True

    def record_svd(self, error: Tensor) -> None:
        """Count a solve by SVD, log the first, second, fourth, … such solve, and defer the check of this one."""
        if self.lag == 0:
            return
        self._defer(error)
        self.fallbacks += 1
        if self.fallbacks & (self.fallbacks - 1) == 0:
            logger.warning(
                "polar factor by SVD, since products did not converge: the matrix is close to singular "
                "(a greater proximal_weight helps); %d so far",
                self.fallbacks,
            )

    def _defer(self, error: Tensor) -> None:
        """Start copying an error, a scalar on the device, to the host."""
        event = None
        if error.device.type != "cpu":
            host = torch.empty((), dtype=error.dtype, pin_memory=True)
            error, event = host.copy_(error, non_blocking=True), torch.Event(error.device.type)
            event.record()
        self._pending.append((error, event))

    def __deepcopy__(self, memo: dict[int, Any]) -> ConvergenceCheck:
        return ConvergenceCheck(self.lag)

    def __reduce__(self) -> tuple[type[ConvergenceCheck], tuple[int]]:
        return ConvergenceCheck, (self.lag,)


_handles = itertools.count(1)
_checks: weakref.WeakValueDictionary[int, ConvergenceCheck] = weakref.WeakValueDictionary()

# Checks each solve before it is used, which causes a device sync.
IMMEDIATE = ConvergenceCheck(lag=0)


def iterate(gram: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Q = G^(−1/2) A, G^(−1/2), G and the error max |H − I|.

    Args:
        gram: G = AAᵀ, (..., m, m) of fp64.
        matrix: A, (..., m, n) of fp32 or fp64.
    """
    bound = _norm_bound(gram)
    remaining, inverse_root = gram / bound, None
    for polynomial in SIGN_POLYNOMIALS:
        step = _even_part(polynomial, remaining, remaining @ remaining)
        inverse_root = step if inverse_root is None else inverse_root @ step
        remaining = step @ step @ remaining
    assert inverse_root is not None
    inverse_root = inverse_root / bound.sqrt()
    factor = inverse_root @ matrix.double()
    if matrix.dtype == torch.float64:  # a Newton–Schulz step restores the accuracy lost by squaring the condition
        factor = 1.5 * factor - 0.5 * (factor @ factor.mT) @ factor
    remaining.diagonal(dim1=-2, dim2=-1).sub_(1)
    return factor.to(matrix.dtype), inverse_root, gram, remaining.abs().max()


def vector_jacobian(gradient: Tensor, factor: Tensor, inverse_root: Tensor, gram: Tensor) -> Tensor:
    """Return ∂A = X Q + Z G(I − QᵀQ) for the gradient G of Q.

    With S = (AAᵀ)^(1/2) and Z its inverse, X solves S X + X S = G Qᵀ − Q Gᵀ.
    """
    wide, upstream = factor.double(), gradient.double()
    outer = upstream @ wide.mT
    along = _solve_sylvester(gram @ inverse_root, outer - outer.mT) - inverse_root @ outer
    return (along @ wide + inverse_root @ upstream).to(gradient.dtype)


def _even_part(polynomial: tuple[float, float, float], matrix: Tensor, square: Tensor) -> Tensor:
    """Return h(X) = a + b X + c X², with x·h(x²) the polynomial."""
    constant, linear, quadratic = polynomial
    value = torch.add(linear * matrix, square, alpha=quadratic)
    value.diagonal(dim1=-2, dim2=-1).add_(constant)
    return value


def _norm_bound(symmetric: Tensor) -> Tensor:
    """Return a bound (..., 1, 1) of the greatest eigenvalue, at most m^(1/8) times as large; 1 for a zero matrix.

    The bound is a Schatten norm, which takes two products.
    """
    scale = symmetric.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(torch.finfo(symmetric.dtype).tiny)
    unit = symmetric / scale[..., None, None]
    square = unit @ unit
    bound = scale * torch.linalg.matrix_norm(square @ square).pow(0.25)
    return torch.where(bound > 0, bound, 1)[..., None, None]


def _solve_sylvester(stretch: Tensor, right: Tensor) -> Tensor:
    """Return X with S X + X S = R, for S positive definite and R skew.

    The sign of [[S, R], [0, −S]] is [[I, 2X], [0, −I]]. The same polynomials take that matrix to its sign; only the
    upper two blocks are computed.
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
