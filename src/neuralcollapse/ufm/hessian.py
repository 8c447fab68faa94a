"""The ends of the Hessian's spectrum, from Hessian–vector products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from neuralcollapse._checks import check_at_least
from neuralcollapse.ufm._scipy import scipy_module
from neuralcollapse.ufm.flat import FlatObjective
from neuralcollapse.ufm.model import UnconstrainedFeatures

# Up to AUTO the dense Hessian is the faster way; beyond LARGEST (200 MB) it is refused.
DENSE_AUTO, DENSE_LARGEST = 300, 5_000
Method = Literal["auto", "dense", "lanczos"]


@dataclass(frozen=True)
class HessianExtremes:
    """The least and the greatest eigenpairs of the Hessian at a point, in fp64.

    Vectors are of all P trained parameters, in the order of ``model.parameters()``
    (``torch.nn.utils.vector_to_parameters`` puts one back).

    Attributes:
        least: (count,) ascending: the first is the least eigenvalue.
        least_directions: (count, P) unit eigenvectors of these.
        greatest: (count,) ascending: the last is the greatest eigenvalue.
        greatest_directions: (count, P) unit eigenvectors of these.
        residual: The largest ‖∇²f v − λv‖ of them all: an eigenvalue is within it of each λ.
        method: ``"dense"`` or ``"lanczos"``.
    """

    least: Tensor
    least_directions: Tensor
    greatest: Tensor
    greatest_directions: Tensor
    residual: float
    method: Literal["dense", "lanczos"]


def hessian_extremes(
    model: UnconstrainedFeatures,
    *,
    count: int = 1,
    method: Method = "auto",
    tolerance: float = 1e-12,
    generator: torch.Generator | None = None,
) -> HessianExtremes:
    """The least and the greatest eigenvalues of ∇²f where the model is, with their directions.

    Lanczos iterations on Hessian–vector products, so that no P × P matrix is formed; of at most 300 parameters the
    dense Hessian is used, which is faster there. The least eigenvalue is found as an extreme of ∇²f shifted by the
    greatest: of one near 0, a relative tolerance means nothing. The direction of a multiple least eigenvalue is a
    random one of its space, so that no symmetry of the parameters is in it. Lanczos may give a multiple eigenvalue
    fewer times than it is there; the dense Hessian gives it as often.

    Args:
        model: Its head in evaluation mode, or of a kind that moves no class means.
        count: How many at either end.
        method: ``"dense"`` (at most 5,000 parameters), ``"lanczos"``, or ``"auto"``.
        tolerance: Of the Lanczos iterations, relative to the greatest eigenvalue.
        generator: Source of the random vector that Lanczos starts from.

    Raises:
        ValueError: A model that is not a function of its parameters alone, or too large for the dense Hessian; a count
            not in [1, P).
        ImportError: scipy is not installed (Lanczos only).
        RuntimeError: Lanczos did not reach the tolerance.

    Examples:
        >>> from neuralcollapse.ufm import origin_curvature, symmetric_saddle
        >>> origin = symmetric_saddle(4, 1, 3, 0.01, 0.01)
        >>> abs(float(hessian_extremes(origin).least[0]) - origin_curvature(4, 3, 0.01, 0.01)) < 1e-12
        True
    """
    if method not in ("auto", "dense", "lanczos"):
        raise ValueError(f"method must be 'auto', 'dense' or 'lanczos', got {method!r}")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must lie in (0, 1), got {tolerance}")
    objective = FlatObjective(model)
    size = objective.size
    check_at_least("count", count, 1)
    if count >= size:
        raise ValueError(f"count must be less than the number of parameters = {size}, got {count}")
    if method == "dense" and size > DENSE_LARGEST:
        raise ValueError(
            f"method 'dense' must have at most {DENSE_LARGEST} parameters, got {size} (a Hessian of "
            f"{8 * size**2 / 1e9:.1f} GB): use 'lanczos'"
        )
    product = objective.hessian_product(objective.point())
    start = torch.randn(size, generator=generator, dtype=torch.float64)
    dense = method == "dense" or (method == "auto" and size <= DENSE_AUTO)
    ends = _dense(product, start, count) if dense else _lanczos(product, start, count, tolerance)
    residual = max(
        float((product(vector) - value * vector).norm())
        for values, vectors in (ends[:2], ends[2:])
        for value, vector in zip(values, vectors, strict=True)
    )
    return HessianExtremes(*ends, residual=residual, method="dense" if dense else "lanczos")


_Ends = tuple[Tensor, Tensor, Tensor, Tensor]


def _dense(product: Callable[[Tensor], Tensor], start: Tensor, count: int) -> _Ends:
    hessian = torch.func.vmap(product)(torch.eye(len(start), dtype=start.dtype))
    values, columns = torch.linalg.eigh(0.5 * (hessian + hessian.mT))
    multiple = columns[:, values <= values[0] + 1e-10 * values.abs().max()]
    # A random vector of the least eigenvalue's space first; what follows it completes the space.
    random = multiple @ (multiple.mT @ start)
    columns[:, : multiple.shape[1]] = torch.linalg.qr(torch.cat([random[:, None], multiple], 1)).Q[:, :-1]
    return values[:count], columns.mT[:count], values[-count:], columns.mT[-count:]


def _lanczos(product: Callable[[Tensor], Tensor], start: Tensor, count: int, tolerance: float) -> _Ends:
    greatest, greatest_directions = _largest(product, start, count, tolerance)
    shift = float(greatest[-1])
    shifted, directions = _largest(lambda vector: shift * vector - product(vector), start, count, tolerance)
    return shift - shifted.flip(0), directions.flip(0), greatest, greatest_directions


def _largest(product: Callable[[Tensor], Tensor], start: Tensor, count: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """The algebraically largest eigenvalues (count,), ascending, and their unit eigenvectors (count, P)."""
    linalg = scipy_module("sparse.linalg")
    size = len(start)

    def apply(vector: Any) -> Any:
        return product(torch.from_numpy(vector.reshape(-1).copy())).numpy()

    operator = linalg.LinearOperator((size, size), matvec=apply, dtype="float64")
    try:
        values, vectors = linalg.eigsh(
            operator,
            k=count,
            which="LA",
            v0=start.numpy(),
            tol=tolerance,
            ncv=min(size, max(40, 4 * count)),
            maxiter=1000,
        )
    except linalg.ArpackNoConvergence as error:
        raise RuntimeError(f"Lanczos did not reach tolerance {tolerance:g}: {error}") from error
    order = values.argsort()
    return torch.from_numpy(values[order]), torch.from_numpy(vectors[:, order].T.copy())
