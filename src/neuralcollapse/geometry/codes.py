"""Codes, which are class vectors up to rotation, and their construction from Gram matrices and class means.

A code L (K, r) describes a geometry up to rotation: its frames are L Q with Q (r, d) of orthonormal rows. A component
that all class vectors share does not change decisions, so only Π G Π with Π = I − 11ᵀ/K matters of a Gram matrix G. The
Gram matrices in this module are (K, K), positive semi-definite and have a unit diagonal.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from neuralcollapse._checks import (
    check_at_least,
    check_code,
    check_etf_sizes,
    check_factory,
    check_finite,
    check_floating,
    check_integers,
    check_not_negative,
    check_shapes,
    compute_dtype,
    is_number,
    values_readable,
)
from neuralcollapse.geometry.polar import Method, polar
from neuralcollapse.geometry.polar_iteration import ConvergenceCheck
from neuralcollapse.geometry.simplex import check_simplex_etf, expand, reduce


class Code:
    """Code in principal coordinates: class vectors L (K, r) with orthogonal columns, as returned by `principal_code`.

    Args:
        vectors: L, (K, r); (..., K, r) after `shifted` with batched class weights.

    Attributes:
        num_classes: K.
        rank: r, the rank of L.

    Raises:
        ValueError: if the code has no frame in the dimension given to `check_dimension`, or the class vectors given to
            `check_frame` are not a frame of the code.

    Examples:
        >>> code = Code(principal_code(torch.tensor([[1.0], [-1.0]]), feature_dim=3))
        >>> code.num_classes, code.rank
        (2, 1)
        >>> code.expand(torch.eye(1, 3, dtype=torch.float64)).norm(dim=1).round(decimals=6)
        tensor([1., 1.], dtype=torch.float64)
    """

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors
        self.num_classes, self.rank = vectors.shape[-2:]

    def expand(self, coordinates: Tensor) -> Tensor:
        """Return the frame L Q (..., K, d) of coordinates Q (..., r, d)."""
        return self.vectors @ coordinates

    def reduce(self, class_vectors: Tensor, norm: Tensor) -> Tensor:
        """Return (r/‖L‖_F) Lᵀ C/‖C‖_F (..., r, d) for C (..., K, d) with rows that sum to zero, given its norm."""
        scale = self.rank / torch.linalg.matrix_norm(self.vectors, keepdim=True)
        return self.vectors.mT @ class_vectors * (scale / norm)

    def coordinates(self, frame: Tensor, factor: float | Tensor = 1.0) -> Tensor:
        """Return ``factor`` times Q (..., r, d) of a frame L Q, which is diag(‖l_j‖⁻²) Lᵀ (L Q)."""
        return factor * ((self.vectors / self.vectors.square().sum(-2)).mT @ frame)

    def polar(self, target: Tensor, method: Method, check: ConvergenceCheck | None) -> Tensor:
        """Return the coordinates Q (..., r, d) that maximise ⟨Ã, Q⟩ for Ã (..., r, d): the polar factor of Ã."""
        return polar(target, method, check)

    def shifted(self, class_weights: Tensor) -> Code:
        """Return the code shifted to zero weighted mean, for class weights (..., K, 1) of mean 1."""
        return Code(self.vectors - (class_weights * self.vectors).mean(-2, keepdim=True))

    def to(self, like: Tensor) -> Code:
        """Return the code on the device and in the dtype of a tensor."""
        return Code(self.vectors.to(like))

    def check_dimension(self, feature_dim: int) -> None:
        """Raise a `ValueError` unless the code has frames in ``feature_dim`` dimensions."""
        check_at_least("feature_dim", feature_dim, self.rank, "the rank of the code")

    def check_frame(self, name: str, frame: Tensor) -> None:
        """Raise unless (..., K, d) class vectors are a frame L Q up to a common row; skipped if unreadable."""
        if not values_readable(frame):
            return
        tolerance = 3e-2 if frame.dtype in (torch.bfloat16, torch.float16) else 1e-3
        frame = frame.to(self.vectors)
        rotation = self.coordinates(frame)
        off = (frame - frame.mean(-2, keepdim=True) - self.expand(rotation)).abs().amax() / self.vectors.abs().amax()
        identity = torch.eye(self.rank, dtype=frame.dtype, device=frame.device)
        error = max(float(off), float((rotation @ rotation.mT - identity).abs().amax()))
        if not error <= tolerance:
            raise ValueError(
                f"{name} must be a frame of the code (a solution of nearest_frame), got one that differs by {error:.3g}"
            )


class SimplexCode(Code):
    """Code of the unit simplex ETF, L = √(K/(K−1)) Π with Π = I − 11ᵀ/K, which is not stored.

    The code has K columns, although its rank is K−1. Its coordinates are Q (K, d) with QQᵀ = Π, so that both products
    are scalings: an ETF is √(K/(K−1)) Q, and Π C = C for centred C. With an orthonormal basis of the complement of 1
    and Q (K−1, d), each solve would need sums over classes before and after it, which took 1.1 times as long at
    (100, 512).

    Class weights do not shift the code: its frames retain unit rows with zero mean.

    Args:
        num_classes: K ≥ 2.
        proximal_weight: Greatest γ of the solves, which determines the scale of the artificial singular value along 1.

    Raises:
        ValueError: if K < 2; as for `Code`.
    """

    def __init__(self, num_classes: int, proximal_weight: float = 0.0) -> None:
        check_at_least("num_classes", num_classes, 2)
        self.num_classes, self.rank = num_classes, num_classes - 1
        self._proximal_weight = proximal_weight

    def expand(self, coordinates: Tensor) -> Tensor:
        """Return the simplex ETF √(K/(K−1)) Q (..., K, d) of coordinates Q (..., K, d)."""
        return math.sqrt(self.num_classes / self.rank) * coordinates

    def reduce(self, class_vectors: Tensor, norm: Tensor) -> Tensor:
        """Return √(K−1) C/‖C‖_F (..., K, d) for C (..., K, d) with rows that sum to zero, given its norm."""
        return class_vectors * (math.sqrt(self.rank) / norm)

    def coordinates(self, frame: Tensor, factor: float | Tensor = 1.0) -> Tensor:
        """Return ``factor`` times Q (..., K, d) of a simplex ETF, which is √((K−1)/K) E."""
        return factor * math.sqrt(self.rank / self.num_classes) * frame

    def polar(self, target: Tensor, method: Method, check: ConvergenceCheck | None) -> Tensor:
        """Return the coordinates Q (..., K, d), QQᵀ = Π, that maximise ⟨Ã, Q⟩ for Ã whose rows sum to zero."""
        # σ² has the size of the squared singular values at collapse: 1 from the data, plus those of the anchor.
        return polar(target, method, check, null=(1 + self._proximal_weight) ** 2)

    def shifted(self, class_weights: Tensor) -> SimplexCode:
        """Return the code itself."""
        return self

    def to(self, like: Tensor) -> SimplexCode:
        """Return the code itself, which has no dtype or device."""
        return self

    def check_dimension(self, feature_dim: int) -> None:
        """Raise unless d ≥ K−1."""
        check_etf_sizes(self.num_classes, feature_dim)

    def check_frame(self, name: str, frame: Tensor) -> None:
        """Raise unless (..., K, d) class vectors are a unit simplex ETF; skipped if values are unreadable."""
        check_simplex_etf(name, frame)


# Negative eigenvalues up to this share of the greatest eigenvalue are dropped.
NEGLIGIBLE = 1e-6


def simplex_gram(
    num_classes: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Return K/(K−1) Π, the Gram matrix of a unit simplex ETF: every pair of classes has cosine −1/(K−1).

    For K = 2 the result is [[1, −1], [−1, 1]].

    Args:
        num_classes: K ≥ 2.
        dtype: Floating dtype; the default dtype if not given.
        device: Device of the result.

    Returns:
        (K, K).

    Raises:
        ValueError: if K < 2, the dtype is not floating, or the device is unknown.

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
    r"""Return the Gram matrix of shared attributes, Σ_a α_a · ETF_a[v_a(k), v_a(l)] + (1 − Σ_a α_a) · ETF_K.

    Here v_a(k) is the value of attribute a for class k, ETF_a the simplex Gram matrix of the values of this attribute
    (1 for an attribute with a single value, which does not distinguish classes) and ETF_K that of the classes. A shared
    value of attribute a raises the cosine of two classes in proportion to α_a. Two classes with equal attributes have
    the inner product 1 − (1 − Σα)K/(K−1). For Σα = 1 this is 1, so they have the same vector. For K = 2, and if each
    attribute takes a different value for each class, the result is the simplex Gram matrix.

    Args:
        attributes: (K, A) integers, one row per class.
        weights: α (A,), at least 0, with a sum of at most 1.

    Returns:
        (K, K), in the dtype of ``weights``.

    Raises:
        ValueError: if an argument has the wrong type or shape, there are fewer than two classes, or weights are out of
            range.

    Source: a sum of simplex Gram matrices, each positive semi-definite (this project).

    Examples:
        >>> digits = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])  # digits of the classes 00, 01, 10, 11
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
            f"weights must be at least 0, with a sum of at most 1, got {weights.tolist()} with sum {total:.6g}"
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
    r"""Return the Gram matrix (1 − s)·exp(−γ D/D_max) + s of distances D between classes.

    The floor s is common to all classes: it scales the centred Gram matrix by 1 − s. Classes at distance 0 have the
    inner product 1. For K = 2, and for equal distances, every pair has the entry (1 − s)e^(−γ) + s, and the centred
    Gram matrix is a multiple of the simplex Gram matrix.

    Args:
        distances: D (K, K) floating, symmetric, at least 0, with a zero diagonal.
        decay: γ > 0.
        floor: s, at least −1/(K−1) and below 1.

    Returns:
        (K, K), in the dtype of ``distances``. Negative eigenvalues up to 1e-6 of the greatest eigenvalue are dropped,
        and the diagonal is scaled back to 1. For distances in a tree, and for distances or squared distances between
        points, there are no negative eigenvalues.

    Raises:
        ValueError: if the distances are invalid or all zero, the decay or the floor is out of range, or the result is
            not positive semi-definite (the message contains the smallest eigenvalue).

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
    return _without_negative_eigenvalues("distance_gram(distances, ...)", gram).to(distances.dtype)


def tree_gram(parents: Tensor, decay: float, *, dtype: torch.dtype | None = None) -> Tensor:
    r"""Return the Gram matrix exp(−γ D/D_max) of a hierarchy, with D the number of edges between two classes in a tree.

    If all classes have the same depth, D is twice the height of their lowest common ancestor. Siblings are nearest. For
    K = 2, and if all classes are children of the root, every pair has the entry e^(−γ), and the centred Gram matrix is
    a multiple of the simplex Gram matrix.

    Args:
        parents: (M,) integers: the parent of each node, −1 for the root. The classes are the leaves, which must be the
            first K nodes.
        decay: γ > 0.
        dtype: Floating dtype; the default dtype if not given.

    Returns:
        (K, K), positive semi-definite for every tree.

    Raises:
        ValueError: if the nodes do not form a tree with its leaves first, there are fewer than two classes, or the
            decay is out of range.

    Source: `distance_gram` (HAFrame, arXiv 2303.05689) with distances in the tree.

    Examples:
        >>> tree_gram(torch.tensor([3, 3, 4, 4, -1]), decay=3.0)  # two siblings and a third class
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
    """Return the cosines of centred embeddings, for example of the names of the classes.

    Equal rows have cosine 1. For K = 2 the result is [[1, −1], [−1, 1]], the simplex Gram matrix.

    Args:
        embeddings: (K, e) floating, one row per class.

    Returns:
        (K, K), in the dtype of ``embeddings``.

    Raises:
        ValueError: if the shape or type is wrong, values are not finite, or a row equals the mean of all rows.

    Source: this project.

    Examples:
        >>> embedding_gram(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        tensor([[ 1., -1.],
                [-1.,  1.]])
    """
    check_shapes(embeddings=(embeddings, "K e"))
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
    """Raise if one of the ascending eigenvalues is negative by more than `NEGLIGIBLE` times the greatest."""
    least, greatest = float(eigenvalues[0]), float(eigenvalues[-1])
    if least < -NEGLIGIBLE * max(greatest, 0.0):
        raise ValueError(
            f"{name} must be positive semi-definite, got a least eigenvalue of {least:.3g} "
            f"(the greatest is {greatest:.3g})"
        )


def _without_negative_eigenvalues(name: str, gram: Tensor) -> Tensor:
    """Return the Gram matrix without its negligible negative eigenvalues, rescaled to a unit diagonal."""
    eigenvalues, vectors = torch.linalg.eigh(gram)
    check_semidefinite(name, eigenvalues)
    if eigenvalues[0] >= -len(gram) * torch.finfo(gram.dtype).eps * eigenvalues[-1]:
        return gram
    root = vectors * eigenvalues.clamp_min(0).sqrt()
    root = root / torch.linalg.vector_norm(root, dim=1, keepdim=True)
    rebuilt = root @ root.T
    return (0.5 * (rebuilt + rebuilt.T)).fill_diagonal_(1)


def _edges_to_root(parents: Tensor) -> Tensor:
    """Return (K, M) in fp64: 1 if the edge above a node lies on the path from a class to the root, else 0."""
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


def code_from_gram(gram: Tensor, feature_dim: int) -> Tensor:
    """Return a code L (K, r) with LLᵀ = Π G Π: class vectors with Gram matrix G, without their common component.

    The code is computed from the eigenvectors of Π G Π; eigenvalues below K·eps times the greatest count as 0.

    Args:
        gram: G (K, K) floating, symmetric and positive semi-definite; negative eigenvalues up to 1e-6 of the greatest
            eigenvalue are dropped.
        feature_dim: d, which the rank r must not exceed.

    Returns:
        (K, r), r ≤ min(d, K−1), orthogonal columns of decreasing norm, in the dtype of ``gram``.

    Raises:
        ValueError: if the shape or type is wrong, values are not finite, the matrix is not symmetric, is not positive
            semi-definite or has a rank above d (the message contains the asymmetry, smallest eigenvalue or rank), or a
            class has a zero row after centring.

    Source: classical scaling (Torgerson, 1952).

    Examples:
        >>> from neuralcollapse.geometry import simplex_gram
        >>> code = code_from_gram(simplex_gram(4), feature_dim=8)
        >>> code.shape, bool(torch.allclose(code @ code.T, simplex_gram(4), atol=1e-6))
        (torch.Size([4, 3]), True)
    """
    check_floating("gram", gram)
    check_square("gram", gram)
    check_at_least("feature_dim", feature_dim, 1)
    wide = gram.double()
    wide = 0.5 * (wide + wide.T)
    check_semidefinite("gram", torch.linalg.eigvalsh(wide))
    centred = wide - wide.mean(0)
    centred = centred - centred.mean(1, keepdim=True)
    eigenvalues, vectors = torch.linalg.eigh(centred)
    kept = eigenvalues > len(gram) * torch.finfo(gram.dtype).eps * eigenvalues[-1].clamp_min(0)
    _check_rank("gram", int(kept.sum()), feature_dim)
    code = (vectors[:, kept] * eigenvalues[kept].sqrt()).flip(-1)
    _check_rows("gram", code, torch.finfo(gram.dtype).eps ** 0.5)
    return code.to(gram.dtype)


def seli_code(class_counts: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    r"""Return the code of a classifier of imbalanced classes, the simplex-encoded-labels interpolation (SELI).

    Let Z (K, N) be the simplex-encoded labels, whose column for a sample of class k is e_k − 1/K, with SVD Z = V Λ Uᵀ.
    The max-margin classifier has the Gram matrix V Λ Vᵀ ∝ (Π diag(n) Π)^(1/2). The code is scaled to a mean squared
    norm of 1. For equal counts, and for K = 2, it is the simplex ETF.

    Args:
        class_counts: n (K,) integers, each at least 1.
        dtype: Floating dtype; the default dtype if not given.

    Returns:
        (K, K−1), of rank K−1.

    Raises:
        ValueError: if the counts have the wrong type or shape, there are fewer than two, or one is not positive.

    Source: Thrampoulidis, Kini, Vakilian, Behnia, "Imbalance Trouble" (NeurIPS 2022).

    Examples:
        >>> code = seli_code(torch.tensor([100, 100, 10]))
        >>> code.norm(dim=1)
        tensor([1.0548, 1.0548, 0.8803])
    """
    check_integers("class_counts", class_counts)
    check_factory(dtype, None)
    if class_counts.ndim != 1:
        raise ValueError(f"class_counts must be of shape (K,), got {tuple(class_counts.shape)}")
    check_at_least("num_classes", len(class_counts), 2)
    if bool((class_counts < 1).any()):
        empty = (class_counts < 1).nonzero().flatten().tolist()
        raise ValueError(f"class_counts must be at least 1, got {int(class_counts.min())} among classes {empty[:10]}")
    # Eigenvectors on the complement of 1, on which Z Zᵀ = Π diag(n) Π is regular.
    half = expand(torch.eye(len(class_counts) - 1, dtype=torch.float64, device=class_counts.device))
    eigenvalues, vectors = torch.linalg.eigh(half.T @ (class_counts.double().unsqueeze(-1) * half))
    code = half @ vectors * eigenvalues.pow(0.25)
    code = code * (math.sqrt(len(code)) / torch.linalg.matrix_norm(code))
    return code.to(dtype or torch.get_default_dtype())


@torch.no_grad()
def code_of_means(class_means: Tensor, rank: int | Literal["auto"] = "auto") -> Tensor:
    r"""Return the tight code of the r leading directions of class means.

    The means are centred, their rows scaled to norm 1, and centred again. With the SVD U S Vᵀ of the result, the code
    is √(K/r) · U_r. Its nearest frame is the nearest tight frame of rank r that has the same leading directions as the
    means; for r = K−1, and hence for K = 2, it is the nearest simplex ETF. A class whose mean equals the mean of all
    classes has a zero row before the second centring.

    Args:
        class_means: (K, d) floating.
        rank: r, from 1 to min(d, K−1); or ``"auto"``, the effective rank: the rounded exponential of the entropy of the
            shares of the squared singular values (K−1 at collapse to an ETF), which causes a sync on accelerators.

    Returns:
        (K, r), detached, in the dtype of ``class_means``.

    Raises:
        ValueError: if the means have the wrong shape or type or are not finite, or the rank is out of range.

    Source: this project; effective rank based on Roy and Vetterli (2007).

    Examples:
        >>> from neuralcollapse import simplex_etf
        >>> code_of_means(simplex_etf(5, 8)).shape, code_of_means(simplex_etf(5, 8), rank=2).shape
        (torch.Size([5, 4]), torch.Size([5, 2]))
    """
    check_shapes(class_means=(class_means, "K d"))
    num_classes, feature_dim = class_means.shape
    check_at_least("num_classes", num_classes, 2)
    check_at_least("feature_dim", feature_dim, 1)
    check_code_rank(rank, num_classes, feature_dim)
    check_finite("class_means", class_means)
    means = class_means.to(compute_dtype(class_means.dtype))
    if not bool(means.sub(means[0]).any()):
        raise ValueError("class_means must not be all equal")
    return leading_code(means, rank).to(class_means.dtype)


def check_code_rank(rank: object, num_classes: int, feature_dim: int) -> None:
    """Raise a `ValueError` unless a rank is ``"auto"`` or a possible rank of class means."""
    if isinstance(rank, str) and rank == "auto":
        return
    greatest = min(feature_dim, num_classes - 1)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= greatest:
        raise ValueError(f"rank must be 'auto' or an integer from 1 to min(d, K-1) = {greatest}, got {rank!r}")


def leading_code(means: Tensor, rank: int | Literal["auto"]) -> Tensor:
    """Return `code_of_means` for fp32 or fp64 means, without input checks."""
    wide = means.detach().double()
    centred = wide - wide.mean(0)
    norms = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    rounding = 4 * torch.finfo(means.dtype).eps * torch.linalg.vector_norm(wide, dim=1).amax()
    rows = reduce(centred / torch.where(norms > rounding, norms, math.inf))
    if len(rows) <= rows.shape[1]:
        eigenvalues, left = torch.linalg.eigh(rows @ rows.T)
        squares, left = eigenvalues.flip(-1).clamp_min(0), left.flip(-1)
    else:
        left, singular, _ = torch.linalg.svd(rows, full_matrices=False)
        squares = singular.square()
    kept = rank if isinstance(rank, int) else _effective_rank(squares)
    return (math.sqrt(len(means) / kept) * expand(left[:, :kept])).to(means.dtype)


def _effective_rank(squares: Tensor) -> int:
    """Return the rounded exponential of the entropy of the shares of squares; their number if all are zero."""
    total = squares.sum()
    if not bool(total > 0):
        return len(squares)
    return max(1, round(math.exp(float(torch.special.entr(squares / total).sum()))))


def check_constant_code(code: Tensor, num_classes: int) -> None:
    """Raise unless a code is a finite constant (K, r) of K ≥ 2 classes."""
    check_code(code, num_classes)
    check_at_least("num_classes", len(code), 2)
    if code.requires_grad:
        raise ValueError("code must not require a gradient, since it is a constant: pass code.detach()")


def principal_code(code: Tensor, feature_dim: int) -> Tensor:
    """Return the r principal coordinates (K, r) of the centred code in fp64: orthogonal columns of decreasing norm.

    Raises:
        ValueError: if a row is zero, before or after centring, or the rank is above d.
    """
    eps = torch.finfo(code.dtype).eps
    wide = code.double()
    _check_rows("code", wide, 0.0)
    centred = wide - wide.mean(0)
    left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
    kept = singular > max(code.shape) * eps * torch.linalg.matrix_norm(wide, 2)
    _check_rank("code", int(kept.sum()), feature_dim)
    principal = left[:, kept] * singular[kept]
    _check_rows("code", principal, 4 * eps * math.sqrt(len(code)))
    return principal


def _check_rank(name: str, rank: int, feature_dim: int) -> None:
    if rank == 0:
        raise ValueError(f"{name} must distinguish classes, got rows that are all equal (rank 0 after centring)")
    if rank > feature_dim:
        raise ValueError(f"{name} must have, after centring, a rank of at most feature_dim = {feature_dim}, got {rank}")


def _check_rows(name: str, rows: Tensor, tolerance: float) -> None:
    """Raise if a class has a zero row, which has no direction."""
    norms = torch.linalg.vector_norm(rows, dim=1)
    least = int(norms.argmin())
    if not float(norms[least]) > tolerance * float(norms.max()):
        raise ValueError(f"{name} must give every class a direction, got a zero row for class {least}")
