"""Put a head on any model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from neuralcollapse._checks import check_integral, check_module
from neuralcollapse.classifier import resolve_classifier
from neuralcollapse.heads.head import Head
from neuralcollapse.heads.pretrained import SavingGuard, set_number_of_classes, with_loss
from neuralcollapse.heads.step_watch import StepWatch

Output = str | int | Callable[[Any], Tensor]
logger = logging.getLogger(__name__)

# What a Trainer of Hugging Face, or who saves, asks a model for; an attached model answers with its model's.
_OF_THE_MODEL = (
    "config",
    "activation_checkpointing_enable",
    "gradient_checkpointing_enable",
    "gradient_checkpointing_disable",
    "save_pretrained",
    "push_to_hub",
)


class AttachedHead(nn.Module):
    """A model whose classifier is replaced by a head; made by `attach_head`.

    Attributes:
        num_classes: How many classes the replaced classifier had, and how many the head has (None if it does not say).
    """

    def __init__(
        self, model: nn.Module, head: nn.Module, name: str, output: Output | None, classifier: nn.Module
    ) -> None:
        super().__init__()
        self.model = model
        self.head = head
        self.num_classes = (len(classifier.weight), _num_classes(head))  # type: ignore[arg-type]
        self._name = name
        self._output = output
        self._had_bias = classifier.bias is not None
        self._guard = SavingGuard(model, name, classifier)
        self._replaced: tuple[nn.Module, ...] = (classifier,)  # until the first call; a tuple hides it from nn.Module
        self._spent = ""
        self._watch = StepWatch()

    def __getattr__(self, name: str) -> Any:
        if name in _OF_THE_MODEL and "model" in self.__dict__.get("_modules", {}):
            return getattr(self.model, name)
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        before, now = self.num_classes
        return f"classifier={self._name!r}, {before} classes before" + ("" if now is None else f", {now} now")

    def forward(
        self,
        *args: Any,
        targets: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits of the model's arguments; a head that learns from targets is given them in training.

        Args:
            *args: The model's.
            targets: (...) integer classes.
            labels: The same, where the loss is wanted too, as Hugging Face's models take them. They go to the head,
                not to the model.
            num_items_in_batch: With labels: what their summed loss is divided by, as ``transformers.Trainer`` says.
            **kwargs: The model's.

        Returns:
            Logits (..., K). With labels, what the model returned with these logits and, as ``loss``, their
            cross-entropy; a dictionary of the two if the model returns no mapping.

        Raises:
            ValueError: Targets that are no integers, targets and labels; at the first call, a model that does something
                after its classifier, or an ``output`` that is not there. The model then has its classifier back.
        """
        if self._spent:
            raise ValueError(self._spent)
        if targets is not None and labels is not None:
            raise ValueError("targets and labels must not both be given")
        if targets is not None:
            check_integral("targets", targets)
        if labels is not None:
            check_integral("labels", labels)
            targets = labels
        returned, features = self._run(*args, **kwargs)
        logits = self.head(features) if targets is None else self.head(features, targets)
        if labels is None:
            return logits
        return with_loss(returned, logits, labels, getattr(self.head, "ignore_index", None), num_items_in_batch)

    def to_inference(self, **kwargs: Any) -> nn.Module:
        """The model itself (changed), with the head's ``to_inference(**kwargs)`` in its classifier's place.

        The attached model is spent by it: a further call raises, since the model now decides by itself. Where a bare
        ``nn.Linear`` takes the place of one with a bias, it has a bias (of 0 if the head has none), so that it fits
        into the model's class; a Hugging Face configuration is told the number of classes.

        Raises:
            ValueError: A head without ``to_inference``, or a second call.
        """
        if self._spent:
            raise ValueError(self._spent)
        if not isinstance(self.head, Head):
            raise ValueError(f"head must have to_inference(), got {type(self.head).__name__}")
        plain = self.head.to_inference(**kwargs).train(self.training)
        if not self._name:
            return plain
        if isinstance(plain, nn.Linear) and plain.bias is None and self._had_bias:
            plain.bias = nn.Parameter(plain.weight.new_zeros(plain.out_features))
        self.model.set_submodule(self._name, plain)
        set_number_of_classes(self.model, self._name, self.head.num_classes)
        self._spent = (
            "to_inference() has put a plain classifier into the attached model, which is spent: "
            "call the model that it returned, or attach a head to that"
        )
        return self.model

    def _run(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """What the model returned, and the features in it."""
        if torch.compiler.is_compiling():
            returned = self.model(*args, **kwargs)
            return returned, self._select(returned)
        if self.training and torch.is_grad_enabled():
            self._watch.look(self.model, self.head)
        if not self._replaced:
            returned = self.model(*args, **kwargs)
            return returned, self._select(returned)
        return self._run_first(*args, **kwargs)

    def _run_first(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """The first call, which sees that what the model returns is what its classifier's place returns."""
        seen: list[Tensor] = []
        place = self.model.get_submodule(self._name)
        with place.register_forward_hook(lambda _module, _inputs, result: seen.append(result)):
            returned = self.model(*args, **kwargs)
        try:
            if not seen:
                raise ValueError(f"classifier {self._name!r} must be called by the model's forward; it was not")
            features = self._select(returned)
            if features is not seen[-1]:
                raise ValueError(
                    f"classifier {self._name!r} must be the last thing that the model does, but what "
                    f"{type(self.model).__name__} returned is not its output: something comes after it. "
                    "Take that away, or name the right module or output"
                )
        except Exception:
            self._give_back()
            raise
        self._replaced = ()
        return returned, features

    def _give_back(self) -> None:
        """The model as it was before it was attached to."""
        if self._name:
            self.model.set_submodule(self._name, self._replaced[0])
        self._guard.release(self.model)
        self._spent = "attach_head was refused at the first call, and the model has its classifier back: attach again"

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


def attach_head(
    model: nn.Module, head: nn.Module, *, classifier: str | nn.Module | None = None, output: Output | None = None
) -> AttachedHead:
    """Replace a model's classifier by a head, of as many classes or of others (fine-tuning).

    `nn.Identity` takes the classifier's place in ``model`` (which is changed), and the head is called on what the
    model returns. The first call checks that this is what the Identity returned. Whatever is refused leaves the model
    as it was. Make the optimiser afterwards, from the attached model's ``parameters()``: of one that does not have the
    head's, a warning says so after its first step.

    Args:
        model: Any module that ends in a classifier.
        head: A head of this library, or any module called with features.
        classifier: Dotted name of the module to replace, or the module; found by `find_classifier` if not given.
        output: Where the logits are in what the model returns, if that is no tensor: an attribute or key, an
            index, or a function.

    Returns:
        A module with ``forward(*args, targets=None, **kwargs)`` that returns the logits; with ``labels=`` in place of
        targets, what the model returns, with logits and ``loss``. It prints how many classes there were and are.
        Its ``to_inference()`` is the model again, with plain modules in the classifier's place.

    Raises:
        ValueError: An argument of another kind, no classifier, several candidates, one that is lazy, or a head for
            another feature dimension; at the first call, a model that does something after its classifier, or an
            ``output`` that is not there.

    Examples:
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
    attached = AttachedHead(model, head, name, output, found)
    logger.info(
        "%s takes the place of %r in %s: %s", type(head).__name__, name, type(model).__name__, attached.extra_repr()
    )
    return attached


def _num_classes(head: nn.Module) -> int | None:
    """K of a head, or of another module with a weight (K, d)."""
    weight = getattr(head, "weight", None)
    return len(weight) if isinstance(weight, Tensor) and weight.ndim == 2 else None
