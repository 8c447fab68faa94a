"""Time of an epoch of the recipe fast-cifar10-small, compared with a bare script of the same network and optimiser.

The bare script is written like fast training codes. All images are standardised, padded and mirrored once. Each epoch
crops and permutes all of them at once, then runs forward, loss, backward and step in one loop, without metrics or
checks. Run and script take turns. Both train on the first images of CIFAR-10, which is read from NEURALCOLLAPSE_DATA,
else ../shared/data, in the precision of the recipe on this machine, which is recorded in the row.

With measuring, the epoch of the run includes the measurement of both splits, and that of the script the forward passes
over both. The share of convolutions is that of the processor time of the run, from torch's profiler.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import data_root, medians, write
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.profiler import ProfilerActivity, profile
from training import Timed

from neuralcollapse.lab import RunConfig, RunFolder, load_data
from neuralcollapse.lab.data.images import ImageData
from neuralcollapse.lab.models.backbones import FastConvNet
from neuralcollapse.lab.recipes import load_recipe
from neuralcollapse.lab.training.distributed import resolve_precision

_CONVOLUTIONS = ("aten::mkldnn_convolution", "aten::convolution_backward", "aten::cudnn_convolution")


class BareScript:
    """Training as in the run, written as one script.

    Args:
        data: Data to train on.
        config: Settings of the run that it is compared with.
        precision: Precision of that run, resolved.
    """

    def __init__(self, data: ImageData, config: RunConfig, precision: str) -> None:
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
        self.batch_size, widths = config.batch_size, (config.backbone_options or {})["widths"]
        images = [split.images.float() for split in (data.train, data.test)]
        mean, std = images[0].mean((0, 2, 3), keepdim=True), images[0].std((0, 2, 3), keepdim=True)
        self.train, self.test = (((one - mean) / std).contiguous(memory_format=torch.channels_last) for one in images)
        self.labels = data.train.labels
        mirrored = torch.rand(len(self.train)) < 0.5
        start = torch.where(mirrored[:, None, None, None], self.train.flip(-1), self.train)
        self.padded = pad(start, (2,) * 4, mode="reflect")
        whitening = nn.Conv2d(3, 24, 2)
        whitening.weight.requires_grad_(False)
        self.net = nn.Sequential(
            *(whitening, nn.GELU()),
            *(layer for pair in zip([24, *widths], widths, strict=False) for layer in _stage(*pair)),
            *(nn.MaxPool2d(3), nn.Flatten(), nn.Linear(widths[-1], 10, bias=False)),
        ).to(memory_format=torch.channels_last)
        shifts = [module.bias for module in self.net if isinstance(module, nn.BatchNorm2d)]
        others = [
            one for one in self.net.parameters() if one.requires_grad and all(one is not shift for shift in shifts)
        ]
        rate, decay, factor = config.lr or 0.0, config.weight_decay or 0.0, 64
        groups: list[dict[str, Any]] = [
            {"params": others, "lr": rate, "weight_decay": decay},
            {"params": shifts, "lr": factor * rate, "weight_decay": decay / factor},
        ]
        self.optimizer = torch.optim.SGD(groups, momentum=config.momentum or 0.0, nesterov=True)
        steps = config.epochs * -(-len(self.train) // self.batch_size)
        factors = np.interp(np.arange(steps + 1), [0, 0.23 * steps, steps], [0.2, 1, 0.07])
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: float(factors[min(step, steps)]))
        self.epochs = 0

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Crop and mirror all images, then yield them in random order."""
        images = torch.empty_like(self.train)
        shifts = torch.randint(5, (len(images), 2))
        for top in range(5):
            for left in range(5):
                chosen = (shifts == torch.tensor([top, left])).all(1)
                images[chosen] = self.padded[chosen, :, top : top + 32, left : left + 32]
        if self.epochs % 2:
            images = images.flip(-1)
        self.epochs += 1
        for indices in torch.randperm(len(images)).split(self.batch_size):
            yield images[indices], self.labels[indices]

    def epoch(self) -> None:
        """Train for an epoch."""
        self.net.train()
        for images, labels in self.batches():
            with self.autocast:
                logits = self.net(images)
            loss = cross_entropy(logits.float() / 9, labels, label_smoothing=0.2)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()

    @torch.no_grad()
    def evaluate(self) -> None:
        """Compute the logits of both splits."""
        self.net.eval()
        for split in (self.train, self.test):
            for images in split.split(512):
                self.net(images)


def _stage(before: int, width: int) -> Iterator[nn.Module]:
    yield nn.Conv2d(before, width, 3, padding=1, bias=False)
    yield nn.MaxPool2d(2)
    yield from _norm(width)
    yield nn.Conv2d(width, width, 3, padding=1, bias=False)
    yield from _norm(width)


def _norm(width: int) -> Iterator[nn.Module]:
    norm = nn.BatchNorm2d(width, eps=1e-12, momentum=0.4)
    norm.weight.requires_grad_(False)
    yield norm
    yield nn.GELU()


def convolution_share(run: Timed) -> float:
    """Return the share of convolutions in the processor time of an epoch."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run.epoch()
    times = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    return sum(times.get(name, 0.0) for name in _CONVOLUTIONS) / sum(times.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=5000, help="number of training images")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = load_recipe("fast-cifar10-small").settings
    small = {"train_samples": options.images, "test_samples": options.images // 5, "epochs": 1000}
    config = RunConfig(**recipe | small | {"data": str(data_root() / "cifar10"), "device": "cpu"})
    data = load_data(config, progress=False)
    precision = resolve_precision(config.precision, torch.device("cpu"))
    run, bare = Timed(config, data), BareScript(data, config, precision)
    kernels = [one for one in run.trained.modules() if isinstance(one, FastConvNet)]
    assert sum(p.numel() for p in kernels[0].parameters()) + 1280 == sum(p.numel() for p in bare.net.parameters())
    with tempfile.TemporaryDirectory() as path:
        folder = RunFolder(Path(path) / "run")
        folder.start(config.in_force())
        run.start(folder)

        def run_and_measure() -> None:
            run.epoch()
            run._measure(1)

        def script_and_evaluate() -> None:
            bare.epoch()
            bare.evaluate()

        functions = {"run": run.epoch, "script": bare.epoch}
        functions |= {"run_with_measuring": run_and_measure, "script_with_forward_passes": script_and_evaluate}
        seconds = medians(functions, repeats=options.repeats)
        share = convolution_share(run)
    row: dict[str, Any] = {
        "images": options.images,
        "precision": precision,
        **{f"{name}_s": value for name, value in seconds.items()},
    }
    row |= {
        "run_over_script": seconds["run"] / seconds["script"],
        "measured_run_over_script": seconds["run_with_measuring"] / seconds["script"],
        "measured_run_over_script_with_forward_passes": seconds["run_with_measuring"]
        / seconds["script_with_forward_passes"],
        "share_of_convolutions": share,
    }
    print(row)
    write("fast", [row])


if __name__ == "__main__":
    main()
