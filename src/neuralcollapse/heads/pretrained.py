"""What Hugging Face's models, which are saved by ``save_pretrained``, and their ``Trainer`` ask of an attached head."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from neuralcollapse._checks import check_targets


def with_loss(
    returned: Any, logits: Tensor, labels: Tensor, ignore_index: int | None, num_items_in_batch: Tensor | int | None
) -> Any:
    """What the model returned with these logits and their cross-entropy as ``loss``; a dictionary if it is no mapping.

    Args:
        returned: What the model returned.
        logits: (..., K).
        labels: (...) integers.
        ignore_index: Labels of this value do not count; −100 if None.
        num_items_in_batch: What the sum over labels is divided by, where batches accumulate; else their number.

    Raises:
        ValueError: Labels of another shape than the logits', or out of range.
    """
    ignored = -100 if ignore_index is None else ignore_index
    flat, labels = logits.flatten(0, -2).float(), labels.flatten().long()
    check_targets(labels, *flat.shape, values=labels.device.type == "cpu", ignore_index=ignored)
    if num_items_in_batch is None:
        loss = functional.cross_entropy(flat, labels, ignore_index=ignored)
    else:
        loss = functional.cross_entropy(flat, labels, ignore_index=ignored, reduction="sum") / num_items_in_batch
    if not isinstance(returned, Mapping):
        return {"loss": loss, "logits": logits}
    # The loss first, where tuples made of it have it.
    return type(returned)(**({"loss": loss} | dict(returned) | {"loss": loss, "logits": logits}))


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
