"""Tasks in processes of their own, so many at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Mapping
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from neuralcollapse.lab.stopping import TERMINATED, on_sigterm, terminate


def in_processes(
    target: Callable[..., None], tasks: Mapping[str, tuple[Any, ...]], number: int
) -> Generator[tuple[str, ValueError | None], None, None]:
    """Carry out tasks, each in a process of its own.

    On a CPU each has as many threads as this process divided by their number; of the accelerators of cuda each sees
    one, in turn. Whatever ends this process, or the loop over what is yielded, ends them by SIGTERM.

    Args:
        target: What is called, with the values of a task; at the top of a module. Its ValueError or OSError fails that
            task alone.
        tasks: By name.
        number: How many at a time.

    Yields:
        Each task's name as it ends, and what it failed with, or None.

    Raises:
        Terminated: SIGTERM ended one of them.
    """
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        multiprocessing.set_forkserver_preload([target.__module__])  # imported once for all
    threads, devices = max(1, torch.get_num_threads() // number), _devices()
    waiting, places = list(tasks), list(range(number))
    running: dict[Any, tuple[str, int, BaseProcess]] = {}
    try:
        while waiting or running:
            while waiting and places:
                name, place = waiting.pop(0), places.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                own = devices[place % len(devices)] if devices else None
                process = context.Process(target=_carry_out, args=(sender, threads, own, target, tasks[name]))
                process.start()
                sender.close()
                running[receiver] = (name, place, process)
            for receiver in connection.wait(list(running)):
                name, place, process = running.pop(receiver)
                places.append(place)
                failure = _failure(receiver, process)
                yield name, None if failure is None else ValueError(failure)
    finally:
        for *_, process in running.values():
            process.terminate()
        for *_, process in running.values():
            process.join()


def _failure(receiver: Any, process: BaseProcess) -> str | None:
    """What a process failed with, or None."""
    try:
        told: str | None = receiver.recv()
    except EOFError:
        told = None
    process.join()
    if process.exitcode == TERMINATED:
        terminate()
    return f"its process ended with exit code {process.exitcode}" if process.exitcode else told


def _carry_out(
    sender: connection.Connection, threads: int, device: str | None, target: Callable[..., None], task: tuple[Any, ...]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal: the first one ends these
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


def _devices() -> list[str]:
    """The accelerators of cuda that are there, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
