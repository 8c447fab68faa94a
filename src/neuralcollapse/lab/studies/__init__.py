"""Studies: what a paper's figure shows as runs, claims and two scales, one YAML file each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from neuralcollapse.lab.config import RunConfig
from neuralcollapse.lab.experiments import single_run
from neuralcollapse.lab.parsing import load_typed_yaml
from neuralcollapse.lab.recipes import load_recipe
from neuralcollapse.lab.settings import nearest

Kind = Literal["last", "mean", "epochs", "fall", "deviation", "fact"]
Relation = Literal["below", "above", "like", "at least", "at most"]
SCALES = ("small", "full")
_FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Value:
    """One number of each run.

    Attributes:
        kind: ``"last"`` measured value of a metric; ``"mean"`` over measured epochs; ``"epochs"`` until a metric
            reaches ``level``; ``"fall"``, its value at the first measured epoch with the train accuracy ``level`` over
            its last one; ``"deviation"`` from the mean over seeds at the same epoch, without its sign, mean over
            epochs; or a ``"fact"`` of the run's environment, such as its parameters.
        of: The metric, or the name of the fact.
        split: Of the data.
        level: What is reached.
    """

    kind: Kind
    of: str
    split: str = "train"
    level: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What is claimed of some of a study's runs, and how it is measured.

    Attributes:
        text: The claim.
        value: The number of each run that decides it.
        of: The runs that it speaks of.
        relation: ``"below"`` or ``"above"`` each of ``than``, by more than ``bound`` if there is one; ``"like"`` each
            of them, within ``bound``; or ``"at least"`` or ``"at most"`` ``bound``.
        than: The runs that they are compared with, of the same seed.
        bound: In the units of the value; a factor for falls, facts and metrics that the catalogue draws on a
            logarithmic scale.
        published: What the paper prints, where it prints a number.
    """

    text: str
    value: Value
    of: list[str]
    relation: Relation
    than: list[str]
    bound: float | None = None
    published: str | None = None


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of a study is run.

    Attributes:
        cost: In words.
        seeds: Of every run.
        settings: Of all runs, over their recipes', where they have an effect.
        runs: Of single runs, over these.
        reduced: What is less than published, in words; None where nothing is.
    """

    cost: str
    seeds: list[int]
    settings: dict[str, Any]
    runs: dict[str, dict[str, Any]]
    reduced: str | None


@dataclass(frozen=True, kw_only=True)
class Study:
    """One published figure.

    Attributes:
        name: Of its file.
        title: What it shows.
        source: Paper and figure.
        figure: What is drawn, of the figures of `plot`.
        runs: The settings of each run by its name; ``recipe`` is the one that it starts from. None where the features
            are free.
        free_features: The settings of the unconstrained features model; its runs are all their methods and optimisers.
        claims: What is judged.
        scales: By name.
    """

    name: str
    title: str
    source: str
    figure: str
    runs: dict[str, dict[str, Any]]
    free_features: bool
    claims: list[Claim]
    scales: dict[str, Scale]

    def scale(self, name: str) -> Scale:
        """How much is run at a scale.

        Raises:
            ValueError: The study has none of that name.
        """
        if name not in self.scales:
            raise ValueError(f"scale must be {' or '.join(self.scales)} for the study {self.name}, got {name!r}")
        return self.scales[name]


def study_names() -> list[str]:
    """The names of all studies, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_study(name: str | Path) -> Study:
    """A study, read from its file.

    Args:
        name: Of one that is here; or a file of one's own, ending in ``.yaml``.

    Raises:
        ValueError: There is no study of that name, and the nearest ones are named; or the file holds none.

    Examples:
        >>> study = load_study("papyan2020-cifar10")
        >>> study.scale("full").seeds, list(study.runs)
        ([0], ['resnet18'])
    """
    path, names = Path(name), study_names()
    if path.suffix != ".yaml":
        if str(name) not in names:
            raise ValueError(
                f"study must be one of those that 'neuralcollapse study' lists, or a file that ends in .yaml, "
                f"got {str(name)!r}{nearest(str(name), names)}"
            )
        path = _FOLDER / f"{name}.yaml"
    try:
        content = load_typed_yaml(path.read_text(encoding="utf-8"))
        scales = {scale: _scale(content.pop(scale)) for scale in SCALES if scale in content}
        claims = [_claim(one) for one in content.pop("claims")]
        runs = content.pop("runs", {})
        study = Study(name=path.stem, runs=runs, free_features=not runs, claims=claims, scales=scales, **content)
    except (yaml.YAMLError, ValueError, AttributeError, KeyError, TypeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{str(path)!r} must be a study, and is not: {reason}") from error
    _check(study, path)
    return study


def _check(study: Study, path: Path) -> None:
    """See whether a study's parts are about each other."""
    from neuralcollapse.catalogue import METRICS

    wrong = []
    if not study.scales:
        wrong.append(f"it has no scale, {' or '.join(SCALES)}")
    for claim in study.claims:
        names = [one for one in (*claim.of, *claim.than) if one not in study.runs]
        if names and not study.free_features:
            wrong.append(f"a claim is about {names[0]!r}, which is none of its runs {', '.join(study.runs)}")
        if claim.value.kind != "fact" and claim.value.of not in METRICS and not study.free_features:
            wrong.append(f"a claim is about {claim.value.of!r}, which is no metric{nearest(claim.value.of, METRICS)}")
        if claim.value.kind not in get_args(Kind):
            wrong.append(f"kind must be one of {', '.join(get_args(Kind))}, got {claim.value.kind!r}")
        if claim.value.kind in ("epochs", "fall") and math.isnan(claim.value.level):
            wrong.append(f"a claim about {claim.value.kind} of {claim.value.of} has no level")
        if claim.bound is None and (claim.relation == "like" or not claim.than):
            wrong.append(f"a claim {claim.relation!r} needs a bound")
    if wrong:
        raise ValueError(f"{str(path)!r} must be a study, and is not: {wrong[0]}")


def study_runs(
    study: Study, scale: str, seeds: Sequence[int] | None = None, data: str | None = None
) -> dict[str, RunConfig]:
    """The runs of a study by the names of their folders.

    Args:
        study: Which.
        scale: How much of it.
        seeds: Those of every run, in place of the scale's.
        data: Where the data are, in place of the recipes' own.

    Raises:
        ValueError: There is no such scale, or a setting is wrong.

    Examples:
        >>> runs = study_runs(load_study("markou2024-mnist"), "small", seeds=[1])
        >>> {name: (run.method, run.seed, run.optimizer) for name, run in runs.items()}["fixed-seed1"]
        ('fixed', 1, 'agd')
    """
    chosen = study.scale(scale)
    found = {}
    for seed in chosen.seeds if seeds is None else seeds:
        for label, settings in study.runs.items():
            own = {**settings, **chosen.runs.get(label, {})}
            recipe = own.pop("recipe", None)
            base = {} if recipe is None else {**load_recipe(recipe).settings, "recipe": recipe}
            asked = {**own, "seed": seed} | ({} if data is None else {"data": data})
            found[f"{label}-seed{seed}"] = single_run(asked, base | chosen.settings)
    return found


def _scale(content: Mapping[str, Any]) -> Scale:
    return Scale(**{"settings": {}, "runs": {}, "reduced": None, **content})


def _claim(content: Mapping[str, Any]) -> Claim:
    """A claim as its file has it: ``below: [standard]`` is a relation and what it is to."""
    given = {str(name).replace("_", " "): value for name, value in content.items()}
    relations = [name for name in given if name in get_args(Relation)]
    if len(relations) != 1:
        raise TypeError(f"a claim needs one of {', '.join(get_args(Relation))}, and has {relations}")
    relation = given.pop(relations[0])
    than, bound = ([], relation) if isinstance(relation, int | float) else (_list(relation), given.pop("bound", None))
    value, of = Value(**given.pop("value")), _list(given.pop("of"))
    return Claim(**given, value=value, of=of, relation=relations[0], than=than, bound=bound)  # type: ignore[arg-type]


def _list(one: str | list[str]) -> list[str]:
    return one if isinstance(one, list) else [one]
