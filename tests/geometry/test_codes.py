"""Grams and codes, each against its definition written as a loop."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from helpers import normal
from helpers import simplex_gram as simplex
from neuralcollapse import random_simplex_etf, simplex_etf
from neuralcollapse.geometry import (
    attribute_gram,
    code_from_gram,
    code_of_means,
    distance_gram,
    embedding_gram,
    seli_code,
    simplex_gram,
    tree_gram,
)

DIGITS = torch.tensor(list(itertools.product(range(4), range(3), range(2))))
#        6
#      4   5 (and class 3 hangs on the root)
#    0 1   2
TREE = torch.tensor([4, 4, 5, 6, 6, 6, -1])


def assert_is_a_gram(gram):
    gram = gram.double()
    assert torch.allclose(gram.diagonal(), torch.ones(len(gram)).double(), atol=1e-12)
    assert torch.equal(gram, gram.T)
    eigenvalues = torch.linalg.eigvalsh(gram)
    assert eigenvalues[0] >= -1e-12 * eigenvalues[-1]


def centred(gram):
    return gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_the_simplex(num_classes):
    gram = simplex_gram(num_classes, dtype=torch.float64)
    assert_is_a_gram(gram)
    assert torch.allclose(gram, simplex(num_classes), atol=1e-15)


@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (0.2, 0.0, 0.3), (0.0, 0.0, 0.0)])
def test_attributes_by_their_definition(weights):
    gram = attribute_gram(DIGITS, torch.tensor(weights, dtype=torch.float64))
    assert_is_a_gram(gram)
    sizes, count = (4, 3, 2), len(DIGITS)
    for k, j in itertools.product(range(count), range(count)):
        own = (1 - sum(weights)) * (1.0 if k == j else -1 / (count - 1))
        for weight, size, a, b in zip(weights, sizes, DIGITS[k].tolist(), DIGITS[j].tolist(), strict=True):
            own += weight * (1.0 if a == b else -1 / (size - 1))
        assert float(gram[k, j]) == pytest.approx(own, abs=1e-14)
    assert torch.allclose(gram.sum(0), torch.zeros(count).double(), atol=1e-12)  # every value is as frequent


def test_attributes_of_equal_classes_and_of_two():
    weights = torch.tensor([0.3, 0.3], dtype=torch.float64)
    gram = attribute_gram(torch.tensor([[0, 5], [0, 5], [1, 2], [2, 9]]), weights)
    assert float(gram[0, 1]) == pytest.approx(1 - 0.4 * 4 / 3)
    merged = attribute_gram(torch.tensor([[0, 5], [0, 5], [1, 2], [2, 9]]), weights / 0.6)
    assert float(merged[0, 1]) == pytest.approx(1)
    assert torch.allclose(attribute_gram(torch.tensor([[3], [7]]), weights[:1]), simplex(2))
    shared = attribute_gram(torch.zeros(5, 1).long(), weights[:1])  # tells no classes apart: a scale, after centring
    assert torch.allclose(centred(shared), 0.7 * simplex(5))


def test_a_tree_by_walking_it():
    ancestors = {0: [0, 4, 6], 1: [1, 4, 6], 2: [2, 5, 6], 3: [3, 6]}
    gram = tree_gram(TREE, 1.7, dtype=torch.float64)
    assert_is_a_gram(gram)
    steps = {}
    for k, j in itertools.product(range(4), range(4)):
        meeting = next(node for node in ancestors[k] if node in ancestors[j])
        steps[k, j] = ancestors[k].index(meeting) + ancestors[j].index(meeting)
    for pair, distance in steps.items():
        assert float(gram[pair]) == pytest.approx(math.exp(-1.7 * distance / max(steps.values())))


def test_trees_of_two_classes_and_of_no_structure_are_the_simplex_once_centred():
    for count in (2, 5):
        gram = tree_gram(torch.tensor([count] * count + [-1]), 2.0, dtype=torch.float64)
        scale = (1 - math.exp(-2.0)) * (count - 1) / count
        assert torch.allclose(centred(gram), scale * simplex(count))


@pytest.mark.parametrize("floor", [0.0, 0.3, -0.05])
def test_distances_by_their_definition(floor):
    points = normal(6, 3)
    distances = torch.cdist(points, points).fill_diagonal_(0)
    gram = distance_gram(distances, 2.5, floor)
    assert_is_a_gram(gram)
    for k, j in itertools.product(range(6), range(6)):
        share = float(distances[k, j] / distances.max())
        assert float(gram[k, j]) == pytest.approx((1 - floor) * math.exp(-2.5 * share) + floor)


def test_equal_classes_of_distances_share_their_vector():
    distances = torch.tensor([[0.0, 0, 1], [0, 0, 1], [1, 1, 0]]).double()
    code = code_from_gram(distance_gram(distances, 1.0), feature_dim=4)
    assert code.shape == (3, 1)
    assert torch.allclose(code[0], code[1])


def test_small_negative_eigenvalues_are_dropped_and_the_diagonal_is_one_again():
    points = normal(6, 3)
    distances = torch.cdist(points, points).fill_diagonal_(0)
    distances[:2, 2:] = distances[0, 2:]
    distances[2:, :2] = distances[2:, :1]
    distances[0, 1] = distances[1, 0] = 0.0  # two equal classes
    exact = distance_gram(distances, 2.0)
    pushed = distances.clone()
    pushed[0, 2] = pushed[2, 0] = distances[0, 2] + 1e-7  # not quite equal: no distances between points
    gram = distance_gram(pushed, 2.0)
    assert_is_a_gram(gram)
    assert (gram - exact).abs().max() < 1e-6
    pushed[0, 2] = pushed[2, 0] = distances[0, 2] + 0.3
    with pytest.raises(ValueError, match="must be positive semi-definite, got a least eigenvalue of -0.0"):
        distance_gram(pushed, 2.0)


def test_embeddings_are_the_cosines_of_centred_rows():
    rows = normal(5, 7) + 3
    gram, deviations = embedding_gram(rows), rows - rows.mean(0)
    assert_is_a_gram(gram)
    for k, j in itertools.product(range(5), range(5)):
        cosine = deviations[k] @ deviations[j] / (deviations[k].norm() * deviations[j].norm())
        assert float(gram[k, j]) == pytest.approx(float(cosine), abs=1e-14)
    assert torch.allclose(embedding_gram(rows[:2]), simplex(2))
    assert float(embedding_gram(rows[[0, 0, 1]])[0, 1]) == pytest.approx(1)


@pytest.mark.parametrize("counts", [(3, 3, 3), (7, 2, 1, 4), (50, 1)])
def test_seli_by_the_svd_of_the_label_matrix(counts):
    """V Λ Vᵀ of Z (K, N), one column a sample."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    encoded = torch.eye(len(counts)).double()[:, labels] - 1 / len(counts)
    left, singular, _ = torch.linalg.svd(encoded, full_matrices=False)
    expected = left * singular @ left.T
    code = seli_code(torch.tensor(counts), dtype=torch.float64)
    assert code.shape == (len(counts), len(counts) - 1)
    assert torch.allclose(code @ code.T, expected * len(counts) / expected.trace(), atol=1e-12)
    if len(set(counts)) == 1 or len(counts) == 2:
        assert torch.allclose(code @ code.T, simplex(len(counts)), atol=1e-12)


@pytest.mark.parametrize(
    ("num_classes", "feature_dim", "rank"), [(6, 9, 2), (6, 9, 5), (12, 4, 4), (12, 4, 3), (2, 3, 1)]
)
def test_the_code_of_means_is_their_leading_directions(num_classes, feature_dim, rank):
    means = normal(num_classes, feature_dim) + 2
    deviations = means - means.mean(0)
    rows = deviations / deviations.norm(dim=1, keepdim=True)
    left = torch.linalg.svd(rows - rows.mean(0))[0][:, :rank]
    code = code_of_means(means, rank)
    assert torch.allclose(code @ code.T, num_classes / rank * left @ left.T, atol=1e-10)
    assert torch.allclose(code.sum(0), torch.zeros(rank).double(), atol=1e-12)
    assert torch.allclose(
        code_of_means(means.float(), rank).double().square().sum(), torch.tensor(num_classes).double()
    )
    if rank == num_classes - 1:
        assert torch.allclose(code @ code.T, simplex(num_classes), atol=1e-10)


def test_the_rank_of_means_is_the_rounded_exponential_of_an_entropy():
    means = normal(8, 20) * torch.tensor([5.0, 4, 3] + 17 * [0.2]).double()
    deviations = means - means.mean(0)
    rows = deviations / deviations.norm(dim=1, keepdim=True)
    shares = torch.linalg.svdvals(rows - rows.mean(0)).square()
    shares = shares / shares.sum()
    expected = round(math.exp(-float((shares * shares.clamp_min(1e-300).log()).sum())))
    assert 1 < expected < 7
    assert code_of_means(means).shape == (8, expected)
    assert code_of_means(random_simplex_etf(8, 20)).shape == (8, 7)
    equal = code_of_means(normal(3, 5)[[0, 0, 1, 2]])
    assert torch.allclose(equal[0], equal[1])
    assert not code_of_means(means.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize(("num_classes", "rank"), [(2, 1), (6, 2), (6, 5), (20, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_code_has_the_centred_gram_and_its_rank(num_classes, rank, dtype):
    rows = normal(num_classes, rank)
    gram = (rows @ rows.T).to(dtype)
    code = code_from_gram(gram, feature_dim=rank)
    assert code.shape == (num_classes, rank)
    assert code.dtype == dtype
    assert torch.allclose(
        (code @ code.T).double(), centred(rows @ rows.T), atol=1e-4 if dtype == torch.float32 else 1e-12
    )
    columns = code.T @ code
    assert torch.allclose(columns, columns.diagonal().diag(), atol=1e-4 if dtype == torch.float32 else 1e-12)


def test_the_code_of_the_simplex_is_an_etf():
    code = code_from_gram(simplex_gram(7, dtype=torch.float64), feature_dim=6)
    assert torch.allclose(code @ code.T, simplex(7), atol=1e-13)


SKEWED, INDEFINITE = torch.eye(3).double(), torch.diag(torch.tensor([1.0, 1, -0.5]))
SKEWED[0, 1] = 0.25
COUNTS, ONE = torch.tensor([3, 1]), torch.ones(1)
DISTANCES = torch.ones(3, 3) - torch.eye(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: code_from_gram(SKEWED, 3),
            "gram must be symmetric, got entries that differ from their mirror by 0.25",
        ),
        (lambda: code_from_gram(INDEFINITE, 3), "gram must be positive semi-definite, got a least eigenvalue of -0.5"),
        (lambda: code_from_gram(torch.eye(5), 3), "a rank of at most feature_dim = 3, got 4"),
        (lambda: code_from_gram(torch.ones(3, 3), 3), "gram must distinguish classes"),
        (lambda: code_from_gram(torch.ones(3, 4), 3), r"gram must be of shape \(K, K\), got \(3, 4\)"),
        (lambda: code_from_gram(torch.eye(3).long(), 3), "gram must be a floating-point tensor"),
        (lambda: code_from_gram(torch.full((3, 3), torch.nan), 3), "gram must be finite"),
        (lambda: code_from_gram(torch.tensor([[1.0, 0, -1], [0, 0, 0], [-1, 0, 1]]), 3), "a zero row for class 1"),
        (lambda: code_from_gram(torch.eye(3), 0), "feature_dim must be at least 1"),
        (lambda: simplex_gram(1), "num_classes must be at least 2"),
        (lambda: attribute_gram(torch.zeros(4), ONE), "attributes must be integer"),
        (lambda: attribute_gram(torch.zeros(4).long(), ONE), r"attributes must be of shape \(K, A\)"),
        (lambda: attribute_gram(DIGITS, ONE), r"weights must be of shape \(A,\) = \(3,\), got \(1,\)"),
        (lambda: attribute_gram(DIGITS, torch.tensor([0.5, 0.5, 0.5])), "with a sum of at most 1, .* with sum 1.5"),
        (lambda: attribute_gram(DIGITS, torch.tensor([0.5, -0.1, 0.1])), "weights must be at least 0"),
        (lambda: attribute_gram(DIGITS[:1], ONE.expand(3)), "num_classes must be at least 2, got 1"),
        (lambda: tree_gram(torch.tensor([1, 0]), 1.0), "-1 for one root"),
        (lambda: tree_gram(torch.tensor([-1, 0, 0]), 1.0), "leaves; of the first 2 nodes, .0. have children"),
        (lambda: tree_gram(torch.tensor([3, 4, 2, 2, -1]), 1.0), "must begin with the classes|a cycle"),
        (lambda: tree_gram(torch.tensor([2, -1, 4, 4, 3]), 1.0), "must begin with the classes|a cycle"),
        (lambda: tree_gram(torch.tensor([4, 4, -1, 4, 3]), 1.0), "a cycle"),
        (lambda: tree_gram(torch.tensor([9, -1]), 1.0), "indices of nodes below 2"),
        (lambda: tree_gram(torch.tensor([1, -1]), 1.0), "num_classes must be at least 2, got 1"),
        (lambda: tree_gram(TREE.float(), 1.0), "parents must be integer"),
        (lambda: tree_gram(TREE, 0.0), "decay must be greater than 0"),
        (lambda: distance_gram(DISTANCES, math.nan), "decay must be finite"),
        (lambda: distance_gram(DISTANCES, 1.0, 1.0), r"floor must lie in \[-1/\(K-1\), 1\) = \[-0.5, 1\), got 1.0"),
        (lambda: distance_gram(torch.ones(3, 3), 1.0), "distances must be at least 0, with a zero diagonal"),
        (lambda: distance_gram(torch.zeros(3, 3), 1.0), "distances must not be all zero"),
        (lambda: distance_gram(SKEWED - torch.eye(3), 1.0), "distances must be symmetric"),
        (lambda: embedding_gram(torch.ones(3, 4)), "embeddings must differ from their mean"),
        (lambda: embedding_gram(torch.ones(3)), r"embeddings must be of shape \(K, e\)"),
        (lambda: seli_code(torch.tensor([3, 0, 2])), r"class_counts must be at least 1, got 0 among classes \[1\]"),
        (lambda: seli_code(COUNTS.float()), "class_counts must be integer"),
        (lambda: seli_code(COUNTS[:1]), "num_classes must be at least 2"),
        (lambda: code_of_means(torch.randn(5, 3), 4), r"rank must be 'auto' or an integer from 1 to .* = 3, got 4"),
        (lambda: code_of_means(torch.randn(5, 3), "all"), "rank must be 'auto'"),
        (lambda: code_of_means(torch.ones(5, 3)), "class_means must not be all equal"),
        (lambda: code_of_means(torch.full((5, 3), torch.nan)), "class_means must be finite"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_dtypes_are_kept():
    assert attribute_gram(DIGITS, torch.full((3,), 0.2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert embedding_gram(torch.randn(3, 4)).dtype == torch.float32
    assert seli_code(COUNTS).dtype == tree_gram(TREE, 1.0).dtype == torch.get_default_dtype()
    assert code_of_means(simplex_etf(4, 6).half()).dtype == torch.float16
