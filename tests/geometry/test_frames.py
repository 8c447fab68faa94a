"""The nearest frame of a code, against the problem as it is posed, dense and in fp64."""

from __future__ import annotations

import math

import numpy as np
import pymanopt
import pytest
import torch
from pymanopt.manifolds import Stiefel
from pymanopt.optimizers import TrustRegions
from torch.autograd import gradcheck

from helpers import TOLERANCE, normal
from neuralcollapse import nearest_frame, nearest_simplex_etf, random_simplex_etf, simplex_etf
from neuralcollapse.geometry import code_from_gram

# K, d and the columns of the code: fewer classes than dimensions, more than d + 1, a code of fewer columns.
SIZES = [(2, 1, 1), (2, 5, 3), (5, 4, 6), (6, 20, 3), (12, 5, 4), (12, 30, 12)]


def gram_of(code, weights=None):
    centred = code - (code.mean(0) if weights is None else (weights[:, None] * code).sum(0) / weights.sum())
    return centred @ centred.T


def make(num_classes, columns, feature_dim, seed=5):
    """A random code whose centred rank does not exceed d."""
    rank = min(columns, feature_dim, num_classes - 1)
    return normal(num_classes, rank, seed=seed) @ normal(rank, columns, seed=seed + 1) + normal(columns, seed=seed + 2)


def objective(means, frame, code, anchor=None, proximal_weight=0.0, class_weights=None):
    """As posed, of the frame alone: Q₀ − Q has the norm of what the pseudo-inverse of the code makes of the frames."""
    weights = torch.ones(len(code)).double() if class_weights is None else class_weights.double()
    weights = weights / weights.mean()
    means, own = (rows - (weights[:, None] * rows).mean(0) for rows in (means.double(), code.double()))
    frame = frame.double() - (weights[:, None] * frame.double()).mean(0)
    rank = int(torch.linalg.matrix_rank(own, rtol=1e-10))
    value = rank / 2 * (weights * (means / means.norm() - frame / own.norm()).square().sum(1)).sum()
    if anchor is not None:
        difference = anchor.double() - (weights[:, None] * anchor.double()).mean(0) - frame
        left, singular, _ = torch.linalg.svd(own)
        value = value + proximal_weight / 2 * ((left[:, :rank] / singular[:rank]).T @ difference).square().sum()
    return float(value)


@pytest.fixture(params=["plain", "anchor", "weights", "both"])
def options(request):
    def chosen(code, feature_dim, dtype=torch.float64):
        found = {}
        if request.param in ("anchor", "both"):
            anchor = nearest_frame(normal(len(code), feature_dim, seed=9, dtype=dtype), code)
            found |= {"anchor": anchor, "proximal_weight": 0.3}
        if request.param in ("weights", "both"):
            found |= {"class_weights": torch.linspace(0.2, 3, len(code), dtype=dtype)}
        return found

    return chosen


@pytest.mark.parametrize(("num_classes", "feature_dim", "columns"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_frame_has_the_gram_of_the_centred_code(num_classes, feature_dim, columns, dtype, options):
    code = make(num_classes, columns, feature_dim).to(dtype)
    chosen = options(code, feature_dim, dtype)
    frame = nearest_frame(normal(num_classes, feature_dim, dtype=dtype), code, **chosen).double()
    expected = gram_of(code.double(), chosen.get("class_weights", torch.ones(num_classes)).double())
    assert (frame @ frame.T - expected).abs().max() < {torch.float32: 1e-5, torch.float64: 1e-12}[dtype] * max(
        1, float(expected.abs().max())
    )


@pytest.mark.parametrize(("num_classes", "feature_dim", "columns"), SIZES)
def test_no_rotation_of_the_frame_is_nearer(num_classes, feature_dim, columns, options):
    code, means = make(num_classes, columns, feature_dim), normal(num_classes, feature_dim)
    chosen = options(code, feature_dim)
    frame = nearest_frame(means, code, **chosen)
    least = objective(means, frame, code, **chosen)
    for seed, size in enumerate([1e-3, 1e-2, 0.1, 1.0] * 5):
        skew = size * normal(feature_dim, feature_dim, seed=seed)
        rotated = frame @ torch.linalg.matrix_exp(skew - skew.T)
        assert objective(means, rotated, code, **chosen) >= least - 1e-12


def dense(means, code, anchor=None, proximal_weight=0.0, class_weights=None):
    """Procrustes by the SVD, written from the formula in original coordinates of the code."""
    weights = torch.ones(len(code)).double() if class_weights is None else class_weights
    weights = weights / weights.mean()
    centred = means - (weights[:, None] * means).mean(0)
    own = code - (weights[:, None] * code).mean(0)
    _, singular, right = np.linalg.svd(own.numpy(), full_matrices=False)
    rank = int((singular > 1e-10 * singular[0]).sum())
    own = own @ torch.from_numpy(right[:rank]).T
    target = rank / own.norm() * own.T @ (weights[:, None] * centred / centred.norm())
    if anchor is not None:
        target = target + proximal_weight * torch.linalg.pinv(own) @ (anchor - (weights[:, None] * anchor).mean(0))
    u, _, v = np.linalg.svd(target.numpy(), full_matrices=False)
    return own @ torch.from_numpy(u @ v)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("num_classes", "feature_dim", "columns"), SIZES)
def test_it_equals_a_dense_reference(num_classes, feature_dim, columns, seed, options):
    code, means = make(num_classes, columns, feature_dim, seed=seed), normal(num_classes, feature_dim, seed=seed + 50)
    chosen = options(code, feature_dim)
    assert (nearest_frame(means, code, **chosen) - dense(means, code, **chosen)).abs().max() < 1e-10


@pytest.mark.parametrize(("num_classes", "feature_dim", "columns"), [(5, 8, 3), (12, 5, 4), (6, 9, 9)])
def test_pymanopt_finds_the_same_frame(num_classes, feature_dim, columns):
    """Its trust region on the cost as it is posed, over (d, r) matrices with orthonormal columns."""
    code, means = make(num_classes, columns, feature_dim), normal(num_classes, feature_dim)
    own = code - code.mean(0)
    left, singular, _ = torch.linalg.svd(own, full_matrices=False)
    rank = int((singular > 1e-10 * singular[0]).sum())
    factor = (left[:, :rank] * singular[:rank]).numpy()
    factor, centred = factor / np.linalg.norm(factor), (means - means.mean(0)).numpy()
    unit, manifold = centred / np.linalg.norm(centred), Stiefel(feature_dim, rank)

    @pymanopt.function.numpy(manifold)
    def cost(point):
        return rank / 2 * np.square(unit - factor @ point.T).sum()

    @pymanopt.function.numpy(manifold)
    def gradient(point):
        return -rank * (unit - factor @ point.T).T @ factor

    @pymanopt.function.numpy(manifold)
    def hessian(point, tangent):
        return rank * tangent @ factor.T @ factor

    problem = pymanopt.Problem(manifold, cost, euclidean_gradient=gradient, euclidean_hessian=hessian)
    solver = TrustRegions(min_gradient_norm=1e-9, max_iterations=200, verbosity=0)
    starts = (torch.linalg.qr(normal(feature_dim, rank, seed=seed)).Q.numpy() for seed in range(3))
    found = min((solver.run(problem, initial_point=start) for start in starts), key=lambda result: result.cost)
    frame = nearest_frame(means, code)
    assert found.cost == pytest.approx(objective(means, frame, code), rel=1e-10)
    expected = float(own.norm()) * torch.from_numpy(factor @ found.point.T)
    assert (frame - expected).norm() < 1e-6


@pytest.mark.parametrize("size", [(2, 1), (2, 5), (5, 4), (5, 20), (10, 64)])
@pytest.mark.parametrize("anchored", [False, True])
def test_at_the_simplex_it_is_the_nearest_simplex_etf(size, anchored):
    means, code = normal(3, *size), simplex_etf(size[0], dtype=torch.float64)
    chosen = {"anchor": random_simplex_etf(*size, dtype=torch.float64), "proximal_weight": 0.7} if anchored else {}
    assert (nearest_frame(means, code, **chosen) - nearest_simplex_etf(means, **chosen)).abs().max() < 1e-12
    if not anchored:  # an anchor is a frame of the code, scale and all
        assert (nearest_frame(means, 7 * code) / 7 - nearest_simplex_etf(means)).abs().max() < 1e-12


def test_class_weights_shift_the_simplex_s_frame_to_their_mean():
    means, code = normal(5, 8), simplex_etf(5, dtype=torch.float64)
    weights = torch.linspace(0.2, 3, 5, dtype=torch.float64)
    etf = nearest_simplex_etf(means, class_weights=weights)
    expected = etf - (weights[:, None] * etf).sum(0) / weights.sum()
    assert (nearest_frame(means, code, class_weights=weights) - expected).abs().max() < 1e-12


def test_what_is_common_to_all_classes_and_the_coordinates_of_the_code_do_not_matter():
    means, code = normal(6, 9), make(6, 3, 9)
    turned = torch.linalg.qr(normal(5, 3, seed=3)).Q.T
    expected = nearest_frame(means, code)
    assert (nearest_frame(means, code + normal(3)) - expected).abs().max() < 1e-12
    assert (nearest_frame(means, code @ turned) - expected).abs().max() < 1e-12
    assert (nearest_frame(3 * means + normal(9), code) - expected).abs().max() < 1e-12
    with_ones = torch.cat([code, 5 * torch.ones(6, 1).double()], 1)
    assert (nearest_frame(means, with_ones) - expected).abs().max() < 1e-12


def test_collapsed_means_are_their_own_frame():
    code = make(6, 3, 9)
    frame = nearest_frame(normal(6, 9), code)
    assert (nearest_frame(0.1 * frame + normal(9), code) - frame).abs().max() < 1e-12


@pytest.mark.parametrize(("num_classes", "feature_dim", "columns"), [(2, 4, 2), (4, 3, 5), (4, 8, 2), (7, 3, 2)])
def test_gradient_is_exact(num_classes, feature_dim, columns, options):
    code = make(num_classes, columns, feature_dim)
    chosen = options(code, feature_dim)
    means = normal(num_classes, feature_dim).requires_grad_()
    assert gradcheck(lambda means: nearest_frame(means, code, **chosen), means)
    at_collapse = nearest_frame(means.detach(), code).requires_grad_()
    assert gradcheck(lambda means: nearest_frame(means, code, **chosen), at_collapse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["rank one", "anchor opposes", "anchor makes it singular", "all equal, with anchor"])
def test_gradient_is_finite_where_the_frame_is_not_unique(case, dtype):
    code = make(6, 3, 12).to(dtype)
    means, anchor, weight = normal(6, 12, dtype=dtype), None, 0.0
    if case == "rank one":
        means = means[:, :1] * means[:1]
    elif case == "anchor opposes":
        anchor, weight = -nearest_frame(means, code), 0.5
    elif case == "anchor makes it singular":
        code = simplex_etf(6, dtype=dtype)
        means, anchor, weight = simplex_etf(6, 12, dtype=dtype), -simplex_etf(6, 12, dtype=dtype), 1.0
    else:
        anchor, weight = nearest_frame(means, code), 0.1
        means = torch.full_like(means, 0.7)
    means.requires_grad_()
    frame = nearest_frame(means, code, anchor=anchor, proximal_weight=weight)
    assert torch.allclose((frame @ frame.T).double(), gram_of(code.double()), atol=1e-4)
    frame.backward(normal(6, 12, seed=1, dtype=dtype))
    assert torch.isfinite(means.grad).all()
    if case.startswith("all equal"):
        assert torch.allclose(frame, anchor, atol=1e-5)


def test_batches_and_vmap_equal_one_by_one():
    code, means = make(5, 3, 8), normal(3, 2, 5, 8)
    anchors, weights = nearest_frame(normal(3, 2, 5, 8, seed=1), code), normal(3, 2, 5, seed=2).abs()
    batched = nearest_frame(means, code, anchor=anchors, proximal_weight=0.2, class_weights=weights)
    for i in range(3):
        for j in range(2):
            single = nearest_frame(
                means[i, j], code, anchor=anchors[i, j], proximal_weight=0.2, class_weights=weights[i, j]
            )
            assert (batched[i, j] - single).abs().max() < 1e-12
    mapped = torch.func.vmap(lambda means: nearest_frame(means, code))(means.flatten(0, 1))
    assert torch.allclose(mapped, nearest_frame(means, code).flatten(0, 1), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_find_the_same_frame(dtype):
    means, code = normal(6, 30, dtype=dtype), make(6, 4, 30).to(dtype)
    by_products = nearest_frame(means, code, method="products")
    assert torch.allclose(by_products, nearest_frame(means, code), atol=100 * TOLERANCE[dtype])


def test_bfloat16_is_computed_in_fp32():
    means, code = normal(5, 8).bfloat16(), make(5, 3, 8).float()
    assert torch.equal(nearest_frame(means, code), nearest_frame(means.float(), code).bfloat16())


MEANS, CODE = torch.randn(4, 6), simplex_etf(4)


@pytest.mark.parametrize(
    ("means", "code", "options", "message"),
    [
        (MEANS, torch.randn(5, 2), {}, r"code must be of shape \(K, r\) with K = 4, got \(5, 2\)"),
        (MEANS, torch.randn(1, 4, 2), {}, r"code must be of shape \(K, r\) with K = 4"),
        (MEANS, torch.ones(4, 2).long(), {}, "code must be a floating-point tensor"),
        (MEANS, torch.full((4, 2), torch.inf), {}, "code must be finite"),
        (MEANS, torch.tensor([[1.0, 0], [0, 1], [0, 0], [1, 1]]), {}, "direction, got a zero row for class 2"),
        (MEANS, torch.tensor([[3.0, 0], [0, 3], [1, 1], [0, 0.0]]) + 1, {}, "a zero row for class 2"),
        (MEANS, torch.ones(4, 2), {}, "code must distinguish classes"),
        (torch.randn(8, 4), torch.randn(8, 7), {}, "a rank of at most feature_dim = 4, got 7"),
        (MEANS, CODE.clone().requires_grad_(), {}, "code must not require a gradient"),
        (torch.randn(4), CODE, {}, r"class_means must be of shape \(\.\.\., K, d\), got \(4,\)"),
        (torch.full((4, 6), torch.inf), CODE, {}, "class_means must be finite"),
        (torch.zeros(4, 6), CODE, {}, "class_means must not be all equal"),
        (MEANS, CODE, {"proximal_weight": 0.1}, "needs an anchor"),
        (MEANS, CODE, {"proximal_weight": -1.0}, "proximal_weight must be finite and at least 0"),
        (MEANS, CODE, {"anchor": torch.randn(4, 6)}, "anchor must be a frame of the code"),
        (MEANS, CODE, {"anchor": 1.1 * simplex_etf(4, 6)}, "anchor must be a frame of the code"),
        (MEANS, CODE, {"anchor": torch.full((4, 6), torch.nan)}, "anchor must be a frame of the code"),
        (MEANS, CODE, {"anchor": torch.eye(5)}, r"anchor must end in the shape \(4, 6\)"),
        (MEANS, CODE, {"class_weights": torch.tensor([1.0, -1, 1, 1])}, "class_weights must be at least 0"),
        (MEANS, CODE, {"method": "qr"}, "method must be"),
    ],
)
def test_bad_input_is_named(means, code, options, message):
    with pytest.raises(ValueError, match=message):
        nearest_frame(means, code, **options)


def test_a_gram_given_back_is_the_means_themselves():
    """G = CCᵀ returns C: formulas §1."""
    means = normal(6, 9)
    centred = means - means.mean(0)
    code = code_from_gram(centred @ centred.T, feature_dim=9)
    assert (nearest_frame(means, code) - centred).abs().max() < 1e-10
    assert math.isclose(float(code.square().sum()), float(centred.square().sum()), rel_tol=1e-12)
