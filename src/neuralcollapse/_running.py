"""Runs of a model that restore its mode and, after an error, its buffers and the random state."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def with_progress(batches: Iterable[Any], description: str, *, progress: bool) -> Iterable[Any]:
    """Return batches with a progress bar that disappears at the end.

    The iterator is passed to `tqdm.auto`, because it would start an iterable twice, which would start the workers of a
    data loader twice and draw from the random state.

    Args:
        batches: The batches; their number is shown if they have a length.
        description: Text in front of the bar.
        progress: Show the bar.
    """
    from tqdm.auto import tqdm

    total = length_hint(batches, 0) or None
    return tqdm(iter(batches), total=total, desc=description, disable=not progress, leave=False)


def call_model(model: nn.Module, inputs: Any, device: torch.device) -> Any:
    """Run a model on a tensor, a tuple of positional or a mapping of keyword arguments, and return its output.

    Compiled parts run uncompiled during the call, because compiled code may skip hooks. If the model is parallel over
    ranks or devices, the wrapped module runs.

    Args:
        model: The model.
        inputs: Arguments of the model.
        device: Device to which their tensors are moved.
    """
    inputs, model = _move(inputs, device), unwrapped(model)
    with uncompiled():
        if isinstance(inputs, Mapping):
            return model(**inputs)
        if isinstance(inputs, tuple | list):
            return model(*inputs)
        return model(inputs)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile``, `DataParallel` or `DistributedDataParallel`."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def uncompiled() -> AbstractContextManager[Any]:
    """Return a context in which compiled modules and functions run uncompiled."""
    # If dynamo has not been imported, nothing is compiled, and importing it would take a second.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter or buffer; the CPU if it has none."""
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and restore the mode of every module afterwards."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Restore the model's buffers and torch's random state if an error leaves the context."""
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    values = {
        buffer: buffer.clone()
        for _, of_module in buffers
        for buffer in of_module.values()
        if buffer is not None and not is_lazy(buffer) and buffer.device.type != "meta"
    }
    random = torch.get_rng_state()
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    random_of_devices = {device: torch.cuda.get_rng_state(device) for device in devices}
    try:
        yield
    except BaseException:
        for module, of_module in buffers:
            module._buffers.clear()
            module._buffers.update(of_module)
        with torch.no_grad():
            for buffer, value in values.items():
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        torch.set_rng_state(random)
        for device, state in random_of_devices.items():
            torch.cuda.set_rng_state(state, device)
        raise


def _move(inputs: Any, device: torch.device) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {key: _move(value, device) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(_move(value, device) for value in inputs)
    return inputs
