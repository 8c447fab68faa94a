"""Saved measurements: everything can be read and recomputed without the model and the data, by later versions too."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load, save, save_file
from torch import nn

from helpers import generator
from neuralcollapse.catalogue import CORE, METRICS
from neuralcollapse.metrics import (
    ClassMoments,
    Measurement,
    MeasureOptions,
    Provenance,
    class_values,
    collapse_metrics,
    measure,
)
from neuralcollapse.metrics.measurement import FORMAT, KIND

K, D, N = 7, 9, 150
COUNTS = [40, 35, 30, 20, 14, 10, 1]
TARGETS = torch.repeat_interleave(torch.arange(K), torch.tensor(COUNTS))[torch.randperm(N, generator=generator(0))]
INPUTS = torch.randn(N, 6, generator=generator(1)) + torch.randn(K, 6, generator=generator(2))[TARGETS]
TENSORS = ["weight", "bias", "cos_margins", "ncc_mismatch", "sample_features", "sample_targets"]
OF_SAMPLES = {
    "accuracy",
    "accuracy_top5",
    "alignment",
    "nc2_cos_margin",
    "nc4_ncc_mismatch",
    "nc4_ncc_mismatch_class_mean",
    "nc1_numerical_rank",
    "instance_alignment",
    "class_alignment",
    "mir",
    "hdr",
}
SAVED_OPTIONS = ("center", "min_samples", "drop_classes_above", "pairwise")
RELATIVE = {"nc2_gram_means", "nc2_gram_weights", "nc3_gram_duality"}


def make_measurement(dtype=torch.float64, bias=True, **options) -> Measurement:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, D), nn.ReLU(), nn.Linear(D, K, bias=bias))
    batches = list(zip(INPUTS.split(40), TARGETS.split(40), strict=True))
    return measure(
        model.to(torch.float32),
        batches,
        layers=["1", "3"],
        ood=[torch.randn(20, 6, generator=generator(3))],
        options=MeasureOptions(**{"information": True, "dtype": dtype} | options),
        provenance=Provenance(epoch=5, split="train"),
        progress=False,
    )


@pytest.fixture(scope="module")
def measurement() -> Measurement:
    return make_measurement(class_scatter=True)


@pytest.fixture
def path(measurement, tmp_path):
    measurement.save(tmp_path / "epoch0005-train.safetensors")
    return tmp_path / "epoch0005-train.safetensors"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, "mixed"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_saved_measurement_is_loaded_unchanged(dtype, bias, tmp_path):
    measurement = make_measurement(dtype, bias)
    measurement.save(tmp_path / "it")
    loaded = Measurement.load(tmp_path / "it")
    for name in TENSORS:
        old, new = getattr(measurement, name), getattr(loaded, name)
        assert (old is None and new is None) or torch.equal(old.double(), new.double()), name
    for old, new in [
        (measurement.moments, loaded.moments),
        *((measurement.layer_moments[name], loaded.layer_moments[name]) for name in ("1", "3")),
    ]:
        assert all(torch.equal(tensor.double(), new.state[name].double()) for name, tensor in old.state.items())
        assert new.means.dtype == torch.float64
    for name in ("metrics", "layers", "provenance"):
        assert getattr(measurement, name) == getattr(loaded, name), name
    for name in SAVED_OPTIONS:
        assert getattr(measurement.options, name) == getattr(loaded.options, name), name
    assert list(loaded.metrics) == list(measurement.metrics)
    assert loaded.recompute().metrics == pytest.approx(measurement.metrics, rel=1e-12, abs=1e-300)
    for layer, values in loaded.recompute().layers.items():
        assert values == pytest.approx(measurement.layers[layer], rel=1e-12, abs=1e-300)
        assert "nc5_ood" in values


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"center": "classes"},
        {"min_samples": 2},
        {"drop_classes_above": 30},
        {"min_samples": 11, "drop_classes_above": 35, "center": "classes"},
        {"pairwise": False},
    ],
)
def test_recomputing_with_other_options_equals_measuring_with_them(path, options):
    recomputed, direct = Measurement.load(path).recompute(**options), make_measurement(class_scatter=True, **options)
    pooled = {"nc1_pinv", "nc1_vci", "rank_me"}  # of classes left out, whose scatter the file has pooled
    assert recomputed.undefined.keys() in (set(), pooled)
    for name in recomputed.metrics.keys() - OF_SAMPLES - recomputed.undefined.keys():
        assert recomputed.metrics[name] == pytest.approx(direct.metrics[name], rel=1e-12, abs=1e-14), name
    assert direct.metrics.keys() - recomputed.metrics.keys() <= OF_SAMPLES
    assert ("nc1_pinv" in recomputed.undefined) == ("drop_classes_above" in options)
    for name in OF_SAMPLES & recomputed.metrics.keys():
        assert recomputed.metrics[name] == pytest.approx(direct.metrics[name], rel=1e-12), name
    for name in SAVED_OPTIONS:
        assert getattr(recomputed.options, name) == getattr(direct.options, name), name


def test_the_code_is_saved_and_its_metrics_are_recomputed(tmp_path):
    code = torch.randn(K, 3, generator=generator(5))
    measurement = make_measurement(code=code)
    measurement.save(tmp_path / "it")
    loaded = Measurement.load(tmp_path / "it")
    assert torch.equal(loaded.options.code, code.double())
    assert measurement.metrics.keys() >= RELATIVE
    assert loaded.recompute().metrics == pytest.approx(measurement.metrics, rel=1e-12, abs=1e-300)
    assert loaded.layers["3"].keys() & RELATIVE == {"nc2_gram_means"}
    fewer = loaded.recompute(min_samples=11).metrics
    options = MeasureOptions(min_samples=11, code=code)
    expected = collapse_metrics(loaded.moments, loaded.weight, options=options)
    assert {name: fewer[name] for name in RELATIVE} == pytest.approx({name: expected[name] for name in RELATIVE})
    without = make_measurement()
    assert without.options.code is None
    assert not without.metrics.keys() & RELATIVE


def printed_values(text: str) -> dict[str, float]:
    """Name to value of the rows of a table of metrics."""
    rows = [line.split() for line in text.splitlines()[2:] if line.startswith("  ")]
    return {row[0]: float(row[1]) for row in rows}


def test_a_measurement_prints_its_core_metrics_and_all_of_them_if_asked(measurement):
    for text, names in (
        (repr(measurement), [name for name in METRICS if name in CORE and name in measurement.metrics]),
        (measurement.summary("all"), list(measurement.metrics)),
    ):
        assert text.splitlines()[0] == f"Measurement of Sequential, {N} samples, {measurement.num_classes} classes"
        assert list(printed_values(text)) == names
        expected = {name: measurement.metrics[name] for name in names}
        assert printed_values(text) == pytest.approx(expected, rel=1e-3)
    groups = [line for line in repr(measurement).splitlines()[2:] if not line.startswith(" ")]
    hidden = len(measurement.metrics) - len(printed_values(repr(measurement)))
    assert groups[:4] == ["NC1", "NC2", "NC3", "NC4"]
    assert f"{hidden} more: " in groups[-1]
    row = next(line for line in measurement.summary("all").splitlines() if "nc2_cos_margin" in line)
    k = measurement.num_classes
    assert float(row.split()[2]) == pytest.approx(k / (k - 1), rel=1e-3)
    with pytest.raises(ValueError, match="metrics must be"):
        measurement.summary("some")


def test_in_a_notebook_a_measurement_and_its_moments_are_tables(measurement):
    named = replace(measurement, provenance=Provenance(model="<b>mine</b>"))
    page = named._repr_html_()
    ElementTree.fromstring(f"<div>{page}</div>")  # well-formed
    assert "&lt;b&gt;mine&lt;/b&gt;" in page
    assert f"{measurement.metrics['nc1_pinv']:.4g}" in page
    texts = list(ElementTree.fromstring(measurement.moments._repr_html_()).itertext())
    assert texts[texts.index("samples") + 1] == str(N)


def test_recomputing_keeps_only_the_values_of_samples_that_are_still_true(measurement):
    kept = {
        "same": OF_SAMPLES,
        "center": OF_SAMPLES - {"alignment", "nc2_cos_margin"},
        "classes": {"accuracy", "accuracy_top5"},
    }
    pooled = replace(measurement, moments=ClassMoments.from_state(measurement.moments.state | {"class_scatter": None}))
    assert OF_SAMPLES & pooled.recompute().metrics.keys() == kept["same"]
    assert OF_SAMPLES & pooled.recompute(center="classes").metrics.keys() == kept["center"]
    assert OF_SAMPLES & pooled.recompute(min_samples=3).metrics.keys() == kept["classes"]
    assert pooled.recompute(min_samples=3).recompute(drop_classes_above=None).options.min_samples == 3


def test_values_of_classes_of_a_loaded_measurement(path, measurement):
    loaded = Measurement.load(path)
    for field in ("mean_norms", "weight_norms", "within_class_variances", "duality"):
        old, new = (getattr(class_values(m.moments, m.weight), field) for m in (measurement, loaded))
        assert torch.equal(old, new)


def test_provenance_is_saved(path, measurement):
    import neuralcollapse

    provenance = Measurement.load(path).provenance
    assert (provenance.epoch, provenance.split, provenance.model) == (5, "train", "Sequential")
    assert provenance.package_version == neuralcollapse.__version__
    assert provenance.labels == hashlib.sha256(TARGETS.numpy().tobytes()).hexdigest()
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    assert (header["format"], header["format_version"]) == (KIND, str(FORMAT))
    assert json.loads(header["provenance"])["split"] == "train"
    assert load(raw)["within_class_scatter"].shape == (D * (D + 1) // 2,)


def test_out_of_distribution_features_of_a_layer(measurement):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(6, 5), nn.Tanh())
    with torch.no_grad():
        ood = layer(torch.randn(20, 6, generator=generator(3))).double().mean(0)
        features = layer(INPUTS).double()
    means = [features[k == TARGETS].mean(0) for k in range(K)]
    expected = sum(float(abs(mean @ ood) / mean.norm() / ood.norm()) for mean in means) / K
    assert measurement.layers["1"]["nc5_ood"] == pytest.approx(expected)
    moments = ClassMoments(K, 5)
    moments.update(features, TARGETS)
    assert measurement.layers["1"] == pytest.approx(
        collapse_metrics(moments, ood_mean=ood) | {"nc1_numerical_rank": measurement.layers["1"]["nc1_numerical_rank"]},
        rel=1e-5,
    )


def test_the_sample_is_the_same_whenever_the_same_data_are_measured(monkeypatch):
    monkeypatch.setattr(import_module("neuralcollapse.metrics.gathering"), "SAMPLE_SIZE", 30)
    first, again = make_measurement(), make_measurement(cache_bytes=300)
    assert first.sample_features.shape == (30, D)
    assert first.sample_features.dtype == torch.float16
    assert torch.equal(first.sample_targets, again.sample_targets)
    assert torch.equal(first.sample_features, again.sample_features)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, D), nn.ReLU())
    with torch.no_grad():
        rows = torch.cat([model(INPUTS), TARGETS[:, None]], dim=1).half().tolist()
    assert all([*features, target] in rows for features, target in zip(
        first.sample_features.tolist(), first.sample_targets.tolist(), strict=True
    ))  # fmt: skip
    assert len(make_measurement(per_sample=False).sample_targets) == 0


def test_features_beyond_the_range_of_fp16_are_sampled_all_the_same():
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 2))
    features = 1e6 * torch.eye(3)
    sample = measure(model, [(features, torch.tensor([0, 1, 1]))], progress=False).sample_features
    torch.testing.assert_close(sample.float(), features, rtol=1e-2, atol=0)


def test_a_file_of_a_measurement_without_samples(tmp_path):
    measurement = make_measurement(per_sample=False, pairwise=False)
    measurement.save(tmp_path / "it")
    assert Measurement.load(tmp_path / "it").metrics == measurement.metrics


@pytest.mark.parametrize("share", [0, 0.001, 0.05, 0.3, 0.7, 0.999])
def test_a_truncated_file_is_refused(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"epoch0005-train.safetensors is truncated: it (ends|holds)"):
        Measurement.load(path)


@pytest.mark.parametrize("seed", range(8))
def test_a_file_with_sixteen_overwritten_bytes_is_refused(path, seed):
    content = bytearray(path.read_bytes())
    start = int(torch.randint(8, len(content) - 16, (), generator=generator(seed)))
    content[start : start + 16] = b"0123456789abcdef"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is (damaged|truncated|newer|not|a safetensors file, but not)"):
        Measurement.load(path)


def test_a_file_with_one_changed_digit_is_refused(path):
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"epoch\\": 5', b'"epoch\\": 6'))
    with pytest.raises(ValueError, match="is damaged: its content does not match its checksum"):
        Measurement.load(path)


@pytest.mark.parametrize(
    "content", [b"epoch,split\n1,train\n", b"PK\x03\x04" + bytes(100), bytes(50), b"\x04" + bytes(7) + b"{]}]"]
)
def test_a_file_that_is_not_a_safetensors_file_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a safetensors file"):
        Measurement.load(path)


def test_a_safetensors_file_of_another_kind_is_refused(path):
    save_file({"weight": torch.eye(3)}, path)
    with pytest.raises(ValueError, match="is a safetensors file, but not a neuralcollapse.measurement"):
        Measurement.load(path)


def test_a_file_of_a_newer_format_is_refused(path):
    path.write_bytes(save({"mystery": torch.eye(3)}, {"format": KIND, "format_version": "3", "package_version": "7.1"}))
    with pytest.raises(ValueError, match="has the newer format 3 .* written by neuralcollapse 7.1; .* up to 2"):
        Measurement.load(path)


def test_a_failed_write_leaves_the_existing_file_unchanged(path, measurement, monkeypatch):
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        measurement.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_reading_imports_no_heavy_package(path):
    code = f"""
import sys
from neuralcollapse.metrics import Measurement
print(Measurement.load({str(path)!r}).recompute().metrics["nc1_pinv"])
heavy = ("lightning", "datasets", "torchmetrics", "pandas", "matplotlib")
assert not any(name in sys.modules for name in heavy), [name for name in heavy if name in sys.modules]
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(Measurement.load(path).metrics["nc1_pinv"], rel=1e-12)


def test_a_file_of_format_1_stays_readable():
    """Written by version 0.1.0. A new format adds a file beside this one, and changes nothing here."""
    old = Measurement.load(Path(__file__).parent / "data" / "measurement-format1.safetensors")
    assert old.provenance.package_version == "0.1.0"
    assert (old.provenance.epoch, old.provenance.split, old.options.center) == (5, "train", "samples")
    assert old.moments.counts.tolist() == COUNTS
    assert old.metrics["nc1_pinv"] == pytest.approx(13.744062631049053, rel=1e-14)
    assert old.metrics["nc3_duality"] == pytest.approx(1.4461104064701655, rel=1e-14)
    again = old.recompute()
    known = {name: value for name, value in old.metrics.items() if not name.endswith("_released")}
    assert {name: again.metrics[name] for name in known} == pytest.approx(known, rel=1e-9)
    assert list(old.layers) == ["1", "3"]
    assert old.sample_features.shape == (N, D)


def test_a_file_of_format_2_stays_readable():
    """It has absent classes, an undefined metric of a layer, the rounding of features, and removed metrics."""
    old = Measurement.load(Path(__file__).parent / "data" / "measurement-format2.safetensors")
    assert old.absent_classes == [2]
    assert old.options.drop_classes_above == 40
    assert old.undefined.keys() == {"nc1_cdnv"} | {name for name in old.metrics if "log" in name or "riesz" in name}
    assert old.layers_undefined["0"].keys() >= {"nc1_pinv", "nc3_duality"} & old.layers["0"].keys()
    assert old.moments.rounding == 4 * torch.finfo(torch.float32).eps
    with pytest.warns(UserWarning, match="undefined metrics are NaN"):
        again = old.recompute()
    known = {name: value for name, value in old.metrics.items() if not name.endswith("_released")}
    assert again.metrics == pytest.approx(known, rel=1e-9, nan_ok=True)
    assert again.undefined == old.undefined
