"""Experiments: settings, training, run folders, figures. Each name is looked up when it is used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuralcollapse.lab.config import RunConfig
    from neuralcollapse.lab.data.loading import load_data
    from neuralcollapse.lab.experiments import Comparison, comparison_runs, single_run
    from neuralcollapse.lab.results.folder import RunFolder
    from neuralcollapse.lab.training.collapse_callback import CollapseCallback
    from neuralcollapse.lab.training.many_runs import train_runs

_PLACES = {
    "CollapseCallback": "training.collapse_callback",
    "Comparison": "experiments",
    "RunConfig": "config",
    "RunFolder": "results.folder",
    "comparison_runs": "experiments",
    "load_data": "data.loading",
    "single_run": "experiments",
    "train_runs": "training.many_runs",
}

__all__ = [
    "CollapseCallback",
    "Comparison",
    "RunConfig",
    "RunFolder",
    "comparison_runs",
    "load_data",
    "single_run",
    "train_runs",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
