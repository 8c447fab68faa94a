"""Replacement of a model's classifier by a head."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neuralcollapse._checks import check_integers, check_module
from neuralcollapse._running import evaluation_mode, unchanged_on_error, uncompiled
from neuralcollapse.classifier import resolve_classifier
from neuralcollapse.heads.head import Head, LearnsFromTargets
from neuralcollapse.heads.huggingface import (
    SAVING_REFUSED,
    WithModelSignature,
    labels_loss,
    set_number_of_classes,
    with_logits,
)

Output = str | int | Callable[[Any], Tensor]
logger = logging.getLogger(__name__)

# Attributes that `transformers.Trainer` reads; an attached model returns those of the wrapped model.
_MODEL_ATTRIBUTES = (
    "config",
    "activation_checkpointing_enable",
    "gradient_checkpointing_enable",
    "gradient_checkpointing_disable",
)


class _Placeholder(nn.Identity):
    """Identity in place of the classifier, which records the features that pass through it while a call is verified."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[tuple[Tensor, Tensor, int | None]] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Return the features or, while a call is verified, a view of them that can be recognised in the output."""
        if self.recorded is None:
            return input
        # Autograd forbids in-place changes of one of several views, even while torch.compile traces.
        view = input.unsqueeze(0).unbind(0)[0]
        has_version = not (torch.compiler.is_compiling() or view.is_inference())
        self.recorded.append((input, view, view._version if has_version else None))
        return view


class AttachedHead(nn.Module):
    """Model whose classifier is replaced by a head, as returned by `attach_head`.

    Attributes:
        num_classes: Number of classes of the head; None if it has no weight (K, d).
        replaced_num_classes: Number of classes of the replaced classifier.
    """

    def __init__(
        self,
        model: nn.Module,
        head: nn.Module,
        name: str,
        output: Output | None,
        classifier: nn.Module,
        neck: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        if neck is not None:
            self.neck = neck
        self.head = head
        with evaluation_mode(classifier):  # reading a parametrised weight in training mode may change it
            self.replaced_num_classes = len(classifier.weight)  # type: ignore[arg-type]
        weight = getattr(head, "weight", None)
        self.num_classes = len(weight) if isinstance(weight, Tensor) and weight.ndim == 2 else None
        self._name = name
        self._output = output
        self._had_bias = classifier.bias is not None
        # The classifier, until the first call has been verified; the tuple hides it from nn.Module.
        self._replaced: tuple[nn.Module, ...] = (classifier,)
        self._unusable = ""  # error message once the model can no longer be called

    def __getattr__(self, name: str) -> Any:
        if name in _MODEL_ATTRIBUTES and "model" in self.__dict__.get("_modules", {}):
            return getattr(self.model, name)
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        now = "" if self.num_classes is None else f", {self.num_classes} now"
        return f"classifier={self._name!r}, {self.replaced_num_classes} classes before{now}"

    def grow(
        self,
        num_new: int,
        *,
        optimizer: Optimizer | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> None:
        """Add classes to the head by its ``grow`` method, which also receives the other arguments.

        Raises:
            ValueError: if the head has no ``grow`` method, or as for that method.
        """
        if not isinstance(self.head, Head):
            raise ValueError(f"head must have grow(), got {type(self.head).__name__}")
        self.head.grow(num_new, optimizer=optimizer, generator=generator, **kwargs)
        self.num_classes = self.head.num_classes

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise, because ``from_pretrained`` would start with a random classifier.

        Raises:
            ValueError: always; the message explains how to save the model.
        """
        raise ValueError(SAVING_REFUSED.format(head=type(self.head).__name__))

    push_to_hub = save_pretrained

    @WithModelSignature
    def forward(
        self,
        *args: Any,
        targets: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the logits for the model's arguments; targets are passed to a head that learns from them.

        Args:
            *args: Positional arguments of the model.
            targets: (...) integer classes.
            labels: Integer classes (...) in place of targets, if the result shall include the loss, as in Hugging Face
                models. They are passed to the head, not to the model.
            num_items_in_batch: Divisor of a summed loss, as given by ``transformers.Trainer``.
            **kwargs: Keyword arguments of the model.

        Returns:
            Logits (..., K). With labels, the model's output with these logits and their cross-entropy as ``loss``, or a
            dictionary of the two if the model's output is not a mapping. With ``num_items_in_batch`` but no labels (if
            the Trainer computes the loss), the same without ``loss``.

        Raises:
            ValueError: if targets or labels are not integers, or both are given; at the first call, also under
                ``torch.compile``, if the classifier's output is not the model's output, or ``output`` does not exist.
                The classifier is then restored, and buffers and torch's random state are left unchanged.
        """
        if self._unusable:
            raise ValueError(self._unusable)
        if targets is not None and labels is not None:
            raise ValueError("targets and labels must not both be given")
        if targets is not None:
            check_integers("targets", targets)
        if labels is not None:
            check_integers("labels", labels)
            targets = labels
        returned, features = self._run(*args, **kwargs)
        if "neck" in self._modules:
            features = self.neck(features)
        if targets is None and num_items_in_batch is not None:
            self._check_targets_from_trainer(features)
        logits = self.head(features) if targets is None else self.head(features, targets)
        if labels is not None:
            loss = labels_loss(logits, labels, getattr(self.head, "ignore_index", None), num_items_in_batch)
            return with_logits(returned, logits, self._output, loss)
        return logits if num_items_in_batch is None else with_logits(returned, logits, self._output)

    def _check_targets_from_trainer(self, features: Tensor) -> None:
        """Raise a `ValueError` if the head needs targets that the Trainer does not pass to the model."""
        if not isinstance(self.head, LearnsFromTargets):
            return
        try:
            self.head.step_targets(None, features)
        except ValueError as error:
            raise ValueError(
                f"{type(self.head).__name__} learns from targets, but with label_smoothing_factor or compute_loss_func "
                "transformers.Trainer does not pass the labels to the model: add the labels to the dataset a second "
                "time, as column `targets`"
            ) from error

    def to_inference(self, **kwargs: Any) -> nn.Module:
        """Return the original model, changed in place, with the head's ``to_inference(**kwargs)`` as its classifier.

        If there is a neck, the classifier is an ``nn.Sequential`` of the neck and the converted head.

        Afterwards the attached model can no longer be called. If the replaced classifier had a bias, the new
        ``nn.Linear`` has one as well (0 if the head has none), so that its state fits the model's class. In a Hugging
        Face model, the number of classes in the configuration is set to that of the head.

        Raises:
            ValueError: if the head has no ``to_inference`` method, or the method is called a second time.
        """
        if self._unusable:
            raise ValueError(self._unusable)
        if not isinstance(self.head, Head):
            raise ValueError(f"head must have to_inference(), got {type(self.head).__name__}")
        plain = self.head.to_inference(**kwargs).train(self.training)
        if self._name and isinstance(plain, nn.Linear) and plain.bias is None and self._had_bias:
            plain.bias = nn.Parameter(plain.weight.new_zeros(plain.out_features))
        if "neck" in self._modules:
            plain = nn.Sequential(self.neck, plain)
        if not self._name:
            return plain
        self.model.set_submodule(self._name, plain)
        set_number_of_classes(self.model, self._name, self.head.num_classes)
        self._unusable = (
            "to_inference() has replaced the head by a plain classifier; the attached model can no longer be called: "
            "call the model that to_inference() returned, or attach a head to that model"
        )
        return self.model

    def _run(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Return the model's output and the features that it contains."""
        if self._replaced:
            if not torch.compiler.is_compiling():
                return self._run_and_verify(*args, **kwargs)
            if _in_one_graph():
                return self._run_and_verify_traced(*args, **kwargs)
            return torch.compiler.disable(self._run_and_verify)(*args, **kwargs)
        returned = self.model(*args, **kwargs)
        return returned, self._select(returned)

    def _run_and_verify(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Run the first call, and verify that the model's output is the tensor that passed through the placeholder."""
        placeholder: Any = self.model.get_submodule(self._name)
        placeholder.recorded = []
        try:
            with unchanged_on_error(self.model):
                returned = self._run_without_classifier(*args, **kwargs)
                features = self._verified_features(placeholder.recorded, returned)
        except _WrongArguments as error:
            raise error.reason from None  # with the original classifier, the model fails on these arguments as well
        except Exception as error:
            self._restore_classifier(str(error))
            raise
        finally:
            placeholder.recorded = None
        self._replaced = ()
        return returned, features

    def _run_and_verify_traced(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """Run the first call while a single graph is traced; the verification is part of the tracing."""
        placeholder: Any = self.model.get_submodule(self._name)
        placeholder.recorded = []
        returned = self.model(*args, **kwargs)
        recorded, placeholder.recorded = placeholder.recorded, None
        features = self._select(returned)
        if len(recorded) != 1 or features is not recorded[0][1]:
            self._restore_classifier("another operation follows it")
            raise ValueError(self._not_last())
        return returned, recorded[0][0]

    def _run_without_classifier(self, *args: Any, **kwargs: Any) -> Any:
        try:
            with uncompiled():
                return self.model(*args, **kwargs)
        except Exception as error:
            if self._fails_with_classifier(*args, **kwargs):
                raise _WrongArguments(error) from error
            raise ValueError(
                f"classifier {self._name!r} must be the last operation of {type(self.model).__name__}, but the model "
                f"fails without it: {type(error).__name__}: {error}"
            ) from error

    def _fails_with_classifier(self, *args: Any, **kwargs: Any) -> bool:
        """Return whether the model with its original classifier also fails on these arguments, without side effects."""
        if not self._name:
            return False
        placeholder = self.model.get_submodule(self._name)
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
            self.model.set_submodule(self._name, placeholder)

    def _verified_features(self, recorded: list[tuple[Tensor, Tensor, int | None]], returned: Any) -> Tensor:
        """Return the features, if the model's output is the tensor that passed through the placeholder."""
        if not recorded:
            raise ValueError(f"classifier {self._name!r} must be called by the model's forward, but was not")
        selected = self._select(returned)
        if len(recorded) > 1:
            raise ValueError(
                f"classifier {self._name!r} must be called once by the model's forward, but was called "
                f"{len(recorded)} times"
            )
        features, view, version = recorded[0]
        if selected is not view or (version is not None and view._version != version):
            raise ValueError(self._not_last())
        return features

    def _not_last(self) -> str:
        return (
            f"classifier {self._name!r} must be the last operation of the model, but {type(self.model).__name__} "
            "returned another tensor than its output: another operation follows it. "
            "Remove that operation, or name the right module or output"
        )

    def _restore_classifier(self, reason: str) -> None:
        """Restore the model to its state before the head was attached."""
        if not self._replaced:
            return
        if self._name:
            self.model.set_submodule(self._name, self._replaced[0])
        self._replaced = ()
        self._unusable = (
            "attach_head failed at the first call, and the model has its classifier back: attach again. "
            f"The reason was: {reason}"
        )

    _restore_classifier._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _select(self, returned: Any) -> Tensor:
        """Return the logits in the model's output."""
        if callable(self._output):
            return self._output(returned)
        if self._output is not None:
            by_name = isinstance(self._output, str) and not isinstance(returned, dict)
            try:
                return getattr(returned, self._output) if by_name else returned[self._output]  # type: ignore[arg-type]
            except (AttributeError, KeyError, IndexError, TypeError):
                raise ValueError(
                    f"output must locate the logits in the {type(returned).__name__} that the model returned, "
                    f"which has no {self._output!r}"
                ) from None
        if not isinstance(returned, Tensor):
            raise ValueError(
                f"output must locate the logits in the {type(returned).__name__} that the model returned, "
                "as a name, an index or a function: attach_head(..., output='logits')"
            )
        return returned


def _in_one_graph() -> bool:
    """Return whether a single graph is traced (``fullgraph=True``, export), so that no call can be excluded from it."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return bool(InstructionTranslator.current_tx().one_graph)
    except AttributeError:  # the tracer is not dynamo
        return True


# Has the effect of torch.compiler.assume_constant_result, which would import dynamo: the function runs during tracing.
_in_one_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _WrongArguments(Exception):
    """Error of the model's forward that is not caused by the head."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


class _Undo(Exception):
    """Exception that ends a run, after which its changes are undone."""


def attach_head(
    model: nn.Module,
    head: nn.Module,
    *,
    classifier: str | nn.Module | None = None,
    output: Output | None = None,
    neck: str | nn.Module | None = None,
) -> AttachedHead:
    """Replace a model's classifier by a head, for the same or another number of classes (fine-tuning).

    The classifier in ``model`` is replaced in place by an identity, and the head is called on the model's output. The
    first call, compiled or not, verifies that this output is exactly the input of the replaced classifier. If an error
    is raised, the model, its buffers and torch's random state are left unchanged. Create the optimiser after this call,
    from the attached model's ``parameters()``: an optimiser created before does not hold the parameters of the new head
    (those of `LearnedClassifier` and of ``bias="learned"``), and would not train them.

    Args:
        model: Any module that ends in a classifier.
        head: A head of this library, or any module that is called with features.
        classifier: Dotted name of the module to replace, or the module. By default it follows from the structure of the
            model, as in `find_classifier`; if several modules qualify, the one that takes as many features as the head.
        output: Attribute, key or index of the logits in the model's output, or a function of the output; not needed if
            the model returns a tensor.
        neck: Module between the features of the model and the head, which is trained with the head and retained by
            ``to_inference()``: ``"linear"``, a linear layer to the head's number of features; ``"mlp"``, a hidden layer
            with the model's number of features, ReLU and a linear layer; or a module. With a neck, the head may have
            any number of features, and even fewer than K − 1 if the head supports it.

    Returns:
        A module with ``forward(*args, targets=None, **kwargs)`` that returns the logits; with ``labels=`` in place of
        targets, it returns the model's output with logits and ``loss``. Its ``to_inference()`` returns the model with
        plain modules as its classifier. The previous and the new number of classes are logged (INFO) and shown in the
        ``repr`` of the module.

    Raises:
        ValueError: if an argument has the wrong type, the model has no classifier or several candidates, the classifier
            is lazy, the head (or the neck) takes another number of features, or the output of the neck does not fit the
            head; at the first call, if the model applies an operation after its classifier, or ``output`` does not
            exist.

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
    in_features = getattr(head, "in_features", None)
    name, replaced = resolve_classifier(model, classifier, in_features if neck is None else None)
    with evaluation_mode(replaced):
        expected = replaced.weight.shape[1]  # type: ignore[index]
    built = None
    if neck is not None:
        built = _built_neck(neck, replaced, int(expected), in_features)
    elif in_features not in (None, expected):
        raise ValueError(
            f"head must take the {expected} features that classifier {name!r} takes, got in_features = {in_features}; "
            "use a neck to change the number of features: attach_head(..., neck='linear')"
        )
    if name:
        model.set_submodule(name, _Placeholder())
    else:
        model = _Placeholder()
    attached = AttachedHead(model, head, name, output, replaced, built)
    logger.info("%s replaces %r in %s: %s", type(head).__name__, name, type(model).__name__, attached.extra_repr())
    return attached


def _built_neck(neck: object, replaced: nn.Module, given: int, wanted: int | None) -> nn.Module:
    """Return the neck that maps the given number of features to the number that the head takes.

    Raises:
        ValueError: if the neck is neither a valid name nor a module, or its output has another number of features.
    """
    like: Tensor = replaced.weight  # type: ignore[assignment]
    like = like if like.is_floating_point() else torch.empty(0, device=like.device)
    if neck in ("linear", "mlp"):
        if wanted is None:
            raise ValueError(f"neck {neck!r} needs a head with in_features; give a module as the neck instead")
        last = nn.Linear(given, wanted, dtype=like.dtype, device=like.device)
        if neck == "linear":
            return last
        return nn.Sequential(nn.Linear(given, given, dtype=like.dtype, device=like.device), nn.ReLU(), last)
    if not isinstance(neck, nn.Module):
        raise ValueError(f"neck must be 'linear', 'mlp', a module or None, got {neck!r}")
    if like.is_meta:
        return neck
    with evaluation_mode(neck), torch.no_grad():
        try:
            output = neck(torch.zeros(2, given, dtype=like.dtype, device=like.device))
        except Exception as error:
            raise ValueError(
                f"neck must take the {given} features of the classifier, but {type(neck).__name__} failed: {error}"
            ) from error
    if not isinstance(output, Tensor) or output.shape != (2, output.shape[-1] if wanted is None else wanted):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"neck must return features of shape (N, {'d' if wanted is None else wanted}), as the head expects, but "
            f"{type(neck).__name__} returned {shape} for N = 2"
        )
    return neck
