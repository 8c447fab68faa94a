"""Time of measuring, compared with an epoch of training: ResNet-18 on MNIST, (K, d) = (10, 512), batch 128, one thread.

Three parts take turns: an epoch, the complete measurement after it (both splits, records written), and the bare
forward passes over both splits in evaluation mode. MNIST is read from NEURALCOLLAPSE_DATA, else ../shared/data.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from _common import data_root, medians, write

from neuralcollapse.lab import RunConfig, load_data
from neuralcollapse.lab.models.backbones import evaluation_layout
from neuralcollapse.lab.training.objective import Objective
from neuralcollapse.lab.training.run import Run
from neuralcollapse.metrics.measure import measure_splits


def measure(run: Run, folder: Path, repeats: int) -> dict[str, float]:
    objective, trained = Objective(run.config, run.trained.model, run.class_counts), run.trained

    def epoch() -> None:
        trained.train()
        for images, targets in run.batches(1):
            run.optimizer.zero_grad()
            objective(images, targets, len(targets))[0].backward()
            run.optimizer.step()

    def measured() -> None:
        with evaluation_layout(trained):
            measurements = measure_splits(trained, run.evaluation, progress=False, **run.measure_options)
        for split, found in measurements.items():
            found.save(folder / f"{split}.safetensors")

    @torch.no_grad()
    def forward() -> None:
        trained.eval()
        with evaluation_layout(trained):
            for batches in run.evaluation.values():
                for images, _ in batches:
                    trained(images)

    return medians({"epoch": epoch, "measured": measured, "forward": forward}, repeats=repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_samples", type=int, default=6000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for method in ("standard", "implicit"):
        config = RunConfig(
            data=str(data_root() / "mnist"),
            backbone="resnet18",
            method=method,
            train_samples=options.train_samples,
            test_samples=options.train_samples // 6,
        )
        data = load_data(config)
        with tempfile.TemporaryDirectory() as folder:
            seconds = measure(Run(config, data), Path(folder), options.repeats)
        rows.append(
            {"method": method, "train_samples": options.train_samples}
            | {f"{name}_s": value for name, value in seconds.items()}
            | {
                "measured_over_epoch": seconds["measured"] / seconds["epoch"],
                "measured_over_forward": seconds["measured"] / seconds["forward"],
            }
        )
        print(rows[-1], flush=True)
    write("measuring", rows)


if __name__ == "__main__":
    main()
