from __future__ import annotations

import math

import pytest
import torch

from helpers import generator, normal, simplex_gram
from neuralcollapse import random_simplex_etf, simplex_etf
from neuralcollapse.geometry import simplex_basis
from neuralcollapse.geometry.simplex import expand, reduce

SIZES = [(2, 1), (2, 2), (2, 7), (3, 2), (10, 9), (10, 10), (10, 64), (101, 100), (101, 300)]


@pytest.mark.parametrize(("num_classes", "feature_dim"), SIZES)
@pytest.mark.parametrize("make", [simplex_etf, random_simplex_etf])
def test_rows_are_unit_with_equal_angles(make, num_classes, feature_dim):
    etf = make(num_classes, feature_dim, dtype=torch.float64)
    assert etf.shape == (num_classes, feature_dim)
    assert torch.allclose(etf @ etf.T, simplex_gram(num_classes), atol=1e-13)


def test_canonical_etf_is_the_centred_identity():
    expected = math.sqrt(10 / 9) * (torch.eye(10, 12) - torch.cat([torch.full((10, 10), 0.1), torch.zeros(10, 2)], 1))
    assert torch.allclose(simplex_etf(10, 12), expected)
    assert simplex_etf(10).shape == (10, 10)


def test_low_precision_is_rounded_once():
    assert torch.equal(simplex_etf(10, dtype=torch.bfloat16), simplex_etf(10, dtype=torch.float32).bfloat16())


@pytest.mark.parametrize("num_classes", [2, 3, 10, 100])
def test_basis_is_orthonormal_and_centred(num_classes):
    basis = simplex_basis(num_classes, dtype=torch.float64)
    assert torch.allclose(basis.T @ basis, torch.eye(num_classes - 1, dtype=torch.float64), atol=1e-14)
    assert basis.sum(0).abs().max() < 1e-13


@pytest.mark.parametrize("num_classes", [2, 3, 10, 1000])
def test_applying_the_basis_equals_multiplying_by_it(num_classes):
    basis = simplex_basis(num_classes, dtype=torch.float64)
    vectors, coordinates = normal(2, num_classes, 5), normal(2, num_classes - 1, 5, seed=1)
    assert torch.allclose(reduce(vectors), basis.T @ vectors, atol=1e-12)
    assert torch.allclose(expand(coordinates), basis @ coordinates, atol=1e-12)


def test_basis_stays_orthonormal_in_fp32_at_many_classes():
    coordinates = normal(9_999, 3, dtype=torch.float32)
    assert torch.allclose(reduce(expand(coordinates)), coordinates, atol=2e-5)


def test_random_orientation_is_haar_uniform():
    """A Haar-uniform unit vector in the plane has a uniform angle; without the sign fix half the circle is empty."""
    draw = generator()
    first = torch.stack([random_simplex_etf(2, 2, generator=draw)[0] for _ in range(4000)]).double()
    angle = torch.atan2(first[:, 1], first[:, 0])
    for order in (1, 2, 3):  # every circular moment of a uniform angle is 0, with standard deviation 1/√(2·4000)
        assert torch.cos(order * angle).mean().abs() < 5 / math.sqrt(8000)
        assert torch.sin(order * angle).mean().abs() < 5 / math.sqrt(8000)


def test_random_orientation_follows_the_generator():
    assert torch.equal(
        random_simplex_etf(5, 8, generator=generator(3)), random_simplex_etf(5, 8, generator=generator(3))
    )
    assert not torch.equal(
        random_simplex_etf(5, 8, generator=generator(3)), random_simplex_etf(5, 8, generator=generator(4))
    )


@pytest.mark.parametrize("make", [simplex_etf, random_simplex_etf])
def test_impossible_sizes_are_named(make):
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        make(1, 5)
    with pytest.raises(ValueError, match="feature_dim must be at least num_classes - 1 = 9, got 5"):
        make(10, 5)
