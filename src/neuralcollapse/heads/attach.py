"""Put a head on any model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from neuralcollapse._checks import check_integers, check_module
from neuralcollapse._running import evaluation_mode, unchanged_on_error, uncompiled
from neuralcollapse.classifier import resolve_classifier
from neuralcollapse.heads.head import Head, LearnsFromTargets
from neuralcollapse.heads.pretrained import (
    SavingGuard,
    ShowsModelArguments,
    labels_loss,
    set_number_of_classes,
    with_logits,
)
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


class _Place(nn.Identity):
    """Stands in the classifier's place. While a call is checked, it notes what passes."""

    def __init__(self) -> None:
        super().__init__()
        self.passed: list[tuple[Tensor, Tensor, int | None]] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Return the features; while a call is checked, as a view of them, by which they are known again."""
        if self.passed is None:
            return input
        # Autograd forbids in-place changes of one of several views, also while torch.compile traces.
        view = input.unsqueeze(0).unbind(0)[0]
        counts = not (torch.compiler.is_compiling() or view.is_inference())
        self.passed.append((input, view, view._version if counts else None))
        return view


class AttachedHead(nn.Module):
    """A model whose classifier is replaced by a head; made by `attach_head`.

    Attributes:
        num_classes: How many classes the replaced classifier had, and how many the head has (None if it does not say).
    """

    def __init__(
        self,
        model: nn.Module,
        head: nn.Module,
        name: str,
        output: Output | None,
        classifier: nn.Module,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.head = head
        self.num_classes = (num_classes, _num_classes(head))
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

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    @ShowsModelArguments
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
            num_items_in_batch: What a summed loss is divided by, as ``transformers.Trainer`` says.
            **kwargs: The model's.

        Returns:
            Logits (..., K). With labels, what the model returned with these logits and, as ``loss``, their
            cross-entropy; a dictionary of the two if the model returns no mapping. With ``num_items_in_batch`` alone
            (a Trainer that computes the loss itself), the same without ``loss``.

        Raises:
            ValueError: if targets or labels are not integers, or both are given; at the first call, also under
                ``torch.compile``, if the model does something after its classifier, or ``output`` is not there. The
                model then has its classifier back, and its buffers and torch's random state are as before.
        """
        if self._spent:
            raise ValueError(self._spent)
        if targets is not None and labels is not None:
            raise ValueError("targets and labels must not both be given")
        if targets is not None:
            check_integers("targets", targets)
        if labels is not None:
            check_integers("labels", labels)
            targets = labels
        returned, features = self._run(*args, **kwargs)
        if targets is None and num_items_in_batch is not None:
            self._check_targets_from_trainer(features)
        logits = self.head(features) if targets is None else self.head(features, targets)
        if labels is not None:
            loss = labels_loss(logits, labels, getattr(self.head, "ignore_index", None), num_items_in_batch)
            return with_logits(returned, logits, self._output, loss)
        return logits if num_items_in_batch is None else with_logits(returned, logits, self._output)

    def _check_targets_from_trainer(self, features: Tensor) -> None:
        if not isinstance(self.head, LearnsFromTargets):
            return
        try:
            self.head.step_targets(None, features)
        except ValueError as error:
            raise ValueError(
                f"{type(self.head).__name__} learns from targets, but with label_smoothing_factor or compute_loss_func "
                "transformers.Trainer keeps the labels to itself: add the labels to the dataset a second time, as "
                "`targets`"
            ) from error

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
        """Return what the model returned, and the features in it."""
        if torch.compiler.is_compiling():
            if not self._replaced or _in_one_graph():
                return self._run_traced(*args, **kwargs)
            return torch.compiler.disable(self._run_first)(*args, **kwargs)
        if self.training and torch.is_grad_enabled():
            self._watch.look(self.model, self.head)
        if not self._replaced:
            returned = self.model(*args, **kwargs)
            return returned, self._select(returned)
        return self._run_first(*args, **kwargs)

    def _run_first(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Run the first call, and check that what the model returns is what passed its classifier's place."""
        place: Any = self.model.get_submodule(self._name)
        place.passed = []
        try:
            with unchanged_on_error(self.model):
                returned = self._run_without_classifier(*args, **kwargs)
                features = self._known_again(place.passed, returned)
        except _WrongArguments as error:
            raise error.reason from None  # the model fails on them with its classifier, too
        except Exception as error:
            self._give_back(str(error))
            raise
        finally:
            place.passed = None
        self._replaced = ()
        return returned, features

    def _run_without_classifier(self, *args: Any, **kwargs: Any) -> Any:
        try:
            with uncompiled():
                return self.model(*args, **kwargs)
        except Exception as error:
            if self._fails_with_classifier(*args, **kwargs):
                raise _WrongArguments(error) from error
            raise ValueError(
                f"classifier {self._name!r} must be the last thing that {type(self.model).__name__} does, which fails "
                f"without it: {type(error).__name__}: {error}"
            ) from error

    def _fails_with_classifier(self, *args: Any, **kwargs: Any) -> bool:
        """Return whether the model fails on these arguments also with its own classifier; leave no trace of it."""
        if not self._name:
            return False
        place = self.model.get_submodule(self._name)
        self.model.set_submodule(self._name, self._replaced[0])
        try:
            with torch.no_grad(), unchanged_on_error(self.model), uncompiled():
                self.model(*args, **kwargs)
                raise _Undo
        except _Undo:
            return False
        except Exception:
            return True
        finally:
            self.model.set_submodule(self._name, place)

    def _run_traced(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Run in a graph that is traced whole: the first call's check is part of tracing."""
        if not self._replaced:
            returned = self.model(*args, **kwargs)
            return returned, self._select(returned)
        place: Any = self.model.get_submodule(self._name)
        place.passed = []
        returned = self.model(*args, **kwargs)
        passed, place.passed = place.passed, None
        features = self._select(returned)
        if len(passed) != 1 or features is not passed[0][1]:
            self._give_back("something comes after it")
            raise ValueError(self._follows())
        return returned, passed[0][0]

    def _known_again(self, passed: list[tuple[Tensor, Tensor, int | None]], returned: Any) -> Tensor:
        """Return the features in what the model returned, if they are what passed its classifier's place."""
        if not passed:
            raise ValueError(f"classifier {self._name!r} must be called by the model's forward; it was not")
        selected = self._select(returned)
        if len(passed) > 1:
            raise ValueError(
                f"classifier {self._name!r} must be called once by the model's forward, but was called "
                f"{len(passed)} times"
            )
        features, view, version = passed[0]
        if selected is not view or (version is not None and view._version != version):
            raise ValueError(self._follows())
        return features

    def _follows(self) -> str:
        return (
            f"classifier {self._name!r} must be the last thing that the model does, but what "
            f"{type(self.model).__name__} returned is not its output: something comes after it. "
            "Take that away, or name the right module or output"
        )

    def _give_back(self, reason: str) -> None:
        """Leave the model as it was before the head was attached."""
        if not self._replaced:
            return
        if self._name:
            self.model.set_submodule(self._name, self._replaced[0])
        self._guard.release(self.model)
        self._replaced = ()
        self._spent = (
            "attach_head was refused at the first call, and the model has its classifier back: attach again. The "
            f"reason was: {reason}"
        )

    _give_back._dynamo_marked_constant = True  # type: ignore[attr-defined]

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


def _in_one_graph() -> bool:
    """Return whether what is traced must be one graph (``fullgraph=True``, export), where no call can be left out."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return bool(InstructionTranslator.current_tx().one_graph)
    except AttributeError:  # not dynamo that traces
        return True


# As torch.compiler.assume_constant_result does, which imports dynamo: the function runs while dynamo traces its call.
_in_one_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _WrongArguments(Exception):
    """An error of the model's own forward that the head has no part in."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


class _Undo(Exception):
    """Ends a run whose changes are to be undone."""


def attach_head(
    model: nn.Module, head: nn.Module, *, classifier: str | nn.Module | None = None, output: Output | None = None
) -> AttachedHead:
    """Replace a model's classifier by a head, of as many classes or of others (fine-tuning).

    An identity takes the classifier's place in ``model`` (which is changed), and the head is called on what the
    model returns. The first call, compiled or not, checks that this is exactly what went into the classifier's place.
    An error leaves the model, its buffers and torch's random state as they were. Make the optimiser afterwards, from
    the attached model's ``parameters()``: of one that does not have the head's, a warning says so after its first step.

    Args:
        model: Any module that ends in a classifier.
        head: A head of this library, or any module called with features.
        classifier: Dotted name of the module to replace, or the module. By default the one that the structure shows, as
            for `find_classifier`; between several, the one that takes as many features as the head.
        output: Where the logits are in what the model returns, if that is no tensor: an attribute or key, an
            index, or a function.

    Returns:
        A module with ``forward(*args, targets=None, **kwargs)`` that returns the logits; with ``labels=`` in place of
        targets, what the model returns, with logits and ``loss``. It prints how many classes there were and are.
        Its ``to_inference()`` is the model again, with plain modules in the classifier's place.

    Raises:
        ValueError: if an argument is of another kind, there is no classifier or several modules could be it, it is
            lazy, or the head is for another number of features; at the first call, if the model does something after
            its classifier, or ``output`` is not there.

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
    name, found = resolve_classifier(model, classifier, getattr(head, "in_features", None))
    with evaluation_mode(found):  # reading a parametrised weight in training mode may change it
        num_classes, expected = found.weight.shape  # type: ignore[misc]
    given = getattr(head, "in_features", expected)
    if given != expected:
        raise ValueError(
            f"head must take the {expected} features that classifier {name!r} takes, got in_features = {given}"
        )
    if name:
        model.set_submodule(name, _Place())
    else:
        model = _Place()
    attached = AttachedHead(model, head, name, output, found, num_classes)
    logger.info(
        "%s takes the place of %r in %s: %s", type(head).__name__, name, type(model).__name__, attached.extra_repr()
    )
    return attached


def _num_classes(head: nn.Module) -> int | None:
    """K of a head, or of another module with a weight (K, d)."""
    weight = getattr(head, "weight", None)
    return len(weight) if isinstance(weight, Tensor) and weight.ndim == 2 else None
