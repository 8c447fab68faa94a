"""Running a model over a loader, in evaluation mode, with its classifier and some of its layers tapped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from neuralcollapse.classifier import classifier_features

Unpack = Callable[[Any], tuple[Any, Tensor | None]]
Pooling = Literal["mean", "flatten"] | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Outputs:
    """What one batch gave: features (..., d), logits (..., K), targets (...), and each layer's output."""

    features: Tensor
    logits: Tensor
    targets: Tensor
    layers: dict[str, Tensor]


@dataclass(frozen=True)
class ModelRun:
    """Runs of a model over loaders, with its classifier and some layers tapped."""

    model: nn.Module
    name: str
    classifier: nn.Module
    layers: Sequence[str]
    layer_pooling: Pooling
    unpack: Unpack
    device: torch.device
    progress: bool

    def over(self, loader: Iterable[Any], argument: str) -> Iterator[Outputs]:
        """What each batch gives."""
        for targets, calls in self._calls(loader, argument, self.layers):
            if targets is None:
                raise ValueError(f"{argument} must yield (input, target) pairs, got no target; see unpack=")
            if not isinstance(targets, Tensor):
                raise ValueError(f"targets must be integer class indices, got {type(targets).__name__}")
            inputs, logits = calls[self.name]
            features = classifier_features(self.classifier, inputs)
            yield Outputs(features, logits, targets.to(self.device), self._pooled(calls, targets.shape))

    def mean_features(self, loader: Iterable[Any]) -> dict[str, Tensor]:
        """(d,) mean feature over a loader, under the empty name, and of each layer."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for _, calls in self._calls(loader, "ood_loader", self.layers):
            features = classifier_features(self.classifier, calls[self.name][0])
            for name, values in {"": features, **self._pooled(calls, features.shape[:-1])}.items():
                rows = values.flatten(0, -2).double()
                sums[name] = sums.get(name, torch.zeros_like(rows[0])) + rows.sum(dim=0)
                counts[name] = counts.get(name, 0) + len(rows)
        return {name: total / counts[name] for name, total in sums.items()}

    def _pooled(self, calls: dict[str, tuple[Any, Any]], shape: torch.Size) -> dict[str, Tensor]:
        return {layer: self._pool(_first_tensor(calls[layer][1]), shape) for layer in self.layers}

    def _calls(
        self, loader: Iterable[Any], argument: str, layers: Sequence[str]
    ) -> Iterator[tuple[Tensor | None, dict[str, tuple[Any, Any]]]]:
        """The targets of each batch, and by name the (input, output) of the modules tapped."""
        from tqdm.auto import tqdm

        calls: dict[str, tuple[Any, Any]] = {}
        empty = True
        with ExitStack() as stack:
            for name in dict.fromkeys((self.name, *layers)):
                stack.enter_context(_tapped(self.model, name, calls))
            for batch in tqdm(loader, desc=argument, disable=not self.progress, leave=False):
                inputs, targets = _pair(self.unpack(batch))
                calls.clear()
                self._call(inputs)
                if missing := [name for name in (self.name, *layers) if name not in calls]:
                    raise ValueError(f"{missing[0]!r} must be called by the model's forward, but was not")
                empty = False
                yield targets, calls
        if empty:
            raise ValueError(f"{argument} must yield at least one batch, got none")

    def _call(self, inputs: Any) -> None:
        inputs = _move(inputs, self.device)
        if isinstance(inputs, Mapping):
            self.model(**inputs)
        elif isinstance(inputs, tuple | list):
            self.model(*inputs)
        else:
            self.model(inputs)

    def _pool(self, output: Tensor, shape: torch.Size) -> Tensor:
        """(B, d), or (B, T, d) where targets have the shape (B, T): one for each token."""
        if callable(self.layer_pooling):
            return self.layer_pooling(output)
        if output.shape[:-1] == shape:
            return output
        if self.layer_pooling == "flatten":
            return output.flatten(1)
        return output.mean(dim=1) if output.ndim == 3 else output.flatten(2).mean(dim=2)


def unpack_pair(batch: Any) -> tuple[Any, Tensor | None]:
    """(input, target), or an input alone."""
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    raise ValueError(
        f"loader must yield (input, target) pairs, got {type(batch).__name__}; "
        "unpack=lambda batch: (inputs, targets) says how to read others"
    )


def _pair(unpacked: Any) -> tuple[Any, Tensor | None]:
    """What ``unpack`` gave, seen to be a pair."""
    if not (isinstance(unpacked, tuple | list) and len(unpacked) == 2):
        raise ValueError(f"unpack must return (inputs, targets), got {type(unpacked).__name__}")
    return unpacked[0], unpacked[1]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; outside, every module in the mode it was in."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def _tapped(model: nn.Module, name: str, calls: dict[str, tuple[Any, Any]]) -> Iterator[None]:
    """Note the first input and the output of each call of a module under its name."""

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls[name] = (args[0] if args else next(iter(kwargs.values())), output)

    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"layers must name modules of the model, got {name!r}") from None
    handle = module.register_forward_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _first_tensor(output: Any) -> Tensor:
    """The output itself, or the first tensor in a tuple, mapping or dataclass of the kind that models return."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    return next(value for value in values if isinstance(value, Tensor))


def _move(inputs: Any, device: torch.device) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {key: _move(value, device) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(_move(value, device) for value in inputs)
    return inputs
