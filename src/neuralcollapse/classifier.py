"""Search for the classifier of a model, by running the model or from its structure.

If the model is run, the classifier is determined by arithmetic: `ClassifierObserver` records the inputs and outputs of
all modules with a weight (K, d) during a forward pass, and compares features · Wᵀ + b with the output of the model. The
structure is used if the model cannot be run.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from neuralcollapse._checks import check_module, listed
from neuralcollapse._running import call_model, device_of, evaluation_mode, unchanged_on_error, uncompiled, unwrapped

_CONVENTIONAL_NAMES = ("classifier", "fc", "head", "heads", "linear", "output", "lm_head", "score")
_KEPT_BYTES = 2**28  # maximum size of the recorded inputs of a forward pass; inputs of the earliest calls are dropped
_FIRST_PRODUCTS = 2**28  # maximum number of multiplications to compare a candidate on the first batch
_LATER_ROWS = 16  # number of samples that are compared in each later batch
_HOW_TO_NAME = "Name it with classifier='dotted.name'; find_classifier(model, example) finds it by running the model"


def is_classifier(module: nn.Module) -> bool:
    """Return whether a module is an ``nn.Linear``, or has ``weight`` (K, d), ``bias`` and a method ``features``."""
    if isinstance(module, nn.Linear):
        return True
    weight = getattr(module, "weight", None)
    if not (isinstance(weight, Tensor) and weight.ndim == 2 and hasattr(module, "bias")):
        return False
    return callable(getattr(module, "features", None))


def find_classifier(model: nn.Module, example: Any = None) -> tuple[str, nn.Module]:
    """Find the module whose output is the logits of a model.

    With an ``example``, the model is run on it, in evaluation mode and without gradients: the classifier is the module
    for which features · Wᵀ + b equals the output of the model, up to rounding. Names such as ``fc`` or ``head`` are
    used only to choose between several such modules.

    Without an example, the classifier follows from the structure. It is the result of ``get_classifier()`` if the model
    has this method (as in timm). Otherwise, an ``nn.Sequential`` ends in its last child, and any other module in its
    only direct child that is, or ends in, a classifier; if there is no such child, in the only classifier inside.

    Args:
        model: Any module.
        example: Inputs of the model: a tensor, a tuple of positional or a mapping of keyword arguments. They are moved
            to the device of the model.

    Returns:
        The dotted name inside ``model`` (empty if the model itself is the classifier), and the module.

    Raises:
        ValueError: if ``model`` is not a module, or has no classifier or several candidates; with an example, if no
            module computes its output. The message names the candidates. The model is left unchanged.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> find_classifier(model)
        ('2', Linear(in_features=16, out_features=3, bias=True))
        >>> find_classifier(model, torch.randn(4, 8))
        ('2', Linear(in_features=16, out_features=3, bias=True))
    """
    check_module("model", model)
    if example is None:
        return _only(model, _structural_candidates(model))
    observer = ClassifierObserver(model)
    with torch.no_grad(), unchanged_on_error(model), evaluation_mode(model), observer:
        observer.read(call_model(model, example, device_of(model)))
    return observer.classifier.name, observer.classifier.module


def resolve_classifier(
    model: nn.Module, classifier: str | nn.Module | None = None, in_features: int | None = None
) -> tuple[str, nn.Module]:
    """Return the given classifier, or the one that the structure determines.

    Args:
        model: The model.
        classifier: The classifier, or its dotted name.
        in_features: Number of features d, which is used to choose between several candidates.
    """
    check_module("model", model)
    if classifier is None:
        candidates = _structural_candidates(model)
        if len(candidates) > 1 and in_features is not None:
            fitting = [(name, module) for name, module in candidates if _in_features(module) == in_features]
            candidates = fitting if len(fitting) == 1 else candidates
        name, module = _only(model, candidates)
    else:
        name, module = _named(model, classifier)
    check_classifier(repr(name), module)
    return name, module


def expected_classifier(model: nn.Module, classifier: str | nn.Module | None = None) -> str:
    """Describe, before the model has run, the classifier that will be measured.

    Raises:
        ValueError: if the given name is not in the model, or no module could be the classifier.
    """
    observer = ClassifierObserver(model, classifier)
    if observer.named is not None:
        return repr(observer.named)
    candidates = _structural_candidates(model)
    return repr(candidates[0][0]) if len(candidates) == 1 else "(the first batch decides)"


def classifier_with(
    model: nn.Module, weight: Tensor, bias: Tensor | None, classifier: str | nn.Module | None = None
) -> nn.Module:
    """Return the module of a model that has a given weight and bias, up to the rounding of its dtype.

    Args:
        model: The model.
        weight: W (K, d).
        bias: b (K,), or None for 0.
        classifier: The classifier or its dotted name, if several modules have the same weight.

    Raises:
        ValueError: if no module or several modules have this weight and bias.
    """
    check_module("model", model)
    given = None if classifier is None else _named(model, classifier)
    modules = [given] if given is not None else [entry for entry in model.named_modules() if _has_weight(entry[1])]
    with evaluation_mode(model):  # reading a parametrised weight in training mode may change it
        matching = [(name, module) for name, module in modules if _has_parameters(module, weight, bias)]
    if not matching:
        candidates = ", ".join(f"{name!r} {_shape_of_weight(module)}" for name, module in modules) or "none"
        raise ValueError(
            f"no module of {type(unwrapped(model)).__name__} has the measured weight {tuple(weight.shape)} and bias, "
            f"those with a weight are {candidates}: measure the model in its present state"
        )
    if len(matching) > 1:
        names = ", ".join(repr(name) for name, _ in matching)
        raise ValueError(f"several modules have the measured weight: {names}. Name one with classifier='dotted.name'")
    return matching[0][1]


def _has_parameters(module: nn.Module, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether the module has the given weight and bias, up to the rounding of its dtype."""
    own_weight, own_bias = _parameters(module)
    if own_weight is None or own_weight.shape != weight.shape or not own_weight.is_floating_point():
        return False
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    own_bias = own_weight.new_zeros(len(weight)) if own_bias is None else own_bias
    return _is_rounded(own_weight, weight) and _is_rounded(own_bias, bias)


def _is_rounded(values: Tensor, exact: Tensor) -> bool:
    """Return whether values are equal to others, up to two units of rounding of their dtype."""
    eps = torch.finfo(values.dtype).eps
    exact = exact.to("cpu", torch.float64)
    return torch.allclose(values.detach().to("cpu", torch.float64), exact, rtol=2 * eps, atol=0)


def _shape_of_weight(module: nn.Module) -> tuple[int, ...] | None:
    weight = _parameters(module)[0]
    return None if weight is None else tuple(weight.shape)


def classifier_features(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return the tensor that the weight of a classifier multiplies, given the input of the classifier.

    This is the input itself for an ``nn.Linear``, its mean over positions for a 1 × 1 convolution, and the result of
    the method ``features`` for a head that normalises its input.
    """
    if isinstance(module, _CONVOLUTIONS) and inputs.ndim > 2:
        inputs = inputs.flatten(2).mean(dim=2)
    function = getattr(module, "features", None)
    return function(inputs) if callable(function) else inputs


def check_named(classifier: object) -> None:
    """Raise a ValueError unless the argument is a module or a string."""
    if not isinstance(classifier, str | nn.Module):
        raise ValueError(f"classifier must be a module or its dotted name, got {type(classifier).__name__}")


def check_classifier(name: str, module: nn.Module, is_accepted: Callable[[nn.Module], bool] = is_classifier) -> None:
    """Raise a ValueError that contains the name unless a module is accepted and knows its number of features."""
    kind = type(module).__name__
    if not is_accepted(module):
        raise ValueError(
            f"classifier {name} must be an nn.Linear or have weight (K, d), bias and features(x); got {kind}"
        )
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise ValueError(
            f"classifier {name} must know its number of features, got a {kind} that has not been called yet: "
            "run the model on a batch first"
        )


@dataclass(frozen=True)
class OutputClassifier:
    """Module that computes the output of a model.

    Attributes:
        name: Dotted name.
        module: The module.
        weight: W (K, d), as used in the forward.
        bias: b (K,), or None.
        output: Keys of the logits in the output of the model.
    """

    name: str
    module: nn.Module
    weight: Tensor
    bias: Tensor | None
    output: tuple[str | int, ...]


class ClassifierObserver:
    """Observer of forward passes of a model, which determines in the first pass the module that computes the output.

    Run the model inside this context manager, and call `read` with the output of each run.

    Args:
        model: The model.
        classifier: The classifier or its dotted name, if known; it is verified as well.

    Raises:
        ValueError: if the model is a TorchScript module, the name is not in it, or no module could be its classifier.
    """

    def __init__(self, model: nn.Module, classifier: str | nn.Module | None = None) -> None:
        check_module("model", model)
        if isinstance(unwrapped(model), torch.jit.ScriptModule):
            raise ValueError(
                f"model must be a plain nn.Module, got a TorchScript {type(unwrapped(model)).__name__}, whose modules "
                "cannot be observed: use the original module"
            )
        self._model = model
        self._modules = {name: module for name, module in model.named_modules() if _has_weight(module)}
        self.named: str | None = None
        if classifier is not None:
            self.named, module = _named(model, classifier)
            check_classifier(repr(self.named), module, _has_weight)
        elif not self._modules:
            _only(model, [])
        else:
            _declared_classifier(model)
        for name, module in self._modules.items():
            check_classifier(repr(name), module, _has_weight)
        self._classifier: OutputClassifier | None = None
        self._calls: dict[str, _Call] = {}
        self._hooks = ExitStack()

    @property
    def classifier(self) -> OutputClassifier:
        """Classifier, which is known after the first call of `read`."""
        if self._classifier is None:
            raise RuntimeError("the classifier is known after the first batch")
        return self._classifier

    def __enter__(self) -> ClassifierObserver:
        known = self._classifier
        self._observe(self._modules if known is None else {known.name: known.module})
        return self

    def __exit__(self, *_: object) -> None:
        self._observe({})

    def read(self, returned: Any) -> tuple[Tensor, Tensor]:
        """Return features (..., d) and logits (..., K) of the last run.

        The first call determines which module is the classifier, by comparing all samples (or evenly spaced samples if
        the batch is very large). Later calls compare a few samples.

        Args:
            returned: Output of the model.

        Raises:
            ValueError: if no module or several modules compute the output; in later calls, if the classifier was not
                called exactly once or no longer computes the output.
        """
        calls, self._calls = self._calls, {}
        if self._classifier is not None:
            match = self._verify(calls, returned, self._classifier)
        else:
            match = self._decide(calls, _tensors(returned))
            self._classifier = match.classifier
            self._observe({match.name: match.classifier.module})
        return match.features, match.logits

    def _observe(self, modules: dict[str, nn.Module]) -> None:
        """Restrict the observation to the given modules."""
        self._hooks.close()
        self._calls = {}
        for name, module in modules.items():
            self._hooks.enter_context(module.register_forward_hook(self._recorder(name), with_kwargs=True))

    def _recorder(self, name: str) -> Callable[..., None]:
        """Return a forward hook that records the calls of a module."""

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            call = self._calls.setdefault(name, _Call())
            call.count += 1
            inputs: Any = args[0] if args else next(iter(kwargs.values()), None)
            if call.count == 1 and _is_floating(inputs) and _is_floating(output):
                call.record(module, inputs, output)
                self._drop_earliest()

        return record

    def _drop_earliest(self) -> None:
        """Drop the earliest recorded inputs if they take too much memory."""
        recorded = [(name, call.inputs) for name, call in self._calls.items() if call.inputs is not None]
        total = sum(inputs.nbytes for _, inputs in recorded)
        for name, inputs in recorded[:-1]:
            if total > _KEPT_BYTES and name != self.named:
                self._calls[name].inputs = None
                total -= inputs.nbytes

    def _decide(self, calls: dict[str, _Call], tensors: list[tuple[Path, Tensor]]) -> _Match:
        """Return the match of the only module that computes one of the tensors of the output."""
        if self.named is not None and self.named not in calls:
            raise ValueError(f"{self.named!r} must be called by the model's forward, but was not")
        results = [_compare(name, self._modules[name], call, tensors) for name, call in reversed(calls.items())]
        passing = _without_features([result for result in results if isinstance(result, _Match)])
        chosen = passing if self.named is None else [match for match in passing if match.name == self.named]
        if not chosen:
            raise ValueError(self._no_match(results, passing, tensors))
        if len(chosen) > 1:
            chosen = _break_tie(chosen)
        if len(chosen) > 1:
            names = ", ".join(repr(match.name) for match in chosen)
            raise ValueError(
                f"several modules of {self._model_name} compute what it returned: {names}. "
                "Name the one whose output is the logits with classifier='dotted.name'"
            )
        return chosen[0]

    def _verify(self, calls: dict[str, _Call], returned: Any, known: OutputClassifier) -> _Match:
        """Return the match of the known classifier on a later batch."""
        name, logits = known.name, dict(_leaves((), returned)).get(known.output)
        if logits is None:
            reason = f"is not found at {list(known.output)} in a {type(returned).__name__}"
        else:
            result = _compare(name, known.module, calls.get(name, _Call()), [(known.output, logits)], known)
            if isinstance(result, _Match):
                return result
            reason = result.reason
        raise ValueError(
            f"classifier {name!r} computed the output of the first batch, but not of a later one: {name!r} {reason}"
        )

    @property
    def _model_name(self) -> str:
        return type(unwrapped(self._model)).__name__

    def _no_match(
        self, results: list[_Match | _Mismatch], passing: list[_Match], tensors: list[tuple[Path, Tensor]]
    ) -> str:
        """Return the message that no module computes the output, with reasons for the nearest candidates."""
        if not tensors:
            return f"model must return logits, but the output of {self._model_name} has no floating-point tensor"
        if self.named is not None:
            results = [result for result in results if result.name == self.named]
        nearest = sorted(results, key=lambda result: result.difference)[:3]
        reasons = "; ".join(f"{result.name!r} {result.reason}" for result in nearest)
        if not reasons:
            reasons = f"{', '.join(map(repr, list(self._modules)[:3]))} not called"
        subject = "no module" if self.named is None else f"classifier {self.named!r}"
        shapes = " or ".join(str(tuple(tensor.shape)) for _, tensor in tensors[:3])
        instead = f". That is the output of {passing[0].name!r}" if passing else ""
        return (
            f"{subject} of {self._model_name} computes its output {shapes} as features · weightᵀ + bias: "
            f"{reasons}{instead}. Remove what follows the classifier; give a layer that normalises a method "
            "features(x) that returns what its weight multiplies; merge adapters into their layer; or name another "
            "module with classifier='dotted.name'"
        )


class FeaturesAndLogits(NamedTuple):
    """Features and logits of a forward pass.

    Attributes:
        features: h (N, d), or (N, T, d) for tokens: the tensor that the weight of the classifier multiplies.
        logits: (N, K), or (N, T, K).
    """

    features: Tensor
    logits: Tensor


class FeaturesOf:
    """Function from inputs of a model to features and logits, as returned by `features_of`."""

    def __init__(self, model: nn.Module, classifier: str | nn.Module | None = None) -> None:
        self._model = model
        self._observer = ClassifierObserver(model, classifier)
        self._classifier: OutputClassifier | None = None

    def __call__(self, *inputs: Any, **named_inputs: Any) -> FeaturesAndLogits:
        """Run the model once, in its current mode; the first call runs it once more before, to find the classifier.

        Args:
            *inputs: Positional arguments of the model.
            **named_inputs: Keyword arguments of the model.

        Raises:
            ValueError: if no module or several modules compute the output of the model, or if the classifier is not
                called exactly once.
        """
        model = unwrapped(self._model)
        if self._classifier is None:
            with torch.no_grad(), unchanged_on_error(model), evaluation_mode(model), self._observer, uncompiled():
                self._observer.read(model(*inputs, **named_inputs))
            self._classifier = self._observer.classifier
        name, recorder = self._classifier.name, FeatureRecorder()
        recorder.start()
        with self._classifier.module.register_forward_pre_hook(recorder, with_kwargs=True), uncompiled():
            returned = model(*inputs, **named_inputs)
        features, calls = recorder.stop()
        if features is None or calls != 1:
            raise ValueError(f"classifier {name!r} must be called once per forward, but was called {calls} times")
        logits = dict(_leaves((), returned)).get(self._classifier.output)
        in_layout = None if logits is None else _in_layout(features, logits)
        if logits is None or in_layout is None:
            raise ValueError(
                f"model must return logits at {list(self._classifier.output)} as in the first call, got a "
                f"{type(returned).__name__} without them"
            )
        return FeaturesAndLogits(in_layout, logits)


def features_of(model: nn.Module, classifier: str | nn.Module | None = None) -> FeaturesOf:
    """Return a function that computes the features and the logits of a model from its inputs in one forward pass.

    The classifier is determined at the first call, as in `measure`: it is the module for which features · Wᵀ + b equals
    the output of the model. This call runs the model twice, first in evaluation mode and without gradients. Features
    and logits keep their gradients, and mode, hooks and output of the model are unchanged. A compiled model runs
    uncompiled.

    Args:
        model: Any module that ends in a classifier.
        classifier: The classifier, or its dotted name, if several modules compute an output.

    Returns:
        A function of the arguments of the model, which returns ``(features, logits)``.

    Raises:
        ValueError: if ``model`` is not a module or has no classifier, or does not contain the given classifier.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> features, logits = features_of(model)(torch.randn(5, 4))
        >>> features.shape, logits.shape
        (torch.Size([5, 8]), torch.Size([5, 3]))
    """
    return FeaturesOf(model, classifier)


class FeatureRecorder:
    """Forward pre-hook of a classifier that records its input, with its gradient, between `start` and `stop`."""

    def __init__(self) -> None:
        self.active = False
        self.calls = 0
        self.features: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.active:
            return
        inputs = args[0] if args else next(iter(kwargs.values()))
        self.calls += 1
        self.features = classifier_features(module, inputs.clone())  # the model may change its input in place

    def start(self) -> None:
        """Start recording."""
        self.active, self.calls, self.features = True, 0, None

    def stop(self) -> tuple[Tensor | None, int]:
        """Stop recording, and return the recorded features and the number of calls."""
        features, self.active, self.features = self.features, False, None
        return features, self.calls


Path = tuple[str | int, ...]


@dataclass
class _Call:
    """Calls of a module during a forward pass: their number, and the tensors of the first call."""

    count: int = 0
    inputs: Tensor | None = None
    output: Callable[[], Tensor | None] | None = None
    version: int | None = None
    dtype: torch.dtype = torch.float32

    def record(self, module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        """Store a copy of the inputs, which the model may change in place, and a weak reference to the output."""
        inputs = inputs.detach()
        self.inputs = inputs.flatten(2).mean(dim=2) if isinstance(module, _CONVOLUTIONS) else inputs.clone()
        self.output, self.version, self.dtype = weakref.ref(output), _version(output), output.dtype

    def returned(self, tensor: Tensor) -> bool:
        """Return whether the tensor is the unchanged output of the module."""
        if self.output is None or self.output() is not tensor:
            return False
        return self.version is not None and self.version == _version(tensor)


@dataclass(frozen=True, eq=False)
class _Match:
    """Module that computes a tensor of the output of the model, with its features (..., d) and the logits (..., K)."""

    classifier: OutputClassifier
    features: Tensor
    logits: Tensor
    is_output: bool
    difference: float = 0.0
    reason: ClassVar[str] = "computes the features that another module takes"  # reason if it is not the classifier

    @property
    def name(self) -> str:
        return self.classifier.name


@dataclass(frozen=True)
class _Mismatch:
    """Module that does not compute any tensor of the output of the model, with the reason and the least difference."""

    name: str
    reason: str
    difference: float = math.inf


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _compare(
    name: str,
    module: nn.Module,
    call: _Call,
    tensors: list[tuple[Path, Tensor]],
    known: OutputClassifier | None = None,
) -> _Match | _Mismatch:
    """Compare features · Wᵀ + b with tensors of the output; return the first equal tensor, or else the nearest.

    Args:
        name: Name of the module.
        module: The module.
        call: Calls during the forward.
        tensors: Tensors of the output of the model, with their keys.
        known: Result for an earlier batch; its weight is used again, and only a few samples are compared.
    """
    if call.count != 1:
        times = f"was called {call.count} times" if call.count else "was not called"
        return _Mismatch(name, f"{times} per forward")
    if call.inputs is None:
        return _Mismatch(
            name, "was not compared: its input or output is not a floating-point tensor, or was dropped to save memory"
        )
    weight, bias = _parameters(module) if known is None else (known.weight, known.bias)
    if weight is None or weight.ndim != 2 or not weight.is_floating_point() or weight.device.type == "meta":
        return _Mismatch(name, f"({type(module).__name__}) has no floating-point weight of shape (K, d)")
    try:
        inputs = classifier_features(module, call.inputs)
    except Exception as error:  # the module may have a method named features with another meaning
        return _Mismatch(name, f"({type(module).__name__}) has a method features that fails: {error}")
    failed = _Mismatch(name, "was not compared: the model returned no tensor")
    for path, logits in tensors:
        features = _in_layout(inputs, logits)
        shapes = f"with weight {tuple(weight.shape)} on features {tuple(call.inputs.shape)}"
        if features is None or (*features.shape[:-1], *weight.shape) != (*logits.shape, features.shape[-1]):
            if failed.difference == math.inf:
                failed = _Mismatch(name, f"{shapes} gives {(*call.inputs.shape[:-1], len(weight))}")
            continue
        is_output = call.returned(logits)
        classifier = OutputClassifier(name, module, weight, bias, path)
        if is_output and _is_plain(module):
            return _Match(classifier, features, logits, is_output)
        difference, equal = _difference(features, weight, bias, logits, call.dtype, 0 if known is None else _LATER_ROWS)
        if equal:
            return _Match(classifier, features, logits, is_output, difference)
        if difference <= failed.difference:
            failed = _Mismatch(name, f"{shapes} differs by up to {difference:.3g}", difference)
    return failed


def _difference(
    features: Tensor, weight: Tensor, bias: Tensor | None, logits: Tensor, computed: torch.dtype, rows: int
) -> tuple[float, bool]:
    """Return max |features · Wᵀ + b − logits| over samples, and whether all differences are rounding errors.

    The rounding error of an entry is bounded by a multiple of the rounding unit times Σ|h_i w_i| + |b|: by a few units
    if products are summed in a higher precision (half precision, TF32), otherwise by √d units more.

    Args:
        features: (..., d).
        weight: (K, d).
        bias: (K,) or None.
        logits: (..., K).
        computed: Dtype of the output of the module.
        rows: Number of evenly spaced samples to compare; 0: all, within `_FIRST_PRODUCTS`.
    """
    dtypes = (features.dtype, weight.dtype, computed, logits.dtype)
    rounding = max(_rounding(dtype, logits.device) for dtype in dtypes)
    smallest = max(torch.finfo(dtype).smallest_normal for dtype in (computed, logits.dtype))
    dtype = torch.float64 if weight.numel() <= 2**22 else torch.promote_types(weight.dtype, torch.float32)
    device = torch.device("cpu") if logits.device.type == "mps" else logits.device  # MPS does not support fp64
    rows = rows or max(_LATER_ROWS, _FIRST_PRODUCTS // weight.numel())
    features, logits = features.flatten(0, -2), logits.flatten(0, -2)
    if len(features) > rows:
        chosen = torch.linspace(0, len(features) - 1, rows, device=features.device).round().long()
        features, logits = features[chosen], logits[chosen]
    inputs, matrix, outputs = (tensor.to(device, dtype) for tensor in (features, weight, logits))
    expected, scale = inputs @ matrix.T, inputs.abs() @ matrix.abs().T
    if bias is not None:
        expected, scale = expected + bias.to(expected), scale + bias.abs().to(scale)
    units = 4.0 if rounding > 1e-4 else 4 + math.sqrt(features.shape[1])
    # Features that are not finite raise an error later; a logit beyond the range of its dtype is infinite.
    comparable = inputs.isfinite().all(dim=1, keepdim=True) & (expected.abs() < torch.finfo(logits.dtype).max)
    differences = (expected - outputs).abs().nan_to_num(math.inf, math.inf)[comparable]
    if not differences.numel():
        return 0.0, True
    allowed = (units * rounding * scale + smallest)[comparable]
    return float(differences.max()), bool((differences <= allowed).all())


def _rounding(dtype: torch.dtype, device: torch.device) -> float:
    """Return the rounding unit of a dtype; that of fp32 depends on the precision of its products."""
    unit = torch.finfo(dtype).eps
    if dtype != torch.float32:
        return unit
    if device.type != "cpu":
        return 2.0**-10  # TF32
    backend = torch.backends.mkldnn
    if hasattr(backend, "matmul"):  # torch ≥ 2.9
        settings = {backend.matmul.fp32_precision, backend.conv.fp32_precision}  # type: ignore[attr-defined]
    else:
        settings = {{"high": "tf32", "medium": "bf16"}.get(torch.get_float32_matmul_precision(), "")}
    return 2.0**-7 if "bf16" in settings else 2.0**-10 if "tf32" in settings else unit


def _in_layout(features: Tensor, logits: Tensor) -> Tensor | None:
    """Return the features in the layout of the logits, averaged over positions if the logits do not have positions."""
    if not _is_floating(features) or not features.ndim:
        return None
    if features.shape[:-1] == logits.shape[:-1]:
        return features
    if features.ndim > 2 and logits.ndim == 2 and len(features) == len(logits):
        return features.flatten(1, -2).mean(dim=1)
    return None


def _parameters(module: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return the current W (K, d) and b, dequantised for quantised layers and without positions for convolutions."""
    weight, bias = (value() if callable(value) else value for value in (module.weight, getattr(module, "bias", None)))
    if not isinstance(weight, Tensor):
        return None, None
    weight = weight.detach()
    if weight.is_quantized or type(weight).dequantize is not Tensor.dequantize:
        weight = weight.dequantize()
    if isinstance(module, _CONVOLUTIONS):
        weight = weight.flatten(1)
    return weight, None if bias is None else bias.detach()


def _is_plain(module: nn.Module) -> bool:
    """Return whether the output of the module follows from its weight and bias, regardless of its arithmetic."""
    if type(module) not in (nn.Linear, NonDynamicallyQuantizableLinear) and not _is_dynamic_quantised(module):
        return False
    return "forward" not in vars(module) and len(module._forward_hooks) <= 1 and not module._forward_pre_hooks


def _is_dynamic_quantised(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.ao.nn.quantized.dynamic.modules.linear")


def _has_weight(module: nn.Module) -> bool:
    """Return whether the module could compute logits: it has a weight (K, d), or is a 1 × 1 convolution."""
    if isinstance(module, nn.Linear) or _is_dynamic_quantised(module):
        return True
    if isinstance(module, _CONVOLUTIONS):
        return module.groups == 1 and module.out_channels > 1 and set(module.kernel_size) == {1}
    if unwrapped(module) is not module or isinstance(module, nn.Embedding):
        return False
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2


def _without_features(passing: list[_Match]) -> list[_Match]:
    """Return the matches without modules whose output is the features of another match."""
    return [match for match in passing if not any(_computes_features(match, other) for other in passing)]


def _computes_features(match: _Match, other: _Match) -> bool:
    """Return whether the output of one module is what the weight of the other one multiplies."""
    first, features = match.classifier, other.features
    return (
        first.output != other.classifier.output
        and features.shape == (*match.features.shape[:-1], len(first.weight))
        and _difference(match.features, first.weight, first.bias, features, features.dtype, _LATER_ROWS)[1]
    )


def _break_tie(passing: list[_Match]) -> list[_Match]:
    """Decide between modules that compute the output: by identity, by a shared weight, then by name."""
    classifiers = [match.classifier for match in passing]
    if len({classifier.output for classifier in classifiers}) > 1:
        return passing  # several tensors of the output are logits
    if len({(classifier.weight.data_ptr(), classifier.weight.shape) for classifier in classifiers}) == 1:
        return passing[:1]
    passing = [match for match in passing if match.is_output] or passing
    named = [match for match in passing if match.name.split(".")[-1] in _CONVENTIONAL_NAMES]
    return named if len(named) == 1 else passing


def _tensors(returned: Any) -> list[tuple[Path, Tensor]]:
    """Return the floating-point tensors of an output with their keys; if some are named logits, only these."""
    tensors = list(_leaves((), returned))
    return [(path, tensor) for path, tensor in tensors if path and path[-1] == "logits"] or tensors


def _leaves(path: Path, value: Any) -> Iterator[tuple[Path, Tensor]]:
    if isinstance(value, Tensor):
        if _is_floating(value):
            yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves((*path, key), inner)
    elif isinstance(value, tuple | list):
        for key, inner in zip(getattr(value, "_fields", range(len(value))), value, strict=True):
            yield from _leaves((*path, key), inner)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _leaves((*path, field.name), getattr(value, field.name))
    elif not path and hasattr(value, "__dict__") and not isinstance(value, nn.Module):
        for key, inner in vars(value).items():
            yield from _leaves((key,), inner)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and not value.is_quantized


def _version(tensor: Tensor) -> int | None:
    """Return the number of in-place changes, or None for a tensor of inference mode."""
    return None if tensor.is_inference() else tensor._version


def _only(model: nn.Module, candidates: list[tuple[str, nn.Module]]) -> tuple[str, nn.Module]:
    """Return the only candidate; raise a `ValueError` if there is not exactly one."""
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise ValueError(
            f"model ({type(model).__name__}) must end in a classifier (nn.Linear, or a module with weight, bias and "
            f"features); found none. {_HOW_TO_NAME}"
        )
    names = listed([repr(name) for name, _ in candidates], most=8)
    raise ValueError(f"several modules of {type(model).__name__} could be its classifier: {names}. {_HOW_TO_NAME}")


def _named(model: nn.Module, classifier: str | nn.Module) -> tuple[str, nn.Module]:
    """Return the name and the module of a classifier given by either."""
    check_named(classifier)
    if isinstance(classifier, nn.Module):
        names = [name for name, module in model.named_modules() if module is unwrapped(classifier)]
        if not names:
            raise ValueError(f"classifier ({type(classifier).__name__}) must be a module of the model, but is not")
        return names[0], unwrapped(classifier)
    assert isinstance(classifier, str)
    for root in (model, unwrapped(model)):
        try:
            module = unwrapped(root.get_submodule(classifier)) if classifier else unwrapped(root)
        except AttributeError:
            continue
        return next(name for name, other in model.named_modules() if other is module), module
    classifiers = ", ".join(repr(name) for name, module in model.named_modules() if is_classifier(module))
    raise ValueError(
        f"classifier must name a module of the model, got {classifier!r}; those with a weight are "
        f"{classifiers or 'none'}"
    )


def _in_features(classifier: nn.Module) -> int | None:
    weight = classifier.weight
    return weight.shape[1] if isinstance(weight, Tensor) and weight.ndim == 2 else None


def _structural_candidates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules that may be the classifier according to the structure of the model."""
    return _declared_classifier(model) or _ends("", model)


def _declared_classifier(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the module that the method ``get_classifier`` of the model returns, if it is a classifier."""
    get_classifier = getattr(model, "get_classifier", None)
    declared = get_classifier() if callable(get_classifier) else None
    if isinstance(declared, nn.Identity):
        raise ValueError(
            f"model ({type(model).__name__}) must end in a classifier; its get_classifier() is an nn.Identity. "
            "Create it with a number of classes, or name a module with classifier='dotted.name'"
        )
    if not (isinstance(declared, nn.Module) and is_classifier(declared)):
        return []
    return [(name, module) for name, module in model.named_modules() if module is declared]


def _ends(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the classifiers in which a module may end."""
    if is_classifier(module):
        return [(name, module)]
    children = [
        (f"{name}.{child_name}" if name else child_name, child) for child_name, child in module.named_children()
    ]
    if isinstance(module, nn.Sequential):
        layers = [(child_name, child) for child_name, child in children if not isinstance(child, nn.Identity)]
        return _ends(*layers[-1]) if layers else []
    return list(_direct_ends(children)) or [end for child in children for end in _ends(*child)]


def _direct_ends(children: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the children that are classifiers, and the last layer of a chain if it is one."""
    for name, child in children:
        if is_classifier(child):
            yield name, child
        elif isinstance(child, nn.Sequential):
            ends = _ends(name, child)
            if len(ends) == 1 and ends[0][0].count(".") == name.count(".") + 1:
                yield ends[0]
