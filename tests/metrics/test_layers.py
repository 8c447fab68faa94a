"""Blocks of a model, probes of its layers, and their profile: against dense numpy and models written out by hand."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch import nn
from torch.nn import functional

from helpers import generator, normal
from neuralcollapse import ClassMoments, Measurement, MeasureOptions, measure
from neuralcollapse.geometry import random_simplex_etf, softmax_code
from neuralcollapse.metrics import effective_depth, nc2_etf, nc2_one_vs_rest
from neuralcollapse.metrics.measure import measure_splits

K, N = 4, 80
TARGETS = torch.arange(N) % K
pytestmark = pytest.mark.filterwarnings("ignore:.*features are zero and have no direction")
IMAGES = normal(N, 3, 8, 8, dtype=torch.float32) + normal(K, 3, 1, 1, seed=1, dtype=torch.float32)[TARGETS]
TEST = IMAGES + normal(N, 3, 8, 8, seed=2, dtype=torch.float32)


def loader(images: torch.Tensor = IMAGES, targets: torch.Tensor = TARGETS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(images.split(30), targets.split(30), strict=True))


class Residual(nn.Module):
    """A residual block whose inner layers are in a container."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.relu(images + self.inner(images))


class ResNet(nn.Module):
    """With the names of torchvision's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
        self.layer1 = nn.Sequential(Residual(6), Residual(6))
        self.layer2 = nn.Sequential(Residual(6), Residual(6))
        self.unused = nn.Linear(6, 6)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(6, K)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.layer2(self.layer1(self.relu(self.bn1(self.conv1(images)))))
        return self.fc(self.avgpool(hidden).flatten(1))


class Encoder(nn.Module):
    """Tokens through an encoder, whose layers torch keeps in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(24, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(8, K)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embed(images.flatten(2).unflatten(2, (8, 8)).flatten(1, 2)))[:, 0])


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(192, 12), nn.ReLU(), nn.Linear(12, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Dropout())
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, K))


def profiled(model: nn.Module, **options) -> Measurement:
    return measure(model, loader(), layers="blocks", probes=True, progress=False, **options)


class Wrapped(nn.Module):
    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(images))


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (mlp(), ["2", "6"]),
        (ResNet(), ["relu", "layer1.0", "layer1.1", "layer2.0"]),
        (Wrapped(mlp()[:-1], nn.Linear(7, K)), ["backbone.2", "backbone.6"]),
        (nn.Sequential(ResNet(), nn.Identity()), ["0.relu", "0.layer1.0", "0.layer1.1", "0.layer2.0"]),
    ],
    ids=["mlp", "resnet", "wrapped", "nested"],
)
def test_blocks_are_those_that_a_reader_would_name(model, names):
    assert list(profiled(model).layers) == names
    assert not any(module._forward_hooks for module in model.modules())


def test_blocks_of_an_encoder_are_its_layers():
    class Pooled(Encoder):
        def forward(self, images):
            return super().forward(images[:, :3])

    model = Pooled()
    model.embed = nn.Linear(8, 8)
    assert list(profiled(model).layers) == ["embed", "encoder.layers.0", "encoder.layers.1", "encoder.layers.2"]


def test_a_module_that_is_called_twice_is_no_end_of_a_block():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.relu, self.second, self.last = (
                nn.Linear(192, 9),
                nn.ReLU(),
                nn.Linear(9, 9),
                nn.Linear(9, K),
            )

        def forward(self, images):
            return self.last(self.relu(self.second(self.relu(self.first(images.flatten(1))))))

    assert list(profiled(Shared()).layers) == ["first", "second"]


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="layers='blocks' found no block besides the classifier"):
        profiled(nn.Sequential(nn.Flatten(), nn.Linear(192, K)))


def test_blocks_are_measured_as_their_names_are():
    model = ResNet()
    blocks = profiled(model)
    named = measure(model, loader(), layers=list(blocks.layers), probes=True, progress=False)
    assert blocks.layers == named.layers
    assert blocks.metrics == named.metrics


def outputs_of(model: nn.Sequential, images: torch.Tensor) -> list[np.ndarray]:
    """Outputs of the blocks "2" and "6" of the mlp, and its features, by hand."""
    model.eval()
    with torch.no_grad():
        return [model[:end](images).double().numpy() for end in (3, 7, 9)]


def dense_errors(train: np.ndarray, test: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Errors of nearest class mean and of least squares, of a test split with the targets of the train split."""
    means = np.stack([train[TARGETS.numpy() == k].mean(axis=0) for k in range(K)])
    nearest = np.linalg.norm(test[:, None] - means, axis=2).argmin(axis=1)
    ones, one_hot = np.ones((len(train), 1)), np.eye(K)[TARGETS.numpy()]
    solution = np.linalg.lstsq(np.hstack([train, ones]), one_hot, rcond=None)[0]
    linear = (np.hstack([test, np.ones((len(test), 1))]) @ solution).argmax(axis=1)
    return float((nearest != labels).mean()), float((linear != labels).mean())


@pytest.mark.parametrize("train", ["loader", "measurement"])
def test_errors_are_those_of_dense_probes(train):
    model = mlp()
    on_train = profiled(model)
    given = loader() if train == "loader" else on_train
    on_test = measure(model, loader(TEST), train=given, layers="blocks", probes=True, progress=False)
    outputs = zip(outputs_of(model, IMAGES), outputs_of(model, TEST), strict=True)
    profile = on_train.profile(on_test)
    assert profile.layers == ("2", "6", "features")
    assert profile.dimensions == (12, 10, 7)
    for index, (of_train, of_test) in enumerate(outputs):
        for values, features in ((profile.metrics, of_train), (profile.test_metrics, of_test)):
            ncc, probe = dense_errors(of_train, features, TARGETS.numpy())
            assert values["ncc_error"][index] == pytest.approx(ncc, abs=1e-12)
            assert values["probe_error"][index] == pytest.approx(probe, abs=1e-12)
        mean = of_train.mean(axis=0)
        means = np.stack([of_train[TARGETS.numpy() == k].mean(axis=0) for k in range(K)])
        within = ((of_train - means[TARGETS.numpy()]) ** 2).sum() / N
        assert profile.metrics["nc1_quotient"][index] == pytest.approx(within / ((means - mean) ** 2).sum() * K)
    assert on_test.metrics["ncc_error"] == profile.test_metrics["ncc_error"][2]


def test_features_on_disk_give_the_same():
    model = mlp()
    assert profiled(model, options=MeasureOptions(cache_bytes=0)).layers == profiled(model).layers
    without = profiled(model, options=MeasureOptions(per_sample=False))
    assert without.metrics["probe_error"] == profiled(model).metrics["probe_error"]
    assert "nc4_ncc_mismatch" not in without.metrics


def test_ignored_samples_and_rare_classes_are_left_out():
    model, targets = mlp(), TARGETS.clone()
    targets[::3] = -100
    kept = targets != -100
    options = MeasureOptions(ignore_index=-100)
    ignored = measure(model, loader(IMAGES, targets), layers=["2"], probes=True, options=options, progress=False)
    alone = measure(model, loader(IMAGES[kept], targets[kept]), layers=["2"], probes=True, progress=False)
    assert ignored.layers["2"]["ncc_error"] == alone.layers["2"]["ncc_error"]
    assert ignored.metrics["probe_error"] == alone.metrics["probe_error"]


def test_splits_are_measured_with_the_probes_of_the_train_split():
    model = mlp()
    splits = measure_splits(
        model, {"test": loader(TEST), "train": loader()}, layers="blocks", probes=True, progress=False
    )
    test = measure(model, loader(TEST), train=loader(), layers="blocks", probes=True, progress=False)
    assert splits["test"].layers == test.layers
    assert splits["test"].metrics["probe_error"] == test.metrics["probe_error"]


def test_errors_of_equal_features_are_undefined_or_those_of_chance():
    model = mlp()
    nn.init.zeros_(model[1].weight)
    with pytest.warns(UserWarning, match="layer '2'.*ncc_error"):
        measured = profiled(model)
    assert math.isnan(measured.layers["2"]["ncc_error"])
    assert measured.layers["2"]["probe_error"] == pytest.approx(1 - 1 / K)
    assert measured.metrics["effective_depth"] == 3


def test_a_profile_is_kept_by_the_record(tmp_path):
    measured = profiled(mlp())
    measured.save(tmp_path / "one.safetensors")
    for other in (Measurement.load(tmp_path / "one.safetensors"), measured.recompute(center="classes")):
        assert other.profile().metrics["ncc_error"] == measured.profile().metrics["ncc_error"]
        assert other.metrics["effective_depth"] == measured.metrics["effective_depth"]


def test_effective_depth_is_the_first_layer_that_separates():
    assert effective_depth([0.5, 0.0101, 0.01, 0.2]) == 3
    assert effective_depth([0.5, math.nan, 0.0], epsilon=0) == 3
    assert effective_depth([0.5, 0.4]) == 2
    measured = profiled(mlp())
    errors = [values["ncc_error"] for values in measured.layers.values()] + [measured.metrics["ncc_error"]]
    for epsilon in (0.0, 0.05, 0.3, 1.0):
        below = [number for number, error in enumerate(errors, 1) if error <= epsilon]
        assert measured.profile().effective_depth(epsilon) == (below[0] if below else 3)
    assert measured.metrics["effective_depth"] == measured.profile().effective_depth()
    with pytest.raises(ValueError, match="at least one value, got none"):
        effective_depth([])
    for wrong in (-0.1, 1.5):
        with pytest.raises(ValueError, match="epsilon must be"):
            effective_depth([0.1], wrong)


def hull_distance(code: np.ndarray, index: int) -> float:
    """Distance of a row from the convex hull of the others, by non-negative least squares with a heavy sum row."""
    others, heavy = np.delete(code, index, axis=0).T, 1e5
    matrix = np.vstack([others, heavy * np.ones(others.shape[1])])
    return float(np.linalg.norm(others @ nnls(matrix, np.append(code[index], heavy))[0] - code[index]))


def test_generalised_nc2_is_the_distance_from_the_hull_of_the_others():
    rows = normal(7, 3)
    code = functional.normalize(rows, dim=1).numpy()
    best = softmax_code(7, 3, dtype=torch.float64).numpy()
    expected = min(hull_distance(code, k) for k in range(7)) / min(hull_distance(best, k) for k in range(7))
    assert float(nc2_one_vs_rest(5 * rows)) == pytest.approx(expected, rel=1e-4)
    assert float(nc2_one_vs_rest(softmax_code(7, 3))) == pytest.approx(1, abs=1e-5)
    etf = random_simplex_etf(4, 5, generator=generator(), dtype=torch.float64)
    assert float(nc2_etf(etf)) < 1e-7
    assert float(nc2_one_vs_rest(etf)) == pytest.approx(1, abs=1e-6)
    assert nc2_one_vs_rest(torch.zeros(4, 2)).isnan()


def test_the_profile_of_more_classes_than_dimensions_has_generalised_nc2():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, 2), nn.Tanh(), nn.Linear(2, K))
    measured = profiled(model)
    values = measured.profile().metrics["nc2_one_vs_rest"]
    assert math.isnan(values[0])
    assert values[1] == pytest.approx(float(nc2_one_vs_rest(measured.moments.means)), abs=1e-9)
    assert "nc2_one_vs_rest" not in profiled(mlp()).profile().metrics


def test_a_profile_shows_itself():
    profile = profiled(mlp()).profile()
    lines = repr(profile).splitlines()
    assert lines[0] == f"3 layers, effective depth {profile.effective_depth()} (ε = 0.01)"
    assert lines[2].split()[:3] == ["1", "2", "12"]
    assert float(lines[4].split()[3]) == pytest.approx(profile.metrics["nc1_quotient"][2], rel=1e-3)
    assert profile._repr_html_().count("<tr>") == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = profile.plot()
    assert [len(axes.lines) for axes in figure.axes] == [1, 3, 1]  # the dotted line is the effective depth
    assert figure.axes[0].lines[0].get_ydata().tolist() == list(profile.metrics["nc1_quotient"])
    both = profiled(mlp())
    assert len(both.profile(both).plot().axes[1].lines) == 5


def test_what_cannot_be_profiled_is_refused():
    model = mlp()
    plain = measure(model, loader(), progress=False)
    layers = measure(model, loader(), layers=["2"], progress=False)
    with pytest.raises(ValueError, match="profile needs measured layers, got none"):
        plain.profile()
    assert list(layers.profile().metrics) == ["nc1_quotient", "rank_me"]
    assert len(layers.profile().plot().axes) == 2
    with pytest.raises(ValueError, match="effective_depth needs errors of the nearest class mean"):
        layers.profile().effective_depth()
    with pytest.raises(ValueError, match=r"test must have the layers \['2'\], got \['2', '6'\]"):
        layers.profile(profiled(model))
    with pytest.raises(ValueError, match="test must be measured with probes=True"):
        layers.profile(layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "block"}, "layers must be a list of names, or 'blocks', got 'block'"),
        ({"probes": 1}, "probes must be True or False, got 1"),
        ({"train": "file"}, "train must be an iterable of batches, a Measurement or ClassMoments, got str"),
        ({"layers": ["2"], "probes": True, "train": ClassMoments(K, 7)}, "train must be a loader or a measurement"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        measure(mlp(), loader(), progress=False, **options)


def test_a_train_split_without_the_layers_is_refused():
    model = mlp()
    plain = measure(model, loader(), progress=False)
    assert measure(model, loader(TEST), train=plain, progress=False).train_moments is plain.moments
    with pytest.raises(ValueError, match="train must be measured with the same layers for probes, but lacks layer '2'"):
        measure(model, loader(TEST), train=plain, layers=["2"], probes=True, progress=False)
