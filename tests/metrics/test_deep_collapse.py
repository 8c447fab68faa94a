"""NC1 is accurate for within-class spreads of a millionth of the class means and less."""

from __future__ import annotations

import mpmath
import pytest
import torch

from helpers import generator
from neuralcollapse.metrics import ClassMoments, collapse_metrics


def precise_nc1(features: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """NC1 by its definitions, in 80 digits, on exactly these numbers."""
    with mpmath.workdps(80):
        samples = mpmath.matrix(features.double().tolist())
        count, dim, total = int(targets.max()) + 1, features.shape[1], len(features)
        members = [(targets == k).nonzero().flatten().tolist() for k in range(count)]
        rows = [mpmath.matrix([sum(samples[i, j] for i in own) / len(own) for j in range(dim)]) for own in members]
        origin = mpmath.matrix([sum(samples[i, j] for i in range(total)) / total for j in range(dim)])
        within, between, variances = mpmath.zeros(dim), mpmath.zeros(dim), []
        for mean, own in zip(rows, members, strict=True):
            deviations = [samples[i, :].T - mean for i in own]
            for deviation in deviations:
                within += deviation * deviation.T / total
            variances.append(sum(mpmath.fdot(deviation, deviation) for deviation in deviations) / len(own))
            between += (mean - origin) * (mean - origin).T / count
        rank = min(count - 1, dim)
        values, vectors = mpmath.eigsy(between)
        leading = range(dim - rank, dim)
        pinv = sum((vectors[:, i].T * within * vectors[:, i])[0] / values[i] for i in leading)
        inverse = mpmath.inverse(within + between)
        trace = sum((inverse * between)[j, j] for j in range(dim))
        pairs = [(k, j) for k in range(count) for j in range(k)]
        distances = [mpmath.fdot(rows[k] - rows[j], rows[k] - rows[j]) for k, j in pairs]
        cdnv = [(variances[k] + variances[j]) / (2 * d) for (k, j), d in zip(pairs, distances, strict=True)]
        return {
            "nc1_pinv": float(pinv / count),
            "nc1_quotient": float(sum(within[j, j] for j in range(dim)) / sum(between[j, j] for j in range(dim))),
            "nc1_cdnv": float(sum(cdnv) / len(cdnv)),
            "nc1_vci": float(1 - trace / rank),
        }


def collapsed_features(spread: float, dtype: torch.dtype, num_classes: int, feature_dim: int):
    """h = M_k + ε‖M_k‖·noise, in random order."""
    means = torch.randn(num_classes, feature_dim, generator=generator(1), dtype=torch.float64)
    targets = torch.randint(num_classes, (30 * num_classes,), generator=generator(2))
    noise = torch.randn(len(targets), feature_dim, generator=generator(3), dtype=torch.float64)
    return (means[targets] + spread * means.norm(dim=1)[targets, None] * noise).to(dtype), targets


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("spread", [1e-3, 1e-5, 1e-6])
@pytest.mark.parametrize(("num_classes", "feature_dim"), [(4, 9), (4, 3), (6, 3)])
def test_nc1_agrees_with_eighty_digits(spread, dtype, num_classes, feature_dim):
    features, targets = collapsed_features(spread, dtype, num_classes, feature_dim)
    moments = ClassMoments(num_classes, feature_dim)
    for batch, labels in zip(features.split(17), targets.split(17), strict=True):
        moments.update(batch, labels)
    measured = collapse_metrics(moments)
    for name, value in precise_nc1(features, targets).items():
        assert measured[name] == pytest.approx(value, rel=1e-6, abs=0), name


@pytest.mark.parametrize("spread", [1e-3, 1e-5, 1e-6])
def test_mixed_precision_keeps_five_digits(spread):
    """Deviations are taken from a sample of the class before rounding to fp32."""
    features, targets = collapsed_features(spread, torch.float32, 4, 9)
    moments = ClassMoments(4, 9, dtype="mixed")
    for batch, labels in zip(features.split(17), targets.split(17), strict=True):
        moments.update(batch, labels)
    measured = collapse_metrics(moments)
    for name, value in precise_nc1(features, targets).items():
        assert measured[name] == pytest.approx(value, rel=1e-5, abs=0), name


def test_nc1_without_spread_is_zero():
    """Σ_W = 0: every NC1 is exactly 0, the numerical rank exactly 1."""
    means = torch.randn(5, 8, generator=generator())
    moments = ClassMoments(5, 8, class_scatter=True)
    moments.update(means.repeat(3, 1), torch.arange(5).repeat(3))
    measured = collapse_metrics(moments)
    for name in ("nc1_pinv", "nc1_quotient", "nc1_cdnv", "nc1_vci"):
        assert measured[name] == 0, name
    assert measured["nc1_numerical_rank"] == pytest.approx(1, abs=1e-6)


def test_vci_where_features_do_not_vary_in_every_direction():
    """A singular Σ_W is its limit: directions without spread count as collapsed."""
    targets = torch.arange(400) % 4
    features = 3 * torch.randn(4, 6, generator=generator(1), dtype=torch.float64)[targets]
    noise = torch.randn(400, 6, generator=generator(2), dtype=torch.float64)
    noise[:, 4:] = 0

    def vci(values: torch.Tensor) -> float:
        moments = ClassMoments(4, 6)
        moments.update(values, targets)
        return collapse_metrics(moments)["nc1_vci"]

    direction = torch.randn(400, 2, generator=generator(3), dtype=torch.float64)
    nearly = noise.clone()
    nearly[:, 4:] = 1e-5 * direction
    assert 0.01 < vci(features + noise) == pytest.approx(vci(features + nearly), rel=1e-6)
