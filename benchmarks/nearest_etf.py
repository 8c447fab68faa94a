"""The nearest simplex ETF: closed form, Riemannian trust region, and an SVD with automatic differentiation.

The trust region (pymanopt, fp64) solves the published problem over (K, d) Stiefel matrices with a proximal term. It
starts from the previous solution, after the class means have moved by 1e-2 relative. The reduced objective is that of
`nearest_simplex_etf`, evaluated in fp64 at both solutions.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pymanopt
import torch
from _common import bare_solve, load_before, medians, peak_growth, write
from pymanopt.manifolds import Stiefel
from pymanopt.optimizers import TrustRegions

from neuralcollapse import nearest_simplex_etf, simplex_etf
from neuralcollapse.geometry.simplex import expand, reduce

SHAPES = [(10, 512), (100, 512), (100, 2048), (1000, 2048)]
DELTA = 1e-3  # the published proximal weight


def problem(num_classes: int, feature_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return class means, the ETF nearest to them before they moved, and an upstream gradient."""
    draw = torch.Generator().manual_seed(0)
    means = torch.randn(num_classes, feature_dim, generator=draw, dtype=torch.float64)
    anchor = nearest_simplex_etf(means)
    step = torch.randn(num_classes, feature_dim, generator=draw, dtype=torch.float64)
    moved = means + 1e-2 * means.norm() / step.norm() * step
    upstream = torch.randn(num_classes, feature_dim, generator=draw, dtype=torch.float64)
    return moved.to(dtype).requires_grad_(), anchor.to(dtype), upstream.to(dtype)


def gamma(num_classes: int) -> float:
    return DELTA * (num_classes - 1) / 2


def closed_form(means: torch.Tensor, anchor: torch.Tensor, check_values: bool = True) -> torch.Tensor:
    return nearest_simplex_etf(means, anchor=anchor, proximal_weight=gamma(means.shape[0]), check_values=check_values)


def svd_autograd(means: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
    """Return the polar factor by torch.linalg.svd, differentiated automatically."""
    count = means.shape[0]
    centred = means - means.mean(0)
    target = math.sqrt(count - 1) * reduce(centred / centred.norm())
    target = target + gamma(count) * math.sqrt((count - 1) / count) * reduce(anchor)
    left, _, right = torch.linalg.svd(target, full_matrices=False)
    return math.sqrt(count / (count - 1)) * expand(left @ right)


def reduced_objective(means: torch.Tensor, etf: torch.Tensor, anchor: torch.Tensor) -> float:
    means, etf, anchor = means.detach().double(), etf.detach().double(), anchor.double()
    count = means.shape[0]
    centred = means - means.mean(0)
    data = (centred / centred.norm() - etf / math.sqrt(count)).square().sum()
    proximal = (count - 1) / count * reduce(etf - anchor).square().sum()
    return float((count - 1) / 2 * data + gamma(count) / 2 * proximal)


def trust_region(means: torch.Tensor, anchor: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Solve the published problem, transposed to pymanopt's (d, K); return the ETF and the seconds taken."""
    count, dimension = means.shape
    centred = (means - means.mean(0)).detach().double()
    target = (centred / centred.norm()).T.numpy()
    scale = 1 / math.sqrt(count - 1)
    # The previous solution: the reduced one, and a direction along the all-ones vector that does not affect the ETF.
    frame = math.sqrt((count - 1) / count) * anchor.double()
    draw = torch.randn(dimension, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    nuisance = draw - frame.T @ torch.linalg.pinv(frame.T) @ draw
    start = (frame + nuisance / nuisance.norm() / math.sqrt(count)).T.numpy()

    manifold = Stiefel(dimension, count)

    def centre(matrix: np.ndarray) -> np.ndarray:
        return matrix - matrix.mean(1, keepdims=True)

    @pymanopt.function.numpy(manifold)
    def cost(point: np.ndarray) -> float:
        return float(((target - scale * centre(point)) ** 2).sum() + DELTA / 2 * ((point - start) ** 2).sum())

    @pymanopt.function.numpy(manifold)
    def gradient(point: np.ndarray) -> np.ndarray:
        return -2 * scale * centre(target - scale * centre(point)) + DELTA * (point - start)

    @pymanopt.function.numpy(manifold)
    def hessian(_point: np.ndarray, tangent: np.ndarray) -> np.ndarray:
        return 2 * scale**2 * centre(tangent) + DELTA * tangent

    posed = pymanopt.Problem(manifold, cost, euclidean_gradient=gradient, euclidean_hessian=hessian)
    begin = time.perf_counter()
    result = TrustRegions(max_iterations=30, verbosity=0).run(posed, initial_point=start)
    seconds = time.perf_counter() - begin
    return math.sqrt(count / (count - 1)) * torch.from_numpy(centre(result.point).T.copy()), seconds


def prepare(num_classes: int, feature_dim: int, dtype: torch.dtype, backward: bool):
    """Return the work whose memory is measured, after the start-up of the libraries."""
    draw = torch.Generator().manual_seed(0)
    means, upstream = (torch.randn(num_classes, feature_dim, generator=draw, dtype=dtype) for _ in range(2))
    anchor = simplex_etf(num_classes, feature_dim, dtype=dtype)
    means.requires_grad_()
    small = torch.randn(3, 9, dtype=dtype, requires_grad=True)
    nearest_simplex_etf(small).sum().backward()

    if not backward:
        return lambda: closed_form(means, anchor)
    etf = closed_form(means, anchor)
    return lambda: torch.autograd.grad(etf, means, upstream)


def measure(num_classes: int, feature_dim: int, dtype: torch.dtype, before: ModuleType | None) -> dict[str, object]:
    means, anchor, upstream = problem(num_classes, feature_dim, dtype)
    ours, svd = closed_form(means, anchor), svd_autograd(means, anchor)
    others = {}
    if before is not None:
        old = before.nearest_simplex_etf(means, anchor=anchor, proximal_weight=gamma(num_classes))
        others = {
            "before_forward": lambda: before.nearest_simplex_etf(
                means, anchor=anchor, proximal_weight=gamma(num_classes)
            ),
            "before_backward": lambda: torch.autograd.grad(old, means, upstream, retain_graph=True),
        }
    seconds = medians(
        {
            "bare_solve": lambda: bare_solve(means.detach(), anchor, gamma(num_classes)),
            **others,
            "forward": lambda: closed_form(means, anchor),
            "unchecked_forward": lambda: closed_form(means, anchor, check_values=False),
            "backward": lambda: torch.autograd.grad(ours, means, upstream, retain_graph=True),
            "svd_forward": lambda: svd_autograd(means, anchor),
            "svd_backward": lambda: torch.autograd.grad(svd, means, upstream, retain_graph=True),
        },
        repeats=3 if num_classes == 1000 else 51,
    )
    runs = [trust_region(means, anchor) for _ in range(1 if num_classes == 1000 else 5)]
    published, solver_seconds = runs[0][0], sorted(taken for _, taken in runs)[len(runs) // 2]
    return {
        "num_classes": num_classes,
        "feature_dim": feature_dim,
        "dtype": str(dtype).removeprefix("torch."),
        **{f"{name}_ms": 1e3 * value for name, value in seconds.items()},
        "trust_region_fp64_forward_ms": 1e3 * solver_seconds,
        "forward_speedup_over_trust_region_fp64": solver_seconds / seconds["forward"],
        "forward_in_bare_solves": seconds["forward"] / seconds["bare_solve"],
        "unchecked_forward_in_bare_solves": seconds["unchecked_forward"] / seconds["bare_solve"],
        "backward_over_forward": seconds["backward"] / seconds["forward"],
        "objective_minus_trust_regions": reduced_objective(means, ours, anchor)
        - reduced_objective(means, published, anchor),
        "etf_difference_frobenius": float((ours.detach().double() - published).norm()),
        "forward_peak_mb": peak_growth(prepare, num_classes, feature_dim, dtype, False),
        "backward_peak_mb": peak_growth(prepare, num_classes, feature_dim, dtype, True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="older checkout to compare with")
    checkout = parser.parse_args().before
    torch.set_num_threads(1)
    before = load_before(checkout) if checkout else None
    rows = []
    for dtype in (torch.float32, torch.float64):
        for shape in SHAPES:
            rows.append(measure(*shape, dtype, before))
            row = rows[-1]
            print(
                f"K={shape[0]:5} d={shape[1]:5} {row['dtype']}: forward {row['forward_ms']:8.2f} ms, "
                f"backward {row['backward_ms']:8.2f} ms ({row['backward_peak_mb']:.0f} MB), "
                f"trust region {row['trust_region_fp64_forward_ms']:9.1f} ms "
                f"({row['forward_speedup_over_trust_region_fp64']:.0f}x), "
                f"objective - its {row['objective_minus_trust_regions']:+.1e}",
                flush=True,
            )
    write("nearest_etf", rows, "pymanopt", "numpy")


if __name__ == "__main__":
    main()
