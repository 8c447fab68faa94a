"""What Hugging Face's models, which are saved by ``save_pretrained``, and their ``Trainer`` ask of an attached head."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import CodeType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from neuralcollapse._checks import check_targets


def with_logits(returned: Any, logits: Tensor, key: object = "logits", loss: Tensor | None = None) -> Any:
    """Return what the model returned with these logits, and the loss if any; a dictionary unless it is a mapping.

    Args:
        returned: What the model returned.
        logits: (..., K).
        key: The key of the logits in it.
        loss: ().
    """
    key = key if isinstance(key, str) and isinstance(returned, Mapping) and key in returned else "logits"
    first = {} if loss is None else {"loss": loss}  # tuples made of a model's output begin with the loss
    if not isinstance(returned, Mapping):
        return first | {"logits": logits}
    return type(returned)(**(first | dict(returned) | first | {key: logits}))


def labels_loss(
    logits: Tensor, labels: Tensor, ignore_index: int | None, num_items_in_batch: Tensor | int | None
) -> Tensor:
    """Return the cross-entropy of logits and labels.

    Args:
        logits: (..., K).
        labels: (...) integers.
        ignore_index: Labels of this value do not count; −100 if None.
        num_items_in_batch: What the sum over labels is divided by, where batches accumulate; else their number.

    Raises:
        ValueError: if labels are of another shape than the logits', or out of range.
    """
    ignored = -100 if ignore_index is None else ignore_index
    flat, labels = logits.flatten(0, -2).float(), labels.flatten().long()
    check_targets(labels, *flat.shape, values=labels.device.type == "cpu", ignore_index=ignored)
    if num_items_in_batch is None:
        return functional.cross_entropy(flat, labels, ignore_index=ignored)
    return functional.cross_entropy(flat, labels, ignore_index=ignored, reduction="sum") / num_items_in_batch


class ShowsModelArguments:
    """Decorator of a wrapper's ``forward``: its signature is that of ``self.model.forward``, with its own arguments.

    ``transformers.Trainer`` reads from the signature which columns of a dataset the model takes.

    Args:
        function: The method.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> Callable[..., Any]:
        return self.function if instance is None else _Bound(self.function, instance)


class _Bound:
    """The method of one instance."""

    def __init__(self, function: Callable[..., Any], instance: Any) -> None:
        self.function = function
        self.instance = instance

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.instance, *args, **kwargs)

    @property
    def __code__(self) -> CodeType:
        """Asked for by torch.export."""
        return self.function.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        own = dict(list(inspect.signature(self.function).parameters.items())[1:])
        shown = dict(inspect.signature(self.instance.model.forward).parameters)
        shown |= {
            name: parameter
            for name, parameter in own.items()
            if name not in shown and parameter.kind is not inspect.Parameter.VAR_POSITIONAL
        }
        variable = [name for name, parameter in shown.items() if parameter.kind is inspect.Parameter.VAR_KEYWORD]
        for name in variable[:-1]:
            del shown[name]
        return inspect.Signature(sorted(shown.values(), key=lambda parameter: parameter.kind))


class SavingGuard:
    """While it stands, ``save_pretrained`` refuses what ``from_pretrained`` would give a new, random classifier.

    Args:
        model: The model. What it has of ``save_pretrained`` from the top to the classifier's place is guarded.
        name: Dotted name of the classifier's place.
        classifier: What stood there.
    """

    def __init__(self, model: nn.Module, name: str, classifier: nn.Module) -> None:
        self.name = name
        bias = classifier.bias is not None if type(classifier) is nn.Linear else None
        self._before: list[Any] = []
        for owner, inner in _savers(model, name):
            self._before.append(vars(owner).get("save_pretrained"))
            owner.save_pretrained = partial(_save_pretrained, owner, inner, bias)  # type: ignore[assignment]

    def release(self, model: nn.Module) -> None:
        """Take the guard away again."""
        for (owner, _), before in zip(_savers(model, self.name), self._before, strict=True):
            del owner.save_pretrained
            if before is not None:
                owner.save_pretrained = before


def set_number_of_classes(model: nn.Module, name: str, num_classes: int) -> None:
    """Let the configuration of a pretrained model tell how many classes its classifier has."""
    for owner, _ in _savers(model, name):
        config: Any = getattr(owner, "config", None)
        if getattr(config, "num_labels", num_classes) != num_classes:
            config.num_labels = num_classes
        if hasattr(owner, "num_labels"):
            owner.num_labels = num_classes  # type: ignore[assignment]


def _savers(model: nn.Module, name: str) -> list[tuple[nn.Module, str]]:
    """The modules with ``save_pretrained`` that hold the named one, and its name in each."""
    parts = name.split(".") if name else []
    holders = [(model.get_submodule(".".join(parts[:depth])), ".".join(parts[depth:])) for depth in range(len(parts))]
    return [(holder, inner) for holder, inner in holders if callable(getattr(holder, "save_pretrained", None))]


def _save_pretrained(model: nn.Module, name: str, bias: bool | None, *args: Any, **kwargs: Any) -> Any:
    place = model.get_submodule(name)
    if type(place) is nn.Linear and (place.bias is not None) is bias:
        return type(model).save_pretrained(model, *args, **kwargs)  # type: ignore[attr-defined]
    wanted = "an nn.Linear" if bias is None else f"an nn.Linear with{'' if bias else 'out'} bias"
    found = "taken by an attached head" if isinstance(place, nn.Identity) else f"{place}"
    raise ValueError(
        f"save_pretrained() would lose the classifier, and from_pretrained() start with a random one: {name!r} of "
        f"{type(model).__name__} must be {wanted}, and is {' '.join(found.split())}. A head with feature_norm=None "
        "fits in there by to_inference(); with others, keep the state_dict()"
    )
