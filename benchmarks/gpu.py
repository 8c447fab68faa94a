"""Speed and accuracy on a CUDA device: heads, solves, metrics and training, unattended, in less than 25 minutes.

Every section runs in a separate process. Before it starts, the script prints what it needs: devices, free device
memory, the folder of CIFAR-10 (in NEURALCOLLAPSE_DATA, else ../shared/data) and the approximate number of minutes. If
something is missing, or the section does not fit into the budget, it is skipped with the reason. If a section fails,
its error is recorded. results/gpu-DEVICE.json is rewritten after each section.

`--tiny` runs every section at tiny sizes, with the embedded digits instead of CIFAR-10, also on a CPU.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, data_root, write
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import neuralcollapse
from neuralcollapse import (
    ClassMeanClassifier,
    FixedETFClassifier,
    NearestETFClassifier,
    NearestFrameClassifier,
    measure,
    nearest_simplex_etf,
)
from neuralcollapse.lab import RunConfig, RunFolder, load_data, single_run, train_runs
from neuralcollapse.lab.data.images import ImageData
from neuralcollapse.lab.models.backbones import evaluation_layout
from neuralcollapse.lab.models.build import build_model
from neuralcollapse.lab.results.tables import read_table
from neuralcollapse.lab.training.run import Run
from neuralcollapse.metrics import MeasureOptions

Row = dict[str, Any]

PUBLISHED = "papyan2020-cifar10"
# Recipes with the test accuracy that each is to reach.
FAST = {"fast-cifar10-small": 0.94, "fast-cifar10-medium": 0.94, "fast-cifar10-large": 0.96}
METHODS = ("standard", "fixed", "implicit", "means")
BATCH = 128
# Steps that are checked for waits, after those that warm up.
CHECKED_STEPS = range(10, 13)
# Part of the message of torch where the host waits for the device.
_WAITED = "called a synchronizing"
# Largest difference between the weights and losses of one rank and of two that counts as rounding.
ROUNDING = 1e-3
# A section that takes this many times its estimate, and at least the minutes that follow, is stopped.
_PATIENCE, _LEAST_MINUTES = 2, 5


@dataclass(frozen=True)
class Bench:
    """Device, sizes and data of all sections.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        tiny: Whether sizes are tiny, and the data the embedded digits.
        cifar10: Folder of CIFAR-10.
    """

    device: str
    tiny: bool
    cifar10: Path

    @property
    def on_cuda(self) -> bool:
        return self.device == "cuda"

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.on_cuda:
            torch.cuda.synchronize()

    def seconds(self, function: Callable[[], Any], calls: int = 1) -> float:
        """Return the seconds of calls one after another, from an idle device to an idle one."""
        self.synchronise()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        self.synchronise()
        return time.perf_counter() - start

    def seconds_per_call(self, function: Callable[[], Any]) -> float:
        """Return the median over five loops of the seconds per call; the device is awaited at the end of a loop only.

        A loop takes a tenth of a second. A function that takes more than a second is timed once.
        """
        function()
        once = self.seconds(function)
        if once > 1:
            return once
        calls = max(1, math.ceil((0.002 if self.tiny else 0.1) / once))
        return statistics.median(self.seconds(function, calls) / calls for _ in range(5))

    def images(self) -> dict[str, Any]:
        """Return the settings of the data to train on: CIFAR-10, or a few digits in its format."""
        if not self.tiny:
            return {"data": str(self.cifar10)}
        return {"data": "digits", "image_size": 32, "channels": 3, "train_samples": 32, "test_samples": 16}


@dataclass(frozen=True)
class Section:
    """A part of the benchmark, and what it needs.

    Attributes:
        rows: Generator of its results.
        minutes: Estimate for one modern accelerator.
        gigabytes: Free device memory.
        recipe: Name of the recipe that it trains, on CIFAR-10.
        devices: Number of devices.
    """

    rows: Callable[[Bench], Iterator[Row]]
    minutes: float
    gigabytes: float = 1
    recipe: str | None = None
    devices: int = 1

    def needs(self, bench: Bench) -> str:
        """Return what it needs, in words."""
        devices = "1 CUDA device" if bench.on_cuda else "a CPU"
        devices = f"{self.devices} CUDA devices" if self.devices > 1 else devices
        memory = [f"{self.gigabytes:g} GB of device memory"] if bench.on_cuda else []
        data = [] if self.recipe is None else [f"recipe {self.recipe}", bench.images()["data"]]
        minutes = "less than a minute" if bench.tiny else f"about {self.minutes:g} min"
        return ", ".join([devices, *memory, *data, minutes])

    def missing(self, bench: Bench) -> str | None:
        """Return what is missing, or None."""
        devices = torch.cuda.device_count() if bench.on_cuda else 0
        if self.devices > max(1, devices):
            return f"needs cuda: {self.devices} devices, and this machine has {devices}"
        if self.recipe is not None and not bench.tiny and not bench.cifar10.is_dir():
            return f"CIFAR-10 must be in {bench.cifar10}: set NEURALCOLLAPSE_DATA to the folder that has cifar10"
        free = torch.cuda.mem_get_info()[0] / 1e9 if bench.on_cuda and not bench.tiny else math.inf
        if free < self.gigabytes:
            return f"needs {self.gigabytes:g} GB of free device memory, and {free:.1f} GB are free"
        return None


# --- sections ---------------------------------------------------------------------------------------------------------


def device_facts(bench: Bench) -> Iterator[Row]:
    """Name, versions, capability and memory of the device."""
    facts: Row = {"device": bench.device, "neuralcollapse": neuralcollapse.__version__, "torch": torch.__version__}
    if bench.on_cuda:
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        facts |= {
            "name": properties.name,
            "devices": torch.cuda.device_count(),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": total / 1e9,
            "free_memory_gb": free / 1e9,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        }
        if torch.distributed.is_available() and torch.distributed.is_nccl_available():
            facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    facts["matmul_precision"] = torch.get_float32_matmul_precision()
    yield facts | {"convolutions_in_tf32": bench.on_cuda and torch.backends.cudnn.allow_tf32}


def head_steps(bench: Bench) -> Iterator[Row]:
    """Forward and backward of each head with cross-entropy at batch 128, eager and compiled by default settings."""
    for num_classes, feature_dim in [(4, 16)] if bench.tiny else [(10, 512), (100, 512), (1000, 2048)]:
        torch.manual_seed(0)
        features = torch.randn(BATCH, feature_dim, device=bench.device, requires_grad=True)
        targets = torch.arange(BATCH, device=bench.device) % num_classes
        code = torch.randn(num_classes, max(1, (num_classes - 1) // 2))
        heads = {
            "linear": nn.Linear(feature_dim, num_classes),
            "fixed": FixedETFClassifier(feature_dim, num_classes),
            "nearest_etf": NearestETFClassifier(feature_dim, num_classes),
            "nearest_frame": NearestFrameClassifier(feature_dim, num_classes, frame=code),
            "class_means": ClassMeanClassifier(feature_dim, num_classes),
        }
        for name, head in heads.items():
            labels = () if name == "linear" else (targets,)
            forward = partial(_forward, head.to(bench.device), features, targets, labels)
            row = {"num_classes": num_classes, "feature_dim": feature_dim, "batch": BATCH, "head": name}
            row["eager_ms"] = 1e3 * bench.seconds_per_call(partial(_step, forward))
            row |= _or_error(_compiled_step, bench, forward)
            yield row | {"svd_fallbacks": getattr(head, "svd_fallbacks", 0)}


def _forward(head: nn.Module, features: Tensor, targets: Tensor, labels: tuple[Tensor, ...]) -> Tensor:
    return cross_entropy(head(features, *labels), targets)


def _step(forward: Callable[[], Tensor]) -> None:
    forward().backward()


def _compiled_step(bench: Bench, forward: Callable[[], Tensor]) -> Row:
    """Return the time of a compiled step, that of compiling it, and the difference of its loss to the eager one."""
    torch.compiler.reset()  # else the limit of recompilations makes later heads eager, silently
    backend = "inductor" if bench.on_cuda else "aot_eager"  # the latter needs no C++ compiler
    compiled = torch.compile(forward, backend=backend)
    return {
        "backend": backend,
        "compile_s": bench.seconds(partial(_step, compiled)),
        "compiled_ms": 1e3 * bench.seconds_per_call(partial(_step, compiled)),
        "loss_difference": abs(float(compiled().detach()) - float(forward().detach())),
    }


def _or_error(function: Callable[..., Row], *arguments: Any) -> Row:
    """Return the row that a function returns, or its error, so that the other rows of the section follow."""
    try:
        return function(*arguments)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:2000]}


def nearest_etf_solves(bench: Bench) -> Iterator[Row]:
    """The nearest ETF in fp32 by products, by spectral decomposition and by an SVD, against fp64 on the CPU."""
    for num_classes, feature_dim in [(4, 16)] if bench.tiny else [(10, 512), (100, 512), (1000, 2048)]:
        for spread in (1.0, 1e3):
            torch.manual_seed(0)
            orthonormal = torch.linalg.qr(torch.randn(feature_dim, num_classes, dtype=torch.float64))[0].mT
            means = torch.logspace(0, -math.log10(spread), num_classes, dtype=torch.float64)[:, None] * orthonormal
            upstream = torch.randn(num_classes, feature_dim, dtype=torch.float64)
            means, upstream = means.float(), upstream.float()
            reference = _solve("spectral", means.double(), upstream.double())
            singular = torch.linalg.svdvals(means.double() - means.double().mean(0))
            condition = float(singular[0] / singular[-2])
            for method in ("products", "spectral", "svd"):
                row = {"num_classes": num_classes, "feature_dim": feature_dim, "condition": condition, "method": method}
                yield row | _or_error(_timed_solve, bench, method, means, upstream, reference)


def _timed_solve(bench: Bench, method: str, means: Tensor, upstream: Tensor, reference: tuple[Tensor, Tensor]) -> Row:
    """Return times and relative errors of the nearest ETF and its gradient."""
    means, upstream = means.to(bench.device), upstream.to(bench.device)
    etf, gradient = _solve(method, means, upstream)
    return {
        "forward_ms": 1e3 * bench.seconds_per_call(partial(_etf, method, means)),
        "forward_and_backward_ms": 1e3 * bench.seconds_per_call(partial(_solve, method, means, upstream)),
        "relative_error": _relative_error(etf, reference[0]),
        "relative_gradient_error": _relative_error(gradient, reference[1]),
    }


def _etf(method: Any, means: Tensor) -> Tensor:
    """Return the nearest ETF of class means, without a check that waits for the device."""
    if method != "svd":
        return nearest_simplex_etf(means, method=method, check_values=False)
    # The last singular value of centred means is 0: its part is left out.
    left, _, right = torch.linalg.svd(means - means.mean(0), full_matrices=False)
    return math.sqrt(len(means) / (len(means) - 1)) * left[:, :-1] @ right[:-1]


def _solve(method: str, means: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest ETF and the gradient of the means for an upstream gradient."""
    leaf = means.clone().requires_grad_()
    etf = _etf(method, leaf)
    (gradient,) = torch.autograd.grad(etf, leaf, upstream)
    return etf.detach(), gradient


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu().double() - expected).abs().max() / expected.abs().max())


def measuring(bench: Bench) -> Iterator[Row]:
    """`measure` of a ResNet-18 against its forward passes alone, on random images of 32×32 in batches of 512."""
    batch, number = (32, 2) if bench.tiny else (512, 98)
    for stem in ("3x3", "7x7"):
        config = RunConfig(backbone="resnet18", method="linear", stem=stem, width=8 if bench.tiny else 64)
        model = build_model(config, (3, 32, 32), 10).to(bench.device).eval()
        images = torch.randn(batch, 3, 32, 32, device=bench.device)
        batches = [(images, torch.arange(batch, device=bench.device) % 10)] * number
        forward_seconds = bench.seconds_per_call(partial(_forward_all, model, batches))
        for dtype in ("mixed", torch.float64):
            options = MeasureOptions(dtype=dtype, class_scatter=True)
            seconds = bench.seconds_per_call(partial(_measure_all, model, batches, options))
            yield {
                "stem": stem,
                "dtype": str(dtype),
                "images": batch * number,
                "forward_images_per_s": batch * number / forward_seconds,
                "measured_images_per_s": batch * number / seconds,
                "measured_over_forward": seconds / forward_seconds,
            }


@torch.no_grad()
def _forward_all(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    with evaluation_layout(model):
        for images, _ in batches:
            model(images)


def _measure_all(model: Any, batches: list[tuple[Tensor, Tensor]], options: MeasureOptions) -> None:
    with evaluation_layout(model):
        measure(model, batches, classifier=model.head, options=options, progress=False)


class Clocked(Run):
    """A run that keeps the time of each epoch and of each measurement, and the test accuracy."""

    bench: Bench

    def _set_up(self) -> tuple[int, int]:
        self.epochs: list[Row] = []
        return super()._set_up()

    def _train_epoch(self, epoch: int, done: int) -> None:
        train = partial(super()._train_epoch, epoch, done)
        self.epochs.append({"epoch": epoch, "train_s": self.bench.seconds(train)})

    def _measure(self, epoch: int) -> dict[str, float]:
        start = time.perf_counter()
        values = super()._measure(epoch)
        self.epochs[-1] |= {"measure_s": time.perf_counter() - start, "accuracy": values["test/accuracy"]}
        return values


def _clocked_run(bench: Bench, settings: dict[str, Any]) -> tuple[Clocked, Row]:
    """Train a recipe; return the run, and what both kinds of recipes report of it."""
    config = single_run(settings | bench.images() | {"device": bench.device})
    start = time.perf_counter()
    run = Clocked(
        config, load_data(config, batch_size=config.batch_size, progress=False).to(torch.device(bench.device))
    )
    run.bench = bench
    loaded = time.perf_counter()
    with tempfile.TemporaryDirectory() as path:
        folder = RunFolder(Path(path) / "run")
        folder.start(config.in_force())
        run.train(folder)
    train_images = len(run.data.train)
    epoch_seconds = statistics.median(epoch["train_s"] for epoch in run.epochs[1:] or run.epochs)
    return run, {
        "recipe": config.recipe,
        "data": str(run.data),
        "precision": config.precision,
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "load_s": loaded - start,
        "first_epoch_s": run.epochs[0]["train_s"],
        "epoch_s": epoch_seconds,
        "images_per_s": train_images / epoch_seconds,
        "measure_s": statistics.median(epoch["measure_s"] for epoch in run.epochs if "measure_s" in epoch),
        "train_s": sum(epoch["train_s"] for epoch in run.epochs),
        "total_s": time.perf_counter() - start,
        "accuracy": run.accuracy,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if bench.on_cuda else None,
    }


def fast_recipe(bench: Bench, recipe: str) -> Iterator[Row]:
    """A fast recipe to its end: accuracy against seconds of training."""
    run, row = _clocked_run(bench, {"recipe": recipe} | ({"epochs": 1} if bench.tiny else {}))
    target, trained, reached = FAST[recipe], 0.0, None
    for epoch in run.epochs:
        trained += epoch["train_s"]
        if reached is None and epoch.get("accuracy", 0.0) >= target:
            reached = trained
    yield row | {"target": target, "train_s_to_target": reached, "curve": run.epochs}


def published_run(bench: Bench) -> Iterator[Row]:
    """The first epochs of the published run, and the time of all of it, extrapolated."""
    published = single_run({"recipe": PUBLISHED})
    cut = {"epochs": 2, "width": 8} if bench.tiny else {"epochs": 4}
    run, row = _clocked_run(bench, {"recipe": PUBLISHED, "measure_at": 1} | cut)
    measured = sum(published.is_measured(epoch) for epoch in range(1, published.epochs + 1))
    seconds = published.epochs * row["epoch_s"] + measured * row["measure_s"]
    yield row | {
        "published_epochs": published.epochs,
        "published_measurements": measured,
        "extrapolated_hours": seconds / 3600,
        "extrapolated_from_epochs": len(run.epochs),
    }


_WITHOUT_BATCH_NORM = {"backbone": "vit-tiny", "width": 48, "depth": 2}
_RUNS_OF_RANKS: dict[str, dict[str, Any]] = {method: {"method": method} | _WITHOUT_BATCH_NORM for method in METHODS}
_RUNS_OF_RANKS |= {"batch-norm": {"method": "implicit", "backbone": "convnet"}}


def two_ranks(bench: Bench) -> Iterator[Row]:
    """Runs of two ranks over nccl against runs of one, on the digits without TF32."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as path:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        processes = {"one": _train_in_process(bench, path, {"RANKS": "1"})}
        for rank in ("0", "1"):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "GROUP_RANK": "0", "RANKS": "2"}
            ranks |= {"TORCHELASTIC_RUN_ID": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            processes[f"rank{rank}"] = _train_in_process(bench, path, ranks)
        try:
            while any(process.poll() is None for process in processes.values()):
                _check_alive(processes, Path(path))
                time.sleep(0.2)
            _check_alive(processes, Path(path))
        finally:
            for process in processes.values():
                process.kill()
        for name, settings in _RUNS_OF_RANKS.items():
            one, two = (RunFolder(Path(path) / f"{name}-{ranks}") for ranks in (1, 2))
            yield {"run": name, **settings, **_differences(one, two)}


def _differences(*runs: RunFolder) -> Row:
    """Return the greatest differences of losses and weights; accuracies jump where two logits are almost equal."""
    losses = [torch.tensor(read_table(run.training_log)["batch_loss"].tolist()) for run in runs]
    one, two = (torch.load(run.last_checkpoint, map_location="cpu", weights_only=True)["state_dict"] for run in runs)
    differences = {
        "loss_difference": float((losses[0] - losses[1]).abs().max()),
        "weight_difference": max(float((one[key].double() - two[key].double()).abs().max()) for key in one),
    }
    return differences | {"equal": max(differences.values()) < ROUNDING}


def train_for_ranks(path: str, device: str) -> None:
    """Train every run of `two_ranks` as one rank, which the environment describes."""
    ranks = int(os.environ["RANKS"])
    for name, settings in _RUNS_OF_RANKS.items():
        options: dict[str, Any] = settings | {"epochs": 2, "train_samples": 500, "device": device, "devices": ranks}
        if ranks > 1 and settings["backbone"] == "convnet" and device == "cuda":
            options["sync_batchnorm"] = True
        train_runs(RunConfig(**options), f"{path}/{name}-{ranks}", progress=False)


def _train_in_process(bench: Bench, path: str, variables: dict[str, str]) -> subprocess.Popen[bytes]:
    name = f"rank{variables['RANK']}" if "RANK" in variables else "one"
    with (Path(path) / f"{name}.txt").open("wb") as errors:
        return subprocess.Popen(
            [sys.executable, "-c", f"import gpu; gpu.train_for_ranks({path!r}, {bench.device!r})"],
            cwd=Path(__file__).parent,
            env=os.environ | {"NVIDIA_TF32_OVERRIDE": "0"} | variables,
            stdout=errors,
            stderr=errors,
        )


def _check_alive(processes: dict[str, subprocess.Popen[bytes]], path: Path) -> None:
    for name, process in processes.items():
        if process.returncode:
            output = (path / f"{name}.txt").read_text(errors="replace")[-2000:]
            raise RuntimeError(f"process {name} ended with exit code {process.returncode}: {output}")


class Watched(Run):
    """A run in which some training steps, or the batches of those steps, must not wait for the device.

    Attributes:
        part: ``"batch"``, from the end of a step to the next batch; or ``"step"``, all the rest.
        mode: Mode of `torch.cuda.set_sync_debug_mode`; None without CUDA.
        checked: Number of steps that were checked.
    """

    part: str
    mode: str | None
    checked = 0

    def _train_epoch(self, epoch: int, done: int) -> None:
        try:
            super()._train_epoch(epoch, done)
        finally:
            self._watch("", 0)

    def _compute_gradients(self, number: int, *rest: Any, **options: Any) -> Any:
        self._watch("step", number)
        return super()._compute_gradients(number, *rest, **options)

    def _save_and_stop_if_due(self, epoch: int, number: int, **options: Any) -> None:
        self._watch("", number)
        super()._save_and_stop_if_due(epoch, number, **options)
        self._watch("batch", number + 1)

    def _watch(self, part: str, number: int) -> None:
        is_checked = part == self.part and number in CHECKED_STEPS
        self.checked += is_checked
        if self.mode is not None:
            torch.cuda.set_sync_debug_mode(self.mode if is_checked else "default")


def waits(bench: Bench) -> Iterator[Row]:
    """Training steps of each method in a run, under a mode in which torch raises if the host waits for the device."""
    batch = 8 if bench.tiny else 32
    few_steps = {"train_samples": 15 * batch, "test_samples": 5 * batch, "batch_size": batch}
    settings: dict[str, dict[str, Any]] = {"convnet on the digits": few_steps}
    fast = next(iter(FAST))
    if bench.tiny or bench.cifar10.is_dir():
        settings[fast] = {"recipe": fast, **bench.images(), **few_steps}
    for name, given in settings.items():
        for method in METHODS:
            config = single_run(given | {"method": method, "epochs": 1, "device": bench.device})
            data = load_data(config, progress=False).to(torch.device(bench.device))
            for part in ("batch", "step"):
                row = {"run": name, "method": method, "part": part, "steps": len(CHECKED_STEPS)}
                yield row | _or_error(_waits_of, config, data, part)


def _waits_of(config: RunConfig, data: ImageData, part: str) -> Row:
    """Return whether warmed steps wait, and the lines that do."""
    if config.device != "cuda":
        _lines_that_wait(config, data, part, None)
        return {"waits": None, "reason": "needs cuda: the steps ran without the debug mode"}
    lines = _lines_that_wait(config, data, part, "error")
    lines = lines and (_lines_that_wait(config, data, part, "warn") or lines)
    return {"waits": bool(lines), "lines": lines}


def _lines_that_wait(config: RunConfig, data: ImageData, part: str, mode: str | None) -> list[str]:
    """Return the lines of the package at which warmed steps wait: the first in mode ``"error"``, all in ``"warn"``."""
    run = Watched(config, data)
    run.part, run.mode = part, mode
    lines: list[str] = []

    def note(message: Any, *_: Any, **__: Any) -> None:
        if _WAITED in str(message):
            lines.append(_line_of_package(traceback.extract_stack()))

    with tempfile.TemporaryDirectory() as path, warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        folder = RunFolder(Path(path) / "run")
        folder.start(config.in_force())
        try:
            run.train(folder)
        except RuntimeError as error:
            if _WAITED not in str(error):
                raise
            lines.append(_line_of_package(traceback.extract_tb(error.__traceback__)))
    if not lines and run.checked != len(CHECKED_STEPS):
        raise RuntimeError(f"{run.checked} steps were checked in place of {len(CHECKED_STEPS)}")
    return list(dict.fromkeys(lines))


def _line_of_package(stack: traceback.StackSummary) -> str:
    """Return the innermost line of the package in a stack."""
    root = str(Path(neuralcollapse.__file__).parent)
    frame = next((frame for frame in reversed(stack) if frame.filename.startswith(root)), stack[-1])
    return f"{frame.filename.removeprefix(root).lstrip('/')}:{frame.lineno} in {frame.name}: {frame.line}"


SECTIONS = {
    "environment": Section(device_facts, minutes=0.5, gigabytes=0),
    "heads": Section(head_steps, minutes=5),
    "nearest_etf": Section(nearest_etf_solves, minutes=1),
    "metrics": Section(measuring, minutes=1, gigabytes=4),
    "waits": Section(waits, minutes=1.5),
    "two_ranks": Section(two_ranks, minutes=1.5, devices=2),
    "fast_small": Section(partial(fast_recipe, recipe="fast-cifar10-small"), 1, 4, "fast-cifar10-small"),
    "fast_medium": Section(partial(fast_recipe, recipe="fast-cifar10-medium"), 2, 8, "fast-cifar10-medium"),
    "fast_large": Section(partial(fast_recipe, recipe="fast-cifar10-large"), 6, 20, "fast-cifar10-large"),
    "published": Section(published_run, minutes=1.5, gigabytes=4, recipe=PUBLISHED),
}


# --- the command ------------------------------------------------------------------------------------------------------


_INTERRUPTED = "stopped by Ctrl-C or SIGTERM"


def carry_out(sender: Connection, name: str, bench: Bench) -> None:
    """Send the rows of a section from its own process, then how it ended and the reason."""
    os.setpgrp()  # so that the processes that it starts end with it
    try:
        section = SECTIONS[name]
        reason = section.missing(bench)
        if reason is None:
            for row in section.rows(bench):
                sender.send(("row", row))
        sender.send(("done", None) if reason is None else ("skipped", reason))
    except Exception:
        sender.send(("failed", traceback.format_exc()[-4000:]))


def result_of(name: str, bench: Bench, limit: float) -> Row:
    """Run a section in a separate process, which is stopped after ``limit`` seconds; return its record."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["neuralcollapse.lab.training.runs"])  # imported once for all
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=carry_out, args=(sender, name, bench))
    start = time.monotonic()
    process.start()
    sender.close()
    rows: list[Row] = []
    status, reason = "failed", f"stopped after {limit:.0f} s, its limit"
    try:
        while receiver.poll(max(0.0, start + limit - time.monotonic())):
            kind, content = receiver.recv()
            if kind != "row":
                status, reason = kind, content
                process.join(10)
                break
            rows.append(content)
    except EOFError:
        process.join(10)
        reason = f"its process ended with exit code {process.exitcode}"
    except KeyboardInterrupt:
        reason = _INTERRUPTED
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
        process.kill()
        process.join()
    key = {"failed": "error", "skipped": "reason"}.get(status)
    return {
        "section": name,
        "status": status,
        "needs": SECTIONS[name].needs(bench),
        "seconds": time.monotonic() - start,
        **({} if key is None else {key: reason}),
        "results": rows,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="use tiny sizes: less than a minute, also on a CPU")
    parser.add_argument("--budget-minutes", type=float, default=25.0, help="time limit of all sections, 25 by default")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="folder for the JSON file")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("a CUDA device is needed, and torch finds none; --tiny runs tiny sizes on a CPU")
    bench = Bench("cuda" if torch.cuda.is_available() else "cpu", options.tiny, data_root() / "cifar10")
    device = torch.cuda.get_device_name(0) if bench.on_cuda else "cpu"
    name = re.sub(r"[^a-z0-9]+", "-", f"gpu-{device}{'-tiny' if bench.tiny else ''}".lower()).strip("-")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    end = time.monotonic() + 60 * options.budget_minutes
    print(f"{device}: {len(SECTIONS)} sections, at most {options.budget_minutes:g} minutes", flush=True)
    rows: list[Row] = []
    for number, (title, section) in enumerate(SECTIONS.items(), start=1):
        print(f"[{number}/{len(SECTIONS)}] {title}: needs {section.needs(bench)}", flush=True)
        left = end - time.monotonic()
        if left < 60 * section.minutes:
            reason = f"needs about {section.minutes:g} min, and {max(0.0, left) / 60:.1f} min of the budget are left"
            row = {
                "section": title,
                "status": "skipped",
                "needs": section.needs(bench),
                "reason": reason,
                "results": [],
            }
        else:
            row = result_of(title, bench, min(left, 60 * max(_LEAST_MINUTES, _PATIENCE * section.minutes)))
        rows.append(row)
        write(name, rows, folder=options.folder)
        report = row.get("reason") or row.get("error") or f"{row['seconds']:.1f} s, {len(row['results'])} rows"
        print(f"    {row['status']}: {report}", flush=True)
        if row.get("error") == _INTERRUPTED:
            return 130
    return 1 if any(row["status"] == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
