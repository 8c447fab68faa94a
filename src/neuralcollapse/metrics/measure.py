"""Measurement of a model on a loader, with one pass of the model over each loader."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from neuralcollapse._checks import check_bool, check_device, check_module
from neuralcollapse._running import call_model, device_of, evaluation_mode, unchanged_on_error, unwrapped, with_progress
from neuralcollapse.classifier import ClassifierObserver
from neuralcollapse.metrics.gathering import Gathered, check_train_moments
from neuralcollapse.metrics.layers import block_names, first_tensor, recorded_calls
from neuralcollapse.metrics.measurement import Measurement, Provenance
from neuralcollapse.metrics.moments import ClassMoments
from neuralcollapse.metrics.samples import FeatureCache
from neuralcollapse.metrics.statistics import MeasureOptions, Pooling
from neuralcollapse.metrics.tokens import IGNORED, Unpack, next_tokens, warning_of_unshifted

Layers = Sequence[str] | Literal["blocks"]


@torch.no_grad()  # not inference_mode: tensors that a model caches must stay usable in training
def measure(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    classifier: str | nn.Module | None = None,
    train: Iterable[Any] | Measurement | ClassMoments | None = None,
    ood: Iterable[Any] | None = None,
    layers: Layers = (),
    probes: bool = False,
    unpack: Unpack | Literal["next_token"] | None = None,
    device: torch.device | str | None = None,
    options: MeasureOptions = MeasureOptions(),
    provenance: Provenance = Provenance(),
    progress: bool = True,
) -> Measurement:
    """Measure neural collapse of a model on a loader.

    The model runs once over each loader, in evaluation mode and without gradients; afterwards the mode of every module
    is restored. The features are the tensor that the weight of the classifier multiplies.

    The first batch determines which module is the classifier: the one for which features · Wᵀ + b equals the output of
    the model, up to rounding. Names are used only to choose between several such modules. A model without such a module
    raises an error, for instance if a prior or a temperature follows the classifier. Compiled models run uncompiled.

    Args:
        model: Any module that ends in a classifier. It returns logits (..., K), alone or in a tuple, mapping or
            dataclass; if one of the returned tensors is called ``logits``, that tensor is compared.
        loader: Batches; ``(input, target)`` pairs, unless ``unpack`` is given. Targets are (B,), or (B, T) for features
            (B, T, d) of tokens.
        classifier: The classifier, or its dotted name, if several modules compute an output. It is verified as well.
        train: The train split, if ``loader`` is another split: a loader, a measurement of the train split, or the
            ``moments`` of such a measurement. Its class means and centre are used for the nearest class mean, the
            cosine margin, the alignment and the probes; samples of classes that it does not contain are left out of
            these.
        ood: Out-of-distribution data for ``nc5_ood``; targets are ignored.
        layers: Dotted names of modules whose outputs are measured as well. If a module is called several times, its
            last output is measured. ``"blocks"``: the outputs of the blocks of the model, such as residual blocks,
            encoder layers or a linear layer with its activation; to find them, the first batch runs twice.
        probes: Include ``ncc_error`` and ``probe_error``, the errors of the nearest class mean and of the linear probe
            (`linear_probe`), for the features and for each layer, and ``effective_depth`` if there are layers. Class
            means and probe are those of the train split. The features of all layers are cached until the end of the
            measurement, with a further ``options.cache_bytes`` of memory.
        unpack: Function of a batch that returns ``(inputs, targets)``, where inputs are a tensor, a tuple of positional
            arguments or a mapping of keyword arguments. ``"next_token"`` is for causal language models: batches are
            tokens (B, T) or mappings with ``input_ids``, and the target of a position is the next token. The last
            position, padding and labels −100 are left out; ``options.ignore_index`` is then −100 by default. In all
            other cases, a warning is given if the targets are the input tokens themselves.
        device: Device to which the model is moved; by default it is not moved.
        options: Classes left out, centre, precision, and metrics to include.
        provenance: Epoch and split for the record, and a name for the model.
        progress: Show a progress bar.

    Returns:
        The measurement. Undefined metrics are NaN; the reasons are in ``undefined`` and in one warning.

    Raises:
        ValueError: if no module or several modules compute the output of the model (the message names the candidates,
            with their shapes and greatest differences), or the classifier is not called exactly once per forward pass;
            if a loader is empty, train moments have another K or d, features are not finite (the message names the
            batch), targets are out of range, or the options leave fewer than two classes. The model, its hooks and
            buffers and torch's random state are then left unchanged.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> batches = [(torch.randn(16, 4), torch.arange(16) % 2) for _ in range(3)]
        >>> measurement = measure(model, batches, progress=False)
        >>> measurement.cos_margins.shape
        torch.Size([48])
    """
    _check_arguments(model, loader, train, layers, unpack, device)
    check_bool("probes", probes)
    if probes and layers and isinstance(train, ClassMoments):
        raise ValueError("train must be a loader or a measurement for probes of layers, got ClassMoments")
    observer = ClassifierObserver(model, classifier)
    if device is not None:
        model.to(device)
    if unpack == "next_token":
        ignore_index = IGNORED if options.ignore_index is None else options.ignore_index
        options = replace(options, ignore_index=ignore_index)
        read: Unpack = partial(next_tokens, ignore_index=ignore_index)
    else:
        read = warning_of_unshifted(unpack or unpack_pair, options.ignore_index)
    run = ModelRun(model, observer, layers, options.layer_pooling, read, device_of(model), progress)
    with (
        FeatureCache(options.cache_bytes) as cache,
        ExitStack() as caches,
        unchanged_on_error(model),
        evaluation_mode(model),
    ):
        with closing(run.over(loader, "loader")) as batches:
            first = next(batches)
            weight, bias = observer.classifier.weight, observer.classifier.bias
            if isinstance(train, ClassMoments | Measurement):
                _check_train(train, weight, run.layers if probes else ())
            gathered = Gathered(
                len(weight), weight.shape[1], weight.device, cache, options, bias, caches if probes else None
            )
            for outputs in chain((first,), batches):
                gathered.add(outputs.features, outputs.targets, outputs.logits, outputs.layers)
        train_moments, train_layers = _moments_of_train_split(train, run, gathered, probes=probes)
        ood_means = {} if ood is None else run.mean_features(ood)
        origin = replace(provenance, model=provenance.model or type(unwrapped(model)).__name__)
        return gathered.measurement(weight, bias, train_moments, ood_means, origin, train_layers)


def measure_splits(
    model: nn.Module, loaders: Mapping[str, Iterable[Any]], provenance: Provenance = Provenance(), **options: Any
) -> dict[str, Measurement]:
    """Measure every split; ``"train"`` is measured first, and the others relative to its class means.

    Args:
        model: The model.
        loaders: Loader of each split, by name.
        provenance: Epoch, and name of the model; the split is added.
        options: Further arguments of `measure`.

    Returns:
        Dictionary from split to measurement.
    """
    measurements: dict[str, Measurement] = {}
    for split in sorted(loaders, key=lambda split: split != "train"):
        train, origin = measurements.get("train"), replace(provenance, split=split)
        measurements[split] = measure(model, loaders[split], train=train, provenance=origin, **options)
    return measurements


def check_split_options(loaders: Any, options: Mapping[str, Any]) -> None:
    """Check arguments of `measure_splits`.

    Raises:
        ValueError: if ``loaders`` is not a mapping of names to iterables, or an option is not an argument of `measure`.
    """
    if not isinstance(loaders, Mapping) or not loaders:
        raise ValueError(f"loaders must name at least one split, as {{'train': loader}}, got {loaders!r}")
    for split, loader in loaders.items():
        if not isinstance(loader, Iterable):
            raise ValueError(f"loaders must be iterables of batches, got {type(loader).__name__} for {split!r}")
    known = set(inspect.signature(measure).parameters) - {"model", "loader", "train", "provenance"}
    if unknown := options.keys() - known:
        raise ValueError(f"options must be arguments of measure, got {', '.join(sorted(unknown))}")


def _moments_of_train_split(
    train: Iterable[Any] | Measurement | ClassMoments | None, run: ModelRun, gathered: Gathered, *, probes: bool
) -> tuple[ClassMoments | None, dict[str, ClassMoments]]:
    """Return the moments of the features of the train split and, for probes, those of each layer."""
    if isinstance(train, Measurement):
        return train.moments, train.layer_moments
    if train is None or isinstance(train, ClassMoments):
        return train, {}
    moments, ignore_index = gathered.new_moments(*gathered.moments.means.shape), gathered.options.ignore_index
    layers = {name: gathered.new_moments(*of_layer.means.shape) for name, of_layer in gathered.layers.items()}
    for outputs in run.over(train, "train"):
        moments.update(outputs.features, outputs.targets, ignore_index=ignore_index)
        for name in layers if probes else ():
            layers[name].update(outputs.layers[name], outputs.targets, ignore_index=ignore_index)
    return moments, layers if probes else {}


def _check_train(train: ClassMoments | Measurement, weight: Tensor, layers: Sequence[str]) -> None:
    """Raise a `ValueError` unless the train split has moments of the features and of each of these layers."""
    if isinstance(train, Measurement):
        if missing := [name for name in layers if name not in train.layer_moments]:
            raise ValueError(f"train must be measured with the same layers for probes, but lacks layer {missing[0]!r}")
        train = train.moments
    check_train_moments(train, *weight.shape)


def _check_arguments(
    model: object, loader: object, train: object, layers: object, unpack: object, device: object
) -> None:
    check_module("model", model)  # type: ignore[arg-type]
    if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
        raise ValueError(f"loader must be an iterable of batches, got {type(loader).__name__}")
    is_loader = isinstance(train, Iterable) and not isinstance(train, Tensor | str)
    if not (train is None or is_loader or isinstance(train, ClassMoments | Measurement)):
        raise ValueError(
            f"train must be an iterable of batches, a Measurement or ClassMoments, got {type(train).__name__}"
        )
    check_layers(layers)
    if unpack is not None and unpack != "next_token" and not callable(unpack):
        got = repr(unpack) if isinstance(unpack, str) else type(unpack).__name__
        raise ValueError(f"unpack must be a function of a batch, or 'next_token', got {got}")
    check_device(device)


def check_layers(layers: object) -> None:
    """Raise a `ValueError` unless the argument is a list of names, or ``"blocks"``."""
    if layers != "blocks" and (isinstance(layers, str) or not isinstance(layers, Sequence)):
        raise ValueError(f"layers must be a list of names, or 'blocks', got {layers!r}")


@dataclass(frozen=True)
class _Outputs:
    """Features (..., d), logits (..., K), targets (...) and layer outputs of one batch."""

    features: Tensor
    logits: Tensor
    targets: Tensor
    layers: dict[str, Tensor]


@dataclass
class ModelRun:
    """Passes of a model over loaders, during which its classifier and some layers are observed.

    The first batch determines which module is the classifier and which modules end the blocks; on later batches the
    classifier is verified again.
    """

    model: nn.Module
    observer: ClassifierObserver
    layers: Layers
    layer_pooling: Pooling
    unpack: Unpack
    device: torch.device
    progress: bool

    def over(self, loader: Iterable[Any], argument: str) -> Generator[_Outputs]:
        """Yield the outputs of each batch."""
        for targets, features, logits, layers in self.calls(loader, argument):
            if targets is None:
                raise ValueError(f"{argument} must yield (input, target) pairs, got no target; see unpack=")
            if not isinstance(targets, Tensor):
                raise ValueError(f"targets must be integer class indices, got {type(targets).__name__}")
            targets = targets.to(features.device)
            if not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool):
                targets = targets.long()  # a uint8 index is a mask
            yield _Outputs(features, logits, targets, self._pooled(layers, targets.shape))

    def mean_features(self, loader: Iterable[Any]) -> dict[str, Tensor]:
        """Return the mean feature (d,) over a loader, under the empty name, and the mean output of each layer."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for _, features, _, layers in self.calls(loader, "ood"):
            for name, values in {"": features, **self._pooled(layers, features.shape[:-1])}.items():
                rows = values.flatten(0, -2).double()
                sums[name] = sums.get(name, torch.zeros_like(rows[0])) + rows.sum(dim=0)
                counts[name] = counts.get(name, 0) + len(rows)
        return {name: total / counts[name] for name, total in sums.items()}

    def calls(
        self, loader: Iterable[Any], argument: str, description: str = ""
    ) -> Iterator[tuple[Tensor | None, Tensor, Tensor, dict[str, Tensor]]]:
        """Yield targets, features, logits and layer outputs of each batch.

        Error messages contain the name of the argument. The progress bar shows the description, by default the name of
        the argument.
        """
        layers: dict[str, Tensor] = {}
        empty = True
        with ExitStack() as stack:
            stack.enter_context(self.observer)
            for name in dict.fromkeys(self.layers if self.layers != "blocks" else ()):
                stack.enter_context(_recorded_output(self.model, name, layers))
            for batch in with_progress(loader, description or argument, progress=self.progress):
                unpacked = self.unpack(batch)
                if not (isinstance(unpacked, tuple | list) and len(unpacked) == 2):
                    raise ValueError(f"unpack must return (inputs, targets), got {type(unpacked).__name__}")
                is_first = self.layers == "blocks"
                if is_first:
                    self.layers = self._find_blocks(unpacked[0])
                    for name in self.layers:
                        stack.enter_context(_recorded_output(self.model, name, layers))
                layers.clear()
                features, logits = self.observer.read(call_model(self.model, unpacked[0], self.device))
                if is_first:
                    self._drop_features(layers, features)
                if missing := [name for name in self.layers if name not in layers]:
                    raise ValueError(f"{missing[0]!r} must be called by the model's forward, but was not")
                empty = False
                yield unpacked[1], features, logits, layers
        if empty:
            raise ValueError(f"{argument} must yield at least one batch, got none")

    def _find_blocks(self, inputs: Any) -> list[str]:
        with recorded_calls(self.model) as calls:
            self.observer.read(call_model(self.model, inputs, self.device))
        return block_names(self.model, calls, self.observer.classifier.module)

    def _drop_features(self, layers: dict[str, Tensor], features: Tensor) -> None:
        """Leave out the last block if its output equals the features, which are measured in any case."""
        assert not isinstance(self.layers, str)
        if not self.layers:
            raise ValueError("layers='blocks' found no block besides the classifier; name the layers")
        last = self._pool(layers[self.layers[-1]], features.shape[:-1])
        if last.shape == features.shape:
            last, scale = last.to(features.dtype), float(features.abs().max())
            if torch.allclose(last, features, rtol=1e-2, atol=1e-3 * scale):  # means summed in another order may differ
                self.layers = self.layers[:-1]

    def _pooled(self, layers: dict[str, Tensor], shape: torch.Size) -> dict[str, Tensor]:
        return {layer: self._pool(layers[layer], shape) for layer in self.layers}

    def _pool(self, output: Tensor, shape: torch.Size) -> Tensor:
        """Return (B, d), or (B, T, d) if the targets have the shape (B, T)."""
        if callable(self.layer_pooling):
            return self.layer_pooling(output)
        if output.shape[:-1] == shape:
            return output
        if self.layer_pooling == "flatten":
            return output.flatten(1)
        return output.mean(dim=1) if output.ndim == 3 else output.flatten(2).mean(dim=2)


def unpack_pair(batch: Any) -> tuple[Any, Tensor | None]:
    """Return the input and the target of a pair, or an input and None."""
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    raise ValueError(
        f"loader must yield (input, target) pairs, got {type(batch).__name__}; "
        "unpack=lambda batch: (inputs, targets) reads other batches"
    )


@contextmanager
def _recorded_output(model: nn.Module, name: str, outputs: dict[str, Tensor]) -> Iterator[None]:
    """Record a copy of each output of a module under its name; the model may change the output in place."""

    def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is None:
            raise ValueError(f"layer {name!r} must return a tensor, got {type(output).__name__}")
        outputs[name] = tensor.detach().clone()

    for root in (model, unwrapped(model)):
        try:
            module = root.get_submodule(name)
        except AttributeError:
            continue
        with module.register_forward_hook(record):
            yield
        return
    raise ValueError(f"layers must name modules of the model, got {name!r}")
