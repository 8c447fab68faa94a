"""`neuralcollapse recipes`: list the recipes of published experiments, or show one."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from neuralcollapse.lab.commands import Command
from neuralcollapse.lab.recipes import load_recipe, recipes


def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="show this recipe, with the source of each setting")


def _run(settings: Namespace) -> None:
    name = settings.get("name")
    print(recipes_table() if name is None else load_recipe(name).text)


def recipes_table() -> str:
    """Return all recipes as a table for the terminal, with texts on the left and the two numbers on the right."""
    header = ("name", "reproduces", "data", "model", "method", "epochs", "our choices")
    fields = ("data", "backbone", "method", "epochs")
    rows = [(r.name, r.reproduces, *(str(r.settings[name]) for name in fields), str(r.choices)) for r in recipes()]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, tuple("-" * width for width in widths), *rows):
        *texts, epochs, choices = zip(row, widths, strict=True)
        cells = [text.ljust(width) for text, width in texts] + [text.rjust(width) for text, width in (epochs, choices)]
        lines.append("  ".join(cells))
    return "\n".join(lines)


RECIPES = Command(
    "List the recipes of published experiments: what each reproduces, and the number of settings without a published "
    "value, which are our choice. With a name, show the settings with their sources, the published result and the "
    "cost.",
    _add_arguments,
    _run,
)
