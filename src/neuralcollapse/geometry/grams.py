"""Gram matrices of classes: what they share, where they stand in a tree, how far they are from each other.

Each is (K, K) with a unit diagonal and positive semi-definite; `code_from_gram` makes class vectors of it. What is
common to all classes changes no decision, so a Gram counts for a classifier as Π G Π with Π = I − 11ᵀ/K only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuralcollapse._checks import (
    check_at_least,
    check_factory,
    check_finite,
    check_floating,
    check_integers,
    check_not_negative,
    compute_dtype,
    is_number,
)

# Negative eigenvalues up to this share of the greatest are dropped.
NEGLIGIBLE = 1e-6


def simplex_gram(
    num_classes: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """K/(K−1) Π, the Gram matrix of a unit simplex ETF: every pair of classes has cosine −1/(K−1).

    At K = 2 it is [[1, −1], [−1, 1]].

    Args:
        num_classes: K ≥ 2.
        dtype: Floating dtype; the default dtype if not given.
        device: Where to create it.

    Returns:
        (K, K).

    Raises:
        ValueError: K < 2, a dtype that is not floating, or no device of that name.

    Source: Papyan, Han, Donoho (PNAS 2020).

    Examples:
        >>> simplex_gram(3)
        tensor([[ 1.0000, -0.5000, -0.5000],
                [-0.5000,  1.0000, -0.5000],
                [-0.5000, -0.5000,  1.0000]])
    """
    check_at_least("num_classes", num_classes, 2)
    check_factory(dtype, device)
    gram = torch.full((num_classes, num_classes), -1 / (num_classes - 1), dtype=dtype, device=device)
    return gram.fill_diagonal_(1)


def attribute_gram(attributes: Tensor, weights: Tensor) -> Tensor:
    r"""What classes share: Σ_a α_a · ETF_a[v_a(k), v_a(l)] + (1 − Σ_a α_a) · ETF_K.

    v_a(k) is the value of attribute a for class k, ETF_a the simplex Gram of that attribute's values (1 for an
    attribute of one value, which tells no classes apart) and ETF_K that of the classes. Classes that share a value are
    drawn together by α_a. Two classes with equal attributes have the inner product 1 − (1 − Σα)K/(K−1), which is 1 at
    Σα = 1: then they are the same vector. At K = 2, and wherever every attribute has a value of its own for each class,
    it is the simplex Gram.

    Args:
        attributes: (K, A) integers, a row a class.
        weights: α (A,), at least 0, of a sum of at most 1.

    Returns:
        (K, K), in the dtype of ``weights``.

    Raises:
        ValueError: Arguments of another kind or shape, fewer than two classes, or weights out of range.

    Source: a sum of simplex Grams, each positive semi-definite (this project).

    Examples:
        >>> digits = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])  # of the classes 00, 01, 10, 11
        >>> attribute_gram(digits, torch.tensor([0.5, 0.5]))
        tensor([[ 1.,  0.,  0., -1.],
                [ 0.,  1., -1.,  0.],
                [ 0., -1.,  1.,  0.],
                [-1.,  0.,  0.,  1.]])
    """
    check_integers("attributes", attributes)
    if attributes.ndim != 2:
        raise ValueError(f"attributes must be of shape (K, A), got {tuple(attributes.shape)}")
    num_classes, count = attributes.shape
    check_at_least("num_classes", num_classes, 2)
    check_floating("weights", weights)
    if weights.shape != (count,):
        raise ValueError(f"weights must be of shape (A,) = ({count},), got {tuple(weights.shape)}")
    check_finite("weights", weights)
    total = float(weights.double().sum())
    if bool((weights < 0).any()) or total > 1 + torch.finfo(weights.dtype).eps * count:
        raise ValueError(
            f"weights must be at least 0, of a sum of at most 1, got {weights.tolist()} of sum {total:.6g}"
        )
    share = weights.to(compute_dtype(weights.dtype))
    gram = (1 - share.sum()) * simplex_gram(num_classes, dtype=share.dtype, device=share.device)
    for weight, values in zip(share, attributes.to(share.device).T, strict=True):
        number = len(values.unique())
        other = -1 / (number - 1) if number > 1 else 1.0
        equal = (values[:, None] == values).to(share.dtype)
        gram += weight * (other + (1 - other) * equal)
    return gram.fill_diagonal_(1).to(weights.dtype)


def distance_gram(distances: Tensor, decay: float, floor: float = 0.0) -> Tensor:
    r"""From distances D of classes: (1 − s)·exp(−γ D/D_max) + s.

    The floor s is common to all classes: it scales what is left after centring by 1 − s. Equal classes, of distance 0,
    have the inner product 1; at K = 2, and with equal distances, every pair has (1 − s)e^(−γ) + s, which is, centred, a
    multiple of the simplex Gram.

    Args:
        distances: D (K, K) floating, symmetric, at least 0, with a zero diagonal.
        decay: γ > 0.
        floor: s, from −1/(K−1) on and below 1.

    Returns:
        (K, K), in the dtype of ``distances``. Negative eigenvalues up to 1e-6 of the greatest are dropped and the
        diagonal scaled to 1 again. For distances in a tree, or between points (also squared), there are none.

    Raises:
        ValueError: Distances that are not as said or all zero, a decay or a floor out of range, or an outcome that is
            not positive semi-definite (how far).

    Source: HAFrame (Liang and Davis, ICCV 2023, arXiv 2303.05689).

    Examples:
        >>> distance_gram(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), decay=1.0)
        tensor([[1.0000, 0.3679],
                [0.3679, 1.0000]])
    """
    check_floating("distances", distances)
    check_square("distances", distances)
    num_classes = len(distances)
    wide = distances.double()
    if bool((wide < 0).any()) or bool(wide.diagonal().any()):
        raise ValueError("distances must be at least 0, with a zero diagonal")
    if not bool(wide.any()):
        raise ValueError("distances must not be all zero")
    check_not_negative("decay", decay)
    if decay == 0:
        raise ValueError("decay must be greater than 0, got 0")
    least = -1 / (num_classes - 1)
    if not (is_number(floor) and least <= floor < 1):
        raise ValueError(f"floor must lie in [-1/(K-1), 1) = [{least:.3g}, 1), got {floor!r}")
    gram = (1 - floor) * torch.exp(-decay / wide.max() * wide) + floor
    return _made_semidefinite("distance_gram(distances, ...)", gram).to(distances.dtype)


def tree_gram(parents: Tensor, decay: float, *, dtype: torch.dtype | None = None) -> Tensor:
    r"""Of a hierarchy: exp(−γ D/D_max), D the number of edges between two classes in the tree.

    Where all classes are equally deep, D is twice the height of their lowest common ancestor. Brothers are nearest. At
    K = 2, and where all classes hang on the root, every pair has e^(−γ): centred, a multiple of the simplex Gram.

    Args:
        parents: (M,) integers: the parent of each node, −1 for the root. The classes are the leaves, and the first K
            nodes.
        decay: γ > 0.
        dtype: Floating dtype; the default dtype if not given.

    Returns:
        (K, K), positive semi-definite for every tree.

    Raises:
        ValueError: What is no tree with its leaves first, fewer than two classes, or a decay out of range.

    Source: `distance_gram` (HAFrame, arXiv 2303.05689) of the tree's own distance.

    Examples:
        >>> tree_gram(torch.tensor([3, 3, 4, 4, -1]), decay=3.0)  # two brothers, and one more class
        tensor([[1.0000, 0.1353, 0.0498],
                [0.1353, 1.0000, 0.0498],
                [0.0498, 0.0498, 1.0000]])
    """
    check_factory(dtype, None)
    edges = _edges_to_root(parents)
    count = edges.sum(1)
    distances = count[:, None] + count - 2 * edges @ edges.T
    return distance_gram(distances, decay).to(dtype or torch.get_default_dtype())


def embedding_gram(embeddings: Tensor) -> Tensor:
    """Cosines of the centred rows, as of embeddings of the classes' names.

    Equal rows have cosine 1. At K = 2 it is [[1, −1], [−1, 1]], the simplex Gram.

    Args:
        embeddings: (K, e) floating, a row a class.

    Returns:
        (K, K), in the dtype of ``embeddings``.

    Raises:
        ValueError: Another shape or kind, values that are not finite, or a row that is the mean of all.

    Source: this project.

    Examples:
        >>> embedding_gram(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        tensor([[ 1., -1.],
                [-1.,  1.]])
    """
    check_floating("embeddings", embeddings)
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings must be of shape (K, e), got {tuple(embeddings.shape)}")
    check_at_least("num_classes", len(embeddings), 2)
    check_finite("embeddings", embeddings)
    centred = embeddings.double() - embeddings.double().mean(0)
    norms = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    rounding = 4 * torch.finfo(embeddings.dtype).eps * torch.linalg.matrix_norm(embeddings.double())
    if not bool((norms > rounding).all()):
        raise ValueError(f"embeddings must differ from their mean; row {int(norms.argmin())} does not")
    unit = centred / norms
    gram = unit @ unit.T
    return (0.5 * (gram + gram.T)).fill_diagonal_(1).to(embeddings.dtype)


def check_square(name: str, matrix: Tensor) -> None:
    """Raise unless a floating tensor is a finite symmetric matrix of at least two classes."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{name} must be of shape (K, K), got {tuple(matrix.shape)}")
    check_at_least("num_classes", len(matrix), 2)
    check_finite(name, matrix)
    asymmetry = float((matrix - matrix.T).abs().max())
    if asymmetry > torch.finfo(matrix.dtype).eps ** 0.5 * float(matrix.abs().max()):
        raise ValueError(f"{name} must be symmetric, got entries that differ from their mirror by {asymmetry:.3g}")


def check_semidefinite(name: str, eigenvalues: Tensor) -> None:
    """Raise if an ascending eigenvalue is negative by more than `NEGLIGIBLE` of the greatest."""
    least, greatest = float(eigenvalues[0]), float(eigenvalues[-1])
    if least < -NEGLIGIBLE * max(greatest, 0.0):
        raise ValueError(
            f"{name} must be positive semi-definite, got a least eigenvalue of {least:.3g} "
            f"(the greatest is {greatest:.3g})"
        )


def _made_semidefinite(name: str, gram: Tensor) -> Tensor:
    """The Gram matrix without small negative eigenvalues, of unit diagonal again."""
    eigenvalues, vectors = torch.linalg.eigh(gram)
    check_semidefinite(name, eigenvalues)
    if eigenvalues[0] >= -len(gram) * torch.finfo(gram.dtype).eps * eigenvalues[-1]:
        return gram
    root = vectors * eigenvalues.clamp_min(0).sqrt()
    root = root / torch.linalg.vector_norm(root, dim=1, keepdim=True)
    rebuilt = root @ root.T
    return (0.5 * (rebuilt + rebuilt.T)).fill_diagonal_(1)


def _edges_to_root(parents: Tensor) -> Tensor:
    """(K, M) in fp64: 1 where the edge above a node lies between a class and the root."""
    check_integers("parents", parents)
    if parents.ndim != 1:
        raise ValueError(f"parents must be of shape (M,), got {tuple(parents.shape)}")
    parents, nodes = parents.cpu().long(), len(parents)
    if bool((parents < -1).any()) or bool((parents >= nodes).any()) or int((parents == -1).sum()) != 1:
        raise ValueError(f"parents must be indices of nodes below {nodes}, and -1 for one root, got {parents.tolist()}")
    inner = torch.zeros(nodes, dtype=torch.bool)
    inner[parents[parents >= 0]] = True
    num_classes = int((~inner).sum())
    if bool(inner[:num_classes].any()):
        raise ValueError(
            f"parents must begin with the classes, which are the leaves; of the first {num_classes} nodes, "
            f"{inner[:num_classes].nonzero().flatten().tolist()} have children"
        )
    check_at_least("num_classes", num_classes, 2)
    edges = torch.zeros(num_classes, nodes, dtype=torch.float64)
    rows, node = torch.arange(num_classes), torch.arange(num_classes)
    for _ in range(nodes):
        above = parents[node] >= 0
        rows, node = rows[above], node[above]
        if not len(node):
            return edges
        edges[rows, node] = 1
        node = parents[node]
    raise ValueError("parents must form a tree, got a cycle")
