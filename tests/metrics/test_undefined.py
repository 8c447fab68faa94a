"""Undefined metrics are NaN, with a reason and one warning; defined ones have their value at any scale."""

from __future__ import annotations

import inspect
import math
import warnings

import pytest
import torch
from torch import nn

import neuralcollapse.metrics as nm
from helpers import generator
from neuralcollapse.catalogue import METRICS
from neuralcollapse.metrics import (
    ClassMoments,
    Measurement,
    MeasureOptions,
    collapse_metrics,
    measure,
    undefined_metrics,
)

K, D = 4, 6
TARGETS = torch.arange(40) % K
WEIGHT = torch.randn(K, D, generator=generator(9))
NC1 = {"nc1_pinv", "nc1_quotient", "nc1_cdnv", "nc1_vci", "nc1_numerical_rank"}
OF_WEIGHT = {name for name in METRICS if name.endswith("_weights")} | {"nc0_weight_sum"}
RELATIVE = {"nc2_gram_means", "nc2_gram_weights", "nc3_gram_duality"}


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed))


def moments_of(features, targets=TARGETS, num_classes=K, **options) -> ClassMoments:
    moments = ClassMoments(num_classes, features.shape[-1], **{"class_scatter": True} | options)
    for batch, labels in zip(features.split(7), targets.split(7), strict=True):
        moments.update(batch, labels)
    return moments


def of(features, targets=TARGETS, weight=WEIGHT, num_classes=K, dtype=torch.float64, ood_mean=None, **options):
    """Return values and reasons, after checking that they agree and are in one warning."""
    options = MeasureOptions(**options)
    moments = moments_of(features, targets, num_classes, dtype=dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        values = collapse_metrics(moments, weight, ood_mean=ood_mean, options=options)
    undefined = undefined_metrics(moments, weight, ood_mean=ood_mean, options=options)
    assert {name for name, value in values.items() if math.isnan(value)} == undefined.keys()
    assert all(math.isfinite(value) for name, value in values.items() if name not in undefined)
    assert len(caught) == bool(undefined)
    for name, reason in undefined.items():
        assert name in str(caught[0].message)
        assert reason in str(caught[0].message)
    return values, undefined


CONSTANT = {
    "zero": torch.zeros(40, D),
    "one value": torch.full((40, D), 0.7),
    "one vector": normal(1, D).expand(40, D),
    "large": 3e20 * normal(1, D).expand(40, D),
    "fp16": normal(1, D).half().expand(40, D),
    "fp32, but for its last digit": normal(1, D).expand(40, D) * (1 + 1e-7 * (torch.arange(40) > 30))[:, None],
    "bf16, but for its last digit": normal(1, D).bfloat16().expand(40, D)
    + (normal(1, D).abs() * 2**-9 * (torch.arange(40) > 30)[:, None]).bfloat16(),
    "fp64, but for its last digits": normal(1, 40, D).double() * 1e-16 + normal(1, D),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, "mixed"])
@pytest.mark.parametrize("kind", CONSTANT)
def test_features_that_are_all_the_same(kind, dtype):
    if kind == "large" and dtype == torch.float32:
        pytest.skip("beyond the range of fp32 squares, which another test looks at")
    values, undefined = of(CONSTANT[kind], dtype=dtype)
    means = {name for name in values if name.startswith(("nc2", "nc3"))} - OF_WEIGHT
    assert undefined.keys() >= NC1 | means | {"effective_rank_means"}
    assert {undefined[name] for name in NC1 | means} == {
        "the features are the same for all samples, up to rounding: there is no between-class scatter"
    }
    assert undefined.keys().isdisjoint(OF_WEIGHT | {"nc4_bias", "feature_norm"})
    assert ("rank_me" in undefined) == (kind == "zero")


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_small_differences_are_not_taken_for_rounding(offset, spread):
    features = (offset + spread * normal(1, K, D)[TARGETS] + 0.1 * spread * normal(2, 40, D)).float()
    assert not of(features)[1]
    assert not of(features.double() + 1e6)[1]


@pytest.mark.parametrize("center", ["samples", "classes"])
def test_classes_of_the_same_mean(center):
    features = normal(1, 10, D).repeat(K, 1)
    values, undefined = of(features, torch.arange(K).repeat_interleave(10), center=center)
    assert {reason for name, reason in undefined.items()} == {
        "the class means are equal, up to rounding: there is no between-class scatter"
    }
    assert undefined.keys() >= NC1 - {"nc1_numerical_rank"} | {"nc2_equinorm_means", "nc3_uniform", "nc3_distance"}
    assert values["nc1_numerical_rank"] > 1
    assert values["rank_me"] > 1


def test_one_sample_per_class():
    values, undefined = of(normal(1, K, D), torch.arange(K))
    assert undefined == dict.fromkeys(
        [name for name in values if name in NC1],
        "no class has more than one sample, so there is no within-class variation",
    )
    one_of_two, undefined = of(normal(1, K + 1, D), torch.arange(K + 1) % K)
    assert not undefined
    assert one_of_two["nc1_quotient"] > 0


def test_samples_that_are_exactly_at_their_means_are_collapsed():
    """Several samples per class, of which none varies: Σ_W = 0 is measured, and every formula has its limit."""
    values, undefined = of(normal(1, K, D)[TARGETS])
    assert not undefined
    assert {name: values[name] for name in NC1} == pytest.approx(
        dict.fromkeys(NC1, 0.0) | {"nc1_numerical_rank": 1.0}, abs=1e-7
    )


def test_fewer_than_two_classes():
    values, undefined = of(normal(1, 9, D), torch.full((9,), 2))
    assert set(undefined.values()) == {"only class 2 has samples"}
    assert values.keys() - undefined.keys() == {"feature_norm", "rank_me"}
    values, undefined = of(normal(1, 0, D), torch.zeros(0, dtype=torch.long))
    assert undefined == dict.fromkeys(values, "no sample was measured")


def test_a_class_mean_at_the_centre_has_no_direction():
    means = torch.tensor([[-1.0, 0], [1, 0], [0, 0]])
    features = means[torch.arange(30) % 3] + 0.1 * normal(1, 10, 2).repeat_interleave(3, 0)
    values, undefined = of(features, torch.arange(30) % 3, weight=torch.eye(3)[:, :2], num_classes=3)
    angular = {
        name for name in values if name.startswith(("nc2_equiang", "nc2_max", "nc2_hyper")) and "weig" not in name
    }
    row = {"nc2_equiangular_weights", "nc2_max_angle_weights"}
    assert undefined.keys() == angular | {"nc3_uniform_cos"} | row
    assert (
        undefined["nc3_uniform_cos"] == "a class mean is at the centre, up to rounding, and has no direction (class 2)"
    )
    assert undefined["nc2_max_angle_weights"] == "a row of the weight is zero and has no direction (class 2)"


def test_two_classes_with_equal_means():
    means = normal(1, K, D)
    means[1] = means[0]
    _, undefined = of(means[TARGETS] + normal(2, 10, D).repeat_interleave(K, 0))
    singular = {f"nc2_hyperspherical_{kernel}_{of}" for kernel in ("log", "riesz") for of in ("mean", "variance")}
    assert undefined.keys() == singular | {"nc1_cdnv"}
    assert undefined["nc1_cdnv"] == "two classes have the same mean, up to rounding"


@pytest.mark.parametrize(
    ("weight", "names", "reason"),
    [
        (torch.zeros(K, D), OF_WEIGHT, "the weight is zero"),
        (
            torch.zeros(K, D),
            {"nc3_duality", "nc3_uniform", "nc3_distance", "nc2_equinorm_difference"},
            "the weight is z",
        ),
        (torch.ones(K, D), {"nc2_gram_weights", "nc3_gram_duality"}, "the rows of the weight are all equal"),
        (WEIGHT * (torch.arange(K) != 2)[:, None], {"nc3_uniform_cos", "nc2_max_angle_weights"}, "a row of the weight"),
    ],
)
def test_weights_without_a_direction(weight, names, reason):
    values, undefined = of(normal(1, K, D)[TARGETS] + normal(2, 40, D), weight=weight, code=torch.eye(K))
    assert undefined.keys() >= names & values.keys()
    assert all(undefined[name].startswith(reason) for name in names & values.keys())
    assert not undefined.keys() & NC1


def test_a_code_and_an_outside_mean_without_a_direction():
    features = normal(1, K, D)[TARGETS] + normal(2, 40, D)
    _, undefined = of(features, code=torch.ones(K, 2), ood_mean=torch.zeros(D))
    assert undefined.keys() == RELATIVE | {"nc5_ood"}
    _, undefined = of(features - features[TARGETS == 0].mean(0), ood_mean=torch.ones(D))
    assert undefined.keys() <= {"nc5_ood"}


def test_a_bias_without_a_weight_is_refused():
    with pytest.raises(ValueError, match="bias must come with the weight"):
        collapse_metrics(moments_of(normal(1, 40, D)), None, torch.zeros(K))


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float64, "mixed", torch.float32])
def test_features_of_any_scale_are_measured_or_reported_out_of_range(scale, features, dtype):
    """Powers of two next to the scale, so that features of every dtype are the same but for it."""
    scale = 2.0 ** round(math.log2(scale))
    rows = (normal(1, K, D)[TARGETS] + 0.3 * normal(2, 40, D)).to(features)
    expected, _ = of(rows, dtype=dtype)
    values, undefined = of((rows.double() * scale).to(features), dtype=dtype)
    with_units = {"nc3_uniform": scale**2, "nc4_bias": scale, "feature_norm": scale}
    for name, value in values.items():
        if name not in undefined:
            assert value == pytest.approx(expected[name] * with_units.get(name, 1), rel=1e-9), name
    squares = NC1 | {"rank_me", "feature_norm"}
    assert undefined.keys() == (squares if dtype == torch.float32 else set())
    assert all("float32" in reason for reason in undefined.values())


@pytest.mark.parametrize("scale", [1e-290, 1e-160, 1e155, 1e300])
@pytest.mark.parametrize("dtype", [torch.float64, "mixed"])
def test_features_whose_squares_leave_fp64(scale, dtype):
    rows = normal(1, K, D)[TARGETS].double() + 0.3 * normal(2, 40, D)
    values, undefined = of(rows * scale, dtype=dtype)
    assert undefined.keys() >= NC1 | {"rank_me", "feature_norm"}
    expected, _ = of(rows, dtype=dtype)
    for name in ("nc2_etf_means", "nc2_equiangular_means", "nc3_duality", "effective_rank_means"):
        assert values[name] == pytest.approx(expected[name], rel=1e-6), name


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_batches_of_several_scales_in_mixed_precision(scale):
    """The unit of a batch comes from its own features and from the means so far."""
    rows = normal(1, K, D)[TARGETS] + 0.3 * normal(2, 40, D)
    scales = scale * 10.0 ** (torch.arange(40) // 10 * 3 - 5)[:, None]
    expected, mixed = (moments_of((rows * scales).float(), dtype=dtype).state for dtype in (torch.float64, "mixed"))
    for name, tensor in expected.items():
        if name != "rounding":
            torch.testing.assert_close(mixed[name], tensor, rtol=0, atol=1e-6 * float(tensor.double().abs().max()))


POINT = {
    "vectors": torch.zeros(K, D),
    "weight": torch.zeros(K, D),
    "class_means": torch.zeros(K, D),
    "centred_means": torch.zeros(K, D),
    "code": torch.zeros(K, 2),
    "features": torch.zeros(40, D),
    "targets": TARGETS,
    "predictions": TARGETS,
    "center": torch.zeros(D),
    "ood_mean": torch.zeros(D),
    "bias": torch.zeros(K),
    "within_class_covariance": torch.zeros(D, D),
    "class_scatter": torch.zeros(K, D, D),
    "within_class_trace": torch.zeros(()),
    "within_class_variances": torch.zeros(K),
    "counts": torch.full((K,), 10),
}
DEFINED_OF_ZEROS = {"nc4_bias", "feature_norm", "nearest_class_mean"}


@pytest.mark.parametrize(
    "function",
    [name for name in nm.__all__ if name.startswith(("nc", "al", "in")) or "align" in name]
    + ["rank_me", "effective_rank", "cos_margins", "matrix_information"],
)
def test_functions_of_nothing_but_zeros(function):
    names = inspect.signature(getattr(nm, function)).parameters
    found = getattr(nm, function)(**{name: POINT[name] for name in names if name in POINT})
    for value in found if isinstance(found, tuple) else (found,):
        assert bool(value.isnan().all()) == (function not in DEFINED_OF_ZEROS)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_functions_of_directions_in_fp32_at_any_scale(scale):
    scale = 2.0 ** round(math.log2(scale))
    features, weight, center = normal(1, 40, D), normal(2, K, D), normal(3, D)
    for function in (nm.alignment, nm.nc2_cos_margin):
        torch.testing.assert_close(
            function(features * scale, TARGETS, weight / scale, center * scale),
            function(features, TARGETS, weight, center),
        )
    for function in (nm.instance_alignment, nm.class_alignment):
        torch.testing.assert_close(
            function(features * scale, TARGETS, weight / scale), function(features, TARGETS, weight)
        )
    for function in (
        nm.nc2_etf,
        nm.nc2_equinorm,
        nm.nc2_equiangular,
        nm.nc2_max_angle,
        nm.effective_rank,
        nm.nc0_weight_sum,
    ):
        torch.testing.assert_close(function(weight * scale), function(weight))
    means, other = weight - weight.mean(0), normal(4, K, D)
    for function in (nm.nc3_duality, nm.nc3_distance, nm.nc3_uniform_cos):
        torch.testing.assert_close(function(other / scale, means * scale), function(other, means))


def test_values_of_classes_and_pairs():
    means = normal(1, K, D)
    means[1] = means[0]
    moments = moments_of(means[TARGETS] + normal(2, 10, D).repeat_interleave(K, 0))
    weight = WEIGHT * (torch.arange(K) != 2)[:, None]
    assert nm.class_values(moments, weight).duality.isnan().tolist() == [False, False, True, False]
    matrices = nm.pair_matrices(moments, weight)
    for name in ("cdnv", "log", "riesz"):
        assert matrices[name].isnan().nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 2], [3, 3]]
    assert matrices["dist"][0, 1] == 0
    assert matrices["cosines_weights"][2].isnan().all()


def test_distances_of_rows_that_are_all_equal():
    means = normal(1, K, D)
    with pytest.warns(UserWarning, match="etf_weights, etf_between: the rows of a matrix are all equal"):
        distances = nm.etf_distances(torch.ones(K, D), means)
    assert [math.isnan(value) for value in distances.values()] == [True, False, True]


def network(bias: float | None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, D), nn.ReLU(), nn.Linear(D, K))
    if bias is not None:
        nn.init.zeros_(model[0].weight)
        nn.init.constant_(model[0].bias, bias)
    return model


def measured(model, targets=TARGETS, **options) -> Measurement:
    inputs = normal(4, len(targets), 5)
    batches = list(zip(inputs.split(16), targets.split(16), strict=True))
    options = MeasureOptions(information=True, **options)
    return measure(model, batches, layers=["0"], options=options, progress=False)


@pytest.mark.parametrize("bias", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float64, "mixed"])
def test_a_network_that_died_is_measured_and_read_again(bias, dtype, tmp_path):
    with pytest.warns(UserWarning, match="undefined metrics are NaN.*layer '0'") as caught:
        measurement = measured(network(bias), dtype=dtype)
    assert len([one for one in caught if "undefined metrics" in str(one.message)]) == 1
    assert caught[0].filename == __file__
    nan = {name for name, value in measurement.metrics.items() if math.isnan(value)}
    assert nan == measurement.undefined.keys()
    assert nan >= NC1 | {"nc2_cos_margin", "alignment", "nc4_ncc_mismatch", "nc4_ncc_mismatch_class_mean", "mir"}
    assert measurement.cos_margins.isnan().all()
    assert measurement.ncc_mismatch.isnan().all()
    assert measurement.metrics["accuracy"] == 0.25
    at_collapse = {name for name, value in measurement.metrics.items() if value == METRICS[name].value_at_collapse(K)}
    assert at_collapse <= {"nc4_bias"}
    assert measurement.layers_undefined["0"].keys() >= NC1 - {"nc1_numerical_rank"}
    printed = repr(measurement)
    assert "undefined:\n  nc1_pinv, " in printed
    assert "layer '0': nc1_pinv" in printed

    measurement.save(tmp_path / "it")
    loaded = Measurement.load(tmp_path / "it")
    assert loaded.undefined == measurement.undefined
    assert loaded.layers_undefined == measurement.layers_undefined
    assert loaded.metrics == pytest.approx(measurement.metrics, nan_ok=True)
    with pytest.warns(UserWarning, match="undefined metrics are NaN"):
        again = loaded.recompute()
    assert again.metrics == pytest.approx(measurement.metrics, nan_ok=True)
    assert again.undefined == measurement.undefined
    assert again.layers_undefined == measurement.layers_undefined


def test_absent_classes_are_reported(tmp_path):
    measurement = measured(network(None), TARGETS % 2)
    assert measurement.num_classes == K
    assert measurement.absent_classes == [2, 3]
    assert "of 4 classes 2 have samples; absent: 2, 3" in repr(measurement)
    measurement.save(tmp_path / "it")
    assert Measurement.load(tmp_path / "it").absent_classes == [2, 3]
    assert "absent" not in repr(measured(network(None)))


def test_one_class_and_no_class_in_a_loader():
    with pytest.warns(UserWarning, match="only class 0 has samples"):
        measurement = measured(network(None), TARGETS * 0)
    assert measurement.metrics.keys() - measurement.undefined.keys() == {"accuracy", "feature_norm", "rank_me"}
    with pytest.warns(UserWarning, match="no sample was measured"):
        measurement = measured(network(None), TARGETS * 0 - 1, ignore_index=-1)
    assert measurement.metrics.keys() == measurement.undefined.keys()


def test_single_samples_without_a_direction():
    features = normal(1, K, D)[TARGETS] + 0.3 * normal(2, 40, D)
    features[0] = 0
    model = nn.Sequential(nn.Identity(), nn.Linear(D, K))
    batches = [(features, TARGETS)]
    with pytest.warns(UserWarning, match="1 features are zero"):
        measurement = measure(model, batches, options=MeasureOptions(information=True), progress=False)
    assert measurement.undefined.keys() == {
        "instance_alignment", "class_alignment", "mir", "hdr"
    }  # fmt: skip
    half = normal(3, 20, D).round()
    features = torch.cat([1 + half, 1 - half, torch.ones(1, D)])  # about 1, which is exact
    targets = torch.cat([torch.arange(20) % 2, torch.arange(20) % 2 + 2, torch.zeros(1, dtype=torch.long)])
    with pytest.warns(UserWarning, match="alignment: 1 features are at the centre"):
        measurement = measure(model, [(features, targets)], progress=False)
    assert measurement.undefined.keys() == {"alignment", "nc2_cos_margin"}
    assert measurement.cos_margins.isnan().tolist() == 40 * [False] + [True]


def test_classes_without_samples_in_the_train_split_are_reported():
    model, inputs = network(None), normal(4, 40, 5)
    train = measure(model, [(inputs, TARGETS % 3)], progress=False).moments
    with pytest.warns(UserWarning, match=r"10 samples of classes that the train split lacks \(3\) are left out"):
        measurement = measure(model, [(inputs, TARGETS)], train=train, progress=False)
    assert len(measurement.cos_margins) == 30


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16])
def test_labels_of_any_integer_dtype(dtype):
    model, inputs = network(None), normal(4, 40, 5)
    expected = measure(model, [(inputs, TARGETS)], progress=False)
    found = measure(model, [(inputs, TARGETS.to(dtype))], progress=False)
    assert found.metrics == expected.metrics
    assert found.provenance.labels == expected.provenance.labels
    features, weight, labels = model[:-1](inputs).detach(), model[-1].weight.detach(), TARGETS.to(dtype)
    for function in (nm.alignment, nm.cos_margins):
        assert torch.equal(
            function(features, labels, weight, features[0] + 1), function(features, TARGETS, weight, features[0] + 1)
        )
    for function in (nm.instance_alignment, nm.class_alignment):
        assert torch.equal(function(features, labels, weight), function(features, TARGETS, weight))


def test_an_ignored_label_is_not_taken_for_another_of_uint8():
    """As uint8, −100 is 156."""
    features, labels = normal(1, 6, D), torch.tensor([156, 156, 3, 3, 4, 4], dtype=torch.uint8)
    moments = ClassMoments(200, D)
    moments.update(features, labels, ignore_index=-100)
    assert int(moments.counts[156]) == 2


@pytest.mark.parametrize("elements", [2**25, 40, 3])
@pytest.mark.parametrize("feature_dim", [3, 12, 70])
def test_numerical_rank_without_the_scatter_of_each_class(feature_dim, elements, monkeypatch):
    """From features of single classes, gathered in groups or in pieces, against singular values."""
    from neuralcollapse.metrics import samples

    monkeypatch.setattr(samples, "_GATHERED_ELEMENTS", elements * feature_dim)
    features, targets = normal(1, 60, feature_dim), torch.cat([torch.arange(30) % 3, torch.full((30,), 4)])
    order = torch.randperm(60, generator=generator(2))
    features, targets = features[order], targets[order]
    model = nn.Sequential(nn.Identity(), nn.Linear(feature_dim, 5))
    batches = list(zip(features.split(13), targets.split(13), strict=True))
    options = MeasureOptions(cache_bytes=13 * feature_dim * 4)
    measurement = measure(model, batches, options=options, progress=False)
    groups = [features[targets == k].double() for k in (0, 1, 2, 4)]
    ranks = [(torch.linalg.svdvals(group).sum() / group.norm()).square() for group in groups]
    assert measurement.metrics["nc1_numerical_rank"] == pytest.approx(float(torch.stack(ranks).mean()), rel=1e-10)
    assert (
        "nc1_numerical_rank"
        not in measure(model, batches, options=MeasureOptions(per_sample=False), progress=False).metrics
    )
