"""Running a model over a loader, in evaluation mode, with its classifier and some of its layers tapped."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from neuralcollapse._running import call_model, unwrapped
from neuralcollapse.classifier import ClassifierObserver, OutputClassifier

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
    """Runs of a model over loaders, with its classifier and some layers observed.

    The first batch decides which module is the classifier; every other one is compared with that decision.
    """

    model: nn.Module
    observer: ClassifierObserver
    layers: Sequence[str]
    layer_pooling: Pooling
    unpack: Unpack
    device: torch.device
    progress: bool

    @property
    def classifier(self) -> OutputClassifier:
        """The classifier, known after the first batch."""
        return self.observer.classifier

    def over(self, loader: Iterable[Any], argument: str) -> Generator[Outputs]:
        """Yield what each batch gives."""
        for targets, features, logits, layers in self._calls(loader, argument):
            if targets is None:
                raise ValueError(f"{argument} must yield (input, target) pairs, got no target; see unpack=")
            if not isinstance(targets, Tensor):
                raise ValueError(f"targets must be integer class indices, got {type(targets).__name__}")
            targets = targets.to(features.device)
            if not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool):
                targets = targets.long()  # a tensor of uint8 that indexes another one would be a mask
            yield Outputs(features, logits, targets, self._pooled(layers, targets.shape))

    def mean_features(self, loader: Iterable[Any]) -> dict[str, Tensor]:
        """Return the (d,) mean feature over a loader, under the empty name, and of each layer."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for _, features, _, layers in self._calls(loader, "ood_loader"):
            for name, values in {"": features, **self._pooled(layers, features.shape[:-1])}.items():
                rows = values.flatten(0, -2).double()
                sums[name] = sums.get(name, torch.zeros_like(rows[0])) + rows.sum(dim=0)
                counts[name] = counts.get(name, 0) + len(rows)
        return {name: total / counts[name] for name, total in sums.items()}

    def _pooled(self, layers: dict[str, Tensor], shape: torch.Size) -> dict[str, Tensor]:
        return {layer: self._pool(layers[layer], shape) for layer in self.layers}

    def _calls(
        self, loader: Iterable[Any], argument: str
    ) -> Iterator[tuple[Tensor | None, Tensor, Tensor, dict[str, Tensor]]]:
        """Yield the targets, features and logits of each batch, and by name the outputs of layers."""
        from tqdm.auto import tqdm

        layers: dict[str, Tensor] = {}
        empty = True
        with ExitStack() as stack:
            stack.enter_context(self.observer)
            for name in dict.fromkeys(self.layers):
                stack.enter_context(_tapped(self.model, name, layers))
            for batch in tqdm(loader, desc=argument, disable=not self.progress, leave=False):
                inputs, targets = _pair(self.unpack(batch))
                layers.clear()
                features, logits = self.observer.read(call_model(self.model, inputs, self.device))
                if missing := [name for name in self.layers if name not in layers]:
                    raise ValueError(f"{missing[0]!r} must be called by the model's forward, but was not")
                empty = False
                yield targets, features, logits, layers
        if empty:
            raise ValueError(f"{argument} must yield at least one batch, got none")

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
def _tapped(model: nn.Module, name: str, outputs: dict[str, Tensor]) -> Iterator[None]:
    """Note the output of each call of a module under its name: a copy, since the model may change it in place."""

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs[name] = _first_tensor(output).detach().clone()

    modules = [root for root in (model, unwrapped(model)) if _has(root, name)]
    if not modules:
        raise ValueError(f"layers must name modules of the model, got {name!r}")
    with modules[0].get_submodule(name).register_forward_hook(note):
        yield


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _first_tensor(output: Any) -> Tensor:
    """The output itself, or the first tensor in a tuple, mapping or dataclass of the kind that models return."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    return next(value for value in values if isinstance(value, Tensor))
