"""Functions that all benchmarks share: environment, timing, memory, and the file of results."""

from __future__ import annotations

import ctypes
import importlib
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from neuralcollapse._files import write_whole

RESULTS = Path(__file__).parent / "results"


def environment(*packages: str) -> dict[str, Any]:
    """Return the machine and the versions with which the results were measured."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = models[0] if models else processor
    return {
        "date": date.today().isoformat(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: version(package) for package in packages},
    }


def write(name: str, rows: list[dict[str, Any]], *packages: str, folder: Path = RESULTS) -> Path:
    """Write the rows with their environment to NAME.json in the folder, with floats rounded to four digits."""
    path = folder / f"{name}.json"
    text = json.dumps({"environment": environment(*packages), "rows": _rounded(rows)}, indent=1) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text))
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path.name}")
    return path


def _rounded(value: Any) -> Any:
    """Return a value with every float inside it rounded to four digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value


def data_root() -> Path:
    """Return the folder of real data sets: NEURALCOLLAPSE_DATA, else ../shared/data."""
    return Path(os.environ.get("NEURALCOLLAPSE_DATA") or Path(__file__).parents[2] / "shared" / "data")


def medians(functions: dict[str, Callable[[], Any]], *, repeats: int) -> dict[str, float]:
    """Return the median seconds of each function; the functions take turns, after one untimed round."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if round_number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def load_before(checkout: Path) -> ModuleType:
    """Return the package of another checkout, to time both packages in one run."""
    import neuralcollapse

    ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "neuralcollapse"}
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, str(checkout / "src"))
    try:
        before = importlib.import_module("neuralcollapse")
        for name in before.__all__:  # looked up now, because a later look-up would import the modules of this checkout
            setattr(before, name, getattr(before, name))
    finally:
        sys.path.pop(0)
        for name in [name for name in sys.modules if name.split(".")[0] == "neuralcollapse"]:
            del sys.modules[name]
        sys.modules.update(ours)
    if before.__file__ == neuralcollapse.__file__:
        raise SystemExit(f"{checkout} is this checkout")
    return before


def bare_solve(means: torch.Tensor, anchor: torch.Tensor, proximal_weight: float) -> torch.Tensor:
    """Return the nearest ETF without a basis (formulas §1): unbatched, without checks and derivative."""
    count = means.shape[0]
    centred = means - means.mean(0)
    target = centred * (math.sqrt(count - 1) / centred.norm())
    wide = (target + proximal_weight * math.sqrt((count - 1) / count) * anchor).double()
    eigenvalues, vectors = torch.linalg.eigh(wide @ wide.T + 1 / count)
    return (math.sqrt(count / (count - 1)) * ((vectors * eigenvalues.rsqrt()) @ vectors.T @ wide)).to(means.dtype)


def peak_growth(prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> float:
    """Return the growth of the maximum resident set in MB while a function runs in a fresh process.

    The function is the value of ``prepare(*arguments)``.

    Linux only: the high-water mark is reset after the preparation.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_growth, (prepare, arguments))


def _peak_growth(prepare: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> float:
    work = prepare(*arguments)
    ctypes.CDLL(None).malloc_trim(0)  # memory freed by the preparation would not be counted
    Path("/proc/self/clear_refs").write_text("5")
    before = _high_water_mark()
    work()
    return (_high_water_mark() - before) / 1024


def _high_water_mark() -> int:
    """KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
