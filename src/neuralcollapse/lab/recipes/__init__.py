"""Recipes: the settings of published experiments, one YAML file each, with the source of every setting beside it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from neuralcollapse.lab.settings import nearest

# What stands behind a setting that no source gives; a reason may follow it in parentheses.
OUR_CHOICE = "# not published: our choice"
_FOLDER = Path(__file__).parent
_REPRODUCES = "# Reproduces: "
_METHODS = ("standard", "fixed", "implicit")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a tenth of the time, where it is there


@dataclass(frozen=True)
class Recipe:
    """What a recipe reproduces.

    Attributes:
        name: The name of its file, without the ending.
        reproduces: Which experiment of which paper.
        settings: Those of one run, with the first of the seeds.
        seeds: The published ones.
        choices: Number of settings that no source gives.
        path: Its file.
    """

    name: str
    reproduces: str
    settings: dict[str, Any]
    seeds: list[int]
    choices: int
    path: Path


def recipe_names() -> list[str]:
    """The names of all recipes, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of a recipe.

    Raises:
        ValueError: There is no recipe of that name; the nearest ones are named.
    """
    names = recipe_names()
    if name not in names:
        raise ValueError(
            f"recipe must be one of those that 'neuralcollapse recipes' lists, got {name!r}{nearest(name, names)}"
        )
    return _FOLDER / f"{name}.yaml"


def load_recipe(name: str) -> Recipe:
    """What a recipe reproduces, read from its file.

    Raises:
        ValueError: There is no recipe of that name.

    Examples:
        >>> recipe = load_recipe("zhu2021-mnist-sgd")
        >>> recipe.settings["data"], recipe.settings["backbone"], recipe.settings["epochs"]
        ('mnist', 'resnet18', 200)
    """
    path = recipe_path(name)
    text = path.read_text(encoding="utf-8")
    settings = yaml.load(text, _LOADER)
    seeds = settings.pop("seeds", None) or [settings["seed"]]
    return Recipe(
        name=name,
        reproduces=text.splitlines()[0].removeprefix(_REPRODUCES),
        settings=settings | {"seed": seeds[0]},
        seeds=seeds,
        choices=text.count(OUR_CHOICE),
        path=path,
    )


def recipes() -> list[Recipe]:
    """All recipes, by name."""
    return [load_recipe(name) for name in recipe_names()]


def recipe_families() -> list[str]:
    """Every NAME of which NAME-standard, NAME-fixed and NAME-implicit are recipes."""
    names = set(recipe_names())
    stems = {name.removesuffix(f"-{_METHODS[0]}") for name in names if name.endswith(f"-{_METHODS[0]}")}
    return sorted(stem for stem in stems if all(f"{stem}-{method}" in names for method in _METHODS))


def recipe_family(name: str) -> dict[Any, Recipe]:
    """The recipes of a published comparison, by method.

    Raises:
        ValueError: There is no such family; the nearest ones are named.

    Examples:
        >>> [recipe.name for recipe in recipe_family("markou2024-mnist").values()]
        ['markou2024-mnist-standard', 'markou2024-mnist-fixed', 'markou2024-mnist-implicit']
    """
    families = recipe_families()
    if name not in families:
        raise ValueError(
            f"recipe must name a family of recipes (NAME-standard, -fixed and -implicit) to compare, "
            f"got {name!r}{nearest(name, families)}"
        )
    return {method: load_recipe(f"{name}-{method}") for method in _METHODS}


def recipes_table() -> str:
    """All recipes as a table for the terminal."""
    header = ("name", "reproduces", "data", "model", "method", "epochs", "our choices")
    fields = ("data", "backbone", "method", "epochs")
    rows = [(r.name, r.reproduces, *(str(r.settings[name]) for name in fields), str(r.choices)) for r in recipes()]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, tuple("-" * width for width in widths), *rows]
    return "\n".join(_aligned(line, widths) for line in lines)


def _aligned(cells: Iterable[str], widths: list[int]) -> str:
    """Cells padded to their widths: text to the left, the two numbers at the end to the right."""
    *texts, epochs, choices = zip(cells, widths, strict=True)
    padded = [cell.ljust(width) for cell, width in texts] + [cell.rjust(width) for cell, width in (epochs, choices)]
    return "  ".join(padded)
