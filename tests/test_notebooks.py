"""The notebooks: their cells run in order, what they show is shown richly, and their pages have the same cells."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# Runs the cells of a notebook in one namespace, as a kernel does, and prints what each cell that ends in an expression
# shows: the kind of its rich representation.
RUNNER = """
import ast, json, sys

namespace = {"__name__": "__main__"}
for number, cell in enumerate(json.load(open(sys.argv[1]))["cells"]):
    if cell["cell_type"] != "code":
        continue
    tree = ast.parse("".join(cell["source"]))
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, f"cell {number}", "exec"), namespace)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), namespace)
        if value is not None:
            kinds = [kind for kind in ("png", "html") if hasattr(value, f"_repr_{kind}_")]
            print("SHOWN", number, kinds[0], len(getattr(value, f"_repr_{kinds[0]}_")()))
"""


def cells_of(notebook: Path) -> list[tuple[str, str]]:
    """Return kind and text of each cell."""
    return [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(notebook.read_text())["cells"]]


def test_there_are_two():
    assert [notebook.stem for notebook in NOTEBOOKS] == ["collapse-in-ten-minutes", "measure-your-model"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_of_format_4_and_has_no_stored_output(notebook):
    content: dict[str, Any] = json.loads(notebook.read_text())
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    for cell in content["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        assert "".join(cell["source"]).strip()
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_tables_and_pictures(notebook, tmp_path):
    command = [sys.executable, "-c", RUNNER, str(notebook)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    shown = [line.split()[2:] for line in done.stdout.split("\n") if line.startswith("SHOWN")]
    kinds = [kind for kind, _ in shown]
    assert kinds.count("html") >= 1
    assert kinds.count("png") >= 2
    assert all(int(size) > (10_000 if kind == "png" else 300) for kind, size in shown)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_page_of_a_notebook_has_its_cells(notebook):
    page = notebook.with_suffix(".md").read_text()
    cells = cells_of(notebook)
    assert re.findall(r"^```python\n(.*?)\n```$", page, re.M | re.S) == [text for kind, text in cells if kind == "code"]
    place = -1
    for kind, text in cells:
        place, before = page.find(text if kind == "markdown" else f"```python\n{text}\n```"), place
        assert place > before, text
