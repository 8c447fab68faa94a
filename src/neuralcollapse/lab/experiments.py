"""Experiments as lists of run configurations: one run, or a comparison of methods over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from neuralcollapse.lab.config import METHODS, MOST_SEED, DataSettings, Method, RunConfig
from neuralcollapse.lab.recipes import Recipe, load_recipe, recipe_family
from neuralcollapse.lab.settings import Settings, nearest, resolve, setting


@dataclass(frozen=True, kw_only=True)
class Comparison(Settings):
    """What to compare."""

    recipe: str | None = None
    """Name of a published comparison: NAME-standard, NAME-fixed and NAME-implicit are recipes, and each method is
    trained with its own; --config and flags go over their settings."""
    methods: list[Method] = setting(lambda _: list(METHODS))
    """Out of standard, fixed and implicit, with commas between them."""
    seeds: int | list[int] = setting(3, at_least=0, at_most=MOST_SEED)
    """Number of seeds, or the seeds with commas between them; of a recipe, by default its own. A seed's runs start from
    the same weights and see the same batches."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods must be different ones of {', '.join(METHODS)}, got {self.methods}")
        if self.seeds == 0:
            raise ValueError("seeds must be at least 1, got 0")
        if not self.seed_list or len(set(self.seed_list)) < len(self.seed_list):
            raise ValueError(f"seeds must be different ones, got {self.seeds}")

    @property
    def seed_list(self) -> list[int]:
        """The seeds, one by one."""
        return self.seeds if isinstance(self.seeds, list) else list(range(self.seeds))


def single_run(settings: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> RunConfig:
    """One run, with the settings of the recipe that is named, if any, where no others are given.

    Args:
        settings: Those that are asked for; each is to have an effect.
        base: Values to take where none is given, in place of the recipe's.

    Raises:
        ValueError: There is no such recipe, or a setting is wrong or has no effect.

    Example:
        >>> run = single_run({"recipe": "zhu2021-mnist-sgd", "epochs": 3})
        >>> run.optimizer, run.lr, run.epochs
        ('sgd', 0.05, 3)
    """
    if base is None:
        recipe = settings.get("recipe")
        base = {} if recipe is None else load_recipe(recipe).settings
    _check_names(settings)
    values, refused = resolve(RunConfig, settings, base)
    if refused:
        raise ValueError(next(iter(refused.values())))
    _check_reached(settings, values)
    return RunConfig(**values)


def comparison_runs(
    comparison: Comparison, settings: Mapping[str, Any], base: Mapping[str, Any] | None = None
) -> list[RunConfig]:
    """Every method with every seed; each method with the settings of its recipe, if the comparison names some.

    Args:
        comparison: Which methods and seeds.
        settings: Those that all runs share; each counts where it has an effect, and is to have one in one run at least.
        base: Values to take where none is given, before those of a recipe.

    Raises:
        ValueError: There are no such recipes, they are of different data, or a setting is wrong or has no effect.

    Example:
        >>> runs = comparison_runs(Comparison(methods=["fixed", "implicit"], seeds=2), {"proximal_weight": 0.1})
        >>> [(run.method, run.seed, run.proximal_weight) for run in runs]
        [('fixed', 0, None), ('implicit', 0, 0.1), ('fixed', 1, None), ('implicit', 1, 0.1)]
    """
    _check_names(settings, without=("recipe", "method", "seed"))
    bases = {method: base or {} for method in comparison.methods}
    names: dict[Method, str | None] = dict.fromkeys(comparison.methods)
    if comparison.recipe is not None:
        family = _family(comparison)
        bases = {method: {**recipe.settings, **(base or {})} for method, recipe in family.items()}
        names = {method: recipe.name for method, recipe in family.items()}
    chosen, refusals = {}, []
    for method in comparison.methods:
        values, refused = resolve(RunConfig, {**settings, "method": method}, bases[method])
        _check_reached(settings, values)
        chosen[method] = values | {"recipe": names[method]}
        refusals.append(refused)
    everywhere = set.intersection(*map(set, refusals))
    if everywhere:
        raise ValueError(next(reason for name, reason in refusals[0].items() if name in everywhere))
    return [
        RunConfig(**chosen[method] | {"seed": seed}) for seed in comparison.seed_list for method in comparison.methods
    ]


def common_settings(runs: Sequence[RunConfig]) -> dict[str, Any]:
    """The settings on which all runs agree in which they are in force, but for recipe, method and seed."""
    shared: dict[str, Any] = {}
    for one in fields(RunConfig):
        found = [getattr(run, one.name) for run in runs if getattr(run, one.name) is not None]
        if found and one.name not in ("recipe", "method", "seed") and all(value == found[0] for value in found):
            shared[one.name] = found[0]
    return shared


def comparison_of(settings: Mapping[str, Any]) -> Comparison:
    """What to compare; the seeds are by default those of the recipes, if some are named."""
    own = {one.name: settings.get(one.name) for one in fields(Comparison)}
    if own["seeds"] is None and own["recipe"] is not None:
        own["seeds"] = next(iter(recipe_family(str(own["recipe"])).values())).seeds
    return Comparison(**{name: value for name, value in own.items() if value is not None})


def _family(comparison: Comparison) -> dict[Method, Recipe]:
    family = recipe_family(str(comparison.recipe))
    first, *others = (
        {one.name: recipe.settings.get(one.name) for one in fields(DataSettings)} for recipe in family.values()
    )
    differing = [name for name in first if any(other[name] != first[name] for other in others)]
    if differing:
        raise ValueError(
            f"recipe must name recipes of the same data, and those of {comparison.recipe!r} differ in "
            f"{', '.join(differing)}"
        )
    return {method: family[method] for method in comparison.methods}


def _check_reached(settings: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Epochs that are asked for must come; those of a recipe need not, where it is cut short."""
    for name in ("checkpoint_epochs", "milestones"):
        beyond = [epoch for epoch in settings.get(name) or [] if epoch > values["epochs"]]
        if beyond and values[name] is not None:
            raise ValueError(f"{name} must be at most epochs, which is {values['epochs']}, got {beyond[0]}")


def _check_names(settings: Mapping[str, Any], *, without: Iterable[str] = ()) -> None:
    known = {one.name for one in fields(RunConfig)}.difference(without)
    for name in settings:
        if name not in known:
            raise ValueError(f"{name} is no setting{nearest(name, known)}")
