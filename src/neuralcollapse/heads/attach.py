"""Put a head on any model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from neuralcollapse._checks import check_integral, check_module
from neuralcollapse.classifier import resolve_classifier
from neuralcollapse.heads.head import Head

Output = str | int | Callable[[Any], Tensor]


class AttachedHead(nn.Module):
    """A model whose classifier is replaced by a head; made by `attach_head`."""

    def __init__(self, model: nn.Module, head: nn.Module, name: str, output: Output | None) -> None:
        super().__init__()
        self.model = model
        self.head = head
        self._name = name
        self._output = output
        self._verified = False
        self._spent = False

    def forward(self, *args: Any, targets: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Logits (..., K) of the model's arguments; a head that learns from targets is given them in training."""
        self._check_not_spent()
        if targets is not None:
            check_integral("targets", targets)
        if self._verified or torch.compiler.is_compiling():
            features = self._select(self.model(*args, **kwargs))
        else:
            features = self._verify(*args, **kwargs)
        return self.head(features) if targets is None else self.head(features, targets)

    def to_inference(self, **kwargs: Any) -> nn.Module:
        """The model itself (changed), with the head's ``to_inference(**kwargs)`` in its classifier's place.

        The attached model is spent by it: a further call raises, since the model now decides by itself.

        Raises:
            ValueError: A head without ``to_inference``, or a second call.
        """
        self._check_not_spent()
        if not isinstance(self.head, Head):
            raise ValueError(f"head must have to_inference(), got {type(self.head).__name__}")
        plain = self.head.to_inference(**kwargs).train(self.training)
        if not self._name:
            return plain
        self.model.set_submodule(self._name, plain)
        self._spent = True
        return self.model

    def _check_not_spent(self) -> None:
        if self._spent:
            raise ValueError(
                "to_inference() has put a plain classifier into the attached model, which is spent: "
                "call the model that it returned, or attach a head to that"
            )

    def _select(self, returned: Any) -> Tensor:
        """The logits' place in what the model returned."""
        if callable(self._output):
            return self._output(returned)
        if self._output is not None:
            by_name = isinstance(self._output, str) and not isinstance(returned, dict)
            try:
                return getattr(returned, self._output) if by_name else returned[self._output]  # type: ignore[arg-type]
            except (AttributeError, KeyError, IndexError, TypeError):
                raise ValueError(
                    f"output must say where the logits are in the {type(returned).__name__} that the model returned; "
                    f"it has no {self._output!r}"
                ) from None
        if not isinstance(returned, Tensor):
            raise ValueError(
                f"output must say where the logits are in the {type(returned).__name__} that the model returned, "
                "as a name, an index or a function: attach_head(..., output='logits')"
            )
        return returned

    def _verify(self, *args: Any, **kwargs: Any) -> Tensor:
        """The first call, which sees that what the model returns is what its classifier's place returns."""
        seen: list[Tensor] = []
        place = self.model.get_submodule(self._name)
        with place.register_forward_hook(lambda _module, _inputs, result: seen.append(result)):
            features = self._select(self.model(*args, **kwargs))
        if not seen:
            raise ValueError(f"classifier {self._name!r} must be called by the model's forward; it was not")
        if features is not seen[-1]:
            raise ValueError(
                f"classifier {self._name!r} must be the last thing that the model does, but what "
                f"{type(self.model).__name__} returned is not its output: something comes after it. "
                "Take that away, or name the right module or output"
            )
        self._verified = True
        return features


def attach_head(
    model: nn.Module, head: nn.Module, *, classifier: str | nn.Module | None = None, output: Output | None = None
) -> AttachedHead:
    """Replace a model's classifier by a head.

    `nn.Identity` takes the classifier's place in ``model`` (which is changed), and the head is called on what the
    model returns. The first call checks that this is what the Identity returned.

    Args:
        model: Any module that ends in a classifier.
        head: A head of this library, or any module called with features.
        classifier: Dotted name of the module to replace, or the module; found by `find_classifier` if not given.
        output: Where the logits are in what the model returns, if that is no tensor: an attribute or key, an
            index, or a function.

    Returns:
        A module with ``forward(*args, targets=None, **kwargs)`` that returns the logits.
        Its ``to_inference()`` is the model again, with plain modules in the classifier's place.

    Raises:
        ValueError: An argument of another kind, no classifier, several candidates, or a head for another feature
            dimension; at the first call, a model that does something after its classifier.

    Example:
        >>> from neuralcollapse import NearestETFClassifier, attach_head
        >>> model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> model = attach_head(model, NearestETFClassifier(64, 10))
        >>> model(torch.randn(32, 20), targets=torch.randint(10, (32,))).shape
        torch.Size([32, 10])
    """
    check_module("head", head)
    if output is not None and (isinstance(output, bool) or not (isinstance(output, str | int) or callable(output))):
        raise ValueError(f"output must be a name, an index or a function, got {output!r}")
    name, found = resolve_classifier(model, classifier)
    expected = found.weight.shape[1]  # type: ignore[index]
    given = getattr(head, "in_features", expected)
    if given != expected:
        raise ValueError(
            f"head must take the {expected} features that classifier {name!r} takes, got in_features = {given}"
        )
    if name:
        model.set_submodule(name, nn.Identity())
    else:
        model = nn.Identity()
    return AttachedHead(model, head, name, output)
