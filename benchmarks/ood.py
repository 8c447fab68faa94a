"""Detection of unknown inputs from one measurement, compared with detection from all training features in memory.

The features are synthetic, in fp32, and drawn in chunks: class means, and within classes a spread that decreases over
the dimensions. This library measures them in one pass (`measure`) and evaluates the scores batch by batch
(`evaluate`): once from the moments alone, and once with the mean residual norms for ViM, which need a second pass over
a cache on disk. The other way keeps all training features in fp64 and fits the EmpiricalCovariance and the PCA of
scikit-learn to them.

Each way runs in a separate process. Its memory is the growth of the maximum resident set after all imports. The seconds
of both ways include the time to draw the features, which is also reported alone.

A second part compares the seconds of a detector's call with those of its ResNet-18 alone, in turns, on one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, medians, peak_growth, write
from torch import Tensor, nn

_CHUNK = 2000  # number of samples drawn at once
_TRAIN, _TEST, _UNKNOWN = range(3)  # parts of the data
_OF_MOMENTS = ("mahalanobis", "residual", "neco")


@dataclass(frozen=True)
class Problem:
    """Synthetic features of known and unknown classes.

    Attributes:
        samples: Number of training features.
        test_samples: Number of test features, and of those of unknown classes.
        feature_dim: d.
        num_classes: K, of known and of unknown classes.
    """

    samples: int
    test_samples: int
    feature_dim: int
    num_classes: int

    @property
    def class_means(self) -> Tensor:
        """Means (2, K, d) of the known and of the unknown classes."""
        generator = torch.Generator().manual_seed(0)
        means = torch.randn(2, self.num_classes, self.feature_dim, generator=generator)
        return 2 * means / math.sqrt(self.feature_dim)

    def linear_model(self) -> nn.Linear:
        """Return the classifier of the known class means, whose inputs are the features."""
        model, means = nn.Linear(self.feature_dim, self.num_classes), self.class_means[0]
        with torch.no_grad():
            model.weight.copy_(means)
            model.bias.copy_(-means.square().sum(dim=1) / 2)
        return model

    def batches(self, part: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features and classes of a part of the data, the same in every pass."""
        means = self.class_means[int(part == _UNKNOWN)]
        spread = torch.linspace(1, 0.1, self.feature_dim)
        samples = self.samples if part == _TRAIN else self.test_samples
        for start in range(0, samples, _CHUNK):
            generator = torch.Generator().manual_seed(3 * start + part)
            count = min(_CHUNK, samples - start)
            classes = torch.arange(start, start + count) % self.num_classes
            yield means[classes] + spread * torch.randn(count, self.feature_dim, generator=generator), classes


class Loader:
    """The batches of a part of the data, drawn anew in each pass."""

    def __init__(self, problem: Problem, part: int) -> None:
        self.problem, self.part = problem, part

    def __len__(self) -> int:
        return math.ceil((self.problem.samples if self.part == _TRAIN else self.problem.test_samples) / _CHUNK)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.problem.batches(self.part)


def prepare_ours(problem: Problem, result: Path, with_vim: bool) -> Callable[[], None]:
    """Return the measurement and evaluation, which writes AUROC and seconds to a file."""
    from neuralcollapse import MeasureOptions, measure
    from neuralcollapse.ood import evaluate

    torch.set_num_threads(1)
    scores = [*_OF_MOMENTS, *(["vim"] if with_vim else [])]
    options = MeasureOptions(per_sample=with_vim, cache_bytes=0)
    small = Problem(2 * _CHUNK, _CHUNK, problem.feature_dim, problem.num_classes)

    def run(of: Problem) -> tuple[dict[str, float], float, float]:
        start, model = time.perf_counter(), of.linear_model()
        record = measure(model, Loader(of, _TRAIN), progress=False, options=options)
        measured = time.perf_counter()
        unknown = {"unknown": Loader(of, _UNKNOWN)}
        table = evaluate(model, record, Loader(of, _TEST), unknown, scores, progress=False)
        end = time.perf_counter()
        return {row.score: row.auroc for row in table.rows}, measured - start, end - measured

    run(small)  # imports modules on first use, so that they are not counted

    def work() -> None:
        auroc, fitting, evaluating = run(problem)
        result.write_text(json.dumps({"auroc": auroc, "fit_s": fitting, "evaluate_s": evaluating}))

    return work


def prepare_kept(problem: Problem, result: Path) -> Callable[[], None]:
    """Return the way that keeps all training features in fp64, with scikit-learn."""
    import numpy as np
    from scipy.special import logsumexp
    from sklearn.covariance import EmpiricalCovariance
    from sklearn.decomposition import PCA
    from sklearn.metrics import roc_auc_score
    from sklearn.preprocessing import StandardScaler

    torch.set_num_threads(1)
    small = Problem(2 * _CHUNK, _CHUNK, problem.feature_dim, problem.num_classes)

    def kept(of: Problem, part: int) -> tuple[Any, Any]:
        samples, start = (of.samples if part == _TRAIN else of.test_samples), 0
        features, classes = np.empty((samples, of.feature_dim)), np.empty(samples, dtype=np.int64)
        for batch, of_batch in of.batches(part):
            features[start : start + len(batch)], classes[start : start + len(batch)] = batch, of_batch
            start += len(batch)
        return features, classes

    def run(of: Problem) -> tuple[dict[str, float], float, float]:
        start, model = time.perf_counter(), of.linear_model()
        weight, bias = (parameter.detach().double().numpy() for parameter in (model.weight, model.bias))
        train, classes = kept(of, _TRAIN)
        means = np.stack([train[classes == label].mean(axis=0) for label in range(of.num_classes)])
        within = EmpiricalCovariance(assume_centered=True).fit(train - means[classes])
        origin = -np.linalg.pinv(weight) @ bias
        about_origin = EmpiricalCovariance(assume_centered=True).fit(train - origin)
        outside = np.linalg.eigh(about_origin.covariance_)[1][:, : of.feature_dim - of.feature_dim // 2]
        residuals = np.linalg.norm((train - origin) @ outside, axis=1)
        alpha = (train @ weight.T + bias).max(axis=1).mean() / residuals.mean()
        scaler = StandardScaler().fit(train)
        leading = PCA(of.num_classes - 1, svd_solver="covariance_eigh").fit(scaler.transform(train)).components_
        fitted = time.perf_counter()

        def scores(features: Any) -> dict[str, Any]:
            distances = [((features - mean) @ within.precision_ * (features - mean)).sum(axis=1) for mean in means]
            residual = np.linalg.norm((features - origin) @ outside, axis=1)
            scaled = scaler.transform(features)
            return {
                "mahalanobis": -np.min(distances, axis=0),
                "residual": -residual,
                "neco": np.linalg.norm(scaled @ leading.T, axis=1) / np.linalg.norm(scaled, axis=1),
                "vim": logsumexp(features @ weight.T + bias, axis=1) - alpha * residual,
            }

        test, unknown = (scores(kept(of, part)[0]) for part in (_TEST, _UNKNOWN))
        labels = np.repeat([1, 0], of.test_samples)
        auroc = {name: float(roc_auc_score(labels, np.concatenate([test[name], unknown[name]]))) for name in test}
        return auroc, fitted - start, time.perf_counter() - fitted

    run(small)

    def work() -> None:
        auroc, fitting, evaluating = run(problem)
        result.write_text(json.dumps({"auroc": auroc, "fit_s": fitting, "evaluate_s": evaluating}))

    return work


def compare(problem: Problem) -> list[dict[str, Any]]:
    """Return a row per way: AUROC of each score, seconds, memory, and the greatest difference of AUROC."""
    start = time.perf_counter()
    for part in (_TRAIN, _TEST, _UNKNOWN):
        for _ in problem.batches(part):
            pass
    drawing = time.perf_counter() - start
    ways: dict[str, tuple[Callable[..., Callable[[], None]], tuple[Any, ...]]] = {
        "kept": (prepare_kept, ()),
        "moments": (prepare_ours, (False,)),
        "moments_and_residual_norms": (prepare_ours, (True,)),
    }
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for way, (prepare, arguments) in ways.items():
            result = Path(folder) / f"{way}.json"
            memory = peak_growth(prepare, problem, result, *arguments)
            row = {"way": way, **asdict(problem), **json.loads(result.read_text()), "memory_mb": memory}
            of_kept = rows[0]["auroc"] if rows else row["auroc"]
            difference = max(abs(value - of_kept[score]) for score, value in row["auroc"].items())
            rows.append(row | {"drawing_s": drawing, "auroc_difference": difference})
            print(rows[-1], flush=True)
    return rows


def overhead(images: int, width: int, repeats: int) -> list[dict[str, Any]]:
    """Return a row per score: seconds of a detector's call over those of its ResNet-18 alone, on a batch of images."""
    from neuralcollapse import measure
    from neuralcollapse.lab.models.backbones import ResNet
    from neuralcollapse.ood import Detector

    torch.manual_seed(0)
    backbone = ResNet((3, 32, 32), blocks=(2, 2, 2, 2), width=width, stem="3x3")
    model = nn.Sequential(backbone, nn.Linear(backbone.feature_dim, 10)).eval()
    batch = torch.randn(images, 3, 32, 32)
    train = [(torch.randn(100, 3, 32, 32), torch.arange(100) % 10) for _ in range(8)]
    record = measure(model, train, progress=False)
    detectors = {
        score: Detector(model, record, score)
        for score in ("energy", "mahalanobis", "relative_mahalanobis", "residual", "vim", "neco", "nci", "fdbd", "ncm")
    }
    with torch.inference_mode():
        functions: dict[str, Callable[[], Any]] = {"model": lambda: model(batch)}
        functions |= {score: lambda detector=detector: detector(batch) for score, detector in detectors.items()}
        seconds = medians(functions, repeats=repeats)
        features = detectors["energy"].features(batch)
        scoring = {score: lambda detector=d: detector.from_features(features) for score, d in detectors.items()}
        alone = medians(scoring, repeats=5 * repeats)
    rows = [
        {
            "score": score,
            "images": images,
            "width": width,
            "model_s": seconds["model"],
            "detector_s": seconds[score],
            "detector_over_model": seconds[score] / seconds["model"],
            "score_s": alone[score],
            "score_over_model": alone[score] / seconds["model"],
        }
        for score in detectors
    ]
    for row in rows:
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200_000, help="number of training features")
    parser.add_argument("--test_samples", type=int, default=20_000, help="number of test features, and of unknown ones")
    parser.add_argument("--feature_dim", type=int, default=512)
    parser.add_argument("--num_classes", type=int, default=10)
    parser.add_argument("--images", type=int, default=128, help="batch size for the ResNet-18")
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage of the ResNet-18")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    problem = Problem(options.samples, options.test_samples, options.feature_dim, options.num_classes)
    rows = [*compare(problem), *overhead(options.images, options.width, options.repeats)]
    write("ood", rows, "scikit-learn", folder=options.folder)


if __name__ == "__main__":
    main()
