"""Devices, ranks and processes of training: checks of availability, lightning Fabric, and parallel runs."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers.logger import Logger
from lightning.fabric.plugins.precision import MixedPrecision, Precision
from lightning.fabric.strategies.ddp import DDPStrategy

from neuralcollapse.lab.config import RunConfig
from neuralcollapse.lab.process import TERMINATED, LostRank, launched_ranks, local_rank, on_sigterm, terminate

_SECONDS_TO_END = 10.0


def training_device(config: RunConfig) -> torch.device:
    """Return the device of this rank, after checking that this machine supports the settings of a run.

    Raises:
        ValueError: if the device, the number of ranks or the precision is not available.
    """
    device = resolve_device(config.device, config.ranks)
    launched = launched_ranks()
    if launched is not None and launched != config.ranks:
        raise ValueError(f"devices x num_nodes must be the {launched} ranks that were launched, got {config.ranks}")
    available = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device.type, config.devices)
    if config.devices > available:
        raise ValueError(f"devices must be at most the {available} of {device.type}, got {config.devices}")
    if config.sync_batchnorm and device.type != "cuda":
        raise ValueError(f"sync_batchnorm needs device cuda, which alone supports it in torch, got {device.type}")
    precisions = {"cpu": ("32", "bf16-mixed"), "cuda": ("32", "16-mixed"), "mps": ("32",)}[device.type]
    if _computes_in_bfloat16(device) and device.type == "cuda":
        precisions += ("bf16-mixed",)
    if config.precision not in (*precisions, "auto"):
        raise ValueError(
            f"precision must be supported by device {device.type} ({', '.join(precisions)}), got {config.precision!r}"
        )
    return device


def resolve_precision(
    name: Literal["32", "bf16-mixed", "16-mixed", "auto"], device: torch.device
) -> Literal["32", "bf16-mixed", "16-mixed"]:
    """Return the precision for a name; ``auto`` is ``bf16-mixed`` if the device has instructions for it, else 32."""
    if name == "auto":
        return "bf16-mixed" if _computes_in_bfloat16(device) else "32"
    return name


def _computes_in_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions for bfloat16 products; CPUs without AMX or AVX512_BF16 have not."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def resolve_device(name: str, ranks: int = 1) -> torch.device:
    """Return the device for a name, which with several ranks is that of this rank; ``auto`` prefers an accelerator.

    Raises:
        ValueError: if the device is not available.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, is_available in available.items() if is_available)
    if not available.get(name):
        names = ", ".join(kind for kind in available if available[kind])
        raise ValueError(f"device must be auto or an available device ({names}), got {name!r}")
    return torch.device(name, local_rank()) if name == "cuda" and ranks > 1 else torch.device(name)


class _Autocast(MixedPrecision):
    """Autocast that leaves inputs in 32 bits: lightning rounds them, and first layers may amplify the rounding."""

    def convert_input(self, data: Any) -> Any:
        return data


@contextmanager
def launched_fabric(config: RunConfig, device: torch.device, loggers: Sequence[Logger] = ()) -> Iterator[Fabric]:
    """Start the ranks of a run, unless torchrun or SLURM has started them, and end the ranks that were started here.

    Raises:
        LostRank: if another rank cannot be reached or is lost.
        ValueError: if ``torch.compile`` fails, or the port of the first rank is taken.
    """
    name = resolve_precision(config.precision, device)
    precision = Precision() if name == "32" else _Autocast(name, device.type)
    with quiet_lightning():
        fabric = Fabric(
            accelerator=device.type,
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=DDPStrategy(broadcast_buffers=False) if config.ranks > 1 else "auto",
            plugins=precision,
            loggers=list(loggers),
        )
        try:
            fabric.launch()
            yield fabric
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise ValueError(f"compile must be false, because torch.compile fails: {error}") from error
        except RuntimeError as error:
            failure = _failure_of_ranks(error) if config.ranks > 1 else None
            if failure is None:
                raise
            raise failure from error
        finally:
            _end_launched(fabric)


def _failure_of_ranks(error: RuntimeError) -> ValueError | None:
    """Return the error for ranks that cannot be reached, in one line; None if the error has another cause."""
    message = str(error)
    if "EADDRINUSE" in message:
        return ValueError(f"MASTER_PORT must be a free port, but {os.environ.get('MASTER_PORT')} is in use")
    words = ("Connection", "connect", "timed out", "Timed out", "peer")
    if not isinstance(error, torch.distributed.DistError) and not any(word in message for word in words):
        return None
    reason = re.sub(r"^\[\S+\] ", "", message.partition(". ")[0])  # without the line of the C++ source
    return LostRank(f"ranks: one rank is lost or cannot be reached: {reason}")


def _end_launched(fabric: Fabric) -> None:
    """Wait for the ranks that Fabric started, so that each can print why it ends; kill them after a time limit."""
    processes = getattr(fabric.strategy.launcher, "procs", [])
    waiting, processes[:] = list(processes), []  # otherwise lightning kills this process soon after one of them failed
    until = time.monotonic() + _SECONDS_TO_END
    for process in waiting:
        try:
            process.wait(max(0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Hide tips and warnings of lightning; errors are shown."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def in_processes(
    target: Callable[..., None], tasks: Mapping[str, tuple[Any, ...]], number: int
) -> Generator[tuple[str, ValueError | None], None, None]:
    """Run tasks in separate processes, the given number at a time.

    On a CPU, the threads of this process are divided among the processes; with cuda, each process uses one accelerator,
    in turn. If this process or the loop over the results ends for any reason, the processes are ended by SIGTERM. An
    executor of `concurrent.futures` is not used, because it fails all tasks if one process dies.

    Args:
        target: Function at the top level of a module, called with the values of a task. If it raises a ValueError or
            OSError, only this task fails.
        tasks: Arguments of each task by name.
        number: Number of processes at a time.

    Yields:
        The name of each task when it ends, and its failure, or None.

    Raises:
        Terminated: if SIGTERM ended one of the processes.
    """
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        multiprocessing.set_forkserver_preload([target.__module__])  # imported once for all processes
    threads, devices = max(1, torch.get_num_threads() // number), _cuda_devices()
    waiting, slots = list(tasks), list(range(number))
    running: dict[Any, tuple[str, int, BaseProcess]] = {}
    try:
        while waiting or running:
            while waiting and slots:
                name, slot = waiting.pop(0), slots.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                device = devices[slot % len(devices)] if devices else None
                process = context.Process(target=_carry_out, args=(sender, threads, device, target, tasks[name]))
                process.start()
                sender.close()
                running[receiver] = (name, slot, process)
            for receiver in connection.wait(list(running)):
                name, slot, process = running.pop(receiver)
                slots.append(slot)
                failure = _failure(receiver, process)
                yield name, None if failure is None else ValueError(failure)
    finally:
        for *_, process in running.values():
            process.terminate()
        for *_, process in running.values():
            process.join()


def _failure(receiver: Any, process: BaseProcess) -> str | None:
    """Return the failure of a process, or None."""
    try:
        message: str | None = receiver.recv()
    except EOFError:
        message = None
    process.join()
    if process.exitcode == TERMINATED:
        terminate()
    return f"its process ended with exit code {process.exitcode}" if process.exitcode else message


def _carry_out(
    sender: connection.Connection, threads: int, device: str | None, target: Callable[..., None], task: tuple[Any, ...]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent process ends this one
    with on_sigterm(terminate):
        threading.Thread(target=_end_with_parent, daemon=True).start()
        torch.set_num_threads(threads)
        if device is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = device
        try:
            target(*task)
        except (ValueError, OSError) as error:
            sender.send(str(error))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def _cuda_devices() -> list[str]:
    """Return the names of cuda accelerators as in CUDA_VISIBLE_DEVICES."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
