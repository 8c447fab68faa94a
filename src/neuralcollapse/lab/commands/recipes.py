"""`neuralcollapse recipes`: what published experiments there are."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from neuralcollapse.lab.recipes import recipe_path, recipes_table
from neuralcollapse.lab.settings import Settings

SUMMARY = "list the recipes of published experiments"
USAGE = "[NAME]"
DESCRIPTION = (
    "List the recipes of published experiments: what each reproduces, and how many of its settings no source gives, so "
    "that they are our choice."
)
SECTIONS: tuple[type[Settings], ...] = ()


def add_arguments(parser: ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("name", type=str | None, nargs="?", help="show this recipe, with the source of each setting")


def run(settings: Namespace) -> None:
    """Print the table, or one recipe."""
    name = settings.get("name")
    print(recipes_table() if name is None else recipe_path(name).read_text(encoding="utf-8").rstrip())
