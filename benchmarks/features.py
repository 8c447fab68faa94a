"""Features in a file: time and memory of `measure_features` compared with two passes of NumPy, on one thread.

NumPy reads the memory-mapped file block by block in fp64: one pass for the class means, and one for the within-class
scatter. From these it computes three metrics: the trace quotient of NC1, the distance of NC2 to a simplex ETF, and the
duality of NC3. `measure_features` computes all metrics of moments, and with `per_sample` also those of single samples.

Each way runs in a separate process, which reports its greatest anonymous memory. Pages of the mapped file are not
counted, because the system frees them when it needs memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import RESULTS, write

from neuralcollapse.metrics import MeasureOptions, measure_features

COMPARED = ("nc1_quotient", "nc2_etf_means", "nc3_duality")
BLOCK = 16_384


def create(folder: Path, samples: int, dim: int, classes: int) -> None:
    """Write features.npy (N, d) in fp32, labels.npy and weight.npy."""
    generator = np.random.default_rng(0)
    means = generator.normal(size=(classes, dim)).astype(np.float32)
    labels = generator.permutation(np.arange(samples) % classes)
    features = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float32, (samples, dim))
    for start in range(0, samples, BLOCK):
        of_block = labels[start : start + BLOCK]
        features[start : start + BLOCK] = means[of_block] + generator.normal(size=(len(of_block), dim))
    features.flush()
    np.save(folder / "labels.npy", labels)
    np.save(folder / "weight.npy", means + 0.1 * generator.normal(size=means.shape).astype(np.float32))


def two_passes(folder: Path) -> dict[str, float]:
    features = np.load(folder / "features.npy", mmap_mode="r")
    labels, weight = np.load(folder / "labels.npy"), np.load(folder / "weight.npy").astype(np.float64)
    classes, dim = weight.shape
    counts, sums = np.bincount(labels, minlength=classes), np.zeros((classes, dim))
    for start in range(0, len(features), BLOCK):
        of_block = labels[start : start + BLOCK]
        order = np.argsort(of_block, kind="stable")
        present, first = np.unique(of_block[order], return_index=True)
        sums[present] += np.add.reduceat(features[start : start + BLOCK][order].astype(np.float64), first)
    means = sums / counts[:, None]
    scatter = np.zeros((dim, dim))
    for start in range(0, len(features), BLOCK):
        deviations = features[start : start + BLOCK] - means[labels[start : start + BLOCK]]
        scatter += deviations.T @ deviations
    centred = means - counts @ means / len(features)
    within, between = scatter / len(features), centred.T @ centred / classes
    ideal = (np.eye(classes) - 1 / classes) / np.sqrt(classes - 1)
    gram, duality = centred @ centred.T, weight @ centred.T
    return {
        "nc1_quotient": float(np.trace(within) / np.trace(between)),
        "nc2_etf_means": float(np.linalg.norm(gram / np.linalg.norm(gram) - ideal)),
        "nc3_duality": float(np.linalg.norm(duality / np.linalg.norm(duality) - ideal)),
    }


def measured(folder: Path, *, per_sample: bool) -> dict[str, float]:
    sources = (folder / f"{name}.npy" for name in ("features", "labels", "weight"))
    return measure_features(*sources, options=MeasureOptions(per_sample=per_sample), progress=False).metrics


WAYS: dict[str, Callable[[Path], dict[str, float]]] = {
    "numpy, two passes": two_passes,
    "measure_features, per_sample=False": lambda folder: measured(folder, per_sample=False),
    "measure_features": lambda folder: measured(folder, per_sample=True),
}


def anonymous_memory() -> float:
    """Return the anonymous memory of this process in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / 1e9


def run_way(way: str, folder: Path) -> dict[str, Any]:
    """Return the seconds, the growth of memory and the metrics of a way, run in this process."""
    before, stop = anonymous_memory(), threading.Event()
    greatest = [before]

    def watch() -> None:
        while not stop.wait(0.02):
            greatest[0] = max(greatest[0], anonymous_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    metrics = WAYS[way](folder)
    seconds = time.perf_counter() - start
    stop.set()
    thread.join()
    return {"seconds": seconds, "memory_gb": greatest[0] - before, "metrics": metrics}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2_000_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for features.json")
    parser.add_argument("--way", choices=WAYS, help="run only this way, on the files in --files, and print JSON")
    parser.add_argument("--files", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.way:
        print(json.dumps(run_way(options.way, options.files)))
        return
    rows, reference = [], {}
    with tempfile.TemporaryDirectory() as name:
        create(Path(name), options.samples, options.dim, options.classes)
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way, "--files", name]
            result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            metrics = result.pop("metrics")
            reference = reference or metrics
            difference = max(abs(metrics[metric] / reference[metric] - 1) for metric in COMPARED)
            rows.append({"way": way, **result, "metrics": len(metrics), "difference": difference})
            print(f"{way:36} {result['seconds']:8.1f} s {result['memory_gb']:8.2f} GB {len(metrics):4} metrics")
    sizes = {"samples": options.samples, "dim": options.dim, "classes": options.classes}
    write("features", [sizes | row for row in rows], "numpy", folder=options.out)


if __name__ == "__main__":
    main()
