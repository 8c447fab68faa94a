"""Invalid arguments, also of another type, raise a ValueError that names the argument."""

from __future__ import annotations

import pytest
import torch

from neuralcollapse import nearest_simplex_etf, polar_factor, random_simplex_etf, simplex_etf
from neuralcollapse.geometry import nearest_etf_diagnostics, simplex_basis
from neuralcollapse.geometry.simplex import check_simplex_etf

MEANS, ETF = torch.randn(3, 4), simplex_etf(3, 4)
CALLS = [
    (lambda: simplex_etf("3"), "num_classes must be an integer, got '3'"),
    (lambda: simplex_etf(True), "num_classes must be an integer, got True"),
    (lambda: simplex_etf(3, 4.0), "feature_dim must be an integer, got 4.0"),
    (lambda: simplex_etf(3, dtype=torch.int64), "dtype must be a floating-point torch.dtype, got torch.int64"),
    (lambda: simplex_etf(3, dtype="float32"), "dtype must be a floating-point torch.dtype, got 'float32'"),
    (lambda: simplex_etf(3, device="gpu"), "device must name a torch device, got 'gpu'"),
    (lambda: random_simplex_etf(None, 4), "num_classes must be an integer, got None"),
    (lambda: random_simplex_etf(3, None), "feature_dim must be an integer, got None"),
    (lambda: random_simplex_etf(3, 4, generator=0), "generator must be a torch.Generator, got int"),
    (lambda: random_simplex_etf(3, 4, dtype=float), "dtype must be a floating-point torch.dtype"),
    (lambda: random_simplex_etf(3, 4, device=object()), "device must name a torch device"),
    (lambda: random_simplex_etf(3, 4, device="meta", generator=torch.Generator()), "generator must be on the device"),
    (lambda: simplex_basis([3]), r"num_classes must be an integer, got \[3\]"),
    (lambda: simplex_basis(3, dtype=torch.bool), "dtype must be a floating-point torch.dtype, got torch.bool"),
    (lambda: polar_factor([[1.0]]), "matrix must be a floating-point tensor, got list"),
    (lambda: polar_factor(None), "matrix must be a floating-point tensor, got NoneType"),
    (lambda: polar_factor(torch.ones(2, 3, dtype=torch.complex64)), "matrix must be a floating-point tensor"),
    (lambda: nearest_simplex_etf(MEANS.numpy()), "class_means must be a floating-point tensor, got ndarray"),
    (
        lambda: nearest_simplex_etf(MEANS, proximal_weight=None),
        "proximal_weight must be finite and at least 0, got None",
    ),
    (lambda: nearest_simplex_etf(MEANS, anchor=ETF, proximal_weight="1"), "proximal_weight must be finite .* got '1'"),
    (lambda: nearest_simplex_etf(MEANS, anchor=ETF, proximal_weight=float("nan")), "proximal_weight must be finite"),
    (lambda: nearest_simplex_etf(MEANS, anchor=ETF.tolist()), "anchor must be a floating-point tensor, got list"),
    (lambda: nearest_simplex_etf(MEANS, class_weights=[1, 1, 1]), "class_weights must be a floating-point tensor"),
    (
        lambda: nearest_simplex_etf(MEANS, class_weights=torch.tensor(1.0)),
        r"class_weights must end in the shape \(3,\)",
    ),
    (lambda: nearest_simplex_etf(MEANS, class_weights=torch.ones(2, 3)), "class_weights must have the leading"),
    (lambda: nearest_etf_diagnostics(None, ETF), "class_means must be a floating-point tensor, got NoneType"),
    (lambda: nearest_etf_diagnostics(MEANS, None), "etf must be a floating-point tensor, got NoneType"),
    (lambda: nearest_etf_diagnostics(MEANS, ETF, proximal_weight=1.0), "needs an anchor"),
]


@pytest.mark.parametrize(("call", "message"), CALLS)
def test_an_invalid_argument_raises_a_value_error_that_names_it(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(2, 1), (2, 2), (5, 4), (100, 99), (100, 128), (1000, 1024)])
def test_every_simplex_etf_is_accepted(size, dtype):
    check_simplex_etf("etf", random_simplex_etf(*size, generator=torch.Generator().manual_seed(0), dtype=dtype))


@pytest.mark.parametrize("size", [(2, 1), (2, 2), (5, 4), (7, 9), (100, 128)])
@pytest.mark.parametrize("row", [0, 1, -1])
def test_an_etf_with_one_row_changed_is_refused(size, row):
    for change in (lambda vector: 1.01 * vector, lambda vector: -vector, torch.zeros_like, lambda vector: vector + 0.1):
        etf = random_simplex_etf(*size, generator=torch.Generator().manual_seed(0))
        etf[row] = change(etf[row])
        with pytest.raises(ValueError, match="etf must be a unit simplex ETF"):
            check_simplex_etf("etf", etf)
