"""Support for attached heads in Hugging Face models: outputs, loss, signature and configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import CodeType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from neuralcollapse._checks import check_targets

SAVING_REFUSED = (
    "save_pretrained() writes only weights of the original architecture, so from_pretrained() would start with a "
    "random classifier in place of the {head}: call model.to_inference().save_pretrained(folder), which fits the "
    "architecture's nn.Linear if the head has feature_norm=None; otherwise save model.state_dict()"
)


def with_logits(returned: Any, logits: Tensor, key: object = "logits", loss: Tensor | None = None) -> Any:
    """Return the model's output with these logits, and with the loss if given.

    Args:
        returned: Output of the model. If it is not a mapping, the result is a dictionary.
        logits: (..., K).
        key: Key of the logits in the output.
        loss: ().
    """
    key = key if isinstance(key, str) and isinstance(returned, Mapping) and key in returned else "logits"
    first = {} if loss is None else {"loss": loss}  # the loss must come first in the tuple form of a ModelOutput
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
        ignore_index: Labels with this value are ignored; −100 if None.
        num_items_in_batch: Divisor of the sum over labels, for accumulated batches; if None, the number of labels.

    Raises:
        ValueError: if the labels are out of range or do not have the shape of the logits.
    """
    ignored = -100 if ignore_index is None else ignore_index
    flat, labels = logits.flatten(0, -2).float(), labels.flatten().long()
    check_targets(labels, *flat.shape, values=labels.device.type == "cpu", ignore_index=ignored)
    if num_items_in_batch is None:
        return functional.cross_entropy(flat, labels, ignore_index=ignored)
    return functional.cross_entropy(flat, labels, ignore_index=ignored, reduction="sum") / num_items_in_batch


class WithModelSignature:
    """Decorator that adds the arguments of ``self.model.forward`` to the signature of a wrapper's ``forward``.

    ``transformers.Trainer`` determines from the signature which columns of a dataset the model takes.

    Args:
        function: The method.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> Callable[..., Any]:
        return self.function if instance is None else _BoundMethod(self.function, instance)


class _BoundMethod:
    """Decorated method bound to an instance."""

    def __init__(self, function: Callable[..., Any], instance: Any) -> None:
        self.function = function
        self.instance = instance

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.instance, *args, **kwargs)

    @property
    def __code__(self) -> CodeType:
        """Code object of the method, which torch.export reads."""
        return self.function.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        parameters = dict(inspect.signature(self.instance.model.forward).parameters)
        _, *wrapper_parameters = inspect.signature(self.function).parameters.values()
        for parameter in wrapper_parameters:
            if parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
                parameters.setdefault(parameter.name, parameter)
        variable = [name for name, parameter in parameters.items() if parameter.kind is inspect.Parameter.VAR_KEYWORD]
        for name in variable[:-1]:
            del parameters[name]
        return inspect.Signature(sorted(parameters.values(), key=lambda parameter: parameter.kind))


def set_number_of_classes(model: nn.Module, classifier: str, num_classes: int) -> None:
    """Set the number of classes in the configuration of each pretrained model that contains the named classifier."""
    parts = classifier.split(".")
    for depth in range(len(parts)):
        pretrained: Any = model.get_submodule(".".join(parts[:depth]))
        if not callable(getattr(pretrained, "save_pretrained", None)):
            continue
        config = getattr(pretrained, "config", None)
        if getattr(config, "num_labels", num_classes) != num_classes:
            config.num_labels = num_classes  # type: ignore[union-attr]
        if hasattr(pretrained, "num_labels"):
            pretrained.num_labels = num_classes
