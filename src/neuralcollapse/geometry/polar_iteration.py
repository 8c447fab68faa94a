"""The polar factor and its derivative by matrix products alone ("Polar Express"), for accelerators.

An eigendecomposition uses a few per cent of an accelerator and stops the host. Here the inverse root of the Gram
matrix comes from nine odd polynomials of degree 5, each the best approximation of the sign on the interval that the
previous polynomial left: H ← h(H)²H and Z ← Z h(H), with x·h(x²) the polynomial, take H to I and Z to (AAᵀ)^(−1/2). All
of it is computed in fp64, because forming the Gram matrix squares the condition number, and because TF32 does not
affect fp64.

Nothing waits for the device: a `ConvergenceCheck` compares H with I a few solves later.

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

# Largest max |H − I| that counts as converged. In fp64 one more Newton–Schulz step squares it.
CONVERGED = 1e-6
# Ratio of singular values up to which the polynomials converge, whatever the slack of the norm's bound.
LEAST_RATIO = 3e-4
# a, b, c of x·(a + b x² + c x⁴), minimax for 1 on [1e-4, 1], then on the image of the previous polynomial. Together
# they take [1e-4, 1] to within 2e-15 of 1.
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
    """A deferred check of whether solves by products converged, which does not wait for the device.

    The first solve is checked at once, because classes that have not been seen yet can make its matrix singular. Each
    later one is checked exactly `lag` solves later, when an accelerator has long finished it; if it did not converge,
    that later solve takes an SVD, which is counted in `fallbacks` and logged. The lag is fixed so that all ranks decide
    alike.

    A copy, also by pickling, is a new check without history.

    Args:
        lag: Solves between a solve and its check; 0 checks each solve at once, which waits for the device.

    Attributes:
        fallbacks: Number of solves that took an SVD.
        handle: Integer by which a compiled operator finds this check; see `polar`.
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
        """Return the check of a handle; None for 0, or if it no longer exists."""
        return _checks.get(handle)

    def needs_svd(self) -> bool:
        """Return whether the solve `lag` ago did not converge, so that this one must take an SVD."""
        if self.lag == 0 or len(self._pending) < self.lag:
            return False
        error, event = self._pending.popleft()
        if event is not None:
            event.synchronize()
        return not float(error) <= CONVERGED

    def accepts(self, error: Tensor) -> bool:
        """Return False if this solve is checked at once and did not converge; else leave its error for later."""
        self._solves += 1
        if self.lag == 0 or self._solves == 1:
            return float(error) <= CONVERGED
        self._defer(error)
        return True

    def record_svd(self, error: Tensor) -> None:
        """Count a solve by SVD, log the first, the second, the fourth and so on, and leave its error for later."""
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

# Checks each solve before it is used; waits for the device.
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
    if matrix.dtype == torch.float64:  # one Newton–Schulz step restores what squaring the condition lost
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
    """Return an upper bound of the greatest eigenvalue, (..., 1, 1), at most m^(1/8) times it; 1 for a zero matrix.

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
