"""Recipes: the settings of published experiments, one YAML file each, with the source of every setting beside it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

import yaml

# What stands behind a setting that no source gives; a reason may follow it in parentheses.
OUR_CHOICE = "# not published: our choice"
_FOLDER = Path(__file__).parent
_REPRODUCES = "# Reproduces: "


@dataclass(frozen=True)
class Recipe:
    """What a recipe reproduces.

    Attributes:
        name: The name of its file, without the ending.
        reproduces: Which experiment of which paper.
        data: Name of the data set.
        model: Name of the backbone.
        method: standard, fixed or implicit.
        epochs: Passes over the train split.
        choices: Number of settings that no source gives.
        path: Its file.
    """

    name: str
    reproduces: str
    data: str
    model: str
    method: str
    epochs: int
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
        nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.0)
        raise ValueError(
            f"recipe must be one of those that 'neuralcollapse recipes' lists, got {name!r}; "
            f"nearest: {', '.join(nearest)}"
        )
    return _FOLDER / f"{name}.yaml"


def load_recipe(name: str) -> Recipe:
    """What a recipe reproduces, read from its file.

    Raises:
        ValueError: There is no recipe of that name.

    Example:
        >>> recipe = load_recipe("zhu2021-mnist-sgd")
        >>> recipe.data, recipe.model, recipe.epochs
        ('mnist', 'resnet18', 200)
    """
    path = recipe_path(name)
    text = path.read_text(encoding="utf-8")
    settings = yaml.safe_load(text)
    return Recipe(
        name=name,
        reproduces=text.splitlines()[0].removeprefix(_REPRODUCES),
        data=settings["data"],
        model=settings["backbone"],
        method=settings["method"],
        epochs=settings["epochs"],
        choices=text.count(OUR_CHOICE),
        path=path,
    )


def recipes() -> list[Recipe]:
    """All recipes, by name."""
    return [load_recipe(name) for name in recipe_names()]


def recipes_table() -> str:
    """All recipes as a table for the terminal."""
    header = ("name", "reproduces", "data", "model", "method", "epochs", "our choices")
    rows = [(r.name, r.reproduces, r.data, r.model, r.method, str(r.epochs), str(r.choices)) for r in recipes()]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, tuple("-" * width for width in widths), *rows]
    return "\n".join(_aligned(line, widths) for line in lines)


def _aligned(cells: tuple[str, ...], widths: list[int]) -> str:
    """Cells padded to their widths: text to the left, the two numbers at the end to the right."""
    texts = [cell.ljust(width) for cell, width in zip(cells[:-2], widths[:-2], strict=True)]
    numbers = [cell.rjust(width) for cell, width in zip(cells[-2:], widths[-2:], strict=True)]
    return "  ".join(texts + numbers)
