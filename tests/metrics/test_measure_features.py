"""`measure_features` on arrays in memory and in files, against `measure` and dense fp64 formulas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from helpers import normal
from metrics.brute_force import dense_metrics, dense_sample_metrics, dense_sphere_metrics
from neuralcollapse import lab
from neuralcollapse.metrics import Measurement, MeasureOptions, measure, measure_features
from neuralcollapse.metrics import features as module
from neuralcollapse.metrics.arrays import open_rows
from neuralcollapse.metrics.samples import FeatureCache

K, D, N = 7, 12, 150


@pytest.fixture
def blocks_of_40_rows(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 40 * D)


@pytest.fixture
def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    targets = torch.arange(N) % K
    features = 2 * normal(K, D, seed=1)[targets] + normal(N, D, seed=2) + normal(D, seed=3)
    return features.float(), targets, normal(K, D, seed=4).float(), normal(K, seed=5).float()


def measured(*arrays, **options) -> Measurement:
    return measure_features(*arrays, progress=False, **options)


def test_all_metrics_of_features_are_those_of_dense_formulas(data, blocks_of_40_rows):
    features, targets, weight, bias = data
    ood = normal(30, D, seed=6).float()
    options = MeasureOptions(information=True, class_scatter=True)
    measurement = measured(*data, ood=ood, options=options)
    means = torch.stack([features.double()[targets == k].mean(0) for k in range(K)])
    expected = dense_metrics(features, targets, K, weight, bias, "samples", ood.double().mean(0))
    expected |= dense_sample_metrics(features, targets, weight, bias, means, features.double().mean(0))
    expected |= dense_sphere_metrics(features, targets, weight)
    ranks = (features @ weight.T + bias).argsort(1, descending=True)
    expected["accuracy"] = float((ranks[:, 0] == targets).double().mean())
    expected["accuracy_top5"] = float((ranks[:, :5] == targets[:, None]).any(1).double().mean())
    of_class = [float(measurement.ncc_mismatch[k]) for k in range(K)]
    expected["nc4_ncc_mismatch_class_mean"] = float(np.mean(of_class))
    assert measurement.metrics == pytest.approx(expected, rel=1e-8, abs=1e-12)


def test_the_record_is_that_of_a_model_with_these_features(data, blocks_of_40_rows):
    features, targets, weight, bias = data
    model = nn.Linear(D, K)
    with torch.no_grad():
        model.weight.copy_(weight)
        model.bias.copy_(bias)
    train = measured(features[:90], targets[:90], weight, bias)
    loader = list(zip(features[90:].split(25), targets[90:].split(25), strict=True))
    expected = measure(model, loader, train=train.moments, progress=False)
    measurement = measured(features[90:], targets[90:], weight, bias, train=train.moments)
    assert measurement.metrics == pytest.approx(expected.metrics, rel=1e-9, abs=1e-13)
    assert measurement.provenance.labels == expected.provenance.labels
    assert measurement.mean_max_logit == pytest.approx(expected.mean_max_logit, rel=1e-6)
    for name in ("cos_margins", "ncc_mismatch", "residual_norms", "sample_features", "sample_targets", "weight"):
        torch.testing.assert_close(getattr(measurement, name), getattr(expected, name), rtol=1e-6, atol=1e-9)


def write(kind: str, folder: Path, features: np.ndarray, targets: np.ndarray) -> tuple[str | Path, str | Path]:
    """Write features and labels to files of a kind, and return their sources."""
    if kind in ("npy", "fortran"):
        np.save(folder / "x.npy", np.asfortranarray(features) if kind == "fortran" else features)
        np.save(folder / "y.npy", targets)
        return folder / "x.npy", str(folder / "y.npy")
    path = folder / f"data.{'npz' if 'npz' in kind else kind.split('-')[0]}"
    if "npz" in kind:
        (np.savez_compressed if kind == "npz-compressed" else np.savez)(path, x=features, labels=targets)
    elif kind == "safetensors":
        save_file({"x": torch.from_numpy(features), "labels": torch.from_numpy(targets)}, path)
    elif kind == "parquet-lists":
        lists = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), D)
        pq.write_table(pa.table({"x": lists, "labels": targets}), path, row_group_size=33)
    else:
        columns = {f"x{i}": features[:, i] for i in range(D)}
        pq.write_table(pa.table({**columns, "labels": targets}), path, row_group_size=33)
        return f"{path}:x*", f"{path}:labels"
    return f"{path}:x", f"{path}:labels"


KINDS = ["npy", "fortran", "npz", "npz-compressed", "safetensors", "parquet-lists", "parquet-columns"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_files_give_what_the_same_tensors_give(data, blocks_of_40_rows, tmp_path, kind, dtype):
    features, targets, weight, bias = data
    features = features.numpy().astype(dtype)
    expected = measured(torch.from_numpy(features), targets, weight, bias)
    sources = write(kind, tmp_path, features, targets.numpy().astype(np.uint16 if kind == "npy" else np.int32))
    np.save(tmp_path / "w.npy", weight.numpy())
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for options in (MeasureOptions(), MeasureOptions(cache_bytes=0)):
        measurement = measured(*sources, tmp_path / "w.npy", bias.numpy(), options=options)
        assert measurement.metrics == pytest.approx(expected.metrics, rel=1e-12, abs=1e-15)
        assert measurement.provenance.labels == expected.provenance.labels
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_bf16_and_big_endian_and_reversed_arrays(data, tmp_path):
    features, targets, weight, bias = data
    save_file({"x": features.bfloat16()}, tmp_path / "x.safetensors")
    expected = measured(features.bfloat16(), targets, weight, bias).metrics
    assert measured(tmp_path / "x.safetensors", targets, weight, bias).metrics == expected
    expected = measured(features, targets, weight, bias).metrics
    swapped, backwards = features.numpy().astype(">f4"), features.numpy()[::-1].copy()[::-1]
    assert measured(swapped, targets, weight, bias).metrics == expected
    assert measured(backwards, targets, weight, bias).metrics == expected


def test_without_a_classifier(data, tmp_path):
    features, targets = data[:2]
    alone, whole = measured(features, targets), measured(*data)
    shared = alone.metrics.keys()
    assert "nc1_numerical_rank" in shared
    assert "nc1_pinv" in shared
    assert "accuracy" not in shared
    assert "nc3_duality" not in shared
    assert alone.metrics == {name: whole.metrics[name] for name in shared}
    assert alone.num_classes == K
    alone.save(tmp_path / "alone.safetensors")
    loaded = Measurement.load(tmp_path / "alone.safetensors")
    assert loaded.metrics == alone.metrics
    assert loaded.weight.shape == (0, D)
    centred = loaded.recompute(center="classes").metrics
    assert centred["nc2_etf_means"] == pytest.approx(whole.recompute(center="classes").metrics["nc2_etf_means"])
    folder = lab.RunFolder.create(tmp_path / "run", name="alone")
    with pytest.raises(ValueError, match="must have the weight of the classifier"):
        folder.record(1, "train", alone)
    folder.record(1, "train", whole)


def test_features_of_tokens_and_of_pixels(data):
    features, targets, weight, bias = data
    expected = measured(*data).metrics
    tokens = features.reshape(N // 5, 5, D)
    assert measured(tokens, targets.reshape(N // 5, 5), weight, bias).metrics == pytest.approx(expected, rel=1e-9)
    pixels = features.reshape(5, 6, 5, D).movedim(-1, 1)
    of_pixels = targets.reshape(5, 6, 5)
    assert measured(pixels, of_pixels, weight, bias).metrics == pytest.approx(expected, rel=1e-9)
    void = torch.where(torch.arange(N).reshape(5, 6, 5) % 4 == 0, 255, of_pixels)
    kept = torch.arange(N) % 4 != 0
    ignoring = measured(pixels, void.to(torch.uint8), weight, bias, options=MeasureOptions(ignore_index=255))
    expected = measured(features[kept], targets[kept], weight, bias).metrics
    assert ignoring.metrics == pytest.approx(expected, rel=1e-9)


def test_features_in_memory_and_memory_mapped_are_not_copied(data, blocks_of_40_rows, tmp_path, monkeypatch):
    features, targets, weight, bias = data
    np.save(tmp_path / "x.npy", features)
    save_file({"x": features}, tmp_path / "x.safetensors")
    cached: list[Tensor] = []

    def append(cache, batch, *labels):
        cached.append(batch)
        original(cache, batch, *labels)

    original = FeatureCache.append
    monkeypatch.setattr(FeatureCache, "append", append)
    monkeypatch.setattr(FeatureCache, "_to_disk", None)  # where a copy would go
    for source in (features, features.numpy(), tmp_path / "x.npy", tmp_path / "x.safetensors"):
        cached.clear()
        measured(source, targets, weight, bias, options=MeasureOptions(cache_bytes=0))
        starts = torch.tensor([0, *(block.nbytes for block in cached)]).cumsum(0)[:-1]
        assert [block.data_ptr() - cached[0].data_ptr() for block in cached] == starts.tolist()
        assert len(cached) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": torch.arange(6).reshape(3, 2)}, "features must be"),
        ({"features": torch.ones(N, D, 1, 1, 1)}, r"features must be of shape \(N, d\)"),
        ({"features": torch.full((N, D), torch.nan)}, "features of batch 0"),
        ({"labels": torch.arange(N - 1)}, r"labels must be of shape \(150,\)"),
        ({"labels": torch.ones(N)}, "labels must be integer"),
        ({"labels": torch.full((N,), K)}, "targets"),
        ({"weight": torch.ones(K, D + 1)}, r"weight must be of shape \(K, 12\)"),
        ({"bias": torch.ones(K + 1)}, r"bias must be of shape \(7,\)"),
        ({"weight": None}, "bias must come with the weight"),
        ({"num_classes": 3}, "num_classes must be the number of rows of weight, 7"),
        ({"train": torch.ones(2)}, "train must be the moments"),
        ({"ood": torch.ones(3, D + 1)}, "ood must be features with 12"),
        ({"features": [[1.0]]}, "features must be a tensor, an array or the path"),
        ({"features": np.array(["a"])}, "features must be an array of numbers"),
        ({"features": "x.csv"}, "features must be a file of"),
    ],
)
def test_bad_arguments(data, changes, message):
    arguments = dict(zip(("features", "labels", "weight", "bias"), data, strict=True)) | changes
    with pytest.raises(ValueError, match=message):
        measured(**arguments)


def test_bad_files(data, tmp_path):
    features, targets, *_ = data
    with pytest.raises(FileNotFoundError, match="missing.npy"):
        measured(tmp_path / "missing.npy", targets)
    for suffix in ("npy", "npz", "safetensors", "parquet"):
        (tmp_path / f"x.{suffix}").write_bytes(b"not an array, but a text that is long enough to be read")
        with pytest.raises(ValueError, match=f"x.{suffix} is not a"):
            measured(tmp_path / f"x.{suffix}", targets)
    np.savez(tmp_path / "x.npz", a=features, b=features)
    for name in ("", ":c"):
        with pytest.raises(ValueError, match=r"features must name one of a, b"):
            measured(f"{tmp_path / 'x.npz'}{name}", targets)
    save_file({"x": features}, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(content[:-8])
    with pytest.raises(ValueError, match="truncated"):
        measured(tmp_path / "x.safetensors", targets)
    pq.write_table(pa.table({"x": [[1.0, 2.0], [3.0]], "name": ["a", "b"], "y": [1.0, None]}), tmp_path / "x.parquet")
    for name, message in (("x", "lists of equal length"), ("name", "columns of numbers"), ("y", "missing values")):
        with pytest.raises(ValueError, match=message):
            open_rows("features", f"{tmp_path / 'x.parquet'}:{name}").whole()
    np.save(tmp_path / "x.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="x.npy is not a file of numbers"):
        measured(tmp_path / "x.npy", targets)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="shows mapped files on Linux only")
def test_features_in_a_file_are_mapped_only_while_they_are_used(tmp_path):
    def mapped():
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    features = normal(3, 2000, 8)
    targets = torch.arange(2000) % 4
    with FeatureCache(max_bytes=0, folder=str(tmp_path)) as cache:
        for batch in features:
            cache.append(batch, targets, targets)
        assert mapped() == 0
        for batch, original in zip(cache, features, strict=True):
            assert mapped() <= 2  # this batch, and the one before until it is replaced
            assert torch.equal(batch.features, original)
        del batch
        assert mapped() == 0
        rows = torch.tensor([0, 1999, 2000, 5999])
        assert torch.equal(cache.take(rows, features.device), features.flatten(0, 1)[rows])
        assert mapped() == 0
