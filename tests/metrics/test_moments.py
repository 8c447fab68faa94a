"""One-pass moments: exact for any order and partition of the data, with checked inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import generator
from neuralcollapse.metrics import ClassMoments, MeasureOptions, collapse_metrics
from neuralcollapse.metrics import moments as moments_module

FEATURES = torch.randn(200, 12, generator=generator(1)) + 3 * torch.randn(12, generator=generator(2))
TARGETS = torch.randint(5, (200,), generator=generator(3))


def moments_of(features, targets, num_classes=5, **options) -> ClassMoments:
    moments = ClassMoments(num_classes, features.shape[-1], **options)
    moments.update(features, targets)
    return moments


def assert_same_state(a: ClassMoments, b: ClassMoments, tolerance: float) -> None:
    for name, tensor in a.state.items():
        scale = float(tensor.double().abs().max())
        torch.testing.assert_close(b.state[name], tensor, rtol=0, atol=tolerance * max(scale, 1e-300), msg=name)


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 200), max_size=12),
    workers=st.integers(1, 4),
    seed=st.integers(0, 100),
    dtype=st.sampled_from([torch.float64, "mixed"]),
    class_scatter=st.booleans(),
)
def test_any_partition_into_batches_and_merged_states(cuts, workers, seed, dtype, class_scatter):
    options = {"dtype": dtype, "class_scatter": class_scatter}
    tolerance = 1e-6 if dtype == "mixed" else 1e-10
    order = torch.randperm(200, generator=generator(seed))
    states = [ClassMoments(5, 12, **options) for _ in range(workers)]
    for index, (start, end) in enumerate(zip([0, *sorted(cuts)], [*sorted(cuts), 200], strict=True)):
        batch = order[start:end]
        states[index % workers].update(FEATURES[batch], TARGETS[batch])
    merged = ClassMoments(5, 12, **options)
    for state in states:
        merged.merge(state)
    whole = moments_of(FEATURES, TARGETS, **options)
    assert_same_state(whole, merged, tolerance)
    weight = torch.randn(5, 12, generator=generator(4))
    assert collapse_metrics(merged, weight) == pytest.approx(collapse_metrics(whole, weight), rel=10 * tolerance)


def test_state_is_the_two_pass_result():
    moments = moments_of(FEATURES, TARGETS, class_scatter=True)
    features = FEATURES.double()
    means = torch.stack([features[k == TARGETS].mean(0) for k in range(5)])
    deviations = features - means[TARGETS]
    torch.testing.assert_close(moments.means, means)
    torch.testing.assert_close(moments.within_class_scatter, deviations.T @ deviations)
    torch.testing.assert_close(moments.class_scatter.sum(0), moments.within_class_scatter)
    torch.testing.assert_close(moments.within_class_trace.sum(), deviations.square().sum())
    assert moments.counts.tolist() == TARGETS.bincount().tolist()


def test_scatter_wider_than_a_strip_is_complete():
    features = torch.randn(50, 450, generator=generator()).double()
    targets = torch.arange(50) % 3
    moments = ClassMoments(3, 450)
    for batch, labels in zip(features.split(20), targets.split(20), strict=True):
        moments.update(batch, labels)
    deviations = features - torch.stack([features[targets == k].mean(0) for k in range(3)])[targets]
    torch.testing.assert_close(moments.within_class_scatter, deviations.T @ deviations)
    moments.update(features, targets)  # reading mirrors the scatter; going on must not count that twice
    torch.testing.assert_close(moments.within_class_scatter, 2 * deviations.T @ deviations)


@pytest.mark.parametrize("dtype", [torch.float64, "mixed"])
def test_low_precision_features_are_summed_in_the_state_s_precision(dtype):
    features = FEATURES.to(torch.bfloat16)
    expected, moments = moments_of(features.double(), TARGETS), moments_of(features, TARGETS, dtype=dtype)
    assert moments.rounding == torch.finfo(torch.bfloat16).eps > expected.rounding
    expected.rounding = moments.rounding
    assert_same_state(expected, moments, 1e-6)


def test_tokens_are_flattened_and_ignored_ones_left_out():
    targets = TARGETS.clone()
    targets[::3] = -100
    kept = targets >= 0
    expected = moments_of(FEATURES[kept], targets[kept])
    tokens = ClassMoments(5, 12)
    tokens.update(FEATURES.view(10, 20, 12), targets.view(10, 20), ignore_index=-100)
    assert_same_state(expected, tokens, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, "mixed"])
def test_accelerator_grouping_gives_the_same(monkeypatch, dtype):
    """Accelerators look at all classes, so as not to wait for the ones that are present."""
    expected = moments_of(FEATURES, TARGETS, num_classes=7)

    def all_classes(targets, num_classes):
        counts = torch.zeros(num_classes, dtype=torch.int64).index_add_(0, targets, torch.ones_like(targets))
        return moments_module.Group(torch.arange(num_classes), targets, counts)

    monkeypatch.setattr(moments_module, "group_by_class", all_classes)
    moments = ClassMoments(7, 12, dtype=dtype)
    for batch, labels in zip(FEATURES.split(9), TARGETS.split(9), strict=True):
        moments.update(batch, labels)
    assert_same_state(expected, moments, 1e-6 if dtype == "mixed" else 1e-12)


def test_state_saves_and_resumes(tmp_path):
    first = moments_of(FEATURES[:90], TARGETS[:90])
    torch.save(first.state, tmp_path / "moments.pt")
    resumed = ClassMoments.from_state(torch.load(tmp_path / "moments.pt", weights_only=True))
    resumed.update(FEATURES[90:], TARGETS[90:])
    assert_same_state(moments_of(FEATURES, TARGETS), resumed, 1e-12)


def test_reset_removes_all_samples():
    moments = moments_of(FEATURES, TARGETS, class_scatter=True)
    moments.reset()
    assert all(not tensor.any() for tensor in moments.state.values())
    moments.update(FEATURES, TARGETS)
    assert_same_state(moments_of(FEATURES, TARGETS, class_scatter=True), moments, 1e-12)


def test_gradients_are_not_kept():
    features = FEATURES.clone().requires_grad_()
    assert not moments_of(features, TARGETS).means.requires_grad


def test_per_class_scatter_states_its_memory_first(caplog):
    with caplog.at_level("INFO", logger="neuralcollapse"):
        moments = ClassMoments(10, 100, class_scatter=True)
    held = sum(tensor.numel() * tensor.element_size() for tensor in moments.state.values())
    assert held == ClassMoments.required_bytes(10, 100, class_scatter=True)
    assert f"{held / 1e9:.2f} GB" in caplog.text


@pytest.mark.parametrize(
    ("features", "targets", "message"),
    [
        (torch.zeros(3, 5), torch.zeros(3, dtype=torch.long), r"features must be of shape \(N, 12\), got \(3, 5\)"),
        (torch.zeros(12), torch.zeros((), dtype=torch.long), r"features must be of shape \(N, 12\), got \(12,\)"),
        (torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, dtype=torch.long), "features must be a floating-point"),
        (torch.zeros(3, 12), torch.zeros(4, dtype=torch.long), r"targets must be a tensor of shape \(3,\), got \(4,\)"),
        (torch.zeros(3, 12), [0, 1, 2], r"targets must be a tensor of shape \(3,\), got list"),
        ([[0.0] * 12], torch.zeros(1, dtype=torch.long), "features must be a floating-point tensor, got list"),
        (torch.zeros(3, 12), torch.zeros(3), "targets must be integer class indices, got torch.float32"),
        (torch.zeros(3, 12), torch.tensor([0, 5, 1]), r"targets must lie in \[0, 5\), got labels from 0 to 5"),
        (torch.zeros(3, 12), torch.tensor([0, -1, 1]), r"targets must lie in \[0, 5\), got labels from -1 to 1"),
        (torch.full((3, 12), torch.nan), torch.tensor([0, 1, 1]), "features of batch 1 must be finite"),
        (torch.full((3, 12), torch.inf), torch.tensor([0, 1, 1]), "features of batch 1 must be finite"),
    ],
)
def test_bad_batches_are_named_and_change_nothing(features, targets, message):
    moments = moments_of(FEATURES, TARGETS)
    before = {name: tensor.clone() for name, tensor in moments.state.items()}
    with pytest.raises(ValueError, match=message):
        moments.update(features, targets)
    assert all(torch.equal(tensor, before[name]) for name, tensor in moments.state.items())


def test_large_finite_features_are_not_taken_for_nan():
    moments_of(torch.full((20, 12), 1e38), torch.arange(20) % 5)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((1, 12), {}, "num_classes must be at least 2, got 1"),
        ((5, 0), {}, "feature_dim must be at least 1, got 0"),
        ((5, 12), {"dtype": torch.float16}, "dtype must be torch.float64, torch.float32 or 'mixed', got torch.float16"),
        (("5", 12), {}, "num_classes must be an integer, got '5'"),
        ((5, 12), {"device": "gpu"}, "device must name a torch device, got 'gpu'"),
    ],
)
def test_bad_sizes(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ClassMoments(*arguments, **options)


@pytest.mark.parametrize(("num_classes", "feature_dim"), [(4, 12), (5, 11)])
def test_moments_of_other_sizes_do_not_merge(num_classes, feature_dim):
    other = ClassMoments(num_classes, feature_dim)
    with pytest.raises(ValueError, match=rf"other must have K, d = \(5, 12\).*got \({num_classes}, {feature_dim}\)"):
        ClassMoments(5, 12).merge(other)
    with pytest.raises(ValueError, match="other must be ClassMoments, got dict"):
        ClassMoments(5, 12).merge({})
    with pytest.raises(ValueError, match="per-class scatter"):
        ClassMoments(5, 12, class_scatter=True).merge(ClassMoments(5, 12))


def test_incomplete_state_is_refused():
    with pytest.raises(ValueError, match="within_class_trace is missing"):
        ClassMoments.from_state({k: v for k, v in ClassMoments(5, 12).state.items() if k != "within_class_trace"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_samples": 0}, "every class must have a sample, got none of class 2, 6"),
        ({"min_samples": 1000}, "moments must hold at least 2 classes of min_samples = 1000 samples, got 0"),
        ({"drop_classes_above": 9}, "at least 2 classes of min_samples = 1 to drop_classes_above = 9 samples"),
        ({"min_samples": 9, "drop_classes_above": 8}, "drop_classes_above must be at least min_samples = 9, got 8"),
        ({"drop_classes_above": 8.5}, "drop_classes_above must be an integer, got 8.5"),
        ({"center": "mean"}, "center must be 'samples' or 'classes', got 'mean'"),
        ({"weight": torch.zeros(5, 12)}, r"weight must be of shape \(7, 12\), got \(5, 12\)"),
        ({"bias": torch.zeros(5)}, r"bias must be of shape \(7,\), got \(5,\)"),
        ({"ood_mean": torch.zeros(3)}, r"ood_mean must be of shape \(12,\), got \(3,\)"),
        ({"weight": torch.full((7, 12), torch.nan)}, "weight must be finite"),
    ],
)
def test_bad_arguments_of_collapse_metrics(options, message):
    targets = torch.tensor([0, 1, 3, 4, 5])[TARGETS]
    arguments = {name: options.pop(name) for name in ("weight", "bias", "ood_mean") if name in options}
    with pytest.raises(ValueError, match=message):
        collapse_metrics(moments_of(FEATURES, targets, num_classes=7), options=MeasureOptions(**options), **arguments)


def test_collapse_metrics_of_something_else_than_moments():
    with pytest.raises(ValueError, match="moments must be ClassMoments, got Tensor"):
        collapse_metrics(FEATURES)


def test_bounds_that_leave_one_class_are_refused():
    moments = moments_of(FEATURES[:7], torch.tensor([1, 1, 1, 1, 1, 3, 3]))
    with pytest.raises(ValueError, match=r"at least 2 classes .* got 1 of 2 classes \(and 7 samples in all\)"):
        collapse_metrics(moments, options=MeasureOptions(min_samples=3))
