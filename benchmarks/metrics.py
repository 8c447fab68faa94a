"""Class moments and metrics in one pass, compared with the published libraries and with two efficient passes.

The baselines are implemented here. `OneHot` takes two passes with a one-hot matrix per batch, and then forms K×K
matrices. `IndexAdd` takes two passes with index-add, and computes the metrics with this library. Features are in fp32,
in batches of 512. Errors of `nc1_quotient` and of the pooled scatter are relative to two passes in fp64.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from datetime import date
from functools import partial
from typing import Any

import torch
from _common import RESULTS, medians, peak_growth, write
from torch import Tensor
from torch.nn.functional import one_hot

from neuralcollapse.metrics import ClassMoments, MeasureOptions, collapse_metrics

SHAPES = [(10, 512, 50_000), (1000, 2048, 20_000), (20_000, 768, 40_000), (50_257, 768, 60_000)]
BATCH = 512
DENSE_LIMIT = 20_000  # K×K matrices of more classes do not fit into memory together


def data(num_classes: int, feature_dim: int, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return features, targets in which every class occurs, and a weight."""
    draw = torch.Generator().manual_seed(0)
    targets = (torch.arange(samples) % num_classes)[torch.randperm(samples, generator=draw)]
    means = torch.randn(num_classes, feature_dim, generator=draw)
    features = torch.randn(samples, feature_dim, generator=draw).add_(means[targets])
    return features, targets, means + torch.randn(num_classes, feature_dim, generator=draw)


def batches(features: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(features.split(BATCH), targets.split(BATCH), strict=True))


class IndexAdd:
    """Two passes: class sums by index-add; then deviations from the gathered means, and their product."""

    def __init__(self, num_classes: int, feature_dim: int, dtype: torch.dtype = torch.float32) -> None:
        self.counts = torch.zeros(num_classes, dtype=torch.int64)
        self.means = torch.zeros(num_classes, feature_dim, dtype=dtype)
        self.scatter = torch.zeros(feature_dim, feature_dim, dtype=dtype)
        self.trace = torch.zeros(num_classes, dtype=dtype)

    def first(self, features: Tensor, targets: Tensor) -> None:
        self.means.index_add_(0, targets, features.to(self.means.dtype))
        self.counts.index_add_(0, targets, torch.ones_like(targets))

    def between(self) -> None:
        self.means /= self.counts[:, None]

    def second(self, features: Tensor, targets: Tensor) -> None:
        deviations = features.to(self.means.dtype) - self.means[targets]
        self.scatter.addmm_(deviations.T, deviations)
        self.trace.index_add_(0, targets, deviations.square().sum(1))


class OneHot(IndexAdd):
    """Two passes with a (batch, K) one-hot matrix in each."""

    def first(self, features: Tensor, targets: Tensor) -> None:
        members = one_hot(targets, len(self.means)).to(features.dtype)
        self.means += members.T @ features
        self.counts += members.sum(0).long()

    def second(self, features: Tensor, targets: Tensor) -> None:
        deviations = features - self.means[targets]
        self.scatter += deviations.T @ deviations
        self.trace += one_hot(targets, len(self.means)).to(features.dtype).T @ deviations.square().sum(1)


def two_passes(kind: Callable[..., IndexAdd], features: Tensor, targets: Tensor, num_classes: int, **options: Any):
    state = kind(num_classes, features.shape[1], **options)
    for batch in batches(features, targets):
        state.first(*batch)
    state.between()
    for batch in batches(features, targets):
        state.second(*batch)
    return state


def one_pass(
    features: Tensor, targets: Tensor, num_classes: int, dtype: torch.dtype | str, class_scatter: bool = False
) -> ClassMoments:
    moments = ClassMoments(num_classes, features.shape[1], dtype=dtype, class_scatter=class_scatter)
    for batch in batches(features, targets):
        moments.update(*batch)
    return moments


def dense_metrics(state: IndexAdd, weight: Tensor, pairwise: bool) -> list[float]:
    """Compute the metrics as the published libraries do: in fp32, with K×K matrices."""
    num_classes = len(weight)
    centred = state.means - (state.counts.to(weight.dtype) @ state.means) / state.counts.sum()
    within, between = state.scatter / state.counts.sum(), centred.T @ centred / num_classes
    simplex = (torch.eye(num_classes) - 1 / num_classes) / math.sqrt(num_classes - 1)
    values = [torch.trace(within @ torch.linalg.pinv(between, hermitian=True)) / num_classes]
    values.append(within.trace() / between.trace())
    for left, right in ((centred, centred), (weight, weight), (weight, centred)):
        gram = left @ right.T
        values.append((gram / gram.norm() - simplex).norm())
    values.append((weight / weight.norm() - centred / centred.norm()).square().sum())
    del simplex, gram
    if pairwise:
        off_diagonal = ~torch.eye(num_classes, dtype=torch.bool)
        variances = state.trace / state.counts
        distances = torch.cdist(centred, centred).square_()
        values.append(((variances[:, None] + variances) / (2 * distances))[off_diagonal].mean())
        del distances
        for rows in (centred, weight):
            unit = rows / rows.norm(dim=1, keepdim=True)
            cosines = (unit @ unit.T)[off_diagonal]
            values += [cosines.std(), (cosines + 1 / (num_classes - 1)).abs().mean()]
            del cosines
        distances = torch.cdist(unit, unit)[off_diagonal]
        for kernel in (distances, distances.log(), distances.reciprocal()):
            values += [kernel.mean(), kernel.var()]
    return [float(value) for value in values]


METHODS: dict[str, Callable[[Tensor, Tensor, int], Any]] = {
    "one_pass_fp64": partial(one_pass, dtype=torch.float64),
    "one_pass_mixed": partial(one_pass, dtype="mixed"),
    "index_add_fp32": partial(two_passes, IndexAdd),
    "index_add_fp64": partial(two_passes, IndexAdd, dtype=torch.float64),
    "one_hot_fp32": partial(two_passes, OneHot),
}
# With each class's scatter apart: K d² numbers.
CLASS_SCATTER_METHODS: dict[str, Callable[[Tensor, Tensor, int], Any]] = {
    "one_pass_fp64_class_scatter": partial(one_pass, dtype=torch.float64, class_scatter=True),
    "one_pass_mixed_class_scatter": partial(one_pass, dtype="mixed", class_scatter=True),
}


def prepare_accumulation(method: str, *shape: int) -> Callable[[], Any]:
    features, targets, _ = data(*shape)
    return lambda: (METHODS | CLASS_SCATTER_METHODS)[method](features, targets, shape[0])


def prepare_everything(method: str, pairwise: bool, *shape: int) -> Callable[[], Any]:
    """Measure accumulation and all metrics of moments."""
    features, targets, weight = data(*shape)

    def work() -> None:
        state = METHODS[method](features, targets, shape[0])
        if isinstance(state, ClassMoments):
            collapse_metrics(state, weight, options=MeasureOptions(pairwise=pairwise))
        else:
            dense_metrics(state, weight, pairwise)

    return work


def errors(state: Any, reference: IndexAdd) -> dict[str, float]:
    scatter = state.within_class_scatter if isinstance(state, ClassMoments) else state.scatter
    trace = state.within_class_trace if isinstance(state, ClassMoments) else state.trace

    def quotient(traces: Tensor, means: Tensor) -> float:
        means = means.double()
        center = reference.counts.double() @ means / reference.counts.sum()
        return float(traces.double().sum() / (means - center).square().sum())

    expected = quotient(reference.trace, reference.means)
    return {
        "scatter_error": float((scatter.double() - reference.scatter).norm() / reference.scatter.norm()),
        "nc1_quotient_error": abs(quotient(trace, state.means) / expected - 1),
    }


def measure(num_classes: int, feature_dim: int, samples: int) -> list[dict[str, Any]]:
    shape = (num_classes, feature_dim, samples)
    features, targets, weight = data(*shape)
    methods = METHODS | CLASS_SCATTER_METHODS if num_classes == 10 else METHODS
    if "--quick" in sys.argv and num_classes > 1000:  # the other methods take minutes and have not changed
        methods = {name: run for name, run in methods.items() if not name.startswith("one_hot")}
    accumulations = {name: partial(run, features, targets, num_classes) for name, run in methods.items()}
    seconds = medians(accumulations, repeats=9 if num_classes == 10 else 3)
    reference = METHODS["index_add_fp64"](features, targets, num_classes)
    rows = []
    for method, run in methods.items():
        state = run(features, targets, num_classes)
        row: dict[str, Any] = {
            "method": method,
            "K": num_classes,
            "d": feature_dim,
            "N": samples,
            "accumulate_s": seconds[method],
            "accumulate_peak_mb": peak_growth(prepare_accumulation, method, *shape),
            **errors(state, reference),
        }
        ours = isinstance(state, ClassMoments)
        if method in ("one_pass_fp64", "one_hot_fp32") and (ours or num_classes <= DENSE_LIMIT):
            for name, pairwise in {"compute_s": False, "compute_with_pairs_s": True}.items():
                if pairwise and num_classes > 1000 and "--quick" in sys.argv:
                    continue
                compute = partial(collapse_metrics, state, weight, pairwise=pairwise) if ours else None
                compute = compute or partial(dense_metrics, state, weight, pairwise)
                repeats = 1 if num_classes > 1000 and pairwise else 3
                row[name] = medians({"compute": compute}, repeats=repeats)["compute"]
            if "compute_with_pairs_s" in row:
                row["everything_peak_mb"] = peak_growth(prepare_everything, method, True, *shape)
        rows.append(row)
        print(
            " ".join(
                f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()
            )
        )
    return rows


def measure_with_backbone(samples: int = 2048) -> list[dict[str, Any]]:
    """Compare one pass with two, each with the forward pass of a ResNet-18 (32×32 images, batch 256)."""
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic")
    model = ResNetModel(config).eval()
    images, targets = torch.randn(samples, 3, 32, 32), torch.arange(samples) % 10
    loader = list(zip(images.split(256), targets.split(256), strict=True))

    def forward(batch: Tensor) -> Tensor:
        return model(batch).pooler_output.flatten(1)

    def one(dtype: torch.dtype | str) -> None:
        moments = ClassMoments(10, 512, dtype=dtype)
        for batch, labels in loader:
            moments.update(forward(batch), labels)

    def two() -> None:
        state = IndexAdd(10, 512)
        for batch, labels in loader:
            state.first(forward(batch), labels)
        state.between()
        for batch, labels in loader:
            state.second(forward(batch), labels)

    functions = {"one_pass_fp64": partial(one, torch.float64), "one_pass_mixed": partial(one, "mixed")}
    with torch.no_grad():
        seconds = medians({**functions, "index_add_fp32": two}, repeats=3)
    return [
        {"method": method, "backbone": "ResNet-18", "K": 10, "d": 512, "N": samples, "accumulate_s": value}
        for method, value in seconds.items()
    ]


def main() -> None:
    """Measure all rows, or update those of the given K (and of ``backbone``); ``--quick`` leaves out slow methods."""
    chosen = [argument for argument in sys.argv[1:] if argument != "--quick"]
    rows = [row for shape in SHAPES if not chosen or str(shape[0]) in chosen for row in measure(*shape)]
    if not chosen or "backbone" in chosen:
        rows += measure_with_backbone()
    write("metrics", merged(rows) if sys.argv[1:] else rows)


def merged(new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows on disk with the new values; values that were not measured again stay, new rows are appended."""
    rows = {
        (row["method"], row["K"], row.get("backbone")): row
        for row in json.loads((RESULTS / "metrics.json").read_text())["rows"]
    }
    for row in new:
        key = row["method"], row["K"], row.get("backbone")
        rows[key] = rows.get(key, {}) | row | {"date": date.today().isoformat()}
    return list(rows.values())


if __name__ == "__main__":
    main()
