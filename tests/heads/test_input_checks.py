"""Input checks: heads, class means and `attach_head` raise a ValueError that names an argument of the wrong type."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from neuralcollapse import (
    ClassMeanClassifier,
    ClassMeans,
    FixedETFClassifier,
    FixedFrameClassifier,
    LearnedClassifier,
    NearestETFClassifier,
    NearestFrameClassifier,
    attach_head,
    find_classifier,
)
from neuralcollapse.heads import FeatureNorm, collapse_radius

FEATURES, TARGETS = torch.randn(6, 4), torch.arange(6) % 3


def fixed_frame(in_features, num_classes, **options):
    return FixedFrameClassifier(in_features, num_classes, torch.eye(3)[:, :2] + 1, **options)


HEADS = (
    LearnedClassifier,
    FixedETFClassifier,
    NearestETFClassifier,
    NearestFrameClassifier,
    fixed_frame,
    ClassMeanClassifier,
)


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))


def attached():
    return attach_head(net(), NearestETFClassifier(4, 3))


WRONG_ARGUMENTS = [
    *((lambda make=make: make("4", 3), "in_features must be an integer, got '4'") for make in HEADS),
    *((lambda make=make: make(4, 3.0), "num_classes must be an integer, got 3.0") for make in HEADS),
    *((lambda make=make: make(4, 3, feature_norm=[5]), "feature_norm must be a positive number") for make in HEADS),
    *((lambda make=make: make(4, 3, feature_norm=True), "feature_norm must be a positive number") for make in HEADS),
    *((lambda make=make: make(4, 3, bias=0), "bias must be") for make in HEADS),
    *((lambda make=make: make(4, 3)(FEATURES.tolist(), TARGETS), "features must be a floating") for make in HEADS),
    *((lambda make=make: make(4, 3)(TARGETS, TARGETS), "features must be a floating-point") for make in HEADS),
    *((lambda make=make: make(4, 3)(torch.tensor(1.0), TARGETS), r"features must be of shape") for make in HEADS),
    *((lambda make=make: make(4, 3).to_inference(dtype="fp16"), "dtype must be a floating-point") for make in HEADS),
    (lambda: LearnedClassifier(4, 3, unit_weight=1), "unit_weight must be True or False, got 1"),
    (
        lambda: FixedETFClassifier(4, 3, orientation=None),
        "orientation must be 'canonical', 'random' or a",
    ),
    (lambda: FixedETFClassifier(4, 3, orientation=torch.ones(3, 4).long()), "orientation must be a floating-point"),
    (lambda: FixedETFClassifier(4, 3, orientation=torch.full((3, 4), torch.nan)), "orientation must be a unit simplex"),
    (lambda: FixedETFClassifier(4, 3, momentum=None), "momentum must lie in .* got None"),
    (
        lambda: FixedETFClassifier(4, 3, orientation="random", generator=1),
        "generator must be a torch.Generator, got int",
    ),
    (lambda: NearestETFClassifier(4, 3, momentum=None), "momentum must lie in .* got None"),
    (lambda: NearestETFClassifier(4, 3, momentum=["published"]), "momentum must lie in"),
    (lambda: NearestETFClassifier(4, 3, momentum=True), "momentum must lie in .* got True"),
    (lambda: NearestETFClassifier(4, 3, proximal_weight=None), "proximal_weight must be finite .* got None"),
    (lambda: NearestETFClassifier(4, 3, implicit_gradient="no"), "implicit_gradient must be True or False, got 'no'"),
    (lambda: NearestETFClassifier(4, 3, generator="seed"), "generator must be a torch.Generator, got str"),
    (lambda: NearestETFClassifier(4, 3)(FEATURES, TARGETS.tolist()), "targets must be integer class indices, got list"),
    (
        lambda: NearestETFClassifier(4, 3)(FEATURES, TARGETS > 0),
        "targets must be integer class indices, got torch.bool",
    ),
    (
        lambda: NearestETFClassifier(4, 3).use_targets([0]).__enter__(),
        "targets must be integer class indices, got list",
    ),
    (lambda: ClassMeanClassifier(4, 3, means="last"), "means must be 'previous', 'current' or 'differentiable', got"),
    (lambda: ClassMeanClassifier(4, 3, momentum=2.0), "momentum must lie in .* got 2.0"),
    (lambda: ClassMeanClassifier(4, 3, generator=0), "generator must be a torch.Generator, got int"),
    (lambda: ClassMeanClassifier(4, 3)(FEATURES, TARGETS + 1), r"targets must lie in \[0, 3\)"),
    (lambda: ClassMeanClassifier(4, 3)(FEATURES * torch.inf, TARGETS), "features must be finite"),
    (lambda: ClassMeans(3, 4)(None, TARGETS), "features must be a floating-point tensor, got NoneType"),
    (lambda: ClassMeans(3, 4)(FEATURES, TARGETS.tolist()), "targets must be integer class indices, got list"),
    (lambda: ClassMeans(3, 4)(FEATURES, None), "targets must be integer class indices, got NoneType"),
    (lambda: ClassMeans(3, 4, momentum=None), "momentum must lie in .* got None"),
    (lambda: ClassMeans(3, "4"), "feature_dim must be an integer, got '4'"),
    (lambda: FeatureNorm(None), "radius must be a positive number, got None"),
    (lambda: FeatureNorm(-1.0), "radius must be a positive number, got -1.0"),
    (lambda: FeatureNorm(1.0)([1.0]), "features must be a floating-point tensor, got list"),
    (lambda: collapse_radius("10"), "num_classes must be an integer, got '10'"),
    (lambda: collapse_radius(10, "high"), "probability must lie in .* got 'high'"),
    (lambda: find_classifier(None), "model must be an nn.Module, got NoneType"),
    (lambda: find_classifier(net), "model must be an nn.Module, got function"),
    (lambda: attach_head("resnet18", NearestETFClassifier(4, 3)), "model must be an nn.Module, got str"),
    (lambda: attach_head(net(), None), "head must be an nn.Module, got NoneType"),
    (lambda: attach_head(net(), NearestETFClassifier), "head must be an nn.Module, got type"),
    (
        lambda: attach_head(net(), NearestETFClassifier(4, 3), classifier=2),
        "classifier must be a module or its dotted name",
    ),
    (
        lambda: attach_head(net(), NearestETFClassifier(4, 3), output=1.5),
        "output must be a name, an index or a function",
    ),
    (lambda: attach_head(net(), FixedETFClassifier(4, 3), output="logits")(FEATURES), "which has no 'logits'"),
    (lambda: attached()(FEATURES, targets=TARGETS.tolist()), "targets must be integer class indices, got list"),
    (lambda: attach_head(net(), nn.Linear(4, 3)).to_inference(), r"head must have to_inference\(\), got Linear"),
]


@pytest.mark.parametrize(("call", "message"), WRONG_ARGUMENTS)
def test_a_wrong_argument_raises_a_value_error_that_names_it(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_attached_model_cannot_be_called_after_to_inference():
    model = attached()
    model(FEATURES, targets=TARGETS)
    expected = model.eval()(FEATURES)
    plain = model.to_inference()
    for call in (lambda: model(FEATURES), model.to_inference):
        with pytest.raises(ValueError, match=r"to_inference\(\) has replaced .* can no longer be called"):
            call()
    assert torch.allclose(plain(FEATURES), expected, atol=1e-6)
    again = attach_head(plain, NearestETFClassifier(4, 3), classifier="2.1")
    assert again(FEATURES, targets=TARGETS).shape == (6, 3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_targets_of_any_integer_dtype_give_the_same_means(dtype):
    means, expected = ClassMeans(3, 4), ClassMeans(3, 4)
    assert torch.equal(means(FEATURES, TARGETS.to(dtype))[0], expected(FEATURES, TARGETS)[0])
