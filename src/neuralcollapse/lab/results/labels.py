"""Labels and titles of runs: what differs between them, and what they share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from neuralcollapse.lab.untrusted import without_secrets

Settings = Mapping[str, Any]

# Settings that make two runs different experiments. A label names each of them that differs, a title all of them.
MAIN = ("name", "method", "loss", "data", "backbone", "model", "optimizer", "weight_average")
_OF_TITLE = ("name", "backbone", "model", "method", "loss", "optimizer", "weight_average")
# Of the others a label has as few as tell the runs apart, these before the rest.
_NEXT = ("feature_dim", "width", "depth", "stem", "classifier_bias", "lr", "batch_size", "epochs", "train_samples")
# Settings without a part in the result, and the seed.
_IGNORED = ("seed", "recipe", "loggers", "device")
_PATH = re.compile(r"[/\\~]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|[\w.-]+[/\\]")  # how a path begins
_MOST_VALUES, _LONGEST = 4, 30


def labels_of(runs: Sequence[Settings], always: Sequence[str] = ()) -> list[str]:
    """Return a label for each run that says what tells it from the others, seeds apart, in few words.

    Runs that differ in their seed alone have the same label, all others different ones. The main settings, such as
    method, data, backbone and optimizer, are in it where they differ, by their value alone where that is clear; of the
    other settings as few as tell the runs apart.

    Args:
        runs: Their settings.
        always: Settings that are in each label, whether they differ or not.

    Examples:
        >>> labels_of([{"method": "fixed", "optimizer": name, "lr": lr} for name, lr in (("sgd", 0.1), ("adam", 0.01))])
        ['sgd', 'adam']
        >>> labels_of([{"method": "fixed", "lr": 0.1}, {"method": "fixed", "lr": 0.2}], always=["method"])
        ['fixed lr=0.1', 'fixed lr=0.2']
    """
    runs = [without_secrets(run) for run in runs]
    names = _telling(runs, always)
    if not names:  # one group: its name
        names = [name for name in ("name", "method", "backbone", "model", "data") if runs and runs[0].get(name)][:1]
    texts = {name: short_values([run.get(name) for run in runs]) for name in names}
    alone = {name: _speaks_alone(name, texts) for name in names}
    labels = []
    for place, run in enumerate(runs):
        words = [
            texts[name][place] if alone[name] else f"{name}={texts[name][place]}"
            for name in names
            if run.get(name) is not None
        ]
        labels.append(" ".join(words) or (f"{names[0]}=default" if names else "run"))
    if len(set(labels)) < len(_groups(runs, names)):  # values that hold spaces or the names of settings
        return [" ".join(f"{name}={run.get(name)!r}" for name in names) for run in runs]
    return labels


def title_of(runs: Sequence[Settings], data: Sequence[str | None]) -> str:
    """Return the settings that runs share, and those in which they differ with their values.

    Args:
        runs: Their settings.
        data: The description of each one's data.

    Examples:
        >>> runs = [{"method": "fixed", "backbone": "mlp", "optimizer": name, "data": "digits"} for name in "ab"]
        >>> title_of(runs, ["digits: 200 images"] * 2)
        'mlp, fixed on digits: 200 images; differing: optimizer (a, b)'
    """
    runs = [without_secrets(run) for run in runs]
    named = [name for name in _OF_TITLE if any(run.get(name) is not None for run in runs)]
    differing = [name for name in named if len(_values(runs, name)) > 1]
    common = ", ".join(_alone_or_named(name, runs[0][name]) for name in named if name not in differing)
    if any(run.get("data") is not None for run in runs):
        if len(_values(runs, "data")) > 1:
            differing.insert(0, "data")
        else:
            described = set(filter(None, data))
            of_all = described.pop() if len(described) == 1 else short_values([runs[0]["data"]])[0]
            common = f"{common} on {of_all}" if common else of_all
    differing += [name for name in _telling(runs) if name not in MAIN]
    told = f"differing: {', '.join(_with_values(name, runs) for name in differing)}" if differing else ""
    return "; ".join(filter(None, (common, told)))


def differing_settings(runs: Sequence[Settings]) -> list[str]:
    """Return the names of the settings in which runs differ, seeds apart, the main ones first.

    A setting that some runs do not have, and that has one value in the others, is left out unless labels need it: it
    follows from another one, as the momentum does from the optimizer.
    """
    needed = _telling(runs)
    return [
        name
        for name in _names(runs)
        if name in needed or len({_key(run[name]) for run in runs if run.get(name) is not None}) > 1
    ]


def short_values(values: Sequence[Any]) -> list[str]:
    """Return the values as short texts, of which different ones stay different: paths and dotted names by their end.

    Examples:
        >>> short_values(["/data/mnist", "/data/cifar10", None, 0.05, True])
        ['mnist', 'cifar10', '', '0.05', 'true']
        >>> short_values(["/a/data", "/b/data"])
        ['a/data', 'b/data']
    """
    full = [_text(value) for value in values]
    number = len(set(full))
    for parts in range(1, 20):
        ends = [_end(text, parts) for text in full]
        if len(set(ends)) == number:
            break
    cut = [text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…" for text in ends]
    return cut if len(set(cut)) == number else ends if len(set(ends)) == number else full


def _telling(runs: Sequence[Settings], always: Sequence[str] = ()) -> list[str]:
    """The settings of a label: those asked for, the main ones that differ, and as few others as tell all runs apart."""
    names = _names(runs)
    shown = [name for name in MAIN if name in names or name in always]
    apart = len(_groups(runs, names))
    others = sorted((name for name in names if name not in MAIN), key=lambda name: (_rank(name), name))
    while len(_groups(runs, shown)) < apart:
        shown.append(max(others, key=lambda name: len(_groups(runs, [*shown, name]))))
    for name in [name for name in shown if name not in MAIN]:
        if len(_groups(runs, [one for one in shown if one != name])) == apart:
            shown.remove(name)
    return shown


def _names(runs: Sequence[Settings]) -> list[str]:
    """The settings in which runs differ, the main ones first."""
    names = sorted({name for run in runs for name in run}.difference(_IGNORED), key=lambda name: (_rank(name), name))
    return [name for name in names if len(_values(runs, name)) > 1]


def _rank(name: str) -> int:
    order = (*MAIN, *_NEXT)
    return order.index(name) if name in order else len(order)


def _values(runs: Sequence[Settings], name: str) -> dict[str, Any]:
    """The different values of a setting, in order."""
    return {_key(run.get(name)): run.get(name) for run in runs}


def _groups(runs: Sequence[Settings], names: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(_key(run.get(name)) for name in names) for run in runs}


def _key(value: Any) -> str:
    return str(float(value)) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _with_values(name: str, runs: Sequence[Settings]) -> str:
    """A setting and its values, or their number."""
    found = list(_values(runs, name).values())
    if len(found) > _MOST_VALUES:
        return f"{name} ({len(found)} values)"
    texts = short_values(found)
    return f"{name} ({', '.join(text or 'default' for text in texts)})"


def _alone_or_named(name: str, value: Any) -> str:
    (text,) = short_values([value])
    return text if _speaks_alone(name, {name: [text]}) else f"{name} {text}"


def _speaks_alone(name: str, texts: Mapping[str, Sequence[str]]) -> bool:
    """Return whether a main setting's values are clear without its name: not numbers, and not of another setting."""
    if name not in MAIN or name == "weight_average":
        return False
    others = {text for other, of_other in texts.items() if other != name for text in of_other if text}
    return all(re.search(r"[^\W\d_]", text) and text not in others for text in texts[name] if text)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _end(text: str, parts: int) -> str:
    """The last parts of a path, or of a dotted name."""
    if re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", text):
        return ".".join(text.split(".")[-parts:])
    if not _PATH.match(text):
        return text
    found = [part for part in re.split(r"[/\\]", text) if part]
    return "/".join(found[-parts:])
