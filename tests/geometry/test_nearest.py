from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from helpers import TOLERANCE, normal, simplex_gram
from neuralcollapse import nearest_simplex_etf, random_simplex_etf, simplex_etf
from neuralcollapse.geometry import nearest_etf_diagnostics, simplex_basis

SIZES = [(2, 1), (2, 5), (5, 4), (5, 5), (5, 20), (10, 64)]


def objective(means, etf, anchor=None, proximal_weight=0.0, class_weights=None):
    """The objective of formulas §1 as it is posed: over ETFs, in fp64, with an explicit basis."""
    means, etf = means.double(), etf.double()
    num_classes = means.shape[0]
    weights = torch.ones(num_classes, dtype=torch.float64) if class_weights is None else class_weights.double()
    weights = weights / weights.mean()
    centred = means - (weights[:, None] * means).mean(0)
    unit = centred / centred.norm()
    value = (num_classes - 1) / 2 * (weights * (unit - etf / math.sqrt(num_classes)).square().sum(1)).sum()
    if anchor is not None:
        frame = math.sqrt((num_classes - 1) / num_classes) * simplex_basis(num_classes, dtype=torch.float64).T
        value = value + proximal_weight / 2 * (frame @ (etf - anchor.double())).square().sum()
    return float(value)


@pytest.fixture(params=["plain", "anchor", "weights", "both"])
def options(request):
    def make(num_classes, feature_dim, dtype=torch.float64):
        chosen = {}
        if request.param in ("anchor", "both"):
            anchor = random_simplex_etf(num_classes, feature_dim, dtype=dtype)
            chosen |= {"anchor": anchor, "proximal_weight": 0.3}
        if request.param in ("weights", "both"):
            chosen |= {"class_weights": torch.linspace(0.2, 3, num_classes, dtype=dtype)}
        return chosen

    return make


@pytest.mark.parametrize(("num_classes", "feature_dim"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_result_is_a_unit_simplex_etf(num_classes, feature_dim, dtype, options):
    means = normal(num_classes, feature_dim, dtype=dtype)
    etf = nearest_simplex_etf(means, **options(num_classes, feature_dim, dtype)).double()
    assert torch.allclose(etf @ etf.T, simplex_gram(num_classes), atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize(("num_classes", "feature_dim"), SIZES)
def test_no_rotation_of_the_result_is_nearer(num_classes, feature_dim, options):
    """Small and large random rotations of the solution, and random ETFs, all have a higher objective."""
    means, chosen = normal(num_classes, feature_dim), options(num_classes, feature_dim)
    etf = nearest_simplex_etf(means, **chosen)
    least = objective(means, etf, **chosen)
    for seed, size in enumerate([1e-3, 1e-2, 0.1, 1.0] * 5):
        skew = size * normal(feature_dim, feature_dim, seed=seed)
        rotated = etf @ torch.linalg.matrix_exp(skew - skew.T)
        assert objective(means, rotated, **chosen) >= least - 1e-12
        other = random_simplex_etf(num_classes, feature_dim, dtype=torch.float64)
        assert torch.allclose(other, etf, atol=1e-14) or objective(means, other, **chosen) >= least


@pytest.mark.parametrize("size", [(2, 1), (5, 4), (10, 64)])
def test_diagnostics_see_the_objective_and_what_is_not_its_minimum(size, options):
    means, chosen = normal(*size), options(*size)
    etf, other = nearest_simplex_etf(means, **chosen), random_simplex_etf(*size, dtype=torch.float64)
    solved, guessed = (nearest_etf_diagnostics(means, candidate, **chosen) for candidate in (etf, other))
    assert solved["objective"] == pytest.approx(objective(means, etf, **chosen), abs=1e-10)
    assert guessed["objective"] == pytest.approx(objective(means, other, **chosen), abs=1e-10)
    assert solved["gradient_norm"] < 1e-10
    assert size == (2, 1) or guessed["gradient_norm"] > 0.1
    if "anchor" in chosen:
        assert solved["distance_to_anchor"] == pytest.approx(float((etf - chosen["anchor"]).norm()))
    with pytest.raises(ValueError, match="etf must be of the shape"):
        nearest_etf_diagnostics(means, etf[:-1], **chosen)


def test_scaled_and_shifted_etf_is_its_own_nearest():
    etf = random_simplex_etf(10, 30, dtype=torch.float64)
    assert torch.allclose(nearest_simplex_etf(3 * etf + normal(30)), etf, atol=1e-12)


def test_anchor_dominates_as_its_weight_grows():
    means, anchor = normal(10, 30), random_simplex_etf(10, 30, dtype=torch.float64)
    distances = [
        (nearest_simplex_etf(means, anchor=anchor, proximal_weight=weight) - anchor).norm()
        for weight in (0.0, 0.1, 1, 1e6)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-4


def test_equal_class_weights_change_nothing():
    means = normal(10, 30)
    weighted = nearest_simplex_etf(means, class_weights=torch.full((10,), 7.0))
    assert torch.allclose(weighted, nearest_simplex_etf(means), atol=1e-13)


@pytest.mark.parametrize("size", [(2, 1), (2, 4), (4, 3), (4, 4), (4, 15)])
def test_gradient_is_exact(size, options):
    chosen = options(*size)
    assert gradcheck(lambda means: nearest_simplex_etf(means, **chosen), normal(*size).requires_grad_())


@pytest.mark.parametrize("size", [(2, 4), (4, 3), (4, 4), (4, 15)])
def test_gradient_is_finite_and_exact_at_an_exact_etf(size, options):
    chosen = options(*size)
    means = random_simplex_etf(*size, dtype=torch.float64).requires_grad_()
    assert gradcheck(lambda means: nearest_simplex_etf(means, **chosen), means)
    singular = torch.linalg.svdvals(simplex_basis(size[0], dtype=torch.float64).T @ means.detach())
    assert singular.max() - singular.min() < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "case",
    [
        "rank one",
        "two equal",
        "anchor opposes",
        "anchor makes A singular",
        "all equal, with anchor",
        "all zero, with anchor",
    ],
)
def test_gradient_is_finite_where_the_minimiser_is_not_unique(case, dtype):
    num_classes, feature_dim = 6, 12
    anchor, weight = None, 0.0
    means = normal(num_classes, feature_dim, dtype=dtype)
    if case == "rank one":
        means = means[:, :1] * means[:1]
    elif case == "two equal":
        means[1] = means[0]
    elif case == "anchor opposes":
        anchor, weight = -nearest_simplex_etf(means), 0.5
    elif case == "anchor makes A singular":
        means = simplex_etf(num_classes, feature_dim, dtype=dtype)
        anchor, weight = -means, 1.0
    else:
        means = torch.full_like(means, 0.0 if "zero" in case else 0.7)
        anchor, weight = random_simplex_etf(num_classes, feature_dim, dtype=dtype), 0.1
    means.requires_grad_()
    etf = nearest_simplex_etf(means, anchor=anchor, proximal_weight=weight)
    assert torch.allclose((etf @ etf.mT).double(), simplex_gram(num_classes), atol=1e-5)
    etf.backward(normal(num_classes, feature_dim, seed=1, dtype=dtype))
    assert torch.isfinite(means.grad).all()
    if case.endswith("with anchor"):
        assert torch.allclose(etf, anchor, atol=1e-5)


def test_batches_equal_one_by_one():
    means = normal(3, 2, 5, 8)
    anchors = torch.stack([random_simplex_etf(5, 8, dtype=torch.float64) for _ in range(6)]).reshape(3, 2, 5, 8)
    batched = nearest_simplex_etf(
        means, anchor=anchors, proximal_weight=0.2, class_weights=normal(3, 2, 5, seed=2).abs()
    )
    for i in range(3):
        for j in range(2):
            single = nearest_simplex_etf(
                means[i, j],
                anchor=anchors[i, j],
                proximal_weight=0.2,
                class_weights=normal(3, 2, 5, seed=2).abs()[i, j],
            )
            assert torch.allclose(batched[i, j], single, atol=1e-12)


def test_vmap_and_compile_equal_eager():
    means = normal(3, 5, 8)
    assert torch.allclose(torch.func.vmap(nearest_simplex_etf)(means), nearest_simplex_etf(means), atol=1e-12)
    compiled = torch.compile(nearest_simplex_etf, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(means), nearest_simplex_etf(means), atol=1e-12)


def test_bfloat16_is_computed_in_fp32():
    means = normal(5, 8).bfloat16()
    assert torch.equal(nearest_simplex_etf(means), nearest_simplex_etf(means.float()).bfloat16())


@pytest.mark.parametrize(
    ("means", "options", "message"),
    [
        (torch.zeros(1, 4), {}, "num_classes must be at least 2, got 1"),
        (torch.randn(10, 5), {}, "feature_dim must be at least num_classes - 1 = 9, got 5"),
        (torch.randn(7), {}, r"class_means must be of shape \(\.\.\., K, d\), got \(7,\)"),
        (torch.full((3, 4), float("inf")), {}, "class_means must be finite"),
        (torch.zeros(3, 4), {}, "class_means must not be all equal"),
        (torch.full((3, 4), 0.1), {}, "class_means must not be all equal"),
        (torch.zeros(3, 4, dtype=torch.int64), {}, "class_means must be a floating-point tensor"),
        (torch.randn(3, 4), {"proximal_weight": 0.1}, "needs an anchor"),
        (torch.randn(3, 4), {"proximal_weight": -1.0}, "proximal_weight must be finite and at least 0, got -1.0"),
        (torch.randn(3, 4), {"proximal_weight": 1.0, "anchor": torch.eye(4)}, r"anchor must end in the shape \(3, 4\)"),
        (torch.randn(3, 4), {"proximal_weight": 1.0, "anchor": torch.full((3, 4), torch.nan)}, "anchor must be a unit"),
        (torch.randn(3, 4), {"anchor": torch.eye(3, 4)}, "anchor must be a unit simplex ETF"),
        (torch.randn(3, 4), {"anchor": 1.1 * simplex_etf(3, 4)}, "anchor must be a unit simplex ETF"),
        (torch.randn(2, 1), {"anchor": torch.tensor([[5.0], [-5.0]])}, "anchor must be a unit simplex ETF"),
        (
            torch.randn(3, 4),
            {"anchor": simplex_etf(3, 4).expand(2, 3, 4)},
            r"leading dimensions \(\) or none, got \(2,\)",
        ),
        (torch.randn(3, 4), {"class_weights": torch.ones(4)}, r"class_weights must end in the shape \(3,\)"),
        (torch.randn(3, 4), {"class_weights": torch.tensor([1.0, -1.0, 1.0])}, "class_weights must be at least 0"),
    ],
)
def test_bad_input_is_named(means, options, message):
    with pytest.raises(ValueError, match=message):
        nearest_simplex_etf(means, **options)
