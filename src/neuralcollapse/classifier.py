"""What counts as a model's classifier, and how it is found."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from neuralcollapse._checks import check_module

_CONVENTIONAL_NAMES = ("classifier", "fc", "head", "heads", "linear", "output", "lm_head", "score")


def is_classifier(module: nn.Module) -> bool:
    """Whether a module is an ``nn.Linear``, or has ``weight`` (K, d), ``bias`` and ``features``."""
    if isinstance(module, nn.Linear):
        return True
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and hasattr(module, "bias") and hasattr(module, "features")


def classifier_features(classifier: nn.Module, inputs: Tensor) -> Tensor:
    """The tensor that the classifier's weight multiplies, given the classifier's input.

    For an ``nn.Linear`` that is the input itself; a head that normalises returns the normalised features.
    """
    features = getattr(classifier, "features", None)
    return inputs if features is None else features(inputs)


def find_classifier(model: nn.Module) -> tuple[str, nn.Module]:
    """Find the module whose output is the model's logits.

    It is what the model's ``get_classifier()`` returns (as timm's have it), where that is a classifier. Else the
    structure alone is looked at, from the top: an ``nn.Sequential`` ends in its last child; any other module ends in
    the one of its direct children that is, or ends in, a classifier, a conventional name (``classifier``, ``fc``,
    ``head``, …) going first where there are several; where there is none, in what a child of such a name holds
    (``head.fc``).

    Args:
        model: Any module.

    Returns:
        The dotted name inside ``model`` (empty when the model itself is the classifier), and the module:
        an ``nn.Linear``, or any module with ``.weight`` (K, d), ``.bias`` and ``.features(x)``.

    Raises:
        ValueError: ``model`` is no module, there is no classifier, or several modules could be it; the message
            names them.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> find_classifier(model)
        ('2', Linear(in_features=16, out_features=3, bias=True))
    """
    check_module("model", model)
    candidates = _said(model) or _candidates("", model)
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise ValueError(
            f"model ({type(model).__name__}) must end in a classifier (nn.Linear, or a module with weight, bias and "
            "features); found none. Name it with classifier='dotted.name'"
        )
    names = ", ".join(repr(name) for name, _ in candidates)
    raise ValueError(
        f"several modules of {type(model).__name__} could be its classifier: {names}. "
        "Name the one whose output is the logits with classifier='dotted.name'"
    )


def resolve_classifier(model: nn.Module, classifier: str | nn.Module | None = None) -> tuple[str, nn.Module]:
    """The classifier that the caller named or handed over, else the one that `find_classifier` finds."""
    check_module("model", model)
    if classifier is None:
        name, module = find_classifier(model)
    elif isinstance(classifier, nn.Module):
        names = [name for name, module in model.named_modules() if module is classifier]
        if not names:
            raise ValueError(f"classifier ({type(classifier).__name__}) must be a module of the model; it is not in it")
        name, module = names[0], classifier
    elif not isinstance(classifier, str):
        raise ValueError(f"classifier must be a dotted name or a module of the model, got {classifier!r}")
    else:
        name = classifier
        try:
            module = model.get_submodule(name)
        except AttributeError:
            found = ", ".join(repr(name) for name, module in model.named_modules() if is_classifier(module))
            raise ValueError(
                f"classifier must name a module of the model, got {name!r}; those with a weight are {found or 'none'}"
            ) from None
    if not is_classifier(module):
        raise ValueError(
            f"classifier {name!r} must be an nn.Linear or have weight (K, d), bias and features(x); "
            f"got {type(module).__name__}"
        )
    check_not_lazy(repr(name), module)
    return name, module


def check_not_lazy(name: str, classifier: nn.Module) -> None:
    """Raise where the classifier does not know yet how many features it takes."""
    if isinstance(classifier, LazyModuleMixin) and classifier.has_uninitialized_params():
        raise ValueError(
            f"classifier {name} must know its number of features, got a {type(classifier).__name__} that has seen no "
            "input: run the model on a batch first"
        )


def _said(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """What the model itself calls its classifier."""
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
    """What the module could end in."""
    if is_classifier(module):
        return [(name, module)]
    children = [
        (f"{name}.{child_name}" if name else child_name, child) for child_name, child in module.named_children()
    ]
    if isinstance(module, nn.Sequential):
        ends = [(child_name, child) for child_name, child in children if not isinstance(child, nn.Identity)]
        return _candidates(*ends[-1]) if ends else []
    direct = list(_direct(children))
    if direct:
        prefix = len(name) + 1 if name else 0
        conventional = [found for found in direct if found[0][prefix:].split(".")[0] in _CONVENTIONAL_NAMES]
        return conventional if len(conventional) == 1 else direct
    inside = [
        found for child in children if child[0].split(".")[-1] in _CONVENTIONAL_NAMES for found in _candidates(*child)
    ]
    return inside or [found for child in children for found in _candidates(*child)]


def _direct(children: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    """Those of the children that are classifiers, or chains that end in one."""
    for name, child in children:
        if is_classifier(child):
            yield name, child
        elif isinstance(child, nn.Sequential):
            ends = _candidates(name, child)
            if len(ends) == 1 and ends[0][0].count(".") == name.count(".") + 1:
                yield ends[0]
