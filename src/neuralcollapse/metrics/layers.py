"""Blocks of a model, determined from its structure and from one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from neuralcollapse._running import unwrapped

_CONTAINERS = (nn.Sequential, nn.ModuleList)
_Named = tuple[str, nn.Module]


@dataclass
class ModuleCalls:
    """Calls of a module during a forward pass.

    Attributes:
        count: Number of calls.
        has_features: Whether the last output is, or begins with, a floating-point tensor with a dimension of samples.
    """

    count: int = 0
    has_features: bool = False


@contextmanager
def recorded_calls(model: nn.Module) -> Iterator[dict[str, ModuleCalls]]:
    """Record the calls of all modules inside the context, by dotted name, in the order in which the last calls end."""
    calls: dict[str, ModuleCalls] = {}

    def hook_of(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            tensor = first_tensor(output)
            usable = tensor is not None and tensor.is_floating_point() and tensor.ndim >= 2
            calls[name] = ModuleCalls(calls.pop(name, ModuleCalls()).count + 1, usable)

        return record

    with ExitStack() as hooks:
        for name, module in unwrapped(model).named_modules():
            hooks.enter_context(module.register_forward_hook(hook_of(name)))
        yield calls


def block_names(model: nn.Module, calls: Mapping[str, ModuleCalls], classifier: nn.Module) -> list[str]:
    """Return the dotted names of the modules whose outputs are the outputs of a model's blocks, in order.

    Containers (``nn.Sequential``, ``nn.ModuleList``) are read as lists. A module that holds a list of at least two
    modules which consist of layers themselves (such as a network with residual blocks, or an encoder with layers) is
    replaced by its children. If this leaves fewer than two blocks, modules are replaced by their children until there
    are two. Each module that has a weight with at least two dimensions begins a block; modules without such a weight
    (norms, activations, poolings) belong to the preceding block. The output of a block is that of its last module that
    is called exactly once.

    Args:
        model: The model.
        calls: Calls of its modules in one forward pass, from `recorded_calls`.
        classifier: Its classifier, which does not belong to any block.

    Examples:
        >>> import torch
        >>> layers = [nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)]
        >>> model = nn.Sequential(*layers).eval()
        >>> with recorded_calls(model) as calls:
        ...     _ = model(torch.randn(4, 2))
        >>> block_names(model, calls, model[5])
        ['1', '4']
    """
    modules = list(_expanded([("", unwrapped(model))], classifier))
    while len(blocks := _blocks(modules, calls, classifier)) < 2:
        more = [item for named in modules for item in (_children(*named) or [named])]
        if len(more) == len(modules) and all(a[1] is b[1] for a, b in zip(more, modules, strict=True)):
            break
        modules = list(_expanded(more, classifier))
    order = {name: position for position, name in enumerate(calls)}
    return sorted(blocks, key=order.__getitem__)


def first_tensor(output: Any) -> Tensor | None:
    """Return the output itself, or the first tensor in a tuple, mapping or dataclass of model outputs."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    return next((value for value in values if isinstance(value, Tensor)), None) if hasattr(values, "__iter__") else None


def _expanded(modules: list[_Named], classifier: nn.Module) -> Iterator[_Named]:
    """Yield the modules, with containers and modules that hold a list of blocks replaced by their children."""
    for name, module in modules:
        if module is not classifier and (isinstance(module, _CONTAINERS) or _holds_blocks(module, classifier)):
            yield from _expanded(_children(name, module), classifier)
        else:
            yield name, module


def _holds_blocks(module: nn.Module, classifier: nn.Module) -> bool:
    """Return whether a module holds the classifier, or a list of at least two modules that consist of layers."""
    inside = list(module.modules())[1:]
    containers = (descendant for descendant in inside if isinstance(descendant, _CONTAINERS))
    return any(descendant is classifier for descendant in inside) or any(
        sum(any(map(_has_matrix, element.children())) for element in _elements(container)) >= 2
        for container in containers
    )


def _elements(container: nn.Module) -> Iterator[nn.Module]:
    """Yield the elements of a container, and of the containers in it."""
    for element in container.children():
        if isinstance(element, _CONTAINERS):
            yield from _elements(element)
        else:
            yield element


def _blocks(modules: list[_Named], calls: Mapping[str, ModuleCalls], classifier: nn.Module) -> list[str]:
    """Return the name of the last usable module of each block."""
    groups: list[list[str]] = []
    for name, module in modules:
        if module is classifier:
            groups.append([])  # modules that follow the classifier are dropped with it
        elif name in calls and _has_matrix(module):
            groups.append([name])
        elif groups and groups[-1]:
            groups[-1].append(name)
    usable = {name for name, of_module in calls.items() if of_module.count == 1 and of_module.has_features}
    last = [next((name for name in reversed(group) if name in usable), None) for group in groups]
    return [name for name in last if name is not None]


def _children(name: str, module: nn.Module) -> list[_Named]:
    return [(f"{name}.{child_name}" if name else child_name, child) for child_name, child in module.named_children()]


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.ndim >= 2 for parameter in module.parameters())
