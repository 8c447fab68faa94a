"""Hessian spectra, saddles, and the classification of critical points."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from helpers import generator
from neuralcollapse.heads import FixedETFClassifier, LearnedClassifier, NearestETFClassifier
from neuralcollapse.ufm import (
    UnconstrainedFeatures,
    classify_critical_point,
    escape,
    global_optimum,
    hessian_extremes,
    loss_slice,
    minimize,
    origin_curvature,
    survey,
    symmetric_saddle,
)
from ufm.models import SETTINGS, random_model

# (K, groups, n, λ_W, λ_H, d)
SADDLES = [
    (2, 1, 3, 0.05, 0.02, 1),
    (4, 1, 2, 0.02, 0.02, 6),
    (4, 2, 3, 0.01, 0.02, 4),
    (6, 2, 2, 0.01, 0.01, 5),
    (6, 3, 1, 0.02, 0.005, 6),
    (6, 3, 4, 0.005, 0.01, 9),
    (9, 3, 2, 0.01, 0.01, 8),
    (10, 5, 2, 0.004, 0.01, 10),
    (12, 1, 1, 0.01, 0.01, 11),
    (12, 4, 1, 0.01, 0.002, 12),
]


def at_saddle(num_classes, groups, samples_per_class, weight_decay, feature_decay, feature_dim):
    return symmetric_saddle(
        num_classes, groups, samples_per_class, weight_decay, feature_decay, feature_dim=feature_dim
    )


def gradient_norm(model):
    gradients = torch.autograd.grad(model.objective(), list(model.parameters()))
    return float(sum(gradient.square().sum() for gradient in gradients).sqrt())


def hessian_by_autograd(model):
    """The dense Hessian by reverse over reverse, one row after another."""
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(model.objective(), parameters, create_graph=True)
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in flat]
    return torch.stack([torch.cat([piece.reshape(-1) for piece in row]) for row in rows])


@pytest.mark.parametrize(
    ("loss", "options"),
    [("cross-entropy", {}), ("mse", {}), ("focal", {}), ("cross-entropy", {"class_counts": [1, 1, 7]})],
)
@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_the_ends_of_the_spectrum_are_those_of_the_dense_hessian(loss, options, method):
    model = random_model(3, 3, 4, 0.1, 0.2, loss=loss, **options)
    hessian = hessian_by_autograd(model)
    values = torch.linalg.eigvalsh(hessian)
    ends = hessian_extremes(model, count=3, method=method, generator=generator())
    assert ends.method == method
    assert ends.residual < 1e-10
    assert float(ends.least[0]) == pytest.approx(float(values[0]), abs=1e-10)
    assert float(ends.greatest[-1]) == pytest.approx(float(values[-1]), abs=1e-10)
    for found, directions in ((ends.least, ends.least_directions), (ends.greatest, ends.greatest_directions)):
        assert torch.allclose(hessian @ directions.T, found * directions.T, atol=1e-10)
        assert torch.allclose(directions @ directions.T, torch.eye(3).double(), atol=1e-10)
    if method == "dense":
        assert torch.allclose(torch.cat([ends.least, ends.greatest]), values[[0, 1, 2, -3, -2, -1]], atol=1e-12)


def test_lanczos_needs_no_dense_hessian():
    """20,000 parameters, whose dense Hessian is 3.2 GB: the least eigenvalue at the origin is the formula's."""
    model = symmetric_saddle(50, 1, 3, 0.002, 0.004, feature_dim=100)
    ends = hessian_extremes(model, generator=generator())
    assert ends.method == "lanczos"
    assert float(ends.least[0]) == pytest.approx(origin_curvature(50, 3, 0.002, 0.004), abs=1e-10)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_least_eigenvalue_at_the_origin_is_the_formula(setting):
    num_classes, samples_per_class, feature_dim, weight_decay, feature_decay = setting
    model = at_saddle(num_classes, 1, samples_per_class, weight_decay, feature_decay, feature_dim)
    least = float(hessian_extremes(model).least[0])
    expected = origin_curvature(num_classes, samples_per_class, weight_decay, feature_decay)
    with_bias_direction = min(expected, 0.0)  # along b ∝ 1 the objective is flat, whatever the decay
    assert least == pytest.approx(with_bias_direction, abs=1e-10)


@pytest.mark.parametrize("skew", [1.0, 3.0])
def test_the_origin_turns_from_saddle_to_optimum_where_the_decays_product_is_the_critical_one(skew):
    critical = 1 / (4 * 3**0.5)
    for factor in (0.9, 1 - 1e-6, 1 + 1e-6, 1.1):
        model = random_model(4, 3, 5, critical * skew, critical / skew * factor, bias=False)
        model.place(torch.zeros(4, 5), torch.zeros(12, 5))
        least = float(hessian_extremes(model).least[0])
        assert least == pytest.approx(origin_curvature(4, 3, critical * skew, critical / skew * factor), abs=1e-12)
        assert (least < 0) == (factor < 1)
        assert (global_optimum(4, 3, critical * skew, critical / skew * factor).frame == "origin") == (factor > 1)


@pytest.mark.parametrize("setting", SADDLES, ids=str)
def test_a_saddle_of_groups_is_critical_strict_and_of_its_rank(setting):
    model = at_saddle(*setting)
    num_classes, groups, samples_per_class, weight_decay, feature_decay, _ = setting
    assert gradient_norm(model) < 1e-13
    point = classify_critical_point(model)
    assert point.kind == "strict saddle"
    assert (
        point.least_eigenvalue <= origin_curvature(num_classes, samples_per_class, weight_decay, feature_decay) + 1e-9
    )
    assert point.objective > point.optimum
    expected = 0 if groups == 1 else groups - 1
    assert int(torch.linalg.matrix_rank(model.features)) == int(torch.linalg.matrix_rank(model.head.weight)) == expected
    curvature = point.direction @ hessian_by_autograd(model) @ point.direction if num_classes < 7 else None
    assert curvature is None or float(curvature) == pytest.approx(point.least_eigenvalue, abs=1e-9)


@pytest.mark.parametrize("setting", SADDLES, ids=str)
def test_from_every_saddle_escape_and_descent_reach_the_global_optimum(setting):
    model = at_saddle(*setting)
    before = float(model.objective().detach())
    escaped = escape(model, generator=generator())
    assert escaped.objective_before == pytest.approx(before)
    assert float(model.objective().detach()) == pytest.approx(escaped.objective_after)
    assert escaped.objective_after < before
    minimize(model)
    assert classify_critical_point(model).kind == "global optimum"


@pytest.mark.slow
@pytest.mark.parametrize("setting", SADDLES, ids=str)
def test_escape_works_for_any_random_direction(setting):
    for seed in range(30):
        model = at_saddle(*setting)
        escape(model, generator=generator(seed))
        minimize(model)
        assert classify_critical_point(model).kind == "global optimum"


@pytest.mark.parametrize("loss", ["cross-entropy", "mse"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_at_the_optimum_no_curvature_is_negative(setting, loss):
    num_classes, samples_per_class, feature_dim, weight_decay, feature_decay = setting
    optimum = global_optimum(
        num_classes, samples_per_class, weight_decay, feature_decay, feature_dim=feature_dim, loss=loss
    )
    model = random_model(*setting, loss=loss)
    model.place(optimum.weight, optimum.features, optimum.bias)
    point = classify_critical_point(model)
    assert point.kind == "global optimum"
    assert point.least_eigenvalue >= -1e-8


def test_kinds_of_points_are_distinguished():
    model = random_model(4, 3, 5, 0.01, 0.01)
    assert classify_critical_point(model).kind == "not critical"
    assert classify_critical_point(model).least_eigenvalue is None
    minimize(model)
    assert classify_critical_point(model).kind == "global optimum"
    focal = random_model(4, 3, 5, 0.01, 0.01, loss="focal")
    minimize(focal)
    point = classify_critical_point(focal)
    assert (point.kind, point.optimum) == ("undecided", None)
    assert point.least_eigenvalue >= -1e-8


def test_heads_that_move_class_means_are_analysed_in_evaluation_mode():
    model = UnconstrainedFeatures(4, 3, 5, NearestETFClassifier(5, 4), feature_decay=0.01)
    for function in (minimize, hessian_extremes, classify_critical_point, escape):
        with pytest.raises(
            ValueError, match="NearestETFClassifier updates class means in training mode: call model.eval"
        ):
            function(model)
    before = float(model.eval().objective().detach())
    assert minimize(model, max_iterations=20).objective < before
    fixed = UnconstrainedFeatures(4, 3, 5, FixedETFClassifier(5, 4, bias="learned", feature_norm=None)).double()
    assert float(hessian_extremes(fixed).least[0]) >= -1e-12  # convex in the features


def test_analysis_does_not_change_the_model():
    model = random_model(4, 3, 5, 0.01, 0.01)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    classify_critical_point(model)
    hessian_extremes(model)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: symmetric_saddle(6, 4, 2, 0.01, 0.01), "groups must divide num_classes = 6 and be fewer, got 4"),
        (lambda: symmetric_saddle(6, 6, 2, 0.01, 0.01), "groups must divide num_classes = 6 and be fewer, got 6"),
        (lambda: symmetric_saddle(6, 0, 2, 0.01, 0.01), "groups must be at least 1, got 0"),
        (lambda: symmetric_saddle(6, 2, 2, 0.0, 0.01), "weight_decay must be greater than 0, got 0.0"),
        (lambda: symmetric_saddle(6, 2, 2, 0.01, -1.0), "feature_decay must be a finite number of at least 0"),
        (lambda: symmetric_saddle(6, 2, 2, 0.01, 0.01, feature_dim=4), "feature_dim must be at least num_classes - 1"),
        (lambda: symmetric_saddle(6, 2, 2, 0.5, 0.5), r"weight_decay \* feature_decay must be less than 1/\(K²n\)"),
        (
            lambda: next(survey(random_model(6, 2, 6, 0.5, 0.5))),
            r"weight_decay \* feature_decay must be less than 1/\(K²n\)",
        ),
        (lambda: next(survey(random_model(6, 2, 6, 0.01, 0.01), starts=-1)), "starts must be at least 0, got -1"),
        (lambda: next(survey(random_model(6, 2, 4, 0.01, 0.01))), "feature_dim must be at least num_classes - 1 = 5"),
        (lambda: next(survey(random_model(6, 2, 6, 0.0, 0.01))), "weight_decay must be greater than 0, got 0.0"),
        (
            lambda: next(survey(random_model(6, 2, 6, 0.01, 0.01, loss="mse"))),
            "model must have balanced classes, cross",
        ),
        (
            lambda: next(survey(random_model(6, 2, 6, 0.01, 0.01, bias=False))),
            "model must have balanced classes, cross",
        ),
        (lambda: next(survey(random_model(3, 2, 3, 0.01, 0.01, class_counts=[3, 2, 1]))), "model must have balanced"),
        (
            lambda: loss_slice(random_model(4, 3, 5, 0.01, 0.01), torch.zeros(3), torch.zeros(2)),
            r"direction must be of shape \(84,\), got \(3,\)",
        ),
        (lambda: origin_curvature(6, 2, 0.0, 0.5), "weight_decay must be greater than 0, got 0.0"),
        (lambda: escape(random_model(4, 3, 5, 0.01, 0.01)), "model must be at a critical point: the gradient's norm"),
        (lambda: escape(symmetric_saddle(4, 1, 3, 0.5, 0.5)), r"be at a strict saddle: .* \(global optimum\)"),
        (lambda: escape(LearnedClassifier(5, 4)), "model must be an UnconstrainedFeatures, got LearnedClassifier"),
        (
            lambda: hessian_extremes(random_model(40, 4, 40, 0.01, 0.01), method="dense"),
            "method 'dense' must have at most 5000 parameters, got 8040",
        ),
        (lambda: hessian_extremes(random_model(2, 1, 1, 0.1, 0.1), count=6), "count must be less than the number of"),
        (lambda: hessian_extremes(random_model(2, 1, 1, 0.1, 0.1), count=0), "count must be at least 1, got 0"),
        (lambda: hessian_extremes(random_model(2, 1, 1, 0.1, 0.1), method="qr"), "method must be 'auto', 'dense' or"),
        (lambda: hessian_extremes(random_model(2, 1, 1, 0.1, 0.1), tolerance=0), "tolerance must lie in"),
        (lambda: minimize(random_model(2, 1, 1, 0.1, 0.1), max_iterations=0), "max_iterations must be at least 1"),
        (lambda: minimize(random_model(2, 1, 1, 0.1, 0.1), gradient_tolerance=0), "gradient_tolerance must be greater"),
    ],
)
def test_bad_input_is_rejected(function, message):
    with pytest.raises(ValueError, match=message):
        function()


def test_without_scipy_the_error_says_what_to_install_and_the_closed_forms_work():
    script = """
import sys
sys.modules["scipy"] = None
from neuralcollapse import ufm
model = ufm.symmetric_saddle(4, 2, 2, 0.01, 0.01)
print(ufm.global_optimum(4, 2, 0.01, 0.01).frame)
try:
    ufm.minimize(model)
except ImportError as error:
    print(error)
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.startswith("simplex\n")
    assert "need scipy, which is not installed: pip install 'neuralcollapse[theory]'" in output
