"""What a training step of the nearest-ETF head costs over an nn.Linear: forward and backward, batch 128, fp32."""

from __future__ import annotations

import torch
from _common import medians, write
from torch import nn
from torch.nn.functional import cross_entropy

from neuralcollapse import NearestETFClassifier

SHAPES = [(10, 512), (100, 512), (100, 2048), (1000, 2048)]
BATCH = 128


def measure(num_classes: int, feature_dim: int) -> dict[str, object]:
    torch.manual_seed(0)
    linear, head = nn.Linear(feature_dim, num_classes), NearestETFClassifier(feature_dim, num_classes)
    features = torch.randn(BATCH, feature_dim, requires_grad=True)
    targets = torch.arange(BATCH) % num_classes
    functions = {
        "linear": lambda: cross_entropy(linear(features), targets).backward(),
        "nearest_etf": lambda: cross_entropy(head(features, targets), targets).backward(),
    }
    seconds = medians(functions, repeats=9 if num_classes == 1000 else 101)
    return {
        "num_classes": num_classes,
        "feature_dim": feature_dim,
        "batch": BATCH,
        **{f"{name}_ms": 1e3 * value for name, value in seconds.items()},
        "head_minus_linear_ms": 1e3 * (seconds["nearest_etf"] - seconds["linear"]),
    }


def main() -> None:
    rows = [measure(*shape) for shape in SHAPES]
    for row in rows:
        print(
            f"K={row['num_classes']:5} d={row['feature_dim']:5}: {row['head_minus_linear_ms']:8.2f} ms over nn.Linear"
        )
    write("head", rows)


if __name__ == "__main__":
    main()
