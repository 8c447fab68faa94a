"""Every metric from its definition, with two passes, dense matrices and loops, independently of the library."""

from __future__ import annotations

import itertools
import math

import mpmath
import torch
from torch import Tensor


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def simplex_gram(num_classes: int) -> Tensor:
    centring = torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes
    return centring / centring.norm()


def dense_metrics(
    features: Tensor,
    targets: Tensor,
    num_classes: int,
    weight: Tensor,
    bias: Tensor,
    center: str,
    ood_mean: Tensor,
    code: Tensor | None = None,
) -> dict[str, float]:
    """Return all metrics of the present classes, in fp64."""
    features, weight, bias = features.double(), weight.double(), bias.double()
    classes = [k for k in range(num_classes) if (targets == k).any()]
    groups = [features[targets == k] for k in classes]
    weight, bias = weight[classes], bias[classes]
    count, dim, samples = len(classes), features.shape[1], len(features)
    means = torch.stack([group.mean(0) for group in groups])
    origin = features.mean(0) if center == "samples" else means.mean(0)
    centred = means - origin

    within = torch.zeros(dim, dim, dtype=torch.float64)
    for group, mean in zip(groups, means, strict=True):
        for sample in group:
            within += torch.outer(sample - mean, sample - mean) / samples
    between = sum(torch.outer(c, c) for c in centred) / count

    values, vectors = torch.linalg.eigh(between)
    leading = range(dim - 1, max(dim - count, -1), -1)  # the K − 1 leading ones
    zero = dim * torch.finfo(torch.float64).eps
    pinv = sum(torch.outer(vectors[:, i], vectors[:, i]) / values[i] for i in leading if values[i] > zero * values[-1])
    variances = [(group - mean).square().sum(1).mean() for group, mean in zip(groups, means, strict=True)]
    pairs = list(itertools.combinations(range(count), 2))

    singular_values = torch.linalg.svdvals(features)
    singular_values = singular_values[
        singular_values > (dim * torch.finfo(torch.float64).eps) ** 0.5 * singular_values[0]
    ]
    spectrum = singular_values / singular_values.sum()
    result = {
        "nc0_weight_sum": weight.sum(0).norm() / weight.norm(),
        "feature_norm": features.square().sum(1).mean().sqrt(),
        "rank_me": (-spectrum * spectrum.log()).sum().exp(),
        "nc1_pinv": torch.trace(within @ pinv) / count,
        "nc1_vci": precise_vci(groups, origin),
        "nc1_quotient": within.trace() / between.trace(),
        "nc1_cdnv": sum((variances[k] + variances[j]) / (2 * (means[k] - means[j]).square().sum()) for k, j in pairs)
        / len(pairs),
        "nc1_numerical_rank": torch.stack(
            [(torch.linalg.svdvals(group).sum() / group.norm()).square() for group in groups]
        ).mean(),
        "nc4_bias": (weight @ origin + bias).norm(),
        "nc5_ood": sum(abs(unit(mean) @ unit(ood_mean.double())) for mean in means) / count,
        "nc3_duality": (weight @ centred.T / (weight @ centred.T).norm() - simplex_gram(count)).norm(),
        "nc3_distance": (weight / weight.norm() - centred / centred.norm()).square().sum(),
        "nc3_uniform": torch.stack([w @ c for w, c in zip(weight, centred, strict=True)]).var(),
        "nc3_uniform_cos": torch.stack([unit(w) @ unit(c) for w, c in zip(weight, centred, strict=True)]).var(),
    }
    for name, rows in {"means": centred, "weights": weight}.items():
        norms = torch.stack([row.norm() for row in rows])
        cosines = torch.stack([unit(rows[k]) @ unit(rows[j]) for k in range(count) for j in range(count) if k != j])
        gram = rows @ rows.T
        result[f"nc2_etf_{name}"] = (gram / gram.norm() - simplex_gram(count)).norm()
        result[f"nc2_equinorm_{name}"] = norms.std() / norms.mean()
        result[f"nc2_equiangular_{name}"] = cosines.std()
        result[f"nc2_max_angle_{name}"] = (cosines + 1 / (count - 1)).abs().mean()
        singular_values = torch.linalg.svdvals(rows)
        spectrum = singular_values / singular_values.sum()
        result[f"effective_rank_{name}"] = math.exp(-sum(p * math.log(p) for p in spectrum.tolist() if p > 0))
    result["nc2_equinorm_difference"] = abs(result["nc2_equinorm_means"] - result["nc2_equinorm_weights"])
    if code is not None:
        centring = torch.eye(count, dtype=torch.float64) - 1 / count
        wanted = centring @ code.double()[classes] @ code.double()[classes].T @ centring
        for name, product in {
            "nc2_gram_means": centred @ centred.T,
            "nc2_gram_weights": weight @ weight.T,
            "nc3_gram_duality": weight @ centred.T,
        }.items():
            product = centring @ product @ centring
            result[name] = (product / product.norm() - wanted / wanted.norm()).norm()
    distances = torch.stack([(unit(centred[k]) - unit(centred[j])).norm() for k, j in pairs])
    for kernel, values in {"dist": distances, "log": -distances.log(), "riesz": 1 / distances}.items():
        result[f"nc2_hyperspherical_{kernel}_mean"] = values.mean()
        result[f"nc2_hyperspherical_{kernel}_variance"] = values.var(correction=0)
    return {name: float(value) for name, value in result.items()}


def precise_vci(groups: list[Tensor], origin: Tensor) -> float:
    """Return 1 − tr((Σ_W + Σ_B)† Σ_B)/r by its formula, which cancels in fp64, with 60 digits."""
    with mpmath.workdps(60):
        groups = [mpmath.matrix(group.tolist()) for group in groups]
        dim, samples = groups[0].cols, sum(group.rows for group in groups)
        means = [(mpmath.ones(1, group.rows) * group / group.rows) for group in groups]
        within = mpmath.zeros(dim)
        for group, mean in zip(groups, means, strict=True):
            deviations = group - mpmath.ones(group.rows, 1) * mean
            within += deviations.T * deviations / samples
        centred = [mean - mpmath.matrix([origin.tolist()]) for mean in means]
        between = sum((c.T * c for c in centred), mpmath.zeros(dim)) / len(centred)
        values, vectors = mpmath.eigsy(within + between)
        projected = vectors.T * between * vectors
        largest = max(values)
        trace = sum(projected[i, i] / values[i] for i in range(dim) if values[i] > largest * mpmath.mpf(10) ** -20)
        return float(1 - trace / min(dim, len(groups) - 1))


def dense_sample_metrics(
    features: Tensor, targets: Tensor, weight: Tensor, bias: Tensor, means: Tensor, origin: Tensor
) -> dict[str, float]:
    """Return the metrics of single samples, one sample after the other, in fp64."""
    features, weight, bias = features.double(), weight.double(), bias.double()
    rows = [unit(w - weight.mean(0)) for w in weight]
    margins, aligned, mismatches = [], [], []
    for sample, target in zip(features, targets.tolist(), strict=True):
        cosines = [float(unit(sample - origin) @ row) for row in rows]
        aligned.append(cosines[target])
        margins.append(cosines[target] - max(c for k, c in enumerate(cosines) if k != target))
        nearest = min(range(len(means)), key=lambda k: float((sample - means[k]).norm()))
        mismatches.append(nearest != int((weight @ sample + bias).argmax()))
    return {
        "nc2_cos_margin": math.fsum(margins) / len(margins),
        "alignment": math.fsum(aligned) / len(aligned),
        "nc4_ncc_mismatch": sum(mismatches) / len(mismatches),
    }


def entropy(kernel: Tensor) -> float:
    """Return the entropy of a kernel scaled to trace 1."""
    eigenvalues = torch.linalg.eigvalsh(kernel / kernel.trace()).tolist()
    return -math.fsum(value * math.log(value) for value in eigenvalues if value > 0)


def dense_information(first: Tensor, second: Tensor) -> dict[str, float]:
    """Return MIR and HDR of two kernels by their formulas."""
    alone, joint = sorted(entropy(kernel) for kernel in (first, second)), entropy(first * second)
    return {"mir": (sum(alone) - joint) / alone[0], "hdr": (alone[1] - alone[0]) / alone[1]}


def dense_sphere_metrics(features: Tensor, targets: Tensor, weight: Tensor) -> dict[str, float]:
    """Return the metrics of unit features and unit rows, with N × N kernels, in fp64."""
    rows = torch.stack([unit(row) for row in weight.double()])
    units = torch.stack([unit(sample) for sample in features.double()])
    label_rows = rows[targets]
    classes = targets.unique().tolist()
    means = torch.stack([unit(units[targets == k].mean(0)) for k in classes])
    count = len(units)
    return {
        "instance_alignment": float((units - label_rows).square().sum(1).mean()),
        "class_alignment": float((means - rows[classes]).square().sum(1).mean()),
        **dense_information(units @ units.T / count, label_rows @ label_rows.T / count),
    }


def released_information(features: Tensor, targets: Tensor, weight: Tensor) -> dict[str, float]:
    """Return MIR and HDR as in the code released with arXiv 2605.20302: of K × K kernels, with a mean of unit norm."""
    rows = torch.stack([unit(row) for row in weight.double()])
    units = torch.stack([unit(sample) for sample in features.double()])
    classes = targets.unique().tolist()
    means = torch.stack([unit(units[targets == k].mean(0)) for k in classes])
    means = torch.stack([unit(mean - unit(units.mean(0))) for mean in means])
    return dense_information(means @ means.T, rows[classes] @ rows[classes].T)
