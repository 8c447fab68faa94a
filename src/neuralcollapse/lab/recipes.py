"""Recipes: settings of published experiments, with the source of every value.

Each file in ``recipes/`` is a family of recipes: the settings of its ``base``, the ``parts`` in which its experiments
differ, and its ``variants``. Each variant is a recipe: the base, overridden by the parts that it names, in their order.
The comment at the end of the line of a setting is its source, and that of the line of a variant states what it
reproduces.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from neuralcollapse.lab.config import PUBLISHED_METHODS, RunConfig
from neuralcollapse.lab.settings import closest_names

# Source text of settings that were not published; a reason may follow in parentheses.
OUR_CHOICE = "not published: our choice"
_FOLDER = Path(__file__).parent / "recipes"
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_COMMENT = "  # "
_ORDER = list(RunConfig.model_fields)


@dataclass(frozen=True)
class Family:
    """Recipes that share a file.

    Attributes:
        name: File name without its suffix; the names of its recipes begin with it.
        title: Subject of the experiments.
        source: Paper, figures and released code.
        published: Published result, with known numbers.
        cost: Compute time of a run.
        notes: Remarks that hold for all recipes.
        recipes: Names of the recipes, in the order of the file.
    """

    name: str
    title: str
    source: str
    published: str
    cost: str
    notes: list[str]
    recipes: list[str]


@dataclass(frozen=True)
class Recipe:
    """A published experiment.

    Attributes:
        name: Name of the recipe in commands.
        reproduces: Paper, figure and experiment.
        settings: Settings of one run, with the first of the published seeds.
        seeds: Published seeds.
        lines: Line of each setting in the file: name, value and source.
        family: Family to which the recipe belongs.
    """

    name: str
    reproduces: str
    settings: dict[str, Any]
    seeds: list[int]
    lines: dict[str, str]
    family: Family

    @property
    def sources(self) -> dict[str, str]:
        """Source of each setting."""
        return {name: line.partition(_COMMENT)[2] for name, line in self.lines.items()}

    @property
    def choices(self) -> int:
        """Number of settings without a published value."""
        return sum(source.startswith(OUR_CHOICE) for source in self.sources.values())

    @property
    def text(self) -> str:
        """Text of the recipe as a YAML file of settings, each with its source."""
        header = {"Reproduces": self.reproduces, "Source": self.family.source, "Published": self.family.published}
        remarks = [f"{name}: {value}" for name, value in (header | {"Cost": self.family.cost}).items()]
        comments = [
            textwrap.fill(remark, 118, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False)
            for remark in (*remarks, *self.family.notes)
        ]
        return "\n".join([*comments, *self.lines.values()])


def recipe_names() -> list[str]:
    """Return the names of all recipes, sorted."""
    return [recipe.name for recipe in recipes()]


def recipes() -> list[Recipe]:
    """Return all recipes, sorted by name."""
    found = {name: recipe for path in _FOLDER.glob("*.yaml") for name, recipe in _read(path).items()}
    return [found[name] for name in sorted(found)]


def families() -> list[Family]:
    """Return all families, sorted by name."""
    return [next(iter(_read(path).values())).family for path in sorted(_FOLDER.glob("*.yaml"))]


def load_recipe(name: str) -> Recipe:
    """Return a recipe, read from the file of its family.

    Raises:
        ValueError: if no recipe has this name; the message contains the nearest names.

    Examples:
        >>> recipe = load_recipe("zhu2021-mnist-sgd")
        >>> recipe.settings["data"], recipe.settings["backbone"], recipe.settings["epochs"]
        ('mnist', 'resnet18', 200)
        >>> recipe.sources["lr"]
        'Zhu et al. 2021, readme'
    """
    text = str(name)  # a file of settings may have another type
    recipe = _family_of(text).get(text)
    if recipe is None:
        raise ValueError(
            f"recipe must be one of those that 'neuralcollapse recipes' lists, "
            f"got {name!r}{closest_names(text, recipe_names())}"
        )
    return recipe


def recipe_comparisons() -> list[str]:
    """Return every NAME for which NAME-standard, NAME-fixed and NAME-implicit are recipes, sorted."""
    names = set(recipe_names())
    stems = {name.removesuffix(f"-{PUBLISHED_METHODS[0]}") for name in names}
    return sorted(stem for stem in stems if all(f"{stem}-{method}" in names for method in PUBLISHED_METHODS))


def recipe_comparison(name: str) -> dict[Any, Recipe]:
    """Return the recipes of a published comparison by method.

    Raises:
        ValueError: if NAME-standard, NAME-fixed and NAME-implicit are not recipes; the message contains the nearest
            names.

    Examples:
        >>> [recipe.name for recipe in recipe_comparison("markou2024-mnist").values()]
        ['markou2024-mnist-standard', 'markou2024-mnist-fixed', 'markou2024-mnist-implicit']
    """
    names = {method: f"{name}-{method}" for method in PUBLISHED_METHODS}
    family = _family_of(names["standard"])
    if not all(recipe in family for recipe in names.values()):
        raise ValueError(
            f"recipe must name a published comparison (NAME-standard, -fixed and -implicit are recipes), "
            f"got {name!r}{closest_names(name, recipe_comparisons())}"
        )
    return {method: family[recipe] for method, recipe in names.items()}


def _family_of(name: str) -> dict[str, Recipe]:
    """Return the recipes of the file whose name is the longest prefix of the given name."""
    paths = [path for path in _FOLDER.glob("*.yaml") if f"{name}-".startswith(f"{path.stem}-")]
    return _read(max(paths, key=lambda path: len(path.stem))) if paths else {}


def _read(path: Path) -> dict[str, Recipe]:
    """Return the recipes of a file by name."""
    text = path.read_text(encoding="utf-8")
    file_lines = text.splitlines()
    loader = _LOADER(text)
    document = loader.get_single_node()
    content = loader.construct_document(document)
    nodes = {key.value: value for key, value in document.value}

    def lines(node: yaml.MappingNode) -> dict[str, str]:
        """Return the line of each key."""
        return {key.value: file_lines[key.start_mark.line].strip() for key, _ in node.value}

    base, variants = lines(nodes["base"]), lines(nodes["variants"])
    parts = {key.value: lines(value) for key, value in nodes["parts"].value}
    header = {key: content[key] for key in ("title", "source", "published", "cost")}
    family = Family(path.stem, **header, notes=content.get("notes", []), recipes=list(variants))
    found = {}
    for name, line in variants.items():
        settings, setting_lines = dict(content["base"]), dict(base)
        for part in content["variants"][name]:
            settings |= content["parts"][part]
            setting_lines |= parts[part]
        seeds = settings.pop("seeds", None) or [settings["seed"]]
        found[name] = Recipe(
            name=name,
            reproduces=line.partition("]")[2].partition(_COMMENT)[2],
            settings=settings | {"seed": seeds[0]},
            seeds=seeds,
            lines=dict(sorted(setting_lines.items(), key=lambda item: _place(item[0]))),
            family=family,
        )
    return found


def _place(name: str) -> int:
    """Return the position of a setting among the settings of a run."""
    return _ORDER.index("seed" if name == "seeds" else name)
