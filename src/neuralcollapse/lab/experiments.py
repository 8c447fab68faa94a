"""Experiments as lists of run configurations: one run, or a comparison of methods over seeds."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any, Literal

from neuralcollapse.lab.config import (
    LOSSES,
    METHODS,
    MOST_SEED,
    PUBLISHED_METHODS,
    DataSettings,
    Loss,
    Method,
    RunConfig,
)
from neuralcollapse.lab.recipes import Recipe, load_recipe, recipe_family
from neuralcollapse.lab.running import Ranks
from neuralcollapse.lab.settings import Condition, Settings, nearest, resolve, setting, where, wrong_types
from neuralcollapse.lab.untrusted import without_secrets

_PRODUCTS = Condition(
    "a comparison without combinations", ("combinations",), lambda values: values["combinations"] is None
)


@dataclass(frozen=True, kw_only=True)
class Comparison(Settings):
    """What to compare.

    Raises:
        ValueError: A setting is out of range, has no effect, or lists one thing twice.

    Examples:
        >>> Comparison(methods=["standard", "implicit"], seeds=2).seed_list
        [0, 1]
    """

    recipe: str | None = None
    """Name of a published comparison: NAME-standard, NAME-fixed and NAME-implicit are recipes, and each method is
    trained with its own; --config and flags go over their settings."""
    combinations: list[str] | None = None
    """What to train, in place of methods, losses and weight_averages, where not all of their products are wanted:
    METHOD/LOSS or METHOD/LOSS/SHARE, with commas between them."""
    methods: list[Method] | None = setting(lambda _: list(PUBLISHED_METHODS), belongs_to=_PRODUCTS)
    """Out of standard, fixed, implicit, linear, means, frame, attribute-frame, fixed-frame, softmax-code and
    trust-region (which `train --help` explains), with commas between them. By default the first three."""
    losses: list[Loss] | None = setting(belongs_to=_PRODUCTS)
    """Train every method with each of these, with commas between them; by default with the one that `loss` says."""
    weight_averages: list[float] | None = setting(belongs_to=_PRODUCTS, at_least=0, at_most=1)
    """Train every method and loss with each of these shares as `weight_average`, 0 for none."""
    seeds: int | list[int] = setting(3, at_least=0, at_most=MOST_SEED)
    """Number of seeds, or the seeds with commas between them; of a recipe, by default its own. A seed's runs start from
    the same weights and see the same batches."""
    lr: Literal["auto"] | float | None = setting(above=0)
    """Learning rate, at the start; the greatest, of one-cycle. auto: every method takes with each loss the one of
    lr_candidates that is best on a validation split, which is held out of the training images for that alone."""
    lr_candidates: list[float] | None = setting(
        lambda _: [0.005, 0.015, 0.05, 0.15, 0.5], belongs_to=where(lr="auto"), above=0
    )
    """Rates to choose from, with commas between them: by the last validation accuracy, then by the mean over epochs, of
    one seed that is not compared. By default 0.005,0.015,0.05,0.15,0.5."""
    tuning_share: float | None = setting(0.2, belongs_to=where(lr="auto"), above=0, at_most=0.9)
    """Share of the training images held out while rates are chosen, where validation_share does not say another."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("combinations", "methods", "losses", "weight_averages"):
            values = getattr(self, name)
            if values is not None and (not values or len(set(values)) < len(values)):
                raise ValueError(f"{name} must be different ones, at least one, got {values}")
        self.kinds()
        if self.lr_candidates is not None and len(set(self.lr_candidates)) < max(2, len(self.lr_candidates)):
            raise ValueError(f"lr_candidates must be different ones, at least two, got {self.lr_candidates}")
        if self.seeds == 0:
            raise ValueError("seeds must be at least 1, got 0")
        if not self.seed_list or len(set(self.seed_list)) < len(self.seed_list):
            raise ValueError(f"seeds must be different ones, got {self.seeds}")

    @property
    def seed_list(self) -> list[int]:
        """The seeds, one by one."""
        return self.seeds if isinstance(self.seeds, list) else list(range(self.seeds))

    def kinds(self) -> list[dict[str, Any]]:
        """Method, loss and weight average of each combination, as far as they are said.

        Raises:
            ValueError: One that cannot be read.
        """
        if self.combinations is not None:
            return [_kind(text) for text in self.combinations]
        axes: dict[str, list[Any]] = {"method": list(self.methods or [])}
        if self.losses is not None:
            axes["loss"] = list(self.losses)
        if self.weight_averages is not None:
            axes["weight_average"] = [share or None for share in self.weight_averages]
        return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def single_run(settings: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> RunConfig:
    """One run, with the settings of the recipe that is named, if any, where no others are given.

    Args:
        settings: Those that are asked for; each is to have an effect.
        base: Values to take where none is given, in place of the recipe's.

    Raises:
        ValueError: There is no such recipe, or a setting is wrong or has no effect.

    Examples:
        >>> run = single_run({"recipe": "zhu2021-mnist-sgd", "epochs": 3})
        >>> run.optimizer, run.lr, run.epochs
        ('sgd', 0.05, 3)
    """
    if base is None:
        recipe = settings.get("recipe")
        base = {} if recipe is None else load_recipe(recipe).settings
    _check_names(settings)
    _check_types(settings, base)
    values, refused = resolve(RunConfig, settings, base)
    if refused:
        raise ValueError(next(iter(refused.values())))
    _check_reached(settings, values)
    return RunConfig(**values)


def comparison_runs(
    comparison: Comparison, settings: Mapping[str, Any], base: Mapping[str, Any] | None = None
) -> list[RunConfig]:
    """Every method with every loss, weight average and seed.

    Each method has the settings of its recipe, if the comparison names some.

    Args:
        comparison: Which methods, losses, weight averages and seeds. With its ``lr`` ``"auto"`` the rates are still to
            be chosen.
        settings: Those that all runs share; each counts where it has an effect, and is to have one in one run at least.
        base: Values to take where none is given, before those of a recipe.

    Raises:
        ValueError: There are no such recipes, they are of different data, or a setting is wrong or has no effect.

    Examples:
        >>> runs = comparison_runs(Comparison(methods=["fixed", "implicit"], seeds=2), {"proximal_weight": 0.1})
        >>> [(run.method, run.seed, run.proximal_weight) for run in runs]
        [('fixed', 0, None), ('implicit', 0, 0.1), ('fixed', 1, None), ('implicit', 1, 0.1)]
    """
    _check_names(settings, without=("recipe", "method", "seed"))
    kinds = comparison.kinds()
    for name, axis in (("loss", "losses"), ("weight_average", "weight_averages")):
        if name in kinds[0] and settings.get(name) is not None:
            raise ValueError(f"{name} must not be given beside {'combinations' if comparison.combinations else axis}")
    if comparison.lr == "auto":
        base = {name: value for name, value in (base or {}).items() if name != "lr"}
    _check_types(settings, base)
    methods = [kind["method"] for kind in kinds]
    bases = {method: base or {} for method in methods}
    names: dict[str, str | None] = dict.fromkeys(methods)
    if comparison.recipe is not None:
        family = _family(str(comparison.recipe), methods)
        bases = {method: {**recipe.settings, **(base or {})} for method, recipe in family.items()}
        names = {method: recipe.name for method, recipe in family.items()}
    chosen, refusals = [], []
    for kind in kinds:
        values, refused = resolve(RunConfig, {**settings, **kind}, bases[kind["method"]])
        _check_reached(settings, values)
        chosen.append(values | {"recipe": names[kind["method"]]})
        refusals.append(refused)
    everywhere = set.intersection(*map(set, refusals))
    if everywhere:
        raise ValueError(next(reason for name, reason in refusals[0].items() if name in everywhere))
    if comparison.lr == "auto" and any(values["lr"] is None for values in chosen):
        raise ValueError("lr auto belongs to an optimizer with a learning rate: not to agd")
    return [RunConfig(**values | {"seed": seed}) for seed in comparison.seed_list for values in chosen]


def tell_apart(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What tells each run from the others, seeds apart.

    That is its method, its loss, its weight average, and what does not follow from these.

    Args:
        runs: Their settings.

    Returns:
        For each the telling ones of its settings, of an external model its name as the method; loss and weight average
        are among them where not all have the same. Secrets are left out, and absolute paths are relative to what they
        have in common.

    Examples:
        >>> tell_apart([{"method": "fixed", "lr": 0.1}, {"method": "fixed", "lr": 0.2}, {"method": "means", "lr": 0.1}])
        [{'method': 'fixed', 'lr': 0.1}, {'method': 'fixed', 'lr': 0.2}, {'method': 'means', 'lr': 0.1}]
    """
    runs = [
        without_secrets({**run, "method": run.get("method") or run.get("name") or run.get("model")}) for run in runs
    ]
    compared = ("method", "loss", "weight_average")
    own = ("seed", "recipe", "loggers", "device", "name", "model", *compared)
    names = sorted({name for run in runs for name in run}.difference(own))
    kinds: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for run in runs:
        kinds.setdefault(tuple(run.get(name) for name in compared), []).append(run)
    telling = [name for name in names if any(len({str(run.get(name)) for run in kind}) > 1 for kind in kinds.values())]
    several = [name for name in compared[1:] if len({run.get(name) for run in runs}) > 1]
    shown = {name: _short_paths([run.get(name) for run in runs]) for name in ("method", *several, *telling)}
    return [{name: values[place] for name, values in shown.items()} for place in range(len(runs))]


def _short_paths(values: list[Any]) -> list[Any]:
    """Absolute paths relative to their common folder; other values as they are."""
    paths = {value for value in values if isinstance(value, str) and os.path.isabs(value)}
    if not paths:
        return values
    common = os.path.commonpath(paths)
    root = os.path.dirname(common) if common in map(os.path.normpath, paths) else common
    return [os.path.relpath(value, root) if value in paths else value for value in values]


def label_of(telling: Mapping[str, Any]) -> str:
    """What tells a run from others, in words: the method, then the loss, then settings that are in force by name.

    Examples:
        >>> label_of({"method": "fixed", "loss": "nonl", "lr": 0.1})
        'fixed nonl lr=0.1'
    """
    there = {name: value for name, value in telling.items() if value is not None}
    return " ".join(str(value) if name in ("method", "loss") else f"{name}={value}" for name, value in there.items())


def common_settings(runs: Sequence[RunConfig]) -> dict[str, Any]:
    """The settings on which all runs agree in which they are in force, but for recipe, method, seed and ranks."""
    shared: dict[str, Any] = {}
    own = {"recipe", "method", "seed", *Ranks.__dataclass_fields__}
    for one in fields(RunConfig):
        found = [getattr(run, one.name) for run in runs if getattr(run, one.name) is not None]
        if found and one.name not in own and all(value == found[0] for value in found):
            shared[one.name] = found[0]
    return shared


def comparison_of(settings: Mapping[str, Any]) -> Comparison:
    """What to compare; the seeds are by default those of the recipes, if some are named."""
    own = {one.name: settings.get(one.name) for one in fields(Comparison)}
    if own["seeds"] is None and own["recipe"] is not None:
        own["seeds"] = next(iter(recipe_family(str(own["recipe"])).values())).seeds
    return Comparison(**{name: value for name, value in own.items() if value is not None})


def _kind(text: str) -> dict[str, Any]:
    """What METHOD/LOSS/SHARE says."""
    found = re.fullmatch(r"([\w-]+)/([\w-]+)(?:/(\d*\.?\d+))?", text)
    if found is None or found[1] not in METHODS or found[2] not in LOSSES:
        raise ValueError(
            f"combinations must be METHOD/LOSS or METHOD/LOSS/SHARE, with methods {', '.join(METHODS)} and losses "
            f"{', '.join(LOSSES)}, got {text!r}"
        )
    return {"method": found[1], "loss": found[2], "weight_average": float(found[3] or 0) or None}


def _family(name: str, methods: Sequence[str]) -> dict[str, Recipe]:
    family: Mapping[str, Recipe] = recipe_family(name)
    first, *others = (
        {one.name: recipe.settings.get(one.name) for one in fields(DataSettings)} for recipe in family.values()
    )
    differing = [name for name in first if any(other[name] != first[name] for other in others)]
    if differing:
        raise ValueError(
            f"recipe must name recipes of the same data, and those of {name!r} differ in {', '.join(differing)}"
        )
    return {method: family[method] for method in methods}


def _check_reached(settings: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Epochs that are asked for must come; those of a recipe need not, where it is cut short."""
    for name in ("checkpoint_epochs", "milestones"):
        beyond = [epoch for epoch in settings.get(name) or [] if epoch > values["epochs"]]
        if beyond and values[name] is not None:
            raise ValueError(f"{name} must be at most epochs, which is {values['epochs']}, got {beyond[0]}")


def _check_types(*sources: Mapping[str, Any] | None) -> None:
    """Values of other types, such as those of a damaged file, are refused before anything is decided by them."""
    for source in sources:
        if wrong := wrong_types(RunConfig, source or {}):
            raise ValueError(next(iter(wrong.values())))


def _check_names(settings: Mapping[str, Any], *, without: Iterable[str] = ()) -> None:
    known = {one.name for one in fields(RunConfig)}.difference(without)
    for name in settings:
        if name not in known:
            raise ValueError(f"{name} is no setting{nearest(name, known)}")
