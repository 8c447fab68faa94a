from __future__ import annotations

import math

import pytest
import scipy.optimize
import torch

from helpers import generator, normal, simplex_gram
from neuralcollapse.geometry import softmax_code
from neuralcollapse.geometry.softmax_code import _anneal_code, one_vs_rest_margins


def polygon_error(code):
    """Largest deviation of the angles between neighbours of a planar code from those of the regular polygon."""
    angles = torch.atan2(code[:, 1], code[:, 0]).sort().values
    gaps = torch.cat([angles.diff(), angles[:1] + 2 * math.pi - angles[-1:]])
    return float((gaps - 2 * math.pi / len(code)).abs().max())


@pytest.mark.parametrize("num_classes", range(3, 21))
def test_in_the_plane_the_optimiser_finds_the_regular_polygon(num_classes):
    code = _anneal_code(normal(num_classes, 2, seed=num_classes))
    assert polygon_error(code) < 1e-6
    assert polygon_error(softmax_code(num_classes, 2, dtype=torch.float64)) < 1e-12 or num_classes <= 4


@pytest.mark.parametrize("feature_dim", range(3, 9))
def test_the_optimiser_finds_the_orthoplex_at_twice_the_dimension(feature_dim):
    expected = softmax_code(2 * feature_dim, feature_dim, dtype=torch.float64)
    for code in (_anneal_code(normal(2 * feature_dim, feature_dim, seed=feature_dim)), expected):
        gram = code @ code.mT
        assert (gram - gram.round()).abs().max() < 1e-6
        assert ((gram.round() == -1).sum(1) == 1).all()
        assert ((gram.round() == 1).sum(1) == 1).all()


@pytest.mark.parametrize("feature_dim", [1, 2, 4, 7])
def test_is_the_simplex_etf_where_there_is_one_and_so_is_what_the_optimiser_finds(feature_dim):
    for num_classes in range(2, feature_dim + 2):
        for code in (
            softmax_code(num_classes, feature_dim, dtype=torch.float64),
            _anneal_code(normal(num_classes, feature_dim, seed=num_classes)),
        ):
            assert torch.allclose(code @ code.mT, simplex_gram(num_classes), atol=1e-6)


@pytest.mark.parametrize(("num_classes", "feature_dim"), [(6, 4), (7, 4), (9, 5)])
def test_between_simplex_and_orthoplex_the_margin_is_one_and_the_optimiser_finds_no_better(num_classes, feature_dim):
    code = softmax_code(num_classes, feature_dim, dtype=torch.float64)
    assert torch.allclose(one_vs_rest_margins(code), torch.ones(num_classes).double(), atol=1e-6)
    found = one_vs_rest_margins(_anneal_code(normal(num_classes, feature_dim)))
    assert float(found.min()) == pytest.approx(1, abs=2e-3)
    assert float(found.min()) <= 1 + 1e-9


def test_finds_the_icosahedron():
    margins = one_vs_rest_margins(softmax_code(12, 3, dtype=torch.float64))
    assert torch.allclose(margins, torch.full_like(margins, 1 - 1 / math.sqrt(5)), atol=1e-5)


def test_margins_are_better_than_random_and_than_without_annealing():
    start = normal(40, 8)
    annealed, direct, random = (
        float(one_vs_rest_margins(code).min())
        for code in (
            _anneal_code(start, max_iterations=40),
            _anneal_code(start, temperatures=(0.5**12,), max_iterations=520),
            start / start.norm(dim=1, keepdim=True),
        )
    )
    assert annealed > direct > random


@pytest.mark.parametrize("size", [(4, 2), (7, 3), (12, 6)])
def test_margins_are_the_distances_that_a_quadratic_program_finds(size):
    code = normal(*size)
    margins = one_vs_rest_margins(code)
    for index in range(size[0]):
        others = torch.cat([code[:index], code[index + 1 :]]).numpy()
        row = code[index].numpy()
        weights = scipy.optimize.minimize(
            lambda weights, row=row, others=others: ((row - weights @ others) ** 2).sum(),
            [1 / len(others)] * len(others),
            jac=lambda weights, row=row, others=others: -2 * others @ (row - weights @ others),
            bounds=[(0, 1)] * len(others),
            constraints={"type": "eq", "fun": lambda weights: weights.sum() - 1},
            options={"ftol": 1e-15, "maxiter": 1000},
        )
        assert float(margins[index]) == pytest.approx(math.sqrt(max(weights.fun, 0)), abs=2e-5)


def test_is_drawn_from_the_generator_alone():
    first, second, other = (softmax_code(9, 3, generator=generator(seed), max_iterations=5) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    torch.manual_seed(0)
    first = softmax_code(9, 3, max_iterations=5)
    torch.manual_seed(1)
    assert torch.equal(first, softmax_code(9, 3, max_iterations=5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_are_unit_in_every_dtype(dtype):
    code = softmax_code(9, 3, max_iterations=5, dtype=dtype)
    assert code.dtype == dtype
    assert torch.allclose(
        code.double().norm(dim=1), torch.ones(9).double(), atol=4e-3 if dtype == torch.bfloat16 else 1e-6
    )
    assert not code.requires_grad


def test_bad_input_is_refused():
    for arguments, message in [
        ((1, 3), "num_classes must be at least 2"),
        ((3, 1), "feature_dim must be at least 2, got 1"),
        ((2, 0), "feature_dim must be at least 1"),
        ((3.0, 2), "num_classes must be an integer"),
    ]:
        with pytest.raises(ValueError, match=message):
            softmax_code(*arguments)
    with pytest.raises(ValueError, match="temperatures must contain"):
        _anneal_code(normal(4, 2), temperatures=(1.0, 0.0))
    with pytest.raises(ValueError, match="start must be of shape"):
        _anneal_code(normal(4))
    with pytest.raises(ValueError, match="start must be finite"):
        _anneal_code(torch.full((4, 2), float("nan")))
    with pytest.raises(ValueError, match="code must not have a zero row, got one at 1"):
        one_vs_rest_margins(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
