"""Time of a training step with each head and loss, compared with an nn.Linear: batch 128, fp32, one thread.

A step is a forward and a backward pass. The unit for heads is a bare solve without a basis. Frames use random codes of
rank min(d, K−1)/2, or the leading directions of the class means at that rank. The classifiers of class means and the
losses on the sphere are given as multiples of the step of the nn.Linear: `class_means` with cross-entropy,
`class_means_two_way` without bias and with the two-way loss, and `linear_...` for a loss on the weight of an nn.Linear.

`--before CHECKOUT` also times the nearest-ETF head of an older checkout, in the same rounds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType

import torch
from _common import bare_solve, load_before, medians, write
from torch import nn
from torch.nn.functional import cross_entropy

import neuralcollapse
from neuralcollapse import losses, nearest_simplex_etf
from neuralcollapse.heads import LeadingDirections

LOSSES = (losses.normface, losses.ntce, losses.nonl, losses.decoupled_cross_entropy, losses.two_way)
SHAPES = [(10, 512), (100, 512), (100, 2048), (1000, 2048)]
BATCH = 128


def measure(num_classes: int, feature_dim: int, versions: dict[str, ModuleType]) -> dict[str, object]:
    torch.manual_seed(0)
    features = torch.randn(BATCH, feature_dim, requires_grad=True)
    targets = torch.arange(BATCH) % num_classes
    means = torch.randn(num_classes, feature_dim)
    anchor = nearest_simplex_etf(means)

    def step(module: nn.Module, *labels: torch.Tensor) -> None:
        cross_entropy(module(features, *labels), targets).backward()

    linear = nn.Linear(feature_dim, num_classes)
    functions = {"bare_solve": lambda: bare_solve(means, anchor, 0.5), "linear": lambda: step(linear)}
    for name, version in versions.items():
        head = version.NearestETFClassifier(feature_dim, num_classes)
        functions[name] = lambda head=head: step(head, targets)
    rank = max(1, min(feature_dim, num_classes - 1) // 2)
    frames: dict[str, neuralcollapse.FixedFrameClassifier | neuralcollapse.NearestFrameClassifier] = {
        "fixed_frame": neuralcollapse.FixedFrameClassifier(feature_dim, num_classes, torch.randn(num_classes, rank)),
        "nearest_frame": neuralcollapse.NearestFrameClassifier(
            feature_dim, num_classes, frame=torch.randn(num_classes, rank)
        ),
        "frame_of_means": neuralcollapse.NearestFrameClassifier(
            feature_dim, num_classes, frame=LeadingDirections(rank)
        ),
        "frame_of_means_auto": neuralcollapse.NearestFrameClassifier(
            feature_dim, num_classes, frame=LeadingDirections()
        ),
    }
    for name, head in frames.items():
        functions[name] = lambda head=head: step(head, targets)
    class_means = neuralcollapse.ClassMeanClassifier(feature_dim, num_classes)
    functions["class_means"] = lambda: step(class_means, targets)
    on_sphere = neuralcollapse.ClassMeanClassifier(feature_dim, num_classes, bias="none")

    def two_way_step() -> None:
        prepared, weight, _ = on_sphere.prepare(features, targets)
        losses.two_way(prepared, targets, weight).backward()

    functions["class_means_two_way"] = two_way_step
    for loss in LOSSES:
        functions[f"linear_{loss.__name__}"] = lambda loss=loss: loss(features, targets, linear.weight).backward()
    seconds = medians(functions, repeats=5 if num_classes == 1000 else 201)
    further = [name for name in functions if "class_means" in name or name.startswith("linear_")]
    over = {name: seconds[name] - seconds["linear"] for name in (*versions, *frames)}
    return {
        "num_classes": num_classes,
        "feature_dim": feature_dim,
        "batch": BATCH,
        **{f"{name}_ms": 1e3 * value for name, value in seconds.items()},
        **{f"{name}_over_linear": seconds[name] / seconds["linear"] for name in further},
        **{f"{name}_minus_linear_ms": 1e3 * value for name, value in over.items()},
        **{f"{name}_minus_linear_in_bare_solves": value / seconds["bare_solve"] for name, value in over.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="older checkout to compare with")
    before = parser.parse_args().before
    torch.set_num_threads(1)
    versions = {"nearest_etf": neuralcollapse} | ({"before": load_before(before)} if before else {})
    rows = [measure(*shape, versions) for shape in SHAPES]
    for row in rows:
        print(
            {
                name: value
                for name, value in row.items()
                if name.endswith(("d_dim", "classes", "linear_ms", "solves", "over_linear"))
            }
        )
    write("head", rows)


if __name__ == "__main__":
    main()
