"""Comparison of momenta and proximal weights of the nearest-ETF head, from which its defaults were chosen.

Every combination trains the same small conv net from the same weights on the same batches, at K = 10 (scikit-learn's
digits) and at K = 100 (two MNIST digits side by side, halved to 14×28). Accuracy is measured in evaluation mode on a
validation split that is not used for training. MNIST is read from NEURALCOLLAPSE_DATA, else ../shared/data.
"""

from __future__ import annotations

import itertools
import statistics

import datasets
import numpy as np
import torch
from _common import data_root, write
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy
from tqdm import tqdm

from neuralcollapse import FixedETFClassifier, NearestETFClassifier, attach_head

MOMENTA = [0.03, 0.1, 0.3, 1.0, "cumulative", "published"]
PROXIMAL_WEIGHTS = [4.5e-3, 0.5, 2.0, 8.0]
Split = tuple[Tensor, Tensor]


def digits() -> tuple[Split, Split]:
    """Return the splits for K = 10: 1,200 training and 597 validation images."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return (images[order[:1200]], labels[order[:1200]]), (images[order[1200:]], labels[order[1200:]])


def two_digit_mnist() -> tuple[Split, Split]:
    """Return the splits for K = 100: 20,000 training pairs and 5,000 validation pairs of other digits.

    All digits are from the training split of MNIST.
    """
    rows = datasets.load_dataset(str(data_root() / "mnist"), split="train[:25000]")
    column = "image" if "image" in rows.features else "img"
    images = torch.from_numpy(np.stack([np.asarray(image) for image in rows[column]])).float().unsqueeze(1) / 255
    images, labels = avg_pool2d(images, 2), torch.tensor(rows["label"])

    def pairs(first: int, last: int, count: int, seed: int) -> Split:
        chosen = torch.randint(first, last, (count, 2), generator=torch.Generator().manual_seed(seed))
        return torch.cat([images[chosen[:, 0]], images[chosen[:, 1]]], 3), 10 * labels[chosen[:, 0]] + labels[
            chosen[:, 1]
        ]

    return pairs(0, 20_000, 20_000, 0), pairs(20_000, 25_000, 5_000, 1)


def convnet(images: Tensor, num_classes: int) -> nn.Module:
    def stage(channels: int, out: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]

    height, width = (size // 4 for size in images.shape[-2:])
    return nn.Sequential(
        *stage(1, 16), *stage(16, 32), nn.Flatten(), nn.Linear(32 * height * width, 128), nn.Linear(128, num_classes)
    )


def curve(train: Split, validation: Split, head: nn.Module, num_classes: int, epochs: int, seed: int) -> list[float]:
    """Return the validation accuracy after each epoch."""
    torch.manual_seed(seed)
    model = attach_head(convnet(train[0], num_classes), head)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    accuracies = []
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(train[0])).split(64):
            optimizer.zero_grad()
            cross_entropy(model(train[0][batch], targets=train[1][batch]), train[1][batch]).backward()
            optimizer.step()
        with torch.no_grad():
            answers = model.eval()(validation[0]).argmax(1)
        accuracies.append(100 * float((answers == validation[1]).float().mean()))
    return accuracies


def main() -> None:
    settings = [("digits", 10, digits, 8, 5), ("two-digit MNIST", 100, two_digit_mnist, 3, 2)]
    rows: list[dict[str, object]] = []
    for name, num_classes, load, epochs, seeds in settings:
        train, validation = load()
        grid: list[tuple] = [("fixed", None), *itertools.product(MOMENTA, PROXIMAL_WEIGHTS)]
        for momentum, proximal_weight in tqdm(grid, desc=name):
            curves = []
            for seed in range(seeds):
                head = (
                    FixedETFClassifier(128, num_classes)
                    if momentum == "fixed"
                    else NearestETFClassifier(128, num_classes, momentum=momentum, proximal_weight=proximal_weight)
                )
                curves.append(curve(train, validation, head, num_classes, epochs, seed))
            final = [accuracies[-1] for accuracies in curves]
            rows.append(
                {
                    "data": name,
                    "momentum": momentum,
                    "proximal_weight": proximal_weight,
                    "seeds": seeds,
                    "epochs": epochs,
                    "accuracy_first_epoch": statistics.mean(accuracies[0] for accuracies in curves),
                    "accuracy_over_epochs": statistics.mean(itertools.chain(*curves)),
                    "accuracy_last_epoch": statistics.mean(final),
                    "accuracy_last_epoch_std": statistics.stdev(final),
                }
            )
            row = rows[-1]
            tqdm.write(
                f"{name}: momentum {momentum}, proximal weight {proximal_weight}: first epoch "
                f"{row['accuracy_first_epoch']:.2f}, mean {row['accuracy_over_epochs']:.2f}, "
                f"last {row['accuracy_last_epoch']:.2f} ± {row['accuracy_last_epoch_std']:.2f}"
            )
    write("defaults", rows, "datasets", "scikit-learn")


if __name__ == "__main__":
    main()
