"""Experiments as lists of run configurations: single runs, comparisons, and base sessions of incremental training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from neuralcollapse.lab.config import (
    PUBLISHED_METHODS,
    AtLeast1,
    DataSettings,
    HeldOut,
    Loss,
    Method,
    Positive,
    RunConfig,
    Seed,
    Share,
)
from neuralcollapse.lab.recipes import Recipe, load_recipe, recipe_comparison
from neuralcollapse.lab.settings import Condition, Settings, closest_names, where

_PUBLISHED: list[Method] = [*PUBLISHED_METHODS]
_AXES = {"loss": "losses", "weight_average": "weight_averages"}


class Comparison(Settings):
    """Comparison.

    Raises:
        ValueError: if a setting is out of range, has no effect, or repeats a value.

    Examples:
        >>> Comparison(methods=["standard", "implicit"], seeds=2).seed_list
        [0, 1]
    """

    recipe: str | None = None
    """Name of a published comparison: NAME-standard, NAME-fixed and NAME-implicit are recipes, and each method is
    trained with its recipe; --config and flags override the settings."""
    methods: list[Method] = Field(default_factory=lambda: list(_PUBLISHED))
    """Comma-separated methods, which `train --help` explains. By default standard,fixed,implicit."""
    losses: list[Loss] | None = None
    """Train every method with each of these comma-separated losses; by default with that of `loss`."""
    weight_averages: list[Share] | None = None
    """Train every method and loss with each of these values of `weight_average`; 0 means no average."""
    seeds: Seed | list[Seed] = 3
    """Number of seeds, or comma-separated seeds; by default those of the recipe, if any. Runs with the same seed start
    from the same weights and use the same batches."""
    lr: Literal["auto"] | Positive | None = None
    """Initial learning rate; for one-cycle, the maximum. auto: every method with each loss uses the value of
    lr_candidates that is best on a validation split, which is held out of the training images only for this choice."""
    lr_candidates: Annotated[list[Positive] | None, where(lr="auto")] = Field(
        default_factory=lambda: [0.005, 0.015, 0.05, 0.15, 0.5]
    )
    """Comma-separated candidate rates. The criterion is the last validation accuracy, then the mean over epochs, of one
    seed that is not compared; with imbalance, the accuracy is the mean over classes. By default
    0.005,0.015,0.05,0.15,0.5."""
    tuning_share: Annotated[HeldOut | None, where(lr="auto")] = 0.2
    """Share of the training images that is held out for the choice of rates, unless validation_share is given."""

    def check(self) -> None:
        """Check settings together."""
        super().check()
        for name in ("methods", "losses", "weight_averages"):
            values = getattr(self, name)
            if values is not None and (not values or len(set(values)) < len(values)):
                raise ValueError(f"{name} must be distinct, at least one, got {values}")
        if self.lr_candidates is not None and len(set(self.lr_candidates)) < max(2, len(self.lr_candidates)):
            raise ValueError(f"lr_candidates must be distinct, at least two, got {self.lr_candidates}")
        if self.seeds == 0:
            raise ValueError("seeds must be at least 1, got 0")
        if not self.seed_list or len(set(self.seed_list)) < len(self.seed_list):
            raise ValueError(f"seeds must be distinct, got {self.seeds}")

    @property
    def seed_list(self) -> list[int]:
        """List of the seeds."""
        return self.seeds if isinstance(self.seeds, list) else list(range(self.seeds))

    def kinds(self) -> list[dict[str, Any]]:
        """Return the method of each combination, with its loss and weight average if several are compared."""
        axes: dict[str, list[Any]] = {"method": list(self.methods)}
        if self.losses is not None:
            axes["loss"] = list(self.losses)
        if self.weight_averages is not None:
            axes["weight_average"] = [share or None for share in self.weight_averages]
        return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


Strategy = Literal["class-means", "class-means-etf", "preassigned-etf", "grown-etf", "learned"]
# Method that trains the base session of each strategy.
STRATEGIES: dict[Strategy, Method] = {
    "class-means": "standard",
    "class-means-etf": "implicit",
    "preassigned-etf": "fixed",
    "grown-etf": "implicit",
    "learned": "standard",
}
FROZEN: tuple[Strategy, ...] = ("class-means", "class-means-etf")  # the network does not change after the first session
_TRAINED = Condition(
    f"strategies other than {' and '.join(FROZEN)}",
    ("strategies",),
    lambda values: not {*values["strategies"]} <= {*FROZEN},
)


class Incremental(Settings):
    """Class-incremental training.

    Raises:
        ValueError: if a setting is out of range, has no effect, or repeats a value.

    Examples:
        >>> Incremental(sessions=[6, 1, 1, 1, 1], shots=5).strategies
        ['class-means', 'class-means-etf', 'preassigned-etf', 'grown-etf', 'learned']
    """

    recipe: str | None = None
    """Name of a published experiment, whose settings --config and flags override; its method is ignored."""
    sessions: list[AtLeast1] = Field(default_factory=list)
    """Comma-separated number of classes per session, in the order of the classes, such as 6,1,1,1,1. Required. The
    first session is an ordinary run, and each later session adds its classes. Classes beyond the sum are left out."""
    strategies: list[Strategy] = Field(default_factory=lambda: list(get_args(Strategy)))
    """Comma-separated strategies; by default all. class-means: nearest class mean of the frozen network, which is
    trained in the first session with method standard; class-means-etf: the same with method implicit. The others train
    the whole network on the images of each session, with the batch norm statistics and the centring mean of the first
    session: preassigned-etf (method fixed), rows of the simplex ETF of all classes, which are assigned before the first
    session; grown-etf (method implicit), the simplex ETF nearest to the means of old and new classes at the start of a
    session; learned (method standard), a learned classifier, the baseline for forgetting."""
    shots: AtLeast1 | None = None
    """Number of images per added class, drawn according to the seed and equal for all strategies. By default all."""
    replay: Annotated[Annotated[int, Field(ge=0)] | None, _TRAINED] = 0
    """Number of images of each earlier class that are replayed in every later session, drawn according to the seed; all
    images if a class has fewer."""
    session_epochs: Annotated[AtLeast1 | None, _TRAINED] = 10
    """Number of epochs of each session after the first."""
    session_lr: Annotated[Literal["auto"] | Positive | None, _TRAINED] = None
    """Learning rate in the sessions after the first, with the schedule of the run; by default a tenth of lr. auto:
    every strategy uses the value of session_lr_candidates with the best accuracy on a validation split, averaged over
    these sessions, for one seed that is not compared; the split is held out of the training images only for this
    choice, in which sessions have about as many steps as with all images."""
    session_lr_candidates: Annotated[list[Positive] | None, where(session_lr="auto")] = Field(
        default_factory=lambda: [0.00005, 0.00015, 0.0005, 0.0015, 0.005]
    )
    """Comma-separated candidate rates. By default 0.00005,0.00015,0.0005,0.0015,0.005."""
    tuning_share: Annotated[HeldOut | None, where(session_lr="auto")] = 0.2
    """Share of the training images that is held out for the choice of rates, unless validation_share is given."""
    freeze: Annotated[list[str] | None, _TRAINED] = Field(default_factory=list)
    """Comma-separated modules of the model whose weights are frozen in the sessions after the first, named as for
    `measure --layers`. By default none."""
    seeds: Seed | list[Seed] = 3
    """Number of seeds, or comma-separated seeds. Strategies with the same seed start from the same weights and use the
    same images."""

    def check(self) -> None:
        """Check settings together."""
        super().check()
        if len(self.sessions) < 2 or self.sessions[0] < 2:
            raise ValueError(
                f"sessions must have at least 2 classes in the first one, and one more session, got {self.sessions}"
            )
        candidates = self.session_lr_candidates
        if candidates is not None and len(set(candidates)) < max(2, len(candidates)):
            raise ValueError(f"session_lr_candidates must be distinct, at least two, got {candidates}")
        for name in ("strategies", "freeze"):
            values = getattr(self, name) or []
            if len(set(values)) < len(values) or (name == "strategies" and not values):
                raise ValueError(f"{name} must be distinct{', at least one' if not values else ''}, got {values}")
        _ = self.base_sessions

    @property
    def base_sessions(self) -> Comparison:
        """Methods and seeds of the first session."""
        return Comparison(methods=list(dict.fromkeys(STRATEGIES[name] for name in self.strategies)), seeds=self.seeds)


def single_run(settings: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> RunConfig:
    """Return one run; settings that are not given are those of the named recipe, if any.

    Args:
        settings: Requested settings; each must have an effect.
        base: Values for settings that are not given, instead of those of the recipe.

    Raises:
        ValueError: if the recipe does not exist, or a setting is invalid or has no effect.

    Examples:
        >>> run = single_run({"recipe": "zhu2021-mnist-sgd", "epochs": 3})
        >>> run.optimizer, run.lr, run.epochs
        ('sgd', 0.05, 3)
    """
    if base is None:
        recipe = settings.get("recipe")
        base = {} if recipe is None else load_recipe(recipe).settings
    config, refused = RunConfig.resolve(settings, base)
    if refused:
        raise ValueError(next(iter(refused.values())))
    _check_epochs(settings, config)
    config.check()
    return config


def comparison_runs(
    comparison: Comparison, settings: Mapping[str, Any], base: Mapping[str, Any] | None = None
) -> list[RunConfig]:
    """Return a run for every method with every loss, weight average and seed.

    If the comparison names a published one, each method has the settings of its recipe.

    Args:
        comparison: Methods, losses, weight averages and seeds. If its ``lr`` is ``"auto"``, the rates remain to be
            chosen.
        settings: Settings of all runs; each applies to the runs in which it has an effect, of which there must be at
            least one.
        base: Values for settings that are not given, with priority over those of a recipe.

    Raises:
        ValueError: if the recipes do not exist or have different data, or a setting is invalid or has no effect.

    Examples:
        >>> runs = comparison_runs(Comparison(methods=["fixed", "implicit"], seeds=2), {"proximal_weight": 0.1})
        >>> [(run.method, run.seed, run.proximal_weight) for run in runs]
        [('fixed', 0, None), ('implicit', 0, 0.1), ('fixed', 1, None), ('implicit', 1, 0.1)]
    """
    for name in ("recipe", "method", "seed"):
        if name in settings:
            raise ValueError(f"{name} is not a setting of all runs{closest_names(name, Comparison.model_fields)}")
    kinds = comparison.kinds()
    for name, axis in _AXES.items():
        if name in kinds[0] and settings.get(name) is not None:
            raise ValueError(f"{name} must not be given together with {axis}")
    base = dict(base or {})
    if comparison.lr == "auto":
        base.pop("lr", None)
    bases: dict[str, dict[str, Any]] = {kind["method"]: base for kind in kinds}
    if comparison.recipe is not None:
        for method, recipe in _recipes_by_method(comparison.recipe, list(bases)).items():
            bases[method] = recipe.settings | base | {"recipe": recipe.name}
    else:
        base.pop("recipe", None)
    resolved = [RunConfig.resolve({**settings, **kind}, bases[kind["method"]]) for kind in kinds]
    for config, _ in resolved:
        _check_epochs(settings, config)
    everywhere = set.intersection(*(set(refused) for _, refused in resolved))
    for name, reason in resolved[0][1].items():
        if name in everywhere:
            raise ValueError(reason)
    if comparison.lr == "auto" and any(config.lr is None for config, _ in resolved):
        raise ValueError("lr auto belongs to an optimizer with a learning rate: not to agd")
    for config, _ in resolved:
        config.check()
    return [config.model_copy(update={"seed": seed}) for seed in comparison.seed_list for config, _ in resolved]


def incremental_runs(
    protocol: Incremental, settings: Mapping[str, Any], base: Mapping[str, Any] | None = None
) -> list[RunConfig]:
    """Return the runs of the first session, one for each method and seed, not yet with the classes to hold out.

    Args:
        protocol: Sessions, strategies and seeds.
        settings: Settings of all runs, as for `comparison_runs`.
        base: Values for settings that are not given, instead of those of the recipe.

    Raises:
        ValueError: if the recipe does not exist, or a setting is invalid, has no effect or does not fit incremental
            training.

    Examples:
        >>> runs = incremental_runs(Incremental(sessions=[6, 4], strategies=["learned"], seeds=2), {"epochs": 5})
        >>> [(run.method, run.seed, run.epochs) for run in runs]
        [('standard', 0, 5), ('standard', 1, 5)]
    """
    if base is None and protocol.recipe is not None:
        base = load_recipe(protocol.recipe).settings
    runs = comparison_runs(protocol.base_sessions, settings, base)
    first = runs[0]
    for name, is_refused, reason in (
        ("hold_out_classes", first.hold_out_classes is not None, "sessions determines when classes are added"),
        ("digits_per_image", first.digits_per_image > 1, "a session adds single classes"),
        ("label_noise", first.label_noise != 0, "sessions are defined by the labels"),
        ("optimizer", first.optimizer == "agd", "it uses a separate initialisation"),
        ("devices", first.ranks > 1, "several ranks are supported for single runs only"),
    ):
        if is_refused:
            raise ValueError(f"{name} must not be {getattr(first, name)} in incremental training: {reason}")
    return runs


def comparison_of(settings: Mapping[str, Any]) -> Comparison:
    """Return the comparison to run; the seeds are by default those of the recipes, if recipes are named."""
    given = {name: settings[name] for name in Comparison.model_fields if settings.get(name) is not None}
    if "seeds" not in given and "recipe" in given:
        given["seeds"] = next(iter(recipe_comparison(str(given["recipe"])).values())).seeds
    return Comparison(**given)


def _recipes_by_method(name: str, methods: Sequence[str]) -> dict[str, Recipe]:
    """Return the recipes of a published comparison, after checking that they have the same data."""
    recipes: Mapping[str, Recipe] = recipe_comparison(name)
    first, *others = (
        {setting: recipe.settings.get(setting) for setting in DataSettings.model_fields} for recipe in recipes.values()
    )
    differing = [setting for setting in first if any(other[setting] != first[setting] for other in others)]
    if differing:
        raise ValueError(
            f"recipe must name recipes with the same data, but those of {name!r} differ in {', '.join(differing)}"
        )
    return {method: recipes[method] for method in methods}


def _check_epochs(settings: Mapping[str, Any], config: RunConfig) -> None:
    """Check that requested epochs occur; epochs of a recipe need not occur if the run is shorter."""
    requested = {name: settings.get(name) for name in ("measure_at", "keep_at")}
    if config.schedule == "step":
        requested["schedule_options.step_at"] = (settings.get("schedule_options") or {}).get("step_at")
    for name, epochs in requested.items():
        for epoch in epochs if isinstance(epochs, list) else []:
            if isinstance(epoch, int) and epoch > config.epochs:
                raise ValueError(f"{name} must be at most epochs, which is {config.epochs}, got {epoch}")
