"""scipy, looked up when it is needed: the model and its optimum do without."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def scipy_module(name: str) -> Any:
    """A module of scipy.

    Raises:
        ImportError: scipy is not installed; the message says what to install.
    """
    try:
        return import_module(f"scipy.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "scipy":
            raise
        raise ImportError(
            "minimising and the spectrum of the Hessian need scipy, which is not installed: "
            "pip install 'neuralcollapse[theory]' (or: pip install scipy)"
        ) from error
