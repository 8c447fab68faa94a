"""Gradient checkpointing runs a forward twice: a step counts the first time, and is repeated from where it began."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Result = TypeVar("Result", bound=tuple[Tensor | None, ...])


def is_recomputing() -> bool:
    """Whether this runs inside a backward pass, where a training forward can only be a checkpoint's repetition."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def counts_once(step: Callable[..., Result]) -> Callable[..., Result]:
    """Wrap a method ``step(self, features, targets, **options)`` that changes its module's buffers.

    For gradient checkpointing: where it runs a second time, inside the backward pass, it returns what it returned the
    first time, and the buffers stay as they are. What is needed for that lives as long as the graph of the first run.
    """

    @wraps(step)
    def wrapped(self: nn.Module, features: Tensor, targets: Tensor | None = None, **options: Any) -> Result:
        if not self.training or torch.compiler.is_compiling():
            return step(self, features, targets, **options)
        if _WITHIN.get():  # what it is a part of keeps its state, or has brought it back
            return step(self, features, targets, **options)
        if is_recomputing():
            with _at_its_beginning(self, features):
                return step(self, features, targets, **options)
        before, token = _state(self), _WITHIN.set(True)
        try:
            result = step(self, features, targets, **options)
        finally:
            _WITHIN.reset(token)
        nodes = [tensor.grad_fn for tensor in result if tensor is not None and tensor.grad_fn is not None]
        if nodes:
            beginning = _Beginning(before, _fingerprint(features))
            _BEGINNINGS.setdefault(self, weakref.WeakSet()).add(beginning)
            for node in nodes:
                metadata: Any = node.metadata
                metadata.setdefault("neuralcollapse", []).append(beginning)
        return result

    return wrapped


State = list[tuple[nn.Module, str, Any]]


class _Beginning:
    """A module's state before a step, and a fingerprint of the features that the step took in."""

    def __init__(self, state: State, fingerprint: Tensor) -> None:
        self.state = state
        self.fingerprint = fingerprint


# Of each module, the beginnings of the steps whose graphs still live. Not in the module, which is copied and pickled.
_BEGINNINGS: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[_Beginning]] = weakref.WeakKeyDictionary()
_WITHIN: ContextVar[bool] = ContextVar("within", default=False)  # a step that counts once


@contextmanager
def _at_its_beginning(module: nn.Module, features: Tensor) -> Iterator[None]:
    beginning = _beginning_of(module, features)
    now, token = _state(module), _WITHIN.set(True)
    _restore(beginning.state)
    try:
        yield
    finally:  # also where the checkpoint stops the repetition in its middle, by an exception
        _restore(now)
        _WITHIN.reset(token)


def _beginning_of(module: nn.Module, features: Tensor) -> _Beginning:
    beginnings = list(_BEGINNINGS.get(module, ()))
    if len(beginnings) == 1:
        return beginnings[0]
    own = _fingerprint(features)  # repeated, features differ by rounding at most
    distances = [float(torch.linalg.vector_norm(one.fingerprint - own)) for one in beginnings]
    if not distances or distances.count(min(distances)) > 1:
        why = "two with the same features await their backward pass" if distances else "no graph of it is alive"
        raise ValueError(
            f"{type(module).__name__} must know where the step began that gradient checkpointing repeats, but {why}: "
            "checkpoint with use_reentrant=False, or leave the head out of what is checkpointed"
        )
    return beginnings[distances.index(min(distances))]


def _fingerprint(features: Tensor) -> Tensor:
    return features.detach().reshape(-1, features.shape[-1]).mean(0, dtype=torch.float32)


def _state(module: nn.Module) -> State:
    """The buffers, which are rebound and never changed in place, and what ``frozen`` and ``use_targets`` have set."""
    buffers = [(part, name, buffer) for part in module.modules() for name, buffer in part._buffers.items()]
    return buffers + [
        (module, name, getattr(module, name)) for name in ("_frozen", "_targets") if hasattr(module, name)
    ]


def _restore(state: State) -> None:
    for part, name, value in state:
        if name in part._buffers:
            part._buffers[name] = value
        else:
            setattr(part, name, value)
