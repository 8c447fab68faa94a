"""Out-of-distribution scores fitted to a measurement equal those of kept features in NumPy (`ood_reference`)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers import normal
from neuralcollapse import Measurement, ood, simplex_etf
from ood_reference import D, N, Reference, close, data, linear_model, measured

VARIANTS = [
    *((name, {}) for name in ood.SCORES if name != "knn"),
    ("energy", {"temperature": 0.3}),
    ("neco", {"standardise": False}),
    ("neco", {"times_max_logit": True}),
    ("neco", {"standardise": False, "times_max_logit": True, "dimension": 3}),
    ("neco", {"dimension": 0.9}),
    ("residual", {"dimension": 2}),
    ("vim", {"dimension": 3}),
    ("nci", {"alpha": 0.5}),
    ("knn", {"k": 7}),
]


def options_for(name, options, features):
    return options | {"bank": features} if name == "knn" else options


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "moments", "tolerance"),
    [(torch.float64, torch.float64, 1e-10), (torch.float32, torch.float64, 1e-5), (torch.float32, "mixed", 2e-5)],
    ids=["fp64", "fp32", "mixed"],
)
def test_a_score_equals_that_of_kept_features(name, options, dtype, moments, tolerance):
    features, targets, weight, bias, others = data(dtype=dtype)
    expected = getattr(Reference(features, targets, weight, bias), name)(others.double().numpy(), **options)
    options = options_for(name, options, features)
    for batch in (N, 7):
        measurement = measured(features, weight, bias, targets, batch=batch, dtype=moments)
        close(ood.fit_score(measurement, name, **options)(others), expected, tolerance)


@pytest.mark.parametrize("name", ood.SCORES)
@pytest.mark.parametrize("case", ["absent class", "K > d", "no bias", "bf16"])
def test_other_classes_and_features(name, case):
    dtype = torch.bfloat16 if case == "bf16" else torch.float64
    num_classes = 20 if case == "K > d" else 4
    features, targets, weight, bias, others = data(num_classes, dtype, absent=case == "absent class")
    bias = None if case == "no bias" else bias
    options = {"dimension": 5} if name == "neco" and case == "K > d" else {}
    of_logits = {}
    if name == "vim" and case == "bf16":  # alpha is that of the model's logits, which bf16 rounds
        logits = linear_model(weight, bias)(features).detach().double()
        of_logits = {"greatest": logits.max(dim=1).values.numpy()}
    reference = Reference(features, targets, weight, bias)
    expected = getattr(reference, name)(others.double().numpy(), **options, **of_logits)
    measurement = measured(features, weight, bias, targets)
    scores = ood.fit_score(measurement, name, **options_for(name, options, features))(others)
    if case == "bf16":
        assert scores.dtype == torch.float32  # from features in bf16: the difference is that of fp32 arithmetic
    close(scores, expected, 1e-5 if case == "bf16" else 1e-10)


@pytest.mark.parametrize("name", ["mahalanobis", "relative_mahalanobis", "residual", "vim", "neco"])
def test_singular_covariance(name):
    """Dimensions that are constant, and features on a plane."""
    features, targets, weight, bias, others = data()
    plane = torch.linalg.qr(normal(D, D, seed=8))[0]
    plane[:, -4:] = 0
    features = features @ plane @ plane.T
    options = {"dimension": 3} if name in ("residual", "vim") else {}
    for rows in (features, torch.where(torch.arange(D) < 3, 0.25, features @ plane)):
        expected = getattr(Reference(rows, targets, weight, bias), name)(0.1 * others.numpy(), **options)
        scores = ood.fit_score(measured(rows, weight, bias, targets), name, **options)(0.1 * others)
        close(scores, expected, 1e-9)


@pytest.mark.parametrize(("spread", "dtype"), [(1e-2, torch.float32), (1e-6, torch.float64)])
def test_mahalanobis_is_accurate_in_deep_collapse(spread, dtype):
    """Distances are small differences of large features."""
    _, targets, weight, bias, _ = data(dtype=dtype)
    features = (2 * normal(4, D, seed=2)[targets] + spread * normal(N, D, seed=1)).to(dtype)
    expected = Reference(features, targets, weight, bias).mahalanobis(features.double().numpy())
    close(ood.fit_score(measured(features, weight, bias, targets), "mahalanobis")(features), expected, 1e-5)


def collapsed(num_classes=5, feature_dim=9, center=0.0, per_class=4):
    """Features at class means that form an ETF, with a classifier aligned to it (NC1 to NC4)."""
    deviations = 3 * simplex_etf(num_classes, feature_dim, dtype=torch.float64)
    targets = torch.arange(num_classes * per_class) % num_classes
    weight = 0.7 * deviations
    center = torch.full((feature_dim,), center, dtype=torch.float64)
    return deviations[targets] + center, targets, weight, -weight @ center


@pytest.mark.filterwarnings("ignore:undefined metrics")
def test_values_at_exact_collapse_are_those_of_the_docstrings():
    num_classes, length, c = 5, 3.0, 0.7
    features, targets, weight, bias = collapsed(center=0.3)
    measurement = measured(features, weight, bias, targets)
    gap = c * length**2 * num_classes / (num_classes - 1)
    greatest = c * length**2
    expected = {
        "msp": 1 / (1 + (num_classes - 1) * math.exp(-gap)),
        "maxlogit": greatest,
        "energy": greatest + math.log(1 + (num_classes - 1) * math.exp(-gap)),
        "neco": 1.0,
        "fdbd": math.sqrt(num_classes / (2 * (num_classes - 1))),
        "ncm": 0.0,
        "knn": 0.0,
    }
    for name, value in expected.items():
        options = options_for(name, {"k": 4} if name == "knn" else {}, features)
        scores = ood.fit_score(measurement, name, **options)(features)
        np.testing.assert_allclose(scores.numpy(), value, rtol=1e-9, atol=1e-9, err_msg=name)
    nci = ood.fit_score(measurement, "nci", alpha=0.0)(features)
    np.testing.assert_allclose(nci.numpy(), c * length, rtol=1e-9)
    residual = ood.fit_score(measurement, "residual", dimension=6)(features)
    np.testing.assert_allclose(residual.numpy(), 0, atol=1e-9)
    # The share of a feature outside the span of the ETF is its cosine with it.
    outside = torch.linalg.svd(weight)[2][-1] * 4
    share = ood.fit_score(measurement, "neco", standardise=False)((measurement.moments.means[0] - 0.3 + outside)[None])
    assert float(share) == pytest.approx(3 / 5)


@pytest.mark.filterwarnings("ignore:undefined metrics")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mahalanobis", "do not vary within classes.*'ncm' is its limit"),
        ("relative_mahalanobis", "do not vary within classes"),
        ("vim", "have no residual; give a smaller dimension"),
    ],
)
def test_scores_that_are_undefined_at_exact_collapse_say_why(name, message):
    features, targets, weight, bias = collapsed(center=0.3, feature_dim=20)
    with pytest.raises(ValueError, match=message):
        ood.fit_score(measured(features, weight, bias, targets), name)


def test_towards_collapse_mahalanobis_tends_to_the_nearest_mean():
    """With the same spread ε in all directions, −ε²·score tends to the squared distance to the nearest mean."""
    features, targets, weight, bias = collapsed(per_class=100)
    others = normal(6, 9, seed=3)
    ncm = ood.fit_score(measured(features, weight, bias, targets), "ncm")(others)
    noise = normal(len(features), 9, seed=4)
    for label in range(5):  # deviations with mean zero and covariance I in each class
        rows = noise[targets == label] - noise[targets == label].mean(0)
        noise[targets == label] = rows @ torch.linalg.inv(torch.linalg.cholesky(rows.T @ rows / len(rows))).T
    spread = 1e-3
    score = ood.fit_score(measured(features + spread * noise, weight, bias, targets), "mahalanobis")(others)
    torch.testing.assert_close(spread**2 * score, -ncm.square(), rtol=1e-6, atol=0)


def orthogonal():
    return torch.linalg.qr(normal(D, D, seed=9))[0]


@pytest.mark.parametrize(
    ("names", "transform"),
    [
        (set(ood.SCORES) - {"neco"}, lambda h, w, b: (h @ orthogonal(), w @ orthogonal(), b)),  # neco standardises
        ({"mahalanobis", "relative_mahalanobis"}, lambda h, w, b: (h @ normal(D, D, seed=6) + 3, w, b)),
        ({"msp", "fdbd"}, lambda h, w, b: (h, w, b + 2)),
        ({"knn"}, lambda h, w, b: (5 * h, w, b)),
        ({"fdbd"}, lambda h, w, b: (5 * h, 2 * w, 10 * b)),
        ({"neco"}, lambda h, w, b: (h * normal(D, seed=6).abs() + 3, w, b)),
        ({"msp", "maxlogit", "energy", "fdbd", "vim"}, lambda h, w, b: (4 * h, w / 4, b)),
    ],
    ids=["rotation", "affine", "shift of logits", "scale", "scale of logits", "scale of dimensions", "units"],
)
def test_invariances(names, transform):
    features, targets, weight, bias, others = data()
    moved, new_weight, new_bias = transform(features, weight, bias)
    moved_others = transform(others, weight, bias)[0]
    for name in sorted(names):
        options = {"alpha": 0.0} if name == "nci" else {}
        before = measured(features, weight, bias, targets)
        after = measured(moved, new_weight, new_bias, targets)
        expected = ood.fit_score(before, name, **options_for(name, options, features))(others)
        scores = ood.fit_score(after, name, **options_for(name, options, moved))(moved_others)
        torch.testing.assert_close(
            scores, expected, rtol=1e-7, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", ood.SCORES)
def test_scores_have_gradients_in_the_features(name):
    features, targets, weight, bias, others = data()
    fitted = ood.fit_score(measured(features, weight, bias, targets), name, **options_for(name, {}, features))
    inputs = others[20:23].clone().requires_grad_()
    assert torch.autograd.gradcheck(fitted, inputs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", [name for name in ood.SCORES if name != "knn"])
def test_what_is_fitted_does_not_grow_with_the_number_of_samples(name):
    _, _, weight, bias, _ = data()
    sizes = set()
    for samples in (N, 10 * N):
        features = normal(samples, D, seed=1)
        fitted = ood.fit_score(measured(features, weight, bias, torch.arange(samples) % 4), name)
        sizes.add(sum(tensor.numel() for tensor in fitted.tensors.values()))
    assert len(sizes) == 1
    assert sizes.pop() <= 3 * 4 * D + 2 * D * D + 10


def test_a_saved_record_gives_the_same_scores(tmp_path):
    features, targets, weight, bias, others = data(dtype=torch.float32)
    measurement = measured(features, weight, bias, targets)
    measurement.save(tmp_path / "record")
    for name in set(ood.SCORES) - {"knn"}:
        loaded = ood.fit_score(Measurement.load(tmp_path / "record"), name)(others)
        torch.testing.assert_close(loaded, ood.fit_score(measurement, name)(others), rtol=1e-6, atol=1e-6)


def test_auto_follows_nc1_and_says_so():
    features, targets, weight, bias, _ = data()
    spread_out = ood.fit_score(measured(features, weight, bias, targets))
    assert spread_out.name == "relative_mahalanobis"
    assert "is above" in spread_out.reason
    means = features.mean(0) + 2 * normal(4, D)[targets]
    near = ood.fit_score(measured(means + 0.01 * features, weight, bias, targets))
    assert near.name == "mahalanobis"
    assert "near collapse" in near.reason
    collapsed = ood.fit_score(measured(means, weight, bias, targets))
    assert collapsed.name == "ncm"
    assert "do not vary within classes" in collapsed.reason
    unknown = ood.fit_score(replace(measured(features, weight, bias, targets), metrics={}))
    assert unknown.name == "energy"
    assert "is unknown" in unknown.reason


def record(**changes):
    features, targets, weight, bias, _ = data()
    return replace(measured(features, weight, bias, targets), **changes)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.eye(2),), {}, "measurement must be a Measurement, got Tensor"),
        ((record(), "odin"), {}, "score must be 'auto' or one of msp, .* got 'odin'"),
        ((record(), "msp"), {"alpha": 1}, "score 'msp' has no options, got alpha"),
        ((record(), "nci"), {"beta": 1}, "score 'nci' accepts the options alpha, got beta"),
        ((record(), "nci"), {"alpha": -1}, "alpha must be finite and at least 0"),
        ((record(weight=torch.empty(0, D)), "energy"), {}, r"need the weight .*; measure\(model, loader\) records it"),
        ((record(), "energy"), {"temperature": 0}, "temperature must be greater than 0"),
        ((record(), "vim"), {"dimension": D}, "dimension must be less than d = 12, got 12"),
        ((record(residual_norms=torch.empty(0)), "vim"), {}, r"MeasureOptions\(per_sample=True\)"),
        ((record(), "neco"), {"dimension": 0}, "dimension must be at least 1"),
        ((record(), "neco"), {"dimension": 1.5}, "dimension must be an integer"),
        ((record(), "neco"), {"dimension": D}, "dimension must be less than d = 12, or a share"),
        ((record(), "neco"), {"standardise": 1}, "standardise must be True or False"),
        ((record(weight=torch.ones(4, D)), "fdbd"), {}, "two classes have the same row"),
        ((record(weight=torch.full((4, D), math.nan)), "msp"), {}, "weight must be finite"),
        ((record(), "knn"), {}, "knn needs training features, which measurements do not contain: give bank"),
        ((record(), "knn"), {"bank": torch.ones(3, 2)}, r"bank must be of shape \(n, 12\), got \(3, 2\)"),
        ((record(), "knn"), {"bank": torch.ones(3, D)}, "k must be at most .* 3, got 50"),
        ((record(), "knn"), {"bank": torch.zeros(60, D)}, "must not contain zero features"),
    ],
)
def test_bad_arguments(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ood.fit_score(*arguments, **options)


@pytest.mark.filterwarnings("ignore:undefined metrics")
def test_a_record_of_one_class_or_of_nothing():
    features, targets, weight, bias, _ = data()
    one = measured(features, weight, bias, torch.zeros_like(targets))
    nothing = measured(features, weight, bias, torch.full_like(targets, -1), ignore_index=-1)
    with pytest.raises(ValueError, match="one class with samples"):
        ood.fit_score(one, "neco")
    assert ood.fit_score(one, "mahalanobis")(features).isfinite().all()
    with pytest.raises(ValueError, match="at least one sample"):
        ood.fit_score(nothing, "ncm")


def test_scores_of_many_classes_in_few_dimensions():
    features, targets, weight, bias, _ = data(20)
    with pytest.raises(ValueError, match="share is always 1; give a smaller dimension"):
        ood.fit_score(measured(features, weight, bias, targets), "neco")
