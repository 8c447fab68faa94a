"""Labels and titles of runs, from settings in which the runs differ and settings that they share."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from neuralcollapse.lab.config import Ranks, RunConfig
from neuralcollapse.lab.untrusted import without_secrets

Settings = Mapping[str, Any]

# Main settings, which define an experiment. A label contains each of them that differs, a title contains all of them.
MAIN = ("name", "method", "loss", "data", "backbone", "model", "optimizer", "weight_average")
_OF_TITLE = ("name", "backbone", "model", "method", "loss", "optimizer", "weight_average")
# A label contains as few other settings as are needed to distinguish the runs, with preference for these.
_OF_NETWORK = ("feature_dim", "width", "depth", "stem", "backbone_options", "classifier_bias")
_NEXT = (*_OF_NETWORK, "lr", "batch_size", "epochs", "train_samples")
# Settings that do not affect the result, and the seed.
_IGNORED = ("seed", "recipe", "loggers", "device")
_PATH = re.compile(r"[/\\~]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|[\w.-]+[/\\]")  # how a path begins
_MOST_VALUES, _LONGEST = 4, 30


def labels_of(runs: Sequence[Settings], always: Sequence[str] = ()) -> list[str]:
    """Return a short label for each run, with the settings in which it differs from the others.

    Runs that differ only in their seed have the same label, other runs have different labels. Main settings, such as
    method, data, backbone and optimizer, are included if they differ, and only by their value if it is unambiguous. If
    runs that agree in these have different recipes, the recipe is included, because it stands for several settings. Of
    the other settings, as few as possible are included to distinguish the runs, those of the network first; of options
    such as ``backbone_options``, only the entries in which runs differ.

    Args:
        runs: Settings of each run.
        always: Settings that are part of each label, even if they do not differ.

    Examples:
        >>> labels_of([{"method": "fixed", "optimizer": name, "lr": lr} for name, lr in (("sgd", 0.1), ("adam", 0.01))])
        ['sgd', 'adam']
        >>> labels_of([{"method": "fixed", "lr": 0.1}, {"method": "fixed", "lr": 0.2}], always=["method"])
        ['fixed lr=0.1', 'fixed lr=0.2']
        >>> labels_of([{"recipe": f"fast-mnist-{size}", "lr": lr} for size, lr in (("small", 0.4), ("medium", 1.5))])
        ['fast-mnist-small', 'fast-mnist-medium']
    """
    runs = [_with_entries(without_secrets(run)) for run in runs]
    names = _distinguishing(runs, always)
    if not names:  # a single group is labelled by its name
        names = [name for name in ("name", "method", "backbone", "model", "data") if runs and runs[0].get(name)][:1]
    texts = {name: short_values([run.get(name) for run in runs]) for name in names}
    clear = {name: _is_clear(name, texts) for name in names}
    labels = []
    for index, run in enumerate(runs):
        words = [
            texts[name][index] if clear[name] else f"{name}={texts[name][index]}"
            for name in names
            if run.get(name) is not None
        ]
        labels.append(" ".join(words) or (f"{names[0]}=default" if names else "run"))
    if len(set(labels)) < len(_groups(runs, names)):  # values contain spaces or the names of settings
        return [" ".join(f"{name}={run.get(name)!r}" for name in names) for run in runs]
    return labels


def tell_apart(runs: Sequence[Settings]) -> list[dict[str, Any]]:
    """Return the settings, other than the seed, that distinguish each run from the others.

    These are the method, the loss and the weight average (the latter two if they differ between runs), and the settings
    in which runs that agree in these three differ. For a run without a method, its name or that of its model is used.
    Secrets are left out, and absolute paths are relative to their common folder.

    Args:
        runs: Settings of each run.

    Examples:
        >>> tell_apart([{"method": "fixed", "lr": 0.1}, {"method": "fixed", "lr": 0.2}, {"method": "means", "lr": 0.1}])
        [{'method': 'fixed', 'lr': 0.1}, {'method': 'fixed', 'lr': 0.2}, {'method': 'means', 'lr': 0.1}]
    """
    runs = [
        without_secrets({**run, "method": run.get("method") or run.get("name") or run.get("model")}) for run in runs
    ]
    compared = ("method", "loss", "weight_average")
    names = sorted({name for run in runs for name in run}.difference(_IGNORED, ("name", "model", *compared)))
    kinds: dict[tuple[Any, ...], list[Settings]] = {}
    for run in runs:
        kinds.setdefault(tuple(run.get(name) for name in compared), []).append(run)
    telling = [name for name in names if any(len({str(run.get(name)) for run in kind}) > 1 for kind in kinds.values())]
    several = [name for name in compared[1:] if len({run.get(name) for run in runs}) > 1]
    shown = {name: _short_paths([run.get(name) for run in runs]) for name in ("method", *several, *telling)}
    return [{name: values[number] for name, values in shown.items()} for number in range(len(runs))]


def label_of(telling: Settings) -> str:
    """Return the distinguishing settings of a run as text: the method, the loss, then other settings by name.

    Examples:
        >>> label_of({"method": "fixed", "loss": "nonl", "lr": 0.1})
        'fixed nonl lr=0.1'
    """
    in_force = {name: value for name, value in telling.items() if value is not None}
    return " ".join(str(value) if name in ("method", "loss") else f"{name}={value}" for name, value in in_force.items())


def common_settings(runs: Sequence[RunConfig]) -> dict[str, Any]:
    """Return the settings with the same value in all runs that have them, except recipe, method, seed and ranks."""
    shared: dict[str, Any] = {}
    for name in RunConfig.model_fields:
        values = [getattr(run, name) for run in runs if getattr(run, name) is not None]
        if name not in ("recipe", "method", "seed", *Ranks.model_fields) and values == values[:1] * len(values) != []:
            shared[name] = values[0]
    return shared


def title_of(runs: Sequence[Settings], data: Sequence[str | None]) -> str:
    """Return a title with the settings that runs share, and those in which they differ with their values.

    Args:
        runs: Settings of each run.
        data: Description of the data of each run.

    Examples:
        >>> runs = [{"method": "fixed", "backbone": "mlp", "optimizer": name, "data": "digits"} for name in "ab"]
        >>> title_of(runs, ["digits: 200 images"] * 2)
        'mlp, fixed on digits: 200 images; differing: optimizer (a, b)'
    """
    runs = [without_secrets(run) for run in runs]
    named = [name for name in _OF_TITLE if any(run.get(name) is not None for run in runs)]
    differing = [name for name in named if len(_values(runs, name)) > 1]
    common = ", ".join(_named_if_unclear(name, runs[0][name]) for name in named if name not in differing)
    if any(run.get("data") is not None for run in runs):
        if len(_values(runs, "data")) > 1:
            differing.insert(0, "data")
        else:
            described = set(filter(None, data))
            shared = described.pop() if len(described) == 1 else short_values([runs[0]["data"]])[0]
            common = f"{common} on {shared}" if common else shared
    differing += [name for name in _distinguishing(runs) if name not in MAIN]
    differences = f"differing: {', '.join(_with_values(name, runs) for name in differing)}" if differing else ""
    return "; ".join(filter(None, (common, differences)))


def differing_settings(runs: Sequence[Settings]) -> list[str]:
    """Return the names of the settings other than the seed in which runs differ, beginning with the main settings.

    A setting that is absent from some runs and has the same value in all others is left out unless labels need it,
    because it follows from another setting, such as the momentum from the optimizer.
    """
    needed = _distinguishing([{**run, "recipe": None} for run in runs])
    return [
        name
        for name in _names(runs)
        if name in needed or len({_key(run[name]) for run in runs if run.get(name) is not None}) > 1
    ]


def short_values(values: Sequence[Any]) -> list[str]:
    """Return values as short, distinct texts; paths and dotted names are shortened to their last parts.

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


def _distinguishing(runs: Sequence[Settings], always: Sequence[str] = ()) -> list[str]:
    """Return the settings of a label: ``always``, differing main settings, the recipe, and the fewest others needed."""
    names = _names(runs)
    shown = [name for name in MAIN if name in names or name in always]
    number = len(_groups(runs, names))
    if _recipe_separates(runs, names, shown):
        shown.append("recipe")
    first = len(shown)
    others = sorted((name for name in names if name not in MAIN), key=lambda name: (_rank(name), name))
    while len(_groups(runs, shown)) < number:
        shown.append(max(others, key=lambda name: len(_groups(runs, [*shown, name]))))
    for name in shown[first:]:
        if len(_groups(runs, [other for other in shown if other != name])) == number:
            shown.remove(name)
    return shown


def _recipe_separates(runs: Sequence[Settings], names: Sequence[str], shown: Sequence[str]) -> bool:
    """Return whether recipes separate runs that agree in the shown settings, and none that agree in all settings."""
    if not all(run.get("recipe") for run in runs):
        return False
    return len(_groups(runs, [*names, "recipe"])) == len(_groups(runs, names)) and (
        len(_groups(runs, [*shown, "recipe"])) > len(_groups(runs, shown))
    )


def _with_entries(run: Settings) -> Settings:
    """Return settings in which each mapping is replaced by its entries, named as in ``backbone_options.widths``."""
    entries: dict[str, Any] = {}
    for name, value in run.items():
        if isinstance(value, Mapping) and value and name not in _IGNORED:
            # An entry that is None differs from one that is absent.
            entries |= {f"{name}.{key}": "null" if entry is None else entry for key, entry in value.items()}
        else:
            entries[name] = value
    return entries


def _names(runs: Sequence[Settings]) -> list[str]:
    """Return the settings in which runs differ, beginning with the main settings."""
    names = sorted({name for run in runs for name in run}.difference(_IGNORED), key=lambda name: (_rank(name), name))
    return [name for name in names if len(_values(runs, name)) > 1]


def _rank(name: str) -> int:
    order, name = (*MAIN, *_NEXT), name.partition(".")[0]
    return order.index(name) if name in order else len(order)


def _values(runs: Sequence[Settings], name: str) -> dict[str, Any]:
    """Return the distinct values of a setting in their order."""
    return {_key(run.get(name)): run.get(name) for run in runs}


def _groups(runs: Sequence[Settings], names: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(_key(run.get(name)) for name in names) for run in runs}


def _key(value: Any) -> str:
    return str(float(value)) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _with_values(name: str, runs: Sequence[Settings]) -> str:
    """Return a setting with its values, or with their number."""
    values = list(_values(runs, name).values())
    if len(values) > _MOST_VALUES or any(isinstance(value, Mapping) for value in values):
        return f"{name} ({len(values)} values)"
    texts = short_values(values)
    return f"{name} ({', '.join(text or 'default' for text in texts)})"


def _named_if_unclear(name: str, value: Any) -> str:
    (text,) = short_values([value])
    return text if _is_clear(name, {name: [text]}) else f"{name} {text}"


def _is_clear(name: str, texts: Mapping[str, Sequence[str]]) -> bool:
    """Return whether values of a main setting or the recipe are clear alone: not numbers or values of another one."""
    if name not in (*MAIN, "recipe") or name == "weight_average":
        return False
    others = {text for other, of_other in texts.items() if other != name for text in of_other if text}
    return all(re.search(r"[^\W\d_]", text) and text not in others for text in texts[name] if text)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _end(text: str, parts: int) -> str:
    """Return the given number of last parts of a path or a dotted name."""
    if re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", text):
        return ".".join(text.split(".")[-parts:])
    if not _PATH.match(text):
        return text
    return "/".join([part for part in re.split(r"[/\\]", text) if part][-parts:])


def _short_paths(values: list[Any]) -> list[Any]:
    """Return absolute paths relative to their common folder, and other values unchanged."""
    paths = {value for value in values if isinstance(value, str) and os.path.isabs(value)}
    if not paths:
        return values
    common = os.path.commonpath(paths)
    root = os.path.dirname(common) if common in map(os.path.normpath, paths) else common
    return [os.path.relpath(value, root) if value in paths else value for value in values]
