"""The Riemannian trust region compared with that of pymanopt at equal cost, start and tolerance; the softmax codes.

All computations are in fp64. The cost is the published one, ½‖A − Q‖², from a random start. pymanopt is given
explicit derivatives in NumPy; this library differentiates automatically. The runs of each solver are consecutive,
because alternating runs are slower: the thread pools of torch and NumPy interfere.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pymanopt
import torch
from _common import RESULTS, peak_growth, write
from pymanopt.manifolds import Stiefel
from pymanopt.optimizers import TrustRegions
from torch import Tensor
from torch.nn.functional import normalize

from neuralcollapse.geometry import argmin_on_stiefel, minimize_on_stiefel, stiefel
from neuralcollapse.geometry.softmax_code import _anneal_code, one_vs_rest_margins

TOLERANCE = 1e-6


@dataclass
class Problem:
    """A cost of (Q, θ) with its Euclidean derivatives and an initial point."""

    name: str
    cost: Callable[[Tensor, Tensor], Tensor]
    parameters: Tensor
    start: Tensor
    columns_as_points: tuple[Callable[..., Any], ...]  # cost, gradient and Hessian in numpy, as pymanopt has them


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def published(rows: int, columns: int, *, seed: int = 0) -> Problem:
    target = normal(rows, columns, seed=seed) / math.sqrt(columns)
    wide = target.mT.contiguous().numpy()
    return Problem(
        "published",
        lambda point, target: 0.5 * (target - point).square().sum((-2, -1)),
        target,
        stiefel.random_point(rows, columns, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64),
        (lambda point: 0.5 * ((wide - point) ** 2).sum(), lambda point: point - wide, lambda _, tangent: tangent),
    )


def pymanopt_run(problem: Problem) -> tuple[float, float]:
    """Return the cost reached and the seconds taken."""
    rows, columns = problem.start.shape
    manifold = Stiefel(columns, rows)

    cost, gradient, hessian = (pymanopt.function.numpy(manifold)(each) for each in problem.columns_as_points)
    posed = pymanopt.Problem(manifold, cost, euclidean_gradient=gradient, euclidean_hessian=hessian)
    begin = time.perf_counter()
    solver = TrustRegions(max_iterations=200, min_gradient_norm=TOLERANCE, verbosity=0)
    result = solver.run(posed, initial_point=problem.start.mT.contiguous().numpy())
    return float(result.cost), time.perf_counter() - begin


def our_run(problem: Problem) -> tuple[float, float]:
    begin = time.perf_counter()
    solution = minimize_on_stiefel(
        lambda point: problem.cost(point, problem.parameters),
        problem.start,
        tolerance=TOLERANCE,
        max_iterations=200,
    )
    seconds = time.perf_counter() - begin
    assert bool(solution.converged), solution.reason
    return float(solution.cost), seconds


def backward_work(rows: int, columns: int):
    problem = published(rows, columns)
    target = problem.parameters.clone().requires_grad_()
    upstream = normal(rows, columns, seed=9)
    point = argmin_on_stiefel(problem.cost, target, problem.start, tolerance=TOLERANCE, max_iterations=200).point
    return lambda: torch.autograd.grad(point, target, upstream, retain_graph=True)


def solver_row(problem: Problem, repeats: int) -> dict[str, object]:
    runs: dict[str, list[tuple[float, float]]] = {}
    for name, run in (
        ("pymanopt", pymanopt_run),
        ("ours", our_run),
    ):
        runs[name] = [run(problem) for _ in range(repeats + 1)]  # the first is not counted
    seconds = {name: statistics.median(taken for _, taken in of[1:] or of) for name, of in runs.items()}
    rows, columns = problem.start.shape
    work = backward_work(rows, columns)
    begin = time.perf_counter()
    work()
    backward = time.perf_counter() - begin
    theirs = runs["pymanopt"][0][0]
    return {
        "cost": problem.name,
        "rows": rows,
        "columns": columns,
        "forward_s": seconds["ours"],
        "pymanopt_forward_s": seconds["pymanopt"],
        "speedup": seconds["pymanopt"] / seconds["ours"],
        "relative_cost_difference": (runs["ours"][0][0] - theirs) / abs(theirs),
        "backward_s": backward,
        "backward_peak_mb": peak_growth(backward_work, rows, columns),
    }


def code_row(num_classes: int, feature_dim: int, seed: int, iterations: int) -> dict[str, object]:
    start = normal(num_classes, feature_dim, seed=seed)
    begin = time.perf_counter()
    annealed = _anneal_code(start, max_iterations=iterations)
    seconds = time.perf_counter() - begin
    direct = _anneal_code(start, temperatures=(0.5**12,), max_iterations=13 * iterations)
    least = {
        name: float(one_vs_rest_margins(code, tolerance=1e-3, max_iterations=100).min())
        for name, code in (("annealed", annealed), ("not_annealed", direct), ("random", normalize(start, dim=1)))
    }
    sizes = {"num_classes": num_classes, "feature_dim": feature_dim, "seed": seed, "iterations": iterations}
    return sizes | {"seconds": seconds} | {f"least_margin_{name}": value for name, value in least.items()}


PARTS: dict[str, Callable[[], list[dict[str, object]]]] = {
    "published": lambda: [solver_row(published(99, 512), 5)],
    "large": lambda: [solver_row(published(999, 2048), 0)],
    "codes": lambda: [code_row(100, 16, seed, 100) for seed in range(3)],
    "large-codes": lambda: [code_row(1000, 64, seed, 20) for seed in range(1)],
}


def main() -> None:
    """Run all parts, or update the rows of the parts named on the command line."""
    kept: dict[str, list[dict[str, Any]]] = {}
    path = RESULTS / "riemannian.json"
    if sys.argv[1:] and path.exists():
        for row in json.loads(path.read_text())["rows"]:
            kept.setdefault(row["part"], []).append(row)
    for part in sys.argv[1:] or PARTS:
        load = os.getloadavg()[0]
        kept[part] = [{"part": part, "load_before": load} | row for row in PARTS[part]()]
        print(*kept[part], sep="\n", flush=True)
    write("riemannian", [row for part in PARTS for row in kept.get(part, [])], "pymanopt", "numpy")


if __name__ == "__main__":
    main()
