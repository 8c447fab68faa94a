"""The classifier of a model, found from the model's structure, or by running it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from neuralcollapse._checks import check_module
from neuralcollapse._running import call_model, device_of, evaluation_mode, unchanged_on_error, unwrapped

_CONVENTIONAL_NAMES = ("classifier", "fc", "head", "heads", "linear", "output", "lm_head", "score")
_KEPT_BYTES = 2**28  # inputs of candidates kept during the first forward; those of the earliest calls are dropped
_FIRST_PRODUCTS = 2**28  # multiplications at most for the comparison of one candidate on the first batch
_LATER_ROWS = 16  # samples compared in each later batch
_HOW_TO_NAME = "Name it with classifier='dotted.name'; find_classifier(model, example) finds it by running the model"


def is_classifier(module: nn.Module) -> bool:
    """Return whether a module is an ``nn.Linear``, or has ``weight`` (K, d), ``bias`` and a method ``features``."""
    if isinstance(module, nn.Linear):
        return True
    weight = getattr(module, "weight", None)
    if not (isinstance(weight, Tensor) and weight.ndim == 2 and hasattr(module, "bias")):
        return False
    return callable(getattr(module, "features", None))


def classifier_features(classifier: nn.Module, inputs: Tensor) -> Tensor:
    """Return the tensor that the classifier's weight multiplies, given the classifier's input.

    For an ``nn.Linear`` that is the input itself; a head that normalises returns the normalised features.
    """
    features = getattr(classifier, "features", None)
    return features(inputs) if callable(features) else inputs


def find_classifier(model: nn.Module, example: Any = None) -> tuple[str, nn.Module]:
    """Find the module whose output is the model's logits.

    With an ``example`` the model is run on it, in evaluation mode and without gradients: the classifier is the
    module for which features · Wᵀ + b equals what the model returned, within rounding. Names such as ``fc`` or
    ``head`` decide only between modules that pass.

    Without one, only the structure is looked at: the classifier is what ``get_classifier()`` returns (as in timm);
    else an ``nn.Sequential`` ends in its last child, any other module in the one of its direct children that is, or
    ends in, a classifier, and where there is none in the only one deeper inside.

    Args:
        model: Any module.
        example: Inputs of the model: a tensor, a tuple of positional or a mapping of keyword arguments. They are moved
            to the model's device.

    Returns:
        The dotted name inside ``model`` (empty when the model itself is the classifier), and the module.

    Raises:
        ValueError: if ``model`` is not a module, if it has no classifier, or if several modules could be it; with an
            example, if no module computes the model's output. The message names them. The model is left unchanged.

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
        return _only(model, structural_candidates(model))
    observer = ClassifierObserver(model)
    with torch.no_grad(), unchanged_on_error(model), evaluation_mode(model), observer:
        observer.read(call_model(model, example, device_of(model)))
    return observer.classifier.name, observer.classifier.module


def resolve_classifier(
    model: nn.Module, classifier: str | nn.Module | None = None, in_features: int | None = None
) -> tuple[str, nn.Module]:
    """Return the classifier that the caller named or passed, else the one that the structure shows.

    Args:
        model: The model.
        classifier: The classifier, or its dotted name.
        in_features: Number of features d of the classifier, which decides between several candidates.
    """
    check_module("model", model)
    if classifier is None:
        candidates = structural_candidates(model)
        if len(candidates) > 1 and in_features is not None:
            fitting = [found for found in candidates if _in_features(found[1]) == in_features]
            candidates = fitting if len(fitting) == 1 else candidates
        name, module = _only(model, candidates)
    else:
        name, module = _named(model, classifier)
    if not is_classifier(module):
        raise ValueError(
            f"classifier {name!r} must be an nn.Linear or have weight (K, d), bias and features(x); "
            f"got {type(module).__name__}"
        )
    check_not_lazy(repr(name), module)
    return name, module


def expected_classifier(model: nn.Module, classifier: str | nn.Module | None = None) -> str:
    """Describe, before the model has run, the classifier that will be measured.

    Raises:
        ValueError: if the given name is not in the model, or no module could be the classifier.
    """
    observer = ClassifierObserver(model, classifier)
    if observer.named is not None:
        return repr(observer.named)
    candidates = structural_candidates(model)
    return repr(candidates[0][0]) if len(candidates) == 1 else "(the first batch decides)"


def check_not_lazy(name: str, classifier: nn.Module) -> None:
    """Raise a ValueError if the classifier does not know its number of features yet."""
    if isinstance(classifier, LazyModuleMixin) and classifier.has_uninitialized_params():
        raise ValueError(
            f"classifier {name} must know its number of features, got a {type(classifier).__name__} that has seen no "
            "input: run the model on a batch first"
        )


def structural_candidates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules that could be the model's classifier by its structure alone."""
    return _said(model) or _candidates("", model)


@dataclass(frozen=True)
class OutputClassifier:
    """The module that computes a model's output.

    Attributes:
        name: Its dotted name.
        module: The module.
        weight: W (K, d), as the model's forward used it.
        bias: b (K,), or None.
        output: Keys that lead to the logits in what the model returns.
    """

    name: str
    module: nn.Module
    weight: Tensor
    bias: Tensor | None
    output: tuple[str | int, ...]


class ClassifierObserver:
    """Observes forward passes of a model, and finds the module that computes its output on the first one.

    Used as a context in which the model is run; `read` is called with what each run returned.

    Args:
        model: The model.
        classifier: The classifier or its dotted name, if the caller gave one; it is verified as well.

    Raises:
        ValueError: if the model is a TorchScript module, the name is not in it, or no module could be its classifier.
    """

    def __init__(self, model: nn.Module, classifier: str | nn.Module | None = None) -> None:
        check_module("model", model)
        if isinstance(unwrapped(model), torch.jit.ScriptModule):
            raise ValueError(
                f"model must be a plain nn.Module, got a TorchScript {type(unwrapped(model)).__name__}, whose modules "
                "cannot be observed: use the module that it was made from"
            )
        self._model = model
        self._modules = {name: module for name, module in model.named_modules() if _has_weight(module)}
        self.named: str | None = None
        if classifier is not None:
            self.named, module = _named(model, classifier)
            if self.named not in self._modules:
                raise ValueError(
                    f"classifier {self.named!r} must be an nn.Linear or have weight (K, d), bias and features(x); "
                    f"got {type(module).__name__}"
                )
        elif not self._modules:
            _only(model, [])
        else:
            _said(model)
        for name, module in self._modules.items():
            check_not_lazy(repr(name), module)
        self._found: OutputClassifier | None = None
        self._calls: dict[str, _Call] = {}
        self._hooks = ExitStack()

    @property
    def classifier(self) -> OutputClassifier:
        """The classifier, known after the first `read`."""
        if self._found is None:
            raise RuntimeError("the classifier is known after the first batch")
        return self._found

    def __enter__(self) -> ClassifierObserver:
        self._observe(self._modules if self._found is None else {self._found.name: self._found.module})
        return self

    def __exit__(self, *_: object) -> None:
        self._observe({})

    def read(self, returned: Any) -> tuple[Tensor, Tensor]:
        """Return features (..., d) and logits (..., K) of the run that has just ended.

        The first call decides which module is the classifier, by a comparison on all samples (on evenly spaced ones if
        the batch is very large). Later calls compare a few samples.

        Args:
            returned: What the model returned.

        Raises:
            ValueError: if no module computes what the model returned, or several do; later, if the classifier was not
                called exactly once or no longer computes the output.
        """
        calls, self._calls = self._calls, {}
        if self._found is None:
            match = self._decide(calls, _tensors(returned))
            self._found = match.classifier
            self._observe({match.name: self._modules[match.name]})
        else:
            match = self._again(calls, returned, self._found)
        if match.features is None or match.classifier is None:
            raise ValueError(
                f"classifier {match.name!r} computed the output of the first batch, but not of a later one: "
                f"{match.name!r} {match.reason}"
            )
        return match.features, _at(returned, match.classifier.output)

    def _observe(self, modules: dict[str, nn.Module]) -> None:
        """Observe these modules, and no others."""
        self._hooks.close()
        self._calls = {}
        for name, module in modules.items():
            self._hooks.enter_context(module.register_forward_hook(self._note(name), with_kwargs=True))

    def _note(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            call = self._calls.setdefault(name, _Call())
            call.count += 1
            inputs: Any = args[0] if args else next(iter(kwargs.values()), None)
            if call.count == 1 and _is_floating(inputs) and _is_floating(output):
                call.take(module, inputs, output)
                self._drop_earliest()

        return note

    def _drop_earliest(self) -> None:
        """Keep the memory that the first forward takes within bounds."""
        held = [(name, call.inputs) for name, call in self._calls.items() if call.inputs is not None]
        total = sum(inputs.nbytes for _, inputs in held)
        for name, inputs in held[:-1]:
            if total > _KEPT_BYTES and name != self.named:
                self._calls[name].inputs = None
                total -= inputs.nbytes

    def _decide(self, calls: dict[str, _Call], tensors: list[tuple[Path, Tensor]]) -> _Match:
        if self.named is not None and self.named not in calls:
            raise ValueError(f"{self.named!r} must be called by the model's forward, but was not")
        matches = [_compare(name, self._modules[name], call, tensors) for name, call in reversed(calls.items())]
        passing = _without_features([match for match in matches if match.features is not None])
        chosen = passing if self.named is None else [match for match in passing if match.name == self.named]
        if not chosen:
            raise ValueError(self._refusal(matches, passing, tensors))
        if len(chosen) > 1:
            chosen = _break_tie(chosen)
        if len(chosen) > 1:
            names = ", ".join(repr(match.name) for match in chosen)
            raise ValueError(
                f"several modules of {self._kind} compute what it returned: {names}. "
                "Name the one whose output is the logits with classifier='dotted.name'"
            )
        return chosen[0]

    def _again(self, calls: dict[str, _Call], returned: Any, found: OutputClassifier) -> _Match:
        try:
            logits = _at(returned, found.output)
        except (KeyError, IndexError, AttributeError, TypeError):
            return _Match(found.name, f"is not found at {list(found.output)} in a {type(returned).__name__}")
        call = calls.get(found.name, _Call())
        return _compare(found.name, found.module, call, [(found.output, logits)], found)

    @property
    def _kind(self) -> str:
        return type(unwrapped(self._model)).__name__

    def _refusal(self, matches: list[_Match], passing: list[_Match], tensors: list[tuple[Path, Tensor]]) -> str:
        if not tensors:
            return f"model must return logits, but what {self._kind} returned holds no floating-point tensor"
        if self.named is not None:
            matches = [match for match in matches if match.name == self.named]
        nearest = sorted(matches, key=lambda match: match.difference)[:3]
        reasons = "; ".join(f"{match.name!r} {match.reason}" for match in nearest)
        if not reasons:
            reasons = f"{', '.join(map(repr, list(self._modules)[:3]))} not called"
        subject = "no module" if self.named is None else f"classifier {self.named!r}"
        shapes = " or ".join(str(tuple(tensor.shape)) for _, tensor in tensors[:3])
        instead = f". That is the output of {passing[0].name!r}" if passing else ""
        return (
            f"{subject} of {self._kind} computes its output {shapes} as features · weightᵀ + bias: {reasons}{instead}. "
            "Take away what follows the classifier; give a layer that normalises a method features(x) that returns "
            "what its weight multiplies; merge adapters into their layer; or name another module with "
            "classifier='dotted.name'"
        )


Path = tuple[str | int, ...]


@dataclass
class _Call:
    """The calls of one module during one forward: their number, and the tensors of the first."""

    count: int = 0
    inputs: Tensor | None = None
    output: Callable[[], Tensor | None] | None = None
    version: int | None = None
    dtype: torch.dtype = torch.float32

    def take(self, module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        """Keep a copy of the inputs, which the model may change in place, and a weak reference to the output."""
        inputs = inputs.detach()
        self.inputs = inputs.flatten(2).mean(dim=2) if isinstance(module, _CONVOLUTIONS) else inputs.clone()
        self.output, self.version, self.dtype = weakref.ref(output), _version(output), output.dtype

    def returned(self, tensor: Tensor) -> bool:
        """Return whether the tensor is the module's output itself, unchanged."""
        if self.output is None or self.output() is not tensor:
            return False
        return self.version is not None and self.version == _version(tensor)


@dataclass(frozen=True)
class _Match:
    """The comparison of one module with what the model returned; ``features`` is None if it failed."""

    name: str
    reason: str
    difference: float = math.inf
    classifier: OutputClassifier | None = None
    features: Tensor | None = None
    is_output: bool = False


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _compare(
    name: str,
    module: nn.Module,
    call: _Call,
    tensors: list[tuple[Path, Tensor]],
    found: OutputClassifier | None = None,
) -> _Match:
    """Compare features · Wᵀ + b with tensors of the model's output, and return the first that is equal, or the nearest.

    Args:
        name: The module's name.
        module: The module.
        call: Its call during the forward.
        tensors: What it is compared with.
        found: The same module on an earlier batch: its weight is used again, and a few samples are compared.
    """
    if call.count != 1:
        return _Match(name, f"{_times(call.count)} per forward")
    if call.inputs is None:
        return _Match(
            name, "was not compared: it takes or returns no floating-point tensor, or too much was called after it"
        )
    weight, bias = _parameters(module) if found is None else (found.weight, found.bias)
    if weight is None or weight.ndim != 2 or not weight.is_floating_point() or weight.device.type == "meta":
        return _Match(name, f"({type(module).__name__}) has no floating-point weight of shape (K, d)")
    try:
        inputs = classifier_features(module, call.inputs)
    except Exception as error:  # a method of that name with another purpose
        return _Match(name, f"({type(module).__name__}) has a method features that fails: {error}")
    passed, failed = "computes the features that another module takes", _Match(name, "is compared with nothing")
    for path, logits in tensors:
        features = _in_layout(inputs, logits)
        shapes = f"with weight {tuple(weight.shape)} on features {tuple(call.inputs.shape)}"
        if features is None or (*features.shape[:-1], *weight.shape) != (*logits.shape, features.shape[-1]):
            if failed.difference == math.inf:
                failed = _Match(name, f"{shapes} gives {(*call.inputs.shape[:-1], len(weight))}")
            continue
        is_output = call.returned(logits)
        classifier = OutputClassifier(name, module, weight, bias, path)
        if is_output and _is_plain(module):
            return _Match(name, passed, 0.0, classifier, features, True)
        difference, equal = _difference(features, weight, bias, logits, call.dtype, 0 if found is None else _LATER_ROWS)
        if equal:
            return _Match(name, passed, difference, classifier, features, is_output)
        if difference <= failed.difference:
            failed = _Match(name, f"{shapes} differs by up to {difference:.3g}", difference)
    return failed


def _difference(
    features: Tensor, weight: Tensor, bias: Tensor | None, logits: Tensor, computed: torch.dtype, rows: int
) -> tuple[float, bool]:
    """Return max |features · Wᵀ + b − logits| over samples, and whether every difference is within rounding.

    An entry's rounding error is bounded by a multiple of the unit of rounding times Σ|h_i w_i| + |b|: a few units where
    products are summed in a higher precision (half precision, TF32), else with the √d of accumulation.

    Args:
        features: (..., d).
        weight: (K, d).
        bias: (K,) or None.
        logits: (..., K).
        computed: Dtype in which the module returned them.
        rows: How many samples to compare, evenly spaced; 0: all, if that is not too much work.
    """
    dtypes = (features.dtype, weight.dtype, computed, logits.dtype)
    rounding = max(_rounding(dtype, logits.device) for dtype in dtypes)
    smallest = max(torch.finfo(dtype).smallest_normal for dtype in (computed, logits.dtype))
    dtype = torch.float64 if weight.numel() <= 2**22 else torch.promote_types(weight.dtype, torch.float32)
    device = torch.device("cpu") if logits.device.type == "mps" else logits.device  # no float64 there
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
    # Features that are not finite are refused later, by name; a logit beyond the range of its dtype is infinite.
    comparable = inputs.isfinite().all(dim=1, keepdim=True) & (expected.abs() < torch.finfo(logits.dtype).max)
    differences = (expected - outputs).abs().nan_to_num(math.inf, math.inf)[comparable]
    if not differences.numel():
        return 0.0, True
    allowed = (units * rounding * scale + smallest)[comparable]
    return float(differences.max()), bool((differences <= allowed).all())


def _rounding(dtype: torch.dtype, device: torch.device) -> float:
    """Return the unit of rounding of a dtype, where fp32 products may be computed in less."""
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
    """Return the features in the layout of the logits: averaged over positions where those have none."""
    if not _is_floating(features) or not features.ndim:
        return None
    if features.shape[:-1] == logits.shape[:-1]:
        return features
    if features.ndim > 2 and logits.ndim == 2 and len(features) == len(logits):
        return features.flatten(1, -2).mean(dim=1)
    return None


def _parameters(module: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return W (K, d) and b as they are now: of quantised layers dequantised, of convolutions without positions."""
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
    """Return whether the module's output is known to be that of its weight and bias, whatever its arithmetic."""
    kind = type(module)
    if kind not in (nn.Linear, NonDynamicallyQuantizableLinear) and not _is_dynamic_quantised(module):
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
    """Leave out modules whose output the model returns as the features that another one takes."""
    return [match for match in passing if not any(_computes_features(match, other) for other in passing)]


def _computes_features(match: _Match, other: _Match) -> bool:
    """Return whether the output of one module is what the other one's weight multiplies."""
    own, features = match.classifier, other.features
    if own is None or other.classifier is None or match.features is None or features is None:
        return False
    if own.output == other.classifier.output or features.shape != (*match.features.shape[:-1], len(own.weight)):
        return False
    return _difference(match.features, own.weight, own.bias, features, features.dtype, _LATER_ROWS)[1]


def _break_tie(passing: list[_Match]) -> list[_Match]:
    """Decide between modules that pass: by the output itself, by one weight under two names, then by name."""
    found = [match.classifier for match in passing if match.classifier is not None]
    if len({classifier.output for classifier in found}) > 1:
        return passing  # several of the tensors returned are logits: which of them is meant cannot be seen
    if len({(classifier.weight.data_ptr(), classifier.weight.shape) for classifier in found}) == 1:
        return passing[:1]
    passing = [match for match in passing if match.is_output] or passing
    named = [match for match in passing if match.name.split(".")[-1] in _CONVENTIONAL_NAMES]
    return named if len(named) == 1 else passing


def _tensors(returned: Any) -> list[tuple[Path, Tensor]]:
    """Return the floating-point tensors in what a model returned; where some are called logits, these alone."""
    found = list(_leaves((), returned))
    return [(path, tensor) for path, tensor in found if path and path[-1] == "logits"] or found


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


def _at(returned: Any, path: Path) -> Tensor:
    for key in path:
        if isinstance(key, str) and not isinstance(returned, Mapping):
            returned = getattr(returned, key)
        else:
            returned = returned[key]
    if not isinstance(returned, Tensor):
        raise TypeError(f"not a tensor: {type(returned).__name__}")
    return returned


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and not value.is_quantized


def _version(tensor: Tensor) -> int | None:
    """Return the count of in-place changes, or None where torch keeps none."""
    return None if tensor.is_inference() else tensor._version


def _times(count: int) -> str:
    return "was not called" if not count else f"was called {count} times"


def _only(model: nn.Module, candidates: list[tuple[str, nn.Module]]) -> tuple[str, nn.Module]:
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise ValueError(
            f"model ({type(model).__name__}) must end in a classifier (nn.Linear, or a module with weight, bias and "
            f"features); found none. {_HOW_TO_NAME}"
        )
    names = ", ".join(repr(name) for name, _ in candidates[:8]) + (", …" if len(candidates) > 8 else "")
    raise ValueError(f"several modules of {type(model).__name__} could be its classifier: {names}. {_HOW_TO_NAME}")


def _named(model: nn.Module, classifier: str | nn.Module) -> tuple[str, nn.Module]:
    """Return the name and the module of a classifier given by either."""
    if isinstance(classifier, nn.Module):
        names = [name for name, module in model.named_modules() if module is unwrapped(classifier)]
        if not names:
            raise ValueError(f"classifier ({type(classifier).__name__}) must be a module of the model; it is not in it")
        return names[0], unwrapped(classifier)
    if not isinstance(classifier, str):
        raise ValueError(f"classifier must be a dotted name or a module of the model, got {classifier!r}")
    for root in (model, unwrapped(model)):
        try:
            module = unwrapped(root.get_submodule(classifier)) if classifier else unwrapped(root)
        except AttributeError:
            continue
        return next(name for name, one in model.named_modules() if one is module), module
    found = ", ".join(repr(name) for name, module in model.named_modules() if is_classifier(module))
    raise ValueError(
        f"classifier must name a module of the model, got {classifier!r}; those with a weight are {found or 'none'}"
    )


def _in_features(classifier: nn.Module) -> int | None:
    weight = classifier.weight
    return weight.shape[1] if isinstance(weight, Tensor) and weight.ndim == 2 else None


def _said(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return what the model itself calls its classifier."""
    get_classifier = getattr(model, "get_classifier", None)
    said = get_classifier() if callable(get_classifier) else None
    if isinstance(said, nn.Identity):
        raise ValueError(
            f"model ({type(model).__name__}) must end in a classifier; its get_classifier() is an nn.Identity. "
            "Make it with a number of classes, or name a module with classifier='dotted.name'"
        )
    if not (isinstance(said, nn.Module) and is_classifier(said)):
        return []
    return [(name, module) for name, module in model.named_modules() if module is said]


def _candidates(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return what the module could end in."""
    if is_classifier(module):
        return [(name, module)]
    children = [
        (f"{name}.{child_name}" if name else child_name, child) for child_name, child in module.named_children()
    ]
    if isinstance(module, nn.Sequential):
        ends = [(child_name, child) for child_name, child in children if not isinstance(child, nn.Identity)]
        return _candidates(*ends[-1]) if ends else []
    return list(_direct(children)) or [found for child in children for found in _candidates(*child)]


def _direct(children: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    """Yield those of the children that are classifiers, or chains that end in one."""
    for name, child in children:
        if is_classifier(child):
            yield name, child
        elif isinstance(child, nn.Sequential):
            ends = _candidates(name, child)
            if len(ends) == 1 and ends[0][0].count(".") == name.count(".") + 1:
                yield ends[0]
