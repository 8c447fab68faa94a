"""Provenance of a result in addition to its settings: versions, machine, command, time and memory."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from neuralcollapse.lab.untrusted import load_yaml, without_secrets

_PACKAGES = (
    "torch",
    "torchmetrics",
    "lightning",
    "datasets",
    "numpy",
    "scikit-learn",
    "pandas",
    "pyarrow",
    "pillow",
    "safetensors",
    "matplotlib",
)


def environment(folder: Path) -> dict[str, Any]:
    """Return versions, machine and command for the environment of a run folder."""
    import torch

    return {
        "neuralcollapse": version("neuralcollapse"),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "command": command(sys.argv, folder),
    }


def start(folder: Path) -> dict[str, Any]:
    """Return time, command, and versions that affect results, for a run that starts or resumes."""
    versions = {"neuralcollapse": version("neuralcollapse"), "torch": _version("torch")}
    return {"time": now(), "command": command(sys.argv, folder), **versions}


def command(arguments: Sequence[str], folder: Path) -> str:
    """Return the command line with absolute paths relative to the folder and without secrets.

    Args:
        arguments: Program and arguments.
        folder: Folder of the run.

    Examples:
        >>> command(["/usr/bin/neuralcollapse", "train", "--data=/home/me/mnist"], Path("/home/me/runs/one"))
        'neuralcollapse train --data=../../mnist'
    """
    shown = [Path(arguments[0]).name]
    before = ""
    for argument in arguments[1:]:
        flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        name = (flag or before).lstrip("-")
        shown.append(argument if flag and not equals else f"{flag}{equals}{_shown_value(value, name, folder)}")
        before = argument if argument.startswith("--") and not equals else ""
    return " ".join(shown)


def shown_settings(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return settings without secrets and with absolute paths relative to the folder of the run."""
    shown: dict[str, Any] = without_secrets(dict(settings))
    return {name: relative_path(value, folder) for name, value in shown.items()}


def relative_path(value: Any, folder: Path) -> Any:
    """Return an absolute path relative to a folder, any other value unchanged."""
    return os.path.relpath(value, folder) if isinstance(value, str) and os.path.isabs(value) else value


def _shown_value(value: str, name: str, folder: Path) -> str:
    if "." in name or re.search(r"[\[{:]", value):  # an entry of a mapping, or a whole mapping
        with contextlib.suppress(ValueError):
            parsed = load_yaml(value)
            safe = without_secrets(parsed, name.rpartition(".")[2])
            value = value if safe == parsed else safe if isinstance(safe, str) else json.dumps(safe)
    return str(relative_path(without_secrets(value, name), folder))


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def forget_peak_memory() -> None:
    """Reset `peak_memory`, if the system supports it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # not on every system
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """Return the peak memory in MiB of the accelerator, or of this process if there is no accelerator."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        lines = Path("/proc/self/status").read_text().split("\n")
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
    except (OSError, StopIteration):  # not on every system
        import resource

        unit = 1 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _cpu() -> str | None:
    """Return the model of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n")
    except OSError:  # not on every system
        return platform.processor() or None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def _git_commit() -> str | None:
    """Return the commit of this package if it runs from a checkout, with a mark if files differ from it.

    The result is cached, because a process continues to run the code that it has imported.
    """
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
