"""Input checks of the metric functions: arguments of a wrong type, shape or value are named."""

from __future__ import annotations

import inspect

import pytest
import torch

import neuralcollapse.metrics
from helpers import generator

K, D, N = 4, 6, 20
TARGETS = torch.arange(N) % K
ARGUMENTS = {  # a valid value for each argument name
    "vectors": torch.randn(K, D, generator=generator(1)),
    "weight": torch.randn(K, D, generator=generator(2)),
    "class_means": torch.randn(K, D, generator=generator(3)),
    "code": torch.randn(K, 2, generator=generator(6)),
    "centred_means": torch.randn(K, D, generator=generator(4)),
    "features": torch.randn(N, D, generator=generator(5)),
    "targets": TARGETS,
    "predictions": TARGETS.flip(0),
    "bias": torch.zeros(K),
    "center": torch.zeros(D),
    "ood_mean": torch.ones(D),
    "counts": torch.full((K,), N // K),
    "within_class_covariance": torch.eye(D),
    "within_class_trace": torch.tensor(1.0),
    "within_class_variances": torch.ones(K),
    "class_scatter": torch.eye(D).expand(K, D, D),
}
FUNCTIONS = [
    name
    for name in neuralcollapse.metrics.__all__
    if name.startswith("nc")
    or name.endswith(("alignment", "information", "rank"))
    or name in ("cos_margins", "nearest_class_mean", "feature_norm", "rank_me")
]
CASES = [
    (name, argument)
    for name in FUNCTIONS
    for argument in inspect.signature(getattr(neuralcollapse.metrics, name)).parameters
    if argument in ARGUMENTS
]


def call(name, **replaced):
    function = getattr(neuralcollapse.metrics, name)
    arguments = {key: ARGUMENTS[key] for key in inspect.signature(function).parameters if key in ARGUMENTS}
    return function(**arguments | replaced)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_valid_arguments_are_accepted(name):
    call(name)


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_arguments_of_a_wrong_type_or_shape_are_named(name, argument):
    valid = ARGUMENTS[argument]
    wrong = [valid.tolist(), "a", 3, valid.to(torch.complex64), valid[None]]
    wrong += [valid.float()] if valid.dtype == torch.long else [valid.long()]
    for value in wrong + ([None] if argument != "bias" else []):
        with pytest.raises(ValueError, match=rf"^{argument} must"):
            call(name, **{argument: value})


OF_TARGETS = ["alignment", "cos_margins", "nc2_cos_margin", "instance_alignment", "class_alignment"]


@pytest.mark.parametrize("name", [*OF_TARGETS, "matrix_information"])
def test_targets_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match=r"targets must lie in \[0, 4\)"):
        call(name, targets=TARGETS + 1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nc2_hyperspherical", {"kernel": "gauss"}, "kernel must be one of dist, log, riesz, got 'gauss'"),
        ("nc2_hyperspherical", {"kernel": ["log"]}, "kernel must be one of dist, log, riesz"),
        ("nc2_hyperspherical", {"exponent": 0}, "exponent must be greater than 0, got 0"),
        ("nc2_hyperspherical", {"exponent": "2"}, "exponent must be a number, got '2'"),
        ("nc1_cdnv", {"power": 0.0}, "power must be greater than 0, got 0.0"),
        ("nc1_cdnv", {"power": None}, "power must be a number, got None"),
    ],
)
def test_unknown_kernels_and_exponents_out_of_range(name, options, message):
    with pytest.raises(ValueError, match=message):
        call(name, **options)


def test_exponents_of_kernels_and_of_cdnv():
    vectors = ARGUMENTS["vectors"].double()
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    distances = torch.pdist(unit)
    for kernel, values in {"dist": distances**3, "log": -3 * distances.log(), "riesz": distances**-3}.items():
        mean, variance = neuralcollapse.metrics.nc2_hyperspherical(vectors, kernel, exponent=3)
        torch.testing.assert_close(mean, values.mean())
        torch.testing.assert_close(variance, values.var(correction=0))
    cdnv = neuralcollapse.metrics.nc1_cdnv(vectors, torch.ones(K).double(), power=2)
    torch.testing.assert_close(cdnv, (torch.pdist(vectors) ** -4).mean())
