"""Studies: a published figure as runs, claims and two scales, one YAML file each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

from neuralcollapse.lab.config import RunConfig
from neuralcollapse.lab.experiments import single_run
from neuralcollapse.lab.recipes import load_recipe
from neuralcollapse.lab.results.verdicts import Claim, Kind, Relation, Value
from neuralcollapse.lab.settings import closest_names, load_typed_yaml

SCALES = ("small", "full")
_FOLDER = Path(__file__).parent / "studies"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Size of a study's runs.

    Attributes:
        cost: Compute of all runs, in words.
        seeds: Seeds of every run.
        settings: Settings of all runs where they have an effect; they override those of recipes.
        runs: Settings of single runs, which override these.
        reduced: Differences from the published size, in words; None without any.
    """

    cost: str
    seeds: list[int]
    settings: dict[str, Any]
    runs: dict[str, dict[str, Any]]
    reduced: str | None


@dataclass(frozen=True, kw_only=True)
class Study:
    """A published figure.

    Attributes:
        name: File name without its suffix.
        title: Subject of the figure.
        source: Paper and figure.
        figure: Name of the figure to draw, of those of `plot`.
        runs: Settings of each run by its name, with the ``recipe`` that it starts from. Empty for the unconstrained
            features model.
        is_ufm: If True, the runs are all methods and optimisers of the unconstrained features model.
        claims: Claims to judge.
        scales: Scales by name.
    """

    name: str
    title: str
    source: str
    figure: str
    runs: dict[str, dict[str, Any]]
    is_ufm: bool
    claims: list[Claim]
    scales: dict[str, Scale]

    def scale(self, name: str) -> Scale:
        """Return a scale by name.

        Raises:
            ValueError: if the study has no scale of that name.
        """
        if name not in self.scales:
            raise ValueError(f"scale must be {' or '.join(self.scales)} for the study {self.name}, got {name!r}")
        return self.scales[name]


def study_names() -> list[str]:
    """Return the names of all studies, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_study(name: str | Path) -> Study:
    """Return a study, read from its file.

    Args:
        name: One of `study_names`, or the path of a file that ends in ``.yaml``.

    Raises:
        ValueError: if no study has that name (the message has the nearest names), or the file is not a study.

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
                f"got {str(name)!r}{closest_names(str(name), names)}"
            )
        path = _FOLDER / f"{name}.yaml"
    try:
        content = load_typed_yaml(path.read_text(encoding="utf-8"))
        scales = {scale: _scale(content.pop(scale)) for scale in SCALES if scale in content}
        claims = [_claim(claim) for claim in content.pop("claims")]
        runs = content.pop("runs", {})
        study = Study(name=path.stem, runs=runs, is_ufm=not runs, claims=claims, scales=scales, **content)
    except (yaml.YAMLError, ValueError, AttributeError, KeyError, TypeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{str(path)!r} must be a study, and is not: {reason}") from error
    _check(study, path)
    return study


def _check(study: Study, path: Path) -> None:
    """Check that claims refer to runs, metrics and levels that exist."""
    from neuralcollapse.catalogue import METRICS

    wrong = []
    if not study.scales:
        wrong.append(f"it has no scale, {' or '.join(SCALES)}")
    for claim in study.claims:
        unknown = [run for run in (*claim.of, *claim.than) if run not in study.runs]
        if unknown and not study.is_ufm:
            wrong.append(f"a claim is about {unknown[0]!r}, which is not one of its runs {', '.join(study.runs)}")
        if claim.value.kind != "fact" and claim.value.of not in METRICS and not study.is_ufm:
            wrong.append(
                f"a claim is about {claim.value.of!r}, which is not a metric{closest_names(claim.value.of, METRICS)}"
            )
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
    """Return the runs of a study by the names of their folders.

    Args:
        study: Study to run.
        scale: Name of its scale.
        seeds: Seeds of every run, in place of the scale's.
        data: Data of every run, in place of the recipes'.

    Raises:
        ValueError: if the study has no such scale, or a setting is invalid.

    Examples:
        >>> runs = study_runs(load_study("markou2024-mnist"), "small", seeds=[1])
        >>> {name: (run.method, run.seed, run.optimizer) for name, run in runs.items()}["fixed-seed1"]
        ('fixed', 1, 'agd')
    """
    size = study.scale(scale)
    runs = {}
    for seed in size.seeds if seeds is None else seeds:
        for label, settings in study.runs.items():
            given = {**settings, **size.runs.get(label, {}), "seed": seed} | ({} if data is None else {"data": data})
            recipe = given.pop("recipe", None)
            base = {} if recipe is None else {**load_recipe(recipe).settings, "recipe": recipe}
            runs[f"{label}-seed{seed}"] = single_run(given, base | size.settings)
    return runs


def _scale(content: Mapping[str, Any]) -> Scale:
    return Scale(**{"settings": {}, "runs": {}, "reduced": None, **content})


def _claim(content: Mapping[str, Any]) -> Claim:
    """Return a claim from its mapping, whose key ``below`` etc. is the relation, with runs or a bound as its value."""
    given = {str(name).replace("_", " "): value for name, value in content.items()}
    relations = [name for name in given if name in get_args(Relation)]
    if len(relations) != 1:
        raise TypeError(f"a claim needs one of {', '.join(get_args(Relation))}, and has {relations}")
    relation = given.pop(relations[0])
    than, bound = ([], relation) if isinstance(relation, int | float) else (_list(relation), given.pop("bound", None))
    value, of = Value(**given.pop("value")), _list(given.pop("of"))
    return Claim(**given, value=value, of=of, relation=relations[0], than=than, bound=bound)  # type: ignore[arg-type]


def _list(value: str | list[str]) -> list[str]:
    return value if isinstance(value, list) else [value]
