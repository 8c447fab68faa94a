"""The three costs on which our solver is held to pymanopt's, each with its Euclidean derivatives written out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from helpers import normal


@dataclass
class Problem:
    """f(Q, θ) with its parameters, and its derivatives for pymanopt, which has points as columns."""

    parameters: tuple[Tensor, ...]
    rows: int
    columns: int

    def cost(self, point: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        raise NotImplementedError

    def gradient(self, point: Tensor) -> Tensor:
        raise NotImplementedError

    def hessian(self, point: Tensor, tangent: Tensor) -> Tensor:
        raise NotImplementedError


class Published(Problem):
    """½‖A − Q‖²: the nearest frame, whose minimiser is the polar factor of A."""

    def cost(self, point: Tensor, parameters: Any) -> Tensor:
        return 0.5 * (parameters[0] - point).square().sum((-2, -1))

    def gradient(self, point: Tensor) -> Tensor:
        return point - self.parameters[0]

    def hessian(self, point: Tensor, tangent: Tensor) -> Tensor:
        return tangent


class Brockett(Problem):
    """tr(N Q A Qᵀ): its minimiser has eigenvectors of A as rows, in the order of N."""

    def cost(self, point: Tensor, parameters: Any) -> Tensor:
        matrix, weights = parameters
        return (weights.unsqueeze(-1) * (point @ (0.5 * (matrix + matrix.mT))) * point).sum((-2, -1))

    def gradient(self, point: Tensor) -> Tensor:
        return self.hessian(point, point)

    def hessian(self, point: Tensor, tangent: Tensor) -> Tensor:
        matrix, weights = self.parameters
        return 2 * weights.unsqueeze(-1) * (tangent @ (0.5 * (matrix + matrix.mT)))


class UnbalancedProcrustes(Problem):
    """½ tr((A − Q)M(A − Q)ᵀ): an unbalanced Procrustes problem, which can have several minima."""

    def cost(self, point: Tensor, parameters: Any) -> Tensor:
        target, metric = parameters
        return 0.5 * ((point - target) @ (0.5 * (metric + metric.mT)) * (point - target)).sum((-2, -1))

    def gradient(self, point: Tensor) -> Tensor:
        return self.hessian(point, point - self.parameters[0])

    def hessian(self, point: Tensor, tangent: Tensor) -> Tensor:
        metric = self.parameters[1]
        return tangent @ (0.5 * (metric + metric.mT))


def published(rows: int, columns: int, seed: int = 0) -> Published:
    return Published((normal(rows, columns, seed=seed),), rows, columns)


def brockett(rows: int, columns: int, seed: int = 0) -> Brockett:
    weights = torch.arange(rows, 0, -1, dtype=torch.float64) / rows
    return Brockett((normal(columns, columns, seed=seed) / columns**0.5, weights), rows, columns)


def unbalanced_procrustes(rows: int, columns: int, seed: int = 0) -> UnbalancedProcrustes:
    root = normal(columns, 2 * columns, seed=seed + 1) / (2 * columns) ** 0.5
    return UnbalancedProcrustes((normal(rows, columns, seed=seed), root @ root.mT), rows, columns)


PROBLEMS = {"published": published, "brockett": brockett, "unbalanced Procrustes": unbalanced_procrustes}
