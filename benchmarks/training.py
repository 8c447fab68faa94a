"""Time of an epoch of a run, compared with a bare loop of the same operations, in turns, on one thread.

The bare loop has the same batches, model, loss, optimiser and schedule. It computes no training metrics, and does not
log, check or save. There are two cases: the convolutional network on the embedded digits, and a ResNet-18 on 4,000
images of MNIST, which is read from NEURALCOLLAPSE_DATA, else ../shared/data. The time excludes what the run does at
the end of an epoch (tables, measuring, checkpoint).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from _common import data_root, medians, write
from torch.nn.functional import cross_entropy

from neuralcollapse.lab import RunConfig, RunFolder, load_data
from neuralcollapse.lab.training.run import Run


class Timed(Run):
    """A run that stays in its first epoch, which `epoch` trains again and again."""

    def start(self, folder: RunFolder) -> None:
        """Set up everything that an epoch needs, by a training with empty epochs."""
        self._train_epoch, epoch = (lambda *_: None), self._train_epoch  # type: ignore[method-assign]
        self._end_epoch = lambda *_: None  # type: ignore[method-assign]
        self.train(folder)
        self._train_epoch = epoch  # type: ignore[method-assign]

    def epoch(self) -> None:
        """Train for an epoch as a run does."""
        self._train_epoch(1, 0)
        self.log.end()

    def bare_epoch(self) -> None:
        """Train for an epoch by forward, loss, backward and step alone."""
        backbone, head = self.trained.model.model, self.trained.model.head
        for images, targets in self.batches(1):
            features, weight, bias = head.prepare(backbone(images), targets)
            loss = cross_entropy(head.decide(features, weight, bias), targets)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self.schedule is not None:
                self.schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases: dict[str, dict[str, Any]] = {"convnet on the digits": {}}
    mnist = data_root() / "mnist"
    if mnist.exists():
        cases["resnet18 on mnist"] = {"data": str(mnist), "backbone": "resnet18", "train_samples": 4000}
    rows = []
    for name, settings in cases.items():
        config = RunConfig(device="cpu", epochs=1000, **settings)
        run = Timed(config, load_data(config, batch_size=config.batch_size, progress=False))
        with tempfile.TemporaryDirectory() as path:
            folder = RunFolder(Path(path) / "run")
            folder.start(config.in_force())
            run.start(folder)
            seconds = medians({"run": run.epoch, "bare": run.bare_epoch}, repeats=options.repeats)
        rows.append({"case": name, "run_s": seconds["run"], "bare_s": seconds["bare"]})
        rows[-1]["run_over_bare"] = seconds["run"] / seconds["bare"]
        print(rows[-1], flush=True)
    write("training", rows)


if __name__ == "__main__":
    main()
